"""What others do to score all pairs, restated to be timed and compared against.

Both build the whole matrix of scores with NumPy, in float32, and then

* `sorted_pairs`: call `sklearn.metrics.roc_curve` on the upper triangle, as most scripts do;
* `partitioned_pairs`: take the (k+1)-th largest negative with `numpy.partition`, which is the least
  that a script with the whole matrix can do.

Each returns the true positive rates. The threads of their products are those PyTorch has now.
Letters: N rows, D their width, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module

import numpy as np
import torch
from numpy.typing import NDArray

Features = NDArray[np.float32]
Labels = NDArray[np.int64]
Peer = Callable[[Features, Labels, Sequence[float]], list[float]]


def sorted_pairs(features: Features, labels: Labels, fprs: Sequence[float]) -> list[float]:
    """Sort the scores of all pairs."""
    from sklearn.metrics import roc_curve

    score_P, match_P = _all_scores(features, labels)
    fpr_T, tpr_T, _ = roc_curve(match_P, score_P, drop_intermediate=False)
    return [float(tpr_T[np.searchsorted(fpr_T, fpr, side="right") - 1]) for fpr in fprs]


def partitioned_pairs(features: Features, labels: Labels, fprs: Sequence[float]) -> list[float]:
    """Partition the scores of the negative pairs at every rate."""
    score_P, match_P = _all_scores(features, labels)
    positive_P, negative_P = score_P[match_P], score_P[~match_P]
    count = len(negative_P)
    places = [count - 1 - int(fpr * count) for fpr in fprs]
    parted_P = np.partition(negative_P, places)
    return [float((positive_P > parted_P[place]).mean()) for place in places]


def _all_scores(features: Features, labels: Labels) -> tuple[Features, NDArray[np.bool_]]:
    """(P,) cosines of all pairs but those of two distractors, and whether the labels agree."""
    unit_ND = features / np.linalg.norm(features, axis=1, keepdims=True)
    # comes with scikit-learn
    with import_module("threadpoolctl").threadpool_limits(torch.get_num_threads()):
        score_NN = unit_ND @ unit_ND.T
    counted_NN = np.triu(np.ones(score_NN.shape, dtype=bool), 1)
    known_N = labels >= 0
    counted_NN &= known_N[:, None] | known_N[None]
    return score_NN[counted_NN], (labels[:, None] == labels[None])[counted_NN]
