"""Non-local blocks: their sum over positions, their start, where they go."""

import math

import pytest
import torch
from torch import Tensor, nn

from video_mmit.models.non_local import MODES, NonLocal, NonLocalClip, NonLocalFrames, add_non_local
from video_mmit.models.r3d import R3D
from video_mmit.models.resnet import ResNet
from video_mmit.models.slowfast import SlowFast
from video_mmit.models.tiny import TinyNet

N, T, C = 2, 3, 4


def maps(size: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N * T, C, size, size, generator=generator, dtype=torch.float64)


def block(mode: str = "embedded", pool: bool = True) -> NonLocal:
    torch.manual_seed(0)
    net = NonLocal(C, mode, pool).double().eval()
    nn.init.uniform_(net.norm.weight, 0.5, 1.5)
    nn.init.uniform_(net.norm.bias)
    net.norm.running_mean.uniform_(-1, 1)
    net.norm.running_var.uniform_(0.5, 1.5)
    return net


def halved(position_THW: dict) -> dict:
    """Largest entries of 2x2 squares, for vectors by (t, h, w)."""
    out: dict = {}
    for (t, h, w), vector in position_THW.items():
        key = (t, h // 2, w // 2)
        out[key] = torch.maximum(out[key], vector) if key in out else vector
    return out


def looped(net: NonLocal, x_BCHW: Tensor) -> Tensor:
    """The published sum over positions, with no matrix product."""
    out = x_BCHW.clone()
    size = x_BCHW.shape[-1]
    for n in range(N):
        at = {
            (t, h, w): x_BCHW[n * T + t, :, h, w]
            for t in range(T)
            for h in range(size)
            for w in range(size)
        }
        plain = net.mode == "gaussian"
        key = {p: x if plain else net.phi.weight @ x + net.phi.bias for p, x in at.items()}
        value = {p: net.g.weight @ x + net.g.bias for p, x in at.items()}
        if net.pool:
            key, value = halved(key), halved(value)
        for (t, h, w), x in at.items():
            query = x if plain else net.theta.weight @ x + net.theta.bias
            score = {p: float(query @ vector) for p, vector in key.items()}
            weight = score if net.mode == "dot" else {p: math.exp(s) for p, s in score.items()}
            total = len(weight) if net.mode == "dot" else sum(weight.values())
            y = sum(weight[p] / total * value[p] for p in weight)
            y = net.out.weight @ y + net.out.bias
            norm = net.norm
            y = (y - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
            out[n * T + t, :, h, w] += y * norm.weight + norm.bias
    return out


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pool", [True, False])
def test_equals_the_sum_over_positions(mode: str, pool: bool) -> None:
    net, x = block(mode, pool), maps()
    with torch.no_grad():
        torch.testing.assert_close(net(x, T), looped(net, x))
        last = x.to(memory_format=torch.channels_last)
        torch.testing.assert_close(net(last, T), net(x, T))


@pytest.mark.parametrize("mode", MODES)
def test_starts_as_the_identity(mode: str) -> None:
    torch.manual_seed(0)
    net, x = NonLocal(C, mode).train(), maps().float()
    assert torch.equal(net(x, T), x)
    net(x, T).square().sum().backward()
    assert net.norm.weight.grad is not None
    assert net.norm.weight.grad.any()  # so it can leave the identity


def test_attention_stays_within_a_clip() -> None:
    net, x = block(), maps()
    changed = x.clone()
    changed[T] += 1
    with torch.no_grad():
        before, after = net(x, T), net(changed, T)
    assert torch.equal(before[:T], after[:T])
    assert bool((before[T + 1 :] != after[T + 1 :]).any())


def names(net: nn.Module) -> list[str]:
    kinds = (NonLocalFrames, NonLocalClip)
    return [name for name, module in net.named_modules() if isinstance(module, kinds)]


def test_goes_where_resnet50_has_it() -> None:
    with torch.device("meta"):
        net = ResNet("bottleneck", (3, 4, 6, 3))
        add_non_local(net, 8)
        clips = R3D(10, depth=50, non_local=add_non_local)
    stages = [f"layer2.{i}" for i in (0, 2)] + [f"layer3.{i}" for i in (0, 2, 4)]
    assert names(net) == names(clips) == stages
    assert net.layer2[0].non_local.norm.num_features == 512
    assert isinstance(net.layer3[4], NonLocalFrames)
    assert isinstance(clips.layer3[4], NonLocalClip)


def test_goes_into_the_slow_pathway() -> None:
    with torch.device("meta"):
        net = SlowFast(10, non_local=add_non_local)
    assert names(net)[0] == "slow.layer2.0"
    assert len(names(net)) == 5


def test_clips_and_folded_frames_agree() -> None:
    net, x = block(), maps()
    clip = NonLocalClip(nn.Identity(), net)
    x_NCTHW = x.unflatten(0, (N, T)).transpose(1, 2)
    with torch.no_grad():
        expected = NonLocalFrames(nn.Identity(), net, T)(x).unflatten(0, (N, T)).transpose(1, 2)
        torch.testing.assert_close(clip(x_NCTHW), expected)
        last = x_NCTHW.contiguous(memory_format=torch.channels_last_3d)
        torch.testing.assert_close(clip(last), expected)


def test_check_13_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="mode='softmax'"):
        NonLocal(4, "softmax")
    with pytest.raises(ValueError, match="channels=5: need an even number"):
        NonLocal(5)
    with pytest.raises(ValueError, match=r"batch of 6 frames .* num_segments=4"):
        block()(maps(), 4)
    with pytest.raises(ValueError, match=r"blocks\['layer2'\] has \[2\], the stage has 1"):
        add_non_local(TinyNet(), T)
    with pytest.raises(ValueError, match="stage 'layer9'"):
        add_non_local(TinyNet(), T, {"layer9": [0]})
    with pytest.raises(ValueError, match="num_segments=None"):
        add_non_local(TinyNet(), None, {"layer2": [0]})
