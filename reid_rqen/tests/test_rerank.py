"""Sparse k-reciprocal re-ranking equals the definition written with Python sets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from common.log import InputError
from reid_rqen.benchmarks.peer_rerank import rerank_dense
from reid_rqen.ops.distance import (
    Points,
    QuadraticMetric,
    cosine_points,
    distance_block,
    euclid_points,
    pair_distance,
    ranking_block,
)
from reid_rqen.ops.rerank import KReciprocal, nearest, rerank


def clusters(rows: int, seed: int = 0, dimensions: int = 12) -> NDArray:
    rng = np.random.default_rng(seed)
    centre = rng.standard_normal((max(2, rows // 8), dimensions))
    return centre[rng.integers(len(centre), size=rows)] + 0.5 * rng.standard_normal(
        (rows, dimensions)
    )


def squared(feature: NDArray) -> NDArray:
    return ((feature[:, None] - feature[None]) ** 2).sum(axis=2)


def reference(square: NDArray, k1: int, k2: int, weight: float) -> NDArray:
    """(N, N) of the seven steps; ties by row number, a row is its own first neighbour."""
    total = len(square)
    square = square + max(0.0, -square.min())
    scaled = square / square.max(axis=1, keepdims=True)
    rank = [
        sorted(range(total), key=lambda j, i=i: (j != i, square[i, j], j)) for i in range(total)
    ]

    def mutual(i: int, k: int) -> set[int]:
        return {j for j in rank[i][: k + 1] if i in rank[j][: k + 1]}

    code = np.zeros((total, total))
    for i in range(total):
        core = mutual(i, k1)
        members = set(core)
        for j in core:
            half = mutual(j, int(np.around(k1 / 2)))
            if 3 * len(half & core) > 2 * len(half):
                members |= half
        for j in members:
            code[i, j] = np.exp(-scaled[i, j])
        code[i] /= code[i].sum()
    if k2 > 1:
        code = np.stack([code[rank[i][:k2]].mean(axis=0) for i in range(total)])
    shared = np.minimum(code[:, None], code[None]).sum(axis=2)
    return (1 - weight) * (1 - shared / (2 - shared)) + weight * scaled


def ours(feature: NDArray, queries: int, **settings: float) -> NDArray:
    rows = np.arange(len(feature))
    points = euclid_points(torch.from_numpy(feature))
    return rerank(points, rows[:queries], rows[queries:], **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("k1", [1, 3, 5, 20])
@pytest.mark.parametrize("k2", [1, 2, 6])
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_check_10_equals_the_definition(k1: int, k2: int, weight: float) -> None:
    feature = clusters(90, seed=k1)
    want = reference(squared(feature), k1, k2, weight)[:15, 15:]
    got = ours(feature, 15, k1=k1, k2=k2, weight=weight, chunk=17)
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("rows", "k1", "k2", "weight"),
    [(150, 20, 6, 0.3), (400, 20, 6, 0.3), (400, 10, 4, 0.1), (1000, 20, 6, 0.3), (300, 7, 1, 0.5)],
)
def test_check_10_equals_the_published_dense_code(
    rows: int, k1: int, k2: int, weight: float
) -> None:
    feature = clusters(rows, seed=rows, dimensions=32)
    distance = np.sqrt(squared(feature))
    want = rerank_dense(distance, rows // 5, k1, k2, weight)
    got = ours(feature, rows // 5, k1=k1, k2=k2, weight=weight)
    assert np.abs(got - want).max() <= 1e-5
    single = ours(feature.astype(np.float32), rows // 5, k1=k1, k2=k2, weight=weight)
    assert np.abs(single - want).max() <= 1e-5


def test_check_10_full_weight_keeps_the_original_order() -> None:
    feature = clusters(120, seed=1)
    got = ours(feature, 20, weight=1.0)
    np.testing.assert_array_equal(
        got.argsort(axis=1, kind="stable"), squared(feature)[:20, 20:].argsort(1, kind="stable")
    )


def test_check_10_a_permutation_permutes_the_result() -> None:
    feature = clusters(150, seed=2)
    rng = np.random.default_rng(0)
    query, gallery = rng.permutation(30), 30 + rng.permutation(120)
    plain = ours(feature, 30)
    got = ours(feature[np.concatenate([query, gallery])], 30)
    np.testing.assert_allclose(got, plain[query][:, gallery - 30], atol=1e-12)


def test_check_10_queries_that_are_gallery_rows_are_read_there() -> None:
    feature = clusters(100, seed=3)
    rows = np.arange(100)
    query = np.array([4, 50, 7])
    points = euclid_points(torch.from_numpy(feature))
    got = rerank(points, query, rows)
    np.testing.assert_allclose(
        got, reference(squared(feature), 20, 6, 0.3)[query], atol=1e-9, rtol=0
    )


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_the_block_size_does_not_matter_even_with_ties(chunk: int) -> None:
    feature = np.random.default_rng(4).integers(0, 3, (80, 3)).astype(np.float64)
    got = ours(feature, 10, k1=6, k2=3, chunk=chunk)
    want = reference(squared(feature), 6, 3, 0.3)[:10, 10:]
    np.testing.assert_allclose(got, want, atol=1e-9)


def test_neighbour_lists_longer_than_the_union() -> None:
    feature = clusters(6)
    want = reference(squared(feature), 20, 4, 0.3)[:2, 2:]
    np.testing.assert_allclose(ours(feature, 2, k1=20, k2=4), want, atol=1e-9)


def test_equal_rows_give_finite_distances() -> None:
    got = ours(np.ones((30, 4)), 5)
    assert np.isfinite(got).all()


def test_nearest_is_ordered_by_distance_then_row() -> None:
    points = euclid_points(torch.tensor([[0.0], [1.0], [1.0], [-1.0], [1.0]]))
    assert nearest(points, 3, 2).row.tolist() == [
        [0, 1, 2],
        [1, 2, 4],
        [2, 1, 4],
        [3, 0, 1],
        [4, 1, 2],
    ]


def indefinite() -> tuple[QuadraticMetric, NDArray]:
    rng = np.random.default_rng(5)
    kernel = rng.standard_normal((6, 6))
    return QuadraticMetric(rng.standard_normal((12, 6)), kernel + kernel.T), clusters(60, seed=6)


def test_an_indefinite_metric_is_shifted_to_start_at_zero() -> None:
    metric, feature = indefinite()
    square = metric.distance(feature, feature)
    assert square.min() < 0
    rows = np.arange(60)
    got = rerank(metric.points(torch.from_numpy(feature)), rows[:9], rows[9:], k1=6, k2=3)
    np.testing.assert_allclose(got, reference(square, 6, 3, 0.3)[:9, 9:], atol=1e-8)


def test_every_form_of_a_distance_agrees() -> None:
    metric, feature = indefinite()
    points = metric.points(torch.from_numpy(feature))
    square = metric.distance(feature, feature)
    block = distance_block(points.rows(slice(3, 9)), points)
    np.testing.assert_allclose(block, square[3:9], atol=1e-9)
    left, right = (torch.from_numpy(side.ravel()) for side in np.indices((60, 60)))
    np.testing.assert_allclose(
        pair_distance(points, left, right, chunk=100), square.ravel(), atol=1e-9
    )
    shift = ranking_block(points, points).numpy() - square
    np.testing.assert_allclose(shift, np.broadcast_to(shift[:, :1], shift.shape), atol=1e-9)


def test_cosine_points_are_unit_and_keep_a_zero_row() -> None:
    feature = torch.from_numpy(clusters(5))
    feature[2] = 0
    points = cosine_points(feature)
    assert isinstance(points, Points)
    cosine = 1 - distance_block(points, points) / 2
    assert cosine[2].abs().max() == 0
    assert cosine[0, 1].item() == pytest.approx(
        torch.cosine_similarity(feature[0], feature[1], dim=0).item(), abs=1e-12
    )


@pytest.mark.parametrize(
    ("name", "value"), [("k1", 0), ("k2", 0), ("chunk", 0), ("weight", 1.5), ("weight", -0.1)]
)
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"rerank.{name}: must"):
        KReciprocal(**{name: value})  # type: ignore[arg-type]


def test_a_metric_refuses_features_of_another_size() -> None:
    metric, feature = indefinite()
    with pytest.raises(InputError, match="learned on 12 dimensions, not on: 11"):
        metric.points(torch.from_numpy(feature[:, :11]))
