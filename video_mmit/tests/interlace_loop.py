"""Inputs of the interlacing tests, and the operator as loops."""

import math

import torch
from torch import Tensor

IMPLS = ("reference", "gather", "hat")
G, CHANNELS, FOLD = 4, 11, 8


def problem(
    frames: int = 4, videos: int = 2, size: tuple[int, int] = (2, 3), kind: str = "real"
) -> tuple[Tensor, Tensor, Tensor]:
    """Frames (B, 11, H, W), offsets (N, 4), weights (N, T, 4) in float64."""
    generator = torch.Generator().manual_seed(frames)
    x = torch.randn(videos * frames, CHANNELS, *size, generator=generator).double()
    offset = torch.rand(videos, G, generator=generator).double() * 4 - 2
    if kind == "beyond":
        offset = offset * frames * 3
    if kind == "integer":
        offset = offset.round()
    weight = torch.rand(videos, frames, G, generator=generator).double() * 2
    return x, offset, weight


def loop(x: Tensor, offset: Tensor, weight: Tensor, fold: int = FOLD) -> Tensor:
    """The floor form, element by element over videos, times and channels."""
    videos, frames, groups = weight.shape
    u = x.double().view(videos, frames, *x.shape[1:])
    out = u.clone()
    for n in range(videos):
        for t in range(frames):
            for c in range(fold):
                g = c // (fold // groups)
                o = offset[n, g].item()
                base = math.floor(o)
                value = torch.zeros(x.shape[2:], dtype=torch.float64)
                if 0 <= t - base < frames:
                    value += (1 - (o - base)) * u[n, t - base, c]
                if 0 <= t - base - 1 < frames:
                    value += (o - base) * u[n, t - base - 1, c]
                out[n, t, c] = weight[n, t, g].item() * value
    return out.view(x.shape)


def variants() -> dict[str, Tensor]:
    """The same frames in several layouts, (8, 11, 4, 5)."""
    x = problem(4, size=(4, 5))[0].float()
    wide = torch.zeros(8, 22, 4, 10)
    wide[:, ::2, :, ::2] = x
    return {
        "NCHW": x,
        "channels_last": x.to(memory_format=torch.channels_last),
        "every second": wide[:, ::2, :, ::2],
        "frames of a longer batch": torch.cat([x, x])[:8],
        "channels of a wider map": torch.cat([x, x], dim=1)[:, :11],
        "H and W swapped": x.transpose(2, 3).contiguous().transpose(2, 3),
    }
