"""How the benchmarks run networks, and the state they are in.

Letters: B images of a batch, C channels, H W size, D embedding width.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from face_lfr.engine import autocast

SETTLING = 4  # images whose statistics the norms take

Call = Callable[[], Tensor]


class Variant(NamedTuple):
    """How a network is run."""

    precision: str = "float32"
    channels_last: bool = False
    compiled: bool = False

    @property
    def label(self) -> str:
        """Text for the result row."""
        layout = "channels_last" if self.channels_last else "contiguous"
        return f"{self.precision} {layout}" + (", compiled" if self.compiled else "")


def usual(device: torch.device) -> Variant:
    """How the recipes run their networks; float32 on a CPU."""
    return Variant("bfloat16" if device.type == "cuda" else "float32", channels_last=True)


def no_compiler() -> str | None:
    """Why nothing can be compiled here; None when it can."""
    found = shutil.which("c++") or shutil.which("g++")
    return None if found else "torch.compile needs a C++ compiler"


def placed(net: nn.Module, variant: Variant, device: torch.device) -> nn.Module:
    """The network itself, on its device and in the variant's layout."""
    net.to(device)
    layout = torch.channels_last if variant.channels_last else torch.contiguous_format
    net.to(memory_format=layout)
    return net


def noise(images: int, size: int, seed: int) -> Tensor:
    """Images (B, 3, H, W) of noise."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, 3, size, size, generator=generator)


@torch.no_grad()
def settled(net: nn.Module, seed: int = 0) -> nn.Module:
    """The network itself in evaluation mode, its norms with the statistics of images of noise.

    A fresh norm does nothing in evaluation: the maps of a fresh IResNet-100 then grow until they
    are infinite, and in other networks they may shrink to denormal numbers, with which a CPU
    calculates many times slower. Either way the time would not be that of a trained network.
    Folding such a norm would also prove nothing.
    """
    net.eval()
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train().momentum = None  # so that the average is that of these images alone
    size: Any = net.input_size
    net(noise(SETTLING, size, seed))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum
    return net


class Forward:
    """Test features of a batch that lies on the device."""

    def __init__(self, net: nn.Module, x: Tensor, variant: Variant, device: torch.device) -> None:
        embed: Any = placed(net, variant, device).eval().embed
        self.run = torch.compile(embed) if variant.compiled else embed
        self.x, self.device, self.precision = x.to(device), device, variant.precision
        if variant.channels_last:
            self.x = self.x.to(memory_format=torch.channels_last)

    def __call__(self) -> Tensor:
        with torch.inference_mode(), autocast(self.device, self.precision):
            feature_BD: Tensor = self.run(self.x)
        return feature_BD.float()


@contextmanager
def full_float32() -> Iterator[None]:
    """Convolutions and products of float32 in float32 inside: no TF32 on CUDA."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def agreement(name: str, ours: Call, peer: Call, limit: float) -> float:
    """Greatest difference of two results.

    Raises:
        RuntimeError: it is more than `limit` times the greatest entry of the peer's.
    """
    theirs = peer()
    difference = float((ours() - theirs).abs().max())
    if not difference <= limit * float(theirs.abs().max()):
        raise RuntimeError(f"{name}: results differ by {difference}")
    return difference
