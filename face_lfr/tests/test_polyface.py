"""Efficient PolyFace: parts, sizes, stochastic depth, recomputed blocks, half precision."""

import copy
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from face_lfr.models.poly_blocks import BLOCK_A, Inception, last_side, scaled
from face_lfr.models.polyface import EfficientPolyFace, Stage, StochasticDepth

BLOCKS = (2, 3, 2)


def small(**options: Any) -> EfficientPolyFace:
    torch.manual_seed(0)
    sizes = {"blocks": BLOCKS, "features": 8, "input_size": 75, "width": 0.125, "dropout": 0.0}
    return EfficientPolyFace(**(sizes | options))


def images(count: int = 4, size: int = 75) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def blocks_of(net: EfficientPolyFace) -> list[nn.Module]:
    return [*net.stage_a, *net.stage_b, *net.stage_c]


def draws(seed: int, step: int, keep: float, blocks: int = sum(BLOCKS)) -> list[bool]:
    """Which blocks run, from the definition."""
    return (np.random.default_rng((seed, step)).random(blocks) < keep).tolist()


def test_check_01_parameters_of_every_part() -> None:
    with torch.device("meta"):
        net = EfficientPolyFace((1, 1, 1))
        wide = EfficientPolyFace((1, 1, 1), features=512)
    assert count(net.stem) == 605_728
    assert count(net.stage_a) == 137_952
    assert count(net.a_to_b) == 2_902_528
    assert count(net.stage_b) == 1_173_056
    assert count(net.b_to_c) == 3_542_784
    assert count(net.stage_c) == 2_010_816
    assert count(net.head) == 18_878_720
    assert count(wide.head) == 37_753_344
    assert count(net.last_norm) == 0


def test_check_01_layers_of_the_largest_preset() -> None:
    with torch.device("meta"):
        net = EfficientPolyFace(merge=False)
    kinds = Counter(type(module) for module in net.modules())
    assert kinds[nn.Conv2d] == 488
    assert kinds[nn.BatchNorm2d] == 489
    assert count(net) == 119_927_552


def test_check_02_maps_at_235_px() -> None:
    with torch.device("meta"):
        net = EfficientPolyFace((1, 1, 1)).eval()
        shapes: dict[str, tuple[int, ...]] = {}
        parts = {"stem": net.stem, "a": net.stage_a, "a_to_b": net.a_to_b, "b": net.stage_b}
        parts |= {"b_to_c": net.b_to_c, "c": net.stage_c, "half": net.stem.halve}
        for name, module in parts.items():
            module.register_forward_hook(lambda _, __, y, n=name: shapes.update({n: y.shape[1:]}))
        assert net(torch.empty(2, 3, 235, 235)).shape == (2, 256)
    assert shapes["half"] == (160, 57, 57)
    assert shapes["stem"] == shapes["a"] == (384, 27, 27)
    assert shapes["a_to_b"] == shapes["b"] == (1152, 13, 13)
    assert shapes["b_to_c"] == shapes["c"] == (2048, 6, 6)


@pytest.mark.parametrize(
    ("size", "side"), [(75, 1), (76, 1), (107, 2), (171, 4), (235, 6), (236, 6), (331, 9)]
)
def test_check_02_valid_sizes_run(size: int, side: int) -> None:
    assert last_side(size) == side
    with torch.device("meta"):
        net = EfficientPolyFace((1, 1, 1), features=16, input_size=size)
        assert net.head.fc.in_features == 2048 * side * side
        assert net.eval()(torch.empty(1, 3, size, size)).shape == (1, 16)


def test_check_02_a_small_network_runs_at_two_sizes() -> None:
    for size in (75, 107):
        net = small(input_size=size)
        assert net(images(2, size)).shape == net.eval().embed(images(2, size)).shape == (2, 8)


@pytest.mark.parametrize("size", [0, 43, 44, 74, 77, 112, 224, 237])
def test_check_02_other_sizes_name_the_valid_ones(size: int) -> None:
    with pytest.raises(ValueError, match=rf"input_size={size}: need 43 \+ 32 f or 44 \+ 32 f"):
        EfficientPolyFace((1, 1, 1), input_size=size)
    if size == 112:
        with pytest.raises(ValueError, match="107, 108, 139, 140"):
            last_side(size)


def test_check_05_a_block_is_what_the_equations_say() -> None:
    """Every step written out, in training and evaluation."""
    net = small(keep=0.8, scale=0.3).double()
    x = images().double()
    net(x)  # statistics that are not those of the start
    for training, factor in ((False, 0.24), (True, 0.3)):
        net.train(training)
        net.keep = net.depth.keep = 1.0 if training else 0.8
        y = net.stem(x)
        for stage, next_part in ((net.stage_a, net.a_to_b), (net.stage_b, net.b_to_c)):
            for block in stage:
                y = F.relu(y + factor * block(y))
            y = next_part(y)
        for block in net.stage_c:
            y = F.relu(y + factor * block(y))
        wanted = net.head(y)
        if training:
            twin = small(keep=1.0, scale=0.3).double()
            twin.load_state_dict(net.state_dict())
            torch.testing.assert_close(twin.embed(x), wanted, rtol=0, atol=1e-12)
        else:
            torch.testing.assert_close(net.embed(x), wanted, rtol=0, atol=1e-12)
            last = net.last_norm
            normed = (wanted - last.running_mean) / (last.running_var + 2e-5).sqrt()
            torch.testing.assert_close(net(x), normed, rtol=0, atol=1e-9)


def test_check_05_a_dropped_block_leaves_no_trace() -> None:
    net = small(keep=0.5, seed=3)
    kept = draws(3, 0, 0.5)
    assert 0 < sum(kept) < len(kept)
    before = copy.deepcopy([dict(block.named_buffers()) for block in blocks_of(net)])
    net(images()).square().sum().backward()
    for runs, block, old in zip(kept, blocks_of(net), before, strict=True):
        grads = [parameter.grad for parameter in block.parameters()]
        assert all((grad is not None) == runs for grad in grads)
        same = [torch.equal(value, old[name]) for name, value in block.named_buffers()]
        assert all(same) != runs
    assert all(parameter.grad is not None for parameter in net.stem.parameters())


def test_check_05_a_dropped_block_passes_its_input_and_gradient() -> None:
    """Leaving a block out equals ReLU(x) behind a ReLU, in value and gradient."""
    stage = Stage([Inception(8, BLOCK_A.scaled(0.125), nn.BatchNorm2d)], checkpoints=0)
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    (left_out,) = torch.autograd.grad((stage(x.relu(), [False], 0.3) * weight).sum(), x)
    (twice,) = torch.autograd.grad((x.relu().relu() * weight).sum(), x)
    assert torch.equal(left_out, twice)


def test_check_05_every_block_runs_without_drops() -> None:
    for options in ({"drop": "none"}, {"keep": 1.0}):
        net = small(**options)
        assert not net.skips_parameters
        net(images()).square().sum().backward()
        assert all(parameter.grad is not None for parameter in net.parameters())
        assert int(net.depth.forwards) == 0
        first = net.eval().embed(images())
        net.keep = 0.5
        assert not torch.allclose(net.embed(images()), first)
    assert small().skips_parameters


def test_draws_depend_on_seed_and_step_alone() -> None:
    depth = StochasticDepth(0.8, seed=5)
    torch.manual_seed(1)
    found = [depth.draw(7) for _ in range(300)]
    assert found == [draws(5, step, 0.8, 7) for step in range(300)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.03)
    assert found != [draws(6, step, 0.8, 7) for step in range(300)]
    state = torch.random.get_rng_state()
    depth.draw(7)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_continued_run_draws_as_one_that_was_not_stopped() -> None:
    net, other = small(seed=2), small(seed=2)
    for _ in range(3):
        net(images())
    other(images())  # has counted before it loads
    other.load_state_dict(net.state_dict())
    assert int(other.depth.forwards) == 3
    assert torch.equal(net(images()), other(images()))
    assert int(net.depth.forwards) == int(other.depth.forwards) == 4
    net.eval()(images())
    assert int(net.depth.forwards) == 4


class Saved:
    """Bytes that autograd keeps for the backward pass."""

    def __enter__(self) -> "Saved":
        self.count = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda x: x)
        self.hooks.__enter__()
        return self

    def _keep(self, x: Tensor) -> Tensor:
        self.count += x.numel() * x.element_size()
        return x

    def __exit__(self, *args: Any) -> None:
        self.hooks.__exit__(*args)


@pytest.mark.parametrize("half", [False, True])
def test_recomputed_blocks_change_nothing(half: bool) -> None:
    plain, frugal = small(), small(checkpoints=(1, 2, 5))
    for net in (plain, frugal):
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = net(images()).square().sum()
            loss.backward()
    for (name, a), b in zip(plain.named_parameters(), frugal.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=name)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(frugal.state_dict()[name], value, msg=name)
    assert {m.momentum for m in frugal.modules() if isinstance(m, _BatchNorm)} == {0.1}


def test_recomputed_blocks_keep_their_inputs_alone() -> None:
    kept = []
    for checkpoints in (0, 2):
        blocks = [Inception(8, BLOCK_A.scaled(0.125), nn.BatchNorm2d) for _ in range(2)]
        x = torch.randn(2, 8, 9, 9, requires_grad=True)
        with Saved() as saved:
            Stage(blocks, checkpoints)(x, [True, True], 0.3)
        kept.append(saved.count)
    assert kept[1] <= 4 * x.numel() * x.element_size()  # inputs of blocks, outputs of ReLUs
    assert kept[0] > 2 * kept[1]


def test_norms_compute_in_float32_under_autocast() -> None:
    net = small(keep=1.0)
    seen: list[tuple[_BatchNorm, Tensor, Tensor]] = []
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(
                lambda m, x, y: seen.append((copy.deepcopy(m), x[0].clone(), y.clone()))
            )
    with torch.autocast("cpu", torch.bfloat16):
        feature = net(images())
    assert feature.dtype == torch.float32
    assert all(x.dtype == torch.float32 for x in net.state_dict().values() if x.is_floating_point())
    assert any(x.dtype == torch.bfloat16 for _, x, _ in seen)
    for norm, x, y in seen:
        wanted = F.batch_norm(x.double(), None, None, training=True, eps=norm.eps)
        error = (y.double() - wanted).abs().max() / wanted.abs().max()
        assert error < (2**-8 if y.dtype == torch.bfloat16 else 1e-5)


def test_settings_of_the_norms() -> None:
    net = small(bn_momentum=0.2, bn_eps=1e-7, head_momentum=0.9)
    last = [net.head.norm, net.last_norm]
    others = [m for m in net.modules() if isinstance(m, _BatchNorm) and m not in last]
    assert {(norm.momentum, norm.eps) for norm in others} == {(0.2, 1e-7)}
    assert {(norm.momentum, norm.eps) for norm in last} == {(0.9, 2e-5)}
    assert not net.last_norm.affine
    assert {(m.momentum, m.eps) for m in small().stem.modules() if isinstance(m, _BatchNorm)} == {
        (0.1, 1e-10)
    }


def test_starting_weights() -> None:
    torch.manual_seed(0)
    net = EfficientPolyFace((1, 1, 1), 32, 75, 0.5)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            bound = (3 / fan_in) ** 0.5
            assert module.weight.abs().max() <= bound
            assert module.weight.abs().max() > 0.95 * bound
            assert module.weight.var().item() == pytest.approx(1 / fan_in, rel=0.15)
            assert module.bias is None or not module.bias.any()


def test_whole_channels_are_dropped_in_front_of_the_features() -> None:
    net = small(input_size=107, dropout=0.4)
    seen: list[Tensor] = []
    net.head.dropout.register_forward_hook(lambda _, __, y: seen.append(y))
    net(images(32, 107))
    dropped = (seen[0] == 0).flatten(2).all(dim=2)
    assert dropped.float().mean().item() == pytest.approx(0.4, abs=0.05)
    assert ((seen[0] == 0).flatten(2).any(dim=2) == dropped).all()


def test_channels_of_narrow_networks() -> None:
    assert [scaled(c, 1.0) for c in (3, 32, 48)] == [3, 32, 48]
    assert [scaled(c, 0.25) for c in (32, 48, 1)] == [8, 12, 4]
    net = small(width=0.25)
    assert net.stem.channels == 96
    assert net.a_to_b.channels == 288
    assert net.b_to_c.channels == 512


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"blocks": (1, 2)}, r"blocks=\[1, 2\]: need 3"),
        ({"blocks": (1, 0, 1)}, r"blocks=\[1, 0, 1\]"),
        ({"width": 0}, "width=0"),
        ({"keep": 0.0}, "keep=0.0"),
        ({"keep": 1.1}, "keep=1.1"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"drop": "sample"}, r"drop='sample': need one of \('batch', 'none'\)"),
        ({"checkpoints": (0, -1, 0)}, "checkpoints"),
        ({"features": 0}, "features"),
    ],
)
def test_arguments_that_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        small(**options)
