"""PolyNet: published size, modules written out, weights of the residuals, arguments."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from face_lfr.models.poly_blocks import BLOCK_A, BLOCK_B, BLOCK_C, Branches
from face_lfr.models.polynet import Poly, PolyNet, TwoWay


def small(**options: Any) -> PolyNet:
    sizes = {"modules": (2, 1, 1), "features": 8, "input_size": 75, "width": 0.125}
    return PolyNet(**(sizes | options))


def test_the_network_for_imagenet() -> None:
    """95,366,600 parameters are those of the published weights."""
    with torch.device("meta"):
        net = PolyNet(features=1000).eval()
        assert net(torch.empty(1, 3, 331, 331)).shape == (1, 1000)
    assert sum(parameter.numel() for parameter in net.parameters()) == 95_366_600
    assert len(net.stage_a) == 10
    assert [type(module) for module in net.stage_b] == [Poly, TwoWay] * 10
    assert [type(module) for module in net.stage_c] == [Poly, TwoWay] * 5


def test_weights_of_the_residuals_fall_linearly() -> None:
    with torch.device("meta"):
        net = PolyNet()
    betas = [module.beta for stage in (net.stage_a, net.stage_b, net.stage_c) for module in stage]
    assert len(betas) == 40
    assert betas == pytest.approx([1 - 0.3 / 39 * number for number in range(40)], abs=1e-12)
    published = {1: 0.992308, 9: 0.930769, 10: 0.923077, 29: 0.776923, 30: 0.769231, 39: 0.7}
    assert {number: round(betas[number], 6) for number in published} == published


def reference_poly(module: Poly, x: Tensor, split: tuple[int, ...]) -> Tensor:
    """h_i from the shared convolutions and the norms of order i."""

    def layer(shared: nn.Module, x: Tensor, order: int) -> Tensor:
        return shared.norms[order](shared.conv(x)).relu()

    total, h = x, x
    for order in range(3):
        entries = layer(module.entry, h, order).split(split, dim=1)
        maps = []
        for entry, tail in zip(entries, module.tails, strict=True):
            for shared in tail:
                entry = layer(shared, entry, order)
            maps.append(entry)
        closing = module.closings[order]
        h = closing.norm(closing.conv(torch.cat(maps, 1)))
        total = total + module.beta * h
        h = h.relu()
    return total.relu()


@pytest.mark.parametrize("branches", [BLOCK_B, BLOCK_C])
def test_a_poly_module_is_what_the_equation_says(branches: Branches) -> None:
    torch.manual_seed(0)
    wide = branches.scaled(0.125)
    module = Poly(24, wide, 0.9, partial(nn.BatchNorm2d)).double()
    x = torch.randn(2, 24, 9, 9, dtype=torch.float64)
    module(x)
    module.eval()
    wanted = reference_poly(module, x, wide.entry)
    torch.testing.assert_close(module(x), wanted, rtol=0, atol=1e-12)
    assert wanted.abs().max() > 1


def test_a_two_way_module_is_what_the_equation_says() -> None:
    torch.manual_seed(0)
    module = TwoWay(24, BLOCK_A.scaled(0.125), 0.8, nn.BatchNorm2d).double().eval()
    x = torch.randn(2, 24, 5, 5, dtype=torch.float64)
    first, second = module.ways
    wanted = F.relu(x + 0.8 * (first(x) + second(x)))
    torch.testing.assert_close(module(x), wanted, rtol=0, atol=1e-12)
    assert not torch.equal(first(x), second(x))


def test_every_parameter_takes_part() -> None:
    net = small(dropout=0.0)
    net(torch.randn(4, 3, 75, 75)).square().sum().backward()
    missing = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []
    net.eval()
    x = torch.randn(2, 3, 75, 75)
    assert torch.equal(net(x), net.embed(x))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"modules": (1, 1)}, r"modules=\[1, 1\]: need 3"),
        ({"input_size": 112}, "input_size=112: need 43"),
        ({"width": -1.0}, "width=-1.0"),
        ({"dropout": -0.1}, "dropout"),
    ],
)
def test_arguments_that_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        small(**options)
