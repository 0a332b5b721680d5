"""Scores equal the published evaluators, transcribed here, and bound them where rows are tied."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from common.log import InputError
from reid_rqen.benchmarks.peer_rank import (
    UnavailableError,
    ranked_cython,
    ranked_loop,
    ranked_python,
    ranked_sklearn,
)
from reid_rqen.metrics import RankEvaluator, rank_metrics
from reid_rqen.ops.rank import count_before_numpy, count_before_torch, index_gallery

PROBLEMS = 200


class Problem(NamedTuple):
    distance: NDArray
    query_pid: NDArray
    query_cam: NDArray
    gallery_pid: NDArray
    gallery_cam: NDArray


def problem(seed: int, levels: int = 0, junk: bool = False) -> Problem:
    """Random labels with repeated and missing identities; `levels` > 0 quantises distances."""
    rng = np.random.default_rng(seed)
    queries, rows = int(rng.integers(1, 12)), int(rng.integers(3, 60))
    people = int(rng.integers(1, 9))
    distance = rng.permutation(queries * rows).reshape(queries, rows).astype(np.float32)
    if levels:
        distance = np.floor(distance * levels / distance.size).astype(np.float32)
    query_pid, gallery_pid = rng.integers(1, people + 1, queries), rng.integers(0, people, rows)
    if junk:
        gallery_pid[rng.random(rows) < 0.3] = -1
    gallery_pid[0], gallery_cam = query_pid[0], rng.integers(0, 3, rows)
    query_cam = rng.integers(0, 3, queries)
    gallery_cam[0] = query_cam[0] + 1  # one query has a positive
    return Problem(distance, query_pid, query_cam, gallery_pid, gallery_cam)


def matlab_average_precision(good: set[int], junk: set[int], index: list[int]) -> float:
    """The trapezoid rule of the MARS authors, step by step: every ranked row moves the curve."""
    old_recall, old_precision, area = 0.0, 1.0, 0.0
    hits = seen = 0
    for row in index:
        if row in junk:
            continue
        hits += row in good
        recall, precision = hits / len(good), hits / (seen + 1)
        area += (recall - old_recall) * (old_precision + precision) / 2
        old_recall, old_precision = recall, precision
        seen += 1
        if hits == len(good):
            break
    return area


def matlab_mars(case: Problem) -> tuple[float, float, int]:
    """Mean trapezoid AP, CMC@1 and the number of queries with a positive."""
    areas, firsts = [], []
    for row, pid, cam in zip(case.distance, case.query_pid, case.query_cam, strict=True):
        same = case.gallery_pid == pid
        good = set(np.flatnonzero(same & (case.gallery_cam != cam)).tolist())
        junk = np.flatnonzero((case.gallery_pid == -1) | (same & (case.gallery_cam == cam)))
        index = np.argsort(row, kind="stable").tolist()
        if good:
            areas.append(matlab_average_precision(good, set(junk.tolist()), index))
            firsts.append(next(place for place in index if place not in junk) in good)
    return float(np.mean(areas)), float(np.mean(firsts)), len(areas)


def depth(case: Problem) -> int:
    """Up to 5 ranks: torchreid's curves need as many kept rows as ranks in every query."""
    same = case.query_pid[:, None] == case.gallery_pid
    removed = same & (case.query_cam[:, None] == case.gallery_cam)
    return min(5, case.distance.shape[1] - int(removed.sum(axis=1).max()))


def compare(case: Problem, peer: tuple[NDArray, float], protocol: str = "mars_11310") -> None:
    scores = rank_metrics(*case, protocol, ranks=range(1, 6))
    ours = [scores[f"cmc@{rank}"] for rank in range(1, 6)]
    shorter = min(5, len(peer[0]))
    np.testing.assert_allclose(ours[:shorter], peer[0][:shorter], atol=1e-6)
    assert scores["mAP"] == pytest.approx(peer[1], abs=1e-5)


@pytest.mark.parametrize("peer", [ranked_python, ranked_loop, ranked_sklearn])
def test_check_08_equals_published_python_rules(peer) -> None:
    for seed in range(PROBLEMS):
        compare(problem(seed), peer(*problem(seed), depth(problem(seed))))


def test_check_08_equals_the_cython_evaluator() -> None:
    try:
        peer = ranked_cython()
    except UnavailableError as error:
        pytest.skip(str(error))
    for seed in range(PROBLEMS):
        compare(problem(seed), peer(*problem(seed), depth(problem(seed))))


def test_check_08_mars_official_is_the_matlab_trapezoid() -> None:
    for seed in range(PROBLEMS):
        case = problem(seed, junk=True)
        scores = rank_metrics(*case, "mars_official")
        average, first, valid = matlab_mars(case)
        assert scores["mAP"] == pytest.approx(average, abs=1e-12)
        assert scores["cmc@1"] == pytest.approx(first, abs=1e-12)
        assert (scores["valid"], scores["queries"]) == (valid, len(case.query_pid))


def one_query(gallery_pid: list[int], gallery_cam: list[int]) -> Problem:
    """Query (1, camera 0); the gallery is given in ranked order."""
    row = np.arange(len(gallery_pid), dtype=np.float32)[None]
    labels = (np.array([1]), np.array([0]), np.array(gallery_pid), np.array(gallery_cam))
    return Problem(row, *labels)


@pytest.mark.parametrize(
    ("pid", "cam", "plain", "trapezoid"),
    [
        ([-1, 1, 1, 2], [1, 0, 1, 1], 1.0, 1.0),  # junk and an own-camera row at the top
        ([2, 1, 2], [1, 1, 1], 1 / 2, 1 / 4),  # P = 1
        ([1, 1, 1], [1, 2, 1], 1.0, 1.0),  # all positive
        ([2, 1, 0, 1], [1, 1, 1, 1], 1 / 2, (0 + 1 / 2 + 1 / 3 + 2 / 4) / 4),  # 0 is wrong, kept
    ],
)
def test_check_08_edges(pid: list[int], cam: list[int], plain: float, trapezoid: float) -> None:
    case = one_query(pid, cam)
    assert rank_metrics(*case, "mars_11310")["mAP"] == pytest.approx(plain)
    assert rank_metrics(*case, "mars_official")["mAP"] == pytest.approx(trapezoid)
    assert matlab_mars(case)[0] == pytest.approx(trapezoid)


def test_check_08_queries_without_a_positive_are_counted() -> None:
    case = problem(3)
    lonely = case._replace(
        distance=np.concatenate([case.distance, case.distance[:1]]),
        query_pid=np.append(case.query_pid, 99),
        query_cam=np.append(case.query_cam, 0),
    )
    scores, more = rank_metrics(*case, "mars_11310"), rank_metrics(*lonely, "mars_11310")
    assert more["mAP"] == scores["mAP"]
    assert more["skipped"] == scores["skipped"] + 1
    assert more["valid"] + more["skipped"] == more["queries"]
    with pytest.raises(InputError, match="no query has a positive"):
        rank_metrics(case.distance[:1], [99], [0], case.gallery_pid, case.gallery_cam, "lpw")


@pytest.mark.parametrize("protocol", ["mars_11310", "mars_official"])
def test_check_08_tie_bounds_bracket_every_order(protocol: str) -> None:
    rng = np.random.default_rng(0)
    for seed in range(PROBLEMS):
        case = problem(seed, levels=4, junk=True)
        scores = rank_metrics(*case, protocol)
        for _ in range(3):
            shuffled = case.distance + rng.random(case.distance.shape).astype(np.float32) / 2
            other = rank_metrics(shuffled, *case[1:], protocol)
            for key in ("cmc@1", "cmc@5", "mAP", "mINP"):
                low, high = scores[f"{key}_pessimistic"], scores[f"{key}_optimistic"]
                assert low - 1e-12 <= other[key] <= high + 1e-12
                assert low - 1e-12 <= scores[f"{key}_stable"] <= high + 1e-12


def test_check_08_the_stable_order_is_distance_then_gallery_row() -> None:
    for seed in range(PROBLEMS):
        case = problem(seed, levels=3, junk=True)
        scores = rank_metrics(*case, "mars_official")
        assert scores["mAP_stable"] == pytest.approx(matlab_mars(case)[0], abs=1e-12)


def test_a_constant_model_gets_the_pessimistic_value() -> None:
    case = one_query([1, 2, 2, 2], [1, 1, 1, 1])._replace(distance=np.ones((1, 4), np.float32))
    scores = rank_metrics(*case, "lpw")
    assert scores["tie_fraction"] == scores["pessimistic_reported"] == 1.0
    assert scores["cmc@1"] == scores["cmc@1_pessimistic"] == 0.0
    assert scores["cmc@1_stable"] == scores["cmc@1_optimistic"] == 1.0


@pytest.mark.parametrize("levels", [0, 1, 3])
@pytest.mark.parametrize("same_camera", [True, False])
def test_the_tensor_path_counts_the_same(levels: int, same_camera: bool) -> None:
    for seed in range(40):
        case = problem(seed, levels=levels, junk=True)
        index = index_gallery(case.gallery_pid, case.gallery_cam, case.gallery_pid == -1)
        args = (case.query_pid, case.query_cam, index, same_camera)
        expected = count_before_numpy(case.distance, *args)
        got = count_before_torch(torch.from_numpy(case.distance), *args)
        for left, right in zip(expected, got, strict=True):
            np.testing.assert_array_equal(left, right)


def test_many_positives_take_the_sorted_path_with_the_same_counts() -> None:
    rng = np.random.default_rng(5)
    pid, cam = rng.integers(0, 2, 300), rng.integers(0, 2, 300)
    distance = rng.integers(0, 50, (4, 300)).astype(np.float32)
    case = Problem(distance, np.array([0, 1, 0, 1]), np.zeros(4, int), pid, cam)
    scores = rank_metrics(*case, "mars_official")
    assert scores["mAP_stable"] == pytest.approx(matlab_mars(case)[0], abs=1e-12)


def test_blocks_of_queries_give_the_same_scores() -> None:
    case = problem(7)
    evaluator = RankEvaluator(case.gallery_pid, case.gallery_cam, "mars_official")
    for start in range(0, len(case.query_pid), 2):
        part = slice(start, start + 2)
        evaluator.update(case.distance[part], case.query_pid[part], case.query_cam[part])
    assert evaluator.compute() == rank_metrics(*case, "mars_official")
    curve = evaluator.curve(20)
    assert curve[4] == evaluator.compute()["cmc@5"]
    assert curve == sorted(curve)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", [False, True])
def test_a_distance_that_is_not_finite_is_refused_by_row(value: float, tensor: bool) -> None:
    case = problem(7)
    case.distance[1, 0] = value
    index = index_gallery(case.gallery_pid, case.gallery_cam, case.gallery_pid == -1)
    count = count_before_torch if tensor else count_before_numpy
    distance = torch.from_numpy(case.distance) if tensor else case.distance
    with pytest.raises(InputError, match="distance: is NaN or infinite in row: 1"):
        count(distance, case.query_pid, case.query_cam, index, True)  # type: ignore[arg-type]


def test_wrong_shapes_and_labels_are_refused() -> None:
    case = problem(7)
    with pytest.raises(InputError, match="distance: must be"):
        rank_metrics(*case._replace(distance=case.distance.T), "lpw")
    with pytest.raises(InputError, match="query_pid: must be one-dimensional integers"):
        rank_metrics(*case._replace(query_pid=case.query_pid / 2), "lpw")
    with pytest.raises(InputError, match="gallery_cam: needs"):
        rank_metrics(*case._replace(gallery_cam=case.gallery_cam[1:]), "lpw")


def test_inp_is_positives_over_the_last_rank() -> None:
    scores = rank_metrics(*one_query([2, 1, 0, 1], [1, 1, 1, 1]), "lpw")
    assert scores["mINP"] == pytest.approx(2 / 4)
