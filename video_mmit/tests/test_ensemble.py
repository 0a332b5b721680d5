"""Fusing, tuning and the cross-fitted figure of score files."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from common.log import InputError
from video_mmit import ensemble
from video_mmit.ensemble import (
    Ensemble,
    combine,
    cross_fit,
    fuse,
    to_domain,
    top_1,
    tune,
)
from video_mmit.metrics import mmit_map
from video_mmit.score_file import ScoreFile


def problem(
    noises: tuple[float, ...] = (1.0, 1.5, 3.0), videos: int = 200, classes: int = 12, seed: int = 0
) -> tuple[list[NDArray[np.float64]], NDArray[np.bool_], list[str]]:
    """Members that see the labels through noise of their own; ids in no particular order."""
    rng = np.random.default_rng(seed)
    target = rng.random((videos, classes)) < 0.15
    target[np.arange(videos), rng.integers(0, classes, videos)] = True
    scores = [2 * target + noise * rng.standard_normal(target.shape) for noise in noises]
    return scores, target, [f"{number:04d}.mp4" for number in rng.permutation(videos)]


def sigmoid(x: NDArray) -> NDArray:
    return 1 / (1 + np.exp(-x))


def softmax(x: NDArray) -> NDArray:
    power = np.exp(x)
    return power / power.sum(axis=1, keepdims=True)


def loop_rank(score: NDArray) -> NDArray:
    beaten = [[sum(s > row) + (sum(s == row) - 1) / 2 for s in row] for row in score]
    return np.array(beaten) / (score.shape[1] - 1)


def test_domains_are_averaged_as_named() -> None:
    scores, _, _ = problem(videos=9)
    weights = [1.0, 2.0, 1.0]
    share = np.array(weights) / 4
    maps = {
        ("logit", True): lambda x: x, ("logit", False): lambda x: x,
        ("prob", True): sigmoid, ("prob", False): softmax,
        ("rank", True): loop_rank, ("rank", False): loop_rank,
    }  # fmt: skip
    for (domain, multi_label), change in maps.items():
        expected = sum(w * change(s) for w, s in zip(share, scores, strict=True))
        found = fuse(scores, weights, domain, multi_label)
        np.testing.assert_allclose(found, expected, atol=1e-14, err_msg=f"{domain} {multi_label}")
        np.testing.assert_allclose(
            fuse(scores, None, domain, multi_label), sum(map(change, scores)) / 3, atol=1e-14
        )


def test_probabilities_are_not_turned_into_probabilities_again() -> None:
    scores, _, _ = problem(videos=9)
    kinds = ["logit", "prob", "logit"]
    for multi_label, change in ((True, sigmoid), (False, softmax)):
        mixed = [scores[0], change(scores[1]), scores[2]]
        for domain in ("prob", "rank", "logit"):
            found = fuse(mixed, None, domain, multi_label, kinds)
            expected = fuse(scores, None, domain, multi_label)
            if domain == "logit" and not multi_label:  # a softmax forgets what a row adds to all
                assert np.ptp(found - expected, axis=1).max() < 1e-9
            else:
                np.testing.assert_allclose(found, expected, atol=1e-9)


def test_certain_probabilities_have_a_clipped_logit() -> None:
    p = np.array([[0.0, 1.0, 0.5]])
    both = to_domain(p, "prob", "logit", multi_label=True)
    np.testing.assert_allclose(both, [[-16.118, 16.118, 0]], atol=1e-3)
    one = to_domain(p, "prob", "logit", multi_label=False)
    np.testing.assert_allclose(one, np.log([[1e-7, 1 - 1e-7, 0.5]]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extreme = to_domain(np.array([[-1e4, 1e4]]), "logit", "prob", multi_label=True)
    assert extreme.tolist() == [[0, 1]]
    assert to_domain(np.array([[-1e4, 1e4]]), "logit", "prob", multi_label=False).tolist() == [
        [0, 1]
    ]


def test_ranks_count_ties_by_half() -> None:
    rng = np.random.default_rng(0)
    for score in (rng.standard_normal((7, 9)), rng.integers(0, 3, (50, 9)), np.zeros((2, 5))):
        np.testing.assert_allclose(to_domain(score, domain="rank"), loop_rank(score), atol=1e-15)
    assert to_domain(np.ones((3, 1)), domain="rank").tolist() == [[0], [0], [0]]


def test_equal_entries_stay_equal() -> None:
    """Ties of all members must be ties of the ensemble, wherever they lie in the table."""
    rng = np.random.default_rng(0)
    column = rng.standard_normal((5, 40, 1))
    fused = fuse(list(np.repeat(column, 313, axis=2)), rng.random(5).tolist())
    assert (fused == fused[:, :1]).all()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, 2.0], r"^ensemble\.weights: needs one number for each of 3: \[1\.0, 2\.0\]"),
        ([1.0, -1.0, 1.0], "must not be negative, nor all 0"),
        ([0.0, 0.0, 0.0], "must not be negative, nor all 0"),
        ([1.0, np.nan, 1.0], "must not be negative"),
        ([1.0, np.inf, 1.0], "must not be negative"),
    ],
)
def test_wrong_weights_are_refused(weights: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fuse(problem()[0], weights)


def test_members_that_do_not_fit_are_refused() -> None:
    scores, _, _ = problem()
    for wrong in ([scores[0], scores[1][:, :5]], [scores[0], scores[1][:5]], [], [scores[0][0]]):
        with pytest.raises(InputError, match=r"^ensemble\.members: need scores of one shape"):
            fuse(wrong)
    with pytest.raises(InputError, match=r"^ensemble\.domain: must be one of logit, prob, rank: x"):
        fuse(scores, domain="x")
    with pytest.raises(InputError, match="a member holds ranks, of which there are no probs"):
        fuse(scores, domain="prob", kinds=["logit", "rank", "logit"])
    with pytest.raises(ValueError, match="2 kinds for 3 members"):
        fuse(scores, kinds=["logit", "prob"])


@pytest.mark.parametrize("measure", [mmit_map, top_1])
def test_tuning_finds_the_best_point_of_a_coarse_grid(measure) -> None:
    scores, target, _ = problem((0.8, 1.0, 5.0), videos=300)
    if measure is top_1:
        target = np.eye(12, dtype=bool)[target.argmax(axis=1)]
    weights, value = tune(scores, target, measure, step=0.25)
    grid = [p for p in itertools.product(range(5), repeat=3) if sum(p) == 4]
    every = {p: measure(fuse(scores, p), target) for p in grid}
    equal = measure(fuse(scores), target)
    assert value == max(*every.values(), equal)
    assert value == measure(fuse(scores, weights.tolist()), target)
    assert weights.sum() == pytest.approx(1)


def test_tuning_is_never_worse_than_its_starts() -> None:
    rng = np.random.default_rng(1)
    for seed in range(6):
        scores, target, _ = problem(tuple(rng.uniform(0.5, 4, 4)), 40, 8, seed)
        weights, value = tune(scores, target, mmit_map)
        starts = [fuse(scores), *scores]
        assert value >= max(mmit_map(start, target) for start in starts)
        assert value == mmit_map(fuse(scores, weights.tolist()), target)
        in_steps = weights / 0.05
        equal = np.allclose(weights, 0.25)
        assert equal or np.allclose(in_steps, in_steps.round())
    same = [scores[0]] * 3
    weights, _ = tune(same, target, mmit_map)
    np.testing.assert_array_equal(weights, np.full(3, 1 / 3))  # equal ones at a tie
    assert tune([scores[0]], target, mmit_map)[0].tolist() == [1]


@pytest.mark.parametrize("step", [0.0, -0.1, 0.3, 2.0])
def test_a_step_that_does_not_divide_one_is_refused(step: float) -> None:
    scores, target, _ = problem()
    with pytest.raises(ValueError, match=r"step=.*need 1/n"):
        tune(scores, target, mmit_map, step)


def test_the_cross_fitted_figure_uses_weights_of_the_other_half(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scores, target, ids = problem(videos=21)
    seen: list[tuple[set[int], set[int]]] = []
    number = {row.tobytes(): i for i, row in enumerate(scores[0])}

    def spy(members: list[NDArray], labels: NDArray, measure, step: float):
        rows = {number[row.tobytes()] for row in members[0]}
        np.testing.assert_array_equal(labels, target[[number[r.tobytes()] for r in members[0]]])

        def judge(fused: NDArray, labels: NDArray) -> float:
            seen.append((rows, {number[row.tobytes()] for row in fused}))
            return float(len(fused))

        judges.append(judge)
        return np.array([1.0, 0.0, 0.0]), 0.0

    judges: list = []
    monkeypatch.setattr(ensemble, "tune", spy)
    value = cross_fit(scores, target, lambda s, t: judges[-1](s, t), ids)
    assert value == (11 * 11 + 10 * 10) / 21
    (first, other), (second, rest) = seen
    assert (first, second) == (rest, other)
    assert not first & second
    assert first | second == set(range(21))


def test_the_cross_fitted_figure_does_not_depend_on_the_order_of_rows() -> None:
    scores, target, ids = problem(videos=61)
    order = np.random.default_rng(5).permutation(61)
    base = cross_fit(scores, target, mmit_map, ids)
    moved = [score[order] for score in scores]
    assert cross_fit(moved, target[order], mmit_map, [ids[i] for i in order]) == base
    assert cross_fit(scores, target, mmit_map, ids, seed=1) != base
    assert cross_fit(scores, target, mmit_map, ids, folds=5) > 0
    with pytest.raises(ValueError, match="folds=1"):
        cross_fit(scores, target, mmit_map, ids, folds=1)
    with pytest.raises(ValueError, match="60 ids for 61 rows"):
        cross_fit(scores, target, mmit_map, ids[:60])
    with pytest.raises(InputError, match=r"ensemble\.tune: needs 2 videos or more; here: 1"):
        cross_fit([s[:1] for s in scores], target[:1], mmit_map, ids[:1])


def test_weights_tuned_on_noise_look_better_than_they_are() -> None:
    """Twelve members that know nothing: the tuned value flatters, the cross-fitted does not."""
    gaps = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        target = np.eye(5, dtype=bool)[rng.integers(0, 5, 40)]
        scores = list(rng.standard_normal((6, 40, 5)))
        ids = [str(i) for i in range(40)]
        _, value = tune(scores, target, mmit_map, step=0.1)
        gaps.append(value - cross_fit(scores, target, mmit_map, ids, step=0.1))
    assert min(gaps) > 0.02


def files(scores: list[NDArray], ids: list[str], *kinds: str) -> list[ScoreFile]:
    """Every member in an order of its own."""
    orders = [np.random.default_rng(i).permutation(len(ids)) for i in range(len(scores))]
    names = kinds or ("logit",) * len(scores)
    return [
        ScoreFile(np.array(ids)[order], score[order], kind)
        for score, order, kind in zip(scores, orders, names, strict=True)
    ]


def test_independent_members_beat_the_best_of_them() -> None:
    scores, target, ids = problem((1.0, 1.0, 1.2, 1.2))
    best = max(mmit_map(score, target) for score in scores)
    for domain in ensemble.DOMAINS:
        fused, facts = combine(files(scores, ids), ids, target, True, Ensemble(domain))
        assert facts == {"domain": domain, "tuned": False, "weights": [0.25] * 4}
        assert fused.kind == domain
        assert fused.ids.tolist() == ids
        assert mmit_map(fused.rows(ids), target) > best + 0.05


@pytest.mark.parametrize("domain", ensemble.DOMAINS)
def test_combined_scores_can_be_saved_and_combined_again(tmp_path: Path, domain: str) -> None:
    scores, target, ids = problem(videos=30)
    scores[0][:, 0] = 50.0  # a probability of 1 in every member
    scores[1][:, 0] = scores[2][:, 0] = 50.0
    weights = [9.0, 18.0, 1.0]  # their shares sum up to a little more than 1
    fused, facts = combine(files(scores, ids), ids, target, True, Ensemble(domain, weights))
    assert facts["weights"] == pytest.approx([9 / 28, 18 / 28, 1 / 28])
    assert sum(facts["weights"]) > 1
    fused.save(tmp_path / "e.npz")
    again = ScoreFile.load(tmp_path / "e.npz")
    twice, _ = combine([again], ids, target, True, Ensemble(domain))
    np.testing.assert_array_equal(twice.scores, again.scores if domain != "rank" else twice.scores)
    assert mmit_map(twice.scores, target) == mmit_map(fused.scores, target)


def test_tuned_combination_states_both_figures() -> None:
    scores, target, ids = problem()
    how = Ensemble(tune=True, step=0.1, seed=3)
    fused, facts = combine(files(scores, ids), ids, target, True, how)
    assert list(facts) == ["domain", "tuned", "tuned_value", "cross_fitted", "weights"]
    assert facts["tuned_value"] == mmit_map(fused.rows(ids), target)
    assert facts["cross_fitted"] == cross_fit(scores, target, mmit_map, ids, seed=3, step=0.1)
    with pytest.raises(InputError, match=r"^ensemble\.weights: are given and to be tuned as well"):
        combine(files(scores, ids), ids, target, True, Ensemble(weights=[1, 1, 1], tune=True))


def test_single_label_sets_are_tuned_on_accuracy() -> None:
    scores, target, ids = problem()
    target = np.eye(12, dtype=bool)[target.argmax(axis=1)]
    _, facts = combine(files(scores, ids), ids, target, False, Ensemble("prob", tune=True))
    assert facts["tuned_value"] == top_1(fuse(scores, facts["weights"], "prob", False), target)


def test_videos_without_a_label_have_no_part_in_tuning() -> None:
    scores, target, ids = problem(videos=40)
    target[5:9] = False
    kept = target.any(axis=1)
    how = Ensemble(tune=True, step=0.25)
    fused, facts = combine(files(scores, ids), ids, target, True, how)
    names = [name for name, keep in zip(ids, kept, strict=True) if keep]
    part = [score[kept] for score in scores]
    _, expected = combine(files(part, names), names, target[kept], True, how)
    assert facts == expected
    assert len(fused.scores) == 40
    with pytest.raises(InputError, match=r"ensemble\.tune: needs two videos with a label; here: 0"):
        combine(files(scores, ids), ids, np.zeros_like(target), True, how)


def test_a_member_of_other_videos_is_refused() -> None:
    scores, target, ids = problem(videos=10)
    members = files(scores, ids)
    with pytest.raises(InputError, match="has no scores for 1 of 11 videos"):
        combine(members, [*ids, "new"], np.ones((11, 12)), True, Ensemble())
    with pytest.raises(InputError, match="name at least one score file"):
        combine([], ids, target, True, Ensemble())
