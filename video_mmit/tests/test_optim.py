"""Parameter groups of the recipes, and schedules as closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from common.checkpoint import Checkpointer
from video_mmit.models.frame_net import FrameNet
from video_mmit.models.resnet import ResNet
from video_mmit.models.slowfast import SlowFast
from video_mmit.models.tin import add_tin
from video_mmit.models.tiny import TinyNet
from video_mmit.models.trn import TRN
from video_mmit.optim import constant, sgd, tsn_groups, tsn_sgd, warmup_cosine, warmup_drops

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
LR, DECAY = 0.02, 5e-4
Schedule = torch.optim.lr_scheduler.LambdaLR


def tin_net(**options) -> FrameNet:
    return FrameNet(TinyNet((16, 32)), 5, num_segments=4, tin=add_tin, **options)


def by_name(model: nn.Module, fc_lr5: bool = True) -> dict[str, tuple[float, float]]:
    """Rate and decay of every parameter that is in a group, each exactly once."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, tuple[float, float]] = {}
    for group in tsn_groups(model, LR, DECAY, fc_lr5):
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name not in found, f"{name} is in two groups"
            found[name] = (group["lr"] / LR, group["weight_decay"] / DECAY)
    return found


def test_every_kind_of_parameter_has_its_factors() -> None:
    found = by_name(tin_net())
    temporal = "backbone.layer2.0.conv1.temporal."
    expected = {
        "backbone.conv1.weight": (1, 1),
        "backbone.bn1.weight": (1, 0),
        "backbone.bn1.bias": (1, 0),
        "backbone.layer2.0.conv1.conv.weight": (1, 1),
        "backbone.layer2.0.downsample.0.weight": (1, 1),
        f"{temporal}offset_net.conv.weight": (1, 1),
        f"{temporal}offset_net.conv.bias": (2, 0),
        f"{temporal}offset_net.fc1.weight": (1, 1),
        f"{temporal}offset_net.fc1.bias": (2, 0),
        f"{temporal}offset_net.fc2.weight": (1, 1),
        f"{temporal}offset_net.fc2.bias": (2, 0),
        f"{temporal}weight_net.conv.weight": (1, 1),
        f"{temporal}weight_net.conv.bias": (2, 0),
        "head.weight": (5, 1),
        "head.bias": (10, 0),
    }
    assert {name: found[name] for name in expected} == expected
    plain = by_name(tin_net(), fc_lr5=False)
    assert plain == found | {"head.weight": (1, 1), "head.bias": (2, 0)}


@pytest.mark.parametrize(
    "build",
    [
        tin_net,
        lambda: FrameNet(TinyNet((16,)), 5, num_segments=4, trn=TRN),
        lambda: FrameNet(ResNet("bottleneck", (3, 4, 23, 3)), 5, num_segments=4, tin=add_tin),
        lambda: SlowFast(5, variant="pyslowfast"),
        lambda: nn.Sequential(nn.LayerNorm(3), nn.GRU(3, 3), nn.PReLU(), nn.GroupNorm(1, 3)),
    ],
    ids=["TIN", "TRN", "TIN ResNet-101", "SlowFast", "others"],
)
def test_no_parameter_is_lost_or_twice(build: Callable[[], nn.Module]) -> None:
    model = build()
    assert by_name(model).keys() == {name for name, _ in model.named_parameters()}


def test_offset_nets_are_known_by_their_module() -> None:
    """ResNet-101 has 66 of their linear layers; the reference stops counting at 32."""
    model = FrameNet(ResNet("bottleneck", (3, 4, 23, 3)), 5, num_segments=4, tin=add_tin)
    found = by_name(model)
    layers = [name for name in found if ".fc1." in name or ".fc2." in name]
    assert len(layers) == 33 * 2 * 2
    assert {found[name] for name in layers if name.endswith("weight")} == {(1, 1)}
    assert [name for name, (rate, _) in found.items() if rate >= 5] == ["head.weight", "head.bias"]


def test_all_of_trn_is_the_classifier() -> None:
    found = by_name(FrameNet(TinyNet((16,)), 5, num_segments=4, trn=TRN))
    relation = {name: factors for name, factors in found.items() if name.startswith("trn.")}
    assert len(relation) >= 8
    assert set(relation.values()) == {(5, 1), (10, 0)}


def test_norms_and_biases_of_other_modules_do_not_decay() -> None:
    found = by_name(nn.Sequential(nn.LayerNorm(3), nn.GRU(3, 3), nn.PReLU()))
    assert found["0.weight"] == found["0.bias"] == (1, 0)
    assert found["1.bias_hh_l0"] == (2, 0)
    assert found["1.weight_hh_l0"] == found["2.weight"] == (1, 1)


def test_frozen_and_shared_parameters() -> None:
    model = tin_net(partial_bn=True, partial_bn_affine=True)
    model.head.bias.requires_grad_(False)
    found = by_name(model)
    assert "backbone.bn1.weight" in found
    assert "backbone.layer1.0.bn1.weight" not in found
    assert "head.bias" not in found
    assert len(found) == sum(p.requires_grad for p in model.parameters())
    layer = nn.Linear(2, 2)
    groups = tsn_groups(nn.Sequential(layer, layer), LR, DECAY)
    assert [(group["name"], len(group["params"])) for group in groups] == [
        ("classifier_weight", 1),
        ("classifier_bias", 1),
    ]
    other = nn.Linear(2, 2)
    other.weight = layer.weight  # tied
    tied = tsn_groups(nn.Sequential(layer, other), LR, DECAY)
    assert [len(group["params"]) for group in tied] == [1, 2]
    layer.bias.requires_grad_(False)
    assert len(sgd(layer).param_groups[0]["params"]) == 1


def test_one_step() -> None:
    """Rate and decay reach the update."""
    for build, weight_lr, bias_lr in (
        (partial(sgd, momentum=0.0, nesterov=False), 0.1, 0.1),
        (partial(tsn_sgd, momentum=0.0), 0.5, 1.0),
        (partial(tsn_sgd, momentum=0.0, fc_lr5=False), 0.1, 0.2),
    ):
        model = nn.Linear(1, 1)
        nn.init.ones_(model.weight)
        nn.init.ones_(model.bias)
        optimizer = build(model, lr=0.1, weight_decay=0.5)
        model(torch.ones(1, 1)).sum().backward()
        optimizer.step()
        bias_decay = 0.5 if build.func is sgd else 0.0
        assert model.weight.item() == pytest.approx(1 - weight_lr * 1.5)
        assert model.bias.item() == pytest.approx(1 - bias_lr * (1 + bias_decay))
    assert sgd(model).param_groups[0]["nesterov"]
    assert not tsn_sgd(model).param_groups[0]["nesterov"]


def rates(build: Callable[..., Schedule], steps: int, beyond: int = 0, lr: float = 2.0) -> list:
    """Rate of every step, over that of the optimizer."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=lr)
    schedule = build(optimizer, steps)
    found = []
    for _ in range(steps + beyond):
        found.append(optimizer.param_groups[0]["lr"] / lr)
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("kind", ["linear", "exp"])
def test_warmup_cosine_is_the_closed_form(kind: str) -> None:
    found = rates(partial(warmup_cosine, warmup=0.2, start=0.1, kind=kind), 100)
    for step, rate in enumerate(found):
        if step < 20:
            expected = 0.1 + 0.9 * step / 20 if kind == "linear" else 0.1 ** (1 - step / 20)
        else:
            expected = 0.5 * (1 + math.cos(math.pi * (step - 20) / 80))
        assert rate == pytest.approx(expected, abs=1e-12)
    assert (found[0], found[20], found[60]) == pytest.approx((0.1, 1, 0.5))
    assert found[99] == pytest.approx(math.sin(math.pi / 160) ** 2)


def test_warmup_drops_is_the_closed_form() -> None:
    build = partial(warmup_drops, at=[0.5, 0.8], factor=0.15, warmup=0.1, start=0.01, kind="exp")
    found = rates(build, 60)
    assert found[:6] == pytest.approx([0.01 ** (1 - step / 6) for step in range(6)])
    assert found[6:] == pytest.approx([1] * 24 + [0.15] * 18 + [0.15**2] * 12)
    assert rates(partial(warmup_drops, at=[], factor=0.1), 5) == [1] * 5
    assert rates(constant, 7, beyond=3) == [1] * 10


SCHEDULES = {
    "cosine": warmup_cosine,
    "cosine, exp": partial(warmup_cosine, warmup=0.3, kind="exp"),
    "cosine, no warm-up": partial(warmup_cosine, warmup=0.0),
    "drops": partial(warmup_drops, at=[0.4, 0.8], factor=0.1, warmup=0.1),
    "drops within the warm-up": partial(warmup_drops, at=[0.05, 0.1, 1.0], factor=0.5, warmup=0.2),
    "constant": constant,
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 7, 35, 400])
def test_no_rate_rises_after_the_warmup(name: str, steps: int) -> None:
    found = rates(SCHEDULES[name], steps, beyond=2 * steps)
    assert min(found[:steps]) > 0
    assert max(found) <= 1
    top = found.index(max(found))
    assert top <= 0.3 * steps + 1
    assert all(b >= a for a, b in pairwise(found[: top + 1]))
    assert all(b <= a for a, b in pairwise(found[top:]))


def test_every_group_keeps_its_multiple() -> None:
    optimizer = tsn_sgd(tin_net(), lr=0.1)
    first = [group["lr"] for group in optimizer.param_groups]
    schedule = warmup_cosine(optimizer, 10, warmup=0.5, start=0.5)
    factors = []
    for _ in range(10):
        now = [group["lr"] / lr for group, lr in zip(optimizer.param_groups, first, strict=True)]
        assert now == pytest.approx([now[0]] * len(first))
        factors.append(now[0])
        optimizer.step()
        schedule.step()
    assert factors[0] == 0.5


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_checkpoint_brings_rates_and_groups_back(name: str, tmp_path: Path) -> None:
    def start() -> tuple[nn.Module, torch.optim.SGD, Schedule, Checkpointer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
        optimizer = tsn_sgd(model, lr=0.1)
        schedule = SCHEDULES[name](optimizer, 12)
        return (
            model,
            optimizer,
            schedule,
            Checkpointer(tmp_path, model, optimizer, schedule=schedule),
        )

    def go_on(model: nn.Module, optimizer: torch.optim.SGD, schedule: Schedule, steps: int) -> list:
        seen = []
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.arange(12.0).view(4, 3)).square().mean().backward()
            optimizer.step()
            seen.append([group["lr"] for group in optimizer.param_groups])
            schedule.step()
        return seen

    *whole, checkpoint = start()
    go_on(*whole, 5)
    checkpoint.save(5)
    expected = go_on(*whole, 7)
    *again, checkpoint = start()
    assert checkpoint.resume() == 5
    assert go_on(*again, 7) == expected
    for left, right in zip(whole[0].parameters(), again[0].parameters(), strict=True):
        assert torch.equal(left, right)
    names = [group["name"] for group in again[1].param_groups]
    assert names == ["norm", "classifier_weight", "classifier_bias"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(warmup_cosine, steps=0), "steps=0: need 1 or more"),
        (partial(constant, steps=0), "steps=0"),
        (partial(warmup_cosine, steps=9, warmup=1.0), "warmup=1.0: need a fraction"),
        (partial(warmup_cosine, steps=9, warmup=-0.1), "warmup=-0.1"),
        (partial(warmup_cosine, steps=9, start=0.0), "start=0.0: need a factor"),
        (partial(warmup_cosine, steps=9, kind="cosine"), "kind='cosine': need 'linear' or 'exp'"),
        (partial(warmup_drops, steps=9, at=[0.5, 0.2], factor=0.1), "at=.*in rising order"),
        (partial(warmup_drops, steps=9, at=[20, 40], factor=0.1), "at=.*need fractions"),
        (partial(warmup_drops, steps=9, at=[0.5], factor=10.0), "factor=10.0: need a factor"),
        (partial(warmup_drops, steps=9, at=[0.5], factor=0.1, warmup=2), "warmup=2"),
    ],
)
def test_wrong_arguments_are_named(call: Callable[..., Schedule], message: str) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    with pytest.raises(ValueError, match=message):
        call(optimizer)


@pytest.mark.parametrize("path", sorted((CONFIGS / "optim").glob("*.yaml")), ids=lambda p: p.stem)
def test_optimizer_configs(path: Path) -> None:
    optimizer = instantiate(OmegaConf.load(path))(tin_net())
    assert isinstance(optimizer, torch.optim.SGD)
    assert len(optimizer.param_groups) == {"sgd": 1, "tsn_sgd": 5}[path.stem]


@pytest.mark.parametrize(
    "path", sorted((CONFIGS / "schedule").glob("*.yaml")), ids=lambda p: p.stem
)
def test_schedule_configs(path: Path) -> None:
    found = rates(instantiate(OmegaConf.load(path)), 100)
    assert len(found) == 100
    assert max(found) == 1
    assert found[-1] == pytest.approx(
        {"constant": 1, "warmup_cosine": 0, "warmup_drops": 0.01}[path.stem], abs=1e-3
    )
