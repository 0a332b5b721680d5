"""Region pooling by loops over bins, samples and corners, from the definition, in float64.

Letters: B images, C channels, H W size of a map, R regions, P bins of a side.
"""

import math

import numpy as np
import torch
from torch import Tensor

from detection_tsd.ops.levels import roi_levels
from detection_tsd.ops.pyramid import Pyramid


def round_half_away(x: float) -> float:
    return math.copysign(math.floor(abs(x) + 0.5), x)


def extent(first: float, last: float, scale: float, mode: str) -> tuple[float, float]:
    """Where a region begins along an axis, and how far it reaches."""
    if mode == "legacy":
        start = round_half_away(first) * scale - 0.5
        return start, max((round_half_away(last) + 1) * scale - 0.5 - start, 0.1)
    if mode == "aligned":
        return first * scale - 0.5, (last - first) * scale
    if mode == "torchvision":
        return first * scale, max((last - first) * scale, 1.0)
    return first * scale, max((last + 1 - first) * scale, 0.0)


def sample(x_CHW: np.ndarray, v: float, u: float, legacy: bool) -> np.ndarray | None:
    """Bilinear value at row v and column u; None where the sample does not count."""
    height, width = x_CHW.shape[1:]
    if legacy:
        if not (-0.5 <= u <= width - 0.5 and -0.5 <= v <= height - 0.5):
            return None
        u, v = min(max(u, 0), width - 1), min(max(v, 0), height - 1)
        x0, x1, y0, y1 = math.floor(u), math.ceil(u), math.floor(v), math.ceil(v)
    else:
        if u < -1 or u > width or v < -1 or v > height:
            return np.zeros(len(x_CHW))
        u, v = max(u, 0), max(v, 0)
        x0, y0 = int(u), int(v)
        x1, y1 = x0 + 1, y0 + 1
        if x0 >= width - 1:
            x0 = x1 = u = width - 1
        if y0 >= height - 1:
            y0 = y1 = v = height - 1
    upper = x_CHW[:, y0, x0] * (1 - (u - x0)) + x_CHW[:, y0, x1] * (u - x0)
    lower = x_CHW[:, y1, x0] * (1 - (u - x0)) + x_CHW[:, y1, x1] * (u - x0)
    return upper * (1 - (v - y0)) + lower * (v - y0)


def pool_loop(
    maps: list[np.ndarray], strides: tuple[int, ...], roi_R5: np.ndarray, level_R: np.ndarray,
    offset_R2PP: np.ndarray, samples: int, gamma: float, mode: str,
) -> np.ndarray:  # fmt: skip
    """Pooled features (R, C, P, P) of maps (B, C, H, W)."""
    size, legacy = offset_R2PP.shape[-1], mode == "legacy"
    out = np.zeros((len(roi_R5), maps[0].shape[1], size, size))
    for r, (image, x1, y1, x2, y2) in enumerate(roi_R5):
        x_CHW, scale = maps[level_R[r]][int(image)], 1 / strides[level_R[r]]
        start_x, width = extent(x1, x2, scale, mode)
        start_y, height = extent(y1, y2, scale, mode)
        for i in range(size):
            for j in range(size):
                found = []
                for ty in range(samples):
                    for tx in range(samples):
                        step_y, step_x = (t if legacy else t + 0.5 for t in (ty, tx))
                        u = start_x + (j + step_x / samples) * width / size
                        v = start_y + (i + step_y / samples) * height / size
                        u += gamma * offset_R2PP[r, 0, i, j] * width
                        v += gamma * offset_R2PP[r, 1, i, j] * height
                        found.append(sample(x_CHW, v, u, legacy))
                counted = [value for value in found if value is not None]
                out[r, :, i, j] = sum(counted) / len(counted) if counted else 0
    return out


def problem(
    seed: int = 0, channels: int = 3, size: int = 3, regions: int = 24, images: int = 2
) -> tuple[Pyramid, Tensor, Tensor, Tensor]:
    """Maps of 17 x 23 and 8 x 11 pixels, regions of all sorts with their levels, and offsets.

    Among the regions are some that reach beyond the maps or lie outside, one below a pixel, one
    without area and one whose corners are in the wrong order; all in float64.
    """
    maker = torch.Generator().manual_seed(seed)
    maps = [
        torch.randn(images, channels, *hw, generator=maker).double() for hw in ((17, 23), (8, 11))
    ]
    corner_R2 = torch.rand(regions, 2, generator=maker) * torch.tensor([110.0, 90.0]) - 20
    side_R2 = 2 * 40 ** torch.rand(regions, 2, generator=maker)
    side_R2[0], side_R2[1], side_R2[2] = 0.3, 0.0, -5.0
    corner_R2[3] = torch.tensor([-90.0, -80.0])
    corner_R2[4], side_R2[4] = torch.tensor([0.0, 0.0]), torch.tensor([92.0, 68.0])
    corner_R2[5], side_R2[5] = torch.tensor([3.5, -2.5]), torch.tensor([8.0, 6.0])
    image_R1 = torch.randint(0, images, (regions, 1), generator=maker)
    roi_R5 = torch.cat([image_R1, corner_R2, corner_R2 + side_R2], dim=1).double()
    offset = torch.randn(regions, 2, size, size, generator=maker).double()
    return Pyramid(maps, (4, 8), 18.0), roi_R5, roi_levels(roi_R5, 2, 18.0), offset
