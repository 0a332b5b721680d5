"""Optimizers as functions of a model, and schedules of their rates, so that a config can name them.

A schedule is stepped once an iteration and is a closed form of the iteration. Its lengths are
fractions of all steps, so that a shortened run keeps its shape.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


def sgd(
    model: nn.Module,
    lr: float = 0.04,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 1e-4,
    norm_decay: bool = True,
) -> torch.optim.SGD:
    """SGD over all trainable parameters, as Sense-X/TSD trains.

    Args:
        model: its frozen parameters are left out.
        lr: of the whole batch; the linear rule is 0.00125 an image.
        momentum: of the velocity.
        nesterov: look one step ahead.
        weight_decay: of every parameter.
        norm_decay: False spares the scales and shifts of normalisations.
    """
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for module in model.modules():
        is_norm = isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm)
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad:
                (spared if is_norm and not norm_decay else decayed).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed}]
    if spared:
        groups.append({"params": spared, "weight_decay": 0.0})
    return torch.optim.SGD(
        groups,
        lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay,
    )  # fmt: skip


def constant(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """The optimizer's own rate, at every one of the `steps`."""
    _check(steps, 0.0, 1.0)
    return LambdaLR(optimizer, lambda step: 1.0)


def drops(
    optimizer: torch.optim.Optimizer,
    steps: int,
    at: Sequence[float],
    factor: float = 0.1,
    warmup: float = 0.0,
    start: float = 1 / 3,
) -> LambdaLR:
    """A linear warm-up, then a rate that falls to `factor` of itself at fractions of `steps`.

    Args:
        optimizer: its rates are those of 1.
        steps: of the whole training, warm-up included.
        at: fractions of `steps`, in rising order.
        factor: of every drop, in (0, 1].
        warmup: fraction of `steps`; a drop inside of it waits for its end.
        start: factor of the first step, in (0, 1].

    Raises:
        ValueError: an argument out of its range.
    """
    if not all(0 <= fraction <= 1 for fraction in at) or list(at) != sorted(at):
        raise ValueError(f"at={list(at)}: need fractions of the steps, in rising order")
    if not 0 < factor <= 1:
        raise ValueError(f"factor={factor}: need a factor in (0, 1]")
    _check(steps, warmup, start)
    rise = round(warmup * steps)
    falls = [round(fraction * steps) for fraction in at]

    def rate(step: int) -> float:
        if step < rise:
            return start + (1 - start) * step / rise
        return float(factor ** sum(step >= fall for fall in falls))

    return LambdaLR(optimizer, rate)


def _check(steps: int, warmup: float, start: float) -> None:
    if steps < 1:
        raise ValueError(f"steps={steps}: need 1 or more")
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup={warmup}: need a fraction of the steps in [0, 1)")
    if not 0 < start <= 1:
        raise ValueError(f"start={start}: need a factor in (0, 1]")
