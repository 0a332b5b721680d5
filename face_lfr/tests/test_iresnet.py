"""IResNet: published sizes, sizes of maps, the frozen scale, starting weights, arguments."""

from typing import Any

import pytest
import torch
from torch import nn

from face_lfr.models.iresnet import IResNet

SIZES = {
    (2, 2, 2, 2): 24_025_600,
    (3, 4, 6, 3): 34_139_328,
    (3, 4, 14, 3): 43_590_848,
    (3, 13, 30, 3): 65_156_160,
}


def small(**options: Any) -> IResNet:
    sizes = {"layers": (1, 2, 1, 1), "widths": (4, 8, 12, 16), "features": 6, "input_size": 32}
    return IResNet(**(sizes | options))


@pytest.mark.parametrize("layers", SIZES)
def test_check_01_parameters(layers: tuple[int, ...]) -> None:
    with torch.device("meta"):
        net = IResNet(layers)
    assert sum(parameter.numel() for parameter in net.parameters()) == SIZES[layers]
    assert net.features == 512


@pytest.mark.parametrize(
    ("size", "stride", "side"), [(112, 1, 7), (48, 1, 3), (32, 1, 2), (33, 1, 3), (224, 2, 7)]
)
def test_maps(size: int, stride: int, side: int) -> None:
    with torch.device("meta"):
        net = small(input_size=size, stem_stride=stride).eval()
        assert net.fc.in_features == 16 * side * side
        assert net(torch.empty(2, 3, size, size)).shape == (2, 6)


def test_the_last_scale_is_fixed() -> None:
    net = small()
    net(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert net.last_norm.weight.grad is None
    assert (net.last_norm.weight == 1).all()
    trained = [p for p in net.parameters() if p is not net.last_norm.weight]
    assert all(parameter.grad is not None for parameter in trained)


def test_features_have_no_mean_and_unit_variance_in_training() -> None:
    feature_BD = small()(torch.randn(64, 3, 32, 32))
    assert feature_BD.mean(0).abs().max() < 1e-5
    assert (feature_BD.var(0, unbiased=False) - 1).abs().max() < 1e-2
    net = small().eval()
    x = torch.randn(3, 3, 32, 32)
    assert torch.equal(net(x), net.embed(x))


def test_starting_weights() -> None:
    torch.manual_seed(0)
    net = IResNet((1, 1, 1, 1), (32, 32, 64, 64), 8, 32)
    convs = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    stds = [conv.weight.std().item() for conv in convs if conv.weight.numel() > 5000]
    assert stds == pytest.approx([0.1] * len(stds), rel=0.05)
    assert len(stds) >= 6


def test_dropout_is_before_the_last_layer() -> None:
    net = small(dropout=0.5)
    x = torch.randn(4, 3, 32, 32)
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"layers": (1, 1, 1)}, r"layers=\[1, 1, 1\]: need 4"),
        ({"widths": (4, 8, 12, 0)}, "widths"),
        ({"stem_stride": 3}, "stem_stride=3: need 1 or 2"),
        ({"dropout": 1.5}, r"dropout=1.5: need a number in \[0, 1\)"),
        ({"input_size": 0}, "input_size"),
    ],
)
def test_arguments_that_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        small(**options)
