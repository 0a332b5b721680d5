"""IJB-B and IJB-C in the layout of insightface: loose crops, and text files about them.

    <root>/loose_crop/<n>.jpg
    <root>/meta/<set>_name_5pts_score.txt       name x1 y1 ... x5 y5 score
    <root>/meta/<set>_face_tid_mid.txt          name template media, in the same order
    <root>/meta/<set>_template_pair_label.txt   template template 0|1
    <root>/meta/<set>_1N_gallery_{G1,G2}.csv    template,subject,... (IJB-B: S1, S2); a header row
    <root>/meta/<set>_1N_probe_mixed.csv        likewise

A template is all images of one person in one role; images of one media (a video) count as one. The
three csv files may be absent: then the set has no search protocol.

Shapes: N images, P pairs, T templates, H rows, W columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.log import InputError, get_logger
from face_lfr.data.align import align
from face_lfr.data.challenge import Numbers, read_integers, read_lines
from face_lfr.data.transforms import read_rgb

GALLERIES = {"ijbb": ("S1", "S2"), "ijbc": ("G1", "G2")}
FACE_FIELDS = 12  # a name, five points, a score


class Subjects(NamedTuple):
    """Templates of a gallery or of the probes: ids ascending (T,) int64, and whom they show."""

    template_T: Numbers
    subject_T: Numbers


@dataclass(frozen=True)
class IjbData:
    """Metadata of IJB-B or IJB-C, image by image.

    Attributes:
        name: "ijbb" or "ijbc".
        root: folder that holds `loose_crop` and `meta`.
        names: of the N images.
        landmark_N52: float32 points in the loose crop.
        score_N: float32 score of the face detector.
        template_N, media_N: int64 ids.
        pair_P2: int64 template ids of the verification protocol.
        same_P: bool, whether a pair shows one person.
        galleries: of the search protocol by name, empty when it is absent.
        probes: of the search protocol, or None.
    """

    name: str
    root: Path
    names: Sequence[str]
    landmark_N52: NDArray[np.float32]
    score_N: NDArray[np.float32]
    template_N: Numbers
    media_N: Numbers
    pair_P2: Numbers
    same_P: NDArray[np.bool_]
    galleries: Mapping[str, Subjects]
    probes: Subjects | None

    def images(self, size: int = 112) -> "IjbImages":
        """The N images, aligned when they are read."""
        return IjbImages(self, size)


@dataclass(frozen=True)
class IjbImages:
    """Images of an IJB set by row, aligned to `size` x `size`."""

    data: IjbData
    size: int = 112

    def __len__(self) -> int:
        return len(self.data.names)

    def read(self, row: int) -> np.ndarray:
        """Aligned image uint8 (size, size, 3), RGB.

        Raises:
            InputError: it cannot be read, or its landmarks are degenerate.
        """
        image = read_rgb(self.name(row))
        try:
            return align(image, self.data.landmark_N52[row], self.size)
        except ValueError as error:
            raise InputError(self.name(row), "cannot be aligned", error) from error

    def label(self, row: int) -> int:
        """Id of the template the image belongs to."""
        return int(self.data.template_N[row])

    def name(self, row: int) -> str:
        """Path of the image."""
        return str(self.data.root / "loose_crop" / self.data.names[row])


def load_ijb(root: Path | str, name: str = "ijbc") -> IjbData:
    """Read the metadata; no image is touched.

    Args:
        root: the folder with `meta`, or the one above it (`<root>/IJBC/meta`).
        name: "ijbb" or "ijbc".

    Raises:
        InputError: an unknown name; a file that is missing or malformed, with the line; files
            that contradict each other; a template of a protocol without any image.
    """
    if name not in GALLERIES:
        raise InputError("name", f"accepted: {', '.join(GALLERIES)}", name)
    root = _find_root(Path(root), name)
    meta = root / "meta"
    faces, points_N11 = _read_faces(meta / f"{name}_name_5pts_score.txt")
    template_N, media_N = _read_templates(meta / f"{name}_face_tid_mid.txt", faces)
    known = np.unique(template_N)
    pair_P2, same_P = _read_pairs(meta / f"{name}_template_pair_label.txt", known)
    galleries, probes = _read_search(meta, name, known)
    counts = (root, len(faces), len(known), int(same_P.sum()), int((~same_P).sum()))
    message = "%s: %d images, %d templates, %d genuine and %d impostor pairs, %s"
    searched = "no search protocol" if probes is None else f"{len(probes.template_T)} probes"
    get_logger(__name__).info(message, *counts, searched)
    landmark_N52 = points_N11[:, :10].reshape(-1, 5, 2)
    return IjbData(
        name, root, faces, landmark_N52, points_N11[:, 10], template_N, media_N, pair_P2, same_P,
        galleries, probes,
    )  # fmt: skip


def _find_root(root: Path, name: str) -> Path:
    places = (root, root / name.upper(), root / name)
    for place in places:
        if (place / "meta").is_dir():
            return place
    raise InputError(
        root, "data set not found, there is no", " or ".join(f"{p}/meta" for p in places)
    )


def _read_faces(path: Path) -> tuple[list[str], NDArray[np.float32]]:
    """Names, and (N, 11) float32: five points and the score."""
    rows = [line.split() for line in read_lines(path)]
    for number, row in enumerate(rows, start=1):
        if len(row) != FACE_FIELDS:
            what = "line is not name, five points, score: 12 fields, found"
            raise InputError(f"{path}:{number}", what, len(row))
    try:
        points_N11 = np.array([row[1:] for row in rows], np.float32)
    except ValueError as error:
        raise _first_bad_number(path, rows) from error
    bad = np.flatnonzero(~np.isfinite(points_N11).all(axis=1))
    if bad.size:
        raise InputError(f"{path}:{bad[0] + 1}", "a number is not finite", " ".join(rows[bad[0]]))
    low = np.flatnonzero(points_N11[:, 10] < 0)
    if low.size:
        raise InputError(f"{path}:{low[0] + 1}", "score is below 0", points_N11[low[0], 10])
    return [row[0] for row in rows], points_N11


def _first_bad_number(path: Path, rows: Sequence[Sequence[str]]) -> InputError:
    for number, row in enumerate(rows, start=1):
        for word in row[1:]:
            try:
                float(word)
            except ValueError:
                return InputError(f"{path}:{number}", "is no number", word)
    return InputError(path, "holds a number that cannot be read")


def _read_templates(path: Path, faces: Sequence[str]) -> tuple[Numbers, Numbers]:
    """Template and media of each image; the names have to be those of the other file."""
    lines = read_lines(path)
    ids_N2 = np.empty((len(lines), 2), np.int64)
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if len(words) != 3:
            raise InputError(f"{path}:{number}", "line is not name, template, media", line)
        if number <= len(faces) and words[0] != faces[number - 1]:
            what = f"another image is in this line of the landmarks, {faces[number - 1]}, than"
            raise InputError(f"{path}:{number}", what, words[0])
        ids_N2[number - 1] = [_parse_id(word, f"{path}:{number}") for word in words[1:]]
    if len(lines) != len(faces):
        raise InputError(path, f"needs {len(faces)} lines, one for each image", len(lines))
    return ids_N2[:, 0], ids_N2[:, 1]


def _parse_id(word: str, where: str) -> int:
    text = word.strip().strip('"')
    if not (text.isascii() and text.isdigit()):
        raise InputError(where, "id is no whole number from 0 on", word or "''")
    return int(text)


def _read_pairs(path: Path, known: Numbers) -> tuple[Numbers, NDArray[np.bool_]]:
    rows_P3 = read_integers(path, 3)
    bad = np.flatnonzero((rows_P3[:, 2] != 0) & (rows_P3[:, 2] != 1))
    if bad.size:
        raise InputError(f"{path}:{bad[0] + 1}", "label is neither 0 nor 1", rows_P3[bad[0], 2])
    missing_P = ~np.isin(rows_P3[:, :2], known).all(axis=1)
    if missing_P.any():
        row = int(missing_P.argmax())
        template = next(number for number in rows_P3[row, :2] if number not in known)
        raise InputError(f"{path}:{row + 1}", "template has no image", template)
    return rows_P3[:, :2], rows_P3[:, 2] == 1


def _read_search(
    meta: Path, name: str, known: Numbers
) -> tuple[dict[str, Subjects], Subjects | None]:
    """Galleries and probes, or nothing when none of the three files is there."""
    paths = {part: meta / f"{name}_1N_gallery_{part}.csv" for part in GALLERIES[name]}
    probes = meta / f"{name}_1N_probe_mixed.csv"
    if not any(path.is_file() for path in (*paths.values(), probes)):
        return {}, None
    galleries = {part: _read_subjects(path, known) for part, path in paths.items()}
    for part, path in paths.items():
        subject_T = np.sort(galleries[part].subject_T)
        twice = np.flatnonzero(np.diff(subject_T) == 0)
        if twice.size:
            what = "subject has more than one template in the gallery"
            raise InputError(path, what, subject_T[twice[0]])
    return galleries, _read_subjects(probes, known)


def _read_subjects(path: Path, known: Numbers) -> Subjects:
    """Templates of a csv file; a template that fills several rows is taken once."""
    found: dict[int, int] = {}
    present = set(known.tolist())
    for number, line in enumerate(read_lines(path)[1:], start=2):
        where, words = f"{path}:{number}", line.split(",", 2)
        if len(words) < 2:
            raise InputError(where, "row does not begin with template and subject", line)
        template, subject = (_parse_id(word, where) for word in words[:2])
        if template not in present:
            raise InputError(where, "template has no image", template)
        if found.setdefault(template, subject) != subject:
            what = f"template shows subject {found[template]} in a row before and here"
            raise InputError(where, what, subject)
    if not found:
        raise InputError(path, "holds a header and nothing else")
    order = sorted(found)
    return Subjects(np.array(order), np.array([found[template] for template in order]))
