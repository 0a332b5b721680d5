"""What the images of Open Images are scored with: boxes, verified labels and how they expand.

Letters: N images, K classes, G boxes, V image labels, E rows after expansion.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.log import InputError
from detection_tsd.data.hierarchy import Hierarchy, read_hierarchy, read_label_tree
from detection_tsd.data.oid_files import (
    Boxes,
    Classes,
    Duplicates,
    ImageIndex,
    ImageLabels,
    read_boxes,
    read_classes,
    read_image_labels,
)
from detection_tsd.data.openimages_text import read_text_boxes


@dataclass(frozen=True)
class GroundTruth:
    """What people annotated in N images, as the files have it.

    Attributes:
        image_ids: of the N images.
        classes: the K classes.
        boxes: of all images.
        image_labels: verified labels of all images.
        hierarchy: of the classes.
    """

    image_ids: tuple[str, ...]
    classes: Classes
    boxes: Boxes
    image_labels: ImageLabels = field(default_factory=ImageLabels.none)
    hierarchy: Hierarchy | None = None


def read_ground_truth(
    annotations: Path | str,
    classes: Path | str,
    image_labels: Path | str | None = None,
    hierarchy: Path | str | None = None,
    duplicates: Duplicates = "error",
) -> GroundTruth:
    """Read what a set is scored with.

    Args:
        annotations: boxes; a name in `.txt` means the text format of Sense-X/TSD.
        classes: list of the classes.
        image_labels: verified labels; without them only classes with boxes are scored in an image.
        hierarchy: JSON file of the classes, or the matrix of Sense-X/TSD (`.np`, `.npy`, `.pkl`).
        duplicates: what happens to repeated rows; the authority keeps them.

    Raises:
        InputError: a file is missing or malformed; names the file, the line and the value.
    """
    known = read_classes(classes)
    relation = None
    if hierarchy is not None:
        matrix = Path(hierarchy).suffix in (".np", ".npy", ".pkl")
        read = (
            read_label_tree(hierarchy, len(known)) if matrix else read_hierarchy(hierarchy, known)
        )
        relation = read
    images = ImageIndex()
    if Path(annotations).suffix == ".txt":
        boxes = read_text_boxes(annotations, len(known), images, duplicates)
    else:
        boxes = read_boxes(annotations, known, images, duplicates)
    verified = ImageLabels.none()
    if image_labels is not None:
        verified = read_image_labels(image_labels, known, images, duplicates)
    return _sorted_by_name(GroundTruth(images.ids, known, boxes, verified, relation))


def _sorted_by_name(truth: GroundTruth) -> GroundTruth:
    """Images in the order of their names, which decides between equal scores."""
    order = np.array(sorted(range(len(truth.image_ids)), key=truth.image_ids.__getitem__), int)
    place = np.empty(len(order), np.int32)
    place[order] = np.arange(len(order))
    boxes = truth.boxes._replace(image_G=place[truth.boxes.image_G])
    labels = truth.image_labels._replace(image_V=place[truth.image_labels.image_V])
    names = tuple(truth.image_ids[row] for row in order)
    return GroundTruth(names, truth.classes, boxes, labels, truth.hierarchy)


def expand_boxes(boxes: Boxes, hierarchy: Hierarchy) -> Boxes:
    """Every box once for each ancestor too.

    Files that are expanded already would count their ancestors twice; that they are is seen from
    all copies being there.

    Raises:
        InputError: they are expanded already.
    """
    row_E, label_E = hierarchy.up(boxes.label_G)
    copy_E = label_E != boxes.label_G[row_E]
    if copy_E.any():
        there = np.stack([boxes.image_G, boxes.label_G, *boxes.box_G4.T], axis=1)
        copied = np.stack(
            [boxes.image_G[row_E], label_E, *boxes.box_G4[row_E].T], axis=1
        )[copy_E]  # fmt: skip
        if _all_in(copied, there):
            what = "boxes already stand for the ancestors of their classes, set"
            raise InputError("annotations", what, "expand_annotations=false")
    return Boxes(
        boxes.image_G[row_E], label_E, boxes.box_G4[row_E], boxes.group_G[row_E], boxes.counts
    )


def _all_in(rows: NDArray[np.float64], table: NDArray[np.float64]) -> bool:
    """Whether every row is one of the table's."""
    known = {row.tobytes() for row in table}
    return all(row.tobytes() in known for row in rows)


def expand_labels(labels: ImageLabels, hierarchy: Hierarchy) -> ImageLabels:
    """Present labels also for ancestors, absent ones also for descendants."""
    parts = []
    for present, expand in ((True, hierarchy.up), (False, hierarchy.down)):
        rows = np.flatnonzero(labels.present_V == present)
        row_E, label_E = expand(labels.label_V[rows])
        image_E = labels.image_V[rows[row_E]]
        parts.append((image_E, label_E, np.full(len(row_E), present)))
    image_V, label_V, present_V = (np.concatenate(part) for part in zip(*parts, strict=True))
    return ImageLabels(image_V, label_V, present_V, labels.counts)
