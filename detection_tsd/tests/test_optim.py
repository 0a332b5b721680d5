"""Optimizer groups and closed-form schedules."""

import pytest
import torch
from torch import nn

from detection_tsd.optim import constant, drops, sgd


def model() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2))
    net[0].bias.requires_grad_(False)
    return net


def test_every_trainable_parameter_is_held_once() -> None:
    net = model()
    for spared in (True, False):
        optimizer = sgd(net, norm_decay=spared)
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in net.parameters() if p.requires_grad)


def test_norms_may_be_spared_from_decay() -> None:
    net = model()
    groups = sgd(net, norm_decay=False, weight_decay=0.1).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decay[id(net[1].weight)] == 0.0
    assert decay[id(net[0].weight)] == 0.1
    assert len(sgd(net).param_groups) == 1


def rates(schedule: torch.optim.lr_scheduler.LambdaLR, count: int) -> list[float]:
    return [schedule.lr_lambdas[0](step) for step in range(count)]


def test_the_rate_rises_and_falls_where_it_should() -> None:
    """14 epochs of ten steps: Sense-X/TSD's drops at the start of epochs 9 and 12."""
    optimizer = sgd(model(), lr=1.0)
    schedule = drops(optimizer, 140, [9 / 14, 12 / 14], warmup=1 / 14, start=1 / 32)
    found = rates(schedule, 140)
    for step, value in enumerate(found):
        if step < 10:
            expected = 1 / 32 + (1 - 1 / 32) * step / 10
        else:
            expected = 1.0 if step < 90 else 0.1 if step < 120 else 0.01
        assert value == pytest.approx(expected)
    assert rates(constant(optimizer, 3), 3) == [1.0] * 3


def test_a_shortened_run_keeps_its_shape() -> None:
    optimizer = sgd(model(), lr=1.0)
    long, short = (rates(drops(optimizer, n, [0.5], warmup=0.1), n) for n in (100, 20))
    assert short == pytest.approx(long[::5])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"at": [0.9, 0.5]}, "rising order"),
        ({"at": [1.5]}, "fractions of the steps"),
        ({"at": [], "factor": 0.0}, "factor="),
        ({"at": [], "warmup": 1.0}, "warmup="),
        ({"at": [], "start": 0.0}, "start="),
        ({"at": [], "steps": 0}, "steps=0"),
    ],
)
def test_an_argument_that_cannot_work_is_named(words: dict[str, object], message: str) -> None:
    words = {"steps": 10} | words
    with pytest.raises(ValueError, match=message):
        drops(sgd(model()), **words)  # type: ignore[arg-type]
