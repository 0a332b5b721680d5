"""Networks of the benchmarks, the ways to run them, and what they cost.

Letters: N videos, T frame positions, C channels, H W size, K classes.
"""

from __future__ import annotations

import shutil
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from video_mmit.models.frame_net import FrameNet
from video_mmit.models.resnet import ResNet
from video_mmit.models.tin import add_tin
from video_mmit.models.tsm import add_tsm

CLASSES = 313
LAYERS: dict[int, tuple[str, tuple[int, ...]]] = {
    18: ("basic", (2, 2, 2, 2)),
    50: ("bottleneck", (3, 4, 6, 3)),
}
INSERTS: dict[str, Any] = {"TIN": add_tin, "TSM": add_tsm}
FIXED: dict[str, Any] = {"learn_offset": False, "use_weight": False}
# Options with which a TIN computes what another network does.
SAME = {
    "TSN": FIXED | {"offset_init": 0.0},
    "TSM": FIXED | {"offset_init": -1.0, "groups": 1},  # an eighth of the channels each way
}


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


def variants(device: torch.device, compile: bool = False, quick: bool = False) -> list[Variant]:
    """What is measured on a device; compilation on CUDA, or where it is asked for."""
    cuda = device.type == "cuda"
    fast = Variant("bfloat16" if cuda else "float32", channels_last=True)
    found = [Variant()] if quick and not cuda else [Variant(), fast]
    return found + ([fast._replace(compiled=True)] if cuda or compile else [])


def no_compiler() -> str | None:
    """Why nothing can be compiled here; None when it can."""
    found = shutil.which("cc") or shutil.which("gcc")
    return None if found else "torch.compile needs a C compiler"


def recogniser(
    kind: str, depth: int = 50, frames: int = 8, seed: int = 0, **options: Any
) -> FrameNet:
    """A TSN, TSM or TIN with a ResNet; equal weights for every kind of one depth and seed.

    Without dropout, so that two of them can be compared. The classifier's weights are larger than
    usual: a loss that hardly depends on the features would be equal for any two networks.

    Args:
        kind: TSN, TSM or TIN.
        depth: 18 or 50.
        frames: T.
        seed: of the weights.
        **options: of the temporal module.
    """
    torch.manual_seed(seed)
    block, layers = LAYERS[depth]
    insert: dict[str, Any] = {}
    if kind in INSERTS:
        insert = {kind.lower(): partial(INSERTS[kind], **options)}
    net = FrameNet(ResNet(block, layers), CLASSES, frames, dropout=0.0, **insert)
    torch.manual_seed(seed)  # the temporal modules have drawn as well
    nn.init.normal_(net.head.weight, std=0.05)
    return net


def twins(kind: str, depth: int, frames: int, seed: int) -> tuple[str, FrameNet, FrameNet]:
    """Two networks that must compute the same, to be compared before `kind` is timed.

    One is a TIN with fixed offsets; the other, named first, a TSM for kind TSM, else a TSN.
    """
    name = "TSM" if kind == "TSM" else "TSN"
    fixed = recogniser("TIN", depth, frames, seed, **SAME[name])
    return name, recogniser(name, depth, frames, seed), fixed


def placed(net: nn.Module, variant: Variant, device: torch.device) -> nn.Module:
    """The network itself, on its device and in the variant's layout, compiled if it says so."""
    volumes = any(isinstance(module, nn.Conv3d) for module in net.modules())
    last = torch.channels_last_3d if volumes else torch.channels_last
    net.to(device)
    if variant.channels_last:
        net.to(memory_format=last)
    if variant.compiled:
        net.compile()
    return net


def gmac(net: nn.Module, x: Tensor) -> float:
    """Multiply-accumulates of convolutions and linear layers for an input, forward, in 10^9."""
    training = net.training
    net.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x)
    net.train(training)
    return counter.get_total_flops() / 2e9
