"""SlowFast: a functional re-computation of both variants, slow frames, sizes, errors."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from video_mmit.models.slowfast import SlowFast

K = 5


def clip(videos: int = 2, frames: int = 8, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(videos, frames, 3, size, size, generator=generator)


def model(variant: str = "xt", **options: Any) -> SlowFast:
    """A recogniser with norms that do something, in evaluation mode."""
    torch.manual_seed(0)
    net = SlowFast(K, variant=variant, **({"frames": 8} | options))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.running_mean.uniform_(-0.1, 0.1)
    return net.eval()


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def recomputed(net: SlowFast, x_NTCHW: Tensor, slow: list[int]) -> Tensor:
    """Both pathways written out on the state dict."""
    state = net.state_dict()

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return F.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"])

    def conv(x: Tensor, name: str, stride: tuple[int, int, int] = (1, 1, 1)) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv3d(x, weight, stride=stride, padding=tuple(k // 2 for k in weight.shape[2:]))

    def stem(x: Tensor, path: str) -> Tensor:
        x = F.relu(norm(conv(x, f"{path}.conv1", (1, 2, 2)), f"{path}.bn1"))
        frames = [F.max_pool2d(x[:, :, t], 3, 2, 1) for t in range(x.shape[2])]
        return torch.stack(frames, dim=2)

    def stage(x: Tensor, path: str, number: int) -> Tensor:
        for index in range((3, 4, 6, 3)[number]):
            name = f"{path}.layer{number + 1}.{index}"
            stride = (1, 2, 2) if number and index == 0 else (1, 1, 1)
            side = x
            if index == 0:
                side = norm(conv(x, f"{name}.downsample.0", stride), f"{name}.downsample.1")
            x = F.relu(norm(conv(x, f"{name}.conv1"), f"{name}.bn1"))
            x = F.relu(norm(conv(x, f"{name}.conv2", stride), f"{name}.bn2"))
            x = F.relu(norm(conv(x, f"{name}.conv3"), f"{name}.bn3") + side)
        return x

    fast = stem(x_NTCHW.transpose(1, 2), "fast")
    slowly = stem(x_NTCHW[:, slow].transpose(1, 2), "slow")
    for number in range(4):
        if net.variant == "xt":
            side = conv(fast, f"lateral.{number}", (net.alpha, 1, 1))
        else:
            side = conv(fast, f"lateral.{number}.0", (net.alpha, 1, 1))
            side = F.relu(norm(side, f"lateral.{number}.1"))
        slowly = stage(torch.cat([slowly, side], dim=1), "slow", number)
        fast = stage(fast, "fast", number)
    pooled = torch.cat([slowly.mean(dim=(2, 3, 4)), fast.mean(dim=(2, 3, 4))], dim=1)
    return F.linear(pooled, state["head.weight"], state.get("head.bias"))


@pytest.mark.parametrize(("variant", "slow"), [("xt", [0, 4]), ("pyslowfast", [0, 7])])
def test_equals_the_pathways_written_out(variant: str, slow: list[int]) -> None:
    net, x = model(variant), clip()
    with torch.no_grad():
        torch.testing.assert_close(net(x), recomputed(net, x, slow), rtol=1e-4, atol=1e-5)


def test_slow_frames() -> None:
    with torch.device("meta"):
        xt, other = SlowFast(K), SlowFast(K, variant="pyslowfast")
        wide = SlowFast(K, variant="pyslowfast", alpha=8)
    assert xt.slow_frames(32) == list(range(0, 32, 4))
    assert other.slow_frames(32) == [0, 4, 8, 13, 17, 22, 26, 31]
    for net in (other, wide):
        for frames in (8, 16, 32, 64):
            exact = torch.linspace(0, frames - 1, frames // net.alpha, dtype=torch.float64)
            assert net.slow_frames(frames) == (exact + 1e-9).long().tolist()
    with pytest.raises(ValueError, match="T=30 is no multiple of alpha=4"):
        other.slow_frames(30)


def test_only_the_first_convolutions_see_time() -> None:
    with torch.device("meta"):
        net = SlowFast(K)
    for path, times in ((net.slow, (1, 1, 3, 3)), (net.fast, (3, 3, 3, 3))):
        for number, time in enumerate(times, start=1):
            for block in getattr(path, f"layer{number}"):
                kernels = [conv.kernel_size for conv in (block.conv1, block.conv2, block.conv3)]
                assert kernels == [(time, 1, 1), (1, 3, 3), (1, 1, 1)]
    assert net.slow.conv1.kernel_size == (1, 7, 7)
    assert net.fast.conv1.kernel_size == (5, 7, 7)


def test_lateral_connections_of_the_variants() -> None:
    with torch.device("meta"):
        xt, wide_xt = SlowFast(K), SlowFast(K, alpha=8)
        eight, four = (SlowFast(K, variant="pyslowfast", alpha=alpha) for alpha in (4, 8))
    assert [(c.in_channels, c.out_channels) for c in xt.lateral] == [
        (8, 16), (32, 64), (64, 128), (128, 256)
    ]  # fmt: skip
    assert xt.lateral[0].kernel_size == wide_xt.lateral[0].kernel_size == (5, 1, 1)
    assert wide_xt.lateral[0].stride == (8, 1, 1)
    assert eight.lateral[0][0].kernel_size == (7, 1, 1)
    assert four.lateral[0][0].kernel_size == (5, 1, 1)
    assert [type(m).__name__ for m in four.lateral[3]] == ["Conv3d", "BatchNorm3d", "ReLU"]


def test_first_weights_of_the_variants() -> None:
    torch.manual_seed(0)
    net = SlowFast(400, variant="pyslowfast")
    last = [m.bn3.weight for m in net.modules() if hasattr(m, "bn3")]
    assert len(last) == 32
    assert not any(weight.any() for weight in last)
    assert float(net.head.weight.detach().std()) == pytest.approx(0.01, rel=0.02)
    assert not net.head.bias.any()
    weight = net.slow.layer1[0].conv2.weight
    assert float(weight.detach().std()) == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    assert SlowFast(K).head.bias is None


@pytest.mark.parametrize("variant", ["xt", "pyslowfast"])
@pytest.mark.parametrize("alpha", [4, 8])
def test_any_size_and_number_of_frames(variant: str, alpha: int) -> None:
    net = model(variant, alpha=alpha, frames=None)
    with torch.no_grad():
        for frames, size in ((8, 33), (16, 40)):
            assert net(clip(1, frames, size)).shape == (1, K)
        if variant == "xt":
            assert net(clip(1, 7)).shape == (1, K)
    assert net.num_segments is None


def test_check_06_order_of_frames() -> None:
    for variant in ("xt", "pyslowfast"):
        net, x = model(variant), clip()
        with torch.no_grad():
            assert float((net(x) - net(x.flip(1))).abs().max()) > 1e-4


def test_videos_do_not_mix() -> None:
    net, x = model(), clip(3)
    changed = x.clone()
    changed[1] = x[1].flip(0)
    with torch.no_grad():
        out = net(x)
        torch.testing.assert_close(net(x[[2, 0, 1]]), out[[2, 0, 1]], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(net(changed)[[0, 2]], out[[0, 2]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["xt", "pyslowfast"])
def test_every_parameter_gets_a_gradient(variant: str) -> None:
    net = model(variant).train()
    net(clip()).square().sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    ("depth", "classes", "expected"),
    [
        (50, 400, 34_478_888),
        (50, 313, 34_278_440),
        (101, 313, 62_625_192),
        (152, 313, 85_448_744),
        (200, 313, 90_035_240),
    ],
)
def test_check_04_parameters_of_slowfast(depth: int, classes: int, expected: int) -> None:
    with torch.device("meta"):
        assert count(SlowFast(classes, depth)) == expected


@pytest.mark.parametrize(
    ("options", "size", "billions"),
    [
        ({}, 112, 13.1),
        pytest.param({}, 224, 50.0, marks=pytest.mark.slow),
        pytest.param({"depth": 101}, 112, 24.7, marks=pytest.mark.slow),
    ],
)
def test_check_04_operations_of_slowfast(options: dict, size: int, billions: float) -> None:
    with torch.device("meta"):
        net = SlowFast(313, **options).eval()
        with FlopCounterMode(display=False) as counter:
            net(torch.empty(1, 32, 3, size, size))
    assert counter.get_total_flops() / 2 == pytest.approx(billions * 1e9, rel=0.01)


def test_the_published_size_of_pyslowfast() -> None:
    # mmaction2 lists 34.6 M and 66.1 GMAC for 8x8 at 256.
    with torch.device("meta"):
        net = SlowFast(400, variant="pyslowfast").eval()
        with FlopCounterMode(display=False) as counter:
            net(torch.empty(1, 32, 3, 256, 256))
    assert count(net) == pytest.approx(34.6e6, rel=0.002)
    assert counter.get_total_flops() / 2 == pytest.approx(66.1e9, rel=0.01)


def test_check_13_bad_arguments_are_named() -> None:
    for options, message in (
        ({"depth": 18}, r"depth=18: need one of \(50, 101, 152, 200\)"),
        ({"variant": "x"}, "variant='x'"),
        ({"alpha": 0}, "alpha=0"),
        ({"alpha": 3, "variant": "pyslowfast"}, "alpha=3"),
        ({"beta_inv": 7}, "beta_inv=7: must divide 64"),
        ({"frames": 30, "variant": "pyslowfast"}, "frames=30"),
        ({"frames": 0}, "frames=0"),
    ):
        with pytest.raises(ValueError, match=message), torch.device("meta"):
            SlowFast(K, **options)


def test_check_13_clips_of_another_shape_are_refused() -> None:
    with torch.device("meta"):
        net = SlowFast(K)
        with pytest.raises(ValueError, match=r"has T=16, .*num_segments=32"):
            net(torch.empty(1, 16, 3, 32, 32))
        with pytest.raises(ValueError, match="4 dimensions"):
            net(torch.empty(32, 3, 32, 32))
        with pytest.raises(ValueError, match="has C=32, need C=3"):
            net(torch.empty(1, 3, 32, 32, 32))
