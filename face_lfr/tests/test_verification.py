"""Ten-fold accuracy and VAL@FAR: the rules pair by pair, ties, and input that has no answer."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
from scipy.interpolate import BSpline
from sklearn.model_selection import KFold
from sklearn.preprocessing import normalize

from common.log import InputError
from face_lfr.verification import pair_distances, unit_rows, verify, verify_distances


class Scores(NamedTuple):
    accuracy: float
    std: float
    val: float
    val_std: float
    far: float
    thresholds: list[float]


def counts(distance: np.ndarray, same: np.ndarray, threshold: float) -> tuple[int, int, int, int]:
    """True accepts, false accepts, same pairs, different pairs, one pair at a time."""
    found = [0, 0, 0, 0]
    for value, truth in zip(distance, same, strict=True):
        found[2 if truth else 3] += 1
        if value < threshold:
            found[0 if truth else 1] += 1
    return found[0], found[1], found[2], found[3]


def right(distance: np.ndarray, same: np.ndarray, threshold: float) -> float:
    accepted, wrong, _, different = counts(distance, same, threshold)
    return (accepted + different - wrong) / len(distance)


def val_far(distance: np.ndarray, same: np.ndarray, threshold: float) -> tuple[float, float]:
    accepted, wrong, alike, different = counts(distance, same, threshold)
    return accepted / alike, wrong / different


def literal(feature_ND: np.ndarray, same: np.ndarray, target: float, step: float = 0.001) -> Scores:
    """The rules with every loop spelled out: folds of scikit-learn, splines of scipy."""
    distance = np.array(
        [np.square(a - b).sum() for a, b in zip(feature_ND[::2], feature_ND[1::2], strict=True)]
    )
    accuracy, chosen, vals, fars = [], [], [], []
    fine = np.arange(0, 4, step)
    for train, test in KFold(10, shuffle=False).split(distance):
        best, best_at = -1.0, 0.0
        for threshold in np.arange(0, 4, 0.01):
            now = right(distance[train], same[train], threshold)
            if now > best:
                best, best_at = now, threshold
        accuracy.append(right(distance[test], same[test], best_at))
        chosen.append(best_at)
        # the rate over the fine thresholds one by one, by sorting to save an hour
        impostor = np.sort(distance[train][~same[train]])
        rate = [np.searchsorted(impostor, at, side="left") / len(impostor) for at in fine]
        # the spline of degree 1 that interp1d(kind="slinear") of scipy is made of
        line = BSpline(np.r_[rate[0], rate, rate[-1]], fine, 1)
        at = float(line(target)) if max(rate) >= target else 0.0
        val, far = val_far(distance[test], same[test], at)
        vals.append(val)
        fars.append(far)
    spread = float(np.std(accuracy)), float(np.std(vals))
    return Scores(
        float(np.mean(accuracy)), spread[0], float(np.mean(vals)), spread[1],
        float(np.mean(fars)), chosen,
    )  # fmt: skip


def features(seed: int, pairs: int = 120, noise: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
    """Features of unit length, half of the pairs of one person, in random order."""
    rng = np.random.default_rng(seed)
    same = rng.permutation(np.arange(pairs) % 2 == 0)
    first = rng.standard_normal((pairs, 16))
    second = np.where(same[:, None], first, rng.standard_normal((pairs, 16)))
    rows = np.stack([first, second], axis=1).reshape(2 * pairs, 16)
    return normalize(rows + noise * rng.standard_normal(rows.shape)), same


@pytest.mark.parametrize("seed", range(5))
def test_check_10_equals_the_rules_spelled_out(seed: int) -> None:
    feature, same = features(seed)
    want = literal(feature, same, 0.05)
    got = verify(feature, same, far=0.05)
    assert got.accuracy == pytest.approx(want.accuracy, abs=1e-12)
    assert got.accuracy_std == pytest.approx(want.std, abs=1e-12)
    assert got.val == pytest.approx(want.val, abs=1e-12)
    assert got.val_std == pytest.approx(want.val_std, abs=1e-12)
    assert got.far == pytest.approx(want.far, abs=1e-12)
    np.testing.assert_allclose(got.threshold, want.thresholds, atol=1e-12)
    assert 0.6 < got.accuracy < 1.0  # neither chance nor perfect, or the test says little
    assert 0.0 < got.val < 1.0


@pytest.mark.parametrize("seed", range(3))
def test_check_10_at_the_usual_far_and_uneven_folds(seed: int) -> None:
    feature, same = features(seed, pairs=127)
    got, want = verify(feature, same), literal(feature, same, 1e-3)
    assert got.far_target == 1e-3
    assert [got.accuracy, got.val, got.val_std, got.far] == pytest.approx(
        [want.accuracy, want.val, want.val_std, want.far], abs=1e-12
    )


def test_check_10_a_tie_takes_the_first_threshold() -> None:
    # All thresholds above 0.5 and up to 1.5 are perfect: 0.51 is the first of them.
    same = np.arange(20) % 2 == 0
    got = verify_distances(np.where(same, 0.5, 1.5), same)
    np.testing.assert_array_equal(got.threshold, np.arange(0, 4, 0.01)[51])
    assert got.accuracy == 1.0
    assert got.accuracy_std == 0.0


def test_below_the_threshold_is_strict() -> None:
    grid = np.arange(0, 4, 0.01)
    same = np.arange(20) % 2 == 0
    got = verify_distances(np.where(same, grid[50], grid[51]), same)
    assert got.accuracy == 1.0  # 0.50 is not below 0.50, and below 0.51
    np.testing.assert_array_equal(got.threshold, grid[51])
    assert verify_distances(np.full(20, grid[50]), same).accuracy == 0.5


def test_a_far_that_is_never_reached_accepts_nothing() -> None:
    same = np.arange(40) % 2 == 0
    got = verify_distances(np.where(same, 0.1, 3.9995), same)
    assert (got.val, got.far) == (0.0, 0.0)
    np.testing.assert_array_equal(got.val_threshold, 0.0)
    assert got.accuracy == 1.0


def test_the_threshold_of_val_is_interpolated() -> None:
    # Ten folds of one same pair at 0.1 and two different ones; all different pairs of a fold but
    # its last lie at 1: between 1.000 and 1.001 the rate jumps from 0 to 1/2.
    distance = np.tile([0.1, 1.0, 2.0], 10)
    same = np.tile([True, False, False], 10)
    got = verify_distances(distance, same, far=0.125)
    np.testing.assert_allclose(got.val_threshold, 1.00025, atol=1e-12)
    assert (got.val, got.far) == (1.0, 0.5)
    # A rate that is met on a whole stretch stands for its far end.
    got = verify_distances(distance, same, far=0.5)
    np.testing.assert_allclose(got.val_threshold, 2.0, atol=1e-12)
    rate = (np.arange(0, 4, 0.001) > 1.0) / 2 + (np.arange(0, 4, 0.001) > 2.0) / 2
    line = BSpline(np.r_[rate[0], rate, rate[-1]], np.arange(0, 4, 0.001), 1)
    np.testing.assert_allclose(got.val_threshold, line(0.5), atol=1e-12)


def test_the_curve_is_the_mean_of_the_folds() -> None:
    feature, same = features(7, pairs=53)
    distance = pair_distances(feature)
    got = verify_distances(distance, same)
    for at in (0, 117, 190, 399):
        rates = []
        for _, test in KFold(10).split(distance):
            a, b, alike, different = counts(distance[test], same[test], got.thresholds[at])
            rates.append((a / alike if alike else 0.0, b / different if different else 0.0))
        assert (got.tpr[at], got.fpr[at]) == pytest.approx(tuple(np.mean(rates, axis=0)), abs=1e-12)


def test_ten_pairs_are_enough_and_folds_without_a_kind_are_left_out() -> None:
    same = np.arange(10) < 5
    got = verify_distances(np.where(same, 0.5, 1.5), same)
    # the other folds reach the rate just above 1.5, where a different pair is accepted too
    assert (got.accuracy, got.val, got.far) == (1.0, 1.0, 1.0)
    assert np.isnan(got.fold_val).tolist() == (~same).tolist()


def test_length_of_the_features_does_not_matter() -> None:
    feature, same = features(3)
    scale = np.random.default_rng(0).uniform(0.1, 50, (len(feature), 1))
    assert verify(scale * feature, same).metrics() == pytest.approx(
        verify(feature, same).metrics(), abs=1e-12
    )
    assert unit_rows(np.array([[3.0, 4.0]])).tolist() == [[0.6, 0.8]]


def test_metrics_are_plain_numbers() -> None:
    found = verify(*features(0)).metrics()
    assert (found["pairs"], found["same"]) == (120.0, 60.0)
    assert {type(value) for value in found.values()} == {float}


def refused(feature: np.ndarray, same: Sequence[bool] | np.ndarray, complaint: str) -> None:
    with pytest.raises(InputError) as error:
        verify(feature, same, where="lfw")
    assert str(error.value) == complaint


def test_input_without_an_answer() -> None:
    feature, same = features(0, pairs=12)
    refused(feature[:18], same[:9], "lfw: fewer pairs than the 10 folds: 9")
    refused(feature[:23], same, "lfw: odd number of rows, which are no pairs: 23")
    refused(feature, same[:11], "lfw: needs one truth value for each of 12 pairs, shape: (11,)")
    kind = "lfw: there is nothing to tell apart, every pair shows"
    refused(feature, np.ones(12, bool), f"{kind}: one person")
    refused(feature, np.zeros(12, bool), f"{kind}: two persons")
    refused(feature, np.arange(12), "lfw: truth values are neither 0 nor 1: [0 1 2 3 4]")
    refused(feature.astype(int), same, "lfw: must be rows of floats, (N, D): int64 (24, 16)")
    broken = feature.copy()
    broken[5, 3] = np.nan
    broken[7] = np.inf
    refused(broken, same, "lfw: not finite in 2 rows, first row: 5")
    broken = feature.copy()
    broken[4] = 0
    refused(broken, same, "lfw: 1 rows are all 0, first row: 4")
    with pytest.raises(InputError, match="distances: 1 pairs are not finite, first pair: 3"):
        verify_distances([0.1, 0.1, 0.1, np.nan, *[1.0] * 8], same)


@pytest.mark.parametrize("named", [{"folds": 1}, {"far": 0.0}, {"far": 1.0}])
def test_bad_arguments(named: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be at least 2, far="):
        verify(*features(0), **named)  # type: ignore[arg-type]
