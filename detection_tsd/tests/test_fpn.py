"""The pyramid is torchvision's; what trunks and backbones share."""

from collections import OrderedDict

import pytest
import torch
from torch import Tensor
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from detection_tsd.models.fpn import FPN, Features, PyramidBackbone, Trunk
from detection_tsd.models.norm import FrozenBatchNorm2d
from detection_tsd.models.tiny import TinyTrunk

WIDTHS = (8, 16, 24, 32)


def maps(height: int = 24, width: int = 40) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(-(-height // s), -(-width // s)) for s in (1, 2, 4, 8)]
    return [torch.randn(2, c, *s, generator=generator) for c, s in zip(WIDTHS, sizes, strict=True)]


@pytest.mark.parametrize("size", [(24, 40), (21, 35), (1, 1)])
def test_values_and_keys_are_torchvisions(size: tuple[int, int]) -> None:
    ours, theirs = FPN(WIDTHS, 12), FeaturePyramidNetwork(list(WIDTHS), 12, LastLevelMaxPool())
    theirs.load_state_dict(ours.state_dict())
    x = [m.requires_grad_() for m in maps(*size)]
    named = OrderedDict((str(level), m) for level, m in enumerate(x))
    got, expected = ours(x), list(theirs(named).values())
    assert len(got) == 5
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    sums = (sum(m.sin().sum() for m in pyramid) for pyramid in (got, expected))
    for a, b in zip(*(torch.autograd.grad(total, x) for total in sums), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_sixth_map_is_every_second_pixel() -> None:
    *_, fifth, sixth = FPN(WIDTHS, 12)(maps(56, 72))
    assert torch.equal(sixth, fifth[:, :, ::2, ::2])
    assert len(FPN(WIDTHS, 12, extra=False)(maps())) == 4


def test_start_values_are_xavier() -> None:
    torch.manual_seed(0)
    net = FPN((1024,), 256)
    lateral, output = net.inner_blocks[0][0], net.layer_blocks[0][0]
    for conv, fan in ((lateral, 1024 + 256), (output, 2 * 9 * 256)):
        bound = (6 / fan) ** 0.5
        assert 0.99 * bound < conv.weight.detach().abs().max().item() <= bound
        assert conv.weight.detach().std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
        assert not conv.bias.any()


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"in_channels=\[\]"):
        FPN(())
    with pytest.raises(ValueError, match=r"in_channels=\[8, 0\]"):
        FPN((8, 0))
    with pytest.raises(ValueError, match="channels=0"):
        FPN(WIDTHS, 0)
    with pytest.raises(ValueError, match="maps: 3 of them, need 4"):
        FPN(WIDTHS, 4)(maps()[:3])
    with pytest.raises(ValueError, match="frozen_stages=-2"):
        TinyTrunk(frozen_stages=-2)
    with pytest.raises(ValueError, match="frozen_stages=3: there are 2 stages"):
        TinyTrunk(frozen_stages=3)


def test_both_branches_read_the_same_maps() -> None:
    net = PyramidBackbone(TinyTrunk((4, 6, 8)), 5, strides=(4, 8), extra=True)
    found = net(torch.zeros(1, 3, 32, 48))
    assert isinstance(found, Features)
    assert found.cls is found.reg
    assert net.strides == (4, 8, 16)
    assert (net.roi_levels, net.channels) == (2, 5)
    assert [tuple(m.shape) for m in found.cls] == [(1, 5, 8, 12), (1, 5, 4, 6), (1, 5, 2, 3)]


@pytest.mark.parametrize("frozen", [-1, 0, 1, 2])
def test_frozen_parts_take_no_gradient_and_no_statistics(frozen: int) -> None:
    net = TinyTrunk((4, 6, 8), frozen_stages=frozen).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    parts = {"stem": 0, "layer1": 1, "layer2": 2}
    found = net(torch.randn(2, 3, 32, 32))
    assert [m.requires_grad for m in found] == [frozen < 1, frozen < 2]
    if frozen < 2:
        sum(m.square().sum() for m in found).backward()
    for name, p in net.named_parameters():
        assert p.requires_grad == (parts[name.split(".")[0]] > frozen), name
        assert (p.grad is not None) == p.requires_grad, name
    for name, value in net.named_buffers():
        moved = not torch.equal(value, before[name])
        assert moved == (parts[name.split(".")[0]] > frozen), name
    assert sum(isinstance(m, FrozenBatchNorm2d) for m in net.modules()) == (0, 1, 3, 6)[frozen + 1]


def test_blocks_computed_again_give_the_same_gradients() -> None:
    grads = []
    for again in (False, True):
        torch.manual_seed(0)
        net: Trunk = TinyTrunk((4, 6, 8), norm="frozen")
        net.checkpoint_blocks = again
        sum(m.square().sum() for m in net(torch.ones(1, 3, 32, 32))).backward()
        grads.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_maps_are_channels_last() -> None:
    net = PyramidBackbone(TinyTrunk((4, 6, 8)), 5, strides=(4, 8))
    weights = [p for p in net.parameters() if p.dim() == 4 and p.shape[2] > 1]
    last = {"memory_format": torch.channels_last}
    assert all(p.is_contiguous(**last) for p in weights)
    assert all(m.is_contiguous(**last) for m in net(torch.randn(2, 3, 32, 32)).cls)
