"""Margins of the softmax over cosines: what becomes of the target and of the other logits.

With c[j] the cosine of a feature and the centre of class j, y its label and s the scale, every
margin here is the cross entropy of

    z[y] = s * u(c[y]),    z[j] = s * v(c[j], u), j != y.

`target` gives u with its derivative, `negatives` gives v with its. Weights inside v (t below) and
thresholds are constants to the gradient. Where u is angular, `margin_grad` says how it is derived:
`exact` is s * sin(theta + m) / sin(theta); `identity` is s, as insightface's arcface_torch does by
editing the cosines without a graph. The exact derivative has a pole at c = +-1: beyond
|c| = 1 - 1e-7 it keeps the value it has there, so that it is finite everywhere.

The loss itself is `face_lfr.ops.margin_softmax`. Margins with a state are modules, so that their
buffers are part of a checkpoint; they change it in training mode only. All raise ValueError for
arguments outside the ranges that they document.

Letters: B images of a batch, C classes (all, of a shard or of a block).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

MARGIN_GRADS = ("exact", "identity")
EDGE = 1e-7  # derivatives of angles are taken within |c| <= 1 - EDGE
PLAIN, HARD, CURRICULUM, REWEIGHTED = range(4)  # forms of v, as the CUDA kernels number them


class Target(NamedTuple):
    """What a margin makes of the target cosine, row by row (B,)."""

    value: Tensor  # u
    slope: Tensor  # du / dc[y]
    pivot: Tensor  # what the other cosines are compared with

    def rows(self, part: slice) -> Target:
        """The same of some rows."""
        return Target(self.value[part], self.slope[part], self.pivot[part])


class Form(NamedTuple):
    """v for a kernel: one of the four forms and its constants (numbers, or 0-dim tensors)."""

    kind: int = PLAIN
    constants: tuple[float | Tensor, float | Tensor, float | Tensor] = (0.0, 0.0, 0.0)


class Margin:
    """No margin at all; what the others change.

    `normalised` tells the classifier whether c is a cosine of unit rows or x W + b.
    """

    normalised: ClassVar[bool] = True

    def target(self, cosine_B: Tensor) -> Target:
        """The u of the target cosines of the batch, (B,) each; no graph."""
        return Target(cosine_B, torch.ones_like(cosine_B), cosine_B)

    def negatives(self, cosine_BC: Tensor, target: Target) -> tuple[Tensor, Tensor | None]:
        """The v of the cosines of all classes, and dv / dc, both (B, C); no graph.

        The first may be the cosines themselves; None stands for a derivative of 1. Columns of
        targets are computed like the others and replaced by the caller.
        """
        return cosine_BC, None

    def observe(self, cosine_B: Tensor) -> None:
        """Update a state from the target cosines of the global batch, before they are used."""

    def form(self) -> Form:
        """The same as `negatives`, for a kernel."""
        return Form()


@dataclass(frozen=True)
class Softmax(Margin):
    """Softmax of x W + b: neither features nor centres are normalised."""

    normalised: ClassVar[bool] = False


@dataclass(frozen=True)
class NormSoftmax(Margin):
    """Softmax of scaled cosines without a margin (NormFace, arXiv 1704.06369)."""


@dataclass(frozen=True)
class CosFace(Margin):
    """u = c - m (arXiv 1801.09414)."""

    m: float = 0.35

    def __post_init__(self) -> None:
        _at_least("m", self.m, 0)

    def target(self, cosine_B: Tensor) -> Target:
        value_B = cosine_B - self.m
        return Target(value_B, torch.ones_like(cosine_B), value_B)


@dataclass(frozen=True)
class ArcFace(Margin):
    """u = cos(theta + m) while theta + m < pi, else c - m * sin(pi - m) (arXiv 1801.07698).

    Args:
        m: radians, in [0, pi).
        margin_grad: `exact` or `identity`.
    """

    m: float = 0.5
    margin_grad: str = "exact"

    def __post_init__(self) -> None:
        _check_angle(self.m, self.margin_grad)

    def target(self, cosine_B: Tensor) -> Target:
        return _arc(cosine_B, self.m, self.margin_grad)


@dataclass(frozen=True)
class Combined(Margin):
    """u = cos(m1 * theta + m2) - m3 (arXiv 1801.07698, section 3.1).

    Beyond an angle of pi, cosine would rise again; there u goes on falling as SphereFace does,
    (-1)^k cos(phi) - 2k with k = floor(phi / pi) (arXiv 1704.08063, equation 7).

    Args:
        m1: factor of the angle, at least 1.
        m2: radians added to it, at least 0.
        m3: subtracted from the cosine, at least 0.
        margin_grad: `exact` or `identity`.
    """

    m1: float = 1.0
    m2: float = 0.3
    m3: float = 0.2
    margin_grad: str = "exact"

    def __post_init__(self) -> None:
        for name, value, least in (("m1", self.m1, 1), ("m2", self.m2, 0), ("m3", self.m3, 0)):
            _at_least(name, value, least)
        _check_grad(self.margin_grad)

    def target(self, cosine_B: Tensor) -> Target:
        phi_B = self.m1 * cosine_B.clamp(-1, 1).acos() + self.m2
        turns_B, sign_B = _half_turns(phi_B)
        value_B = sign_B * phi_B.cos() - 2 * turns_B - self.m3
        if self.margin_grad == "identity":
            return Target(value_B, torch.ones_like(cosine_B), value_B)
        inner_B = _inside(cosine_B)
        phi_B = self.m1 * inner_B.acos() + self.m2
        slope_B = self.m1 * _half_turns(phi_B)[1] * phi_B.sin() / _sine(inner_B)
        return Target(value_B, slope_B, value_B)


@dataclass(frozen=True)
class SphereFace(Margin):
    """u = (-1)^k cos(m theta) - 2k, k = floor(m theta / pi) (arXiv 1704.08063, equation 7).

    Args:
        m: factor of the angle, at least 1; 1.35 is SphereFace in the combined form of ArcFace's
            authors, 4 is the original on its own scale and schedule.
        margin_grad: `exact` or `identity`.
    """

    m: float = 1.35
    margin_grad: str = "exact"

    def __post_init__(self) -> None:
        _at_least("m", self.m, 1)
        _check_grad(self.margin_grad)

    def target(self, cosine_B: Tensor) -> Target:
        return Combined(self.m, 0.0, 0.0, self.margin_grad).target(cosine_B)


class _HardNegatives(Margin):
    """Weight t for the negatives above the margined target."""

    t: float

    def negatives(self, cosine_BC: Tensor, target: Target) -> tuple[Tensor, Tensor | None]:
        hard_BC = cosine_BC > target.pivot[:, None]
        value_BC = torch.where(hard_BC, cosine_BC * self.t + (self.t - 1), cosine_BC)
        return value_BC, hard_BC.to(cosine_BC.dtype).mul_(self.t - 1).add_(1)

    def form(self) -> Form:
        return Form(HARD, (self.t, 0.0, 0.0))


@dataclass(frozen=True)
class SVArc(_HardNegatives):
    """ArcFace, and v = t c + t - 1 for negatives with c > u (SV-Arc-Softmax, arXiv 1812.11317).

    Args:
        m: radians, in [0, pi).
        t: weight of such hard negatives, at least 1.
        margin_grad: `exact` or `identity`.
    """

    m: float = 0.5
    t: float = 1.2
    margin_grad: str = "exact"

    def __post_init__(self) -> None:
        _check_angle(self.m, self.margin_grad)
        _at_least("t", self.t, 1)

    def target(self, cosine_B: Tensor) -> Target:
        return _arc(cosine_B, self.m, self.margin_grad)


@dataclass(frozen=True)
class SVAM(_HardNegatives):
    """CosFace's u, with m >= 0, and the v of `SVArc` (SV-AM-Softmax, arXiv 1812.11317)."""

    m: float = 0.35
    t: float = 1.2

    def __post_init__(self) -> None:
        _at_least("m", self.m, 0)
        _at_least("t", self.t, 1)

    def target(self, cosine_B: Tensor) -> Target:
        return CosFace(self.m).target(cosine_B)


@dataclass(frozen=True)
class ArcNegFace(Margin):
    """ArcFace, and negatives weighted by their distance from the margined target.

        t = alpha * exp(-(c - u - mu)^2 / (2 sigma^2)),    v = t c + t - 1

    (arXiv 1909.00632; trojans-face-recognizer, the authors' code, where mu = 0 and a variable
    `sigma = 2` is the whole denominator, that is sigma = 1). A negative close to the target is
    pushed harder. One far above it, as the true class of a mislabelled image is, is let go.
    alpha = 1 and sigma to infinity is ArcFace.

    Args:
        m: radians, in [0, pi).
        alpha: greatest weight, above 0.
        mu: where, relative to u, it is reached.
        sigma: width in units of the cosine, above 0.
        margin_grad: `exact` (the authors') or `identity`, of u.
    """

    m: float = 0.5
    alpha: float = 1.2
    mu: float = 0.0
    sigma: float = 1.0
    margin_grad: str = "exact"

    def __post_init__(self) -> None:
        _check_angle(self.m, self.margin_grad)
        if not (self.alpha > 0 and self.sigma > 0):
            raise ValueError(f"alpha={self.alpha}, sigma={self.sigma}: need numbers above 0")

    def target(self, cosine_B: Tensor) -> Target:
        found = _arc(cosine_B, self.m, self.margin_grad)
        return found._replace(pivot=found.value + self.mu)

    def negatives(self, cosine_BC: Tensor, target: Target) -> tuple[Tensor, Tensor | None]:
        """The exponent takes in alpha, so that one pass less goes over the cosines."""
        _, (log_alpha, rate, _) = self.form()
        gap_BC = cosine_BC - target.pivot[:, None]
        # in place: a block of temporaries stays in the cache
        weight_BC = gap_BC.square_().mul_(-rate).add_(log_alpha).exp_()
        return torch.addcmul(weight_BC, weight_BC, cosine_BC).sub_(1), weight_BC

    def form(self) -> Form:
        return Form(REWEIGHTED, (math.log(self.alpha), 0.5 / self.sigma**2, 0.0))


class CurricularFace(nn.Module, Margin):
    """ArcFace, and v = c (t + c) for negatives with c > cos(theta + m) (arXiv 2004.00288).

    t starts at 0 and follows the mean target cosine of the global batch, before it is used:
    t <- momentum * mean(c[y]) + (1 - momentum) * t, in training mode.

    Args:
        m: radians, in [0, pi).
        momentum: weight of the batch, in [0, 1].
        margin_grad: `exact` or `identity`.
    """

    t: Tensor

    def __init__(self, m: float = 0.5, momentum: float = 0.01, margin_grad: str = "exact"):
        super().__init__()
        _check_angle(m, margin_grad)
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum={momentum}: need a number in [0, 1]")
        self.m, self.momentum, self.margin_grad = m, momentum, margin_grad
        self.register_buffer("t", torch.zeros(()))

    def target(self, cosine_B: Tensor) -> Target:
        """The pivot is cos(theta + m) itself, without ArcFace's straight part."""
        found = _arc(cosine_B, self.m, self.margin_grad)
        pivot_B = cosine_B * math.cos(self.m) - _sine(cosine_B) * math.sin(self.m)
        return found._replace(pivot=pivot_B)

    def negatives(self, cosine_BC: Tensor, target: Target) -> tuple[Tensor, Tensor | None]:
        hard_BC = cosine_BC > target.pivot[:, None]
        weight_BC = cosine_BC + self.t.to(cosine_BC)
        value_BC = torch.where(hard_BC, cosine_BC * weight_BC, cosine_BC)
        return value_BC, torch.where(hard_BC, weight_BC.add_(cosine_BC), 1.0)

    @torch.no_grad()
    def observe(self, cosine_B: Tensor) -> None:
        if self.training and len(cosine_B):
            self.t.lerp_(cosine_B.mean().to(self.t), self.momentum)

    def form(self) -> Form:
        return Form(CURRICULUM, (self.t, 0.0, 0.0))


class AdaCos(nn.Module, Margin):
    """Cosines without a margin whose scale follows the batch (arXiv 1905.00292).

    s starts at sqrt(2) * ln(C - 1); each batch in training mode sets it, before it is used, to

        s <- ln(mean_i sum_{j != y} exp(s c[j])) / cos(min(pi/4, median_i theta[y]))

    over the global batch and all classes. The median of an even number is the lower one, as in
    4uiiurz1/pytorch-adacos. The scale given to the loss is not used.
    """

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.zeros(()))  # 0: the classes are not known yet

    def current(self, classes: int) -> Tensor:
        """The scale as it stands, 0-dim; the starting value before the first batch."""
        first = math.sqrt(2) * math.log(max(classes - 1, 2))
        return torch.where(self.scale > 0, self.scale, first)

    @torch.no_grad()
    def rescaled(self, scale: Tensor, mass_B: Tensor, cosine_B: Tensor) -> Tensor:
        """The new s, kept in the buffer; `mass` is ln sum_{j != y} exp(scale * c[j]), (B,)."""
        if not self.training or not len(cosine_B):
            return scale
        mean = mass_B.logsumexp(dim=0) - math.log(len(mass_B))
        theta = cosine_B.clamp(-1, 1).acos().median().clamp_max(math.pi / 4)
        self.scale.copy_(mean / theta.cos())
        return self.scale.to(cosine_B)


def _arc(cosine_B: Tensor, m: float, margin_grad: str) -> Target:
    """cos(theta + m), or the straight line below cos(pi - m), and its derivative."""
    near_B = cosine_B > math.cos(math.pi - m)
    turned_B = cosine_B * math.cos(m) - _sine(cosine_B) * math.sin(m)
    value_B = torch.where(near_B, turned_B, cosine_B - m * math.sin(math.pi - m))
    if margin_grad == "identity":
        return Target(value_B, torch.ones_like(cosine_B), value_B)
    inner_B = _inside(cosine_B)
    steep_B = math.cos(m) + math.sin(m) * inner_B / _sine(inner_B)
    return Target(value_B, torch.where(near_B, steep_B, 1.0), value_B)


def _inside(cosine_B: Tensor) -> Tensor:
    return cosine_B.clamp(-1 + EDGE, 1 - EDGE)


def _sine(cosine_B: Tensor) -> Tensor:
    """sin(theta) in [0, 1], also where rounding left a cosine beyond +-1."""
    return (1 - cosine_B.square()).clamp_min(0).sqrt()


def _half_turns(phi_B: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers k = floor(phi / pi) and (-1)^k."""
    turns_B = (phi_B / math.pi).floor()
    return turns_B, 1 - 2 * turns_B.remainder(2)


def _at_least(name: str, value: float, least: float) -> None:
    if not least <= value < math.inf:
        raise ValueError(f"{name}={value}: need a number of at least {least}")


def _check_angle(m: float, margin_grad: str) -> None:
    if not 0 <= m < math.pi:
        raise ValueError(f"m={m}: need radians in [0, pi)")
    _check_grad(margin_grad)


def _check_grad(margin_grad: str) -> None:
    if margin_grad not in MARGIN_GRADS:
        raise ValueError(f"margin_grad={margin_grad!r}: need one of {', '.join(MARGIN_GRADS)}")
