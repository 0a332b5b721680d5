"""TIN: the module by hand, its start, its place in a backbone, types, compiler and export."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50, resnet101
from torchvision.models.resnet import BasicBlock

from video_mmit.models.insert import TemporalConv, residual_blocks
from video_mmit.models.tin import TIN, FixedOffset, OffsetNet, UnitWeight, add_tin, record_offsets
from video_mmit.ops.shift import shift

T, C = 4, 32


def clips(videos: int = 2, channels: int = C, frames: int = T) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(videos * frames, channels, 5, 6, generator=generator)


def module(frames: int = T, **options: Any) -> TIN:
    torch.manual_seed(0)
    return TIN(C, frames, **options)


def forced(offset: float, **options: Any) -> TIN:
    """A TIN whose offsets are `offset` for every video and whose weights are 1."""
    tin = module(**options)
    with torch.no_grad():
        for parameter in tin.parameters():
            parameter.zero_()
        tin.offset_net.fc2.bias.fill_(math.log((0.5 + offset / 4) / (0.5 - offset / 4)))
    return tin


def count(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def by_hand(tin: TIN, x_BCHW: Tensor) -> Tensor:
    """Video by video, group by group, frame by frame."""
    net, gate = tin.offset_net, tin.weight_net
    out = x_BCHW.clone()
    for n in range(len(x_BCHW) // T):
        video = x_BCHW[n * T : (n + 1) * T]
        mean = video[:, : C // 4].mean(dim=(2, 3)).T[None]
        z = net.fc2(torch.relu(net.fc1(net.conv(mean)[:, 0])))[0]
        o1, o2 = (4 * (torch.sigmoid(z) - 0.5)).tolist()
        w1, w2 = 2 * torch.sigmoid(gate.conv(mean)[0])
        for g, (offset, weight) in enumerate(((o1, w1), (o2, w2), (-o1, w1), (-o2, w2))):
            part = slice(2 * g, 2 * g + 2)
            for t in range(T):
                shares = [max(0.0, 1 - abs(t - s - offset)) for s in range(T)]
                mixed = sum(share * video[s, part] for s, share in enumerate(shares))
                out[n * T + t, part] = weight[t] * mixed
    return out


def test_check_02_forward_by_hand() -> None:
    """Order of the groups o1, o2, -o1, -o2 with weights w1, w2, w1, w2."""
    tin = module()
    with torch.no_grad():
        tin.offset_net.fc2.bias.copy_(torch.tensor([0.9, -0.4]))
        tin.weight_net.conv.weight.mul_(8)
    with torch.no_grad():
        torch.testing.assert_close(tin(clips()), by_hand(tin, clips()))


def test_check_03_forced_offsets_are_the_fixed_shift() -> None:
    """At -1 the first half of the fold comes from the next frame, as in TSM; at 1 the second."""
    x, half = clips(), C // 8
    torch.testing.assert_close(forced(-1.0)(x), shift(x, T, half))
    swapped = [*range(half, 2 * half), *range(half), *range(2 * half, C)]
    expected = shift(x[:, swapped], T, half)[:, swapped]
    torch.testing.assert_close(forced(1.0)(x), expected)
    fixed = module(learn_offset=False, use_weight=False, offset_init=-1.0)
    assert torch.equal(fixed(x), shift(x, T, half))


def test_check_03_no_offset_is_the_identity() -> None:
    torch.testing.assert_close(forced(0.0)(clips()), clips())
    fixed = module(learn_offset=False, use_weight=False, offset_init=0.0)
    assert torch.equal(fixed(clips()), clips())


@pytest.mark.parametrize(("scale", "init", "printed"), [(4.0, 0.5, 0.499976), (8.0, 1.0, 0.999952)])
def test_check_05_the_bias_gives_the_first_offset(
    scale: float, init: float, printed: float
) -> None:
    net = OffsetNet(8, T, 2, scale, init)
    nn.init.zeros_(net.fc2.weight)
    mean = torch.randn(3, 8, T)
    torch.testing.assert_close(net(mean), torch.full((3, 2), init), rtol=0, atol=1e-6)
    nn.init.constant_(net.fc2.bias, 0.5108)  # the constant of the released code
    torch.testing.assert_close(net(mean), torch.full((3, 2), printed), rtol=0, atol=1e-6)
    gate = module().weight_net
    nn.init.zeros_(gate.conv.weight)
    assert torch.equal(gate(mean), torch.ones(3, T, 2))


@pytest.mark.parametrize(("init", "low", "high"), [(0.5, 0.3, 0.7), (1.0, 0.8, 1.2)])
def test_check_05_fresh_offsets_in_a_network(init: float, low: float, high: float) -> None:
    torch.manual_seed(0)
    net = resnet18().eval()
    add_tin(net, 8, offset_init=init)
    with record_offsets(net) as record, torch.no_grad():
        net(torch.randn(16, 3, 32, 32))
    assert len(record) == 8
    for (offset_NG,) in record.values():
        assert offset_NG.shape == (2, 2)
        assert offset_NG.abs().max() < 2
    assert low < torch.cat([part for (part,) in record.values()]).mean() < high


def test_check_05_offsets_move_in_one_step() -> None:
    tin = module()
    optimizer = torch.optim.SGD(tin.parameters(), lr=0.5)
    target = shift(clips(), T, C // 8)
    with record_offsets(tin) as record:
        for _ in range(2):
            optimizer.zero_grad()
            (tin(clips()) - target).square().mean().backward()
            for name, parameter in tin.named_parameters():
                assert parameter.grad is not None, name
                assert parameter.grad.abs().sum() > 0, name
            optimizer.step()
    before, after = record[""]
    assert (after - before).abs().min() > 1e-4
    assert after.abs().max() < 2


def test_gradients_of_all_parameters() -> None:
    tin = TIN(16, 3).double()
    x = torch.randn(3, 16, 1, 1, dtype=torch.float64).requires_grad_()
    names = [name for name, _ in tin.named_parameters()]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(tin, dict(zip(names, values, strict=True)), (x,))

    values = [parameter.detach().clone().requires_grad_() for parameter in tin.parameters()]
    assert torch.autograd.gradcheck(run, (x, *values))


def test_check_04_parameters() -> None:
    for frames, width in ((8, 64), (16, 256)):
        f = width // 4
        expected = 9 * f + 3 + frames**2 + frames + 2 * frames + 2
        assert count(TIN(width, frames)) == expected
    with torch.device("meta"):
        for build, added in ((resnet50, 31_008), (resnet101, 71_757)):
            plain, net = build(), build()
            add_tin(net, 8)
            assert count(net) - count(plain) == added


def test_options_without_nets_have_no_parameters() -> None:
    """Parameters that take no part would stop distributed training."""
    assert count(module(learn_offset=False, use_weight=False)) == 0
    frozen = module(learn_offset=False, offset_init=1.0)
    assert {name for name, _ in frozen.named_parameters()} == {
        "weight_net.conv.weight", "weight_net.conv.bias",
    }  # fmt: skip
    assert isinstance(frozen.offset_net, FixedOffset)
    assert "offset_net.value" in frozen.state_dict()
    plain = module(use_weight=False)
    assert isinstance(plain.weight_net, UnitWeight)
    for tin in (frozen, plain, module(groups=1), module(offset_scale=8.0), module(shift_div=8)):
        tin(clips()).square().sum().backward()
        assert all(parameter.grad is not None for parameter in tin.parameters())


def test_one_group_of_offsets() -> None:
    tin = forced(1.0, groups=1)
    x, half = clips(), C // 8
    swapped = [*range(half, 2 * half), *range(half), *range(2 * half, C)]
    torch.testing.assert_close(tin(x), shift(x[:, swapped], T, half)[:, swapped])


def test_check_13_wrong_arguments_are_named() -> None:
    cases: dict[str, dict[str, Any]] = {
        r"channels=24: need a multiple of 16 \(shift_div 4 x 2 x groups 2\)": {"channels": 24},
        "channels=0: need": {"channels": 0},
        "shift_div=0: need at least 1": {"shift_div": 0},
        "groups=0: need at least 1": {"groups": 0},
        "num_segments=0: need at least 1": {"num_segments": 0},
        "offset_scale=0: need a positive": {"offset_scale": 0},
        r"offset_init=2\.0: need it within \+-2\.0": {"offset_init": 2.0},
        r"offset_init=-2\.5: need it within": {"offset_init": -2.5},
        "offset_init=nan: need it within": {"offset_init": math.nan},
        r"offset_init=inf: need it within \+-inf": {"offset_init": math.inf, "learn_offset": False},
        "impl='fast': need one of auto": {"impl": "fast"},
    }
    for message, options in cases.items():
        with pytest.raises(ValueError, match=message):
            TIN(**({"channels": 16, "num_segments": T} | options))
    with pytest.raises(ValueError, match="batch of 6 frames is no multiple of num_segments=4"):
        module()(clips()[:6])
    with pytest.raises(ValueError, match=r"x has shape \(8, 16, 5, 6\), need .* with C=32"):
        module()(clips(channels=16))
    with pytest.raises(ValueError, match=r"need \(B, C, H, W\) with C=32"):
        module()(clips()[0])


class Backbone(nn.Module):
    """Two stages, the second with a strided shortcut."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer1 = nn.Sequential(BasicBlock(C, C))
        shortcut = nn.Conv2d(C, 16, 1, 2)
        self.layer2 = nn.Sequential(BasicBlock(C, 16, 2, shortcut), BasicBlock(16, 16))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.layer2(self.layer1(x_BCHW))


def network(**options: Any) -> Backbone:
    net = Backbone().eval()
    add_tin(net, T, **options)
    return net


def test_every_conv1_is_wrapped_and_the_shortcut_is_not_shifted() -> None:
    net, x = network(), clips()
    for block in residual_blocks(net):
        tin, conv = block.conv1.temporal, block.conv1.conv
        identity = x if block.downsample is None else block.downsample(x)
        x = torch.relu(block.bn2(block.conv2(torch.relu(block.bn1(conv(tin(x)))))) + identity)
    torch.testing.assert_close(net(clips()), x)
    keys = net.state_dict()
    assert "layer1.0.conv1.temporal.offset_net.conv.weight" in keys
    assert "layer2.0.conv1.temporal.weight_net.conv.bias" in keys
    assert "layer2.1.conv1.conv.weight" in keys


def test_chosen_blocks_only() -> None:
    net = network(blocks=[2])
    wrapped = [isinstance(block.conv1, TemporalConv) for block in residual_blocks(net)]
    assert wrapped == [False, False, True]
    for blocks in ([3], [-1], [1, 1]):
        with pytest.raises(ValueError, match="need different indices of 3 residual blocks"):
            network(blocks=blocks)
    with pytest.raises(ValueError, match="has a temporal module: TIN"):
        add_tin(net, T)
    net = Backbone()
    with pytest.raises(ValueError, match="channels=16: need a multiple of 32"):
        add_tin(net, T, shift_div=8)  # fits the first blocks but not the last
    assert not any(isinstance(block.conv1, TemporalConv) for block in residual_blocks(net))


def test_check_06_order_matters_within_a_video_only() -> None:
    net, x = network(), clips(3)
    out = net(x).view(3, T, -1)
    order = torch.tensor([2, 0, 1])
    swapped = net(x.view(3, T, C, 5, 6)[order].flatten(0, 1)).view(3, T, -1)
    torch.testing.assert_close(swapped, out[order])
    turned = x.clone()
    turned[T : 2 * T] = x[T : 2 * T].flip(0)
    new = net(turned).view(3, T, -1)
    torch.testing.assert_close(new[[0, 2]], out[[0, 2]])
    assert (new[1].mean(dim=0) - out[1].mean(dim=0)).abs().max() > 1e-3


def test_record_holds_one_entry_for_each_forward_pass() -> None:
    net = network()
    with record_offsets(net) as record:
        net(clips(2))
        net(clips(3))
    assert list(record) == [f"layer{name}.conv1.temporal" for name in ("1.0", "2.0", "2.1")]
    assert [len(part) for part in record["layer1.0.conv1.temporal"]] == [2, 3]
    net(clips())
    assert len(record["layer1.0.conv1.temporal"]) == 2
    with record_offsets(nn.Linear(1, 1)) as nothing:
        pass
    assert nothing == {}


def test_channels_last_goes_through() -> None:
    x = clips().to(memory_format=torch.channels_last).requires_grad_()
    out = module()(x)
    assert out.stride() == x.stride()
    torch.testing.assert_close(out, module()(clips()), check_stride=False)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    assert grad.is_contiguous(memory_format=torch.channels_last)


def test_check_02_offsets_are_float32_under_autocast() -> None:
    tin, x = module(), clips().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16), record_offsets(tin) as record:
        out = tin(x)
    assert out.dtype == torch.bfloat16
    assert record[""][0].dtype == torch.float32
    expected = tin(x.float())
    torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=2e-2)
    out.float().square().sum().backward()
    half = copy.deepcopy(tin).bfloat16()
    torch.testing.assert_close(half(x).float(), expected, rtol=2e-2, atol=5e-2)


def test_compiles_without_a_break() -> None:
    torch._dynamo.reset()
    net = network(blocks=[2])
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for videos in (2, 3):
        torch.testing.assert_close(compiled(clips(videos)), net(clips(videos)))
    compiled(clips()).square().sum().backward()
    got = {name: parameter.grad for name, parameter in net.named_parameters()}
    net.zero_grad()
    net(clips()).square().sum().backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-4)


class Folding(nn.Module):
    """The backbone on clips (N, T, C, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x_NTCHW: Tensor) -> Tensor:
        return self.net(x_NTCHW.flatten(0, 1)).unflatten(0, (x_NTCHW.shape[0], -1)).mean(dim=1)


def test_check_15_exports_with_any_number_of_videos() -> None:
    model = Folding().eval()
    shapes = ({0: torch.export.Dim("videos", max=64)},)
    program = torch.export.export(model, (clips().view(2, T, C, 5, 6),), dynamic_shapes=shapes)
    for videos in (1, 3):
        x = clips(videos).view(videos, T, C, 5, 6)
        torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.slow
def test_check_15_onnx_with_any_number_of_videos(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = Folding().eval()
    shapes = ({0: torch.export.Dim("videos", max=64)},)
    x = clips().view(2, T, C, 5, 6)
    torch.onnx.export(model, (x,), tmp_path / "tin.onnx", dynamic_shapes=shapes, dynamo=True)
    session = onnxruntime.InferenceSession(tmp_path / "tin.onnx")
    for videos in (1, 3):
        x = clips(videos).view(videos, T, C, 5, 6)
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), model(x), rtol=1e-4, atol=1e-4)


def test_one_frame() -> None:
    tin = TIN(16, 1)
    x = torch.randn(3, 16, 2, 2)
    assert torch.equal(tin(x)[:, 4:], x[:, 4:])
