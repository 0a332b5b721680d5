"""Aggregation against the equations as loops in float64, and the properties it must have.

Letters: N frames of all videos, V videos, D embedding width.
"""

import math

import pytest
import torch
from torch import Tensor

from face_lfr.aggregate import (
    METHODS,
    NEEDS_QUALITY,
    UNIT_FRAMES,
    aggregate,
    frame_lengths,
    frame_weights,
)

LENGTHS = (1, 2, 3, 41, 2, 1, 5, 2)


def ragged(
    seed: int, lengths: tuple[int, ...] = LENGTHS, width: int = 6, low: float = -1.0
) -> tuple:
    """Features, video numbers in random order, and qualities from `low` upwards."""
    generator = torch.Generator().manual_seed(seed)
    video_N = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    video_N = video_N[torch.randperm(len(video_N), generator=generator)]
    feature_ND = torch.randn(len(video_N), width, generator=generator, dtype=torch.float64)
    quality_N = low + 2 * torch.rand(len(video_N), generator=generator, dtype=torch.float64)
    return feature_ND, video_N, quality_N


def loop_weights(method: str, q: list[float], lengths: list[float]) -> list[float]:
    """Weights of one video from the table, with the plain mean where there is no other answer."""
    n = len(q)
    mean = [1 / n] * n
    if method in ("mean_l2", "mean_raw"):
        return mean
    if method == "best":
        best = [float(x == max(q)) for x in q]
        return [b / sum(best) for b in best]
    if method == "norm":
        raw = lengths
    elif method == "qan":
        raw = [1 / (1 + math.exp(-x)) for x in q]
    elif method == "clamped":
        raw = [max(x, 0.0) for x in q]
    elif n > 2:
        if max(q) == min(q):
            return mean
        raw = [(x - min(q)) / (max(q) - min(q)) for x in q]
    elif min(q) < 0:
        return mean
    else:
        raw = q
    floor = 0 if method == "qan" else 1e-12
    return [x / sum(raw) for x in raw] if sum(raw) > floor else mean


def loop(feature_ND: Tensor, video_N: Tensor, quality_N: Tensor, method: str, unit: bool) -> tuple:
    """Video by video, frame by frame, number by number."""
    videos = int(video_N.max()) + 1
    vector_VD = [[0.0] * feature_ND.shape[1] for _ in range(videos)]
    weight_N = [0.0] * len(video_N)
    for v in range(videos):
        rows = [k for k in range(len(video_N)) if video_N[k] == v]
        frames = [feature_ND[k].tolist() for k in rows]
        lengths = [math.sqrt(sum(x * x for x in f)) for f in frames]
        weights = loop_weights(method, [quality_N[k].item() for k in rows], lengths)
        for k, frame, length, weight in zip(rows, frames, lengths, weights, strict=True):
            weight_N[k] = weight
            for d, x in enumerate(frame):
                vector_VD[v][d] += weight * (x / length if unit else x)
    return tuple(torch.tensor(x, dtype=torch.float64) for x in (vector_VD, weight_N))


@pytest.mark.parametrize("low", [-1.0, 0.1, -30.0])
@pytest.mark.parametrize("method", METHODS)
def test_check_07_equals_the_literal_loop(method: str, low: float) -> None:
    feature_ND, video_N, quality_N = ragged(3, low=low)
    for norm in (None, "none", "l2"):
        unit = method in UNIT_FRAMES if norm is None else norm == "l2"
        want = loop(feature_ND, video_N, quality_N, method, unit)
        got = aggregate(
            feature_ND, video_N, quality_N, method, frame_norm=norm, dtype=torch.float64
        )
        torch.testing.assert_close(tuple(got), want, atol=1e-13, rtol=1e-12)
        single = aggregate(feature_ND, video_N, quality_N, method, frame_norm=norm)
        assert single.vector_VD.dtype == single.weight_N.dtype == torch.float32
        torch.testing.assert_close(single.vector_VD.double(), want[0], atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("method", METHODS)
def test_check_07_frame_order_does_not_matter(method: str) -> None:
    feature_ND, video_N, quality_N = ragged(4)
    order = torch.randperm(len(video_N), generator=torch.Generator().manual_seed(9))
    one = aggregate(feature_ND, video_N, quality_N, method, dtype=torch.float64)
    two = aggregate(
        feature_ND[order], video_N[order], quality_N[order], method, dtype=torch.float64
    )
    torch.testing.assert_close(two.vector_VD, one.vector_VD, atol=1e-13, rtol=1e-12)
    torch.testing.assert_close(two.weight_N, one.weight_N[order], atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("low", [-1.0, 0.0, -1e4, 1e4])
@pytest.mark.parametrize("method", METHODS)
def test_check_07_weights_are_shares(method: str, low: float) -> None:
    feature_ND, video_N, quality_N = ragged(5, low=low)
    weight_N = aggregate(feature_ND, video_N, quality_N, method).weight_N
    assert (weight_N >= 0).all()
    total_V = torch.zeros(len(LENGTHS)).index_add(0, video_N, weight_N)
    torch.testing.assert_close(total_V, torch.ones(len(LENGTHS)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("scale", [1e-6, 0.3, 700.0])
@pytest.mark.parametrize("shift", [-5.0, 0.0, 2.5])
def test_check_07_scale_and_shift_of_quality_do_not_matter_beyond_two(
    scale: float, shift: float
) -> None:
    feature_ND, video_N, quality_N = ragged(6, lengths=(3, 9, 4))
    for method in ("qanpp", "qanpp_l2"):
        one = aggregate(feature_ND, video_N, quality_N, method, dtype=torch.float64)
        other_N = quality_N * scale + shift
        two = aggregate(feature_ND, video_N, other_N, method, dtype=torch.float64)
        torch.testing.assert_close(two.vector_VD, one.vector_VD, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("constant", [0.0, 0.1, -3.3, 1e-30, 1e30])
@pytest.mark.parametrize("method", METHODS)
def test_check_07_constant_quality_is_the_plain_mean(method: str, constant: float) -> None:
    feature_ND, video_N, quality_N = ragged(7)
    quality_N = torch.full_like(quality_N, constant)
    if method == "norm":
        feature_ND = torch.nn.functional.normalize(feature_ND, dim=1)
    got = aggregate(feature_ND, video_N, quality_N, method)
    want = aggregate(feature_ND, video_N, None, "mean_l2" if method in UNIT_FRAMES else "mean_raw")
    torch.testing.assert_close(tuple(got), tuple(want), atol=2e-6, rtol=1e-5)


def test_check_07_differences_at_the_rounding_of_quality_are_none() -> None:
    quality_N = torch.tensor([0.7, 0.7, 0.7, 0.7]) + torch.tensor([0.0, 6e-8, -6e-8, 0.0])
    assert quality_N.unique().numel() > 1
    got = frame_weights(quality_N, torch.zeros(4, dtype=torch.int64), "qanpp")
    assert got.tolist() == [0.25] * 4


@pytest.mark.parametrize(
    ("quality", "weights"),
    [
        ([-3.0], [1.0]),
        ([0.0], [1.0]),
        ([5.0], [1.0]),
        ([1.0, 3.0], [0.25, 0.75]),
        ([0.0, 2.0], [0.0, 1.0]),
        ([-1.0, 3.0], [0.5, 0.5]),
        ([-1.0, -3.0], [0.5, 0.5]),
        ([-2.0, 2.0], [0.5, 0.5]),
        ([1e-20, 3e-20], [0.5, 0.5]),
        ([1.0, 2.0, 3.0], [0.0, 1 / 3, 2 / 3]),
        ([-1.0, -3.0, -3.0], [1.0, 0.0, 0.0]),
        ([2.0, 2.0, 2.0], [1 / 3, 1 / 3, 1 / 3]),
    ],
)
def test_check_07_small_videos_by_hand(quality: list[float], weights: list[float]) -> None:
    got = frame_weights(
        torch.tensor(quality), torch.zeros(len(quality), dtype=torch.int64), "qanpp"
    )
    assert got.tolist() == pytest.approx(weights, abs=1e-7)


def test_one_frame_is_that_frame() -> None:
    feature_ND = torch.tensor([[3.0, -4.0]])
    for method in METHODS:
        for quality in (-2.0, 0.0, 7.0):
            got = aggregate(
                feature_ND, torch.tensor([0]), torch.tensor([quality]), method, frame_norm="none"
            )
            assert torch.equal(got.vector_VD, feature_ND)


def test_norm_points_where_the_raw_mean_points() -> None:
    feature_ND, video_N, _ = ragged(8)
    norm, raw = (aggregate(feature_ND, video_N, None, m).vector_VD for m in ("norm", "mean_raw"))
    cosine_V = torch.nn.functional.cosine_similarity(norm, raw)
    torch.testing.assert_close(cosine_V, torch.ones(len(LENGTHS)), atol=1e-6, rtol=0)
    weights = frame_weights(frame_lengths(feature_ND), video_N, "norm")
    assert torch.equal(weights, aggregate(feature_ND, video_N, None, "norm").weight_N)


def test_very_low_scores_keep_their_ratio_in_qan() -> None:
    weights = frame_weights(
        torch.tensor([-300.0, -301.0]), torch.zeros(2, dtype=torch.int64), "qan"
    )
    assert weights[0].item() == pytest.approx(1 / (1 + math.exp(-1)), rel=1e-5)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "best"])
def test_gradients(method: str) -> None:
    feature_ND, video_N, quality_N = ragged(10, lengths=(1, 2, 3, 5), width=3, low=-0.4)
    feature_ND.requires_grad_()
    quality_N.requires_grad_(method in NEEDS_QUALITY)

    def run(feature: Tensor, quality: Tensor) -> Tensor:
        return aggregate(feature, video_N, quality, method, dtype=torch.float64).vector_VD

    assert torch.autograd.gradcheck(run, (feature_ND, quality_N))


@pytest.mark.parametrize("method", sorted(NEEDS_QUALITY - {"best"}))
def test_gradients_are_finite_where_the_mean_steps_in(method: str) -> None:
    feature_ND, video_N, _ = ragged(11)
    for constant in (0.0, -2.0):
        quality_N = torch.full((len(video_N),), constant, requires_grad=True)
        aggregate(feature_ND, video_N, quality_N, method).vector_VD.sum().backward()
        assert quality_N.grad is not None
        assert quality_N.grad.isfinite().all()


def test_blocks_and_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    feature_ND, video_N, quality_N = ragged(12)
    whole = aggregate(feature_ND, video_N, quality_N, "qanpp_l2", dtype=torch.float64)
    monkeypatch.setattr("face_lfr.aggregate.ROWS_AT_ONCE", 7)
    parts = aggregate(feature_ND, video_N, quality_N, "qanpp_l2", dtype=torch.float64)
    torch.testing.assert_close(parts.vector_VD, whole.vector_VD, atol=1e-14, rtol=1e-13)
    with torch.autocast("cpu", torch.bfloat16):
        half = aggregate(feature_ND.half(), video_N, quality_N, "qanpp_l2")
    assert half.vector_VD.dtype == torch.float32
    torch.testing.assert_close(half.vector_VD.double(), whole.vector_VD, atol=2e-3, rtol=2e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_device_does_not_matter(method: str) -> None:
    feature_ND, video_N, quality_N = ragged(13)

    def run(device: str) -> list[Tensor]:
        feature, quality = (x.to(device).requires_grad_() for x in (feature_ND, quality_N))
        out = aggregate(feature, video_N.to(device), quality, method, dtype=torch.float64)
        out.vector_VD.square().sum().backward()
        return [x.detach().cpu() for x in (*out, feature.grad) if x is not None]

    torch.testing.assert_close(run("cuda"), run("cpu"), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "median"}, "method='median'"),
        ({"method": "qan", "quality_N": None}, "needs the quality"),
        ({"frame_norm": "l1"}, "frame_norm='l1'"),
        ({"dtype": torch.float16}, "dtype=torch.float16"),
        ({"feature_ND": torch.zeros(3)}, r"need floating \(N, D\)"),
        ({"feature_ND": torch.zeros(3, 2, dtype=torch.int64)}, r"need floating \(N, D\)"),
        ({"video_N": torch.tensor([0, 1])}, r"need int64 \(3,\)"),
        ({"video_N": torch.tensor([0, 0, 2])}, "1 of 3 videos have no frame, first 1"),
        ({"video_N": torch.tensor([0, -1, 1])}, "video -1 must not be negative"),
        ({"videos": 3}, "first 2"),
        ({"videos": 1}, "beyond the last of 1"),
        ({"quality_N": torch.zeros(2)}, r"need \(3,\)"),
        ({"quality_N": torch.tensor([0.0, math.nan, 1.0])}, "quality of frame 1 is nan"),
    ],
)
def test_bad_arguments_are_named(changes: dict, message: str) -> None:
    good = {
        "feature_ND": torch.ones(3, 2), "video_N": torch.tensor([0, 0, 1]),
        "quality_N": torch.ones(3), "method": "qanpp",
    }  # fmt: skip
    aggregate(**good)
    with pytest.raises(ValueError, match=message):
        aggregate(**(good | changes))
