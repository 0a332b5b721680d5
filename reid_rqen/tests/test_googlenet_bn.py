"""Trunks: sizes, counts, and Caffe's pooling arithmetic."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from common.log import InputError
from reid_rqen.models.googlenet_bn import BLOCKS, GoogLeNetBN, Inception, Widths
from reid_rqen.models.heads import AuxiliaryHead, classifier, fan_in_uniform_
from reid_rqen.models.resnet import ResNet50
from reid_rqen.models.tiny import TinyTrunk

META = torch.device("meta")


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("size", "macs", "grid"),
    [((224, 224), 2_017_827_840, (7, 7)), ((256, 128), 1_317_765_120, (8, 4))],
)
def test_check_01_trunk(size: tuple[int, int], macs: int, grid: tuple[int, int]) -> None:
    with META:
        trunk = GoogLeNetBN().eval()
        with FlopCounterMode(display=False) as flops:
            out = trunk(torch.empty(2, 3, *size))
    rows, columns = size
    assert out.map_BCHW.shape == (2, 1024, *grid)
    assert out.pool2_BCHW.shape == (2, 192, rows // 8, columns // 8)
    assert [tap.shape[1:] for tap in out.taps] == [
        (576, rows // 16, columns // 16),
        (1024, *grid),
    ]
    assert flops.get_total_flops() == 2 * macs * 2  # 2 frames; a MAC is 2 FLOP
    assert count(trunk) == 10_169_984
    assert sum(isinstance(module, nn.Conv2d) for module in trunk.modules()) == 69
    assert sum(isinstance(module, nn.BatchNorm2d) for module in trunk.modules()) == 69


def test_block_widths_chain() -> None:
    with META:
        trunk = GoogLeNetBN()
    widths = {name: block.channels for name, block in trunk.blocks.items()}
    assert list(widths.values()) == [256, 320, 576, 576, 576, 576, 576, 1024, 1024, 1024]
    assert list(widths) == list(BLOCKS)


def average_3x3(x_BCHW: Tensor) -> Tensor:
    """Window 3, stride 1, padding 1, always divided by 9."""
    padded = nn.functional.pad(x_BCHW, (1, 1, 1, 1))
    rows, columns = x_BCHW.shape[2:]
    shifts = [padded[:, :, i : i + rows, j : j + columns] for i in range(3) for j in range(3)]
    return torch.stack(shifts).sum(0) / 9


def test_inception_concatenates_in_order() -> None:
    torch.manual_seed(0)
    block = Inception(5, Widths(2, (3, 4), (3, 5, 6), 7)).double().eval()
    x = torch.rand(2, 5, 6, 4, dtype=torch.float64)
    one, three, double, pooled = block(x).split([2, 4, 6, 7], dim=1)
    assert block.one is not None
    assert block.projection is not None
    torch.testing.assert_close(one, block.one(x))
    torch.testing.assert_close(three, block.three(block.three_reduce(x)))
    torch.testing.assert_close(double, block.double_b(block.double_a(block.double_reduce(x))))
    torch.testing.assert_close(pooled, block.projection(average_3x3(x)))


def test_reduction_block_passes_the_pool_through() -> None:
    block = Inception(5, Widths(0, (3, 4), (3, 5, 6), 0, "max", 2)).eval()
    x = torch.rand(1, 5, 28, 28)
    y = block(x)
    assert y.shape == (1, 4 + 6 + 5, 14, 14)
    # Caffe: no padding, the last window is clipped.
    last = x[:, :, 26:28, 26:28].amax(dim=(2, 3))
    torch.testing.assert_close(y[:, -5:, 13, 13], last)
    torch.testing.assert_close(y[:, -5:, 0, 0], x[:, :, 0:3, 0:3].amax(dim=(2, 3)))


@pytest.mark.parametrize(("size", "grid"), [(14, 4), (7, 2)])
def test_auxiliary_pool_clips_its_last_window(size: int, grid: int) -> None:
    torch.manual_seed(0)
    head = AuxiliaryHead(3, 6, (grid, grid)).eval()
    tap = torch.rand(2, 3, size, size)
    pooled = torch.empty(2, 3, grid, grid)
    for i in range(grid):
        for j in range(grid):
            window = tap[:, :, 3 * i : min(3 * i + 5, size), 3 * j : min(3 * j + 5, size)]
            pooled[:, :, i, j] = window.mean(dim=(2, 3))
    x = head.conv_bn(head.conv(pooled)).relu()
    expected = head.classifier(head.fc_bn(head.fc(x.flatten(1))).relu())
    torch.testing.assert_close(head(tap), expected)


def test_auxiliary_head_names_the_grid() -> None:
    with META, pytest.raises(ValueError, match=r"pools to \[5, 2\]"):
        AuxiliaryHead(576, 10, (4, 4))(torch.empty(2, 576, 16, 8))
    with META, pytest.raises(ValueError, match=r"map of \[4, 2\], need at least 3x3"):
        AuxiliaryHead(576, 10, (1, 1))(torch.empty(2, 576, 4, 2))


def test_caffe_init() -> None:
    torch.manual_seed(0)
    weight = fan_in_uniform_(torch.empty(64, 16, 3, 3))
    assert weight.abs().max() <= (3 / 144) ** 0.5
    assert weight.var().item() == pytest.approx(1 / 144, rel=0.05)
    assert not classifier(8, 3).bias.any()
    with pytest.raises(ValueError, match="num_classes=0"):
        classifier(8, 0)


def test_channels_last_gives_the_same_map() -> None:
    torch.manual_seed(0)
    trunk = GoogLeNetBN().eval()
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        plain = trunk(image)
        trunk.to(memory_format=torch.channels_last)
        last = trunk(image.to(memory_format=torch.channels_last))
    assert last.map_BCHW.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last.map_BCHW, plain.map_BCHW, rtol=1e-4, atol=1e-5)
    assert (plain.map_BCHW >= 0).all()


def test_trunk_weights_come_from_a_file(tmp_path: Path) -> None:
    trunk = TinyTrunk(widths=(2, 3), strides=(2, 1))
    source = GoogLeNetBN()
    whole = {f"trunk.{name}": value for name, value in source.state_dict().items()}
    save_file(whole, tmp_path / "whole.safetensors")
    loaded = GoogLeNetBN(weights=str(tmp_path / "whole.safetensors"))
    assert torch.equal(loaded.blocks["5b"].three.conv.weight, source.blocks["5b"].three.conv.weight)
    save_file(trunk.state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"other\.safetensors: does not fit this trunk"):
        GoogLeNetBN(weights=str(tmp_path / "other.safetensors"))
    with pytest.raises(InputError, match="no such file"):
        GoogLeNetBN(weights=str(tmp_path / "none"))
    (tmp_path / "text").write_text("hello")
    with pytest.raises(InputError, match="no safetensors file"):
        ResNet50(weights=str(tmp_path / "text"))


@pytest.mark.parametrize(("last_stride", "grid"), [(2, 7), (1, 14)])
def test_resnet_sizes(last_stride: int, grid: int) -> None:
    with META:
        trunk = ResNet50(last_stride=last_stride)
        out = trunk(torch.empty(2, 3, 224, 224))
    assert out.map_BCHW.shape == (2, trunk.channels, grid, grid)
    assert out.pool2_BCHW.shape == (2, trunk.pool2_channels, 28, 28)
    assert count(trunk) == 23_508_032  # torchvision's 25,557,032 without the classifier


def test_resnet_and_tiny_reject_wrong_options() -> None:
    with pytest.raises(ValueError, match="last_stride=3"):
        ResNet50(last_stride=3)
    with pytest.raises(ValueError, match=r"strides=\[2\]"):
        TinyTrunk(widths=(2, 3), strides=(2,))


def test_tiny_trunk_keeps_seven_rows() -> None:
    out = TinyTrunk()(torch.rand(2, 3, 56, 28))
    assert out.map_BCHW.shape == (2, 64, 7, 4)
    assert out.pool2_BCHW.shape == (2, 48, 14, 7)
    assert out.taps == ()
