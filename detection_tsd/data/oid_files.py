"""The annotation files of Open Images: classes, boxes and image labels, read by column names.

Layouts: tensorflow/models research/object_detection/g3doc/challenge_evaluation.md and the download
pages of Open Images V4 to V7. Boxes: ImageID, LabelName, XMin, XMax, YMin, YMax, IsGroupOf, and
others that are passed over. Image labels: ImageID, LabelName, Confidence (1 verified present,
0 verified absent). Coordinates are shares of the width and of the height.

Letters: K classes, G boxes, V image labels, R rows.
"""

import csv
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.log import InputError
from detection_tsd.data.csv_columns import Block, Kind, read_blocks

Duplicates = Literal["error", "drop", "keep"]
OVERSHOOT = 0.01  # how far outside of [0, 1] a coordinate is still a rounding error
CORNERS = ("XMin", "YMin", "XMax", "YMax")
BOX_COLUMNS: dict[str, Kind] = {"ImageID": "text", "LabelName": "text"}
BOX_COLUMNS |= dict.fromkeys((*CORNERS, "IsGroupOf"), "number")
LABEL_COLUMNS: dict[str, Kind] = {"ImageID": "text", "LabelName": "text", "Confidence": "number"}


class Classes(tuple[str, ...]):
    """What the files call the K classes, in order; label k is entry k - 1.

    Attributes:
        names: of the classes, for people.
    """

    names: tuple[str, ...]

    def __new__(cls, ids: Iterable[str], names: Iterable[str] | None = None) -> "Classes":
        self = super().__new__(cls, ids)
        self.names = tuple(self if names is None else names)
        return self

    @cached_property
    def label_of(self) -> dict[bytes, int]:
        """Label by identifier."""
        return {identifier.encode(): label for label, identifier in enumerate(self, start=1)}


def read_classes(path: Path | str) -> Classes:
    """The list of classes: `identifier,name` or, as Sense-X/TSD has it, `identifier,name,label`.

    A first line that starts with LabelName is a header. With labels, they decide the order.

    Raises:
        InputError: the file is missing or empty, a line has another number of fields, an
            identifier is there twice, or the labels are not 1..K.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(path, "file is missing")
    found: dict[str, tuple[int, str]] = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.reader(file), start=1):
            if not row or (number == 1 and row[0].strip() == "LabelName"):
                continue
            where = f"{path}:{number}"
            if len(row) not in (2, 3) or not row[0].strip():
                raise InputError(where, "line is not identifier,name[,label]", ",".join(row))
            if row[0].strip() in found:
                raise InputError(where, "class is there twice", row[0].strip())
            label = _label(where, row[2]) if len(row) == 3 else len(found) + 1
            found[row[0].strip()] = (label, row[1].strip())
    if not found:
        raise InputError(path, "file is empty")
    if sorted(label for label, _ in found.values()) != list(range(1, len(found) + 1)):
        raise InputError(path, f"labels are not 1..{len(found)}, the first is", min(found.values()))
    ordered = sorted(found, key=lambda identifier: found[identifier][0])
    return Classes(ordered, (found[identifier][1] for identifier in ordered))


def _label(where: str, word: str) -> int:
    if not (word.strip().isascii() and word.strip().isdigit()):
        raise InputError(where, "label is no whole number", word)
    return int(word)


class ImageIndex:
    """Image identifiers and the rows they stand for.

    Args:
        ids: known from the start, rows 0, 1, ...
        grow: give an unknown identifier the next row; otherwise it has row -1.
    """

    def __init__(self, ids: Iterable[str] = (), grow: bool = True):
        self._row_of = {identifier.encode(): row for row, identifier in enumerate(ids)}
        self._grow = grow

    def __len__(self) -> int:
        return len(self._row_of)

    @property
    def ids(self) -> tuple[str, ...]:
        """All identifiers, by row."""
        return tuple(identifier.decode() for identifier in self._row_of)

    def rows(self, name_R: NDArray[Any]) -> NDArray[np.int32]:
        """Row of each identifier, int32 (R,); fast when equal ones follow each other."""
        new_R = np.ones(len(name_R), bool)
        new_R[1:] = name_R[1:] != name_R[:-1]
        names, table = name_R[new_R].tolist(), self._row_of
        if self._grow:
            heads = [table.setdefault(name, len(table)) for name in names]
        else:
            heads = [table.get(name, -1) for name in names]
        return np.repeat(
            np.array(heads, np.int32), np.diff(np.append(np.flatnonzero(new_R), len(name_R)))
        )


class Boxes(NamedTuple):
    """G boxes of a set of images.

    Attributes:
        image_G: int32 rows of the images.
        label_G: int16, 1..K.
        box_G4: xyxy as shares of the width and the height, in [0, 1], x1 <= x2 and y1 <= y2.
        group_G: bool, whether a box holds a group of objects.
        counts: what was mended or left out -> how often.
    """

    image_G: NDArray[np.int32]
    label_G: NDArray[np.int16]
    box_G4: NDArray[Any]
    group_G: NDArray[np.bool_]
    counts: dict[str, int]


def read_boxes(
    path: Path | str,
    classes: Classes,
    images: ImageIndex,
    duplicates: Duplicates = "error",
    dtype: type[np.floating] = np.float64,
) -> Boxes:
    """Boxes of an official file.

    Args:
        path: of the CSV file.
        classes: that may occur.
        images: takes the identifiers; grows.
        duplicates: what happens to a row that repeats image, class and box of an earlier one.
        dtype: of the boxes.

    Raises:
        InputError: as `read_blocks`; an unknown class, a coordinate more than 0.01 outside of
            [0, 1] (less is clipped and counted), corners in the wrong order, IsGroupOf other than
            0, 1 or -1 (unknown: counted, no group), a repeated row, or no row at all.
    """
    parts: list[tuple[NDArray[Any], ...]] = []
    clipped = unknown = 0
    for block in read_blocks(path, BOX_COLUMNS):
        box_R4, changed = corners(block)
        group_R = block.columns["IsGroupOf"]
        refuse(block, ~np.isin(group_R, (0, 1, -1)), "IsGroupOf is not 0, 1 or -1", group_R)
        clipped, unknown = clipped + changed, unknown + int((group_R < 0).sum())
        image_R = images.rows(block.columns["ImageID"])
        parts.append((image_R, labels(block, classes), box_R4.astype(dtype), group_R == 1))
    if not parts:
        raise InputError(path, "file has a header and no rows")
    image_G, label_G, box_G4, group_G = (np.concatenate(part) for part in zip(*parts, strict=True))
    counts = {"coordinates clipped": clipped, "IsGroupOf unknown": unknown}
    keep_G = keep_rows(path, duplicates, counts, "box", image_G, label_G, *box_G4.T)
    if not keep_G.all():
        image_G, label_G, box_G4, group_G = (
            column[keep_G] for column in (image_G, label_G, box_G4, group_G)
        )
    return Boxes(image_G, label_G, box_G4, group_G, counts)


class ImageLabels(NamedTuple):
    """V verified labels of images: rows int32, labels int16 in 1..K, whether they are present."""

    image_V: NDArray[np.int32]
    label_V: NDArray[np.int16]
    present_V: NDArray[np.bool_]
    counts: dict[str, int]

    @classmethod
    def none(cls) -> "ImageLabels":
        """No label at all."""
        return cls(np.zeros(0, np.int32), np.zeros(0, np.int16), np.zeros(0, bool), {})


def read_image_labels(
    path: Path | str, classes: Classes, images: ImageIndex, duplicates: Duplicates = "error"
) -> ImageLabels:
    """Labels of an official file that people verified.

    Raises:
        InputError: as `read_blocks`; an unknown class, a Confidence other than 0 and 1 (labels of
            machines), or a repeated image and class.
    """
    parts = []
    for block in read_blocks(path, LABEL_COLUMNS):
        sure_R = block.columns["Confidence"]
        what = "Confidence is neither 0 nor 1, no person verified the label"
        refuse(block, ~np.isin(sure_R, (0, 1)), what, sure_R)
        image_R = images.rows(block.columns["ImageID"])
        parts.append((image_R, labels(block, classes), sure_R == 1))
    if not parts:
        return ImageLabels.none()
    image_V, label_V, present_V = (np.concatenate(part) for part in zip(*parts, strict=True))
    counts: dict[str, int] = {}
    keep_V = keep_rows(path, duplicates, counts, "image label", image_V, label_V)
    return ImageLabels(image_V[keep_V], label_V[keep_V], present_V[keep_V], counts)


def labels(block: Block, classes: Classes) -> NDArray[np.int16]:
    """Labels of the column LabelName, (R,); `InputError` when a class is not in the list."""
    column_R, table = block.columns["LabelName"], classes.label_of
    label_R = np.array([table.get(name, 0) for name in column_R.tolist()], np.int16)
    refuse(block, label_R == 0, "class is not in the list of classes", column_R)
    return label_R


def corners(block: Block) -> tuple[NDArray[np.float64], int]:
    """Boxes xyxy (R, 4), clipped to [0, 1], and how many of them were clipped.

    Raises:
        InputError: a coordinate more than 0.01 outside, or corners in the wrong order.
    """
    box_R4 = np.stack([block.columns[name] for name in CORNERS], axis=1)
    for side, name in enumerate(CORNERS):
        far_R = (box_R4[:, side] < -OVERSHOOT) | (box_R4[:, side] > 1 + OVERSHOOT)
        refuse(block, far_R, f"{name} is outside of [0, 1]", box_R4[:, side])
    for low, high in ((0, 2), (1, 3)):
        what = f"{CORNERS[low]} is above {CORNERS[high]}"
        refuse(block, box_R4[:, low] > box_R4[:, high], what, box_R4[:, low])
    inside_R4 = box_R4.clip(0, 1)
    return inside_R4, int((inside_R4 != box_R4).any(axis=1).sum())


def refuse(block: Block, bad_R: NDArray[np.bool_], what: str, value_R: NDArray[Any]) -> None:
    """`InputError` that names the line and the value of the first row that is bad, if one is."""
    if bad_R.any():
        row = int(bad_R.argmax())
        value = value_R[row]
        shown = value.decode() if isinstance(value, bytes) else value
        raise InputError(block.where(row), what, shown)


def keep_rows(
    path: Path | str,
    duplicates: Duplicates,
    counts: dict[str, int],
    kind: str,
    *columns: NDArray[Any],
    line: Callable[[int], int] = lambda row: row + 2,
) -> NDArray[np.bool_]:
    """Which rows stay, (R,) bool.

    Args:
        path: of the file, for messages.
        duplicates: "error" raises on a row that repeats an earlier one, "drop" leaves it out.
        counts: takes the number of repeated rows.
        kind: of the rows, for messages.
        columns: that are compared.
        line: of a row.

    Raises:
        InputError: a repeated row under "error", which is named; another word.
    """
    if duplicates not in ("error", "drop", "keep"):
        raise InputError("duplicates", "accepted: error, drop, keep", duplicates)
    again = repeated_rows(columns)
    if again.size and duplicates == "error":
        row = int(again[0])
        what = f"{kind} is there twice ({again.size} such lines; duplicates=drop or keep accepts)"
        raise InputError(f"{path}:{line(row)}", what, ", ".join(str(part[row]) for part in columns))
    counts[f"{kind} repeated, {'dropped' if duplicates == 'drop' else 'kept'}"] = int(again.size)
    keep_R = np.ones(len(columns[0]), bool)
    if duplicates == "drop":
        keep_R[again] = False
    return keep_R


def repeated_rows(columns: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    """Rows that equal an earlier one in every column, ascending.

    One sort of a 64-bit hash, and a comparison of its neighbours: a sort by all columns takes ten
    times as long on millions of rows.
    """
    code_R = np.zeros(len(columns[0]), np.uint64)
    for column in columns:
        code_R ^= (column.astype(np.float64) + 0.0).view(np.uint64)  # + 0.0 joins 0 and -0
        code_R *= np.uint64(0x9E3779B97F4A7C15)
        code_R ^= code_R >> np.uint64(29)
    order = np.argsort(code_R, kind="stable")
    later, earlier = order[1:], order[:-1]
    alike = code_R[later] == code_R[earlier]
    later, earlier = later[alike], earlier[alike]
    for column in columns:
        same = column[later] == column[earlier]
        later, earlier = later[same], earlier[same]
    return np.sort(later)
