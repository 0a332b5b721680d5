"""The margined softmax against loops over its equations, at its edges, in memory and sharded."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as td
from torch import Tensor
from torch.nn import functional as F

from face_lfr.benchmarks.bench_margin import peak_mib
from face_lfr.margins import AdaCos, ArcFace, ArcNegFace, CurricularFace, NormSoftmax, Softmax
from face_lfr.margins import Target as Facts
from face_lfr.ops import margin_softmax_blocked as blocked
from face_lfr.ops.margin_softmax import margin_softmax
from face_lfr.tests.margin_loop import loop_loss, margins, problem, with_gradients

IMPLS = ("reference", "blocked")
NAMES = list(margins())
SCALE = 12.0
CPU = torch.device("cpu")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("centers", "smoothing"), [(1, 0.0), (1, 0.1), (3, 0.1)])
@pytest.mark.parametrize("name", NAMES)
def test_check_03_matches_the_loop(name: str, centers: int, smoothing: float, impl: str) -> None:
    feature, weight, label = problem(centers=centers)
    margin = margins()[name]
    scale = margin.current(7).item() if isinstance(margin, AdaCos) else SCALE
    options = {"smoothing": smoothing, "centers": centers}
    slow = partial(loop_loss, label=label, margin=margin, scale=scale, **options)
    fast = partial(margin_softmax, label_B=label, margin=margin, scale=SCALE, **options, impl=impl)
    expected = with_gradients(slow, feature, weight)
    for got, wanted in zip(with_gradients(fast, feature, weight), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    single = with_gradients(fast, feature.float(), weight.float())
    assert single[0].item() == pytest.approx(expected[0].item(), rel=1e-6)
    for got, wanted in zip(single[1:], expected[1:], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_check_03_targets_fall_on_both_sides_of_the_kink() -> None:
    """The inputs of the comparison above reach the straight part of u and its curve."""
    feature, weight, label = problem()
    cosine = (feature * weight[label]).sum(dim=1)
    assert cosine.min() < torch.tensor(torch.pi - 0.5).cos()
    assert cosine.max() > 0.9


@pytest.mark.parametrize("name", NAMES)
def test_blocks_of_any_size_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    feature, weight, label = problem(count=23)
    call = partial(
        margin_softmax, label_B=label, margin=margins()[name], scale=SCALE, smoothing=0.2
    )
    results = []
    for parts, elements in ((1, 10**6), (23, 10**6), (1, 40), (8, 1)):
        monkeypatch.setattr(blocked, "PARTS", parts)
        monkeypatch.setattr(blocked, "CPU_ELEMENTS", elements)
        results.append(with_gradients(call, feature, weight))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-14)


class Frozen(ArcNegFace):
    """ArcNegFace whose weights t are those of one fixed matrix, as its gradient takes them."""

    def negatives(self, cosine_BC: Tensor, target: Facts) -> tuple[Tensor, Tensor | None]:
        weight_BC: Tensor = self.__dict__["kept"]
        return weight_BC * cosine_BC + weight_BC - 1, weight_BC


@pytest.mark.parametrize("centers", [1, 2])
def test_check_03_gradcheck_with_frozen_weights(
    centers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocked, "PARTS", 1)
    feature, weight, label = problem(count=4, classes=5, centers=centers)
    leaves = (feature.requires_grad_(), weight.requires_grad_())
    margin, frozen = ArcNegFace(), Frozen()
    cosine = (feature @ weight.t()).detach().unflatten(1, (5, centers)).amax(dim=2)
    target = margin.target(cosine.gather(1, label[:, None])[:, 0])
    frozen.__dict__["kept"] = margin.negatives(cosine, target)[1]
    options = {"label_B": label, "scale": SCALE, "smoothing": 0.1, "centers": centers}
    call = partial(margin_softmax, margin=frozen, **options)
    assert torch.autograd.gradcheck(call, leaves)
    real = with_gradients(partial(margin_softmax, margin=margin, **options), *leaves)
    torch.testing.assert_close(with_gradients(call, *leaves), real, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"arcneg", "arc identity"}))
def test_gradcheck(name: str) -> None:
    feature, weight, label = problem(count=4, classes=5)
    call = partial(margin_softmax, label_B=label, margin=margins()[name], scale=SCALE)
    assert torch.autograd.gradcheck(call, (feature.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", NAMES)
def test_check_03_finite_at_cosines_of_one(name: str, impl: str, dtype: torch.dtype) -> None:
    weight = problem()[1].to(dtype)
    feature, label = torch.cat([weight, -weight]), torch.arange(7).repeat(2)
    call = partial(margin_softmax, label_B=label, margin=margins()[name], scale=64.0, impl=impl)
    for found in with_gradients(call, feature, weight):
        assert found.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", NAMES)
def test_float32_inside_autocast(name: str, impl: str) -> None:
    feature, weight, label = problem(count=17)
    call = partial(margin_softmax, label_B=label, margin=margins()[name], scale=64.0, impl=impl)
    half = feature.bfloat16().requires_grad_()
    centres = weight.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = call(half, centres)
        if impl == "blocked":  # its products keep their type even there
            loss.backward()
    if impl == "reference":
        loss.backward()
    assert loss.dtype == torch.float32
    assert half.grad is not None
    assert centres.grad is not None
    assert (half.grad.dtype, centres.grad.dtype) == (torch.bfloat16, torch.float32)
    expected = with_gradients(call, half.detach().float(), weight.float())
    assert loss.item() == expected[0].item()
    torch.testing.assert_close(centres.grad.double(), expected[2], rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch_is_zero_with_a_graph(name: str, impl: str) -> None:
    feature, weight, label = problem(count=0)
    margin = margins()[name]
    if isinstance(margin, torch.nn.Module):
        margin.train()
    call = partial(
        margin_softmax, label_B=label, margin=margin, scale=SCALE, smoothing=0.1, impl=impl
    )
    value, dfeature, dweight = with_gradients(call, feature, weight)
    assert value.item() == 0
    assert dfeature.shape == (0, 5)
    assert not dweight.any()


def test_plain_losses_are_those_of_torch() -> None:
    feature, weight, label = problem(count=20)
    bias = torch.linspace(-1, 1, 7).double().requires_grad_()
    mine = margin_softmax(feature * 3, weight, label, Softmax(), 1.0, smoothing=0.2, bias_C=bias)
    theirs = F.cross_entropy(F.linear(feature * 3, weight, bias), label, label_smoothing=0.2)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(mine, bias), torch.autograd.grad(theirs, bias), rtol=0, atol=1e-12
    )
    norm = margin_softmax(feature, weight, label, NormSoftmax(), 30.0)
    expected = F.cross_entropy(30 * feature @ weight.t(), label)
    torch.testing.assert_close(norm, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_identity_gradient_of_the_target_is_the_scale(impl: str) -> None:
    """With two classes and every probability known, the gradient by c_y is s (p - 1)."""
    feature, weight = torch.eye(2).double(), torch.eye(2).double()
    label = torch.tensor([0, 1])
    grads = {}
    for kind in ("exact", "identity"):
        call = partial(
            margin_softmax, label_B=label, margin=ArcFace(0.5, kind), scale=2.0, impl=impl
        )
        rotated = F.normalize(feature + 0.5 * feature.flip(0))
        _, dfeature, _ = with_gradients(call, rotated, weight)
        grads[kind] = dfeature[0]
    c, m = torch.tensor(1 / 1.25**0.5, dtype=torch.float64), 0.5
    p = torch.sigmoid(2 * ((c.acos() + m).cos() - 0.5 / 1.25**0.5))
    expected = 2 * (p - 1) / 2 * torch.tensor([1.0, -1.0]).double()
    torch.testing.assert_close(grads["identity"], expected, rtol=0, atol=1e-12)
    steep = (c.acos() + m).sin() / c.acos().sin()
    torch.testing.assert_close(
        grads["exact"], expected * torch.stack([steep, torch.ones_like(steep)]), rtol=0, atol=1e-12
    )


def test_only_what_is_needed_is_computed() -> None:
    feature, weight, label = problem()
    call = partial(margin_softmax, label_B=label, margin=ArcNegFace(), scale=SCALE)
    whole = with_gradients(call, feature, weight)
    with torch.no_grad():
        assert call(feature.requires_grad_(), weight).item() == whole[0].item()
    for index in (0, 1):
        leaves = [feature.detach(), weight.detach()]
        leaves[index].requires_grad_()
        (3 * call(*leaves)).backward()
        assert leaves[1 - index].grad is None
        torch.testing.assert_close(leaves[index].grad, 3 * whole[1 + index], rtol=0, atol=1e-14)
    loss = call(feature.requires_grad_(), weight)
    first = torch.autograd.grad(loss, feature, retain_graph=True)
    assert torch.equal(torch.autograd.grad(loss, feature)[0], first[0])


def test_a_second_derivative_is_refused() -> None:
    feature, weight, label = problem()
    loss = margin_softmax(feature.requires_grad_(), weight, label, ArcFace(), SCALE)
    upstream = torch.ones_like(loss).requires_grad_()
    (gradient,) = torch.autograd.grad(loss, feature, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_states_follow_the_batch(impl: str) -> None:
    feature, weight, label = problem()
    own = (feature * weight[label]).sum(dim=1)
    curricular = CurricularFace()
    loss = margin_softmax(feature, weight, label, curricular, SCALE, impl=impl)
    assert curricular.t.item() == pytest.approx(0.01 * own.mean().item(), rel=1e-6)
    assert loss.item() == pytest.approx(
        loop_loss(feature, weight, label, curricular, SCALE).item(), rel=1e-6
    )
    adacos = AdaCos()
    scale = adacos.current(7).item()
    loss = margin_softmax(feature, weight, label, adacos, SCALE, impl=impl)
    others = (scale * feature @ weight.t()).exp().scatter(1, label[:, None], 0).sum(dim=1)
    angle = own.clamp(-1, 1).acos().sort().values[(len(own) - 1) // 2].clamp_max(torch.pi / 4)
    wanted = (others.mean().log() / angle.cos()).item()
    assert adacos.scale.item() == pytest.approx(wanted, rel=1e-6)
    assert loss.item() == pytest.approx(
        loop_loss(feature, weight, label, adacos, wanted).item(), rel=1e-6
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("centers", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_memory_is_two_buffers_at_most(name: str, centers: int, smoothing: float) -> None:
    """Products with narrow centres: what is counted is the logits' and their temporaries'."""
    count, classes = 64, 3000
    feature = F.normalize(torch.randn(count, 2)).requires_grad_()
    weight = F.normalize(torch.randn(classes * centers, 2)).requires_grad_()
    label = torch.randint(classes, (count,))
    call = partial(margin_softmax, margin=margins()[name], smoothing=smoothing, centers=centers)

    def step() -> None:
        call(feature, weight, label, scale=64.0).backward()

    step()  # the gradients exist from now on
    assert peak_mib(step, CPU) * 2**20 <= 2 * count * classes * centers * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_B": torch.tensor([0, 7, 1])}, r"label 7: need a class in \[0, 7\)"),
        ({"label_B": torch.tensor([0, -1, 1])}, r"label -1: need a class in \[0, 7\)"),
        ({"label_B": torch.tensor([0.0, 1.0, 2.0])}, r"label is torch.float32 \(3,\), need int64"),
        ({"label_B": torch.tensor([0, 1])}, r"label is torch.int64 \(2,\), need int64 \(3,\)"),
        ({"feature_BD": torch.ones(3, 4)}, r"feature \(3, 4\), weight \(7, 5\): need \(B, D\)"),
        ({"feature_BD": torch.ones(3, 5).long()}, "feature torch.int64, weight torch.float64"),
        ({"centers": 2}, "centers=2: need a divisor of 7 weight rows"),
        ({"centers": 0}, "centers=0: need a divisor"),
        ({"smoothing": 1.0}, r"smoothing=1.0: need a number in \[0, 1\)"),
        ({"scale": 0.0}, "scale=0.0: need a number above 0"),
        ({"impl": "fast"}, "impl='fast': need one of auto, reference, blocked, triton"),
        ({"first": 2}, "first=2, classes=None: need a group, else 0, 7"),
        ({"classes": 9}, "first=0, classes=9: need a group, else 0, 7"),
        ({"weight_CD": torch.ones(0, 5)}, "need at least one class"),
    ],
)
def test_bad_arguments(change: dict[str, object], message: str) -> None:
    feature, weight, _ = problem(count=3)
    given = {
        "feature_BD": feature, "weight_CD": weight, "label_B": torch.tensor([0, 1, 2]),
        "margin": ArcFace(), "scale": SCALE,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        margin_softmax(**(given | change))  # type: ignore[arg-type]


def sharded_gap(name: str, centers: int, own: range, label: Tensor) -> float:
    """Greatest difference of loss, gradients and states between this shard and the whole."""
    feature, weight, _ = problem(centers=centers)
    whole, shard = margins()[name], margins()[name]
    for margin in (whole, shard):
        if isinstance(margin, torch.nn.Module):
            margin.train()
    call = partial(margin_softmax, label_B=label, scale=SCALE, smoothing=0.1, centers=centers)
    expected = with_gradients(partial(call, margin=whole), feature, weight)
    rows = slice(own.start * centers, own.stop * centers)
    place = {"group": td.group.WORLD, "first": own.start, "classes": 7}
    found = with_gradients(partial(call, margin=shard, **place), feature, weight[rows])
    td.all_reduce(found[1])
    expected[2] = expected[2][rows]
    if isinstance(whole, torch.nn.Module) and isinstance(shard, torch.nn.Module):
        expected, found = [*expected, *whole.buffers()], [*found, *shard.buffers()]
    pairs = zip(found, expected, strict=True)
    return max((a - b).abs().max().item() for a, b in pairs if a.numel())


def rank_program(rank: int, store: str) -> None:
    """One of two ranks, with 5 and 2 classes or 7 and none, or every label on the first."""
    td.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    label = problem()[2]
    worst = 0.0
    for centers, cut, labels in ((1, 5, label), (1, 5, label % 5), (2, 5, label), (2, 7, label)):
        own = range(0, cut) if rank == 0 else range(cut, 7)
        for name in NAMES:
            worst = max(worst, sharded_gap(name, centers, own, labels))
    sys.stdout.write(f"{worst:.3g}\n")
    sys.stdout.flush()
    os._exit(0)  # without waiting for gloo's threads


@pytest.mark.slow
def test_check_04_two_ranks_give_what_one_gives(tmp_path: Path) -> None:
    """Every margin, smoothing, sub-centres, uneven shards, a rank without labels or classes."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", __name__, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE, text=True, env=environment,
        )
        for rank in range(2)
    ]  # fmt: skip
    worst = [float(rank.communicate(timeout=120)[0]) for rank in ranks]
    assert max(worst) < 1e-11


if __name__ == "__main__":
    rank_program(int(sys.argv[1]), sys.argv[2])
