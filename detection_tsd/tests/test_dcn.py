"""Deformable convolutions against a loop, and their place in the networks."""

import math

import pytest
import torch
from torch import Tensor, nn

from detection_tsd.models.dcn import DeformConv2d
from detection_tsd.models.norm import FrozenBatchNorm2d, convolve
from detection_tsd.models.resnet import ResNetFPN, ResNetTrunk


def plain(stride: int = 1, groups: int = 1) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(4, 6, 3, stride, padding=1, groups=groups, bias=False).double()


def maps(height: int = 6, width: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, height, width, generator=generator, dtype=torch.float64)


def shaken(layer: DeformConv2d) -> DeformConv2d:
    """Offsets of about a pixel."""
    torch.manual_seed(2)
    nn.init.normal_(layer.conv_offset.weight, std=0.3)
    nn.init.normal_(layer.conv_offset.bias, std=0.7)
    return layer


def bilinear(map_HW: Tensor, y: float, x: float) -> float:
    """Value between pixels, zero outside."""
    total, (height, width) = 0.0, map_HW.shape
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < height and 0 <= column < width:
                share = (1 - abs(y - row)) * (1 - abs(x - column))
                total += share * map_HW[row, column].item()
    return total


def by_loop(layer: DeformConv2d, x_BCHW: Tensor) -> Tensor:
    """Equation 2 of arXiv 1703.06211 and equation 1 of arXiv 1811.11168."""
    found = layer.conv_offset(x_BCHW)
    stride, wide = layer.stride[0], layer.in_channels // layer.groups
    out = torch.zeros(x_BCHW.shape[0], layer.out_channels, *found.shape[2:], dtype=x_BCHW.dtype)
    for b, o, i, j in torch.cartesian_prod(*(torch.arange(n) for n in out.shape)).tolist():
        first = o // (layer.out_channels // layer.groups) * wide
        for place in range(9):
            row, column = divmod(place, 3)
            y = i * stride - 1 + row + found[b, 2 * place, i, j].item()
            x = j * stride - 1 + column + found[b, 2 * place + 1, i, j].item()
            gate = 1.0
            if found.shape[1] == 27:
                gate = found[b, 18 + place, i, j].sigmoid().item()
            for c in range(wide):
                value = bilinear(x_BCHW[b, first + c], y, x)
                out[b, o, i, j] += gate * value * layer.weight[o, c, row, column].item()
    return out


@pytest.mark.parametrize(
    ("version", "stride", "groups"), [("v1", 1, 1), ("v1", 2, 2), ("v2", 2, 1), ("v2", 1, 2)]
)
def test_values_of_the_equation(version: str, stride: int, groups: int) -> None:
    layer = shaken(DeformConv2d(plain(stride, groups), version))
    with torch.no_grad():
        x = maps(4, 5)
        torch.testing.assert_close(layer(x), by_loop(layer, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_it_starts_as_the_plain_convolution(stride: int, groups: int) -> None:
    conv = plain(stride, groups)
    first, second = DeformConv2d(conv), DeformConv2d(conv, "v2")
    assert first.weight is conv.weight
    assert (first.conv_offset.out_channels, second.conv_offset.out_channels) == (18, 27)
    assert first.conv_offset.stride == (stride, stride)
    torch.testing.assert_close(first(maps()), conv(maps()), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(second(maps()), conv(maps()) / 2, rtol=1e-12, atol=1e-12)


def test_a_constant_offset_moves_the_map() -> None:
    conv, x = plain(), maps()
    layer = DeformConv2d(conv)
    with torch.no_grad():
        layer.conv_offset.bias[1::2] = 1.0  # every place one column to the right
    moved = torch.cat([x[..., 1:], torch.zeros_like(x[..., :1])], dim=3)
    # The column left of the map becomes the first of it, where the moved map has padding.
    got, expected = layer(x), conv(moved)
    torch.testing.assert_close(got[..., 1:], expected[..., 1:], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(got[..., 0], expected[..., 0])


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_gradcheck(version: str) -> None:
    layer = shaken(DeformConv2d(plain(2), version))
    names = [name for name, _ in layer.named_parameters()]
    assert set(names) == {"weight", "conv_offset.weight", "conv_offset.bias"}

    def run(x: Tensor, *values: Tensor) -> Tensor:
        parameters = dict(zip(names, values, strict=True))
        return torch.func.functional_call(layer, parameters, (x,))

    inputs = [maps(3, 3)[:1], *(p.detach().clone() for p in layer.parameters())]
    assert torch.autograd.gradcheck(run, [value.requires_grad_() for value in inputs])


def test_a_frozen_norm_folds_into_it() -> None:
    layer, norm = shaken(DeformConv2d(plain())), FrozenBatchNorm2d(6).double()
    norm.running_var.uniform_(0.5, 2)
    norm.running_mean.normal_()
    x = maps()
    torch.testing.assert_close(convolve(x, layer, norm), norm(layer(x)), rtol=1e-10, atol=1e-10)


def test_half_precision_keeps_places_in_float32() -> None:
    layer = shaken(DeformConv2d(plain())).float()
    x = maps().bfloat16()
    expected = layer(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, expected.bfloat16())


def test_stages_two_to_four_of_a_network() -> None:
    torch.manual_seed(0)
    net = ResNetTrunk((2, 2, 1, 1), dcn="v1")
    deformed = {name for name, m in net.named_modules() if isinstance(m, DeformConv2d)}
    assert deformed == {f"layer{s}.{b}.conv2" for s, b in ((2, 0), (2, 1), (3, 0), (4, 0))}
    state = {k: v for k, v in net.state_dict().items() if "conv_offset" not in k}
    ordinary = ResNetTrunk((2, 2, 1, 1))
    ordinary.load_state_dict(state)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for a, b in zip(net(x), ordinary(x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
            assert a.is_contiguous(memory_format=torch.channels_last)
    sum(m.square().mean() for m in net.train()(x)).backward()
    offsets = [p for name, p in net.named_parameters() if "conv_offset" in name]
    assert len(offsets) == 8
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in offsets)


def test_size_of_resnet50_with_offsets() -> None:
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in ResNetFPN(dcn=dcn).parameters()) for dcn in (False, True)]
    convolutions = {128: 4, 256: 6, 512: 3}
    assert sizes[1] - sizes[0] == sum(n * (c * 9 * 18 + 18) for c, n in convolutions.items())


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="version='v3'"):
        DeformConv2d(plain(), "v3")
    with pytest.raises(ValueError, match="padding_mode='reflect'"):
        DeformConv2d(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"))
