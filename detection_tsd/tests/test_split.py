"""Backbones that separate classification from localisation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from detection_tsd.models.resnet import ResNetFPN
from detection_tsd.models.split import SplitResNetFPN

SMALL: dict[str, Any] = {"layers": (1, 1, 1, 1), "channels": 8}
REST = 593_935 + 2 * 13_895_680 + 83_025 + 332_100  # region proposals, two extractors, outputs


def images() -> Tensor:
    return torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("stride", "total"), [(8, 81_060_324), (16, 73_961_956), (32, 58_997_220)])
def test_check_05_parameter_totals_of_split_backbones(stride: int, total: int) -> None:
    with torch.device("meta"):
        net = SplitResNetFPN(stride)
    assert sum(p.numel() for p in net.parameters()) + REST == total


@pytest.mark.parametrize(("stride", "own"), [(8, 2), (16, 1), (32, 0)])
def test_both_pyramids_start_from_the_same_stages(stride: int, own: int) -> None:
    net = SplitResNetFPN(stride, **SMALL)
    assert len(net.reg_stages) == own
    assert net.strides == (4, 8, 16, 32, 64)
    net.reg_fpn.load_state_dict(net.fpn.state_dict())
    whole = ResNetFPN(**SMALL)
    state = net.state_dict()
    whole.load_state_dict({k: v for k, v in state.items() if not k.startswith("reg_")})
    with torch.no_grad():
        for maps in net(images()):
            for got, expected in zip(maps, whole(images()).cls, strict=True):
                assert torch.equal(got, expected)


def test_what_follows_the_stride_is_separate() -> None:
    net = SplitResNetFPN(16, **SMALL)
    found = net(images())
    sum(m.square().mean() for m in found.reg).backward()
    used = {name.split(".")[0] for name, p in net.named_parameters() if p.grad is not None}
    assert used == {"body", "reg_stages", "reg_fpn"}
    assert all(p.grad is None for p in net.body.layer4.parameters())
    assert all(p.grad is not None for p in net.body.layer3.parameters())
    assert not any(
        p is q for p in net.body.layer4.parameters() for q in net.reg_stages.parameters()
    )
    net.zero_grad()
    sum(m.square().mean() for m in net(images()).cls).backward()
    assert all(p.grad is not None for p in net.body.layer4.parameters())
    assert all(p.grad is None for p in net.reg_stages.parameters())


def test_frozen_norms_of_the_copies_stay_frozen() -> None:
    net = SplitResNetFPN(8, **SMALL, dcn="v1", checkpoint_blocks=True).train()
    before = {k: v.clone() for k, v in net.named_buffers()}
    sum(m.square().mean() for maps in net(images()) for m in maps).backward()
    assert all(torch.equal(v, before[k]) for k, v in net.named_buffers())
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="stride=4: need one of"):
        SplitResNetFPN(4)
    with pytest.raises(ValueError, match="frozen_stages=3: 2 stages are shared"):
        SplitResNetFPN(8, frozen_stages=3)


CONFIGS = Path(__file__).parents[1] / "configs" / "backbone"
# Millions of parameters, of which 3.34 are the pyramid's (twice where it is split).
MILLIONS = {
    "r50": 26.85, "r101": 45.84, "r152": 61.49, "x101_64x4d": 84.75,
    "r50_dcn": 27.43, "r101_dcn": 47.13, "x101_64x4d_dcn": 89.89,
    "senet154": 116.38, "senet154_dcn": 120.20, "mobilenet_v2": 4.95,
    "d_s8": 52.26, "d_s16": 45.16, "d_s32": 30.20, "tiny": 0.09,
}  # fmt: skip


def test_every_configuration_of_a_backbone_is_known() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(MILLIONS)


@pytest.mark.parametrize("name", MILLIONS)
def test_configurations_name_the_networks_they_say(name: str) -> None:
    config = OmegaConf.load(CONFIGS / f"{name}.yaml")
    with torch.device("meta"):
        net = instantiate(config)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(MILLIONS[name], abs=6e-3)
    with torch.device("meta"), torch.no_grad():
        found = net(torch.zeros(1, 3, 64, 64))
    assert len(found.cls) == len(found.reg) == len(net.strides)
    for maps in found:
        assert [64 // s for s in net.strides] == [m.shape[2] for m in maps]
        assert {m.shape[1] for m in maps} == {net.channels}
