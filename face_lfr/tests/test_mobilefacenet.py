"""MobileFaceNet: published sizes, the body, the global head, arguments."""

from typing import Any

import pytest
import torch
from torch import nn

from face_lfr.models.mobilefacenet import MobileFaceNet


def small(**options: Any) -> MobileFaceNet:
    sizes = {"blocks": (1, 1, 2, 1), "scale": 1, "features": 16, "input_size": 48}
    return MobileFaceNet(**(sizes | options))


def test_check_01_parameters() -> None:
    with torch.device("meta"):
        net = MobileFaceNet()
    assert sum(parameter.numel() for parameter in net.parameters()) == 2_059_520
    assert net.features == 512


def test_residuals_and_halvings() -> None:
    net = small(blocks=(2, 1, 2, 1)).eval()
    sides: list[int] = []
    for part in net.body:
        part.register_forward_hook(lambda _, __, y: sides.append(y.shape[-1]))
    assert net(torch.randn(2, 3, 48, 48)).shape == (2, 16)
    assert sides == [24, 24, 12, 12, 6, 6, 3, 3, 3]
    block = net.body[5][1]
    x = torch.randn(2, 128, 6, 6)
    torch.testing.assert_close(block(x), x + block.layers(x))
    assert not net.body[2].residual


@pytest.mark.parametrize(("size", "kernel"), [(112, 7), (48, 3), (32, 2)])
def test_the_head_sees_the_whole_map(size: int, kernel: int) -> None:
    net = small(input_size=size).eval()
    assert net.head.conv.kernel_size == (kernel, kernel)
    assert net.head.conv.groups == 512
    assert net(torch.randn(1, 3, size, size)).shape == (1, 16)


def test_the_wide_network_shares_64_groups_at_its_start() -> None:
    with torch.device("meta"):
        net = MobileFaceNet()
    first = net.body[1].conv
    assert (first.groups, tuple(first.weight.shape)) == (64, (128, 2, 3, 3))
    assert isinstance(net.body[1].act, nn.PReLU)
    assert isinstance(net.head.act, nn.Identity)
    assert net.fc.bias is None
    assert small(head_bias=True).fc.bias.abs().sum() == 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"blocks": (1, 1, 1)}, r"blocks=\[1, 1, 1\]: need 4"),
        ({"inside": (1,) * 6}, "inside"),
        ({"scale": 0}, "scale"),
    ],
)
def test_arguments_that_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        small(**options)
