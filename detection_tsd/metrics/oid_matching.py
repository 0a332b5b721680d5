"""Which detections of Open Images are right: matching by class and image, without a loop over them.

The rules are those of the TF Object Detection API (utils/per_image_evaluation.py). A detection
looks at one box only, the one it overlaps most; the first detection, in the order of the scores,
takes it. So a detection is a true positive exactly when it is the first of those that look at its
box, and all classes and images are decided at once.

A key is an image and a class in one number. Letters: D detections, G boxes, Q pairs of a detection
and a box of equal key, E entries of the ranking.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Keys = NDArray[np.int64]
PAIRS = 2_000_000  # at a time; 130 MB


class Entries(NamedTuple):
    """What is ranked: key (E,) int64, score (E,), weight (E,) of a true positive or 0.

    In the order of the images, within an image detections before groups.
    """

    key_E: Keys
    score_E: Floats
    weight_E: Floats


class Matching(NamedTuple):
    """Entries, and how many detections were absorbed by how many boxes of groups."""

    entries: Entries
    absorbed: int
    groups_found: int


def by_score(key_D: Keys, score_D: Floats) -> NDArray[np.int64]:
    """Order by key, then falling score; equal scores keep their order."""
    return np.lexsort((-score_D, key_D))


def match(
    key_D: Keys,
    score_D: Floats,
    box_D4: Floats,
    key_G: Keys,
    box_G4: Floats,
    group_G: NDArray[np.bool_],
    threshold: float = 0.5,
    group_weight: float = 1.0,
) -> Matching:
    """Decide about the detections of all images and classes.

    A detection takes the single box it overlaps most when the IoU reaches the threshold and no
    better one took it. Those that took none, and lie to the threshold inside (IoA, the share of
    the detection) the group they overlap most, are absorbed: of all that a group absorbs one entry
    is left, with the best of their scores and the weight of a group. A group whose best score is 0
    leaves none.

    Args:
        key_D: (D,), as sorted by `by_score`.
        score_D: (D,).
        box_D4: (D, 4), each with an area.
        key_G: (G,), in any order.
        box_G4: (G, 4).
        group_G: (G,), whether a box holds a group.
        threshold: of IoU and IoA.
        group_weight: of a found group as a true positive.
    """
    order = np.argsort(key_G, kind="stable")
    key_G, box_G4, group_G = key_G[order], box_G4[order], group_G[order]
    single_G = ~group_G
    overlap_D, look_D = best_overlap(key_D, box_D4, key_G[single_G], box_G4[single_G], "iou")
    hit_D = np.flatnonzero(overlap_D >= threshold)
    right_D = np.zeros(len(key_D), bool)
    right_D[hit_D[np.unique(look_D[hit_D], return_index=True)[1]]] = True
    rest_D = np.flatnonzero(~right_D)
    inside_D, look_D = best_overlap(
        key_D[rest_D], box_D4[rest_D], key_G[group_G], box_G4[group_G], "ioa"
    )
    absorbed_D = rest_D[inside_D >= threshold]
    found, best = np.unique(look_D[inside_D >= threshold], return_index=True)
    free_D = np.ones(len(key_D), bool)
    free_D[absorbed_D] = False
    group_key, group_score = key_G[group_G][found], score_D[absorbed_D[best]]
    ranked = (group_score > 0) & (group_weight > 0)
    key_E = np.concatenate([key_D[free_D], group_key[ranked]])
    score_E = np.concatenate([score_D[free_D], group_score[ranked]])
    weight_E = np.concatenate([right_D[free_D], np.full(int(ranked.sum()), float(group_weight))])
    into_images = np.argsort(key_E, kind="stable")
    entries = Entries(key_E[into_images], score_E[into_images], weight_E[into_images])
    return Matching(entries, len(absorbed_D), int(ranked.sum()))


def best_overlap(
    key_D: Keys, box_D4: Floats, key_G: Keys, box_G4: Floats, kind: Literal["iou", "ioa"]
) -> tuple[Floats, NDArray[np.int64]]:
    """Largest overlap of each detection with the boxes of its key.

    Args:
        key_D: (D,).
        box_D4: (D, 4), each with an area.
        key_G: (G,), ascending.
        box_G4: (G, 4).
        kind: intersection over union, or over the area of the detection.

    Returns:
        The overlap (D,), -1 where there is no box of the key; and the row of its box, the first of
        equal ones, or -1.
    """
    first_D = np.searchsorted(key_G, key_D, "left")
    count_D = np.searchsorted(key_G, key_D, "right") - first_D
    overlap_D, look_D = np.full(len(key_D), -1.0), np.full(len(key_D), -1, np.int64)
    for part in _parts(np.flatnonzero(count_D), count_D):
        size = count_D[part]
        begin = np.cumsum(size) - size
        box_Q = np.repeat(first_D[part] - begin, size) + np.arange(size.sum())
        value_Q = _overlap(np.repeat(box_D4[part], size, axis=0), box_G4[box_Q], kind)
        overlap_D[part] = np.maximum.reduceat(value_Q, begin)
        top_Q = np.flatnonzero(value_Q == np.repeat(overlap_D[part], size))
        owner = np.repeat(np.arange(len(part)), size)[top_Q]
        look_D[part] = box_Q[top_Q[np.unique(owner, return_index=True)[1]]]
    return overlap_D, look_D


def _parts(rows: NDArray[np.int64], count_D: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Runs of detections with at most `PAIRS` pairs, or a single detection."""
    total = np.cumsum(count_D[rows])
    start = 0
    while start < len(rows):
        before = total[start - 1] if start else 0
        stop = max(int(np.searchsorted(total, before + PAIRS, "right")), start + 1)
        yield rows[start:stop]
        start = stop


def _overlap(box_Q4: Floats, other_Q4: Floats, kind: Literal["iou", "ioa"]) -> Floats:
    low, high = (
        np.maximum(box_Q4[:, :2], other_Q4[:, :2]),
        np.minimum(box_Q4[:, 2:], other_Q4[:, 2:]),
    )
    common_Q = (high - low).clip(0).prod(axis=1)
    area_Q = (box_Q4[:, 2:] - box_Q4[:, :2]).prod(axis=1)
    if kind == "ioa":
        return common_Q / area_Q
    return common_Q / (area_Q + (other_Q4[:, 2:] - other_Q4[:, :2]).prod(axis=1) - common_Q)


def suppress(key_D: Keys, box_D4: Floats, threshold: float) -> NDArray[np.bool_]:
    """Hard non-maximum suppression within each key, (D,) whether a detection stays.

    Each round takes the best detection that is left of every key. Ties go to the earlier one.

    Args:
        key_D: (D,), as sorted by `by_score`.
        box_D4: (D, 4), each with an area.
        threshold: IoU above which the worse one goes.
    """
    stays_D = np.zeros(len(key_D), bool)
    left = np.arange(len(key_D))
    while left.size:
        head = np.ones(len(left), bool)
        head[1:] = key_D[left[1:]] != key_D[left[:-1]]
        stays_D[left[head]] = True
        best = left[head][np.cumsum(head) - 1]
        left = left[~head & ~(_overlap(box_D4[best], box_D4[left], "iou") > threshold)]
    return stays_D
