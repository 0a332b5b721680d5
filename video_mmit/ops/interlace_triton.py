"""CUDA kernels of temporal interlacing; imported only where they run, since they need triton.

One program has all T frames of a piece of one group of one video in registers. It reads and writes
the groups only; PyTorch copies the channels that pass through. Sums are float32 at least. Sums over
a group are taken piece by piece, and PyTorch adds the pieces in a fixed order: two runs give the
same bits, there are no atomics.

NCHW and channels_last are read in place: the P = c*H*W elements of a group in a frame lie together
in the one and are H*W runs of c elements in the other. Anything else is copied to NCHW first.

Letters: N videos, T frame positions, B = N*T frames, N-major, C channels, H W size, G groups,
c = fold / G channels of a group, L pieces of a group.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 2048  # of one operand in a program: 16 registers a thread


class Plan(NamedTuple):
    """How the kernels are started: grid (L, G, N) and their arguments by name."""

    grid: tuple[int, int, int]
    arguments: dict[str, Any]


def check(x: Tensor) -> None:
    """Raise ValueError unless the kernels can read `x`: on CUDA, or under triton's interpreter."""
    if not (x.is_cuda or triton.knobs.runtime.interpret):
        raise ValueError(f"impl='triton': x is on {x.device}, need CUDA")


def forward(x_BCHW: Tensor, offset_NG: Tensor, weight_NTG: Tensor, fold: int) -> Tensor:
    """Interlaced frames; offset and weight are both float32 or both float64."""
    check(x_BCHW)
    source = x_BCHW.contiguous(memory_format=_layout(x_BCHW))
    out = torch.empty_like(source)
    out[:, fold:] = source[:, fold:]
    plan = _plan(source, offset_NG, weight_NTG, fold)
    if out.numel():
        with torch.cuda.device_of(out):
            _forward_kernel[plan.grid](
                source, out, offset_NG.contiguous(), weight_NTG.contiguous(), **plan.arguments
            )
    return _like(out, x_BCHW)


def backward(
    grad_BCHW: Tensor, x_BCHW: Tensor, offset_NG: Tensor, weight_NTG: Tensor, fold: int,
    need_x: bool, need_hat: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, offset and weight; what is not needed comes back empty."""
    check(x_BCHW)
    source = x_BCHW.contiguous(memory_format=_layout(x_BCHW))
    gradient = grad_BCHW.contiguous(memory_format=_layout(x_BCHW))
    dx = torch.empty_like(source) if need_x else source.new_empty(0)
    if need_x:
        dx[:, fold:] = gradient[:, fold:]
    plan = _plan(source, offset_NG, weight_NTG, fold)
    pieces, groups, videos = plan.grid
    shape = (videos, groups, pieces, 2, weight_NTG.shape[1])
    sums_NGL2T = offset_NG.new_zeros(shape if need_hat else 0)
    if source.numel():
        with torch.cuda.device_of(source):
            _backward_kernel[plan.grid](
                gradient, source, dx, offset_NG.contiguous(), weight_NTG.contiguous(), sums_NGL2T,
                **plan.arguments, NEED_X=need_x, NEED_HAT=need_hat,
            )  # fmt: skip
    dx = _like(dx, x_BCHW) if need_x else dx
    if need_hat:
        return dx, *_reduced(sums_NGL2T, offset_NG, weight_NTG)
    return dx, sums_NGL2T, sums_NGL2T.clone()


def _layout(x_BCHW: Tensor) -> torch.memory_format:
    last = x_BCHW.is_contiguous(memory_format=torch.channels_last) and not x_BCHW.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _like(found: Tensor, x_BCHW: Tensor) -> Tensor:
    """`found` with the strides of `empty_like(x)`, which is what the compiler was promised."""
    if found.stride() == torch.empty_like(x_BCHW, device="meta").stride():
        return found
    return torch.empty_like(x_BCHW).copy_(found)


def _plan(x_BCHW: Tensor, offset_NG: Tensor, weight_NTG: Tensor, fold: int) -> Plan:
    (videos, groups), frames = offset_NG.shape, weight_NTG.shape[1]
    channels, area = x_BCHW.shape[1], x_BCHW.shape[2] * x_BCHW.shape[3]
    own, flat = fold // groups, _layout(x_BCHW) == torch.contiguous_format
    rows = triton.next_power_of_2(frames)
    block = min(max(ELEMENTS // rows, 32), triton.next_power_of_2(max(own * area, 1)))
    arguments = {
        "frames": frames, "groups": groups, "length": own * area, "frame_stride": channels * area,
        "group_stride": own * area if flat else own, "run_stride": channels,
        "RUN": 0 if flat else own, "ROWS": rows, "BLOCK": block,
        "ACC": tl.float64 if offset_NG.dtype == torch.float64 else tl.float32,
    }  # fmt: skip
    return Plan((triton.cdiv(own * area, block), groups, videos), arguments)


def _reduced(sums_NGL2T: Tensor, offset_NG: Tensor, weight_NTG: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of offset and weight: sum_t W (far - near), and (1 - r) near + r far.

    near and far are the sums of grad[t] with x[t - b] and x[t - b - 1].
    """
    near_NGT, far_NGT = sums_NGL2T.sum(dim=2).unbind(2)
    part_NG1 = (offset_NG - offset_NG.floor())[..., None]
    weight_NGT = weight_NTG.transpose(1, 2)
    dweight_NGT = (1 - part_NG1) * near_NGT + part_NG1 * far_NGT
    return (weight_NGT * (far_NGT - near_NGT)).sum(dim=2), dweight_NGT.transpose(1, 2).contiguous()


@triton.jit
def _taps(offset, frames, ACC: tl.constexpr):  # type: ignore[no-untyped-def]
    """Floor b of an offset, cut to what lies beyond the clip, and the rest r."""
    offset = offset.to(ACC)
    base = tl.floor(offset)
    part = offset - base  # NaN for an infinite offset
    base = tl.minimum(tl.maximum(base, -frames - 1.0), frames + 0.0)
    return tl.where(base == base, base, 0.0).to(tl.int32), part


@triton.jit
def _piece(  # type: ignore[no-untyped-def]
    frames, length, frame_stride, group_stride, run_stride, RUN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Times (ROWS, 1), where the video's group starts, element offsets and mask (1, BLOCK)."""
    time = tl.arange(0, ROWS)[:, None]
    start = tl.program_id(2).to(tl.int64) * frames * frame_stride + tl.program_id(1) * group_stride
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    if RUN == 0:
        place = element
    else:
        place = element // RUN * run_stride + element % RUN
    return time, start, place, element < length


@triton.jit
def _rows(pointer, time, frames, frame_stride, place, mask, ACC: tl.constexpr):  # type: ignore[no-untyped-def]
    """The piece at times (ROWS, 1), zero outside the clip."""
    inside = (time >= 0) & (time < frames)
    at = time.to(tl.int64) * frame_stride + place
    return tl.load(pointer + at, mask=inside & mask, other=0.0).to(ACC)


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    x, out, offset, weight, frames, groups, length, frame_stride, group_stride, run_stride,
    RUN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out[t] = W[t] * ((1 - r) * x[t - b] + r * x[t - b - 1])."""
    g, n = tl.program_id(1), tl.program_id(2)
    time, start, place, mask = _piece(
        frames, length, frame_stride, group_stride, run_stride, RUN, ROWS, BLOCK
    )
    base, part = _taps(tl.load(offset + n * groups + g), frames, ACC)
    near = _rows(x + start, time - base, frames, frame_stride, place, mask, ACC)
    far = _rows(x + start, time - base - 1, frames, frame_stride, place, mask, ACC)
    inside = time < frames
    factor = tl.load(weight + (n * frames + time) * groups + g, mask=inside, other=0.0).to(ACC)
    y = factor * ((1 - part) * near + part * far)
    at = time.to(tl.int64) * frame_stride + place
    tl.store(out + start + at, y.to(out.dtype.element_ty), mask=inside & mask)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    gradient, x, dx, offset, weight, sums, frames, groups, length, frame_stride, group_stride,
    run_stride, RUN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
    NEED_X: tl.constexpr, NEED_HAT: tl.constexpr,
):  # fmt: skip
    """The adjoint: W[s + b] (1 - r) grad[s + b] + W[s + b + 1] r grad[s + b + 1] is dx[s].

    Also the sums of x[s] with these two gradients, filed under the time of the gradient.
    """
    g, n = tl.program_id(1), tl.program_id(2)
    time, start, place, mask = _piece(
        frames, length, frame_stride, group_stride, run_stride, RUN, ROWS, BLOCK
    )
    base, part = _taps(tl.load(offset + n * groups + g), frames, ACC)
    near, far = time + base, time + base + 1
    near_grad = _rows(gradient + start, near, frames, frame_stride, place, mask, ACC)
    far_grad = _rows(gradient + start, far, frames, frame_stride, place, mask, ACC)
    near_in, far_in = (near >= 0) & (near < frames), (far >= 0) & (far < frames)
    if NEED_X:
        factor = weight + n * frames * groups + g
        near_weight = tl.load(factor + near * groups, mask=near_in, other=0.0).to(ACC)
        far_weight = tl.load(factor + far * groups, mask=far_in, other=0.0).to(ACC)
        found = (1 - part) * near_weight * near_grad + part * far_weight * far_grad
        at = time.to(tl.int64) * frame_stride + place
        tl.store(dx + start + at, found.to(dx.dtype.element_ty), mask=(time < frames) & mask)
    if NEED_HAT:
        value = _rows(x + start, time, frames, frame_stride, place, mask, ACC)
        piece = (n * groups + g) * tl.num_programs(0) + tl.program_id(0)
        slot = sums + piece.to(tl.int64) * 2 * frames
        live = time < frames
        near_sum = tl.sum(value * near_grad, axis=1, keep_dims=True)
        far_sum = tl.sum(value * far_grad, axis=1, keep_dims=True)
        tl.store(slot + near, near_sum, mask=near_in & live)
        tl.store(slot + frames + far, far_sum, mask=far_in & live)
