"""What a COCO annotation file says, as arrays, checked.

Letters: N images, O objects, I crowd regions, A annotations (both).
"""

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.log import InputError
from detection_tsd.data.coco_json import read_lists
from detection_tsd.data.segments import Segments, rasterise

LEAST = 1.0  # pixels: with a side below it is no object (Sense-X/TSD, mmdet/datasets/coco.py)
MOVED = 1e-3  # pixels that a border moves before a box counts as clipped


class CocoObjects(NamedTuple):
    """Objects and crowd regions, both sorted by image.

    Attributes:
        row_O: int64, image of each object. box_O4: float32 xyxy. label_O: int64, 1..classes.
        number_O: int64, of its annotation.
        row_I: int64. crowd_I4: float32.
        skipped: reason -> how many annotations were left out.
    """

    row_O: np.ndarray
    box_O4: np.ndarray
    label_O: np.ndarray
    number_O: np.ndarray
    row_I: np.ndarray
    crowd_I4: np.ndarray
    skipped: dict[str, int]


class CocoTable:
    """The entries of a file by column, in file order.

    Attributes:
        image_id: of the N images. file_name: of each.
        size: height and width of each, behind one another; 0 where the file does not say.
        category: id -> name, ascending.
        outlines: of the A annotations, or None; crowd regions have none.
    """

    def __init__(self, path: Path, masks: bool):
        self.path = path
        self.image_id, self.size, self.file_name = array("q"), array("q"), list[str]()
        self.category: dict[int, str] = {}
        self.outlines = Segments() if masks else None
        self._outlined = array("b")
        self._box, self._area, self._crowd = array("d"), array("d"), array("b")
        self._image, self._class, self._id = array("q"), array("q"), array("q")

    def add_image(self, number: int, entry: Any) -> None:
        """An entry of "images"."""
        where = f"{self.path} images[{number}]"
        name = _field(where, entry, "file_name")
        if not isinstance(name, str) or not name:
            raise InputError(where, "file_name is no name", repr(name))
        self.image_id.append(_whole(where, "id", _field(where, entry, "id")))
        self.file_name.append(name)
        for key in ("height", "width"):
            side = entry.get(key)
            length = 0 if side is None else _whole(where, key, side)
            if side is not None and length < 1:
                raise InputError(where, f"{key} is not positive", side)
            self.size.append(length)

    def add_category(self, number: int, entry: Any) -> None:
        """An entry of "categories"."""
        where = f"{self.path} categories[{number}]"
        key = _whole(where, "id", _field(where, entry, "id"))
        name = _field(where, entry, "name")
        if not isinstance(name, str) or not name:
            raise InputError(where, "name is no name", repr(name))
        if key in self.category:
            raise InputError(where, "id is not unique", key)
        self.category[key] = name

    def add_annotation(self, number: int, entry: Any) -> None:
        """An entry of "annotations"; of millions, so that faults are looked for afterwards."""
        try:
            self._box.extend(entry["bbox"])
            self._image.append(entry["image_id"])
            self._class.append(entry["category_id"])
            self._crowd.append(entry.get("iscrowd", 0))
            self._area.append(entry["area"] if "area" in entry else _area(self._box))
            if "id" in entry:
                self._id.append(entry["id"])
        except (KeyError, TypeError, OverflowError, AttributeError, IndexError) as error:
            raise self._wrong(number, entry) from error
        if len(self._box) != 4 * number + 4:
            raise self._wrong(number, entry)
        if self.outlines is not None:
            self._add_outline(number, entry)

    def _add_outline(self, number: int, entry: dict[str, Any]) -> None:
        assert self.outlines is not None
        outline = None if entry.get("iscrowd") else entry.get("segmentation")
        try:
            self._outlined.append(self.outlines.append(outline))
        except ValueError as error:
            where = f"{self.path} annotations[{number}]"
            raise InputError(where, f"segmentation {error}", repr(outline)[:80]) from error

    def _wrong(self, number: int, entry: Any) -> InputError:
        """What is wrong with an annotation that could not be added."""
        where = f"{self.path} annotations[{number}]"
        try:
            box = _field(where, entry, "bbox")
            if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
                return InputError(where, "bbox is no list of four numbers", repr(box))
            for key in ("image_id", "category_id"):
                _whole(where, key, _field(where, entry, key))
            for key in ("iscrowd", "id"):
                _whole(where, key, entry.get(key, 0))
        except InputError as error:
            return error
        if not _is_number(entry.get("area", 0)):
            return InputError(where, "area is no number", repr(entry["area"]))
        return InputError(where, "iscrowd is neither 0 nor 1", entry.get("iscrowd"))

    def check(self) -> None:
        """Refuse a file without images or classes, and ids that are not unique.

        Raises:
            InputError: names the file, and the entry.
        """
        for ids, name in ((self.image_id, "images"), (self._id, "annotations")):
            first = _first_repeated(np.frombuffer(ids, np.int64) if ids else np.empty(0, np.int64))
            if first is not None:
                raise InputError(f"{self.path} {name}[{first}]", "id is not unique", ids[first])
        if not self.image_id:
            raise InputError(self.path, "has no image")
        if not self.category:
            raise InputError(self.path, "has no category")
        self.category = dict(sorted(self.category.items()))

    def objects(self, size_N2: np.ndarray) -> CocoObjects:
        """Objects and crowd regions that are left after clipping; what is dropped is counted.

        Args:
            size_N2: height and width of the images.

        Raises:
            InputError: an annotation is of an unknown image or category, or not finite, or has a
                negative side, or a code has another size than its image.
        """
        row_A = self._known("image_id", self._image, np.array(self.image_id, np.int64))
        label_A = 1 + self._known("category_id", self._class, np.array([*self.category], np.int64))
        self._check_codes(row_A, size_N2)
        box_A4, keep_A, skipped = self._clipped(size_N2[row_A])
        crowd_A = np.array(self._crowd, bool)
        if self.outlines is not None:
            blank_A = keep_A & ~crowd_A & (np.array(self._outlined) == 0)
            skipped["objects without an outline"] = int(blank_A.sum())
            keep_A &= ~blank_A
        order_A = np.argsort(row_A, kind="stable")  # file order within an image
        number_O = order_A[(keep_A & ~crowd_A)[order_A]]
        number_I = order_A[(keep_A & crowd_A)[order_A]]
        return CocoObjects(
            row_A[number_O], box_A4[number_O], label_A[number_O], number_O,
            row_A[number_I], box_A4[number_I], skipped,
        )  # fmt: skip

    def _clipped(self, size_A2: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
        """Boxes float32 xyxy, which of them stay, and counts."""
        box_A4: np.ndarray = np.array(self._box).reshape(-1, 4)
        area_A = np.array(self._area)
        self._refuse(~np.isfinite(box_A4).all(axis=1), "bbox is not finite", box_A4)
        self._refuse(box_A4[:, 2:].min(axis=1) < 0, "bbox has a negative side", box_A4)
        self._refuse(~np.isfinite(area_A), "area is not finite", area_A)
        empty_A = (box_A4[:, 2:] < LEAST).any(axis=1) | (area_A <= 0)
        box_A4[:, 2:] += box_A4[:, :2]
        clipped_A4 = box_A4.clip(0, size_A2[:, [1, 0, 1, 0]])
        outside_A = ~empty_A & (clipped_A4[:, 2:] - clipped_A4[:, :2] < LEAST).any(axis=1)
        keep_A = ~empty_A & ~outside_A
        moved_A = keep_A & (np.abs(clipped_A4 - box_A4) > MOVED).any(axis=1)
        counts = {
            "boxes without area": int(empty_A.sum()),
            "boxes outside their picture": int(outside_A.sum()),
            "boxes clipped to their picture (kept)": int(moved_A.sum()),
        }
        return clipped_A4.astype(np.float32), keep_A, counts

    def _known(self, field: str, ids: Sequence[int], known_K: np.ndarray) -> np.ndarray:
        """Place of each id among the known ones."""
        id_A, order_K = np.array(ids, np.int64), np.argsort(known_K)
        place_A = np.searchsorted(known_K, id_A, sorter=order_K).clip(max=len(known_K) - 1)
        place_A = order_K[place_A]
        self._refuse(known_K[place_A] != id_A, f"{field} is unknown", id_A)
        return place_A

    def _refuse(self, wrong_A: np.ndarray, what: str, value_A: np.ndarray) -> None:
        if wrong_A.any():
            number = int(wrong_A.argmax())
            raise InputError(f"{self.path} annotations[{number}]", what, value_A[number].tolist())

    def _check_codes(self, row_A: np.ndarray, size_N2: np.ndarray) -> None:
        for number, code in self.outlines.codes() if self.outlines is not None else ():
            where, wanted = f"{self.path} annotations[{number}]", size_N2[row_A[number]].tolist()
            if code["size"] != wanted:
                raise InputError(
                    where, f"segmentation has a size other than {wanted}", code["size"]
                )
            try:
                rasterise([code], *wanted)
            except ValueError as error:
                raise InputError(where, "segmentation cannot be decoded", error) from error


def read_table(path: Path, masks: bool, labelled: bool) -> CocoTable:
    """Read a file.

    Args:
        path: of the file.
        masks: read outlines.
        labelled: read annotations; False is for files that have none.

    Raises:
        InputError: the file cannot be read, is malformed, lacks a list, or has an entry that is
            none; names file, entry, field and value.
    """
    table = CocoTable(path, masks)
    handlers = {"images": table.add_image, "categories": table.add_category}
    if labelled:
        handlers["annotations"] = table.add_annotation
    read_lists(path, handlers, outlines=masks)
    table.check()
    return table


def _field(where: str, entry: Any, key: str) -> Any:
    if not isinstance(entry, dict):
        raise InputError(where, "is no object", repr(entry)[:80])
    if key not in entry:
        raise InputError(where, "has no field", repr(key))
    return entry[key]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _whole(where: str, key: str, value: Any) -> int:
    """An integer of 64 bits; exporters also write 640.0."""
    if not _is_number(value) or not abs(value) < 2**63 or value != int(value):
        raise InputError(where, f"{key} is no integer", repr(value))
    return int(value)


def _area(box: Any) -> float:
    return float(box[-2] * box[-1])


def _first_repeated(id_N: np.ndarray) -> int | None:
    """Place of the first id that has been there before."""
    order_N = np.argsort(id_N, kind="stable")
    again_N = order_N[1:][id_N[order_N[1:]] == id_N[order_N[:-1]]]
    return int(again_N.min()) if len(again_N) else None
