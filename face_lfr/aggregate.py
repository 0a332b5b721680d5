"""One vector per video from the features and qualities of its frames.

Every method is a weighted sum of the frames, v = sum_k w_k f_k with sum_k w_k = 1 in each video;
methods differ in the weights and in whether frames are brought to unit length first.

    method     weight of a frame                             frames
    mean_l2    1 / n                                         unit length
    mean_raw   1 / n                                         as they are
    best       1 for the highest quality (ties share it)     unit length
    norm       length of its feature over their sum          unit length
    qan        sigmoid(q) / sum sigmoid(q)                   as they are
    clamped    max(q, 0) / sum max(q, 0)                     as they are
    qanpp      min-max of q over the video, over their sum   as they are
    qanpp_l2   the same                                      unit length

`mean_l2` is the baseline of the challenge's organisers; `norm` and `mean_raw` point in the same
direction. `qan` is Quality-Aware-Network (CVPR 2017), `qanpp` follows arXiv 1909.00632 and
trojans-face-recognizer (the authors' code): q' = (q - min q) / (max q - min q) for more than two
frames, the raw q for one or two. There the authors' code divides 0 by 0 for constant qualities
and lets negative qualities, or a sum near zero, turn a video upside down; here such a video gets
the plain mean.

Letters: N frames of all videos, V videos, D embedding width.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

METHODS = ("mean_l2", "mean_raw", "best", "norm", "qan", "clamped", "qanpp", "qanpp_l2")
NEEDS_QUALITY = frozenset({"best", "qan", "clamped", "qanpp", "qanpp_l2"})
UNIT_FRAMES = frozenset({"mean_l2", "best", "norm", "qanpp_l2"})
EPS = 1e-12  # a sum of weights below it says nothing about the frames; least frame length
ROWS_AT_ONCE = 65536  # bounds the copy of frames of another type


class Aggregated(NamedTuple):
    """Vectors (V, D) of the videos, not of unit length, and the weight (N,) of every frame."""

    vector_VD: Tensor
    weight_N: Tensor


def aggregate(
    feature_ND: Tensor,
    video_N: Tensor,
    quality_N: Tensor | None,
    method: str,
    *,
    frame_norm: str | None = None,
    videos: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Aggregated:
    """Weighted sum of the frames of each video.

    Frames may come in any order. Differentiable, once, in features and qualities. Features of type
    `dtype` that are mapped from a file are never held in memory as a whole.

    Args:
        feature_ND: frame features, any floating type.
        video_N: int64, the video of each frame, in [0, V); every video has a frame.
        quality_N: unbounded scores, larger is better; None where the method needs none.
        method: one of `METHODS`.
        frame_norm: "l2" brings every frame to unit length first, "none" does not; None is the
            choice of the method.
        videos: V; by default the largest video number plus one.
        dtype: of the sums and the result, float32 or float64.

    Raises:
        ValueError: an unknown name, shapes that do not fit, a quality that is not finite, or a
            video without frames.
    """
    count_V = _check(feature_ND, video_N, quality_N, method, videos, dtype)
    unit = _unit(method, frame_norm)
    with torch.autocast(feature_ND.device.type, enabled=False):
        if method == "norm":
            quality_N = frame_lengths(feature_ND, dtype)
        elif quality_N is not None:
            quality_N = quality_N.to(feature_ND.device, dtype)
        weight_N = _weights(quality_N, video_N, count_V.to(dtype), method)
        factor_N = weight_N
        if unit:
            factor_N = weight_N / frame_lengths(feature_ND, dtype).clamp_min(EPS)
        vector_VD = _weighted_sum(feature_ND.to(dtype), factor_N, video_N, count_V)
    return Aggregated(vector_VD, weight_N)


def _weighted_sum(feature_ND: Tensor, factor_N: Tensor, video_N: Tensor, count_V: Tensor) -> Tensor:
    """Sum of factor times feature over the frames of each video, (V, D)."""
    # One pass over the features without a copy of them; multiplying and adding the rows by
    # `index_add_` takes several times as long.
    order_N = video_N.argsort(stable=True)
    first_V = count_V.cumsum(0) - count_V
    return F.embedding_bag(
        order_N, feature_ND, first_V, mode="sum", per_sample_weights=factor_N[order_N]
    )


def frame_lengths(feature_ND: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """L2 norm (N,) of every frame."""
    parts = feature_ND.split(ROWS_AT_ONCE)
    return torch.cat([torch.linalg.vector_norm(part.to(dtype), dim=1) for part in parts])


def frame_weights(
    quality_N: Tensor, video_N: Tensor, method: str, videos: int | None = None
) -> Tensor:
    """Weights (N,) of the frames, summing to 1 in each video, float32 at least.

    For `norm` the qualities are the lengths of the features (`frame_lengths`). Arguments and
    errors are those of `aggregate`.
    """
    quality_N = quality_N.to(torch.promote_types(quality_N.dtype, torch.float32))
    count_V = _check(quality_N[:, None], video_N, quality_N, method, videos, quality_N.dtype)
    return _weights(quality_N, video_N, count_V.to(quality_N.dtype), method)


def _weights(quality_N: Tensor | None, video_N: Tensor, count_V: Tensor, method: str) -> Tensor:
    """Raw weights of the method, over their sum in each video; the mean where that is no sum."""
    mean_N = (1 / count_V)[video_N]
    if quality_N is None or method in ("mean_l2", "mean_raw"):
        return mean_N
    if method == "best":
        raw_N = (quality_N == _extreme(quality_N, video_N, count_V, "amax")[video_N]).to(mean_N)
    elif method == "qan":
        # Relative to the best frame: sigmoids of very low scores would all be 0.
        log_N = F.logsigmoid(quality_N)
        raw_N = (log_N - _extreme(log_N, video_N, count_V, "amax").detach()[video_N]).exp()
    elif method == "norm":
        raw_N = quality_N
    elif method == "clamped":
        raw_N = quality_N.clamp_min(0)
    else:
        raw_N = _min_max(quality_N, video_N, count_V)
    sum_V = _sum(raw_N, video_N, count_V)
    good_V = sum_V > EPS
    # The inner `where` keeps 0/0, and its NaN gradient, out of the branch that is not taken.
    share_N = raw_N / torch.where(good_V, sum_V, torch.ones_like(sum_V))[video_N]
    return torch.where(good_V[video_N], share_N, mean_N)


def _min_max(quality_N: Tensor, video_N: Tensor, count_V: Tensor) -> Tensor:
    """Raw QAN++ weights; those of a video that needs the plain mean are all 0."""
    low_V = _extreme(quality_N, video_N, count_V, "amin")
    high_V = _extreme(quality_N, video_N, count_V, "amax")
    range_V = high_V - low_V
    # Below the rounding of q the range is noise, and its ratio to q - min as well.
    largest_V = torch.maximum(low_V.abs(), high_V.abs())
    rounding = torch.finfo(quality_N.dtype)
    spread_V = range_V > (4 * rounding.eps * largest_V).clamp_min(rounding.tiny)
    safe_V = torch.where(spread_V, range_V, torch.ones_like(range_V))
    scaled_N = (quality_N - low_V[video_N]) / safe_V[video_N]
    few_V = count_V <= 2
    used_V = torch.where(few_V, low_V >= 0, spread_V)
    raw_N = torch.where(few_V[video_N], quality_N, scaled_N)
    return torch.where(used_V[video_N], raw_N, torch.zeros_like(raw_N))


def _sum(value_N: Tensor, video_N: Tensor, count_V: Tensor) -> Tensor:
    return torch.zeros_like(count_V).index_add(0, video_N, value_N)


def _extreme(value_N: Tensor, video_N: Tensor, count_V: Tensor, which: str) -> Tensor:
    empty_V = torch.zeros_like(count_V)
    return empty_V.scatter_reduce(0, video_N, value_N, reduce=which, include_self=False)


def _unit(method: str, frame_norm: str | None) -> bool:
    if frame_norm not in (None, "none", "l2"):
        raise ValueError(f"frame_norm={frame_norm!r}: need none, l2 or None")
    return method in UNIT_FRAMES if frame_norm is None else frame_norm == "l2"


def _check(
    feature_ND: Tensor,
    video_N: Tensor,
    quality_N: Tensor | None,
    method: str,
    videos: int | None,
    dtype: torch.dtype,
) -> Tensor:
    """Frames (V,) of every video."""
    if method not in METHODS:
        raise ValueError(f"method={method!r}: need one of {', '.join(METHODS)}")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype={dtype}: need torch.float32 or torch.float64")
    if feature_ND.dim() != 2 or not feature_ND.is_floating_point():
        shape = f"{feature_ND.dtype} {tuple(feature_ND.shape)}"
        raise ValueError(f"feature is {shape}, need floating (N, D)")
    frames = len(feature_ND)
    if video_N.shape != (frames,) or video_N.dtype != torch.int64:
        shape = f"{video_N.dtype} {tuple(video_N.shape)}"
        raise ValueError(f"video is {shape}, need int64 ({frames},)")
    _check_quality(quality_N, frames, method)
    return _count(video_N, videos)


def _check_quality(quality_N: Tensor | None, frames: int, method: str) -> None:
    if quality_N is None:
        if method in NEEDS_QUALITY:
            raise ValueError(f"method={method!r} needs the quality of every frame")
        return
    if quality_N.shape != (frames,):
        raise ValueError(f"quality has shape {tuple(quality_N.shape)}, need ({frames},)")
    bad_N = ~quality_N.isfinite()
    if bool(bad_N.any()):
        row = int(bad_N.nonzero()[0])
        raise ValueError(f"quality of frame {row} is {quality_N[row].item()}, need finite numbers")


def _count(video_N: Tensor, videos: int | None) -> Tensor:
    if len(video_N) and int(video_N.min()) < 0:
        raise ValueError(f"video {int(video_N.min())} must not be negative")
    count_V = torch.bincount(video_N, minlength=videos or 0)
    if videos is not None and len(count_V) > videos:
        raise ValueError(f"video {len(count_V) - 1} is beyond the last of {videos} videos")
    empty = (count_V == 0).nonzero().flatten()
    if len(empty):
        raise ValueError(f"{len(empty)} of {len(count_V)} videos have no frame, first {empty[0]}")
    return count_V
