"""Open Images in the text format of Sense-X/TSD, which mmdetection reads as well.

    train/0001eeaf4aed83f9.jpg          path with exactly one slash
    0 0                                 whole numbers or nothing; no loader uses them
    2                                   number of boxes
    160 0.0 0.1 0.5 0.9 0               label x1 y1 x2 y2 group, n times
    7 0.25 0.3 0.75 1.0 1

Labels are 1..K, coordinates shares of the width and the height. Beside it lie
`cls-label-description.csv` (`identifier,name,label`), `class_label_tree.np` (see `hierarchy.py`)
and `class_sample_train.pkl`, a pickled dict from label to the numbers of the records with it.

Letters: N records, G boxes, R boxes of a block.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from numpy.typing import NDArray

from common.dist import main_first
from common.log import InputError
from detection_tsd.data.csv_columns import BLOCK_ROWS, Block
from detection_tsd.data.detection_data import DetectionData
from detection_tsd.data.hierarchy import read_label_tree
from detection_tsd.data.oid_files import (
    CORNERS,
    Boxes,
    Duplicates,
    ImageIndex,
    corners,
    keep_rows,
    read_classes,
    refuse,
)
from detection_tsd.data.openimages import GroupOf, assemble, find_images
from detection_tsd.data.unpickle import load_pickle

FIELDS = ("label", *CORNERS, "group")


class Records(NamedTuple):
    """Paths of the N records and their boxes."""

    names: list[str]
    boxes: Boxes


class _Record(NamedTuple):
    """A record: its path, the line of its first box, and the lines of its boxes."""

    name: str
    first: int
    lines: list[str]


def read_records(
    path: Path | str,
    num_classes: int,
    duplicates: Duplicates = "error",
    dtype: type[np.floating] = np.float64,
) -> Records:
    """Read a file of records; `Boxes.image_G` are their numbers.

    Args:
        path: of the file.
        num_classes: K.
        duplicates: what happens to a box that repeats record, label and corners of an earlier one.
        dtype: of the boxes.

    Raises:
        InputError: the file is missing, empty, no UTF-8 or ends in a record; a line is not what
            its place asks for; a path twice; a label outside of 1..K, a coordinate more than 0.01
            outside of [0, 1] (less is clipped and counted), corners in the wrong order, a group
            other than 0 and 1, a repeated box. Names the line and the value.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(path, "file is missing")
    reader = _Reader(path, num_classes, dtype)
    seen: dict[str, int] = {}
    try:
        with path.open(encoding="utf-8-sig") as file:
            for record in _records(path, file):
                if record.name in seen:
                    raise InputError(
                        f"{path}:{record.first - 3}", "path is there twice", record.name
                    )
                seen[record.name] = len(seen)
                reader.add(record)
    except UnicodeDecodeError as error:
        bad = f"0x{error.object[error.start]:02x}"
        raise InputError(path, "is no UTF-8 text, it has the byte", bad) from error
    except InputError:
        reader.parse()  # a wrong number of boxes shows in an earlier line, which this names
        raise
    if not seen:
        raise InputError(path, "file is empty")
    return Records(list(seen), reader.finish(duplicates))


def _records(path: Path, file: TextIO) -> Iterator[_Record]:
    line = 1
    while name := file.readline():
        where, name = f"{path}:{line}", name.strip()
        if not name and not file.read().strip():
            return
        if name.count("/") != 1 or name.startswith("/") or name.endswith("/"):
            raise InputError(where, "is no path with exactly one slash, as a record begins", name)
        unused, count = file.readline(), file.readline().strip()
        if not all(word.isascii() and word.isdigit() for word in unused.split()):
            what = "second line of a record holds more than whole numbers"
            raise InputError(f"{path}:{line + 1}", what, unused)
        if not (count.isascii() and count.isdigit()):
            raise InputError(f"{path}:{line + 2}", "is no number of boxes", count or "''")
        lines = list(islice(file, int(count)))
        if len(lines) < int(count):
            what = f"file ends after {len(lines)} of the boxes of the record, which should be"
            raise InputError(f"{path}:{line + 2}", what, count)
        yield _Record(name, line + 3, lines)
        line += 3 + len(lines)


class _Reader:
    """Takes records and parses their boxes in blocks."""

    def __init__(self, path: Path, num_classes: int, dtype: type[np.floating]):
        self._path, self._num_classes, self._dtype = path, num_classes, dtype
        self._count: list[int] = []
        self._first: list[int] = []
        self._pending: list[str] = []
        self._pending_from = 0  # first record of the pending block
        self._parts: list[tuple[NDArray[Any], ...]] = []
        self._clipped = 0

    def add(self, record: _Record) -> None:
        self._count.append(len(record.lines))
        self._first.append(record.first)
        self._pending += record.lines
        if len(self._pending) >= BLOCK_ROWS:
            self.parse()

    def parse(self) -> None:
        """Parse what is pending."""
        part = slice(self._pending_from, len(self._count))
        count, first = np.array(self._count[part], int), np.array(self._first[part], int)
        begin = np.cumsum(count) - count
        line_R = np.repeat(first - begin, count) + np.arange(len(self._pending))
        block = _parse(self._path, line_R, self._pending)
        label_R, group_R = block.columns["label"], block.columns["group"]
        bad_R = (label_R < 1) | (label_R > self._num_classes) | (label_R != np.floor(label_R))
        refuse(block, bad_R, f"label is no whole number in 1..{self._num_classes}", label_R)
        refuse(block, ~np.isin(group_R, (0, 1)), "group is neither 0 nor 1", group_R)
        box_R4, changed = corners(block)
        record_R = np.repeat(np.arange(part.start, part.stop, dtype=np.int32), count)
        columns = (record_R, label_R.astype(np.int16), box_R4.astype(self._dtype), group_R == 1)
        self._parts.append((*columns, line_R.astype(np.int32)))
        self._clipped += changed
        self._pending, self._pending_from = [], len(self._count)

    def finish(self, duplicates: Duplicates) -> Boxes:
        self.parse()
        columns = [np.concatenate(part) for part in zip(*self._parts, strict=True)]
        record_G, label_G, box_G4, group_G, line_G = columns
        counts = {"coordinates clipped": self._clipped}
        keep_G = keep_rows(
            self._path, duplicates, counts, "box", record_G, label_G, *box_G4.T,
            line=lambda row: int(line_G[row]),
        )  # fmt: skip
        return Boxes(record_G[keep_G], label_G[keep_G], box_G4[keep_G], group_G[keep_G], counts)


def _parse(path: Path, line_R: NDArray[Any], lines: list[str]) -> Block:
    """Numbers of box lines, by field; slow only to name a line that does not fit."""
    table_R6 = np.zeros((0, len(FIELDS)))
    try:
        if lines:
            table_R6 = np.loadtxt(lines, np.float64, comments=None, ndmin=2)
    except ValueError:
        table_R6 = np.zeros((0, 0))
    if table_R6.shape != (len(lines), len(FIELDS)) or not np.isfinite(table_R6).all():
        for number, line in zip(line_R, lines, strict=True):
            _check_line(f"{path}:{number}", line)
        raise InputError(f"{path}:{line_R[0]}", "from here on a box cannot be read")
    return Block(path, line_R, dict(zip(FIELDS, table_R6.T, strict=True)))


def _check_line(where: str, line: str) -> None:
    words = line.split()
    if len(words) != len(FIELDS):
        raise InputError(where, "line is not label x1 y1 x2 y2 group", line)
    for name, word in zip(FIELDS, words, strict=True):
        try:
            finite = bool(np.isfinite(float(word))) and "_" not in word
        except ValueError:
            finite = False
        if not finite:
            raise InputError(where, f"{name} is no finite number", word)


def read_text_boxes(
    path: Path | str, num_classes: int, images: ImageIndex, duplicates: Duplicates = "error"
) -> Boxes:
    """Boxes of a file of records, by image: the stem of a path names the image.

    Args:
        path: of the file.
        num_classes: K.
        images: takes the names; grows.
        duplicates: as `read_records`.

    Raises:
        InputError: as `read_records`, or two paths with one stem.
    """
    names, boxes = read_records(path, num_classes, duplicates)
    stems = [Path(name).stem for name in names]
    if len(set(stems)) < len(stems):
        twice = next(stem for row, stem in enumerate(stems) if stem in stems[:row])
        raise InputError(path, "two paths name one image", twice)
    image_N = images.rows(np.array([stem.encode() for stem in stems]))
    return boxes._replace(image_G=image_N[boxes.image_G])


def load_text(
    root: Path | str,
    split: str = "train",
    records: Path | str | None = None,
    classes: Path | str = "challenge2019/cls-label-description.csv",
    label_tree: Path | str | None = None,
    class_samples: Path | str | None = None,
    images: Path | str = "OpenImages",
    group_of: GroupOf = "box",
    duplicates: Duplicates = "error",
    sizes: Path | str | None = None,
    name: str | None = None,
) -> DetectionData:
    """Load a set in the text format; pictures are only opened for their sizes, once.

    Args:
        root: folder that the other paths start from.
        split: train or validation (val): names the files unless they are given.
        records: None is challenge2019/challenge-2019-<split>-detection-bbox.txt.
        classes: `identifier,name,label` a line.
        label_tree: the matrix of the hierarchy; read to find out early that it does not fit.
        class_samples: pickled records of each label; compared with the records when it is given.
        images: folder that the paths of the records start from, see `openimages.find_images`.
        group_of: see `openimages.load_openimages`.
        duplicates: see `read_records`.
        sizes: npz file that keeps the sizes of the pictures; None is sizes-<split>-text.npz.
        name: of the set; None is the name of `root` and the split.

    Raises:
        InputError: a file is missing or malformed, or a picture is missing; names it.
    """
    root, split = Path(root), "validation" if split == "val" else split
    known = read_classes(root / classes)
    if label_tree is not None:
        read_label_tree(root / label_tree, len(known))
    path = root / (records or f"challenge2019/challenge-2019-{split}-detection-bbox.txt")
    found = read_records(path, len(known), duplicates, np.float32)
    if class_samples is not None:
        check_class_samples(root / class_samples, found, len(known))
    folder = root / images
    parts = [record.split("/") for record in found.names]
    files = find_images(folder, [(part[0], part[1]) for part in parts])
    with main_first():
        return assemble(
            name or f"{root.name}/{split}", root, path, known,
            [Path(record).stem for record in found.names], folder, files, found.boxes, group_of,
            root / (sizes or f"sizes-{split}-text.npz"),
        )  # fmt: skip


def check_class_samples(path: Path | str, records: Records, num_classes: int) -> None:
    """Compare `class_sample_train.pkl` with the records: label -> numbers of the records with it.

    Raises:
        InputError: it is missing, no such dict, or lists other records of a label.
    """
    table = load_pickle(path)
    if not isinstance(table, dict) or sorted(map(str, table)) != sorted(
        str(label) for label in range(1, num_classes + 1)
    ):
        raise InputError(path, f"is no dict with the keys 1..{num_classes}", type(table).__name__)
    order = np.lexsort((records.boxes.image_G, records.boxes.label_G))
    record_G = records.boxes.image_G[order]
    first_K = np.searchsorted(records.boxes.label_G[order], np.arange(1, num_classes + 2))
    for label in range(1, num_classes + 1):
        there = np.unique(record_G[first_K[label - 1] : first_K[label]])
        listed = np.unique(np.asarray(table[label]))
        if not np.array_equal(there, listed):
            what = f"lists {len(listed)} records of label {label}, the annotations have"
            raise InputError(path, what, len(there))
