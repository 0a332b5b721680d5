"""COCO sets: pictures in a folder, annotations in one JSON file.

Also any other set in this format: category ids may have gaps, as COCO's have; label k is the k-th
smallest id. What is dropped is counted in `DetectionData.skipped`; what contradicts itself stops.

Letters: N images kept, O objects, I crowd regions, G objects of an image, M proposals.
"""

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.log import InputError
from detection_tsd.data.coco_table import CocoObjects, CocoTable, read_table
from detection_tsd.data.detection_data import Annotation, DetectionData
from detection_tsd.data.segments import Segments
from detection_tsd.data.size_index import size_index
from detection_tsd.data.transforms import read_rgb

PROBED = 16  # pictures looked for when a set is loaded, to notice a wrong folder at once


class Names:
    """Strings in one block of memory: forked data workers share it."""

    def __init__(self, names: Sequence[str]):
        encoded = [name.encode("utf-8", "surrogatepass") for name in names]
        self._block = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, row: int) -> str:
        name = self._block[self._ends[row] : self._ends[row + 1]]
        return name.decode("utf-8", "surrogatepass")


class FolderImages:
    """Pictures in a folder, their sizes known beforehand.

    Args:
        folder: that the names start from.
        names: of the N files.
        size_N2: height and width of each.
    """

    def __init__(self, folder: Path, names: Sequence[str], size_N2: np.ndarray):
        self.folder, self._names = Path(folder), Names(names)
        self._size_N2 = np.asarray(size_N2, np.int32)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, row: int) -> np.ndarray:
        """Picture, uint8 (H, W, 3), RGB.

        Raises:
            InputError: it cannot be read or decoded; names the file.
        """
        return read_rgb(self.name(row))

    def size(self, row: int) -> tuple[int, int]:
        """Height and width."""
        return int(self._size_N2[row, 0]), int(self._size_N2[row, 1])

    def name(self, row: int) -> str:
        """Path of the file."""
        return str(self.folder / self._names[row])


class BoxObjects:
    """Objects of N images as a few arrays with offsets.

    Args:
        row_O: of the objects, ascending.
        box_O4: float32.
        label_O: 1..classes.
        row_I: of the crowd regions, ascending.
        crowd_I4: float32.
        count: N.
        outlines: of the O objects, or None.
        outline_O: which outline is whose.
        path: of the annotation file, from which an evaluation reads what training does not need.
    """

    def __init__(
        self,
        row_O: np.ndarray,
        box_O4: np.ndarray,
        label_O: np.ndarray,
        row_I: np.ndarray,
        crowd_I4: np.ndarray,
        count: int,
        outlines: Segments | None = None,
        outline_O: np.ndarray | None = None,
        path: Path | None = None,
    ):
        rows = np.arange(count + 1)
        self._start, self._crowd_start = np.searchsorted(row_O, rows), np.searchsorted(row_I, rows)
        self._box_O4 = np.ascontiguousarray(box_O4, np.float32)
        self._crowd_I4 = np.ascontiguousarray(crowd_I4, np.float32)
        self._label_O = np.ascontiguousarray(label_O, np.int32)
        self._outlines, self._outline_O, self.path = outlines, outline_O, path

    def __len__(self) -> int:
        return len(self._start) - 1

    def read(self, row: int) -> Annotation:
        """Annotation of a row; its arrays are copies."""
        part = slice(self._start[row], self._start[row + 1])
        crowd = slice(self._crowd_start[row], self._crowd_start[row + 1])
        segments = None
        if self._outlines is not None and self._outline_O is not None:
            segments = [self._outlines.read(int(number)) for number in self._outline_O[part]]
        box_G4, crowd_I4 = self._box_O4[part].copy(), self._crowd_I4[crowd].copy()
        return Annotation(box_G4, self.labels(row), crowd_I4, segments)

    def labels(self, row: int) -> np.ndarray:
        """Label of each object of a row, int64 (G,); a copy."""
        return self._label_O[self._start[row] : self._start[row + 1]].astype(np.int64)


def load_coco(
    root: Path | str,
    split: str = "train2017",
    annotations: Path | str | None = None,
    images: Path | str | None = None,
    filter_empty: bool = False,
    min_side: int = 32,
    masks: bool = False,
    proposals: Path | str | None = None,
    labelled: bool = True,
    name: str | None = None,
) -> DetectionData:
    """Load a set in the format of COCO; pictures are only opened when they are needed.

    Boxes are clipped to their picture; those with a side below one pixel, with area 0 or wholly
    outside are dropped. Crowd regions are kept apart.

    Args:
        root: folder of the set.
        split: names file and folder unless these are given.
        annotations: the JSON file, from `root`; None is annotations/instances_<split>.json.
        images: folder of the pictures, from `root`; None is <split>.
        filter_empty: drop images without objects or with a side below `min_side`: for training.
        min_side: in pixels; only used with `filter_empty`.
        masks: read the outlines as well, and drop objects without one.
        proposals: npz file from `root` with one array (M, 4) of boxes an image, named by its id.
        labelled: False reads no objects: the server of test-dev keeps them.
        name: of the set; None is the name of `root` and the split.

    Raises:
        InputError: a file is missing, empty or malformed; an id is unknown or not unique; a box
            is not finite or has a negative side; no image is left. Names file, field and value.
        ValueError: min_side is negative.
    """
    if min_side < 0:
        raise ValueError(f"min_side={min_side} must not be negative")
    root = Path(root)
    path = root / (annotations or f"annotations/instances_{split}.json")
    folder = root / (images or split)
    table = read_table(path, masks, labelled)
    size_N2 = _sizes(table, folder)
    found = table.objects(size_N2)
    keep_N, skipped = _useful(found, size_N2, filter_empty, min_side)
    if not keep_N.any():
        raise InputError(path, "has no image left, dropped", skipped)
    kept = _kept(table, folder, size_N2, found, keep_N)
    return DetectionData(
        name=name or f"{root.name}/{split}",
        root=root,
        classes=tuple(table.category.values()),
        class_ids=tuple(table.category),
        image_ids=kept.ids,
        images=kept.images,
        objects=kept.objects,
        proposals=None if proposals is None else read_proposals(root / proposals, kept.ids),
        skipped={reason: count for reason, count in skipped.items() if count},
        source=path,
    )


class _Kept(NamedTuple):
    ids: tuple[int, ...]
    images: FolderImages
    objects: BoxObjects


def _kept(
    table: CocoTable, folder: Path, size_N2: np.ndarray, found: CocoObjects, keep_N: np.ndarray
) -> _Kept:
    """The images that stay, and their objects by their new rows."""
    rows = np.flatnonzero(keep_N)
    names = [table.file_name[row] for row in rows]
    _probe(folder, names)
    new_N, keep_O, keep_I = np.cumsum(keep_N) - 1, keep_N[found.row_O], keep_N[found.row_I]
    objects = BoxObjects(
        row_O=new_N[found.row_O[keep_O]],
        box_O4=found.box_O4[keep_O],
        label_O=found.label_O[keep_O],
        row_I=new_N[found.row_I[keep_I]],
        crowd_I4=found.crowd_I4[keep_I],
        count=len(rows),
        outlines=table.outlines,
        outline_O=None if table.outlines is None else found.number_O[keep_O],
        path=table.path,
    )
    ids = tuple(table.image_id[row] for row in rows)
    return _Kept(ids, FolderImages(folder, names, size_N2[rows]), objects)


def _sizes(table: CocoTable, folder: Path) -> np.ndarray:
    """Height and width of the images, from their files where the table has none."""
    size_N2 = np.array(table.size, np.int64).reshape(-1, 2)
    rows = np.flatnonzero((size_N2 == 0).any(axis=1))
    if len(rows):
        size_N2[rows] = size_index([folder / table.file_name[row] for row in rows])
    return size_N2


def _useful(
    objects: CocoObjects, size_N2: np.ndarray, filter_empty: bool, min_side: int
) -> tuple[np.ndarray, dict[str, int]]:
    """Which images stay, and all that is dropped."""
    if not filter_empty:
        return np.ones(len(size_N2), bool), objects.skipped
    small_N = size_N2.min(axis=1) < min_side
    empty_N = ~small_N & (np.bincount(objects.row_O, minlength=len(size_N2)) == 0)
    dropped = {
        f"images with a side below {min_side} pixels": int(small_N.sum()),
        "images without objects": int(empty_N.sum()),
    }
    return ~small_N & ~empty_N, dropped | objects.skipped


def _probe(folder: Path, names: Sequence[str]) -> None:
    """Single pictures may be missing, which shows when they are read; not all of them."""
    if not any((folder / name).is_file() for name in names[:PROBED]):
        raise InputError(folder, "has none of the first pictures of the annotations", names[0])


def read_proposals(path: Path, image_ids: Sequence[Any]) -> list[np.ndarray]:
    """Fixed proposals of each image, float32 (M, 4) xyxy in the pixels of the file.

    Args:
        path: npz file with one array an image, named by its id.
        image_ids: of the images, in the order wanted.

    Raises:
        InputError: the file cannot be read, has no array of an image, or one that is no (M, 4) of
            finite boxes with x1 <= x2 and y1 <= y2.
    """
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise InputError(path, "is no npz file")
        with file:
            held = set(file.files)
            return [_proposals(path, file, str(key), held) for key in image_ids]
    except InputError:
        raise
    except OSError as error:
        raise InputError(path, "cannot be read", error.strerror or error) from error
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(path, "is no npz file of numbers", error) from error


def _proposals(path: Path, file: Any, key: str, held: set[str]) -> np.ndarray:
    if key not in held:
        raise InputError(path, "has no proposals of image", key)
    box_M4 = file[key]
    if box_M4.ndim != 2 or box_M4.shape[1] != 4 or box_M4.dtype.kind not in "fiu":
        raise InputError(
            f"{path} {key}", "is no (M, 4) of numbers", f"{box_M4.dtype} {box_M4.shape}"
        )
    wrong_M = ~np.isfinite(box_M4).all(axis=1) | (box_M4[:, 2:] < box_M4[:, :2]).any(axis=1)
    if wrong_M.any():
        what = "has a box that is not finite or not x1 <= x2, y1 <= y2"
        raise InputError(f"{path} {key}", what, box_M4[wrong_M.argmax()].tolist())
    return np.ascontiguousarray(box_M4, np.float32)
