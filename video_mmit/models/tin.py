"""Temporal Interlacing Network (arXiv 2001.06499): learned shifts in time before residual blocks.

As in deepcs233/TIN and X-Temporal: a quarter of the channels moves, in two groups by offsets that
a small net reads off the video, in two more by the opposite offsets; a second net weights them.

Letters: N videos, T frame positions, B = N*T frames (N-major), C channels, H W size, f = C /
shift_div shifted channels, G learned offsets (2G groups of channels).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from video_mmit.models.insert import (
    TemporalConv,
    check_free,
    check_indices,
    residual_blocks,
)
from video_mmit.ops.interlace import IMPLEMENTATIONS, fold_mean, full_precision, interlace


class OffsetNet(nn.Module):
    """Offsets (N, G) in frames, within +-scale/2, of mean features (N, f, T).

    Args:
        channels: f.
        num_segments: T; the linear layers depend on it.
        groups: G.
        scale: width of the range of offsets.
        init: where the offsets start, exactly so as long as `fc2.weight` is 0.
    """

    def __init__(
        self, channels: int, num_segments: int, groups: int, scale: float, init: float
    ) -> None:
        super().__init__()
        self.scale = scale
        self.conv = nn.Conv1d(channels, 1, 3, padding=1)
        self.fc1 = nn.Linear(num_segments, num_segments)
        self.fc2 = nn.Linear(num_segments, groups)
        share = 0.5 + init / scale
        nn.init.constant_(self.fc2.bias, math.log(share / (1 - share)))

    def forward(self, mean_NfT: Tensor) -> Tensor:
        """Offsets scale * (sigmoid(z) - 1/2); z is a convolution over time and two layers."""
        hidden_NT = self.conv(mean_NfT.to(self.conv.weight.dtype)).squeeze(1)
        return self.scale * (torch.sigmoid(self.fc2(torch.relu(self.fc1(hidden_NT)))) - 0.5)


class FixedOffset(nn.Module):
    """The same offsets for every video, in a buffer; stands in for `OffsetNet`."""

    value: Tensor

    def __init__(self, groups: int, value: float) -> None:
        super().__init__()
        self.register_buffer("value", torch.full((groups,), float(value)))

    def forward(self, mean_NfT: Tensor) -> Tensor:
        """Offsets (N, G)."""
        return self.value.expand(mean_NfT.shape[0], -1)


class WeightNet(nn.Module):
    """Weights (N, T, G) in (0, 2) of mean features (N, f, T)."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, groups, 3, padding=1)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, mean_NfT: Tensor) -> Tensor:
        """2 * sigmoid of a convolution over time."""
        z_NGT = self.conv(mean_NfT.to(self.conv.weight.dtype))
        return 2 * torch.sigmoid(z_NGT).transpose(1, 2)


class UnitWeight(nn.Module):
    """Weights of 1; stands in for `WeightNet`."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, mean_NfT: Tensor) -> Tensor:
        """Ones (N, T, G)."""
        return mean_NfT.new_ones(mean_NfT.shape[0], mean_NfT.shape[2], self.groups)


class TIN(nn.Module):
    """Folded frames (B, C, H, W) -> the same shape, the first C / shift_div channels interlaced.

    The groups of channels are shifted by [o1, .., oG, -o1, .., -oG] and weighted by [w1, .., wG,
    w1, .., wG]. A positive offset moves content to later frames. Both nets run in the type of
    their own weights, also under autocast, and the offsets go on in float32 at least.

    Args:
        channels: C, a multiple of shift_div * 2 * groups (16 by default).
        num_segments: T; a trained module works for this T only.
        shift_div: one of so many channels is shifted.
        groups: learned offsets.
        offset_scale: offsets lie within +-offset_scale / 2 frames. The released code has 4, the
            paper T.
        offset_init: offset at the start. The bias of 0.5108 in the released code is 0.5 at scale
            4 and 1 at scale 8.
        use_weight: weight the frames by a net; otherwise by 1.
        learn_offset: otherwise every offset stays `offset_init`, without parameters; any finite
            number will do then, whatever offset_scale.
        impl: see `video_mmit.ops.interlace.interlace`.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        channels: int,
        num_segments: int,
        shift_div: int = 4,
        groups: int = 2,
        offset_scale: float = 4.0,
        offset_init: float = 0.5,
        use_weight: bool = True,
        learn_offset: bool = True,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        _check_shape(channels, num_segments, shift_div, groups)
        if not offset_scale > 0:
            raise ValueError(f"offset_scale={offset_scale}: need a positive number of frames")
        bound = offset_scale / 2 if learn_offset else math.inf
        if not abs(offset_init) < bound:
            raise ValueError(f"offset_init={offset_init}: need it within +-{bound} frames")
        if impl not in IMPLEMENTATIONS:
            raise ValueError(f"impl={impl!r}: need one of {', '.join(IMPLEMENTATIONS)}")
        self.channels, self.num_segments, self.groups = channels, num_segments, groups
        self.fold = channels // shift_div
        self.offset_scale, self.offset_init, self.impl = offset_scale, offset_init, impl
        self.offset_net: nn.Module = FixedOffset(groups, offset_init)
        if learn_offset:
            shape = (self.fold, num_segments, groups)
            self.offset_net = OffsetNet(*shape, offset_scale, offset_init)
        self.weight_net = WeightNet(self.fold, groups) if use_weight else UnitWeight(groups)
        self.record: list[Tensor] | None = None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Interlaced frames.

        Raises:
            ValueError: not (B, C, H, W) with the C or a multiple of the T it was built for.
        """
        if x_BCHW.dim() != 4 or x_BCHW.shape[1] != self.channels:
            raise ValueError(
                f"x has shape {tuple(x_BCHW.shape)}, need (B, C, H, W) with C={self.channels}"
            )
        if x_BCHW.shape[0] % self.num_segments:
            raise ValueError(
                f"batch of {x_BCHW.shape[0]} frames is no multiple of "
                f"num_segments={self.num_segments}"
            )
        mean_Bf = fold_mean(x_BCHW, self.fold)
        mean_NfT = mean_Bf.unflatten(0, (-1, self.num_segments)).transpose(1, 2)
        with full_precision(x_BCHW.device):
            offset_NG, weight_NTG = self.offset_net(mean_NfT), self.weight_net(mean_NfT)
        if self.record is not None:
            self.record.append(offset_NG.detach())
        both_N2G = torch.cat([offset_NG, -offset_NG], dim=1)
        weight_NT2G = torch.cat([weight_NTG, weight_NTG], dim=2)
        return interlace(x_BCHW, both_N2G, weight_NT2G, self.fold, self.impl)


def _check_shape(channels: int, num_segments: int, shift_div: int, groups: int) -> None:
    for name, value in (
        ("num_segments", num_segments), ("shift_div", shift_div), ("groups", groups),
    ):  # fmt: skip
        if value < 1:
            raise ValueError(f"{name}={value}: need at least 1")
    step = shift_div * 2 * groups
    if channels < 1 or channels % step:
        raise ValueError(
            f"channels={channels}: need a multiple of {step} (shift_div {shift_div} x 2 x "
            f"groups {groups})"
        )


def add_tin(
    backbone: nn.Module, num_segments: int, blocks: Sequence[int] | None = None, **options: Any
) -> None:
    """Put a TIN before `conv1` of residual blocks, in place.

    Args:
        backbone: network with stages `layer1`, ... of torchvision's residual blocks.
        num_segments: T.
        blocks: indices of the blocks in forward order, over all stages; None is every block.
        **options: of `TIN`.

    Raises:
        ValueError: a block that is not there or has a temporal module, or an option of `TIN` that
            is out of range; the backbone is then unchanged.
    """
    found = residual_blocks(backbone)
    if blocks is not None:
        check_indices(blocks, len(found))
        found = [found[index] for index in blocks]
    check_free(backbone, found)
    modules = [TIN(block.conv1.in_channels, num_segments, **options) for block in found]
    for block, module in zip(found, modules, strict=True):
        block.conv1 = TemporalConv(module, block.conv1)


@contextmanager
def record_offsets(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the learned offsets (N, G) of every TIN, one entry for each forward pass.

    `with record_offsets(model) as record: model(x)` gives `record[name][0]`, by the name of the
    module in `model`, in forward order. The opposite offsets of the other groups are left out.
    """
    modules = {name: module for name, module in model.named_modules() if isinstance(module, TIN)}
    record: dict[str, list[Tensor]] = {name: [] for name in modules}
    for name, module in modules.items():
        module.record = record[name]
    try:
        yield record
    finally:
        for module in modules.values():
            module.record = None
