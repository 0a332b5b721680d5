"""Optimizers as functions of a network and its objective, and schedules of their rates.

A schedule is stepped once an iteration and is a closed form of the iteration: it does not depend on
the steps before.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _NormBase
from torch.optim.lr_scheduler import LambdaLR

from common import dist
from common.log import InputError
from face_lfr.classifier import Classifier, Rows
from face_lfr.shards import local_rows

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)
CLASSIFIER = "classifier"  # how the names of the objective's groups begin


def sgd(
    model: nn.Module,
    objective: nn.Module,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    decay_norm: bool = True,
) -> torch.optim.SGD:
    """SGD over the network and the classifier; see `groups`, and `SampledSGD` for sampled classes.

    Args:
        model: the network.
        objective: a classifier, or a loss without parameters.
        lr: rate of both.
        momentum: of both.
        weight_decay: of both; face recognition decays everything (arcface_torch).
        decay_norm: False spares normalisations and biases (cavaface).
    """
    parts = groups(model, objective, weight_decay, decay_norm)
    if isinstance(objective, Classifier) and objective.sample_rate < 1:
        return SampledSGD(parts, objective, lr=lr, momentum=momentum)
    return torch.optim.SGD(parts, lr=lr, momentum=momentum)


def adam(
    model: nn.Module, objective: nn.Module, lr: float = 1e-3, weight_decay: float = 0.0
) -> torch.optim.Adam:
    """Adam over the network and the objective.

    Raises:
        InputError: the classifier samples its classes, which only `sgd` serves.
    """
    if getattr(objective, "sample_rate", 1.0) < 1:
        raise InputError("sample_rate", "below 1 needs optim=sgd, not adam", objective.sample_rate)
    return torch.optim.Adam(groups(model, objective, weight_decay), lr=lr)


def groups(
    model: nn.Module, objective: nn.Module, weight_decay: float, decay_norm: bool = True
) -> list[dict[str, Any]]:
    """Parameter groups by what they belong to; the objective's shards never share one.

    Names are `backbone`, `backbone_no_decay`, `classifier`, `classifier_no_decay`; empty groups
    and frozen parameters are left out.

    Args:
        model: the network.
        objective: a classifier, or a loss without parameters.
        weight_decay: of all, or with `decay_norm=False` of all but scales and shifts of
            normalisations and biases.
        decay_norm: whether these decay as well.
    """
    found: dict[str, list[nn.Parameter]] = {}
    seen: set[int] = set()
    for title, root in (("backbone", model), (CLASSIFIER, objective)):
        for module in root.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if not parameter.requires_grad or id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                spared = not decay_norm and (isinstance(module, NORMS) or name == "bias")
                found.setdefault(title + "_no_decay" * spared, []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": 0.0 if name.endswith("_no_decay") else weight_decay,
            "name": name,
        }
        for name, parameters in sorted(found.items())
    ]


class SampledSGD(torch.optim.SGD):
    """SGD that also moves the rows of a classifier that took part in the step, and no others.

    For these rows it is `torch.optim.SGD`: the decay joins the gradient, the gradient the momentum.
    Rows that took no part keep weight and momentum, as if the step had not been (PartialFC, arXiv
    2203.15565). The state is that of SGD, so that checkpoints need not know.

    Args:
        parts: parameter groups; those of the classifier's parameters hold for its rows.
        classifier: collects gradients of rows.
        options: of `torch.optim.SGD`; neither Nesterov nor dampening nor maximisation.
    """

    def __init__(self, parts: list[dict[str, Any]], classifier: Classifier, **options: Any):
        super().__init__(parts, **options)
        self.classifier = classifier

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all parameters that have a gradient, and of all sampled rows."""
        loss = super().step(closure)
        for name, rows in self.classifier.take_sampled().items():
            parameter = getattr(self.classifier, name)
            for group in self.param_groups:
                if any(parameter is other for other in group["params"]):
                    self._move(parameter, rows, group)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients, those of rows as well."""
        super().zero_grad(set_to_none)
        self.classifier.sampled.clear()

    def _move(self, parameter: nn.Parameter, rows: Rows, group: dict[str, Any]) -> None:
        """The operations of `torch.optim.SGD` in their order, so that no bit differs."""
        weight, row_S = local_rows(parameter), rows.row
        step = rows.grad.add(weight[row_S], alpha=group["weight_decay"])
        if group["momentum"]:
            state = self.state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            momentum = local_rows(state["momentum_buffer"])
            step = momentum[row_S].mul_(group["momentum"]).add_(step)
            momentum[row_S] = step
        weight[row_S] = weight[row_S].add_(step, alpha=-float(group["lr"]))


class ShardScaler(torch.amp.GradScaler):
    """GradScaler for float16 with a classifier over several ranks, or with sampled classes.

    torch's own refuses an optimizer that has DTensors beside plain tensors, and sees neither
    gradients of sampled rows nor an overflow on another rank. Here all ranks skip a step together.
    """

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, *rest: Any
    ) -> dict[torch.device, Tensor]:
        own: Any = SimpleNamespace(param_groups=[{"params": list(_own_gradients(optimizer))}])
        found = super()._unscale_grads_(own, inv_scale, found_inf, *rest)
        flags = [flag.to(found_inf.device) for flag in found.values()]
        flag = torch.stack([found_inf, *flags]).amax()
        if dist.size() > 1:
            td.all_reduce(flag, op=td.ReduceOp.MAX)
        return {flag.device: flag}


def _own_gradients(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Plain tensors whose `grad` is, in the same memory, what this rank's step will use."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if isinstance(parameter.grad, DTensor):
                rows = parameter.to_local().detach()
                rows.grad = parameter.grad.to_local()
                yield rows
            elif parameter.grad is not None:
                yield parameter
    if isinstance(optimizer, SampledSGD):
        yield from (leaf for _, _, leaf in optimizer.classifier.sampled)


def constant(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """The optimizer's own rates, at every one of the `steps`."""
    _check_steps(steps)
    return LambdaLR(optimizer, lambda step: 1.0)


def polynomial(
    optimizer: torch.optim.Optimizer, steps: int, power: float = 1.0, warmup: float = 0.0
) -> LambdaLR:
    """A warm-up, then (1 - share of the other steps done) ** power; arcface_torch's with power 1.

    Args:
        optimizer: its rates are those of 1.
        steps: of the whole training.
        power: above 0.
        warmup: fraction of `steps` in which the rate rises in a line to 1.

    Raises:
        ValueError: an argument out of its range.
    """
    if not power > 0:
        raise ValueError(f"power={power} must be above 0")
    return _risen(optimizer, steps, warmup, lambda done: (1 - done) ** power)


def cosine(optimizer: torch.optim.Optimizer, steps: int, warmup: float = 0.0) -> LambdaLR:
    """A warm-up, then half a cosine from 1 to 0 over the other steps.

    Args:
        optimizer: its rates are those of 1.
        steps: of the whole training.
        warmup: fraction of `steps` in which the rate rises in a line to 1.

    Raises:
        ValueError: an argument out of its range.
    """
    return _risen(optimizer, steps, warmup, lambda done: (1 + math.cos(math.pi * done)) / 2)


def multistep(
    optimizer: torch.optim.Optimizer,
    steps: int,
    at: Sequence[float],
    factor: float = 0.1,
    warmup: float = 0.0,
) -> LambdaLR:
    """A warm-up, then a rate that falls to `factor` of itself at fractions of `steps`.

    Args:
        optimizer: its rates are those of 1.
        steps: of the whole training, warm-up included.
        at: fractions of `steps`, in rising order.
        factor: of every drop, in (0, 1].
        warmup: fraction of `steps` in which the rate rises in a line to 1.

    Raises:
        ValueError: an argument out of its range.
    """
    if not all(0 <= fraction <= 1 for fraction in at) or list(at) != sorted(at):
        raise ValueError(f"at={list(at)} must be fractions of the steps, in rising order")
    if not 0 < factor <= 1:
        raise ValueError(f"factor={factor} must be in (0, 1]")
    rise = _warmup_steps(steps, warmup)
    drops = [round(fraction * steps) for fraction in at]

    def rate(step: int) -> float:
        rising = (step + 1) / rise if step < rise else 1.0
        return rising * float(factor ** sum(step >= drop for drop in drops))

    return LambdaLR(optimizer, rate)


def anchored(
    optimizer: torch.optim.Optimizer,
    steps: int,
    frozen: int,
    first: float = 0.1,
    then: float = 0.01,
) -> LambdaLR:
    """Rates of anchor finetuning: the classifier alone, then everything at a smaller rate (ours).

    arXiv 1909.00632 names the trick without saying what it is.

    Args:
        optimizer: with the groups of `groups`; its rates are those of 1.
        steps: of the whole training.
        frozen: first steps, in which the network's rate is 0.
        first: factor of the classifier's rate in these.
        then: factor of all rates afterwards.

    Raises:
        ValueError: an argument out of its range; an optimizer without a classifier's group.
    """
    _check_steps(steps)
    if not 0 <= frozen <= steps:
        raise ValueError(f"frozen={frozen} must be in [0, steps={steps}]")
    for name, value in (("first", first), ("then", then)):
        if not value > 0:
            raise ValueError(f"{name}={value} must be above 0")
    names = [str(group.get("name", "")) for group in optimizer.param_groups]
    if not any(name.startswith(CLASSIFIER) for name in names):
        raise ValueError(f"optimizer has groups {names}: need one of a {CLASSIFIER}")

    def rate(start: float) -> Callable[[int], float]:
        return lambda step: start if step < frozen else then

    return LambdaLR(
        optimizer, [rate(first if name.startswith(CLASSIFIER) else 0.0) for name in names]
    )


def _risen(
    optimizer: torch.optim.Optimizer, steps: int, warmup: float, fall: Callable[[float], float]
) -> LambdaLR:
    """`fall` of the share of the steps behind the warm-up that is done."""
    rise = _warmup_steps(steps, warmup)
    left = max(steps - rise, 1)

    def rate(step: int) -> float:
        return (step + 1) / rise if step < rise else fall(min((step - rise) / left, 1.0))

    return LambdaLR(optimizer, rate)


def _warmup_steps(steps: int, warmup: float) -> int:
    _check_steps(steps)
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup={warmup} must be a fraction of the steps in [0, 1)")
    return round(warmup * steps)


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
