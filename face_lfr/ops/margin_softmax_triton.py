"""CUDA kernels of the margined softmax; imported only where they run, since they need triton.

One pass over the cosines finds the greatest logit and the sum of powers of each row while it goes
(online softmax); a row is cut into splits so that a small batch fills the GPU, and PyTorch joins
them. A second pass overwrites the cosines by the gradient. No temporary has the size of the buffer
and there are no atomics: two runs give the same bits. Sums are float32 at least.

Letters: B images of the global batch, C classes of this rank, K sub-centres, S splits of a row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from face_lfr.ops.margin_softmax_blocked import Rows, Stats, Task, target_gradient

ELEMENTS = 1024  # of the buffer in one step of a program
PROGRAMS = 1024  # enough for every multiprocessor to have several


def statistics(cosine_BC: Tensor, rows: Rows, task: Task) -> Stats:
    """Greatest logit, sum of powers and, for smoothing, sum of the logits here; (B,) each."""
    _check(cosine_BC)
    count, classes = len(cosine_BC), cosine_BC.shape[1] // task.centers
    if not classes:
        nothing_B = rows.target.value.new_zeros(count)
        return Stats(nothing_B - torch.inf, nothing_B, nothing_B)
    block = _block(task)
    steps = triton.cdiv(classes, block)
    each = triton.cdiv(steps, min(steps, triton.cdiv(PROGRAMS, count))) * block
    splits = triton.cdiv(classes, each)
    found_3BS = cosine_BC.new_empty((3, count, splits))
    with torch.cuda.device_of(cosine_BC):
        _statistics_kernel[(count, splits)](
            cosine_BC, *_columns(rows), _constants(rows, task), found_3BS, classes, each,
            count * splits, **_settings(cosine_BC, task, block),
        )  # fmt: skip
    top_BS, total_BS, plain_BS = found_3BS
    top_B = top_BS.amax(dim=1)
    total_BS = total_BS * (rows.scale * (top_BS - top_B[:, None])).exp()
    return Stats(top_B, total_BS.sum(dim=1), plain_BS.sum(dim=1))


def gradient(cosine_BC: Tensor, rows: Rows, stats: Stats, task: Task) -> None:
    """Overwrite the cosines by the gradient of the mean loss; `stats` are those of all ranks."""
    _check(cosine_BC)
    count, classes = len(cosine_BC), cosine_BC.shape[1] // task.centers
    if not classes:
        return
    block = _block(task)
    factor_B = rows.scale * rows.share / stats.total
    even = rows.scale * (task.smoothing * rows.share / task.classes)
    with torch.cuda.device_of(cosine_BC):
        _gradient_kernel[(count, triton.cdiv(classes, block))](
            cosine_BC, *_columns(rows), _constants(rows, task), stats.top, factor_B, even,
            target_gradient(rows, stats, task), classes, **_settings(cosine_BC, task, block),
        )  # fmt: skip


def _check(x: Tensor) -> None:
    """Raise ValueError unless the kernels can read `x`: on CUDA, or under triton's interpreter."""
    if not (x.is_cuda or triton.knobs.runtime.interpret):
        raise ValueError(f"impl='triton': cosines are on {x.device}, need CUDA")


def _block(task: Task) -> int:
    """Classes in one step."""
    return max(ELEMENTS // int(triton.next_power_of_2(task.centers)), 32)


def _columns(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    return rows.column, rows.target.value.contiguous(), rows.target.pivot.contiguous()


def _constants(rows: Rows, task: Task) -> Tensor:
    """The scale and the constants of the margin; states never leave the GPU."""
    scale, values = rows.scale, task.margin.form().constants
    # numbers are filled in on the device: copying them there would wait for it
    moved = (v.to(scale) if isinstance(v, Tensor) else scale.new_full((), v) for v in values)
    return torch.stack([scale, *moved])


def _settings(cosine_BC: Tensor, task: Task, block: int) -> dict[str, Any]:
    wide = tl.float64 if cosine_BC.dtype == torch.float64 else tl.float32
    kind, centers = task.margin.form().kind, task.centers
    return {"KIND": kind, "CENTERS": centers, "BLOCK": block, "ACC": wide}


@triton.jit
def _nearest(row, column, inside, CENTERS: tl.constexpr, ACC: tl.constexpr):  # type: ignore[no-untyped-def]
    """Greatest of the cosines of a class, and which; the first of equals."""
    best = tl.load(row + column * CENTERS, mask=inside, other=0.0).to(ACC)
    winner = tl.zeros_like(column)
    for k in tl.static_range(1, CENTERS):
        other = tl.load(row + column * CENTERS + k, mask=inside, other=0.0).to(ACC)
        winner = tl.where(other > best, k, winner)
        best = tl.maximum(best, other)
    return best, winner


@triton.jit
def _value(cosine, pivot, first, second, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """The v of a negative and its derivative; the forms are numbered as in face_lfr.margins."""
    value = cosine
    slope = tl.full(cosine.shape, 1.0, cosine.dtype)
    if KIND == 1:  # hard negatives t c + t - 1
        hard = cosine > pivot
        value = tl.where(hard, first * cosine + (first - 1.0), cosine)
        slope = tl.where(hard, first, 1.0)
    if KIND == 2:  # hard negatives c (t + c)
        hard = cosine > pivot
        value = tl.where(hard, cosine * (first + cosine), cosine)
        slope = tl.where(hard, first + 2.0 * cosine, 1.0)
    if KIND == 3:  # t c + t - 1 with t a Gaussian around the pivot
        gap = cosine - pivot
        slope = tl.exp(first - second * gap * gap)
        value = slope * cosine + slope - 1.0
    return value, slope


@triton.jit
def _statistics_kernel(  # type: ignore[no-untyped-def]
    cosine, column_of, value_of, pivot_of, constants, found, classes, each, plane,
    KIND: tl.constexpr, CENTERS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Greatest logit, sum of powers relative to it and sum of the logits of one split of a row."""
    i, split = tl.program_id(0), tl.program_id(1)
    row = cosine + i.to(tl.int64) * classes * CENTERS
    target, value, pivot = tl.load(column_of + i), tl.load(value_of + i), tl.load(pivot_of + i)
    scale, first = tl.load(constants), tl.load(constants + 1)
    second = tl.load(constants + 2)
    top = tl.full((), float("-inf"), ACC)
    total = tl.zeros((), ACC)
    plain = tl.zeros((), ACC)
    end = tl.minimum(split * each + each, classes)
    for start in range(split * each, end, BLOCK):
        column = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = column < end
        best, _ = _nearest(row, column, inside, CENTERS, ACC)
        logit, _ = _value(best, pivot, first, second, KIND)
        logit = tl.where(column == target, value, logit)
        plain += tl.sum(tl.where(inside, logit, 0.0), axis=0)
        logit = tl.where(inside, logit, float("-inf"))
        higher = tl.maximum(top, tl.max(logit, axis=0))
        total *= tl.exp(scale * (top - higher))  # 0 the first time
        total += tl.sum(tl.exp(scale * (logit - higher)), axis=0)
        top = higher
    place = found + i * tl.num_programs(1) + split
    tl.store(place, top)
    tl.store(place + plane, total)
    tl.store(place + 2 * plane, plain)


@triton.jit
def _gradient_kernel(  # type: ignore[no-untyped-def]
    cosine, column_of, value_of, pivot_of, constants, top_of, factor_of, even, target_of, classes,
    KIND: tl.constexpr, CENTERS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Write (p - eps / C) * s * slope / B over the cosines, and the gradient of the target."""
    i = tl.program_id(0)
    row = cosine + i.to(tl.int64) * classes * CENTERS
    target, pivot = tl.load(column_of + i), tl.load(pivot_of + i)
    scale, first = tl.load(constants), tl.load(constants + 1)
    second = tl.load(constants + 2)
    top, factor = tl.load(top_of + i), tl.load(factor_of + i)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    inside = column < classes
    best, winner = _nearest(row, column, inside, CENTERS, ACC)
    logit, slope = _value(best, pivot, first, second, KIND)
    found = (tl.exp(scale * (logit - top)) * factor - tl.load(even)) * slope
    found = tl.where(column == target, tl.load(target_of + i), found)
    for k in tl.static_range(0, CENTERS):
        tl.store(row + column * CENTERS + k, tl.where(winner == k, found, 0.0), mask=inside)
