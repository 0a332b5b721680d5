"""Where the bins of a region sample a feature map: the coordinates shared by all poolings.

A bin (i, j) of a region reads samples^2 points. Along one axis, with a = where the region begins,
E = its extent and b = E / size, all in pixels of the map, sample t of bin j with offset o lies at

    u = a + j b + gamma o E + step_t b.

`aligned` is the sampler of mmcv's deform_roi_pool: a = s x1 - 1/2, E = s (x2 - x1), samples at the
centres of their shares, step_t = (t + 1/2) / samples. A sample with u < -1 or u > W adds nothing
but is counted; others are clamped to the map. `torchvision` (a = s x1, E at least 1) and
`mmdet_v1` (a = s x1, end s (x2 + 1), E at least 0) are the un-aligned RoIAligns of torchvision and
of mmdetection before version 2; they share its rule at the border.
`legacy` is what Sense-X/TSD runs (the DCN v1 kernel): with r() rounding half away from zero,
a = s r(x1) - 1/2, E = max(s (r(x2) + 1) - 1/2 - a, 0.1), step_t = t / samples. Only samples with
-1/2 <= u <= W - 1/2 count, and the mean is over those that count.

Validity, clamping and bilinear weights factor over the two axes, so an axis is all there is here.

Letters: R regions, 2 = (x, y), T samples of a bin along an axis, P bins of a side, L levels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SAMPLERS = ("aligned", "legacy")
MODES = ("aligned", "torchvision", "mmdet_v1")


class Settings(NamedTuple):
    """What a pooling is asked for besides its tensors."""

    size: int
    samples: int
    gamma: float
    mode: str


class Axis(NamedTuple):
    """Samples of bins along one axis, all of one shape.

    Attributes:
        low: int32 index of the lower neighbour.
        high: int32 index of the upper neighbour.
        part: weight of the upper neighbour; the lower one has 1 - part.
        live: 1 where the sample reads the map, else 0.
        slope: the derivative of `part` by the offset: gamma E, or 0 where the sample was clamped
            or does not read the map.
    """

    low: Tensor
    high: Tensor
    part: Tensor
    live: Tensor
    slope: Tensor


def axes(
    roi_R5: Tensor, table_R4: Tensor, offset_R2PP: Tensor | None, settings: Settings
) -> tuple[Axis, Axis]:
    """Samples of all bins along x and y, (T, R, 1 or P, 1 or P).

    A side is 1 where all bins of it have the same samples: without offsets, or with one offset.

    Args:
        roi_R5: regions, in the type of the coordinates.
        table_R4: (height, width, start, stride) of each region's map, or (1, 4) for all.
        offset_R2PP: (R, 2, P, P), (R, 2, 1, 1) or None.
        settings: size, samples, gamma and mode.
    """
    size, legacy = settings.size, settings.mode == "legacy"
    start_R2, extent_R2 = _extents(roi_R5, table_R4[:, 3:], settings.mode)
    index_P = torch.arange(size, device=roi_R5.device, dtype=roi_R5.dtype)
    step_T111 = _steps(settings.samples, legacy, roi_R5)[:, None, None, None]
    found = []
    for axis in (0, 1):
        start_R11, extent_R11 = (x[:, axis, None, None] for x in (start_R2, extent_R2))
        bin_P = index_P if axis == 0 else index_P[:, None]
        u = start_R11 + (bin_P + step_T111) * (extent_R11 / size)
        unit_R11 = settings.gamma * extent_R11
        if offset_R2PP is not None:
            u = u + unit_R11 * offset_R2PP[:, axis]
        found.append(_read(u, table_R4[:, 1 - axis, None, None], unit_R11, legacy))
    return found[0], found[1]


def share(x: Axis, y: Axis, settings: Settings) -> Tensor:
    """Weight of one sample of a bin, (R, 1 or P, 1 or P): 1 over the number that is counted."""
    if settings.mode != "legacy":
        return x.live.new_full((1, 1, 1), 1 / settings.samples**2)
    return 1 / (x.live.sum(0) * y.live.sum(0)).clamp(min=1)


def _extents(roi_R5: Tensor, stride_R1: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """Where regions begin and how far they reach, both (R, 2), in pixels of their map."""
    scale_R1 = 1 / stride_R1.to(roi_R5.dtype)
    first_R2, last_R2 = roi_R5[:, 1:3], roi_R5[:, 3:5]
    if mode == "legacy":
        start_R2 = _round(first_R2) * scale_R1 - 0.5
        return start_R2, ((_round(last_R2) + 1) * scale_R1 - 0.5 - start_R2).clamp(min=0.1)
    if mode == "aligned":
        return first_R2 * scale_R1 - 0.5, last_R2 * scale_R1 - first_R2 * scale_R1
    if mode == "torchvision":
        extent_R2 = (last_R2 * scale_R1 - first_R2 * scale_R1).clamp(min=1)
    else:
        extent_R2 = ((last_R2 + 1) * scale_R1 - first_R2 * scale_R1).clamp(min=0)
    return first_R2 * scale_R1, extent_R2


def _round(x: Tensor) -> Tensor:
    """Half away from zero, as the C function; torch.round rounds half to even."""
    return x.sign() * (x.abs() + 0.5).floor()


def _steps(samples: int, legacy: bool, like: Tensor) -> Tensor:
    """Places of the samples in a bin, (T,), as fractions of the bin."""
    step_T = torch.arange(samples, device=like.device, dtype=like.dtype)
    return (step_T if legacy else step_T + 0.5) / samples


def _read(u: Tensor, length: Tensor, unit: Tensor, legacy: bool) -> Axis:
    """Neighbours and weights of samples at `u` on a map of `length` pixels."""
    last = (length - 1).to(u.dtype)
    reach = 0.5 if legacy else 1.0
    live = (u >= -reach) & (u <= last + reach)
    inside = torch.minimum(u.clamp(min=0), last)
    floor = inside.floor()
    high = inside.ceil() if legacy else torch.minimum(floor + 1, last)
    moves = live & (u > 0) & (u < last)
    if legacy:
        moves &= high > floor
    return Axis(floor.int(), high.int(), inside - floor, live.to(u.dtype), moves * unit)
