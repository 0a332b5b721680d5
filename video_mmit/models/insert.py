"""Where temporal modules go into a backbone of residual blocks.

Letters: B frames, C channels, H W size.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

Block: TypeAlias = BasicBlock | Bottleneck


class TemporalConv(nn.Module):
    """The first convolution of a residual block behind a temporal module; the shortcut sees none.

    Args:
        temporal: module from folded frames to folded frames of the same shape.
        conv: the convolution it stands in for.
    """

    def __init__(self, temporal: nn.Module, conv: nn.Module) -> None:
        super().__init__()
        self.temporal, self.conv = temporal, conv

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The convolution of the frames after the temporal module."""
        found: Tensor = self.conv(self.temporal(x_BCHW))
        return found


class TemporalBlock(nn.Module):
    """A whole residual block, shortcut included, behind a temporal module."""

    def __init__(self, temporal: nn.Module, block: nn.Module) -> None:
        super().__init__()
        self.temporal, self.block = temporal, block

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The block's output for the frames after the temporal module."""
        found: Tensor = self.block(self.temporal(x_BCHW))
        return found


def stages(backbone: nn.Module) -> list[nn.Sequential]:
    """The stages `layer1`, `layer2`, ... in forward order.

    Raises:
        ValueError: the backbone has none, or they are no `nn.Sequential`.
    """
    names = [name for name, _ in backbone.named_children() if re.fullmatch(r"layer\d+", name)]
    if not names:
        raise ValueError(f"backbone {type(backbone).__name__} has no stages layer1, layer2, ...")
    found = [getattr(backbone, name) for name in sorted(names, key=lambda name: int(name[5:]))]
    if not all(isinstance(stage, nn.Sequential) for stage in found):
        raise ValueError(f"backbone {type(backbone).__name__}: its stages must be nn.Sequential")
    return found


def stage_blocks(backbone: nn.Module) -> list[list[Block]]:
    """The residual blocks of each stage in forward order, also inside wrappers.

    Raises:
        ValueError: the backbone has no stages, or a stage has no blocks.
    """
    found = [[m for m in stage.modules() if isinstance(m, Block)] for stage in stages(backbone)]
    if not all(found):
        raise ValueError(f"backbone {type(backbone).__name__} has a stage without residual blocks")
    return found


def residual_blocks(backbone: nn.Module) -> list[Block]:
    """The residual blocks of all stages in forward order; raises as `stage_blocks` does."""
    return [block for stage in stage_blocks(backbone) for block in stage]


def check_indices(blocks: Sequence[int], count: int) -> None:
    """Raise ValueError unless `blocks` are different indices below `count`."""
    if len(set(blocks)) != len(blocks) or not all(0 <= index < count for index in blocks):
        raise ValueError(
            f"blocks={list(blocks)}: need different indices of {count} residual blocks"
        )


def check_free(backbone: nn.Module, blocks: Iterable[Block]) -> None:
    """Raise ValueError if one of the blocks has a temporal module already."""
    wrappers = [module for module in backbone.modules() if isinstance(module, TemporalBlock)]
    temporal = {id(wrapper.block): wrapper.temporal for wrapper in wrappers}
    for block in blocks:
        if isinstance(block.conv1, TemporalConv):
            temporal[id(block)] = block.conv1.temporal
        if id(block) in temporal:
            name = type(temporal[id(block)]).__name__
            raise ValueError(f"a residual block of the backbone has a temporal module: {name}")


def replace_module(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` at the place of `old` below `root`.

    Raises:
        ValueError: `old` is not below `root`.
    """
    name = next((name for name, module in root.named_modules() if module is old), "")
    if not name:
        raise ValueError(f"{type(old).__name__} is not a part of {type(root).__name__}")
    parent, _, key = name.rpartition(".")
    setattr(root.get_submodule(parent), key, new)
