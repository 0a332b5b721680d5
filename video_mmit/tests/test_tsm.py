"""Temporal shift modules: what is shifted, where, and what stays."""

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50
from torchvision.models.resnet import BasicBlock, Bottleneck

from video_mmit.models.insert import (
    TemporalBlock,
    TemporalConv,
    residual_blocks,
    stage_blocks,
    stages,
)
from video_mmit.models.tsm import TemporalPool, TemporalShift, add_tsm

T = 4


class Backbone(nn.Module):
    """Two stages of two residual blocks each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        shortcut = nn.Conv2d(8, 16, 1, 2)
        # the second stage comes first, so that order has to come from the names
        self.layer2 = nn.Sequential(BasicBlock(8, 16, 2, shortcut), BasicBlock(16, 16))
        self.layer1 = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.layer2(self.layer1(x_BCHW))


def clips(videos: int = 2, frames: int = T) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(videos * frames, 8, 6, 6, generator=generator)


def shifted(backbone: nn.Module) -> list[int]:
    """Indices of the blocks whose conv1 is behind a shift."""
    blocks = enumerate(residual_blocks(backbone))
    return [index for index, block in blocks if isinstance(block.conv1, TemporalConv)]


def by_hand(backbone: Backbone, x_BCHW: Tensor, frames: int, place: str) -> Tensor:
    """The blocks one after another, each with the shift written as loops over frames."""
    for block in (*backbone.layer1, *backbone.layer2):
        moved = x_BCHW.clone()
        part = x_BCHW.shape[1] // 8
        for b in range(len(x_BCHW)):
            last, first = b % frames == frames - 1, b % frames == 0
            moved[b, :part] = 0 if last else x_BCHW[b + 1, :part]
            moved[b, part : 2 * part] = 0 if first else x_BCHW[b - 1, part : 2 * part]
        identity = moved if place == "block" else x_BCHW
        y = torch.relu(block.bn1(block.conv1(moved)))
        y = block.bn2(block.conv2(y))
        x_BCHW = torch.relu(y + (block.downsample or nn.Identity())(identity))
    return x_BCHW


@pytest.mark.parametrize("place", ["blockres", "block"])
def test_every_block_is_shifted_and_the_shortcut_only_with_block(place: str) -> None:
    plain, net = Backbone().eval(), Backbone().eval()
    add_tsm(net, T, place=place)
    torch.testing.assert_close(net(clips()), by_hand(plain, clips(), T, place))


def test_keys_are_those_of_the_backbone_below_the_wrapper() -> None:
    for place, name in (("blockres", "layer2.1.conv1.conv"), ("block", "layer2.1.block.conv1")):
        net = Backbone()
        before = sum(parameter.numel() for parameter in net.parameters())
        add_tsm(net, T, place=place, temporal_pool=True)
        assert f"{name}.weight" in net.state_dict()
        assert sum(parameter.numel() for parameter in net.parameters()) == before


def test_rounds_count_within_each_stage() -> None:
    for n_round, expected in ((1, list(range(8))), (2, [0, 2, 4, 6])):
        net = resnet18()
        add_tsm(net, T, n_round=n_round)
        assert shifted(net) == expected
    net = resnet50()  # stages of 3, 4, 6, 3
    add_tsm(net, T, n_round=2)
    assert shifted(net) == [0, 2, 3, 5, 7, 9, 11, 13, 15]
    net = Backbone()
    add_tsm(net, T, blocks=[3, 0])
    assert shifted(net) == [0, 3]


def test_a_temporal_pool_takes_the_maximum_of_three_frames() -> None:
    x = clips()
    videos = x.view(2, T, 8, 6, 6)
    expected = torch.stack([videos[:, :2].amax(dim=1), videos[:, 1:4].amax(dim=1)], dim=1).flatten(
        0, 1
    )
    for layout in (torch.contiguous_format, torch.channels_last):
        pooled = TemporalPool(T)(x.to(memory_format=layout))
        assert torch.equal(pooled, expected)
        assert pooled.is_contiguous(memory_format=layout)


def test_blocks_behind_the_pool_have_half_the_frames() -> None:
    net = Backbone().eval()
    add_tsm(net, T, temporal_pool=True)
    first, second = stages(net)
    assert net(clips()).shape[0] == 2 * T // 2
    expected = second(TemporalPool(T)(nn.Sequential(*list(first)[:2])(clips())))
    torch.testing.assert_close(net(clips()), expected)
    numbers = [block.conv1.temporal.num_segments for block in residual_blocks(net)]
    assert numbers == [T, T, T // 2, T // 2]


def test_check_06_order_matters_within_a_video_only() -> None:
    net = Backbone().eval()
    add_tsm(net, T)
    x = clips(3)
    out = net(x).view(3, T, -1)
    order = torch.tensor([2, 0, 1])
    swapped = net(x.view(3, T, 8, 6, 6)[order].flatten(0, 1)).view(3, T, -1)
    torch.testing.assert_close(swapped, out[order])
    turned = x.clone()
    turned[T : 2 * T] = x[T : 2 * T].flip(0)
    new = net(turned).view(3, T, -1)
    torch.testing.assert_close(new[[0, 2]], out[[0, 2]])
    assert (new[1].mean(dim=0) - out[1].mean(dim=0)).abs().max() > 1e-3


def test_a_shift_follows_another_number_of_frames() -> None:
    module = TemporalShift(T, 4)
    x = clips()
    module.num_segments = 2 * T
    torch.testing.assert_close(module(x), TemporalShift(2 * T, 4)(x))
    assert not torch.equal(module(x), TemporalShift(T, 4)(x))


def test_check_13_wrong_arguments_are_named() -> None:
    cases: dict[str, dict[str, Any]] = {
        "shift_div=0: need at least 2": {"shift_div": 0},
        "place='inside': need one of blockres, block": {"place": "inside"},
        "n_round=0: need at least 1": {"n_round": 0},
        "n_round=2: need at least 1, and 1 when blocks": {"n_round": 2, "blocks": [0]},
        r"blocks=\[4\]: need different indices of 4": {"blocks": [4]},
        r"blocks=\[1, 1\]: need different": {"blocks": [1, 1]},
        r"blocks=\[-1\]: need different": {"blocks": [-1]},
        "num_segments=3: a temporal pool": {"num_segments": 3, "temporal_pool": True},
        "num_segments=0: need at least 1": {"num_segments": 0},
    }
    for message, options in cases.items():
        net = Backbone()
        before = list(net.state_dict())
        with pytest.raises(ValueError, match=message):
            add_tsm(net, **({"num_segments": T} | options))
        assert list(net.state_dict()) == before
    with pytest.raises(ValueError, match=r"batch of 8 frames is no multiple of frames=3"):
        TemporalShift(3)(clips())
    with pytest.raises(ValueError, match="channels=8: need shift_div=9 or more"):
        TemporalShift(T, 9)(clips())
    with pytest.raises(ValueError, match="batch of 8 frames is no multiple of num_segments=6"):
        TemporalPool(6)(clips())


@pytest.mark.parametrize(
    "places", [("blockres", "block"), ("block", "block"), ("block", "blockres")]
)
def test_a_block_takes_one_temporal_module(places: tuple[str, str]) -> None:
    net = Backbone()
    add_tsm(net, T, place=places[0], blocks=[1])
    with pytest.raises(ValueError, match="has a temporal module: TemporalShift"):
        add_tsm(net, T, place=places[1])
    add_tsm(net, T, place=places[1], blocks=[0])


def test_backbones_without_residual_stages_are_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no stages layer1"):
        residual_blocks(nn.Linear(1, 1))
    empty = nn.Sequential(OrderedDict(layer1=nn.Sequential(nn.ReLU())))
    with pytest.raises(ValueError, match="has a stage without residual blocks"):
        residual_blocks(empty)
    bare = nn.Sequential(OrderedDict(layer1=nn.ReLU()))
    with pytest.raises(ValueError, match=r"its stages must be nn\.Sequential"):
        stages(bare)


def test_blocks_are_found_inside_wrappers() -> None:
    net = resnet50()
    found = residual_blocks(net)
    assert len(found) == 16
    assert [len(stage) for stage in stage_blocks(net)] == [3, 4, 6, 3]
    assert all(isinstance(block, Bottleneck) for block in found)
    add_tsm(net, T, place="block")
    assert residual_blocks(net) == found
    assert isinstance(net.layer3[2], TemporalBlock)
