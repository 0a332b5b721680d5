"""Optimizers as functions of a model, so that a config can name them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def caffe_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimizer: biases learn twice as fast and do not decay.

    As in the released training files of arXiv 1711.08766 (multipliers of the layers with a bias).
    Scale and shift of batch norm are no biases there: they decay like the weights. Frozen
    parameters are left out; a group may be empty and is then left out too.
    """
    weights: list[nn.Parameter] = []
    biases: list[nn.Parameter] = []
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            is_bias = name == "bias" and not isinstance(module, _BatchNorm)
            (biases if is_bias else weights).append(parameter)
    groups = [
        {"params": weights, "lr": lr, "weight_decay": weight_decay},
        {"params": biases, "lr": 2 * lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def caffe_sgd(
    model: nn.Module, lr: float = 1e-3, momentum: float = 0.9, weight_decay: float = 2e-4
) -> torch.optim.SGD:
    """SGD of the released solvers over `caffe_groups`.

    Caffe's velocity contains the rate, PyTorch's does not: the same at a constant rate.
    """
    return torch.optim.SGD(caffe_groups(model, lr, weight_decay), lr=lr, momentum=momentum)


def adam(model: nn.Module, lr: float = 2e-3, weight_decay: float = 0.0) -> torch.optim.Adam:
    """Adam over all trainable parameters in one group."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay)


def sgd(
    model: nn.Module, lr: float = 1e-3, momentum: float = 0.9, weight_decay: float = 0.0
) -> torch.optim.SGD:
    """SGD over all trainable parameters in one group."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)


def late_drops(
    optimizer: torch.optim.Optimizer, steps: int, at: Sequence[float], factor: float
) -> torch.optim.lr_scheduler.MultiStepLR:
    """Multiply the rate by `factor` when the given fractions of `steps` are done."""
    milestones = [round(steps * fraction) for fraction in at]
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, factor)
