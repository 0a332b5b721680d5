"""Every measure equals scikit-learn's and a loop, with ties, and refuses what has no answer."""

from __future__ import annotations

import math
import tracemalloc
import warnings

import numpy as np
import pytest
from numpy.typing import NDArray

from common.log import InputError
from video_mmit import metrics
from video_mmit.metrics import (
    class_ap,
    evaluate_scores,
    hit_at_k,
    macro_map,
    mean_class_accuracy,
    micro_map,
    mmit_map,
    terciles,
    top_k,
    video_ap,
)


def problem(
    seed: int, videos: int, classes: int, levels: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Random scores, of `levels` different values if that is not 0; a positive in every row."""
    rng = np.random.default_rng(seed)
    score = rng.standard_normal((videos, classes))
    if levels:
        score = rng.integers(0, levels, (videos, classes)) / 3
    target = rng.random((videos, classes)) < rng.uniform(0.05, 0.9, (videos, 1))
    target[np.arange(videos), rng.integers(0, classes, videos)] = True
    return score, target


def loop_ap(score: NDArray, target: NDArray) -> float:
    """The definition, entry by entry."""
    terms = [
        sum(t and s >= own for s, t in zip(score, target, strict=True)) / sum(score >= own)
        for own, positive in zip(score, target, strict=True)
        if positive
    ]
    return sum(terms) / len(terms)


def rows_of(count: int) -> list[tuple[NDArray, NDArray]]:
    """Blocks of rows of different lengths, half of them full of ties."""
    sizes = (1, 2, 5, 18, 64)
    per = count // (2 * len(sizes))
    return [problem(k, per, k, levels) for k in sizes for levels in (0, 4)]


def test_check_07_rows_equal_scikit_learn() -> None:
    from sklearn.metrics import average_precision_score, label_ranking_average_precision_score

    seen = 0
    for score, target in rows_of(1000):
        ours = video_ap(score, target)
        pairs = list(zip(target, score, strict=True))
        theirs = [average_precision_score(t, s) for t, s in pairs]
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)
        np.testing.assert_allclose(ours, [loop_ap(s, t) for t, s in pairs], rtol=0, atol=1e-12)
        # LRAP counts a row whose classes are all positive as 1, as we do; it wants two columns
        if score.shape[1] > 1:
            whole = label_ranking_average_precision_score(target, score)
            assert mmit_map(score, target) == pytest.approx(whole, abs=1e-12)
        seen += len(score)
    assert seen == 1000


def test_check_07_macro_and_micro_equal_scikit_learn() -> None:
    from sklearn.metrics import average_precision_score

    for seed in range(300):
        rng = np.random.default_rng([1, seed])
        videos, classes = int(rng.integers(2, 40)), int(rng.integers(2, 12))
        score, target = problem(seed, videos, classes, levels=seed % 3 * 3)
        target[:, rng.random(classes) < 0.2] = False  # classes without a positive
        target[0, -1] = True
        known = target.any(axis=0)
        each = [average_precision_score(target[:, k], score[:, k]) for k in np.flatnonzero(known)]
        ours = class_ap(score, target)
        assert np.isnan(ours[~known]).all()
        np.testing.assert_allclose(ours[known], each, rtol=0, atol=1e-12)
        assert macro_map(score, target) == pytest.approx(np.mean(each), abs=1e-12)
        for average, value in (("macro", macro_map), ("micro", micro_map)):
            theirs = average_precision_score(target[:, known], score[:, known], average=average)
            kept = value(score[:, known], target[:, known])
            assert kept == pytest.approx(theirs, abs=1e-12)


def test_check_07_fixture_with_a_tie() -> None:
    score, target = np.array([[3, 2, 2, 1]]), np.array([[0, 1, 0, 1]])
    assert mmit_map(score, target) == pytest.approx((1 / 3 + 2 / 4) / 2)
    assert mmit_map(score, target) == pytest.approx(0.416667, abs=1e-6)


@pytest.mark.parametrize("positives", [1, 3, 7])
def test_check_07_a_tied_row_gives_the_share_of_positives(positives: int) -> None:
    target = np.arange(7)[None] < positives
    assert mmit_map(np.full((1, 7), -2.5), target) == positives / 7
    assert micro_map(np.zeros((1, 7)), target) == positives / 7
    assert class_ap(np.zeros((7, 1)), target.T).tolist() == [positives / 7]


@pytest.mark.parametrize("levels", [0, 4])
def test_check_07_order_and_scale_have_no_influence(levels: int) -> None:
    score, target = problem(3, 60, 20, levels)
    rng = np.random.default_rng(0)
    rows, columns = rng.permutation(60), rng.permutation(20)
    counts = rng.permutation(20)
    base = evaluate_scores(score, target, True, counts)
    moved = evaluate_scores(score[rows], target[rows], True, counts)
    assert moved == base  # to the last bit
    swapped = evaluate_scores(score[:, columns], target[:, columns], True, counts[columns])
    names = set(base) if not levels else {name for name in base if "hit" not in name}
    for name in names:
        assert swapped[name] == pytest.approx(base[name], abs=1e-14), name
    for stretched in (3 * score - 7, np.exp(score), np.arctan(score)):
        assert evaluate_scores(stretched, target, True, counts) == base
    per_row = score * rng.uniform(0.5, 2, (60, 1)) + rng.standard_normal((60, 1))
    assert mmit_map(per_row, target) == mmit_map(score, target)


def test_check_07_rows_without_a_label_are_refused_or_counted() -> None:
    score, target = problem(0, 6, 4)
    target[[2, 5]] = False
    ids = [f"v/{i}.mp4" for i in range(6)]
    with pytest.raises(InputError, match=r"^v/2\.mp4: has no label \(2 such videos\)"):
        mmit_map(score, target, ids=ids)
    with pytest.raises(InputError, match=r"^row 2: has no label"):
        evaluate_scores(score, target, True)
    kept = target.any(axis=1)
    assert mmit_map(score, target, ignore_empty=True) == mmit_map(score[kept], target[kept])
    found = evaluate_scores(score, target, True, ids=ids, ignore_empty=True)
    assert found == evaluate_scores(score[kept], target[kept], True) | {"ignored_empty": 2}
    assert found["videos"] == 4
    assert evaluate_scores(score[kept], target[kept], True, ignore_empty=True)["ignored_empty"] == 0
    assert np.isnan(video_ap(score, target)).tolist() == (~kept).tolist()
    for call in (mmit_map, lambda s, t, **o: evaluate_scores(s, t, True, **o)):
        with pytest.raises(InputError, match="no video has a label; videos: 6"):
            call(score, np.zeros_like(target), ignore_empty=True)
    for call in (macro_map, micro_map):
        with pytest.raises(InputError, match="nothing is positive"):
            call(score, np.zeros_like(target))


def loop_first(score: NDArray, k: int) -> list[int]:
    return sorted(range(len(score)), key=lambda j: (-score[j], j))[:k]


@pytest.mark.parametrize("levels", [0, 3])
@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_hits_break_ties_by_the_lower_class(levels: int, k: int) -> None:
    score, target = problem(k, 200, 9, levels)
    hits = [any(t[j] for j in loop_first(s, k)) for s, t in zip(score, target, strict=True)]
    assert hit_at_k(score, target, k) == sum(hits) / 200
    label = np.random.default_rng(k).integers(0, 9, 200)
    hits = [y in loop_first(s, k) for s, y in zip(score, label, strict=True)]
    assert top_k(score, np.eye(9)[label], k) == sum(hits) / 200


def test_hits_of_few_classes_and_of_infinite_scores() -> None:
    score = np.array([[-np.inf, 1.0, -np.inf], [np.inf, np.inf, 0.0]])
    assert hit_at_k(score, np.array([[0, 0, 1], [0, 1, 0]]), 2) == 0.5
    assert hit_at_k(score, np.array([[1, 0, 0], [0, 1, 0]]), 2) == 1
    assert hit_at_k(score, np.array([[1, 0, 0], [0, 0, 1]]), 99) == 1
    assert mmit_map(score, np.array([[0, 0, 1], [0, 1, 0]])) == pytest.approx((1 / 3 + 1 / 2) / 2)
    with pytest.raises(ValueError, match="k=0"):
        hit_at_k(score, score > 0, 0)


def test_single_label_measures() -> None:
    score = np.array([[2, 1, 0], [0, 0, 0], [0, 3, 1], [1, 2, 0], [0, 1, 2]])
    label = np.array([0, 1, 1, 0, 2])
    target = np.eye(3)[label]
    found = evaluate_scores(score, target, False)
    assert found == {
        "top1": 3 / 5, "top5": 1.0, "mean_class_accuracy": (1 / 2 + 1 / 2 + 1) / 3, "videos": 5,
    }  # fmt: skip
    assert mean_class_accuracy(score[:3], target[:3]) == (1 + 1 / 2) / 2  # class 2 has no video
    target[3] = [1, 1, 0]
    with pytest.raises(InputError, match=r"^d: 1 videos have not exactly one label.*: 2$"):
        evaluate_scores(score, target, False, ids=list("abcde"))
    for call in (lambda: top_k(score, target, 1), lambda: mean_class_accuracy(score, target)):
        with pytest.raises(InputError, match=r"^row 3: "):
            call()
    target[3] = 0
    with pytest.raises(InputError, match=r"^d: has no label"):
        evaluate_scores(score, target, False, ids=list("abcde"))
    assert evaluate_scores(score, target, False, ignore_empty=True)["videos"] == 4


def test_multi_label_keys() -> None:
    score, target = problem(1, 50, 9)
    target[:, 4] = False
    counts = np.array([9, 8, 7, 6, 5, 4, 3, 2, 1])
    found = evaluate_scores(score, target, True, counts)
    assert list(found) == [
        "mmit_mAP", "macro_mAP", "micro_mAP", "hit@1", "hit@5", "classes_without_positive",
        "head_mAP", "mid_mAP", "tail_mAP", "videos",
    ]  # fmt: skip
    each = class_ap(score, target)
    assert found["head_mAP"] == pytest.approx(each[:3].mean())
    assert found["mid_mAP"] == pytest.approx(each[[3, 5]].mean())
    assert found["macro_mAP"] == pytest.approx(np.nanmean(each))
    assert found["mmit_mAP"] == mmit_map(score, target)
    assert (found["hit@5"], found["classes_without_positive"]) == (hit_at_k(score, target, 5), 1)
    target[:, 6:] = False
    target[:, 0] = True
    assert "tail_mAP" not in evaluate_scores(score, target, True, counts)


def test_terciles_go_by_training_frequency() -> None:
    ap = np.array([0.1, 0.2, 0.3, 0.4, np.nan, 0.6, 0.7])
    counts = np.array([5, 100, 5, 5, 40, 80, 1])
    # by count: 1, 5, 4 | 0, 2 | 3, 6
    found = terciles(ap, counts)
    assert found == {
        "head": pytest.approx(0.4), "mid": pytest.approx(0.2), "tail": pytest.approx(0.55),
    }  # fmt: skip
    assert math.isnan(terciles(ap[:2], counts[:2])["tail"])
    with pytest.raises(ValueError, match=r"counts_K has shape \(6,\), need \(7,\)"):
        terciles(ap, counts[:6])


@pytest.mark.parametrize(
    "kind", [np.float16, np.float32, np.float64, np.int32, np.uint8], ids=lambda kind: kind.__name__
)
def test_every_number_type_gives_the_same(kind: type) -> None:
    score, target = problem(4, 40, 12, levels=6)
    score = score * 3
    expected = evaluate_scores(score, target, True)
    for labels in (target, target.astype(np.float32), target.astype(np.int8)):
        assert evaluate_scores(score.astype(kind), labels, True) == expected
    fortran = np.asfortranarray(score.astype(kind))
    assert evaluate_scores(fortran[::1], target, True) == expected


@pytest.mark.parametrize("block", [1, 7, 100])
def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    score, target = problem(5, 33, 11, levels=5)
    target[4] = False
    score[7, 3] = -np.inf
    expected = evaluate_scores(score, target, True, ignore_empty=True)
    label = np.eye(11)[np.arange(33) % 11]
    single = evaluate_scores(score, label, False)
    monkeypatch.setattr(metrics, "BLOCK", block)
    assert evaluate_scores(score, target, True, ignore_empty=True) == expected
    assert evaluate_scores(score, label, False) == single
    score[32, 0] = np.nan
    with pytest.raises(InputError, match=r"^row 32: a score is not a number"):
        mmit_map(score, target)


def test_memory_does_not_grow_with_the_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the block size, so that a hundredth of the size of a real set shows it."""
    monkeypatch.setattr(metrics, "BLOCK", metrics.BLOCK // 64)
    rng = np.random.default_rng(0)
    peaks = []
    for videos in (4000, 16000):
        score = rng.standard_normal((videos, 64), dtype=np.float32)
        target = np.zeros((videos, 64), dtype=bool)
        target[np.arange(videos), rng.integers(0, 64, videos)] = True
        tracemalloc.start()
        evaluate_scores(score, target, True)
        peaks.append(tracemalloc.get_traced_memory()[1] / 2**20)
        tracemalloc.stop()
    # a few numbers a video or a positive are kept, no table of videos by classes (3.9 MiB more)
    assert peaks[1] - peaks[0] < 1.5
    assert peaks[1] < 6


def test_nothing_warns() -> None:
    score, target = problem(2, 9, 4)
    target[:, 1] = False
    target[0] = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate_scores(score, target, True, np.array([1, 2, 3, 4]), ignore_empty=True)


@pytest.mark.parametrize(
    ("score", "target", "message"),
    [
        (np.ones(3), np.ones(3), r"^scores: must be numbers.*float64 \(3,\)"),
        (np.ones((0, 3)), np.ones((0, 3)), r"^scores: .*\(0, 3\)"),
        (np.ones((2, 0)), np.ones((2, 0)), r"^scores: .*\(2, 0\)"),
        (np.array([["a", "b"]]), np.ones((1, 2)), "^scores: must be numbers.*<U1"),
        (np.ones((1, 2), object), np.ones((1, 2)), "^scores: must be numbers.*object"),
        (np.ones((2, 3)), np.ones((2, 2)), r"^target: must be 0 and 1.*\(2, 3\).*\(2, 2\)"),
        (np.ones((1, 2)), np.array([["0", "1"]]), "^target: .*<U1"),
        (np.ones((2, 2)), np.array([[1, 0], [1, 2]]), "^row 1: a target is neither 0 nor 1: 2"),
        (np.ones((1, 2)), np.array([[np.nan, 1]]), "^row 0: a target is neither"),
        (np.array([[1.0, 2.0], [np.nan, 0.0]]), np.eye(2), "^row 1: a score is not a number"),
    ],
)
def test_wrong_input_is_refused(score: NDArray, target: NDArray, message: str) -> None:
    calls = (
        mmit_map, macro_map, micro_map, class_ap, video_ap, mean_class_accuracy,
        lambda s, t: hit_at_k(s, t, 1), lambda s, t: top_k(s, t, 1),
        lambda s, t: evaluate_scores(s, t, True), lambda s, t: evaluate_scores(s, t, False),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(InputError, match=message):
            call(score, target)


def test_a_video_is_called_by_its_id() -> None:
    score, target = problem(0, 3, 4)
    score[1, 2] = np.nan
    with pytest.raises(InputError, match=r"^b\.mp4: a score is not a number"):
        evaluate_scores(score, target, True, ids=["a.mp4", "b.mp4", "c.mp4"])
    with pytest.raises(InputError, match=r"^ids: needs 3 entries, one a video: 2"):
        evaluate_scores(score, target, True, ids=["a", "b"])
