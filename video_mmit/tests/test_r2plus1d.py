"""R(2+1)D: split convolutions, torchvision's blocks where the widths agree, sizes."""

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from video_mmit.models.r2plus1d import R2Plus1D, SplitConv


def clip(videos: int = 2, frames: int = 4, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(videos, frames, 3, size, size, generator=generator)


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("inputs", "outputs", "kernel", "middle"),
    [(3, 64, (3, 7), 83), (64, 64, (3, 3), 144), (64, 128, (3, 3), 230), (512, 512, (3, 3), 1152)],
)
def test_the_middle_width_keeps_the_number_of_weights(
    inputs: int, outputs: int, kernel: tuple[int, int], middle: int
) -> None:
    with torch.device("meta"):
        conv = SplitConv(inputs, outputs, kernel, (1, 1))
    assert conv.spatial.out_channels == middle
    whole = inputs * outputs * kernel[0] * kernel[1] ** 2
    split = conv.spatial.weight.numel() + conv.temporal.weight.numel()
    assert whole - (kernel[1] ** 2 * inputs + kernel[0] * outputs) < split <= whole


def test_a_split_convolution_is_its_two_parts() -> None:
    torch.manual_seed(0)
    conv, x = SplitConv(3, 4, (3, 3), (2, 2)).eval(), clip(1, 5, 7).transpose(1, 2)
    with torch.no_grad():
        out = conv(x)
        assert out.shape == (1, 4, 3, 4, 4)
        weight = conv.spatial.weight[:, :, 0]
        frames = [F.conv2d(x[:, :, t], weight, stride=2, padding=1) for t in range(5)]
        frames = [conv.bn(f[:, :, None])[:, :, 0].relu() for f in frames]
        zero = torch.zeros_like(frames[0])
        padded = [zero, *frames, zero]
        for t in range(3):
            expected = sum(
                torch.einsum(
                    "oc,nchw->nohw", conv.temporal.weight[:, :, k, 0, 0], padded[2 * t + k]
                )
                for k in range(3)
            )
            torch.testing.assert_close(out[:, :, t], expected, rtol=1e-4, atol=1e-5)


def test_the_first_stage_is_torchvisions() -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.video.r2plus1d_18().layer1.eval()
    ours = R2Plus1D(400).layer1.eval()
    state = {}
    for key, value in theirs.state_dict().items():  # convN.0: 0 spatial, 1 norm, 3 temporal
        for n in (1, 2):
            for number, part in (("0", "spatial"), ("1", "bn"), ("3", "temporal")):
                key = key.replace(f"conv{n}.0.{number}.", f"conv{n}.{part}.")
            key = key.replace(f"conv{n}.1.", f"bn{n}.")
        state[key] = value
    ours.load_state_dict(state)
    x = torch.randn(1, 64, 3, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("max_pool", [True, False])
def test_any_size_of_clip(max_pool: bool) -> None:
    net = R2Plus1D(5, depth=10, max_pool=max_pool).eval()
    assert net.num_segments is None
    with torch.no_grad():
        for frames, size in ((1, 32), (5, 23)):
            assert net(clip(1, frames, size)).shape == (1, 5)
        x = net.maxpool(net.conv1(clip(1, 4, 32).transpose(1, 2)))
    assert x.shape == (1, 64, 4, 8, 8) if max_pool else (1, 64, 4, 16, 16)


def test_videos_do_not_mix_and_frames_have_an_order() -> None:
    torch.manual_seed(0)
    net, x = R2Plus1D(5, depth=10).eval(), clip()
    with torch.no_grad():
        out = net(x)
        torch.testing.assert_close(net(x.flip(0)), out.flip(0), rtol=1e-4, atol=1e-5)
        assert float((net(x.flip(1)) - out).abs().max()) > 1e-4


def test_every_parameter_gets_a_gradient() -> None:
    torch.manual_seed(0)
    net = R2Plus1D(5, depth=10)
    net(clip()).square().sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_check_04_parameters_of_r2plus1d() -> None:
    with torch.device("meta"):
        nets = {depth: R2Plus1D(400, depth) for depth in (18, 34, 50)}
        theirs = torchvision.models.video.r2plus1d_18()
    assert count(nets[18]) == 33_383_797
    assert count(theirs) == 31_505_325  # narrower second convolutions in three blocks, other stem
    assert count(nets[18]) < count(nets[50]) < count(nets[34])


@pytest.mark.parametrize(("max_pool", "billions"), [(True, 11.8), (False, 42.1)])
def test_check_04_operations_of_r2plus1d(max_pool: bool, billions: float) -> None:
    with torch.device("meta"):
        net = R2Plus1D(400, max_pool=max_pool).eval()
        with FlopCounterMode(display=False) as counter:
            net(torch.empty(1, 16, 3, 112, 112))
    assert counter.get_total_flops() / 2 == pytest.approx(billions * 1e9, rel=0.01)


def test_check_13_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="depth=20"):
        R2Plus1D(5, depth=20)
    with pytest.raises(ValueError, match="has C=4, need C=3"):
        R2Plus1D(5, depth=10)(clip().transpose(1, 2))
