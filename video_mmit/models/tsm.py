"""Temporal shift modules (arXiv 1811.08383): channels moved by one frame before residual blocks.

As in temporal-shift-module and X-Temporal, which differ in `n_round` for deep networks.

Letters: N videos, T frame positions, B = N*T frames (N-major), C channels, H W size.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from video_mmit.models.insert import (
    Block,
    TemporalBlock,
    TemporalConv,
    check_free,
    check_indices,
    replace_module,
    residual_blocks,
    stage_blocks,
    stages,
)
from video_mmit.ops.shift import shift

PLACES = ("blockres", "block")


class TemporalShift(nn.Module):
    """C / shift_div channels from the next frame, as many from the one before, the rest as it is.

    Args:
        num_segments: T; an attribute that may be changed, since there are no weights.
        shift_div: at least 2.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(self, num_segments: int, shift_div: int = 8) -> None:
        super().__init__()
        if num_segments < 1:
            raise ValueError(f"num_segments={num_segments}: need at least 1")
        if shift_div < 2:
            raise ValueError(f"shift_div={shift_div}: need at least 2, as two parts are shifted")
        self.num_segments, self.shift_div = num_segments, shift_div

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Shifted frames.

        Raises:
            ValueError: B is no multiple of `num_segments`, or C is less than `shift_div`.
        """
        fold = x_BCHW.shape[1] // self.shift_div
        if fold == 0:
            raise ValueError(
                f"channels={x_BCHW.shape[1]}: need shift_div={self.shift_div} or more to shift any"
            )
        return shift(x_BCHW, self.num_segments, fold)

    def extra_repr(self) -> str:
        return f"num_segments={self.num_segments}, shift_div={self.shift_div}"


class TemporalPool(nn.Module):
    """Maximum of three neighbouring frames, every second one: T -> T / 2.

    Args:
        num_segments: T, even; an attribute that may be changed.
    """

    def __init__(self, num_segments: int) -> None:
        super().__init__()
        _check_even(num_segments)
        self.num_segments = num_segments

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Frames (N * T/2, C, H, W).

        Raises:
            ValueError: T is odd, or B is no multiple of T.
        """
        frames = self.num_segments
        _check_even(frames)
        if x_BCHW.shape[0] % frames:
            raise ValueError(
                f"batch of {x_BCHW.shape[0]} frames is no multiple of num_segments={frames}"
            )
        x_NCTHW = x_BCHW.unflatten(0, (-1, frames)).transpose(1, 2)
        pooled_NCTHW = F.max_pool3d(x_NCTHW, (3, 1, 1), (2, 1, 1), (1, 0, 0))
        return pooled_NCTHW.transpose(1, 2).flatten(0, 1)


def _check_even(num_segments: int) -> None:
    if num_segments < 2 or num_segments % 2:
        raise ValueError(f"num_segments={num_segments}: a temporal pool needs an even number")


def add_tsm(
    backbone: nn.Module,
    num_segments: int,
    shift_div: int = 8,
    place: str = "blockres",
    n_round: int = 1,
    blocks: Sequence[int] | None = None,
    temporal_pool: bool = False,
) -> None:
    """Put temporal shifts into residual blocks, in place.

    Args:
        backbone: network with stages `layer1`, ... of torchvision's residual blocks.
        num_segments: T.
        shift_div: see `TemporalShift`.
        place: `blockres` shifts the input of `conv1` only, `block` that of the shortcut too.
        n_round: every n-th block of each stage, from its first on. X-Temporal has 1;
            temporal-shift-module has 2 where layer3 has 23 blocks or more.
        blocks: indices of the blocks in forward order, over all stages, instead of `n_round`.
        temporal_pool: halve T before layer2.

    Raises:
        ValueError: an argument out of range, or a block that has a temporal module already; the
            backbone is then unchanged.
    """
    if place not in PLACES:
        raise ValueError(f"place={place!r}: need one of {', '.join(PLACES)}")
    if n_round < 1 or (blocks is not None and n_round != 1):
        raise ValueError(f"n_round={n_round}: need at least 1, and 1 when blocks are given")
    chosen = _chosen(backbone, n_round, blocks)
    pool = TemporalPool(num_segments) if temporal_pool else None
    # the blocks that see all T frames
    whole = residual_blocks(backbone) if pool is None else stage_blocks(backbone)[0]
    lengths = [num_segments if block in whole else num_segments // 2 for block in chosen]
    modules = [TemporalShift(frames, shift_div) for frames in lengths]
    for block, module in zip(chosen, modules, strict=True):
        if place == "block":
            replace_module(backbone, block, TemporalBlock(module, block))
        else:
            block.conv1 = TemporalConv(module, block.conv1)
    if pool is not None:  # at the end of layer1, where it changes no key of layer2
        stages(backbone)[0].append(pool)


def _chosen(backbone: nn.Module, n_round: int, blocks: Sequence[int] | None) -> list[Block]:
    """The blocks to change; raises ValueError for wrong indices and blocks changed before."""
    chosen = [block for stage in stage_blocks(backbone) for block in stage[::n_round]]
    if blocks is not None:
        check_indices(blocks, len(chosen))
        chosen = [chosen[index] for index in blocks]
    check_free(backbone, chosen)
    return chosen
