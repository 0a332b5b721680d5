"""What the networks share: the check of their input, convolution with norm, the last layer.

Letters: B images, C channels, H W size, D embedding width.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def check_input(x_BCHW: Tensor, size: int) -> None:
    """Raise `ValueError` unless the images have 3 channels and `size` x `size` pixels."""
    if x_BCHW.dim() != 4 or x_BCHW.shape[1:] != (3, size, size):
        raise ValueError(f"input has shape {tuple(x_BCHW.shape)}: need (B, 3, {size}, {size})")


def check_counts(name: str, values: Sequence[int], count: int) -> tuple[int, ...]:
    """The values as a tuple.

    Raises:
        ValueError: another number of values than `count`, or one below 1.
    """
    if len(values) != count or min(values) < 1:
        raise ValueError(f"{name}={list(values)}: need {count} numbers of at least 1")
    return tuple(values)


def check_share(name: str, value: float) -> float:
    """The value, which is a probability below 1.

    Raises:
        ValueError: below 0, or 1 and more.
    """
    if not 0 <= value < 1:
        raise ValueError(f"{name}={value}: need a number in [0, 1)")
    return value


def halved(size: int, times: int) -> int:
    """Side of a map after so many layers of stride 2 that pad by half their kernel."""
    for _ in range(times):
        size = (size + 1) // 2
    return size


class FeatureLinear(nn.Linear):
    """A linear layer in float32 under autocast: angles of features are finer than half precision.

    insightface's arcface_torch also keeps its last layer out of half precision.
    """

    def forward(self, x_BI: Tensor) -> Tensor:
        """Features (B, D), float32 under autocast."""
        device = x_BI.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return F.linear(x_BI.float(), self.weight, self.bias)
        return F.linear(x_BI, self.weight, self.bias)


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, activation.

    `folds` of a module names each layer that a norm follows (`models/fold.py`).
    """

    folds: ClassVar[tuple[tuple[str, str], ...]] = (("conv", "norm"),)

    def __init__(self, conv: nn.Conv2d, norm: nn.Module, act: nn.Module | None = None):
        super().__init__()
        self.conv, self.norm = conv, norm
        self.act = nn.Identity() if act is None else act

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Activations (B, C', H', W')."""
        y: Tensor = self.act(self.norm(self.conv(x_BCHW)))
        return y
