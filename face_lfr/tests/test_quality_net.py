"""Quality network: published size and cost, scores without bounds, starting weights, arguments."""

from typing import Any

import pytest
import torch
from torch import nn

from face_lfr.flops import count
from face_lfr.models.quality_net import QualityNet


def test_check_07_parameters_and_cost() -> None:
    net = QualityNet()
    assert sum(parameter.numel() for parameter in net.parameters()) == 122_569
    assert count(net, 112, "mac") == 39_651_632


def test_check_07_scores_have_no_bounds() -> None:
    torch.manual_seed(0)
    net = QualityNet(input_size=32).eval()
    x = torch.randn(64, 3, 32, 32)
    with torch.no_grad():
        scores_B = net(x)
        assert scores_B.shape == (64,)
        nn.init.constant_(net.score.weight, 50.0)
        assert net(x).abs().max() > 10
        net.score.weight.neg_()
        assert net(x).min() < -10
        assert net(x[:1]).shape == (1,)
        assert net(x[:0]).shape == (0,)


def test_maps_and_slopes() -> None:
    net = QualityNet().eval()
    sides: list[tuple[int, ...]] = []
    for stage in net.stages:
        stage.register_forward_hook(lambda _, __, y: sides.append(tuple(y.shape[1:])))
    net(torch.randn(1, 3, 112, 112))
    assert sides == [(8, 56, 56), (16, 28, 28), (32, 14, 14), (48, 7, 7)]
    slopes = [module.weight.numel() for module in net.modules() if isinstance(module, nn.PReLU)]
    assert slopes == [1] * 17


def test_every_parameter_takes_part() -> None:
    net = QualityNet(input_size=32)
    net(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_starting_weights() -> None:
    torch.manual_seed(0)
    for module in QualityNet((32, 48, 64, 96)).modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_out = module.weight.shape[0] * module.weight[0, 0].numel()
            bound = (2 / fan_out) ** 0.5
            assert 0.9 * bound < module.weight.abs().max() <= bound


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"channels": (8, 16)}, r"channels=\[8, 16\]: need 4"),
        ({"blocks": 0}, r"blocks, input_size=\[0, 112\]"),
    ],
)
def test_arguments_that_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        QualityNet(**options)
