"""Rates of score lists against scikit-learn and loops; Wilson's interval by its equation."""

import math

import numpy as np
import pytest
from sklearn.metrics import roc_curve

from common.log import InputError
from face_lfr.metrics import allowed_accepts, interval, roc_points, tpr_at_fpr

FPRS = (1.0, 0.5, 0.29, 0.1, 0.01)


def scores(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positive and negative scores with many ties, also between the two."""
    rng = np.random.default_rng(seed)
    steps = int(rng.choice([3, 20, 10_000]))
    counts = rng.integers(1, 40), rng.integers(100, 300)
    positive, negative = (rng.integers(0, steps, count) / steps for count in counts)
    return positive + rng.choice([0.0, 0.3]), negative


def curve(positive: np.ndarray, negative: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    truth = np.repeat([1, 0], [len(positive), len(negative)])
    return roc_curve(truth, np.concatenate([positive, negative]), drop_intermediate=False)


@pytest.mark.parametrize("seed", range(40))
def test_points_equal_scikit_learn(seed: int) -> None:
    positive, negative = scores(seed)
    for ours, theirs in zip(roc_points(positive, negative), curve(positive, negative), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("seed", range(40))
def test_a_rate_is_the_best_of_all_thresholds(seed: int) -> None:
    positive, negative = scores(seed)
    fpr_T, tpr_T, _ = curve(positive, negative)
    for fpr in FPRS:
        point = tpr_at_fpr(positive, negative, fpr)
        assert point.tpr == tpr_T[fpr_T <= fpr].max()
        assert point.true_accepts == sum(score > point.threshold for score in positive)
        assert point.false_accepts == sum(score > point.threshold for score in negative)
        assert point.measured_fpr <= fpr
        assert point.interval == interval(point.true_accepts, len(positive))
        assert (point.negatives, point.positives) == (len(negative), len(positive))


def test_a_threshold_between_two_scores_by_hand() -> None:
    negative = [0.1, 0.2, 0.3, 0.4]
    point = tpr_at_fpr([0.25, 0.35, 0.3], negative, 0.25)
    assert (point.allowed, point.threshold, point.false_accepts) == (1, 0.3, 1)
    assert point.true_accepts == 1  # 0.35; 0.3 is not above the threshold
    tied = tpr_at_fpr([0.4, 0.5], [0.4, 0.4, 0.1], 0.4)
    assert (tied.allowed, tied.threshold, tied.false_accepts, tied.tpr) == (1, 0.4, 0, 0.5)


def test_a_rate_of_one_accepts_everything() -> None:
    point = tpr_at_fpr([0.0, 1.0], [2.0, 3.0], 1.0)
    assert (point.threshold, point.tpr, point.false_accepts) == (-math.inf, 1.0, 2)


def test_allowed_accepts_compare_quotients() -> None:
    for negatives in (*range(1, 200), 10**6, 2 * 10**10):
        for fpr in (0.29, 0.1, 1 / 3, 1e-4, 1e-8, 1.0):
            if fpr * negatives >= 1:
                count = allowed_accepts(fpr, negatives)
                assert count / negatives <= fpr
                assert count == negatives or (count + 1) / negatives > fpr
    assert allowed_accepts(0.29, 100) == 29  # int(0.29 * 100) is 28


def test_wilson_solves_its_equation() -> None:
    z = 1.959963984540054
    for successes, trials in ((1, 10), (9, 10), (50, 100), (4329, 10**6)):
        share = successes / trials
        for end in interval(successes, trials):
            assert abs(end - share) == pytest.approx(z * math.sqrt(end * (1 - end) / trials))
    assert interval(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)  # Wilson (1927)
    assert interval(0, 5)[0] == 0.0
    assert interval(5, 5)[1] == 1.0
    assert interval(5, 10, 0.5)[0] > interval(5, 10, 0.99)[0]


@pytest.mark.parametrize(
    ("positive", "negative", "fpr", "text"),
    [
        ([], [1.0], 1.0, "positive: has no scores: 0"),
        ([1.0], [], 1.0, "negative: has no scores: 0"),
        ([1.0, math.nan], [1.0], 1.0, "positive: score 1 is not finite: nan"),
        ([1.0], [0.5] * 10, 0.05, "fpr: the smallest that 10 negatives measure is 0.1: 0.05"),
        ([1.0], [0.5], 1.5, r"fpr: must be in \(0, 1\]: 1.5"),
        ([1.0], [0.5], math.nan, r"fpr: must be in \(0, 1\]: nan"),
    ],
)
def test_bad_input_is_named(
    positive: list[float], negative: list[float], fpr: float, text: str
) -> None:
    with pytest.raises(InputError, match=text):
        tpr_at_fpr(positive, negative, fpr)


@pytest.mark.parametrize(("counts", "level"), [((3, 2), 0.95), ((0, 0), 0.95), ((1, 2), 1.0)])
def test_no_interval_of_no_proportion(counts: tuple[int, int], level: float) -> None:
    with pytest.raises(ValueError, match=r"successes=|level="):
        interval(*counts, level)
