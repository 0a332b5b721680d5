"""Tiny replicas of every format this package reads: for tests and for newcomers.

Each person has a colour and shows five dots where the landmarks of an aligned face lie, so that a
replica can also be learned, and a wrong alignment is seen. Images are 112 x 112 as the real ones
are; those of IJB are loose crops of other sizes.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from face_lfr.data.align import similarity, template
from face_lfr.data.bins import write_bin
from face_lfr.data.image_list import write_list
from face_lfr.data.rec import write_rec

SIDE = 112
PERSONS, IMAGES = 4, 3
FOLDS, FOLD_PAIRS = 10, 2
DISTRACTORS = 5


def write_replica(kind: str, out: Path | str, seed: int = 0) -> Path:
    """Write a replica and return what its loader takes.

    Args:
        kind: rec, folder, list (training); bin, ijb, deepglint, iqiyi (test).
        out: folder, made when absent.
        seed: of the persons' colours and of the noise.

    Returns:
        The folder; for a list its path, and for pairs that of the `.bin`.

    Raises:
        ValueError: another kind.
    """
    if kind not in WRITERS:
        raise ValueError(f"kind={kind!r}; accepted: {', '.join(WRITERS)}")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    return WRITERS[kind](out, seed)


def face(person: int, number: int, seed: int = 0) -> np.ndarray:
    """Image `number` of a person, uint8 (112, 112, 3) RGB."""
    import cv2

    colour = np.random.default_rng([seed, person]).uniform(70, 185, 3)
    noise = np.random.default_rng([seed, person, number]).normal(0, 6, (SIDE, SIDE, 3))
    image_HW3 = (colour + noise).clip(0, 255).astype(np.uint8)
    for dot, (x, y) in enumerate(template()):
        shade = (250, 250, 250) if dot < 2 else (10, 10, 10)
        cv2.circle(image_HW3, (round(x), round(y)), 4, shade, cv2.FILLED, cv2.LINE_AA)
    return image_HW3


def encode(image_HW3: np.ndarray, suffix: str = ".jpg") -> bytes:
    """The RGB image as a picture file."""
    import cv2

    options = [cv2.IMWRITE_JPEG_QUALITY, 95] if suffix == ".jpg" else []
    done, code = cv2.imencode(suffix, image_HW3[..., ::-1], options)
    if not done:
        raise RuntimeError(f"OpenCV cannot encode {suffix}")
    return code.tobytes()


def _save(path: Path, image_HW3: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(image_HW3, path.suffix))


def _text(path: Path, lines: Iterable[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _write_rec(out: Path, seed: int) -> Path:
    """train.rec, train.idx and property, with record 0 and identity records."""
    items = [(encode(face(p, n, seed)), p) for p in range(PERSONS) for n in range(IMAGES)]
    write_rec(out, items, PERSONS)
    return out


def _write_folder(out: Path, seed: int) -> Path:
    """<person>/<number>.jpg; a file that is no image lies among them."""
    for person in range(PERSONS):
        for number in range(IMAGES):
            _save(out / f"id_{person}" / f"{number}.jpg", face(person, number, seed))
    (out / "id_0" / "notes.txt").write_text("no image\n", encoding="utf-8")
    return out


def _write_list(out: Path, seed: int) -> Path:
    """images/*.jpg and list.txt, the persons mixed."""
    entries = []
    for number in range(IMAGES):
        for person in range(PERSONS):
            name = f"images/{number}_{person}.jpg"
            _save(out / name, face(person, number, seed))
            entries.append((name, person))
    write_list(out / "list.txt", entries)
    return out / "list.txt"


def _write_bin(out: Path, seed: int) -> Path:
    """replica.bin: ten folds of two same and two different pairs."""
    jpegs: list[bytes] = []
    issame: list[bool] = []
    for number in range(FOLDS * FOLD_PAIRS):
        person = number % PERSONS
        for other in (person, (person + 1) % PERSONS):
            jpegs += [
                encode(face(person, 2 * number, seed)),
                encode(face(other, 2 * number + 1, seed)),
            ]
            issame.append(person == other)
    write_bin(out / "replica.bin", jpegs, issame)
    return out / "replica.bin"


def _write_deepglint(out: Path, seed: int) -> Path:
    """filelist.txt, labels.txt and the images of persons and of distractors, who occur once."""
    labels = [p for p in range(PERSONS) for _ in range(IMAGES)] + [-1] * DISTRACTORS
    names = [f"{number // 6:03d}/{number:05d}.jpg" for number in range(len(labels))]
    for number, (name, label) in enumerate(zip(names, labels, strict=True)):
        _save(out / name, face(label if label >= 0 else 100 + number, number, seed))
    _text(out / "filelist.txt", names)
    _text(out / "labels.txt", labels)
    return out


def _write_iqiyi(out: Path, seed: int) -> Path:
    """<video>/<frame>.jpg, two videos a person of one to four frames; the list has more words."""
    labels = [number // 2 for number in range(2 * PERSONS)]
    videos = [f"IQIYI_VID_TEST_{7 * number:07d}" for number in range(len(labels))]
    for number, (video, label) in enumerate(zip(videos, labels, strict=True)):
        for frame in range(1 + number % 4):
            _save(out / video / f"{9 + frame}.jpg", face(label, 10 * number + frame, seed))
    _text(out / "filelist.txt", [f"{video} {1 + n % 4}" for n, video in enumerate(videos)])
    _text(out / "labels.txt", labels)
    return out


def _write_ijbc(out: Path, seed: int) -> Path:
    return write_ijb(out, seed)


def write_ijb(out: Path, seed: int = 0, name: str = "ijbc") -> Path:
    """loose_crop and meta of an IJB set: two templates a person, one enrolled and one a probe.

    The first template has three images of two media, the second two of one. Person k is enrolled
    in the first gallery when k is even, else in the second. All pairs of an enrolled template and
    a probe are listed.
    """
    rng = np.random.default_rng([seed, 77])
    faces: list[str] = []
    owners: list[str] = []
    for person in range(PERSONS):
        for template_id, media in ((11, (1, 2, 2)), (12, (3, 3))):
            for number, medium in enumerate(media):
                image_HW3, point_52 = _loose(face(person, template_id + 9 * number, seed), rng)
                file = f"{len(faces) + 1}.jpg"
                _save(out / "loose_crop" / file, image_HW3)
                points = " ".join(f"{value:.3f}" for value in point_52.ravel())
                faces.append(f"{file} {points} {rng.uniform(0.5, 1):.3f}")
                owners.append(f"{file} {100 * person + template_id} {100 * person + medium}")
    meta = out / "meta"
    _text(meta / f"{name}_name_5pts_score.txt", faces)
    _text(meta / f"{name}_face_tid_mid.txt", owners)
    people = range(PERSONS)
    pairs = [f"{100 * a + 11} {100 * b + 12} {int(a == b)}" for a in people for b in people]
    _text(meta / f"{name}_template_pair_label.txt", pairs)
    header = "TEMPLATE_ID,SUBJECT_ID,FILENAME"
    for part, letter in enumerate(("S1", "S2") if name == "ijbb" else ("G1", "G2")):
        rows = [f"{100 * p + 11},{p + 500},img/{p}.png" for p in people[part::2]]
        _text(meta / f"{name}_1N_gallery_{letter}.csv", [header, *rows, rows[0]])
    probes = [f"{100 * p + 12},{p + 500},frames/{p}.png" for p in people]
    _text(meta / f"{name}_1N_probe_mixed.csv", [header, *probes])
    return out


def _loose(image_HW3: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The face turned, scaled and moved into a larger picture, and where its landmarks are."""
    import cv2

    turn, scale = rng.uniform(-0.4, 0.4), rng.uniform(0.9, 1.3)
    matrix = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    height, width = (int(side) for side in rng.integers(190, 230, 2))
    centre = template().mean(axis=0)
    shift = np.array([width, height]) / 2 - matrix @ centre
    point_52 = template() @ matrix.T + shift
    size = (width, height)
    return cv2.warpAffine(image_HW3, similarity(template(), point_52), size), point_52


WRITERS: dict[str, Callable[[Path, int], Path]] = {
    "rec": _write_rec,
    "folder": _write_folder,
    "list": _write_list,
    "bin": _write_bin,
    "ijb": _write_ijbc,
    "deepglint": _write_deepglint,
    "iqiyi": _write_iqiyi,
}
