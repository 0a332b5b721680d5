"""Open Images V4 and later, and its challenge, in the official CSV files.

    <root>/challenge2019/challenge-2019-<split>-detection-bbox.csv
    <root>/challenge2019/challenge-2019-<split>-detection-human-imagelabels.csv
    <root>/challenge2019/challenge-2019-classes-description-500.csv
    <root>/challenge2019/challenge-2019-label500-hierarchy.json
    <root>/OpenImages/<split>/<image>.jpg      or <split>_<first character>/<image>.jpg

The columns are described in `oid_files.py`. The files do not say how large the pictures are: their
sizes are read from their headers once, and kept.

Letters: N images, G boxes, I ignored boxes.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from common.dist import main_first
from common.log import InputError, get_logger
from detection_tsd.data.coco import BoxObjects, FolderImages
from detection_tsd.data.detection_data import DetectionData
from detection_tsd.data.hierarchy import read_hierarchy
from detection_tsd.data.oid_files import (
    Boxes,
    Classes,
    Duplicates,
    ImageIndex,
    read_boxes,
    read_classes,
    read_image_labels,
)
from detection_tsd.data.size_index import size_index

GroupOf = Literal["box", "ignore", "drop"]
PROBED = 16  # pictures that are looked for in each layout of folders
# From the name of a split and of a file; the archives of the training split are unpacked into one
# folder for each first character.
LAYOUTS: dict[str, Callable[[str, str], str]] = {
    "<split>/<file>": lambda split, file: f"{split}/{file}",
    "<split>_<first character>/<file>": lambda split, file: f"{split}_{file[0]}/{file}",
    "<split>/<split>_<first character>/<file>": lambda split, file: (
        f"{split}/{split}_{file[0]}/{file}"
    ),
    "<file>": lambda split, file: file,
}


def load_openimages(
    root: Path | str,
    split: str = "train",
    boxes: Path | str | None = None,
    image_labels: Path | str | None = None,
    classes: Path | str = "challenge2019/challenge-2019-classes-description-500.csv",
    hierarchy: Path | str | None = None,
    images: Path | str = "OpenImages",
    group_of: GroupOf = "box",
    duplicates: Duplicates = "error",
    sizes: Path | str | None = None,
    name: str | None = None,
) -> DetectionData:
    """Load a set in the official files; pictures are only opened for their sizes, once.

    The objects keep the classes that people gave them; ancestors are added by the evaluator only.

    Args:
        root: folder that the other paths start from.
        split: train or validation (val): names the files unless they are given.
        boxes: None is challenge2019/challenge-2019-<split>-detection-bbox.csv.
        image_labels: verified labels; images that only occur there join the set, without objects,
            as an evaluation wants it. None for training.
        classes: `identifier,name` a line; line k is label k.
        hierarchy: JSON of the classes; read to find out early that it does not fit.
        images: folder of the pictures, see `find_images`.
        group_of: what a box that holds a group is: "box" an object as any other, as in
            Sense-X/TSD; "ignore" a region that counts for nothing; "drop" nothing.
        duplicates: what happens to repeated rows: "error", "drop" or "keep".
        sizes: npz file that keeps the sizes of the pictures; None is sizes-<split>.npz.
        name: of the set; None is the name of `root` and the split.

    Raises:
        InputError: a file is missing or malformed, or a picture is missing; names it.
    """
    root, split = Path(root), "validation" if split == "val" else split
    known = read_classes(root / classes)
    if hierarchy is not None:
        read_hierarchy(root / hierarchy, known)
    index = ImageIndex()
    path = root / (boxes or f"challenge2019/challenge-2019-{split}-detection-bbox.csv")
    found = read_boxes(path, known, index, duplicates, np.float32)
    if image_labels is not None:
        read_image_labels(root / image_labels, known, index, duplicates)
    folder, ids = root / images, index.ids
    files = find_images(folder, [(split, f"{identifier}.jpg") for identifier in ids])
    with main_first():
        return assemble(
            name or f"{root.name}/{split}", root, path, known, ids, folder, files, found, group_of,
            root / (sizes or f"sizes-{split}.npz"),
        )  # fmt: skip


def find_images(folder: Path, files: Sequence[tuple[str, str]]) -> list[str]:
    """Paths below `folder`, in the first of `LAYOUTS` that has one of the first pictures.

    Args:
        folder: of the pictures.
        files: name of the split and of the file, of each picture.

    Raises:
        InputError: no layout has any of them.
    """
    for layout in LAYOUTS.values():
        if any((folder / layout(*file)).is_file() for file in files[:PROBED]):
            return [layout(*file) for file in files]
    what = f"has none of the first pictures as {' or '.join(LAYOUTS)}"
    raise InputError(folder, what, files[0][1])


def assemble(
    name: str,
    root: Path,
    source: Path,
    classes: Classes,
    ids: Sequence[str],
    folder: Path,
    files: Sequence[str],
    boxes: Boxes,
    group_of: GroupOf,
    sizes: Path,
) -> DetectionData:
    """The set, with boxes in the pixels of the files.

    Args:
        name: of the set.
        root: folder of the set.
        source: the annotation file.
        classes: of the set.
        ids: of the N images.
        folder: of the pictures.
        files: N paths below it.
        boxes: normalised; those without an area in pixels are dropped and counted.
        group_of: see `load_openimages`.
        sizes: npz file of the sizes.

    Raises:
        InputError: a picture is missing or damaged; another word for `group_of`.
    """
    if group_of not in ("box", "ignore", "drop"):
        raise InputError("group_of", "accepted: box, ignore, drop", group_of)
    size_N2 = size_index([str(folder / file) for file in files], sizes)
    objects, skipped = _objects(boxes, size_N2, group_of)
    mended = {reason: count for reason, count in boxes.counts.items() if count}
    if mended:
        get_logger(__name__).info("%s: %s", source, mended)
    return DetectionData(
        name=name,
        root=root,
        classes=classes.names,
        class_ids=tuple(classes),
        image_ids=tuple(ids),
        images=FolderImages(folder, files, size_N2),
        objects=objects,
        skipped={reason: count for reason, count in skipped.items() if count},
        source=source,
    )


def _objects(
    boxes: Boxes, size_N2: np.ndarray, group_of: GroupOf
) -> tuple[BoxObjects, dict[str, int]]:
    """Objects and ignored regions in pixels, in the order of the images, and what is left out."""
    order = np.argsort(boxes.image_G, kind="stable")
    row_G = boxes.image_G[order]
    scale_N4 = size_N2[:, [1, 0, 1, 0]].astype(np.float32)
    box_G4 = boxes.box_G4[order].astype(np.float32) * scale_N4[row_G]
    area_G = (box_G4[:, 2:] > box_G4[:, :2]).all(axis=1)
    group_G = area_G & boxes.group_G[order]
    plain_G = area_G if group_of == "box" else area_G & ~group_G
    aside_G = group_G if group_of == "ignore" else np.zeros_like(group_G)
    objects = BoxObjects(
        row_O=row_G[plain_G],
        box_O4=box_G4[plain_G],
        label_O=boxes.label_G[order][plain_G],
        row_I=row_G[aside_G],
        crowd_I4=box_G4[aside_G],
        count=len(size_N2),
    )
    return objects, {
        "boxes without area": int((~area_G).sum()),
        "boxes of groups": int(group_G.sum()) if group_of == "drop" else 0,
        "boxes repeated": boxes.counts.get("box repeated, dropped", 0),
    }
