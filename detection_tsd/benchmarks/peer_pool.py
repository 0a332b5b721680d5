"""Region pooling the usual ways, restated to be timed and compared against.

Each takes a `Pooling`, what one call of ours gets, and pools level by level, as detectors do.

Letters: B images, C channels, H W size of a map, L levels, R regions, n regions of a level, P bins
of a side, T samples of a bin along an axis, 5 = (image index, x1, y1, x2, y2), 2 = (x, y).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F

SIZE, SAMPLES, GAMMA = 7, 2, 0.1


class Pooling(NamedTuple):
    """Maps (B, C, H, W) with their strides, regions with their levels, and raw offsets."""

    maps: list[Tensor]
    strides: tuple[int, ...]
    roi_R5: Tensor
    level_R: Tensor
    offset: Tensor | None


OfLevel = Callable[[Tensor, Tensor, float, Tensor | None], Tensor]


def plain_roi_align(case: Pooling) -> Tensor:
    """RoIAlign of torchvision, which knows no offsets."""
    return _by_level(case, _roi_align)


def shifted_roi_align(case: Pooling) -> Tensor:
    """One offset for all bins, (R, 2, 1, 1): torchvision's RoIAlign of the moved boxes.

    It gives no gradient to the offset.
    """
    assert case.offset is not None
    box_R4 = case.roi_R5[:, 1:]
    shift_R2 = GAMMA * case.offset.detach().flatten(1) * (box_R4[:, 2:] - box_R4[:, :2])
    moved_R5 = torch.cat([case.roi_R5[:, :1], box_R4 + shift_R2.repeat(1, 2)], dim=1)
    return _by_level(case._replace(roi_R5=moved_R5), _roi_align)


def bins_roi_align(case: Pooling) -> Tensor:
    """RoIAlign, torchvision's, of R P P boxes of one bin each; no gradient to the offset."""
    return _by_level(case, _bins_roi_align)


def grid_samples(case: Pooling) -> Tensor:
    """`torch.nn.functional.grid_sample` of all samples, image by image, and their mean.

    Samples more than a pixel outside are masked, as the border would be repeated there.
    """
    return _by_level(case, _grid_samples)


def mmcv_deform_roi_pool(case: Pooling) -> Tensor:
    """`mmcv.ops.deform_roi_pool` of each level; CUDA only."""
    operator = import_module("mmcv.ops").deform_roi_pool

    def of_level(x: Tensor, roi: Tensor, scale: float, offset: Tensor | None) -> Tensor:
        found: Tensor = operator(x, roi, offset, (SIZE, SIZE), scale, SAMPLES, GAMMA)
        return found

    return _by_level(case, of_level)


def _by_level(case: Pooling, of_level: OfLevel) -> Tensor:
    """Each level's regions at their places in the result."""
    parts, places = [], []
    for level, (x_BCHW, stride) in enumerate(zip(case.maps, case.strides, strict=True)):
        place_n = (case.level_R == level).nonzero()[:, 0]
        offset = None if case.offset is None else case.offset[place_n]
        parts.append(of_level(x_BCHW, case.roi_R5[place_n], 1 / stride, offset))
        places.append(place_n)
    return torch.cat(parts)[torch.cat(places).argsort()]


def _roi_align(x_BCHW: Tensor, roi_n5: Tensor, scale: float, _: Tensor | None) -> Tensor:
    return torchvision.ops.roi_align(x_BCHW, roi_n5, SIZE, scale, SAMPLES, aligned=True)


def _bins_roi_align(x_BCHW: Tensor, roi_n5: Tensor, scale: float, offset: Tensor | None) -> Tensor:
    first_n2, side_n2 = roi_n5[:, 1:3], roi_n5[:, 3:5] - roi_n5[:, 1:3]
    index_P = torch.arange(SIZE, device=roi_n5.device)
    bin_PP2 = torch.stack(torch.meshgrid(index_P, index_P, indexing="xy"), dim=-1)
    start_nPP2 = first_n2[:, None, None] + bin_PP2 * (side_n2 / SIZE)[:, None, None]
    if offset is not None:
        moved = offset.detach().permute(0, 2, 3, 1)
        start_nPP2 = start_nPP2 + GAMMA * moved * side_n2[:, None, None]
    end_nPP2 = start_nPP2 + (side_n2 / SIZE)[:, None, None]
    image_nPP1 = roi_n5[:, :1, None, None].expand(-1, SIZE, SIZE, 1)
    roi_N5 = torch.cat([image_nPP1, start_nPP2, end_nPP2], dim=-1).reshape(-1, 5)
    out_NC = torchvision.ops.roi_align(x_BCHW, roi_N5, 1, scale, SAMPLES, aligned=True)
    return out_NC.view(-1, SIZE, SIZE, x_BCHW.shape[1]).permute(0, 3, 1, 2)


def _grid_samples(x_BCHW: Tensor, roi_n5: Tensor, scale: float, offset: Tensor | None) -> Tensor:
    found = x_BCHW.new_zeros(len(roi_n5), x_BCHW.shape[1], SIZE, SIZE)
    for image in range(len(x_BCHW)):
        place_n = (roi_n5[:, 0] == image).nonzero()[:, 0]
        moved = None if offset is None else offset[place_n]
        pooled = _one_image(x_BCHW[image, None], roi_n5[place_n, 1:] * scale, moved)
        found = found.index_copy(0, place_n, pooled)
    return found


def _one_image(x_1CHW: Tensor, box_n4: Tensor, offset: Tensor | None) -> Tensor:
    """Regions of one image, in pixels of the map."""
    first_n2, side_n2 = box_n4[:, :2] - 0.5, box_n4[:, 2:] - box_n4[:, :2]
    step_S = (torch.arange(SIZE * SAMPLES).to(box_n4) + 0.5) / (SIZE * SAMPLES)
    step_SS2 = torch.stack(torch.meshgrid(step_S, step_S, indexing="xy"), dim=-1)
    at_nSS2 = first_n2[:, None, None] + step_SS2 * side_n2[:, None, None]
    if offset is not None:
        repeats = SAMPLES * SIZE // offset.shape[-1]
        moved = offset.repeat_interleave(repeats, dim=2).repeat_interleave(repeats, dim=3)
        at_nSS2 = at_nSS2 + GAMMA * moved.permute(0, 2, 3, 1) * side_n2[:, None, None]
    size_2 = torch.tensor(x_1CHW.shape[:1:-1], device=box_n4.device)
    live_n1SS = ((at_nSS2 >= -1) & (at_nSS2 <= size_2)).all(dim=-1)[:, None]
    grid_1MS2 = ((2 * at_nSS2 + 1) / size_2 - 1).flatten(0, 1)[None]
    value_CnSS = F.grid_sample(
        x_1CHW, grid_1MS2, padding_mode="border", align_corners=False
    )[0].unflatten(1, (-1, SIZE * SAMPLES))  # fmt: skip
    return F.avg_pool2d(value_CnSS.transpose(0, 1) * live_n1SS, SAMPLES)
