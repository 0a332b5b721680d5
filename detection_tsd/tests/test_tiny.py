"""The small backbone of the synthetic task."""

import pytest
import torch
from torch import nn

from detection_tsd.models.norm import CrossRankBatchNorm2d, FrozenBatchNorm2d
from detection_tsd.models.tiny import TinyFPN, TinyTrunk


def test_shapes_and_size() -> None:
    net = TinyFPN()
    assert net.strides == (4, 8)
    assert (net.channels, net.roi_levels) == (32, 2)
    assert [tuple(m.shape) for m in net(torch.zeros(2, 3, 96, 104)).cls] == [
        (2, 32, 24, 26),
        (2, 32, 12, 13),
    ]
    assert sum(isinstance(m, nn.Conv2d) for m in net.body.modules()) == 6
    # With a 128-wide sibling head on 7x7 bins and six classes: 0.31 M.
    assert sum(p.numel() for p in net.parameters()) == 91_120


def test_every_parameter_gets_a_gradient() -> None:
    net = TinyFPN()
    sum(m.square().mean() for m in net(torch.randn(2, 3, 32, 32)).cls).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_norms() -> None:
    kinds = {"batch": nn.BatchNorm2d, "sync": CrossRankBatchNorm2d, "frozen": FrozenBatchNorm2d}
    for norm, kind in kinds.items():
        norms = [m for m in TinyTrunk(norm=norm).modules() if isinstance(m, nn.BatchNorm2d)]
        assert {type(m) for m in norms} == {kind}


@pytest.mark.parametrize("channels", [(16, 32), (16, 32, 0)])
def test_bad_widths_are_named(channels: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"channels=\[16, 32.*: need three positive widths"):
        TinyTrunk(channels)
