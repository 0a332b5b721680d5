"""Fixed shift in time of TSM (arXiv 1811.08383): a part of the channels by one frame each way.

With f = fold: channels [0, f) of a frame come from the next frame, [f, 2f) from the one before,
zeros at the ends of the clip; the others stay (temporal-shift-module, X-Temporal).

Letters: N videos, T frame positions, B = N*T frames, N-major, C channels, H W size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IMPLEMENTATIONS = ("auto", "reference")


def shift(x_BCHW: Tensor, frames: int, fold: int, impl: str = "auto") -> Tensor:
    """Channels [0, fold) one frame earlier, [fold, 2 fold) one frame later; linear in `x`.

    Args:
        x_BCHW: frames of any type and memory layout; the result has the same.
        frames: T.
        fold: channels moved each way, at most C / 2.
        impl: `reference` concatenates slices, which is what a compiler or an export sees; `auto`
            writes every channel once, forward and backward.

    Raises:
        ValueError: B is no multiple of T, a fold that does not fit, an unknown `impl`.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r}: need one of {', '.join(IMPLEMENTATIONS)}")
    if x_BCHW.dim() != 4:
        raise ValueError(f"x has shape {tuple(x_BCHW.shape)}, need (B, C, H, W)")
    if frames < 1 or x_BCHW.shape[0] % frames:
        raise ValueError(f"batch of {x_BCHW.shape[0]} frames is no multiple of frames={frames}")
    if not 0 <= 2 * fold <= x_BCHW.shape[1]:
        raise ValueError(f"fold={fold}: need 0 to {x_BCHW.shape[1] // 2}, half the channels")
    if impl == "reference" or torch.compiler.is_compiling():
        return _reference(x_BCHW, frames, fold)
    shifted: Tensor = _Shift.apply(x_BCHW, frames, fold, 1)
    return shifted


def _reference(x_BCHW: Tensor, frames: int, fold: int) -> Tensor:
    x_NTCHW = x_BCHW.unflatten(0, (-1, frames))
    earlier, later, rest = x_NTCHW.split([fold, fold, x_BCHW.shape[1] - 2 * fold], dim=2)
    earlier = torch.cat([earlier[:, 1:], torch.zeros_like(earlier[:, :1])], dim=1)
    later = torch.cat([torch.zeros_like(later[:, :1]), later[:, :-1]], dim=1)
    return torch.cat([earlier, later, rest], dim=2).flatten(0, 1)


class _Shift(torch.autograd.Function):
    """`step` 1 is the shift, -1 its adjoint, which is the shift the other way round."""

    @staticmethod
    def forward(ctx: Any, x_BCHW: Tensor, frames: int, fold: int, step: int) -> Tensor:
        ctx.settings = frames, fold, -step
        out_BCHW = torch.empty_like(x_BCHW)
        x, out = (tensor.unflatten(0, (-1, frames)) for tensor in (x_BCHW, out_BCHW))
        first, second = slice(0, fold), slice(fold, 2 * fold)
        earlier, later = (first, second) if step > 0 else (second, first)
        out[:, :-1, earlier] = x[:, 1:, earlier]
        out[:, -1:, earlier] = 0
        out[:, 1:, later] = x[:, :-1, later]
        out[:, :1, later] = 0
        out[:, :, 2 * fold :] = x[:, :, 2 * fold :]
        return out_BCHW

    @staticmethod
    def backward(ctx: Any, grad_BCHW: Tensor) -> tuple[Tensor, None, None, None]:
        return _Shift.apply(grad_BCHW, *ctx.settings), None, None, None
