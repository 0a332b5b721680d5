"""Pyramid level of each region (arXiv 2003.07540 follows FPN, arXiv 1612.03144, equation 1).

Letters: R regions, 5 = (image index, x1, y1, x2, y2).
"""

from __future__ import annotations

import torch
from torch import Tensor


def roi_levels(roi_R5: Tensor, levels: int, base: float = 56.0, plus: float = 0.0) -> Tensor:
    """Level clip(floor(log2(sqrt(w h) / base + 1e-6)), 0, levels - 1) of each region.

    With the default a region of 112 x 112 pixels is the smallest of level 1, 224 x 224 of level 2
    and 448 x 448 of level 3, as in mmdetection. The comparison is made on areas with the smallest
    sides that the formula lets pass, so no rounding of a logarithm decides at a boundary.

    Args:
        roi_R5: regions in pixels of the network's input.
        levels: maps that regions may read.
        base: half of the side at which level 1 begins.
        plus: 1.0 where boxes name their last pixel, so that a width is x2 - x1 + 1.

    Returns:
        int64 (R,). A region without area, or with corners in the wrong order, is at level 0.

    Raises:
        ValueError: `levels` or `base` is not positive, or the shape is not (R, 5).
    """
    if levels < 1 or not base > 0:
        raise ValueError(f"levels={levels}, base={base}: need positive numbers")
    if roi_R5.dim() != 2 or roi_R5.shape[1] != 5:
        raise ValueError(f"roi has shape {tuple(roi_R5.shape)}, need (R, 5)")
    box_R4 = roi_R5[:, 1:].detach().double()
    side_R2 = (box_R4[:, 2:] - box_R4[:, :2] + plus).clamp_(min=0)
    area_R = side_R2[:, 0] * side_R2[:, 1]
    level_R = torch.zeros(roi_R5.shape[0], dtype=torch.int64, device=roi_R5.device)
    for level in range(1, levels):
        smallest = base * (2.0**level - 1e-6)
        level_R += area_R >= smallest * smallest
    return level_R
