"""Margins: targets and negatives against their equations, edges, states, configurations."""

from __future__ import annotations

import inspect
import math
from pathlib import Path

import pytest
import torch
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf
from torch import nn

from face_lfr.margins import (
    SVAM,
    AdaCos,
    ArcFace,
    ArcNegFace,
    Combined,
    CosFace,
    CurricularFace,
    Margin,
    SphereFace,
    SVArc,
)
from face_lfr.tests.margin_loop import loop_negative, loop_target, margins

CONFIGS = sorted((Path(__file__).parents[1] / "configs" / "margin").glob("*.yaml"))
NAMES = list(margins())
GOLDEN = (  # c_y, c_j, u, t, v
    (0, 0, -0.4794, 1.0697, 0.0697),
    (0.8, 0.3, 0.4144, 1.1922, 0.5498),
    (0.8, 0.1, 0.4144, 1.1421, 0.2563),
    (0.5, 0.5, 0.0236, 1.0713, 0.6069),
    (0, 0.7, -0.4794, 0.5986, 0.0176),
    (-0.1, 0.8, -0.5648, 0.4728, -0.1489),
    (0.9, 0.5, 0.5808, 1.1961, 0.7941),
)


@pytest.mark.parametrize(("own", "other", "u", "t", "v"), GOLDEN)
def test_check_03_arcnegface_golden_values(
    own: float, other: float, u: float, t: float, v: float
) -> None:
    target = ArcNegFace().target(torch.tensor([own]))
    value, slope = ArcNegFace().negatives(torch.tensor([[other]]), target)
    assert slope is not None
    found = [target.value.item(), slope.item(), value.item()]
    assert found == pytest.approx([u, t, v], abs=5.1e-5)


def test_check_03_arcnegface_weights() -> None:
    """0 < t <= 1.2; above 1 just within 0.603857 of u; v <= 1.4; dv/dc is t."""
    own, others = torch.linspace(-1, 1, 41).double(), torch.linspace(-1, 1, 101).double()
    target = ArcNegFace().target(own)
    value, slope = ArcNegFace().negatives(others.expand(41, -1), target)
    assert slope is not None
    near = (others - target.value[:, None]).abs() < 0.603857
    assert torch.equal(slope > 1, near)
    assert slope.min() > 0
    assert slope.max() <= 1.2
    assert value.max() <= 1.4
    torch.testing.assert_close(value, slope * others + slope - 1)


def test_check_03_without_a_weight_it_is_arcface() -> None:
    cosine = torch.linspace(-1, 1, 33).double()
    plain, flat = ArcFace(0.5), ArcNegFace(0.5, alpha=1.0, sigma=1e6)
    target, same = plain.target(cosine), flat.target(cosine)
    assert torch.equal(target.value, same.value)
    assert torch.equal(target.slope, same.slope)
    value, slope = flat.negatives(cosine.expand(33, -1), same)
    torch.testing.assert_close(value, cosine.expand(33, -1), rtol=0, atol=1e-11)
    assert slope is not None
    torch.testing.assert_close(slope, torch.ones_like(slope), rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_targets_match_the_angle_and_its_derivative(name: str) -> None:
    margin = margins()[name]
    cosines = torch.linspace(-0.999, 0.999, 81).double()
    found = margin.target(cosines)
    for index in range(len(cosines)):
        cosine = cosines[index].clone().requires_grad_()
        value = loop_target(margin, cosine)
        (slope,) = torch.autograd.grad(value, cosine)
        assert found.value[index].item() == pytest.approx(value.item(), abs=1e-12)
        assert found.slope[index].item() == pytest.approx(slope.item(), rel=1e-9)
    assert (found.value.diff() > 0).all()  # more similar is never a smaller logit
    assert (found.value <= cosines + 1e-12).all()


@pytest.mark.parametrize("name", NAMES)
def test_negatives_match_the_equation(name: str) -> None:
    margin = margins()[name]
    own, others = torch.linspace(-0.95, 0.95, 12).double(), torch.linspace(-1, 1, 23).double()
    target = margin.target(own)
    value, slope = margin.negatives(others.expand(12, -1).contiguous(), target)
    slope = torch.ones_like(value) if slope is None else slope
    for i in range(len(own)):
        for j in range(len(others)):
            cosine = others[j].clone().requires_grad_()
            v = loop_negative(margin, cosine, target.value[i].item(), own[i].item())
            (dv,) = torch.autograd.grad(v, cosine)
            assert value[i, j].item() == pytest.approx(v.item(), abs=1e-12)
            assert slope[i, j].item() == pytest.approx(dv.item(), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_targets_are_finite_at_the_ends_and_beyond(name: str, dtype: torch.dtype) -> None:
    ends = torch.tensor([1.0, -1.0, 1 + 2e-7, -1 - 2e-7, 1 - 1e-8, -1 + 1e-8], dtype=dtype)
    target = margins()[name].target(ends)
    value, slope = margins()[name].negatives(ends.expand(6, -1).contiguous(), target)
    assert all(x.isfinite().all() for x in (*target, value))
    assert slope is None or slope.isfinite().all()
    assert target.value.dtype == target.slope.dtype == value.dtype == dtype


def test_values_at_the_ends_are_exact() -> None:
    ends = torch.tensor([1.0, -1.0]).double()
    assert ArcFace(0.5).target(ends).value[0].item() == math.cos(0.5)
    expected = -1 - 0.5 * math.sin(math.pi - 0.5)
    assert ArcFace(0.5).target(ends).value[1].item() == pytest.approx(expected, abs=1e-15)
    steep = 64 * ArcFace(0.5).target(torch.tensor([0.6]).double()).slope.item()
    assert steep == pytest.approx(79.18, abs=5e-3)  # s sin(theta + m) / sin(theta)
    assert ArcFace(0.5, "identity").target(ends).slope.tolist() == [1, 1]


def test_the_combined_form_contains_the_others() -> None:
    cosine = torch.linspace(-0.85, 1, 50).double()
    for combined, other in (
        (Combined(1.0, 0.5, 0.0), ArcFace(0.5)),
        (Combined(1.0, 0.0, 0.35), CosFace(0.35)),
        (Combined(1.35, 0.0, 0.0), SphereFace(1.35)),
    ):
        mine, theirs = combined.target(cosine[:-1]), other.target(cosine[:-1])
        torch.testing.assert_close(mine.value, theirs.value, rtol=0, atol=1e-12)
        torch.testing.assert_close(mine.slope, theirs.slope, rtol=0, atol=1e-9)


def test_sphereface_falls_through_its_turns() -> None:
    angle = torch.tensor([0.0, math.pi / 4, math.pi / 2, math.pi]).double()
    found = SphereFace(4.0).target(angle.cos()).value
    expected = torch.tensor([1.0, -1.0, -3.0, -7.0]).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_curricular_follows_the_mean_in_training_only() -> None:
    margin = CurricularFace(0.5, momentum=0.01)
    margin.observe(torch.tensor([0.2, 0.6]).double())
    assert margin.t.item() == pytest.approx(0.004)
    margin.observe(torch.tensor([1.0]))
    assert margin.t.item() == pytest.approx(0.01 + 0.99 * 0.004)
    margin.observe(torch.empty(0))
    margin.eval().observe(torch.tensor([-1.0]))
    assert margin.t.item() == pytest.approx(0.01396)
    other = CurricularFace()
    other.load_state_dict(margin.state_dict())
    assert torch.equal(other.t, margin.t)


def test_adacos_sets_its_scale_from_the_batch() -> None:
    margin = AdaCos()
    assert margin.current(5).item() == pytest.approx(math.sqrt(2) * math.log(4))
    own = torch.tensor([0.9, 0.8, 0.95, -0.5]).double()  # lower median of the angles: acos(0.9)
    mass = torch.tensor([3.0, 4.0, 5.0, 6.0]).double()
    found = margin.rescaled(margin.current(5).double(), mass, own)
    mean = math.log(sum(math.exp(x) for x in mass.tolist()) / 4)
    assert found.item() == pytest.approx(mean / 0.9)
    assert margin.current(5).item() == pytest.approx(mean / 0.9)
    wide = margin.rescaled(found, mass, -own)  # angles above pi / 4 count as pi / 4
    assert wide.item() == pytest.approx(mean * math.sqrt(2))
    assert margin.eval().rescaled(found, mass, own) is found
    assert set(AdaCos().state_dict()) == {"scale"}


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (ArcFace, {"m": 3.2}, r"m=3.2: need radians in \[0, pi\)"),
        (ArcFace, {"m": float("nan")}, "m=nan: need radians"),
        (ArcFace, {"margin_grad": "none"}, "margin_grad='none': need one of exact, identity"),
        (CosFace, {"m": -0.1}, "m=-0.1: need a number of at least 0"),
        (Combined, {"m1": 0.5}, "m1=0.5: need a number of at least 1"),
        (SphereFace, {"m": 0.9}, "m=0.9: need a number of at least 1"),
        (SVArc, {"t": 0.9}, "t=0.9: need a number of at least 1"),
        (SVAM, {"m": -1.0}, "m=-1.0: need a number of at least 0"),
        (ArcNegFace, {"sigma": 0.0}, "alpha=1.2, sigma=0.0: need numbers above 0"),
        (CurricularFace, {"momentum": 2.0}, r"momentum=2.0: need a number in \[0, 1\]"),
    ],
)
def test_arguments_out_of_range(kind: type, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations_build_and_name_every_argument(path: Path) -> None:
    config = OmegaConf.load(path)
    margin = instantiate(config)
    assert isinstance(margin, Margin)
    arguments = set(inspect.signature(get_class(config["_target_"])).parameters)
    assert arguments == set(config) - {"_target_"}


def test_there_is_a_configuration_for_every_margin() -> None:
    assert len(CONFIGS) == 12
    kinds = {type(instantiate(OmegaConf.load(path))) for path in CONFIGS}
    assert kinds == {type(margin) for margin in margins().values()}
    assert {kind for kind in kinds if issubclass(kind, nn.Module)} == {CurricularFace, AdaCos}
