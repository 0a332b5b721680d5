"""The classifier in one process."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from face_lfr import shards
from face_lfr.classifier import Classifier, class_means
from face_lfr.margins import ArcFace, ArcNegFace, CosFace, Margin, NormSoftmax, Softmax
from face_lfr.optim import sgd
from face_lfr.shards import UnitRows, initial_rows, keys, share, starts

C, D, B = 41, 8, 6


def batch(number: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    feature_BD = torch.randn(B, D, generator=generator, dtype=torch.float64)
    return feature_BD.to(dtype), torch.randint(0, C, (B,), generator=generator)


def build(margin: Margin | None = None, **named: Any) -> Classifier:
    return Classifier(D, C, margin or ArcFace(), **named).double()


def test_the_loss_is_the_equation() -> None:
    objective = build(CosFace(0.2), scale=20.0, smoothing=0.1)
    feature_BD, label_B = batch()
    total = 0.0
    for feature_D, label in zip(feature_BD.tolist(), label_B.tolist(), strict=True):
        logits = []
        for j, weight_D in enumerate(objective.weight.tolist()):
            dot = sum(a * b for a, b in zip(feature_D, weight_D, strict=True))
            cosine = dot / math.hypot(*feature_D) / math.hypot(*weight_D)
            logits.append(20 * (cosine - 0.2 * (j == label)))
        mass = math.log(sum(math.exp(z) for z in logits))
        total += mass - 0.9 * logits[label] - 0.1 * sum(logits) / C
    assert objective(feature_BD, label_B).item() == pytest.approx(total / B, abs=1e-12)


def test_plain_softmax_is_cross_entropy_of_a_linear_layer() -> None:
    objective = build(Softmax(), initial="uniform")
    nn.init.normal_(objective.bias)
    feature_BD, label_B = batch()
    loss = objective(feature_BD, label_B)
    linear_BC = feature_BD @ objective.weight.T + objective.bias
    wanted = nn.functional.cross_entropy(linear_BC, label_B)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    for got, want in zip(
        torch.autograd.grad(loss, list(objective.parameters())),
        torch.autograd.grad(wanted, list(objective.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("named", [{}, {"centers": 2}, {"regular": 0.7}, {"smoothing": 0.2}])
def test_gradients_are_those_of_differences(named: dict[str, Any]) -> None:
    objective = Classifier(3, 7, NormSoftmax(), scale=4.0, initial="uniform", **named).double()
    feature_BD, label_B = torch.randn(4, 3, dtype=torch.float64), torch.tensor([6, 0, 2, 2])

    def loss(feature_BD: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(objective, {"weight": weight}, (feature_BD, label_B))

    inputs = (feature_BD.requires_grad_(), objective.weight.detach().clone().requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)


def test_autocast_changes_nothing_but_the_features_type() -> None:
    objective = Classifier(D, C, ArcNegFace())
    feature_BD, label_B = batch(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        inside = objective(feature_BD, label_B)
    assert inside.dtype == torch.float32
    assert inside.item() == objective(feature_BD.float(), label_B).item()


def test_shares_are_those_of_chunk() -> None:
    for rows, size in itertools.product((1, 2, 5, 8, 103), (1, 2, 3, 4, 7)):
        parts = [part.tolist() for part in torch.arange(rows).chunk(size)]
        parts += [[]] * (size - len(parts))
        assert [list(share(rows, rank, size)) for rank in range(size)] == parts
        assert starts(rows, size) == [0, *itertools.accumulate(map(len, parts))]


@pytest.mark.parametrize("kind", shards.INITIAL)
def test_starting_values_belong_to_the_row(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BLOCK", 16)
    whole = initial_rows(range(100), 32, kind, seed=4)
    for first, stop in ((0, 0), (0, 1), (15, 17), (16, 32), (31, 90), (99, 100), (100, 100)):
        assert torch.equal(initial_rows(range(first, stop), 32, kind, 4), whole[first:stop])
    assert not torch.isclose(whole[:-16], whole[16:]).any()
    assert not torch.isclose(whole, initial_rows(range(100), 32, kind, seed=5)).any()
    deviation = {"normal": 0.01, "uniform": 32**-0.5 / 3**0.5}[kind]
    assert whole.std().item() == pytest.approx(deviation, rel=0.05)
    assert whole.abs().max() < {"normal": 0.06, "uniform": 32**-0.5}[kind]


def test_keys_are_the_published_mix() -> None:
    mask, found = 2**64 - 1, keys(50, 3, 7, torch.device("cpu"))
    state = shards.stream(3, 1, 7) << 32 | shards.stream(3, 2, 7)
    for number, got in enumerate(found.tolist()):
        x = (state + number * 0x9E3779B97F4A7C15) & mask
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        assert got == (x ^ (x >> 31)) & (2**63 - 1)


def test_centres_are_unit_rows_and_the_dominant_of_several() -> None:
    plain = build()
    torch.testing.assert_close(plain.centres(), nn.functional.normalize(plain.weight.detach()))
    objective = build(centers=3)
    label_B = torch.full((B,), 7)
    objective(objective.weight[7, 2].detach().expand(B, D) + 0.001, label_B)
    wanted = nn.functional.normalize(objective.weight[7, 2].detach(), dim=0)
    torch.testing.assert_close(objective.centres()[7], wanted)
    assert objective.votes[7].tolist() == [0, 0, B]
    for _ in range(5):  # newer images outweigh older ones
        objective(objective.weight[7, 0].detach().expand(B, D), label_B)
    assert objective.votes[7].argmax() == 0
    objective.eval()(objective.weight[7, 1].detach().expand(B, D), label_B)
    assert objective.votes[7, 1] == 0


@pytest.mark.parametrize("centers", [1, 2])
def test_anchor_turns_centres_to_the_class_means(centers: int) -> None:
    objective = build(centers=centers)
    batches = [batch(number, torch.float32) for number in range(9)]
    mean_CD = class_means(batches, objective)
    wanted: dict[int, list[Tensor]] = {}
    for feature_D, label in ((f, y) for x, ys in batches for f, y in zip(x, ys, strict=True)):
        wanted.setdefault(int(label), []).append(feature_D / feature_D.norm())
    for label in range(C):
        mean = torch.stack(wanted[label]).mean(dim=0) if label in wanted else torch.zeros(D)
        torch.testing.assert_close(mean_CD[label], mean)
    absent = next(label for label in range(C) if label not in wanted)
    before, centres = objective.weight.detach().clone(), objective.centres()
    objective.anchor(mean_CD)
    after = objective.centres()
    assert torch.equal(after[absent], centres[absent])
    for label, found in wanted.items():
        unit = nn.functional.normalize(torch.stack(found).mean(dim=0).double(), dim=0)
        torch.testing.assert_close(after[label], unit, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(objective.weight.norm(dim=-1), before.norm(dim=-1))


@pytest.mark.parametrize("shape", [(5, 7), (3, 2, 4)])
def test_unit_rows_are_those_of_normalize(shape: tuple[int, ...]) -> None:
    row = torch.randn(shape, dtype=torch.float64)
    row[1] = 0
    results = []
    for function in (UnitRows.apply, lambda x: nn.functional.normalize(x, dim=-1)):
        leaf = row.clone().requires_grad_()
        unit = function(leaf)
        (unit * torch.arange(row.numel(), dtype=torch.float64).view(shape)).sum().backward()
        results.append((unit.detach(), leaf.grad))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(UnitRows.apply, row[2:].requires_grad_())


@pytest.mark.parametrize(
    "named",
    [
        {"features": 0}, {"num_classes": 1}, {"scale": 0.0}, {"sample_rate": 0.0},
        {"sample_rate": 1.5}, {"centers": 0}, {"smoothing": 1.0}, {"smoothing": -0.1},
        {"regular": -1.0}, {"seed": -1}, {"initial": "xavier"}, {"scale": math.nan},
        {"regular": 1.0, "centers": 2}, {"centers": 2, "margin": Softmax()},
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named(named: dict[str, Any]) -> None:
    sizes: dict[str, Any] = {"features": D, "num_classes": C, "margin": ArcFace()}
    name = next(iter(named))
    with pytest.raises(ValueError, match=name):
        Classifier(**(sizes | named))


def test_a_wrong_batch_is_named() -> None:
    objective = build()
    feature_BD, label_B = batch()
    for feature, label, what in (
        (feature_BD[:, 1:], label_B, r"feature_BD is \(6, 7\)"),
        (feature_BD[0], label_B, r"feature_BD is \(8,\)"),
        (feature_BD, label_B[1:], r"label_B is \(5,\)"),
        (feature_BD, label_B.float(), "float32"),
    ):
        with pytest.raises(ValueError, match=what):
            objective(feature, label)
    with pytest.raises(ValueError, match=r"mean_CD is \(3, 8\)"):
        objective.anchor(torch.zeros(3, D))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rate", [1.0, 0.25])
def test_cuda_equals_the_cpu(rate: float) -> None:
    from common import dist

    found = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        world = dist.World(0, 1, device)
        objective = Classifier(D, C, ArcNegFace(), world=world, sample_rate=rate)
        optimizer = sgd(nn.Linear(1, 1), objective)
        for number in range(3):
            feature_BD, label_B = batch(number, torch.float32)
            optimizer.zero_grad()
            loss = objective(feature_BD.to(device), label_B.to(device))
            loss.backward()
            optimizer.step()
        found.append((loss.detach().cpu(), objective.weight.detach().cpu()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
