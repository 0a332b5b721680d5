"""Temporal interlacing the usual ways, restated to be timed and compared against.

Letters: N videos, T frame positions, B = N*T frames, N-major, C channels, H W size, G groups, c
channels of a group.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class IntegerShift(torch.autograd.Function):
    """Groups (N, T, G, c, H, W) moved by whole frames (N, G); the gradient goes the other way.

    What the CUDA operator of deepcs233/TIN and X-Temporal does, as copies of slices.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, shift_NG: Tensor) -> Tensor:
        ctx.shift_NG = shift_NG
        return _moved(u, shift_NG)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _moved(grad, -ctx.shift_NG), None


def _moved(u_NTGcHW: Tensor, shift_NG: Tensor) -> Tensor:
    frames = u_NTGcHW.shape[1]
    moved = torch.zeros_like(u_NTGcHW)
    for n, shifts in enumerate(shift_NG.tolist()):
        for g, value in enumerate(shifts):
            step = max(-frames, min(frames, int(value)))
            source = u_NTGcHW[n, max(0, -step) : frames - max(0, step), g]
            moved[n, max(0, step) : frames - max(0, -step), g] = source
    return moved


def two_shifts(x_BCHW: Tensor, offset_NG: Tensor, weight_NTG: Tensor, fold: int) -> Tensor:
    """The authors' formulation: shift by floor and floor + 1, mix, weight, join.

    As in deepcs233/TIN (ops) and X-Temporal (core/tin.py).
    """
    groups, frames = offset_NG.shape[1], weight_NTG.shape[1]
    x_NTCHW = x_BCHW.unflatten(0, (-1, frames))
    u_NTGcHW = x_NTCHW[:, :, :fold].unflatten(2, (groups, -1))
    base_NG = offset_NG.detach().floor()
    part = (offset_NG - base_NG)[:, None, :, None, None, None]
    near = IntegerShift.apply(u_NTGcHW, base_NG)
    far = IntegerShift.apply(u_NTGcHW, base_NG + 1)
    mixed = ((1 - part) * near + part * far) * weight_NTG[..., None, None, None]
    out_NTCHW = torch.zeros_like(x_NTCHW)
    out_NTCHW[:, :, :fold] = mixed.flatten(2, 3)
    out_NTCHW[:, :, fold:] = x_NTCHW[:, :, fold:]
    return out_NTCHW.flatten(0, 1)


def frame_loop(x_BCHW: Tensor, offset_NG: Tensor, weight_NTG: Tensor, fold: int) -> Tensor:
    """Every frame of every group from its two neighbours, one after another."""
    (videos, groups), frames = offset_NG.shape, weight_NTG.shape[1]
    u_NTGcHW = x_BCHW[:, :fold].unflatten(0, (-1, frames)).unflatten(2, (groups, -1))
    rows = []
    for n in range(videos):
        for t in range(frames):
            parts = [
                weight_NTG[n, t, g] * _between(u_NTGcHW[n, :, g], t, offset_NG[n, g])
                for g in range(groups)
            ]
            rows.append(torch.cat(parts))
    return torch.cat([torch.stack(rows).to(x_BCHW.dtype), x_BCHW[:, fold:]], dim=1)


def _between(u_TcHW: Tensor, time: int, offset: Tensor) -> Tensor:
    """The frames at `time - offset`, linearly interpolated, zero outside the clip."""
    base = math.floor(offset.item())
    part = offset - base
    total = torch.zeros_like(u_TcHW[0])
    for source, share in ((time - base, 1 - part), (time - base - 1, part)):
        if 0 <= source < len(u_TcHW):
            total = total + share * u_TcHW[source]
    return total
