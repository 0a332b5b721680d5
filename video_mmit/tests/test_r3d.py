"""R3D: torchvision's blocks, its sizes and its errors."""

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from video_mmit.models.non_local import add_non_local
from video_mmit.models.r3d import R3D


def clip(videos: int = 2, frames: int = 4, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(videos, frames, 3, size, size, generator=generator)


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_stages_are_torchvisions() -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.video.r3d_18().eval()
    torch.manual_seed(0)
    ours = R3D(400).eval()
    state = {}
    for key, value in theirs.state_dict().items():  # convN.0 is a convolution, convN.1 its norm
        for n in (1, 2):
            key = key.replace(f"conv{n}.0.", f"conv{n}.").replace(f"conv{n}.1.", f"bn{n}.")
        state[key.replace("fc.", "head.")] = value
    rest = {k: v for k, v in ours.state_dict().items() if not k.startswith(("layer", "head"))}
    ours.load_state_dict({k: v for k, v in state.items() if not k.startswith("stem")} | rest)
    x = clip()
    with torch.no_grad():
        map_NCTHW = ours.maxpool(ours.bn1(ours.conv1(x.transpose(1, 2))).relu())
        assert map_NCTHW.shape == (2, 64, 2, 8, 8)
        theirs.stem = nn.Identity()
        torch.testing.assert_close(ours(x), theirs(map_NCTHW), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("frames", "size"), [(1, 32), (3, 45), (16, 33)])
def test_any_size_of_clip(frames: int, size: int) -> None:
    net = R3D(5, depth=10).eval()
    assert net.num_segments is None
    with torch.no_grad():
        assert net(clip(1, frames, size)).shape == (1, 5)


def test_videos_do_not_mix_and_frames_have_an_order() -> None:
    torch.manual_seed(0)
    net, x = R3D(5, depth=10).eval(), clip()
    with torch.no_grad():
        out = net(x)
        torch.testing.assert_close(net(x.flip(0)), out.flip(0), rtol=1e-4, atol=1e-5)
        assert float((net(x.flip(1)) - out).abs().max()) > 1e-4


def test_every_parameter_gets_a_gradient() -> None:
    torch.manual_seed(0)
    net = R3D(5, depth=10, dropout=0.1)
    net(clip()).square().sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_memory_format_changes_nothing() -> None:
    torch.manual_seed(0)
    net, x = R3D(5, depth=18, non_local=lambda n, t: add_non_local(n, t, {"layer2": [1]})), clip()
    net.layer2[1].non_local.norm.weight.data.fill_(1)
    net.eval()
    with torch.no_grad():
        expected = net(x)
        net.to(memory_format=torch.channels_last_3d)
        torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)


def test_check_04_size_of_r3d() -> None:
    with torch.device("meta"):
        nets = {depth: R3D(400, depth) for depth in (18, 34, 50)}
        with FlopCounterMode(display=False) as counter:
            nets[18](torch.empty(1, 16, 3, 112, 112))
    assert count(nets[18]) == 33_409_104
    # Only the stem differs from torchvision's: 7 instead of 3 frames.
    with torch.device("meta"):
        theirs = torchvision.models.video.r3d_18()
    assert count(nets[18]) - count(theirs) == 64 * 3 * 49 * 4
    assert counter.get_total_flops() / 2 == pytest.approx(8.3e9, rel=0.01)
    assert count(nets[18]) < count(nets[50]) < count(nets[34])


def test_check_13_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"depth=20: need one of \(10, 18, 34"):
        R3D(5, depth=20)
    with pytest.raises(ValueError, match="num_classes=0"):
        R3D(0)
    net = R3D(5, depth=10)
    with pytest.raises(ValueError, match="4 dimensions"):
        net(clip()[0])
    with pytest.raises(ValueError, match="has C=4, need C=3"):
        net(clip().transpose(1, 2))
