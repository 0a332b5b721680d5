"""Outlines of objects as COCO has them: polygons or run-length codes.

Letters: G objects of an image, H W rows and columns.
"""

from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np


class Segments:
    """Outlines of many objects in a few arrays: data workers share them instead of copying lists.

    Coordinates keep the double precision of the file, so that masks equal those of pycocotools.
    """

    def __init__(self) -> None:
        self._coordinates = array("d")
        self._part_ends = array("q", [0])  # in coordinates
        self._object_ends = array("q", [0])  # in parts
        self._codes: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self._object_ends) - 1

    def append(self, outline: Any) -> bool:
        """Add the outline of the next object.

        Polygons with fewer than three points are left out: they enclose nothing.

        Args:
            outline: list of polygons [x1, y1, x2, y2, ...], or a code {"size", "counts"}; None is
                no outline.

        Returns:
            Whether it encloses anything.

        Raises:
            ValueError: it is neither.
        """
        number, before = len(self), len(self._part_ends)
        if isinstance(outline, dict):
            self._codes[number] = _checked_code(outline)
        else:
            self._append_polygons(outline)
        self._object_ends.append(len(self._part_ends) - 1)
        return len(self._part_ends) > before or number in self._codes

    def _append_polygons(self, outline: Any) -> None:
        if not isinstance(outline, list | None):
            raise ValueError("is neither polygons nor a run-length code")
        for polygon in outline or ():
            if not isinstance(polygon, list) or len(polygon) % 2:
                raise ValueError("has a polygon that is no list of x, y pairs")
            try:
                coordinates = array("d", polygon)
            except TypeError:
                raise ValueError("has a coordinate that is no number") from None
            if not np.isfinite(coordinates).all():
                raise ValueError("has a coordinate that is not finite")
            if len(polygon) >= 6:
                self._coordinates.extend(coordinates)
                self._part_ends.append(len(self._coordinates))

    def read(self, number: int) -> Any:
        """The outline of an object: arrays float64 (2 * points,), or a code."""
        if number in self._codes:
            return self._codes[number]
        first, last = self._object_ends[number], self._object_ends[number + 1]
        ends = self._part_ends[first : last + 1]
        coordinates = np.frombuffer(self._coordinates) if len(self._coordinates) else np.empty(0)
        return [coordinates[a:b].copy() for a, b in pairwise(ends)]

    def codes(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Number of each object that has a run-length code, with its code."""
        yield from self._codes.items()


def _checked_code(code: dict[str, Any]) -> dict[str, Any]:
    size, counts = code.get("size"), code.get("counts")
    sized = isinstance(size, list) and len(size) == 2 and all(type(k) is int for k in size)
    if not sized or not _is_counts(counts):
        raise ValueError("is a run-length code without a proper size or counts")
    if isinstance(counts, list) and sum(counts) != np.prod(np.array(size)):
        raise ValueError("is a run-length code whose counts do not add up to its size")
    return {"size": size, "counts": counts}


def _is_counts(counts: Any) -> bool:
    if isinstance(counts, list):
        return all(type(count) is int and count >= 0 for count in counts)
    return isinstance(counts, str) and counts != ""


def rasterise(outlines: Sequence[Any], height: int, width: int) -> np.ndarray:
    """Masks of outlines, uint8 (G, height, width) in {0, 1}, as pycocotools fills them.

    Args:
        outlines: G of them, as `Segments.read` or a COCO file has them.
        height: of the picture.
        width: of the picture.

    Raises:
        ValueError: a run-length code of another size, or that cannot be decoded.
    """
    from pycocotools import mask as codec

    mask_GHW = np.zeros((len(outlines), height, width), np.uint8)
    for mask_HW, outline in zip(mask_GHW, outlines, strict=True):
        if isinstance(outline, dict):
            if list(outline["size"]) != [height, width]:
                raise ValueError(f"size={outline['size']} of a code, need [{height}, {width}]")
            counted = isinstance(outline["counts"], list)
            code = codec.frPyObjects(outline, height, width) if counted else outline
            mask_HW[:] = codec.decode(code)
        elif len(outline):
            parts = codec.frPyObjects([list(part) for part in outline], height, width)
            mask_HW[:] = codec.decode(codec.merge(parts))
    return mask_GHW
