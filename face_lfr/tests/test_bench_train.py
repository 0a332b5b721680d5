"""The rows of networks: what is called equal is equal, what is not is compared by its cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from face_lfr.benchmarks import bench_infer, bench_train
from face_lfr.benchmarks.bench_infer import BASE, DEEPER, QUICK, infer_rows, iresnet_row
from face_lfr.benchmarks.bench_train import FEATURES, Step, Work, compare_steps, train_rows
from face_lfr.benchmarks.networks import (
    Forward,
    Variant,
    agreement,
    full_float32,
    noise,
    settled,
    usual,
)
from face_lfr.benchmarks.results import Row, row
from face_lfr.flops import count
from face_lfr.models.fold import folded, merged

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PLAIN, LAST = Variant(), Variant(channels_last=True)
SMALL = Work(4, 32, (1, 1, 1, 1), (8, 8, 16, 16), classes=50)
FACES = bench_infer.Work(2, (1, 1, 1), 75, (1, 1, 1, 1), (8, 8, 16, 16), 0.25, peer_size=32)
FIELDS = {"name", "shape", "ours_ms", "peer", "peer_ms", "ratio", "max_abs_diff"}


def timed(name: str) -> Row:
    return row(name, "1", "peer") | {"ratio": 1.0}


def test_networks_run_as_the_recipes_run_them() -> None:
    assert usual(CPU).label == "float32 channels_last"
    assert usual(CUDA).label == "bfloat16 channels_last"
    assert LAST._replace(compiled=True).label == "float32 channels_last, compiled"
    assert PLAIN.label == "float32 contiguous"


def largest(net: Any) -> list[float]:
    """Greatest entry of the output of every convolution, for an image the net has not seen."""
    found: list[float] = []
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, __, y: found.append(float(y.abs().max())))
    with torch.no_grad():
        net.eval()(noise(2, net.input_size, 9))
    return found


def test_settled_networks_neither_grow_nor_shrink() -> None:
    work = Work(size=48, widths=(32, 64, 64, 64))
    fresh, ready = largest(work.net()), largest(settled(work.net()))
    assert max(fresh) > 1e5, "otherwise nothing needs to be settled"
    assert 0.1 < min(ready)
    assert max(ready) < 100


def test_settled_norms_have_the_statistics_of_the_images() -> None:
    net: Any = settled(SMALL.net(), seed=3)
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    assert not net.training
    assert all(not norm.training and norm.momentum == 0.1 for norm in norms)
    seen = net.conv1(noise(4, SMALL.size, 3)).detach()
    first = net.bn1
    torch.testing.assert_close(first.running_mean, seen.mean(dim=(0, 2, 3)), rtol=0, atol=1e-5)
    torch.testing.assert_close(first.running_var, seen.var(dim=(0, 2, 3)), rtol=1e-4, atol=0)


def test_two_layouts_take_the_same_step() -> None:
    found = bench_train.same_row(SMALL, LAST, PLAIN, 1, CPU)
    assert FIELDS <= set(found)
    assert found["shape"] == "4 images of 32x32, 50 classes, float32 channels_last"
    assert (found["name"], found["peer"]) == ("train step, IResNet-10", "float32 contiguous")
    assert found["max_abs_diff"] <= 1e-3
    assert "images/s; gradient differs by" in found["note"]
    assert "first call" not in found["note"]


def test_half_precision_stays_within_its_limit() -> None:
    half = Step(SMALL.net(), SMALL, Variant("bfloat16"), CPU)
    whole = Step(SMALL.net(), SMALL, PLAIN, CPU)
    difference, gap = compare_steps("half", half, float(half()), whole)
    assert difference > 0
    assert 1e-4 < gap < bench_train.LIMITS["bfloat16"]


@pytest.mark.parametrize("half", [False, True])
def test_another_network_is_refused(half: bool) -> None:
    variant = Variant("bfloat16" if half else "float32")
    works = SMALL, SMALL._replace(seed=1)
    ours, peer = (Step(work.net(), SMALL, variant, CPU) for work in works)
    with pytest.raises(RuntimeError, match="a pair: losses differ"):
        compare_steps("a pair", ours, float(ours()), peer)


def test_networks_of_one_loss_and_another_gradient_are_refused() -> None:
    nets: list[Any] = [SMALL.net(), SMALL.net()]
    nets[0].conv1.weight.register_hook(lambda grad: 2 * grad)
    ours, peer = (Step(net, SMALL, PLAIN, CPU) for net in nets)
    with pytest.raises(RuntimeError, match=r"losses differ by 0\.0, gradients by [01]\."):
        compare_steps("a pair", ours, float(ours()), peer)
    nets = [SMALL.net(), SMALL.net()]
    nets[1].fc.bias.requires_grad_(False)
    ours, peer = (Step(net, SMALL, PLAIN, CPU) for net in nets)
    with pytest.raises(RuntimeError, match=r"a pair: other parameters, \['fc.bias'\]"):
        compare_steps("a pair", ours, float(ours()), peer)


def test_steps_train_network_and_classifier() -> None:
    step = Step(SMALL.net(), SMALL, LAST, CPU)
    before = step.objective.weight.detach().clone()
    losses = [float(step()) for _ in range(6)]
    assert losses[-1] < losses[0]
    assert not torch.equal(step.objective.weight, before)
    assert all(bool(grad.abs().max() > 0) for grad in step.gradient().values())


def test_torchvisions_network_is_compared_by_its_multiplications(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torchvision import models

    monkeypatch.setattr(models, "resnet50", models.resnet18)  # a tenth of the time
    found = bench_train.context_row(SMALL, LAST, 1, CPU)
    ours = count(SMALL.net(), SMALL.size, "mac")
    theirs = count(models.resnet18(num_classes=FEATURES), SMALL.size, "mac")
    wanted = (found["peer_ms"] / theirs) / (found["ours_ms"] / ours)
    assert found["ratio"] == pytest.approx(wanted)
    assert found["max_abs_diff"] is None
    assert f"ours {ours / 1e9:.3g} GMAC forward" in found["note"]


@pytest.mark.parametrize(
    ("device", "quick", "compile", "images", "size", "rows", "repeats"),
    [
        (CPU, False, False, 4, 112, 2, 3),
        (CPU, True, True, 4, 56, 3, 3),
        (CUDA, True, False, 128, 112, 3, 20),
    ],
)
def test_training_rows_of_a_device(
    device: torch.device,
    quick: bool,
    compile: bool,
    images: int,
    size: int,
    rows: int,
    repeats: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[Any, ...]] = []

    def note(work: Work, variant: Variant, *rest: Any) -> Row:
        seen.append((work.images, work.size, work.name, variant.precision, rest[-2]))
        return timed("step")

    monkeypatch.setattr(bench_train, "same_row", note)
    monkeypatch.setattr(bench_train, "context_row", note)
    assert len(list(train_rows(3, device, compile, quick))) == rows
    precision = "bfloat16" if device == CUDA else "float32"
    assert set(seen) == {(images, size, "IResNet-50", precision, repeats)}


def test_a_missing_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_train, "no_compiler", lambda: "no compiler")
    monkeypatch.setattr(bench_infer, "no_compiler", lambda: "no compiler")
    compiled = LAST._replace(compiled=True)
    rows = [
        bench_train.same_row(SMALL, compiled, LAST, 1, CPU),
        bench_infer.compiled_row(FACES, nn.Identity(), LAST, 1, CPU),
    ]
    for found in rows:
        assert found["note"] == "not measured: no compiler"
        assert "compiled" in found["shape"]
        assert found["ours_ms"] is None


def test_costs_of_the_networks_that_are_compared() -> None:
    assert DEEPER.gflops == pytest.approx(28.104, abs=5e-4)
    with torch.device("meta"):
        assert count(bench_infer.IResNet(BASE.layers), 112) / 1e9 == pytest.approx(24.17, abs=5e-4)
        small = count(bench_infer.IResNet(QUICK.layers, QUICK.widths), 112) / 1e9
    assert small == pytest.approx(QUICK.gflops, rel=0.2)
    assert FACES.gflops == pytest.approx(count(FACES.polyface(), 75) / 1e9, rel=1e-9)
    assert BASE.peer == "IResNet-100, 64 to 512 channels"
    assert DEEPER.name == "PolyFace 23-38-23"


def test_inference_rows() -> None:
    separate = FACES.polyface()
    whole = merged(separate)
    convs = [sum(isinstance(m, nn.Conv2d) for m in net.modules()) for net in (separate, whole)]
    assert convs[0] > convs[1]
    found = bench_infer.same_row(FACES, "merged", whole, "separate 1x1", separate, LAST, 1, CPU)
    assert FIELDS <= set(found)
    assert found["name"] == "inference, PolyFace 1-1-1, merged"
    assert found["shape"] == "2 images of 75x75, float32 channels_last"
    assert found["max_abs_diff"] <= 1e-4
    assert found["note"].count("GFLOP/s") == 2


def test_a_folded_network_has_no_norms_left_to_time() -> None:
    net = folded(FACES.polyface())
    norms = [name for name, m in net.named_modules() if isinstance(m, _BatchNorm)]
    assert norms == ["last_norm"], "of training features alone"


def test_an_iresnet_is_compared_by_its_operations() -> None:
    found = iresnet_row(FACES, folded(FACES.polyface()), LAST, 1, CPU)
    theirs = count(FACES.iresnet(), 32) / 1e9
    wanted = (found["peer_ms"] / theirs) / (found["ours_ms"] / FACES.gflops)
    assert found["ratio"] == pytest.approx(wanted)
    speed = 1e3 * 2 * theirs / found["peer_ms"]
    assert f"peer {theirs:.4g} GFLOPs an image, {speed:.3g} GFLOP/s" in found["note"]
    assert found["note"].endswith("peer folded, at 32x32")


def test_features_that_differ_are_refused() -> None:
    other = FACES._replace(seed=1).polyface()
    with pytest.raises(RuntimeError, match="PolyFace 1-1-1, another: results differ by"):
        bench_infer.same_row(FACES, "another", other, "one", FACES.polyface(), LAST, 1, CPU)
    nothing = torch.full((2, 3), torch.nan)
    with pytest.raises(RuntimeError, match="results differ by nan"):
        agreement("nothing", lambda: nothing, lambda: torch.ones(2, 3), 1e-4)


def test_features_are_compared_in_float32() -> None:
    net = FACES.polyface()
    half = usual(CUDA)
    found = bench_infer.compare("a", FACES, (folded(net), half), (net, half), CPU)
    assert 0 < found < 1e-4
    at_half = [bench_infer.forward(FACES, side, half, CPU)() for side in (folded(net), net)]
    assert (at_half[0] - at_half[1]).abs().max() > 1e-3
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    with full_float32():
        assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "highest"
    assert (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()) == before


@pytest.mark.parametrize(
    ("device", "options", "work", "rows"),
    [
        (CPU, {}, BASE, 3),
        (CPU, {"quick": True, "compile": True}, QUICK, 4),
        (CPU, {"full": True}, DEEPER, 3),
        (CUDA, {"full": True}, DEEPER._replace(images=64), 4),
    ],
)
def test_inference_rows_of_a_device(
    device: torch.device,
    options: dict,
    work: bench_infer.Work,
    rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[Any, ...]] = []

    def note(asked: bench_infer.Work, *rest: Any) -> Row:
        seen.append((asked, *rest[-2:]))
        return timed("forward")

    for name in ("same_row", "iresnet_row", "compiled_row"):
        monkeypatch.setattr(bench_infer, name, note)
    net = FACES.polyface()
    monkeypatch.setattr(bench_infer.Work, "polyface", lambda _: net)
    assert len(list(infer_rows(3, device, seed=5, **options))) == rows
    assert set(seen) == {(work._replace(seed=5), 20 if device == CUDA else 3, device)}


def test_a_forward_pass_has_no_graph_and_float32_features() -> None:
    found = Forward(settled(SMALL.net()), noise(2, 32, 0), Variant("bfloat16"), CPU)()
    assert found.shape == (2, FEATURES)
    assert found.dtype == torch.float32
    assert not found.requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rows_on_cuda() -> None:
    half = usual(CUDA)
    found = bench_train.same_row(SMALL, half, half._replace(channels_last=False), 1, CUDA)
    assert found["ours_mib"] > 0
    assert found["peer_mib"] > 0
    net = FACES.polyface()
    row_ = bench_infer.same_row(FACES, "folded", folded(net), "merged", merged(net), half, 1, CUDA)
    assert row_["ratio"] > 0
