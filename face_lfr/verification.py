"""Verification of pairs: ten-fold accuracy and VAL@FAR as insightface reports them, ROC curves.

The rules of the folds are those of insightface recognition/arcface_torch/eval/verification.py: the
distance of a pair is the squared Euclidean distance d of unit features; a pair is called the same
when d is below a threshold, strictly. The pairs are cut into folds in their order. For each fold
the threshold comes from the other folds:

- accuracy: the first of 0, 0.01, ..., 3.99 that is best there;
- VAL@FAR: where the false accept rate over 0, 0.001, ..., 3.999, read as a piecewise linear
  function, reaches FAR; 0 when it never does.

Every pair enters a histogram over the thresholds once, and the folds are sums of it.

Shapes: P pairs, D columns, K folds, T thresholds, S distinct scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.log import InputError

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
Flags = NDArray[np.bool_]
FOLDS = 10
FAR = 1e-3


@dataclass(frozen=True)
class Verification:
    """Scores of P pairs.

    Attributes:
        accuracy, accuracy_std: mean and population standard deviation over the folds.
        val, val_std: the same of the share of same pairs that are accepted at `far_target`.
        far: mean over the folds of the false accept rate that was met.
        far_target: that was asked for.
        fold_accuracy: (K,).
        threshold: (K,) squared distance that decided the accuracy of each fold.
        fold_val: (K,); NaN where a fold has no same pair, and left out of `val` there.
        val_threshold: (K,).
        tpr, fpr: (T,) means over the folds at `thresholds`, for a curve.
        thresholds: (T,) squared distances.
        pairs, same: how many there are, and how many of them show one person.
    """

    accuracy: float
    accuracy_std: float
    val: float
    val_std: float
    far: float
    far_target: float
    fold_accuracy: Floats
    threshold: Floats
    fold_val: Floats
    val_threshold: Floats
    tpr: Floats
    fpr: Floats
    thresholds: Floats
    pairs: int
    same: int

    def metrics(self) -> dict[str, float]:
        """The figures that a report shows."""
        names = ("accuracy", "accuracy_std", "val", "val_std", "far", "far_target")
        return {name: getattr(self, name) for name in names} | {
            "threshold": float(self.threshold.mean()),
            "pairs": float(self.pairs),
            "same": float(self.same),
        }


def unit_rows(feature_ND: ArrayLike, where: str = "features") -> Floats:
    """Rows scaled to length 1, float64.

    Raises:
        InputError: not two-dimensional, or a row that is not finite or 0; names the row.
    """
    feature_ND = np.asarray(feature_ND)
    if feature_ND.ndim != 2 or feature_ND.dtype.kind != "f":
        kind = f"{feature_ND.dtype} {feature_ND.shape}"
        raise InputError(where, "must be rows of floats, (N, D)", kind)
    feature_ND = feature_ND.astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(feature_ND).all(axis=1))
    if bad.size:
        raise InputError(where, f"not finite in {bad.size} rows, first row", int(bad[0]))
    norm_N = np.sqrt(np.einsum("nd,nd->n", feature_ND, feature_ND))
    zero = np.flatnonzero(norm_N == 0)
    if zero.size:
        raise InputError(where, f"{zero.size} rows are all 0, first row", int(zero[0]))
    return feature_ND / norm_N[:, None]


def pair_distances(feature_ND: ArrayLike, where: str = "features") -> Floats:
    """Squared distance of rows 2 k and 2 k + 1 once they have length 1, (P,) in [0, 4].

    Args:
        feature_ND: (2 P, D); the sum of an image's feature and of its mirror image's.
        where: what errors name.

    Raises:
        InputError: as `unit_rows`, or an odd number of rows.
    """
    unit_ND = unit_rows(feature_ND, where)
    if len(unit_ND) % 2:
        raise InputError(where, "odd number of rows, which are no pairs", len(unit_ND))
    return np.square(unit_ND[0::2] - unit_ND[1::2]).sum(axis=1)


def verify(
    feature_ND: ArrayLike,
    same_P: ArrayLike,
    folds: int = FOLDS,
    far: float = FAR,
    where: str = "features",
) -> Verification:
    """Score the pairs of a verification set.

    Args:
        feature_ND: (2 P, D), as `pair_distances`.
        same_P: P truth values.
        folds: K, the pairs are cut into.
        far: false accept rate of VAL.
        where: what errors name.

    Raises:
        InputError: as `pair_distances` and `verify_distances`.
    """
    return verify_distances(pair_distances(feature_ND, where), same_P, folds, far, where)


def verify_distances(
    distance_P: ArrayLike,
    same_P: ArrayLike,
    folds: int = FOLDS,
    far: float = FAR,
    where: str = "distances",
) -> Verification:
    """`verify` from squared distances.

    Raises:
        InputError: fewer pairs than folds, a distance that is not finite, another number of truth
            values, or none or all of them true.
        ValueError: fewer than two folds, or a rate outside of (0, 1).
    """
    if folds < 2 or not 0 < far < 1:
        raise ValueError(f"folds={folds} must be at least 2, far={far} in (0, 1)")
    distance_P = np.asarray(distance_P, np.float64)
    same_P = _checked_truth(distance_P, np.asarray(same_P), folds, where)
    fold_P = _fold_of(len(distance_P), folds)
    # arange and no multiples of the step: the last bit decides ties with the authors' thresholds.
    coarse, fine = np.arange(0, 4, 0.01), np.arange(0, 4, 0.001)
    table = _Table(distance_P, same_P, fold_P, folds, coarse)
    accuracy_K, best_K = table.accuracy()
    tpr, fpr = table.curve()
    limit_K = _Table(distance_P, same_P, fold_P, folds, fine).val_thresholds(far)
    val_K, met_K = _rates_at(limit_K, distance_P, same_P, fold_P, folds)
    return Verification(
        float(accuracy_K.mean()), float(accuracy_K.std()),
        float(np.nanmean(val_K)), float(np.nanstd(val_K)), float(np.nanmean(met_K)), far,
        accuracy_K, coarse[best_K], val_K, limit_K, tpr, fpr, coarse,
        len(same_P), int(same_P.sum()),
    )  # fmt: skip


def _checked_truth(distance_P: Floats, same_P: NDArray, folds: int, where: str) -> Flags:
    if distance_P.ndim != 1 or same_P.shape != distance_P.shape:
        what = f"needs one truth value for each of {distance_P.size} pairs, shape"
        raise InputError(where, what, same_P.shape)
    if len(same_P) < folds:
        raise InputError(where, f"fewer pairs than the {folds} folds", len(same_P))
    bad = np.flatnonzero(~np.isfinite(distance_P))
    if bad.size:
        raise InputError(where, f"{bad.size} pairs are not finite, first pair", int(bad[0]))
    if same_P.dtype != bool and not np.isin(same_P, (0, 1)).all():
        raise InputError(where, "truth values are neither 0 nor 1", np.unique(same_P)[:5])
    same_P = same_P.astype(bool)
    if same_P.all() or not same_P.any():
        kind = "one person" if same_P.all() else "two persons"
        raise InputError(where, "there is nothing to tell apart, every pair shows", kind)
    return same_P


def _fold_of(pairs: int, folds: int) -> Counts:
    """Fold of each pair: consecutive runs, the first `pairs % folds` longer by one."""
    size_K = np.full(folds, pairs // folds)
    size_K[: pairs % folds] += 1
    return np.repeat(np.arange(folds), size_K)


class _Table:
    """How many pairs of each fold lie below each threshold.

    Attributes:
        same_KT, different_KT: accepted pairs of the two kinds.
        same_K, different_K: all pairs of the two kinds.
    """

    def __init__(self, distance_P: Floats, same_P: Flags, fold_P: Counts, folds: int, at_T: Floats):
        self.at_T = at_T
        # A pair is accepted from the first threshold on that is above its distance.
        first_P = np.searchsorted(at_T, distance_P, side="right")
        cell_P = fold_P * (len(at_T) + 1) + first_P
        shape = folds, len(at_T) + 1
        counts = [
            np.bincount(cell_P[part], minlength=shape[0] * shape[1]).reshape(shape)
            for part in (same_P, ~same_P)
        ]
        self.same_K, self.different_K = (count.sum(axis=1) for count in counts)
        self.same_KT, self.different_KT = (count.cumsum(axis=1)[:, :-1] for count in counts)

    def accuracy(self) -> tuple[Floats, Counts]:
        """Accuracy of each fold, and the threshold it was measured at."""
        right_KT = self.same_KT + (self.different_K[:, None] - self.different_KT)
        size_K = self.same_K + self.different_K
        others_KT = right_KT.sum(axis=0) - right_KT
        best_K = others_KT.argmax(axis=1)  # the first of equals
        return right_KT[np.arange(len(best_K)), best_K] / size_K, best_K

    def curve(self) -> tuple[Floats, Floats]:
        """True and false accept rates at every threshold, means over the folds."""
        kinds = (self.same_KT, self.same_K), (self.different_KT, self.different_K)
        tpr, fpr = ((hit_KT / np.maximum(c_K, 1)[:, None]).mean(axis=0) for hit_KT, c_K in kinds)
        return tpr, fpr

    def val_thresholds(self, target: float) -> Floats:
        """Where the other folds' false accept rate is `target`; 0 where it is nowhere."""
        others_K1 = (self.different_K.sum() - self.different_K)[:, None]
        others_KT = self.different_KT.sum(axis=0) - self.different_KT
        rate_KT = others_KT / np.maximum(others_K1, 1)
        return np.array([_crossing(rate_T, self.at_T, target) for rate_T in rate_KT])


def _crossing(rate_T: Floats, at_T: Floats, target: float) -> float:
    """The last threshold at which the piecewise linear rate is `target`; 0 when it is below."""
    if rate_T[-1] < target:
        return 0.0
    low = int(np.searchsorted(rate_T, target, side="right")) - 1
    if low == len(rate_T) - 1:
        return float(at_T[-1])
    weight = 1.0 / (rate_T[low + 1] - rate_T[low])
    left, right = (rate_T[low + 1] - target) * weight, (target - rate_T[low]) * weight
    return float(at_T[low] * left + at_T[low + 1] * right)


def _rates_at(
    threshold_K: Floats, distance_P: Floats, same_P: Flags, fold_P: Counts, folds: int
) -> tuple[Floats, Floats]:
    """Accepted share of same and of different pairs in each fold; NaN where there is none."""
    accepted_P = distance_P < threshold_K[fold_P]
    val_K = _share(accepted_P[same_P], fold_P[same_P], folds)
    return val_K, _share(accepted_P[~same_P], fold_P[~same_P], folds)


def _share(accepted_P: Flags, fold_P: Counts, folds: int) -> Floats:
    count_K = np.bincount(fold_P, minlength=folds)
    accepted_K = np.bincount(fold_P[accepted_P], minlength=folds)
    return np.divide(accepted_K, count_K, out=np.full(folds, np.nan), where=count_K > 0)


class Roc(NamedTuple):
    """Counts at falling thresholds: pairs of either kind with a score >= `threshold_S`.

    The first entry accepts nothing and has the threshold infinity.
    """

    false_S: Counts
    true_S: Counts
    threshold_S: Floats

    @property
    def fpr(self) -> Floats:
        """False positive rates."""
        return self.false_S / self.false_S[-1]

    @property
    def tpr(self) -> Floats:
        """True positive rates."""
        return self.true_S / self.true_S[-1]

    def corners(self) -> Roc:
        """Without the points inside straight stretches, as scikit-learn's roc_curve drops them.

        It looks before it adds the point that accepts nothing, so the next one always stays.
        """
        if len(self.false_S) < 4:
            return self
        bends = [np.diff(count_S[1:], 2) != 0 for count_S in (self.false_S, self.true_S)]
        kept = np.concatenate([[True, True], bends[0] | bends[1], [True]])
        return Roc(self.false_S[kept], self.true_S[kept], self.threshold_S[kept])


def roc(score_P: Floats, same_P: Flags) -> Roc:
    """The whole curve, a point for each distinct score.

    Raises:
        InputError: a score that is not finite, or pairs of one kind only.
    """
    if not np.isfinite(score_P).all():
        row = int((~np.isfinite(score_P)).argmax())
        raise InputError("scores", "not finite, first pair", row)
    if same_P.all() or not same_P.any():
        kind = "genuine" if same_P.all() else "impostor"
        raise InputError("pairs", "there is nothing to tell apart, every pair is", kind)
    sorted_P = np.sort(score_P)
    first_S = np.flatnonzero(np.diff(sorted_P, prepend=-np.inf))
    threshold_S = sorted_P[first_S]
    # The few genuine scores are found among all; sorting pairs would take several times as long.
    place = np.searchsorted(threshold_S, score_P[same_P])
    true_S = _accepted(np.bincount(place, minlength=len(threshold_S)))
    all_S = _accepted(np.diff(first_S, append=len(sorted_P)))
    return Roc(all_S - true_S, true_S, np.concatenate([[np.inf], threshold_S[::-1]]))


def _accepted(count_S: Counts) -> Counts:
    """Pairs at or above each score, from the highest on, after a first entry of 0."""
    return np.concatenate([[0], np.cumsum(count_S[::-1])])


class RocPoint(NamedTuple):
    """One point of a curve: scores >= `threshold` are accepted, among them `false_accepts`."""

    tpr: float
    fpr: float
    threshold: float
    false_accepts: int


def _point(curve: Roc, index: int) -> RocPoint:
    false, true = int(curve.false_S[index]), int(curve.true_S[index])
    rates = true / int(curve.true_S[-1]), false / int(curve.false_S[-1])
    return RocPoint(*rates, float(curve.threshold_S[index]), false)


def nearest_points(curve: Roc, fprs: Sequence[float]) -> dict[float, RocPoint]:
    """For each rate the point whose rate is nearest; of equally near ones that of the highest tpr.

    Looks at the corners of the curve only, as the scripts of insightface do, so the rate can lie
    on either side and, with few impostor pairs, far away.
    """
    corners = curve.corners()
    backwards = corners.fpr[::-1]
    index = {fpr: len(backwards) - 1 - int(np.abs(backwards - fpr).argmin()) for fpr in fprs}
    return {fpr: _point(corners, index[fpr]) for fpr in fprs}


def bounded_points(curve: Roc, fprs: Sequence[float]) -> dict[float, RocPoint]:
    """For each rate the point with the highest tpr among those with a rate that is no higher."""
    index = np.searchsorted(curve.fpr, list(fprs), side="right") - 1
    return {fpr: _point(curve, int(at)) for fpr, at in zip(fprs, index, strict=True)}
