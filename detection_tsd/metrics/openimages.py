"""Mean average precision of the Open Images challenge, at IoU 0.5.

The authority is `OpenImagesChallengeEvaluator` of the TF Object Detection API:

1. Boxes and verified present labels hold for all ancestors of their class too, verified absent ones
   for all descendants.
2. Detections of a class count in an image only when the class is verified there (present or
   absent) or has a box there; the others are dropped, and counted.
3. Matching: see `oid_matching`. A class has as many objects as single boxes, and `group_weight` for
   each box of a group.
4. Average precision is the area under the monotone envelope of precision over recall, at all
   points; the mean is over classes that have objects.

Equal scores rank in the order of the images, and in an image as the file has them; the authority's
order of ties is undefined.

The evaluator of Sense-X/TSD (mmdet/datasets/utils/eval.py) differs in two places: its verified
classes are always class 1, and a group counts 1 in the number of objects whatever its weight. So it
never sees a false positive in a class that is verified absent, and its values are too high;
`compat="tsd_repo"` repeats that, to compare with the values its authors give. They also expand the
detections (`expand_predictions=True`).

Letters: N images, K classes, G boxes, V image labels, D detections, E entries.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from common.log import InputError
from detection_tsd.data.oid_files import Boxes, Classes, Duplicates, ImageLabels
from detection_tsd.data.oid_predictions import Predictions, Unknown, read_predictions
from detection_tsd.metrics.oid_matching import Entries, by_score, match, suppress
from detection_tsd.metrics.oid_truth import (
    GroundTruth,
    expand_boxes,
    expand_labels,
    read_ground_truth,
)

Expand = bool | Literal["nms"]
NMS_IOU = 0.5


@dataclass(frozen=True)
class OpenImagesScores:
    """Scores of a set of detections.

    Attributes:
        mean_ap: over the classes that have objects; NaN when none has.
        ap_K: of each class, NaN without objects.
        recall_K: share of the objects that were found at any score, NaN without objects.
        objects_K: number of objects, groups by their weight.
        classes: the K classes.
        counts: images, boxes, detections, and everything that was dropped, absorbed or mended.
    """

    mean_ap: float
    ap_K: NDArray[np.float64]
    recall_K: NDArray[np.float64]
    objects_K: NDArray[np.float64]
    classes: Classes
    counts: dict[str, int]

    def report(self) -> dict[str, dict[str, float]]:
        """For `metrics.json`: scores (mAP, mean_recall), scores_by_class, counts.

        The mean recall is over the classes that have objects; only these are in scores_by_class.
        """
        seen = np.isfinite(self.ap_K)
        recall = float(self.recall_K[seen].mean()) if seen.any() else float("nan")
        pairs = zip(self.classes, self.ap_K.tolist(), seen.tolist(), strict=True)
        return {
            "scores": {"mAP": self.mean_ap, "mean_recall": recall},
            "scores_by_class": {name: value for name, value, known in pairs if known},
            "counts": {"classes with objects": int(seen.sum()), **self.counts},
        }


def evaluate_files(
    predictions: Path | str,
    annotations: Path | str,
    classes: Path | str,
    image_labels: Path | str | None = None,
    hierarchy: Path | str | None = None,
    *,
    group_weight: float = 1.0,
    iou: float = 0.5,
    expand_predictions: Expand = False,
    expand_annotations: bool = True,
    compat: str | None = None,
    unknown_images: Unknown = "error",
    duplicates: Duplicates = "error",
) -> dict[str, dict[str, float]]:
    """Score a file of detections; see `read_ground_truth`, `read_predictions` and `evaluate`.

    Returns:
        `OpenImagesScores.report()`.

    Raises:
        InputError: a file is missing or malformed; names the file, the line and the value.
    """
    truth = read_ground_truth(annotations, classes, image_labels, hierarchy, duplicates)
    found = read_predictions(
        predictions, truth.classes, truth.image_ids, unknown_images, duplicates
    )
    scores = evaluate(
        truth,
        found,
        group_weight=group_weight,
        iou=iou,
        expand_predictions=expand_predictions,
        expand_annotations=expand_annotations,
        compat=compat,
    )
    return scores.report()


def evaluate(
    truth: GroundTruth,
    predictions: Predictions,
    *,
    group_weight: float = 1.0,
    iou: float = 0.5,
    expand_predictions: Expand = False,
    expand_annotations: bool = True,
    compat: str | None = None,
) -> OpenImagesScores:
    """Score detections.

    Args:
        truth: of the set.
        predictions: detections of it; those without an area are dropped and counted.
        group_weight: what a box of a group counts, found or not; 1 in the challenge.
        iou: threshold of IoU and of the share inside a group.
        expand_predictions: copy each detection to the ancestors of its class; "nms" then suppresses
            at IoU 0.5 in every class. The challenge leaves this to its participants.
        expand_annotations: apply rule 1; false for files that are expanded already.
        compat: None, or "tsd_repo".

    Raises:
        InputError: an option out of its range; annotations that are expanded already.
        ValueError: columns that do not fit each other, a score or a box that is not finite.
    """
    _check(truth, predictions, group_weight, iou, expand_predictions, compat)
    counts = {"images": len(truth.image_ids), "boxes": len(truth.boxes.label_G)}
    _count(counts, "boxes", truth.boxes.counts)
    _count(counts, "image labels", truth.image_labels.counts)
    boxes, labels = truth.boxes, truth.image_labels
    if expand_annotations and truth.hierarchy is not None:
        boxes = expand_boxes(boxes, truth.hierarchy)
        labels = expand_labels(labels, truth.hierarchy)
        counts["boxes of ancestors"] = len(boxes.label_G) - len(truth.boxes.label_G)
    counts |= {"groups": int(boxes.group_G.sum()), "detections": len(predictions.label_D)}
    _count(counts, "detections", predictions.counts)
    scored_NK = _scored(truth, boxes, labels, compat)
    found = _relevant(truth, predictions, scored_NK, expand_predictions, counts)
    suppressed = NMS_IOU if expand_predictions == "nms" else None
    entries = _entries(truth, boxes, found, iou, group_weight, suppressed, counts)
    objects_K = _objects(boxes, len(truth.classes), 1.0 if compat else group_weight)
    ap_K, recall_K = _average_precision(entries, objects_K)
    mean = float(np.nanmean(ap_K)) if np.isfinite(ap_K).any() else float("nan")
    return OpenImagesScores(mean, ap_K, recall_K, objects_K, truth.classes, counts)


def _count(counts: dict[str, int], kind: str, more: dict[str, int]) -> None:
    """Take over what a reader counted, when there was any."""
    counts.update({f"{kind}: {name}": number for name, number in more.items() if number})


def _check(
    truth: GroundTruth,
    predictions: Predictions,
    group_weight: float,
    iou: float,
    expand: Expand,
    compat: str | None,
) -> None:
    if not 0 < iou <= 1:
        raise InputError("iou", "must be in (0, 1]", iou)
    if not 0 <= group_weight <= 1:
        raise InputError("group_weight", "must be in [0, 1]", group_weight)
    if expand not in (True, False, "nms"):
        raise InputError("expand_predictions", "accepted: true, false, nms", expand)
    if expand and truth.hierarchy is None:
        raise InputError("expand_predictions", "needs a hierarchy", expand)
    if compat not in (None, "tsd_repo"):
        raise InputError("compat", "accepted: null, tsd_repo", compat)
    image_D, label_D, score_D, box_D4, _ = predictions
    if not len(image_D) == len(label_D) == len(score_D) == len(box_D4):
        raise ValueError("the columns of the predictions differ in length")
    if not np.isfinite(score_D).all() or not np.isfinite(box_D4).all():
        raise ValueError("predictions hold a score or a box that is not finite")
    for name, column, high in (
        ("predictions.image_D", image_D, len(truth.image_ids) - 1),
        ("predictions.label_D", label_D, len(truth.classes)),
        ("boxes.label_G", truth.boxes.label_G, len(truth.classes)),
    ):
        low = 0 if name.endswith("image_D") else 1
        if len(column) and not (column.min() >= low and column.max() <= high):
            raise ValueError(f"{name} spans {column.min()}..{column.max()}, not {low}..{high}")


def _scored(
    truth: GroundTruth, boxes: Boxes, labels: ImageLabels, compat: str | None
) -> NDArray[np.bool_]:
    """Which classes count in which image, (N, K + 1)."""
    scored_NK = np.zeros((len(truth.image_ids), len(truth.classes) + 1), bool)
    scored_NK[boxes.image_G, boxes.label_G] = True
    if compat == "tsd_repo":
        scored_NK[:, 1] = True
    else:
        scored_NK[labels.image_V, labels.label_V] = True
    return scored_NK


def _relevant(
    truth: GroundTruth,
    found: Predictions,
    scored_NK: NDArray[np.bool_],
    expand: Expand,
    counts: dict[str, int],
) -> Predictions:
    """Detections with an area whose class counts in their image; the others are counted."""
    area_D = (found.box_D4[:, :2] < found.box_D4[:, 2:]).all(axis=1)
    own_D = scored_NK[found.image_D, found.label_D]
    counts["detections without area"] = int((~area_D).sum())
    counts["detections of unverified classes"] = int((area_D & ~own_D).sum())
    if not expand or truth.hierarchy is None:
        rows, label_E = np.flatnonzero(area_D & own_D), found.label_D[area_D & own_D]
    else:
        rows = np.flatnonzero(area_D)
        row_E, label_E = truth.hierarchy.up(found.label_D[rows])
        kept = scored_NK[found.image_D[rows[row_E]], label_E]
        rows, label_E = rows[row_E[kept]], label_E[kept]
        counts["detections of ancestors"] = int((label_E != found.label_D[rows]).sum())
    return Predictions(
        found.image_D[rows], label_E, found.score_D[rows], found.box_D4[rows], found.counts
    )


def _entries(
    truth: GroundTruth,
    boxes: Boxes,
    found: Predictions,
    iou: float,
    group_weight: float,
    suppressed: float | None,
    counts: dict[str, int],
) -> Entries:
    """Detections and found groups with their weights, after suppression when it has a threshold."""
    columns = len(truth.classes) + 1
    key_D = found.image_D.astype(np.int64) * columns + found.label_D
    order = by_score(key_D, found.score_D)
    key_D, score_D, box_D4 = key_D[order], found.score_D[order], found.box_D4[order]
    if suppressed is not None:
        stays_D = suppress(key_D, box_D4, suppressed)
        counts["detections suppressed"] = int((~stays_D).sum())
        key_D, score_D, box_D4 = key_D[stays_D], score_D[stays_D], box_D4[stays_D]
    key_G = boxes.image_G.astype(np.int64) * columns + boxes.label_G
    result = match(key_D, score_D, box_D4, key_G, boxes.box_G4, boxes.group_G, iou, group_weight)
    counts |= {"detections absorbed": result.absorbed, "groups found": result.groups_found}
    return result.entries


def _objects(boxes: Boxes, num_classes: int, group_weight: float) -> NDArray[np.float64]:
    """Number of objects of each class, (K,)."""
    weight_G = np.where(boxes.group_G, group_weight, 1.0)
    weight_K = np.bincount(boxes.label_G, weight_G, minlength=num_classes + 1)
    return weight_K[1:].astype(np.float64)


def _average_precision(
    entries: Entries, objects_K: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Average precision and final recall of each class, (K,); NaN without objects."""
    label_E = entries.key_E % (len(objects_K) + 1)
    order = np.lexsort((-entries.score_E, label_E))
    weight_E = entries.weight_E[order]
    first_K = np.searchsorted(label_E[order], np.arange(1, len(objects_K) + 2))
    ap_K, recall_K = np.full((2, len(objects_K)), np.nan)
    for row in np.flatnonzero(objects_K > 0):
        right = weight_E[first_K[row] : first_K[row + 1]]
        found, wrong = np.cumsum(right), np.cumsum(right <= 0)
        recall = np.concatenate([[0.0], found / objects_K[row], [1.0]])
        precision = np.concatenate([[0.0], found / np.maximum(found + wrong, 1e-300), [0.0]])
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        ap_K[row] = np.sum(np.diff(recall) * envelope[1:])
        recall_K[row] = recall[-2]
    return ap_K, recall_K
