"""Optimizers as functions of a model, and schedules of their rates, so that a config can name them.

A schedule is stepped once an iteration and is a closed form of the iteration: it does not depend on
the steps before, nor rise again after its warm-up. Its lengths are fractions of all steps.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim.lr_scheduler import LambdaLR

from video_mmit.models.tin import OffsetNet

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)
# Kind of a parameter -> factors of learning rate and weight decay.
FACTORS = {
    "weight": (1.0, 1.0),
    "bias": (2.0, 0.0),
    "norm": (1.0, 0.0),
    "classifier_weight": (5.0, 1.0),
    "classifier_bias": (10.0, 0.0),
}


def sgd(
    model: nn.Module,
    lr: float = 0.01,
    momentum: float = 0.9,
    nesterov: bool = True,
    weight_decay: float = 5e-4,
) -> torch.optim.SGD:
    """SGD over all trainable parameters in one group, as X-Temporal trains."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(
        parameters, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay
    )


def tsn_sgd(
    model: nn.Module,
    lr: float = 0.02,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 5e-4,
    fc_lr5: bool = True,
) -> torch.optim.SGD:
    """SGD over `tsn_groups`, as deepcs233/TIN trains (without Nesterov there)."""
    groups = tsn_groups(model, lr, weight_decay, fc_lr5)
    return torch.optim.SGD(
        groups, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay
    )


def tsn_groups(
    model: nn.Module, lr: float, weight_decay: float, fc_lr5: bool = True
) -> list[dict[str, Any]]:
    """Groups for an optimizer, from `get_optim_policies` of deepcs233/TIN.

    | parameter | rate | decay |
    |---|---|---|
    | weight of a convolution, of a linear layer in an OffsetNet, anything else | x1 | x1 |
    | bias of these | x2 | 0 |
    | scale and shift of a normalisation | x1 | 0 |
    | weight of every other linear layer: the classifier, all of TRN | x5 | x1 |
    | bias of these | x10 | 0 |

    The linear layers of OffsetNet are known by the module they are in; the reference takes the
    first 32 of a network, which is right for ResNet-50 alone. Frozen parameters are left out, and
    so are empty groups.

    Args:
        model: its trainable parameters, each of which comes once.
        lr: rate of x1.
        weight_decay: decay of x1.
        fc_lr5: False gives the classifier x1 and x2, for fine-tuning on the same classes.
    """
    in_offset_net = {
        id(layer)
        for module in model.modules()
        if isinstance(module, OffsetNet)
        for layer in module.modules()
    }
    parameters: dict[str, list[nn.Parameter]] = {kind: [] for kind in FACTORS}
    seen: set[int] = set()
    for module in model.modules():
        classifier = fc_lr5 and isinstance(module, nn.Linear) and id(module) not in in_offset_net
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                parameters[_kind(module, name, classifier)].append(parameter)
    return [
        {
            "params": parameters[kind],
            "lr": lr * rate,
            "weight_decay": weight_decay * decay,
            "name": kind,
        }
        for kind, (rate, decay) in FACTORS.items()
        if parameters[kind]
    ]


def _kind(module: nn.Module, name: str, classifier: bool) -> str:
    if isinstance(module, NORMS):
        return "norm"
    kind = "bias" if "bias" in name else "weight"
    return f"classifier_{kind}" if classifier else kind


def constant(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """The optimizer's own rates, at every one of the `steps`."""
    _check_steps(steps)
    return LambdaLR(optimizer, lambda step: 1.0)


def warmup_cosine(
    optimizer: torch.optim.Optimizer,
    steps: int,
    warmup: float = 0.05,
    start: float = 0.1,
    kind: str = "linear",
) -> LambdaLR:
    """A warm-up, then half a cosine from 1 to 0 over the steps that are left.

    X-Temporal runs a cosine of 30 epochs for 35, so that its rate rises again; here it stays 0.

    Args:
        optimizer: its rates are those of 1.
        steps: of the whole training.
        warmup: fraction of `steps`.
        start: factor of the first step.
        kind: "linear", or "exp": the same ratio from step to step.

    Raises:
        ValueError: an argument out of its range.
    """
    rise = _Warmup(steps, warmup, start, kind)
    left = max(steps - rise.length, 1)

    def factor(step: int) -> float:
        if step < rise.length:
            return rise(step)
        return (1 + math.cos(math.pi * min((step - rise.length) / left, 1.0))) / 2

    return LambdaLR(optimizer, factor)


def warmup_drops(
    optimizer: torch.optim.Optimizer,
    steps: int,
    at: Sequence[float],
    factor: float,
    warmup: float = 0.0,
    start: float = 0.1,
    kind: str = "linear",
) -> LambdaLR:
    """A warm-up, then a rate that falls to `factor` of itself at fractions of `steps`.

    Args:
        optimizer: its rates are those of 1.
        steps: of the whole training, warm-up included.
        at: fractions of `steps`, in rising order.
        factor: of every drop, in (0, 1].
        warmup: fraction of `steps`.
        start: factor of the first step.
        kind: "linear" or "exp", see `warmup_cosine`.

    Raises:
        ValueError: an argument out of its range.
    """
    if not all(0 <= fraction <= 1 for fraction in at) or list(at) != sorted(at):
        raise ValueError(f"at={list(at)}: need fractions of the steps, in rising order")
    if not 0 < factor <= 1:
        raise ValueError(f"factor={factor}: need a factor in (0, 1]")
    rise = _Warmup(steps, warmup, start, kind)
    drops = [round(fraction * steps) for fraction in at]

    def rate(step: int) -> float:
        if step < rise.length:
            return rise(step)
        return float(factor ** sum(step >= drop for drop in drops))

    return LambdaLR(optimizer, rate)


class _Warmup:
    """Factor of the rate at a step before `length`; 1 would come at `length`."""

    def __init__(self, steps: int, fraction: float, start: float, kind: str):
        _check_steps(steps)
        if not 0 <= fraction < 1:
            raise ValueError(f"warmup={fraction}: need a fraction of the steps in [0, 1)")
        if not 0 < start <= 1:
            raise ValueError(f"start={start}: need a factor in (0, 1]")
        if kind not in ("linear", "exp"):
            raise ValueError(f"kind={kind!r}: need 'linear' or 'exp'")
        self.length, self.start, self.kind = round(fraction * steps), start, kind

    def __call__(self, step: int) -> float:
        done = step / self.length
        return (
            self.start ** (1 - done) if self.kind == "exp" else self.start + (1 - self.start) * done
        )


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps={steps}: need 1 or more")
