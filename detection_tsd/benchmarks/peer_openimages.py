"""The Open Images metric image by image and class by class, restated to be timed against.

The loop of the TF Object Detection API's evaluator (utils/per_image_evaluation.py and
utils/object_detection_evaluation.py), without a hierarchy and with groups of weight 1.

Letters: N images, K classes, D detections and G boxes of one image and class.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detection_tsd.data.oid_predictions import Predictions
from detection_tsd.metrics.oid_truth import GroundTruth

Floats = NDArray[np.float64]
Entries = dict[int, list[tuple[float, float]]]  # of a class: score, and 1 for a hit
THRESHOLD = 0.5


def average_precisions(truth: GroundTruth, found: Predictions) -> Floats:
    """Average precision of each class (K,), NaN without objects; rows are in image order."""
    count = len(truth.classes)
    entries: Entries = defaultdict(list)
    boxes, labels = truth.boxes, truth.image_labels
    columns = (boxes.image_G, labels.image_V, found.image_D)
    starts = [np.searchsorted(rows, np.arange(len(truth.image_ids) + 1)) for rows in columns]
    for image in range(len(truth.image_ids)):
        of_box, of_label, of_found = (slice(*start[image : image + 2]) for start in starts)
        own_G, label_D = boxes.label_G[of_box], found.label_D[of_found]
        for label in set(own_G.tolist()) | set(labels.label_V[of_label].tolist()):
            entries[label] += image_entries(
                found.box_D4[of_found][label_D == label],
                found.score_D[of_found][label_D == label],
                boxes.box_G4[of_box][own_G == label],
                boxes.group_G[of_box][own_G == label],
            )
    objects_K = np.bincount(boxes.label_G, minlength=count + 1)[1:]
    return np.array([average_precision(entries[k + 1], objects_K[k]) for k in range(count)])


def image_entries(
    box_D4: Floats, score_D: Floats, box_G4: NDArray[Any], group_G: NDArray[np.bool_]
) -> list[tuple[float, float]]:
    """What one image adds to the ranking of a class."""
    order = np.argsort(-score_D, kind="stable")
    box_D4, score_D = box_D4[order], score_D[order]
    single = overlaps(box_D4, box_G4[~group_G])[0]
    hit, taken = np.zeros(len(box_D4), bool), set()
    for row in range(len(box_D4) if single.shape[1] else 0):
        look = int(single[row].argmax())
        if single[row, look] >= THRESHOLD and look not in taken:
            taken.add(look)
            hit[row] = True
    found = []
    inside = overlaps(box_D4, box_G4[group_G])[1]
    best = np.zeros(inside.shape[1])
    for row, score in enumerate(score_D.tolist()):
        group = int(inside[row].argmax()) if inside.shape[1] else -1
        if not hit[row] and group >= 0 and inside[row, group] >= THRESHOLD:
            best[group] = max(best[group], score)
        else:
            found.append((score, float(hit[row])))
    return found + [(score, 1.0) for score in best.tolist() if score > 0]


def overlaps(box_D4: Floats, box_G4: NDArray[Any]) -> tuple[Floats, Floats]:
    """Intersection over union, and over the area of the detection, (D, G)."""
    low = np.maximum(box_D4[:, None, :2], box_G4[None, :, :2])
    high = np.minimum(box_D4[:, None, 2:], box_G4[None, :, 2:])
    both = np.clip(high - low, 0, None).prod(axis=2)
    area_D = (box_D4[:, 2:] - box_D4[:, :2]).prod(axis=1)[:, None]
    area_G = (box_G4[:, 2:] - box_G4[:, :2]).prod(axis=1)[None]
    return both / (area_D + area_G - both), both / area_D


def average_precision(entries: list[tuple[float, float]], objects: int) -> float:
    """Area under the monotone envelope of precision over recall."""
    if not objects:
        return float("nan")
    table = np.array(sorted(entries, reverse=True)).reshape(-1, 2)
    hits = table[:, 1].cumsum()
    precision = np.concatenate([[0.0], hits / np.arange(1, len(hits) + 1), [0.0]])
    recall = np.concatenate([[0.0], hits / objects, [1.0]])
    for place in range(len(precision) - 2, -1, -1):
        precision[place] = max(precision[place], precision[place + 1])
    return float(np.sum(np.diff(recall) * precision[1:]))
