"""CUDA kernels of deformable region pooling; imported only where they run, since they need triton.

One program is one bin of one region. It finds the coordinates once and then works on vectors of
channels, which lie together in memory. The gradients of the bin's offset are sums over channels
that the program makes by itself; gradients of pixels are added atomically, in no fixed order.

Letters: R regions, N bins of a region, C channels, L levels, Q pixels of the pyramid, 5 = (image
index, x1, y1, x2, y2), 2 = (x, y).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from detection_tsd.ops.sampling import Settings

BLOCK = 256  # channels that a program holds at a time
MODES = {"aligned": 0, "torchvision": 1, "mmdet_v1": 2, "legacy": 3}


def check(flat: Tensor) -> None:
    """Raise ValueError unless the kernels can read it: on CUDA, or under triton's interpreter."""
    if not (flat.is_cuda or triton.knobs.runtime.interpret):
        raise ValueError(f"impl='triton': the maps are on {flat.device}, need CUDA")


def pool_triton(
    flat_QC: Tensor, table_L4: Tensor, roi_R5: Tensor, level_R: Tensor, offset_R2PP: Tensor | None,
    settings: Settings,
) -> Tensor:  # fmt: skip
    """Pooled features (R, C, P, P) of the pyramid's table of pixels."""
    check(flat_QC)
    (count, bins), channels = (len(roi_R5), settings.size**2), flat_QC.shape[1]
    out_RNC = flat_QC.new_empty(count, bins, channels)
    if out_RNC.numel():
        arguments = _arguments(flat_QC, table_L4, roi_R5, level_R, offset_R2PP, settings)
        with torch.cuda.device_of(flat_QC):
            _forward_kernel[(count * bins,)](out_RNC, **arguments)
    out_RCN = out_RNC.transpose(1, 2).contiguous()
    return out_RCN.view(count, channels, settings.size, settings.size)


def pool_triton_backward(
    grad_RCPP: Tensor, flat_QC: Tensor, table_L4: Tensor, roi_R5: Tensor, level_R: Tensor,
    offset_R2PP: Tensor | None, settings: Settings, need_flat: bool, need_offset: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the pixels and of the offset; what is not needed comes back empty.

    Raises:
        RuntimeError: the gradient of pixels under `torch.use_deterministic_algorithms(True)`.
    """
    check(flat_QC)
    if need_flat and torch.are_deterministic_algorithms_enabled():
        raise RuntimeError("impl='triton' adds gradients in no fixed order: use auto or bags")
    size, count = settings.size, len(roi_R5)
    need_offset = need_offset and offset_R2PP is not None
    grad_RNC = grad_RCPP.flatten(2).transpose(1, 2).contiguous()
    dflat_QC = torch.zeros_like(flat_QC) if need_flat else flat_QC.new_empty(0)
    doffset_R2PP = flat_QC.new_zeros((count, 2, size, size) if need_offset else 0)
    if grad_RNC.numel():
        arguments = _arguments(flat_QC, table_L4, roi_R5, level_R, offset_R2PP, settings)
        with torch.cuda.device_of(flat_QC):
            _backward_kernel[(count * size * size,)](
                grad_RNC, dflat_QC, doffset_R2PP, **arguments, NEED_FLAT=need_flat,
                NEED_OFFSET=need_offset,
            )  # fmt: skip
    if need_offset and offset_R2PP is not None:  # one offset for all bins: its gradient is a sum
        doffset_R2PP = doffset_R2PP.sum_to_size(offset_R2PP.shape)
    return dflat_QC, doffset_R2PP


def _arguments(
    flat_QC: Tensor, table_L4: Tensor, roi_R5: Tensor, level_R: Tensor, offset_R2PP: Tensor | None,
    settings: Settings,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of both kernels by name."""
    channels, moved = flat_QC.shape[1], offset_R2PP is not None
    offset = roi_R5 if offset_R2PP is None else offset_R2PP
    return {
        "flat": flat_QC.contiguous(), "table": table_L4, "roi": roi_R5.contiguous(),
        "level": level_R.contiguous(), "offset": offset.contiguous(), "gamma": settings.gamma,
        "channels": channels, "SIZE": settings.size, "SAMPLES": settings.samples,
        "MODE": MODES[settings.mode],
        "SIDE": offset_R2PP.shape[-1] if offset_R2PP is not None else 1, "MOVED": moved,
        "BLOCK": min(BLOCK, triton.next_power_of_2(channels)),
    }  # fmt: skip


@triton.jit
def _round(x):  # type: ignore[no-untyped-def]
    """Half away from zero."""
    return tl.where(x < 0, -tl.floor(0.5 - x), tl.floor(x + 0.5))


@triton.jit
def _axis(roi, column, scale, MODE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the region begins along an axis and how far it reaches; see `sampling`."""
    first, last = tl.load(roi + column), tl.load(roi + column + 2)
    if MODE == 3:
        start = _round(first) * scale - 0.5
        extent = tl.maximum((_round(last) + 1.0) * scale - 0.5 - start, 0.1)
    elif MODE == 0:
        start = first * scale - 0.5
        extent = last * scale - first * scale
    elif MODE == 1:
        start = first * scale
        extent = tl.maximum(last * scale - start, 1.0)
    else:
        start = first * scale
        extent = tl.maximum((last + 1.0) * scale - start, 0.0)
    return start, extent


@triton.jit
def _read(u, length, MODE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Lower and upper neighbour, weight of the upper, whether read and whether it moves."""
    last = (length - 1).to(u.dtype)
    if MODE == 3:
        reach = 0.5
    else:
        reach = 1.0
    live = (u >= -reach) & (u <= last + reach)
    inside = tl.minimum(tl.maximum(u, 0.0), last)
    low = tl.floor(inside)
    moves = live & (u > 0) & (u < last)
    if MODE == 3:
        high = tl.ceil(inside)
        moves = moves & (high > low)
    else:
        high = tl.minimum(low + 1.0, last)
    part = inside - low
    return low.to(tl.int64), high.to(tl.int64), part, live.to(u.dtype), moves.to(u.dtype)


@triton.jit
def _counted(u, step, length, SAMPLES: tl.constexpr, MODE: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many samples along an axis that begins at `u` count."""
    count = u * 0.0 + SAMPLES
    if MODE == 3:
        count = u * 0.0
        for t in range(SAMPLES):
            at = u + t * step
            count += ((at >= -0.5) & (at <= (length - 1).to(u.dtype) + 0.5)).to(u.dtype)
    return count


@triton.jit
def _bin(  # type: ignore[no-untyped-def]
    table, roi, level, offset, gamma, SIZE: tl.constexpr, SAMPLES: tl.constexpr,
    MODE: tl.constexpr, SIDE: tl.constexpr, MOVED: tl.constexpr,
):  # fmt: skip
    """This program's bin: first pixel of its image, size of the map, first sample, steps, units."""
    program = tl.program_id(0)
    region, bin_index = program // (SIZE * SIZE), program % (SIZE * SIZE)
    row, column = bin_index // SIZE, bin_index % SIZE
    roi += region.to(tl.int64) * 5
    entry = table + tl.load(level + region).to(tl.int64) * 4
    height, width = tl.load(entry), tl.load(entry + 1)
    first = tl.load(entry + 2) + tl.load(roi).to(tl.int64) * height * width
    scale = 1.0 / tl.load(entry + 3).to(roi.dtype.element_ty)
    x, extent_x = _axis(roi, 1, scale, MODE)
    y, extent_y = _axis(roi, 2, scale, MODE)
    step_x, step_y = extent_x / SIZE / SAMPLES, extent_y / SIZE / SAMPLES
    x += column * (extent_x / SIZE)
    y += row * (extent_y / SIZE)
    unit_x, unit_y = gamma * extent_x, gamma * extent_y
    if MOVED:
        place = region.to(tl.int64) * (2 * SIDE * SIDE)
        if SIDE > 1:
            place += bin_index
        x += unit_x * tl.load(offset + place)
        y += unit_y * tl.load(offset + place + SIDE * SIDE)
    if MODE != 3:
        x += 0.5 * step_x
        y += 0.5 * step_y
    return first, height, width, x, y, step_x, step_y, unit_x, unit_y


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    out, flat, table, roi, level, offset, gamma, channels, SIZE: tl.constexpr,
    SAMPLES: tl.constexpr, MODE: tl.constexpr, SIDE: tl.constexpr, MOVED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean of the samples of one bin."""
    first, height, width, x, y, step_x, step_y, _, _ = _bin(
        table, roi, level, offset, gamma, SIZE, SAMPLES, MODE, SIDE, MOVED
    )
    counted = _counted(x, step_x, width, SAMPLES, MODE) * _counted(y, step_y, height, SAMPLES, MODE)
    share = 1.0 / tl.maximum(counted, 1.0)
    target = out + tl.program_id(0).to(tl.int64) * channels
    for start in range(0, channels, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        mask = channel < channels
        total = tl.zeros((BLOCK,), dtype=flat.dtype.element_ty)
        for ty in range(SAMPLES):
            y0, y1, part_y, live_y, _ = _read(y + ty * step_y, height, MODE)
            line0, line1 = first + y0 * width, first + y1 * width
            for tx in range(SAMPLES):
                x0, x1, part_x, live_x, _ = _read(x + tx * step_x, width, MODE)
                weight = live_y * live_x * share
                read = channel < tl.where(weight > 0, channels, 0)  # nothing where it adds nothing
                v00 = tl.load(flat + (line0 + x0) * channels + channel, mask=read, other=0.0)
                v01 = tl.load(flat + (line0 + x1) * channels + channel, mask=read, other=0.0)
                v10 = tl.load(flat + (line1 + x0) * channels + channel, mask=read, other=0.0)
                v11 = tl.load(flat + (line1 + x1) * channels + channel, mask=read, other=0.0)
                upper = v00 + part_x * (v01 - v00)
                lower = v10 + part_x * (v11 - v10)
                total += weight * (upper + part_y * (lower - upper))
        tl.store(target + channel, total, mask=mask)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    gradient, dflat, doffset, flat, table, roi, level, offset, gamma, channels,
    SIZE: tl.constexpr, SAMPLES: tl.constexpr, MODE: tl.constexpr, SIDE: tl.constexpr,
    MOVED: tl.constexpr, BLOCK: tl.constexpr, NEED_FLAT: tl.constexpr, NEED_OFFSET: tl.constexpr,
):  # fmt: skip
    """Adds one bin's gradient to its pixels and stores the gradients of its two offsets."""
    first, height, width, x, y, step_x, step_y, unit_x, unit_y = _bin(
        table, roi, level, offset, gamma, SIZE, SAMPLES, MODE, SIDE, MOVED
    )
    counted = _counted(x, step_x, width, SAMPLES, MODE) * _counted(y, step_y, height, SAMPLES, MODE)
    share = 1.0 / tl.maximum(counted, 1.0)
    source = gradient + tl.program_id(0).to(tl.int64) * channels
    sum_x, sum_y = x * 0.0, x * 0.0
    for start in range(0, channels, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        mask = channel < channels
        g = tl.load(source + channel, mask=mask, other=0.0) * share
        for ty in range(SAMPLES):
            y0, y1, part_y, live_y, moves_y = _read(y + ty * step_y, height, MODE)
            line0, line1 = first + y0 * width, first + y1 * width
            for tx in range(SAMPLES):
                x0, x1, part_x, live_x, moves_x = _read(x + tx * step_x, width, MODE)
                live = live_y * live_x
                read = channel < tl.where(live > 0, channels, 0)  # nothing where it adds nothing
                at00, at01 = (line0 + x0) * channels + channel, (line0 + x1) * channels + channel
                at10, at11 = (line1 + x0) * channels + channel, (line1 + x1) * channels + channel
                if NEED_FLAT:
                    upper, lower = (1 - part_y) * g, part_y * g
                    tl.atomic_add(dflat + at00, (1 - part_x) * upper, mask=read, sem="relaxed")
                    tl.atomic_add(dflat + at01, part_x * upper, mask=read, sem="relaxed")
                    tl.atomic_add(dflat + at10, (1 - part_x) * lower, mask=read, sem="relaxed")
                    tl.atomic_add(dflat + at11, part_x * lower, mask=read, sem="relaxed")
                if NEED_OFFSET:
                    v00 = tl.load(flat + at00, mask=read, other=0.0)
                    v01 = tl.load(flat + at01, mask=read, other=0.0)
                    v10 = tl.load(flat + at10, mask=read, other=0.0)
                    v11 = tl.load(flat + at11, mask=read, other=0.0)
                    slope_x = (1 - part_y) * (v01 - v00) + part_y * (v11 - v10)
                    slope_y = (1 - part_x) * (v10 - v00) + part_x * (v11 - v01)
                    sum_x += live_y * moves_x * tl.sum(g * slope_x)
                    sum_y += live_x * moves_y * tl.sum(g * slope_y)
    if NEED_OFFSET:
        bins: tl.constexpr = SIZE * SIZE
        region, bin_index = tl.program_id(0) // bins, tl.program_id(0) % bins
        place = doffset + region.to(tl.int64) * (2 * bins) + bin_index
        tl.store(place, unit_x * sum_x)
        tl.store(place + bins, unit_y * sum_y)
