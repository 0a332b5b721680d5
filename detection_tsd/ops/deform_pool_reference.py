"""Deformable region pooling in plain operators: the definition, and what an export contains.

Every sample of every bin is gathered and weighted; autograd finds the gradients. Regions are
taken in pieces, so that a forward pass needs little memory at a time.

Letters: R regions, 2 = (x, y), P bins of a side (or 1 where all are alike), T samples of a bin
along an axis, C channels, L levels, Q pixels of the pyramid.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from detection_tsd.ops import sampling
from detection_tsd.ops.sampling import Axis, Settings

PIECE = 1 << 24  # elements of one gathered tensor


def pool_reference(
    flat_QC: Tensor, table_L4: Tensor, roi_R5: Tensor, level_R: Tensor, offset_R2PP: Tensor | None,
    settings: Settings,
) -> Tensor:  # fmt: skip
    """Pooled features (R, C, P, P), differentiable in `flat` and `offset`.

    Arguments are those of `deform_pool` after its checks: `flat` and `table` as `Pyramid` has
    them, regions and offsets in the type of `flat`.
    """
    if torch.compiler.is_exporting():  # a loop would fix the number of regions
        return _pool(flat_QC, table_L4, roi_R5, level_R, offset_R2PP, settings)
    step = max(1, PIECE // max(1, settings.size**2 * flat_QC.shape[1]))
    parts = []
    for start in range(0, max(roi_R5.shape[0], 1), step):
        part = slice(start, start + step)
        moved = None if offset_R2PP is None else offset_R2PP[part]
        parts.append(_pool(flat_QC, table_L4, roi_R5[part], level_R[part], moved, settings))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _pool(
    flat_QC: Tensor, table_L4: Tensor, roi_R5: Tensor, level_R: Tensor, offset_R2PP: Tensor | None,
    settings: Settings,
) -> Tensor:  # fmt: skip
    """One piece of `pool_reference`."""
    table_R4 = table_L4[level_R]
    height_R, width_R, start_R, _ = table_R4.unbind(1)
    image_R11 = (start_R + roi_R5[:, 0].long() * height_R * width_R)[:, None, None]
    fixed = None if offset_R2PP is None else offset_R2PP.detach()
    x, y = sampling.axes(roi_R5, table_R4, fixed, settings)
    if offset_R2PP is not None:
        x, y = _moving(x, offset_R2PP[:, 0]), _moving(y, offset_R2PP[:, 1])
    shape = (roi_R5.shape[0], settings.size, settings.size)
    out_RPPC = flat_QC.new_zeros(*shape, flat_QC.shape[1])
    for row_RPP, weight_y in _neighbours(y):
        for column_RPP, weight_x in _neighbours(x):
            at_RPP = (image_R11 + row_RPP * width_R[:, None, None] + column_RPP).expand(shape)
            out_RPPC = out_RPPC + (weight_y * weight_x)[..., None] * flat_QC[at_RPP]
    return (out_RPPC * sampling.share(x, y, settings)[..., None]).permute(0, 3, 1, 2)


def _moving(axis: Axis, offset_RPP: Tensor) -> Axis:
    """The axis with the gradient of the offsets in `part`, whose value stays."""
    return axis._replace(part=axis.part + axis.slope * (offset_RPP - offset_RPP.detach()))


def _neighbours(axis: Axis) -> Iterator[tuple[Tensor, Tensor]]:
    """Index and weight, (R, P, P), of both neighbours of every sample."""
    for low, high, part, live, _ in zip(*axis, strict=True):
        yield low.long(), live * (1 - part)
        yield high.long(), live * part
