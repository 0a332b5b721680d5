"""Parameter groups, the scaler and the schedules; sampled rows are in test_sampled_classes."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, MultiStepLR, PolynomialLR

from common.log import InputError
from face_lfr import optim
from face_lfr.classifier import Classifier
from face_lfr.margins import ArcFace, Softmax

CONFIGS = Path(optim.__file__).parent / "configs"
STEPS = 40


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.PReLU(), nn.Flatten(), nn.Linear(4, 5)
    )


def optimizer(lr: float = 0.5) -> torch.optim.SGD:
    return optim.sgd(network(), Classifier(5, 7, ArcFace()), lr=lr)


def rates(schedule: Callable[[torch.optim.Optimizer], LambdaLR], group: int = 0) -> list[float]:
    """Rate of every step."""
    one = optimizer()
    stepped, found = schedule(one), []
    for _ in range(STEPS):
        found.append(one.param_groups[group]["lr"])
        one.step()
        stepped.step()
    return found


def test_groups_hold_every_parameter_once() -> None:
    model, objective = network(), Classifier(5, 7, Softmax())
    found = optim.groups(model, objective, 0.1, decay_norm=False)
    names = {id(p): f"m.{n}" for n, p in model.named_parameters()}
    names |= {id(p): f"o.{n}" for n, p in objective.named_parameters()}
    listed = {g["name"]: ([names[id(p)] for p in g["params"]], g["weight_decay"]) for g in found}
    assert listed == {
        "backbone": (["m.0.weight", "m.2.weight", "m.4.weight"], 0.1),
        "backbone_no_decay": (["m.0.bias", "m.1.weight", "m.1.bias", "m.4.bias"], 0.0),
        "classifier": (["o.weight"], 0.1),
        "classifier_no_decay": (["o.bias"], 0.0),
    }
    model[0].requires_grad_(False)
    model.append(model[4])  # a layer used twice
    found = optim.groups(model, objective, 0.1)
    listed = {g["name"]: ([names[id(p)] for p in g["params"]], g["weight_decay"]) for g in found}
    backbone = ["m.1.weight", "m.1.bias", "m.2.weight", "m.4.weight", "m.4.bias"]
    assert listed == {"backbone": (backbone, 0.1), "classifier": (["o.weight", "o.bias"], 0.1)}


def test_an_objective_without_parameters_is_fine() -> None:
    for build in (optim.sgd, optim.adam):
        made = build(network(), nn.Identity(), lr=0.1, weight_decay=0.2)
        assert [g["name"] for g in made.param_groups] == ["backbone"]
        assert made.param_groups[0]["weight_decay"] == 0.2


def test_sampled_classes_get_their_own_sgd_and_no_adam() -> None:
    objective = Classifier(5, 7, ArcFace(), sample_rate=0.5)
    assert type(optim.sgd(network(), objective)) is optim.SampledSGD
    assert type(optimizer()) is torch.optim.SGD
    with pytest.raises(InputError, match=r"^sample_rate: .*: 0\.5$"):
        optim.adam(network(), objective)


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_scaled_steps_are_the_plain_ones(rate: float) -> None:
    weights = []
    for scale in (1.0, 1024.0):  # a power of two changes no bit
        objective = Classifier(5, 7, ArcFace(), sample_rate=rate)
        net = nn.Linear(3, 5)
        with torch.no_grad():
            net.weight.copy_(torch.arange(15.0).sin().view(5, 3))
            net.bias.zero_()
        made = optim.sgd(net, objective)
        scaler = optim.ShardScaler("cpu", init_scale=scale, enabled=scale > 1)
        for step in range(3):
            made.zero_grad()
            x_B3 = torch.arange(12.0).add(step).cos().view(4, 3)
            scaler.scale(objective(net(x_B3), torch.tensor([0, 3, 6, 3]))).backward()
            scaler.step(made)
            scaler.update()
        weights.append((net.weight.detach(), objective.weight.detach()))
    assert torch.equal(weights[0][0], weights[1][0])
    assert torch.equal(weights[0][1], weights[1][1])


def test_schedules_without_warm_up_are_those_of_torch() -> None:
    def wanted(kind: Any, **named: Any) -> list[float]:
        return rates(lambda one: kind(one, **named))

    for got, want in (
        (lambda one: optim.polynomial(one, STEPS, power=2.0),
         wanted(PolynomialLR, total_iters=STEPS, power=2.0)),
        (lambda one: optim.cosine(one, STEPS), wanted(CosineAnnealingLR, T_max=STEPS)),
        (lambda one: optim.multistep(one, STEPS, at=[0.5, 0.75]),
         wanted(MultiStepLR, milestones=[20, 30])),
        (lambda one: optim.constant(one, STEPS), [0.5] * STEPS),
    ):  # fmt: skip
        assert rates(got) == pytest.approx(want, rel=1e-9)


def test_polynomial_of_power_1_is_a_line_to_0() -> None:
    found = rates(lambda one: optim.polynomial(one, STEPS))
    assert found == pytest.approx([0.5 * (1 - step / STEPS) for step in range(STEPS)])


def test_warm_up_rises_in_a_line_and_never_to_more_than_1() -> None:
    for schedule in (
        lambda one: optim.polynomial(one, STEPS, warmup=0.25),
        lambda one: optim.cosine(one, STEPS, warmup=0.25),
        lambda one: optim.multistep(one, STEPS, at=[0.5], warmup=0.25),
    ):
        found = rates(schedule)
        assert found[:10] == pytest.approx([0.05 * step for step in range(1, 11)])
        assert found[10] == max(found) == 0.5
        assert found[10:] == sorted(found[10:], reverse=True)
        assert found[-1] <= 0.05


def test_anchored_trains_the_classifier_first() -> None:
    def schedule(one: torch.optim.Optimizer) -> LambdaLR:
        return optim.anchored(one, STEPS, frozen=15)

    names = [group["name"] for group in optimizer().param_groups]
    assert names == ["backbone", "classifier"]
    assert rates(schedule) == pytest.approx([0.0] * 15 + [0.005] * 25)
    assert rates(schedule, 1) == pytest.approx([0.05] * 15 + [0.005] * 25)


@pytest.mark.parametrize(
    "schedule",
    [
        lambda one: optim.polynomial(one, STEPS, warmup=0.2),
        lambda one: optim.multistep(one, STEPS, at=[0.2, 0.3]),
        lambda one: optim.anchored(one, STEPS, frozen=9),
    ],
)
def test_a_schedule_continues_from_its_state(schedule: Any) -> None:
    whole = rates(schedule)
    one = optimizer()
    half = schedule(one)
    for _ in range(13):
        one.step()
        half.step()
    other = optimizer()
    resumed = schedule(other)
    resumed.load_state_dict(half.state_dict())
    other.load_state_dict(one.state_dict())
    assert other.param_groups[0]["lr"] == whole[13]
    other.step()
    resumed.step()
    assert other.param_groups[0]["lr"] == whole[14]


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (optim.constant, {"steps": 0}), (optim.polynomial, {"power": 0.0}),
        (optim.polynomial, {"warmup": 1.0}), (optim.cosine, {"warmup": -0.1}),
        (optim.cosine, {"steps": -3}), (optim.polynomial, {"power": math.nan}),
        (optim.multistep, {"at": [0.8, 0.4]}), (optim.multistep, {"at": [1.2]}),
        (optim.multistep, {"factor": 0.0, "at": [0.5]}),
        (optim.multistep, {"warmup": 2.0, "at": [0.5]}),
        (optim.anchored, {"frozen": 41}), (optim.anchored, {"frozen": -1}),
        (optim.anchored, {"first": 0.0, "frozen": 1}), (optim.anchored, {"then": -1, "frozen": 1}),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named(build: Any, named: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(named))):
        build(optimizer(), **({"steps": STEPS} | named))


def test_anchored_needs_a_classifier() -> None:
    with pytest.raises(ValueError, match="classifier"):
        optim.anchored(optim.sgd(network(), nn.Identity()), STEPS, frozen=3)


@pytest.mark.parametrize("path", sorted((CONFIGS / "optim").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_optimizer_of_a_config_steps(path: Path) -> None:
    net, objective = nn.Linear(3, 5), Classifier(5, 7, ArcFace())
    made = instantiate(OmegaConf.load(path))(net, objective)
    before = [p.detach().clone() for p in (net.weight, objective.weight)]
    objective(net(torch.ones(2, 3)), torch.tensor([1, 4])).backward()
    made.step()
    for old, new in zip(before, (net.weight, objective.weight), strict=True):
        assert not torch.equal(old, new)


@pytest.mark.parametrize(
    "path", sorted((CONFIGS / "schedule").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_schedule_of_a_config_runs(path: Path) -> None:
    node = OmegaConf.create({"frozen_steps": 10, "schedule": OmegaConf.load(path)})
    found = rates(lambda one: instantiate(node.schedule)(one, STEPS), group=1)
    assert all(0 <= rate <= 0.5 for rate in found)
    assert found[0] > 0
