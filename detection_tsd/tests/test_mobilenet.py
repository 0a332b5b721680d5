"""MobileNetV2 is torchvision's."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v2

from detection_tsd.models.mobilenet import MobileNetV2FPN, MobileNetV2Trunk
from detection_tsd.models.norm import FrozenBatchNorm2d
from detection_tsd.tests.test_resnet import stir

# Blocks of torchvision's network whose outputs are the maps.
TAKEN = {1280: (3, 6, 13, 18), 320: (3, 6, 13, 17)}


def images() -> Tensor:
    return torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def maps_of(net: nn.Module, x: Tensor, taken: tuple[int, ...]) -> Iterator[Tensor]:
    for number, block in enumerate(net.features):
        x = block(x)
        if number in taken:
            yield x


@pytest.mark.parametrize("last", [320, 1280])
@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_values_and_keys_are_torchvisions(tmp_path: Path, last: int, norm: str) -> None:
    theirs = stir(mobilenet_v2()).eval()
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    ours = MobileNetV2Trunk(last, norm=norm, weights=str(tmp_path / "w.pth")).eval()
    expected = [k for k in theirs.state_dict() if k.startswith("features.")]
    if last == 320:
        expected = [k for k in expected if not k.startswith("features.18.")]
    assert list(ours.state_dict()) == expected
    with torch.no_grad():
        wanted = list(maps_of(theirs, images(), TAKEN[last]))
        got = ours(images())
    assert tuple(m.shape[1] for m in got) == ours.widths == (24, 32, 96, last)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_pyramid_and_freezing() -> None:
    net = MobileNetV2FPN(channels=8).train()
    assert net.strides == (4, 8, 16, 32, 64)
    found = net(images())
    assert [tuple(m.shape[2:]) for m in found.cls] == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    sum(m.square().mean() for m in found.cls).backward()
    frozen = {n.split(".")[2] for n, p in net.body.named_parameters("body") if p.grad is None}
    assert frozen == {"0", "1", "2", "3"}
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 52
    assert all(isinstance(m, FrozenBatchNorm2d) for m in norms)


def test_size() -> None:
    with torch.device("meta"):
        wide, narrow = MobileNetV2FPN(), MobileNetV2FPN(320)
        theirs = mobilenet_v2()
    trunk = sum(p.numel() for p in theirs.features.parameters())
    fpn = 4 * (256 * 256 * 9 + 256) + (24 + 32 + 96 + 1280) * 256 + 4 * 256
    assert sum(p.numel() for p in wide.parameters()) == trunk + fpn
    last = 320 * 1280 + 2 * 1280 + (1280 - 320) * 256
    assert sum(p.numel() for p in narrow.parameters()) == trunk + fpn - last


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="last_channels=160: need 320 or 1280"):
        MobileNetV2FPN(160)
