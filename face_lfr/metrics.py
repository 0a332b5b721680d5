"""True and false accept rates of scores: operating points, ROC points, confidence intervals.

A pair is accepted when its score is *greater* than the threshold. With N negatives and a false
positive rate x, the threshold is the (k+1)-th largest negative score, where k is the largest
integer with k/N <= x. The true positive rate there is the greatest that any threshold reaches with
a false positive rate of at most x, ties included: the maximum of `tpr[fpr <= x]` over
`sklearn.metrics.roc_curve(..., drop_intermediate=False)`.

Shapes: P positive scores, N negative scores, T thresholds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.log import InputError

Scores = NDArray[np.float64]
INTERVAL = "Wilson 95 %"


@dataclass(frozen=True)
class OperatingPoint:
    """What is accepted at one false positive rate.

    `interval` bounds the true positive rate (Wilson, 95 %). It takes the pairs as independent;
    pairs that share an image are not, so that it is rather too narrow.
    """

    fpr: float  # as asked for
    tpr: float
    threshold: float  # accepted: score > threshold; -inf where every pair is
    allowed: int  # k, the negatives that may be accepted
    false_accepts: int  # negatives above the threshold: k, or fewer where scores are tied
    true_accepts: int
    negatives: int
    positives: int
    interval: tuple[float, float]

    @property
    def measured_fpr(self) -> float:
        """False accepts over negatives; at most `fpr`."""
        return self.false_accepts / self.negatives


class RocPoints(NamedTuple):
    """(T,) rates where score >= threshold is accepted; thresholds fall, the first accepts none."""

    fpr: Scores
    tpr: Scores
    threshold: Scores


def interval(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion.

    Args:
        successes: how many of the trials.
        trials: at least 1.
        level: confidence, in (0, 1).

    Raises:
        ValueError: the counts are no proportion, or the level is none.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"successes={successes}, trials={trials}: needs 0 <= successes <= trials")
    if not 0 < level < 1:
        raise ValueError(f"level={level}: must be between 0 and 1")
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share, scale = successes / trials, 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / scale
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / scale
    # At 0 and `trials` one end is exactly 0 or 1, which rounding misses.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    return low, 1.0 if successes == trials else min(1.0, centre + half)


def allowed_accepts(fpr: float, negatives: int) -> int:
    """k: the greatest count of negatives whose share is at most `fpr`.

    Shares are compared as quotients, since the product 0.29 * 100 rounds to less than 29.

    Raises:
        InputError: the rate is not in (0, 1], or is less than one of the negatives.
    """
    if not 0 < fpr <= 1:
        raise InputError("fpr", "must be in (0, 1]", fpr)
    count = min(int(fpr * negatives), negatives)
    count += count < negatives and (count + 1) / negatives <= fpr
    count -= count / negatives > fpr
    if count < 1:
        what = f"the smallest that {negatives} negatives measure is {1 / negatives:.3g}"
        raise InputError("fpr", what, fpr)
    return count


def operating_point(
    fpr: float, threshold: float, false_accepts: int, true_accepts: int, negatives: int,
    positives: int,
) -> OperatingPoint:  # fmt: skip
    """The point of these counts, with its interval."""
    return OperatingPoint(
        fpr=float(fpr),
        tpr=true_accepts / positives,
        threshold=threshold,
        allowed=allowed_accepts(fpr, negatives),
        false_accepts=false_accepts,
        true_accepts=true_accepts,
        negatives=negatives,
        positives=positives,
        interval=interval(true_accepts, positives),
    )


def tpr_at_fpr(positive: ArrayLike, negative: ArrayLike, fpr: float) -> OperatingPoint:
    """The operating point of two lists of scores.

    Args:
        positive: (P,) scores of pairs that belong together, greater meaning more alike.
        negative: (N,) scores of the others.
        fpr: in (0, 1].

    Raises:
        InputError: an empty list, a score that is not finite, or a rate that N cannot measure.
    """
    positive_P, negative_N = _scores(positive, "positive"), _scores(negative, "negative")
    count = len(negative_N)
    allowed = allowed_accepts(fpr, count)
    place = count - 1 - allowed
    threshold = -math.inf if place < 0 else float(np.partition(negative_N, place)[place])
    false_accepts, true_accepts = (
        int(np.count_nonzero(score > threshold)) for score in (negative_N, positive_P)
    )
    return operating_point(fpr, threshold, false_accepts, true_accepts, count, len(positive_P))


def roc_points(positive: ArrayLike, negative: ArrayLike) -> RocPoints:
    """Rates at every distinct score, after a first point at infinity that accepts nothing.

    The arrays are those of `sklearn.metrics.roc_curve(..., drop_intermediate=False)`.

    Args:
        positive: (P,) scores of pairs that belong together, greater meaning more alike.
        negative: (N,) scores of the others.

    Raises:
        InputError: an empty list, or a score that is not finite.
    """
    positive_P, negative_N = _scores(positive, "positive"), _scores(negative, "negative")
    threshold_T = np.unique(np.concatenate([positive_P, negative_N]))[::-1]
    rates = [_share_from(score, threshold_T) for score in (negative_N, positive_P)]
    fpr_T, tpr_T = (np.concatenate([[0.0], rate_T]) for rate_T in rates)
    return RocPoints(fpr_T, tpr_T, np.concatenate([[math.inf], threshold_T]))


def _share_from(score: Scores, threshold_T: Scores) -> Scores:
    """Share of the scores that reach each threshold."""
    below_T = np.searchsorted(np.sort(score), threshold_T, side="left")
    share: Scores = (len(score) - below_T) / len(score)
    return share


def _scores(score: ArrayLike, name: str) -> Scores:
    found = np.asarray(score, dtype=np.float64).ravel()
    if not len(found):
        raise InputError(name, "has no scores", len(found))
    wrong = np.flatnonzero(~np.isfinite(found))
    if wrong.size:
        raise InputError(name, f"score {wrong[0]} is not finite", found[wrong[0]])
    return found
