"""Inputs of the margin tests, and the margined cross entropy as loops over the equations."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from face_lfr.margins import (
    SVAM,
    AdaCos,
    ArcFace,
    ArcNegFace,
    Combined,
    CosFace,
    CurricularFace,
    Margin,
    NormSoftmax,
    Softmax,
    SphereFace,
    SVArc,
)

STATELESS: dict[str, Margin] = {
    "softmax": Softmax(),
    "norm": NormSoftmax(),
    "sphere": SphereFace(1.35),
    "cos": CosFace(0.35),
    "arc": ArcFace(0.5),
    "arc identity": ArcFace(0.5, "identity"),
    "combined": Combined(1.1, 0.3, 0.2),
    "sv arc": SVArc(0.5, 1.2),
    "sv am": SVAM(0.35, 1.2),
    "arcneg": ArcNegFace(0.4, 1.3, 0.1, 0.7),
}


def margins() -> dict[str, Margin]:
    """One of every kind; those with a state are new, in evaluation mode."""
    curricular, adacos = CurricularFace(0.5), AdaCos()
    curricular.t.fill_(0.3)
    return STATELESS | {"curricular": curricular.eval(), "adacos": adacos.eval()}


def problem(count: int = 9, classes: int = 7, centers: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Unit features and centres in float64, and labels.

    The first image is nearly opposite its centre, the second close to it: one target falls below
    cos(pi - m), one rises above the other cosines.
    """
    generator = torch.Generator().manual_seed(count)
    weight = F.normalize(torch.randn(classes * centers, 5, generator=generator).double())
    label = torch.randint(classes, (count,), generator=generator)
    feature = torch.randn(count, 5, generator=generator).double()
    for row, sign in ((0, -1), (1, 1)):
        if row < count:
            feature[row] = sign * 6 * weight[label[row] * centers] + 0.5 * feature[row]
    return F.normalize(feature), weight, label


def loop_target(margin: Margin, c: Tensor) -> Tensor:
    """The u from the angle, one cosine, with the derivative of autograd."""
    theta = c.acos()
    if isinstance(margin, ArcFace | SVArc | ArcNegFace | CurricularFace):
        m = margin.m
        above = c.item() > math.cos(math.pi - m)
        u = (theta + m).cos() if above else c - m * math.sin(math.pi - m)
    elif isinstance(margin, CosFace | SVAM):
        u = c - margin.m
    elif isinstance(margin, Combined | SphereFace):
        combined = isinstance(margin, Combined)
        phi = margin.m1 * theta + margin.m2 if combined else margin.m * theta
        k = int(phi.item() / math.pi)
        u = (-1) ** k * phi.cos() - 2 * k - (margin.m3 if combined else 0)
    else:
        u = c
    if getattr(margin, "margin_grad", "exact") == "identity":
        return u.detach() + c - c.detach()
    return u


def loop_negative(margin: Margin, c: Tensor, u: float, c_y: float) -> Tensor:
    """The v of one cosine; thresholds and weights are numbers."""
    if isinstance(margin, SVArc | SVAM) and c.item() > u:
        return margin.t * c + margin.t - 1
    if isinstance(margin, CurricularFace) and c.item() > math.cos(math.acos(c_y) + margin.m):
        return c * (margin.t.item() + c)
    if isinstance(margin, ArcNegFace):
        gap = c.item() - u - margin.mu
        t = margin.alpha * math.exp(-(gap**2) / (2 * margin.sigma**2))
        return t * c + t - 1
    return c


def loop_loss(
    feature: Tensor, weight: Tensor, label: Tensor, margin: Margin, scale: float,
    smoothing: float = 0.0, centers: int = 1,
) -> Tensor:  # fmt: skip
    """Mean cross entropy, element by element, without a greatest logit taken out."""
    classes, total = len(weight) // centers, feature.sum() * 0
    for i in range(len(feature)):
        y = int(label[i])
        cosines = [
            max((feature[i] @ weight[j * centers + k] for k in range(centers)), key=Tensor.item)
            for j in range(classes)
        ]
        u = loop_target(margin, cosines[y])
        logits = [
            scale * (u if j == y else loop_negative(margin, c, u.item(), cosines[y].item()))
            for j, c in enumerate(cosines)
        ]
        log_sum = torch.stack(logits).exp().sum().log()
        for j, logit in enumerate(logits):
            share = (1 - smoothing) * (j == y) + smoothing / classes
            total = total - share * (logit - log_sum)
    return total / len(feature)


def with_gradients(call: Callable[..., Tensor], feature: Tensor, weight: Tensor) -> list[Tensor]:
    """The loss and its gradients, in float64."""
    leaves = [feature.detach().requires_grad_(), weight.detach().requires_grad_()]
    value = call(*leaves)
    return [x.detach().double() for x in (value, *torch.autograd.grad(value, leaves))]
