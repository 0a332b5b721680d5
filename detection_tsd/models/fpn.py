"""Feature pyramids: what a backbone returns, the FPN, and what all trunks under one share.

Lin et al. (arXiv 1612.03144) with the layers, key names and values of torchvision's
`FeaturePyramidNetwork`; start values as in mmdetection (Xavier).

Letters: B images, C channels, H W size.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import FeaturePyramidNetwork

from detection_tsd.models.norm import freeze_bn, set_norm


class Features(NamedTuple):
    """Maps (B, C, H, W) from fine to coarse, one pyramid per branch of the head.

    Attributes:
        cls: what classification reads.
        reg: what box regression reads; the same list where the backbone does not separate them.
    """

    cls: list[Tensor]
    reg: list[Tensor]


class FPN(FeaturePyramidNetwork):
    """Maps of a trunk -> as many maps of one width, and a coarser one.

    Keys and values are those of torchvision's `FeaturePyramidNetwork` with `LastLevelMaxPool`.

    Args:
        in_channels: widths of the trunk's maps, from fine to coarse.
        channels: width of the pyramid.
        extra: add a map of half the last one's size: every second row and column of it.

    Raises:
        ValueError: no map, or a width below 1.
    """

    def __init__(self, in_channels: Sequence[int], channels: int = 256, extra: bool = True) -> None:
        if not in_channels or min(in_channels) < 1:
            raise ValueError(f"in_channels={list(in_channels)}: need positive widths")
        if channels < 1:
            raise ValueError(f"channels={channels}: need at least 1")
        super().__init__(list(in_channels), channels)
        self.extra = extra
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Pyramid of the trunk's maps, from fine to coarse.

        Raises:
            ValueError: another number of maps than `in_channels`.
        """
        if len(maps) != len(self.inner_blocks):
            raise ValueError(f"maps: {len(maps)} of them, need {len(self.inner_blocks)}")
        inner = self.inner_blocks[-1](maps[-1])
        pyramid = [self.layer_blocks[-1](inner)]
        for level in range(len(maps) - 2, -1, -1):
            lateral = self.inner_blocks[level](maps[level])
            above = F.interpolate(inner, size=lateral.shape[-2:], mode="nearest")
            inner = above.add_(lateral)  # no layer needs the enlarged map itself for its gradient
            pyramid.insert(0, self.layer_blocks[level](inner))
        if self.extra:
            pyramid.append(F.max_pool2d(pyramid[-1], kernel_size=1, stride=2))
        return pyramid


class Trunk(nn.Module):
    """A network without classifier: a stem, then stages of blocks whose outputs are the maps.

    A subclass registers its layers, names those of the stem in `stem_layers` and calls `finish`.

    Args:
        frozen_stages: the stem and so many stages keep their start values and statistics and run
            without a graph; 0 freezes the stem only, -1 nothing.
        checkpoint_blocks: keep only the inputs of blocks for the backward pass and compute the
            rest again.

    Attributes:
        widths: channels of the maps.

    Raises:
        ValueError: `frozen_stages` below -1.
    """

    stem_layers: tuple[str, ...] = ("stem",)
    widths: tuple[int, ...]

    def __init__(self, frozen_stages: int = 1, checkpoint_blocks: bool = False) -> None:
        super().__init__()
        if frozen_stages < -1:
            raise ValueError(f"frozen_stages={frozen_stages}: need -1 (none), 0 (stem) or more")
        self.frozen_stages, self.checkpoint_blocks = frozen_stages, checkpoint_blocks

    def run_stem(self, x_BCHW: Tensor) -> Tensor:
        """What the first stage reads."""
        raise NotImplementedError

    def stages(self) -> list[Sequence[nn.Module]]:
        """Blocks of every stage."""
        raise NotImplementedError

    def finish(self, norm: str) -> None:
        """Set the norms, freeze what is frozen, order the weights for channels-last maps.

        Raises:
            ValueError: `norm` unknown, or more frozen stages than there are.
        """
        stages = self.stages()
        if self.frozen_stages > len(stages):
            raise ValueError(f"frozen_stages={self.frozen_stages}: there are {len(stages)} stages")
        for name in self.stem_layers if self.frozen_stages >= 0 else ():
            parent, _, leaf = name.rpartition(".")
            layer = freeze_bn(self.get_submodule(name)).requires_grad_(False)
            setattr(self.get_submodule(parent), leaf, layer)
        for blocks in stages[: max(self.frozen_stages, 0)]:
            for block in blocks:
                freeze_bn(block).requires_grad_(False)
        set_norm(self, norm)
        self.to(memory_format=torch.channels_last)

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        """Maps of the stages, from fine to coarse, in the channels-last format."""
        x, maps = x_BCHW.contiguous(memory_format=torch.channels_last), []
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.frozen_stages < 0):
            x = self.run_stem(x)
        for number, blocks in enumerate(self.stages(), start=1):
            with torch.set_grad_enabled(torch.is_grad_enabled() and number > self.frozen_stages):
                x = self.run_blocks(x, blocks)
            maps.append(x)
        return maps

    def run_blocks(self, x: Tensor, blocks: Iterable[nn.Module]) -> Tensor:
        """Output of blocks that follow each other."""
        again = self.checkpoint_blocks and self.training and torch.is_grad_enabled()
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False) if again else block(x)
        return x


class PyramidBackbone(nn.Module):
    """A trunk and its feature pyramid; both branches of the head read the same maps.

    Args:
        body: the trunk.
        channels: width of the pyramid.
        strides: of the trunk's maps, in pixels of the image.
        extra: add a map of twice the last stride, which RoIs are not pooled from.

    Attributes:
        strides: of all maps.
        channels: of all maps.
        roi_levels: how many of the maps RoIs are pooled from, counted from the finest.
    """

    def __init__(
        self,
        body: Trunk,
        channels: int = 256,
        strides: Sequence[int] = (4, 8, 16, 32),
        extra: bool = True,
    ) -> None:
        super().__init__()
        self.body = body
        self.fpn = FPN(body.widths, channels, extra).to(memory_format=torch.channels_last)
        self.channels, self.roi_levels = channels, len(strides)
        self.strides = (*strides, 2 * strides[-1]) if extra else tuple(strides)

    def forward(self, x_B3HW: Tensor) -> Features:
        """Pyramids of normalised images."""
        pyramid = self.fpn(self.body(x_B3HW))
        return Features(pyramid, pyramid)
