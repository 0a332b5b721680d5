"""Temporal interlacing: a differentiable shift in time of the first channels (arXiv 2001.06499).

Channels [0, fold) form G contiguous groups. Group g of video n moves by O[n, g] frames, later
frames for O > 0, with linear interpolation between frames and zeros from outside the clip, and is
then weighted by W[n, t, g], t being the time of the output; with b = floor(O) and r = O - b

    y[t] = W[t] * ((1 - r) * u[t - b] + r * u[t - b - 1]) = sum_s A[t, s] * u[s],
    A[t, s] = W[t] * max(0, 1 - |t - s - O|).

All other channels pass through. At an integer O, where y has a kink, the derivative is the right
one (the floor form's); the backward pass is the exact adjoint, u' = A^T y'.

Letters: N videos, T frame positions (S when they index the input), B = N*T frames, N-major, C
channels, H W size, G groups, c = fold / G channels of a group, P = c*H*W.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

IMPLEMENTATIONS = ("auto", "reference", "gather", "hat", "triton")


def interlace(
    x_BCHW: Tensor, offset_NG: Tensor, weight_NTG: Tensor, fold: int, impl: str = "auto"
) -> Tensor:
    """Shift G groups of the channels [0, fold) in time and weight them; copy the other channels.

    Offsets, weights and A are taken in float32 at least and A is then cast to the type of `x`.
    A NaN or infinite offset makes its group NaN; a NaN in `x` may reach all frames of its video.
    Gradients of `hat` and `triton` cannot be differentiated again (PyTorch raises).

    Args:
        x_BCHW: frames, any float type and memory layout; the result has the same.
        offset_NG: O, in frames.
        weight_NTG: W; its T says how many frames a video has.
        fold: channels to shift, a multiple of G.
        impl: `reference` is the closed form in plain operators and what an export contains,
            `gather` the floor form; `hat` multiplies by A without copying the groups; `triton` is
            one CUDA kernel; `auto` is `triton` on CUDA where it is installed, else `hat`.

    Raises:
        ValueError: shapes or types that do not fit, an unknown `impl`, `triton` without CUDA.
    """
    _check(x_BCHW, offset_NG, weight_NTG, fold)
    impl = _portable(impl)
    wide = torch.promote_types(x_BCHW.dtype, torch.float32)
    wide = torch.promote_types(wide, torch.promote_types(offset_NG.dtype, weight_NTG.dtype))
    offset_NG, weight_NTG = offset_NG.to(wide), weight_NTG.to(wide)
    if impl == "reference":
        return _reference(x_BCHW, offset_NG, weight_NTG, fold)
    if impl == "gather":
        return _gather(x_BCHW, offset_NG, weight_NTG, fold)
    found: Tensor = _interlace(x_BCHW, offset_NG, weight_NTG, fold, impl)
    return found


def _portable(impl: str) -> str:
    """The implementation by name; in an export one of standard operators."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r}: need one of {', '.join(IMPLEMENTATIONS)}")
    if impl != "gather" and torch.compiler.is_exporting():
        return "reference"  # our own operator would not run elsewhere
    return impl


def _check(x_BCHW: Tensor, offset_NG: Tensor, weight_NTG: Tensor, fold: int) -> None:
    if x_BCHW.dim() != 4 or not x_BCHW.is_floating_point():
        raise ValueError(f"x is {x_BCHW.dtype} {tuple(x_BCHW.shape)}, need float (B, C, H, W)")
    if offset_NG.dim() != 2 or weight_NTG.dim() != 3:
        raise ValueError(
            f"offset {tuple(offset_NG.shape)}, weight {tuple(weight_NTG.shape)}: need (N, G) and "
            "(N, T, G)"
        )
    videos, groups = offset_NG.shape
    frames = weight_NTG.shape[1]
    if weight_NTG.shape[0] != videos or weight_NTG.shape[2] != groups:
        raise ValueError(
            f"weight has shape {tuple(weight_NTG.shape)}, need ({videos}, T, {groups}) as offset "
            f"is {tuple(offset_NG.shape)}"
        )
    if x_BCHW.shape[0] != videos * frames:
        raise ValueError(f"x has {x_BCHW.shape[0]} frames, need {videos} videos x {frames} frames")
    if groups < 1 or not 0 < fold <= x_BCHW.shape[1] or fold % groups:
        raise ValueError(
            f"fold={fold}: need a multiple of {groups} groups in 1..{x_BCHW.shape[1]} channels"
        )


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast; nothing on a device that has none (meta)."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def fold_mean(x_BCHW: Tensor, fold: int) -> Tensor:
    """Mean over H and W of the channels [0, fold), (B, fold), float32 at least.

    The same as slicing and averaging, but its gradient is an expanded tensor: the gradient of a
    slice would be a zero tensor of the size of `x` for every residual block.
    """
    if torch.compiler.is_compiling():  # the compiler fuses the plain form
        return _fold_mean(x_BCHW, fold)
    mean_Bf: Tensor = _FoldMean.apply(x_BCHW, fold)
    return mean_Bf


def _fold_mean(x_BCHW: Tensor, fold: int) -> Tensor:
    wide = torch.promote_types(x_BCHW.dtype, torch.float32)
    return x_BCHW[:, :fold].mean(dim=(2, 3), dtype=wide)


class _FoldMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BCHW: Tensor, fold: int) -> Tensor:
        ctx.shape, ctx.dtype = x_BCHW.shape, x_BCHW.dtype
        return _fold_mean(x_BCHW, fold)

    @staticmethod
    def backward(ctx: Any, grad_Bf: Tensor) -> tuple[Tensor, None]:
        _, channels, height, width = ctx.shape
        share_Bf = (grad_Bf / (height * width)).to(ctx.dtype)
        padded_BC = F.pad(share_Bf, (0, channels - grad_Bf.shape[1]))
        return padded_BC[..., None, None].expand(ctx.shape), None


def _grouped(x_BCHW: Tensor, frames: int, fold: int, groups: int) -> Tensor:
    """The channels [0, fold) as a view (N, T, G, c, H, W)."""
    return x_BCHW.unflatten(0, (-1, frames))[:, :, :fold].unflatten(2, (groups, -1))


def _joined(y_NTGcHW: Tensor, x_BCHW: Tensor, fold: int) -> Tensor:
    y_BfHW = y_NTGcHW.flatten(2, 3).flatten(0, 1).to(x_BCHW.dtype)
    return torch.cat([y_BfHW, x_BCHW[:, fold:]], dim=1)


def _reference(x_BCHW: Tensor, offset_NG: Tensor, weight_NTG: Tensor, fold: int) -> Tensor:
    """The closed form, differentiable to any order, in the type of the offsets.

    max(0, 1 - |d|) is written as its two slopes: relu and abs would call the derivative at an
    integer offset 0, which is neither the left nor the right one.
    """
    (groups, frames), size = (offset_NG.shape[1], weight_NTG.shape[1]), x_BCHW.shape[2:]
    time_T = torch.arange(frames, device=x_BCHW.device, dtype=offset_NG.dtype)
    distance_NGTS = time_T[:, None] - time_T - offset_NG[..., None, None]
    rising = (distance_NGTS > -1) & (distance_NGTS <= 0)
    falling = (distance_NGTS > 0) & (distance_NGTS <= 1)
    # products, not a selection: 0 * NaN keeps a NaN offset visible
    hat_NGTS = rising * (1 + distance_NGTS) + falling * (1 - distance_NGTS)
    hat_NGTS = hat_NGTS * weight_NTG.transpose(1, 2)[..., None]
    u_NGTP = _grouped(x_BCHW, frames, fold, groups).transpose(1, 2).flatten(3)
    with full_precision(x_BCHW.device):
        y_NGTP = torch.matmul(hat_NGTS, u_NGTP.to(hat_NGTS.dtype))
    y_NTGcHW = y_NGTP.transpose(1, 2).unflatten(3, (fold // groups, *size))
    return _joined(y_NTGcHW, x_BCHW, fold)


def _gather(x_BCHW: Tensor, offset_NG: Tensor, weight_NTG: Tensor, fold: int) -> Tensor:
    """The floor form: two gathers along time and a mix."""
    groups, frames = offset_NG.shape[1], weight_NTG.shape[1]
    u_NTGcHW = _grouped(x_BCHW, frames, fold, groups).to(offset_NG.dtype)
    base_NG, part_NG = _floor(offset_NG)
    time_T1 = torch.arange(frames, device=x_BCHW.device)[:, None]
    y_NTGcHW = torch.zeros_like(u_NTGcHW)
    # a base beyond the clip is as good as one clip length, and fits an integer
    base_N1G = base_NG.nan_to_num().clamp(-frames - 1, frames)[:, None].long()
    for step, share_NG in ((0, 1 - part_NG), (1, part_NG)):
        source_NTG = time_T1 - base_N1G - step
        inside_NTG = (source_NTG >= 0) & (source_NTG < frames)
        factor_NTG = inside_NTG * share_NG[:, None] * weight_NTG
        index_NTG = source_NTG.clamp(0, frames - 1)[..., None, None, None]
        taken = u_NTGcHW.gather(1, index_NTG.expand_as(u_NTGcHW))
        y_NTGcHW = y_NTGcHW + factor_NTG[..., None, None, None] * taken
    return _joined(y_NTGcHW, x_BCHW, fold)


def _floor(offset_NG: Tensor) -> tuple[Tensor, Tensor]:
    """Floor and the rest in [0, 1); the rest of an infinite offset is NaN."""
    base_NG = offset_NG.detach().floor()
    return base_NG, offset_NG - base_NG


def _hat(offset_NG: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """max(0, 1 - |t - s - O|) and its right derivative by O, both (N, G, T, S).

    Through the floor form, whose integers are exact; 0 * NaN keeps a NaN offset visible.
    """
    base_NG, part_NG = _floor(offset_NG)
    time_T = torch.arange(frames, device=offset_NG.device, dtype=offset_NG.dtype)
    lag_NGTS = time_T[:, None] - time_T - base_NG[..., None, None]
    near, far = (lag_NGTS == 0).to(offset_NG.dtype), (lag_NGTS == 1).to(offset_NG.dtype)
    part_NG11 = part_NG[..., None, None]
    return near * (1 - part_NG11) + far * part_NG11, far - near


def _mix(hat_NGTS: Tensor, x_BCHW: Tensor, out_BCHW: Tensor, fold: int) -> None:
    """Write sum_s hat[t, s] x[s] into the channels [0, fold) of `out`.

    Where the channels of a frame lie together (NCHW) each group is a matrix of a batch with its
    own strides, on both sides, so nothing is copied. One product for every group, because videos
    and groups have no common stride. In channels_last the groups are packed first.
    """
    groups, frames = hat_NGTS.shape[1:3]
    u, y = (_grouped(tensor, frames, fold, groups) for tensor in (x_BCHW, out_BCHW))
    hat_NGTS = hat_NGTS.to(x_BCHW.dtype)
    if _frames_are_blocks(x_BCHW) and _frames_are_blocks(out_BCHW):
        for g in range(groups):
            torch.bmm(hat_NGTS[:, g], u[:, :, g].flatten(2), out=y[:, :, g].flatten(2))
    else:
        target_NGTHWc = y.permute(0, 2, 1, 4, 5, 3)
        target_NGTHWc.copy_(torch.matmul(hat_NGTS, _packed(u)).view(target_NGTHWc.shape))


def _correlate(grad_BCHW: Tensor, x_BCHW: Tensor, fold: int, groups: int, frames: int) -> Tensor:
    """Gradient of the hat matrix, sum_p grad[t, p] x[s, p], (N, G, T, S), in float32 at least.

    The gradient of an offset is a difference of such sums: bfloat16 would leave nothing of it.
    """
    g_NTGcHW, u_NTGcHW = (_grouped(t, frames, fold, groups) for t in (grad_BCHW, x_BCHW))
    wide = torch.promote_types(x_BCHW.dtype, torch.float32)
    if not (_frames_are_blocks(grad_BCHW) and _frames_are_blocks(x_BCHW)):
        g_NGTP, u_NGTP = _packed(g_NTGcHW).to(wide), _packed(u_NTGcHW).to(wide)
        return torch.matmul(g_NGTP, u_NGTP.transpose(2, 3))
    pairs = zip(g_NTGcHW.unbind(2), u_NTGcHW.unbind(2), strict=True)
    rows = ((g.flatten(2).to(wide), u.flatten(2).to(wide)) for g, u in pairs)
    return torch.stack([torch.bmm(g, u.transpose(1, 2)) for g, u in rows], dim=1)


def _frames_are_blocks(x_BCHW: Tensor) -> bool:
    return x_BCHW[:1].is_contiguous()


def _packed(u_NTGcHW: Tensor) -> Tensor:
    """(N, G, T, P) with channels innermost, one pass over channels_last memory."""
    return u_NTGcHW.permute(0, 2, 1, 4, 5, 3).flatten(3)


@cache
def _triton_runs_on(device: int) -> bool:
    """Triton is installed and knows the device."""
    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (7, 0)


def _use_triton(impl: str, x_BCHW: Tensor) -> bool:
    if impl == "triton" and find_spec("triton") is None:
        raise ValueError("impl='triton': triton is not installed")
    on_cuda = impl == "auto" and x_BCHW.is_cuda
    return impl == "triton" or (on_cuda and _triton_runs_on(x_BCHW.get_device()))


@torch.library.custom_op("video_mmit::interlace", mutates_args=())
def _interlace(
    x_BCHW: Tensor, offset_NG: Tensor, weight_NTG: Tensor, fold: int, impl: str
) -> Tensor:
    """One operator to autograd and to the compiler, which neither opens nor breaks at it."""
    if _use_triton(impl, x_BCHW):
        from video_mmit.ops import interlace_triton

        return interlace_triton.forward(x_BCHW, offset_NG, weight_NTG, fold)
    out_BCHW = torch.empty_like(x_BCHW)
    out_BCHW[:, fold:] = x_BCHW[:, fold:]
    hat_NGTS, _ = _hat(offset_NG, weight_NTG.shape[1])
    with full_precision(x_BCHW.device):
        _mix(hat_NGTS * weight_NTG.transpose(1, 2)[..., None], x_BCHW, out_BCHW, fold)
    return out_BCHW


@_interlace.register_fake
def _(x_BCHW: Tensor, offset_NG: Tensor, weight_NTG: Tensor, fold: int, impl: str) -> Tensor:
    return torch.empty_like(x_BCHW)


@torch.library.custom_op("video_mmit::interlace_backward", mutates_args=())
def _interlace_backward(
    grad_BCHW: Tensor, x_BCHW: Tensor, offset_NG: Tensor, weight_NTG: Tensor, fold: int,
    impl: str, need_x: bool, need_hat: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, offset and weight; what is not needed comes back empty."""
    if _use_triton(impl, x_BCHW):
        from video_mmit.ops import interlace_triton

        needs = (need_x, need_hat)
        return interlace_triton.backward(grad_BCHW, x_BCHW, offset_NG, weight_NTG, fold, *needs)
    found = dx_BCHW, doffset_NG, dweight_NTG = _gradients(
        x_BCHW, offset_NG, weight_NTG, need_x, need_hat
    )
    hat_NGTS, slope_NGTS = _hat(offset_NG, weight_NTG.shape[1])
    weight_NGT1 = weight_NTG.transpose(1, 2)[..., None]
    with full_precision(x_BCHW.device):
        if need_x:
            dx_BCHW[:, fold:] = grad_BCHW[:, fold:]
            _mix((hat_NGTS * weight_NGT1).transpose(2, 3), grad_BCHW, dx_BCHW, fold)
        if need_hat:
            dhat_NGTS = _correlate(grad_BCHW, x_BCHW, fold, *hat_NGTS.shape[1:3])
            dhat_NGTS = dhat_NGTS.to(offset_NG.dtype)
            doffset_NG.copy_((dhat_NGTS * slope_NGTS * weight_NGT1).sum(dim=(2, 3)))
            dweight_NTG.copy_((dhat_NGTS * hat_NGTS).sum(dim=3).transpose(1, 2))
    return found


@_interlace_backward.register_fake
def _(
    grad_BCHW: Tensor, x_BCHW: Tensor, offset_NG: Tensor, weight_NTG: Tensor, fold: int,
    impl: str, need_x: bool, need_hat: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _gradients(x_BCHW, offset_NG, weight_NTG, need_x, need_hat)


def _gradients(
    x_BCHW: Tensor, offset_NG: Tensor, weight_NTG: Tensor, need_x: bool, need_hat: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the gradients; the one of `x` has the memory layout of `x`."""
    dx_BCHW = torch.empty_like(x_BCHW) if need_x else x_BCHW.new_empty(0)
    if not need_hat:
        return dx_BCHW, offset_NG.new_empty(0), weight_NTG.new_empty(0)
    return dx_BCHW, offset_NG.new_empty(offset_NG.shape), weight_NTG.new_empty(weight_NTG.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.fold, ctx.impl = inputs[3:]


def _backward(ctx: Any, grad_BCHW: Tensor) -> tuple[Tensor | None, ...]:
    need_x, *need_hat = ctx.needs_input_grad[:3]
    found = _interlace_backward(
        grad_BCHW, *ctx.saved_tensors, ctx.fold, ctx.impl, need_x, any(need_hat)
    )
    pairs = zip(found, ctx.needs_input_grad, strict=False)
    return *(gradient if needed else None for gradient, needed in pairs), None, None


_interlace.register_autograd(_backward, setup_context=_setup_context)
