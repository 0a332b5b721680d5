"""Speed of inference: what merging and folding save, and PolyFace beside an IResNet.

The group `infer` of `python -m face_lfr.benchmarks`. Where both sides compute the same, their
features in float32 are compared before anything is timed. An IResNet is another network of another
cost: that row compares the times per operation. Operations are those of the organisers' count
(`flops.py`) before folding, which leaves out everything but convolutions and linear layers.

Letters: B images of a batch, D embedding width.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from face_lfr.benchmarks.networks import (
    Forward,
    Variant,
    agreement,
    full_float32,
    no_compiler,
    noise,
    settled,
    usual,
)
from face_lfr.benchmarks.results import Row, measure, measured, rates, row
from face_lfr.flops import closed_form, count
from face_lfr.models.fold import folded, merged
from face_lfr.models.iresnet import IResNet
from face_lfr.models.polyface import EfficientPolyFace

FEATURES = 256
LIMIT = 1e-3  # of a feature, relative to the greatest; what eighty blocks make of float32 rounding


class Work(NamedTuple):
    """The two networks of a run, and the images that go through them at once."""

    images: int
    blocks: tuple[int, int, int]
    size: int
    layers: tuple[int, int, int, int]
    widths: tuple[int, int, int, int] = (64, 128, 256, 512)
    width: float = 1.0  # of PolyFace, a multiple of the published channels
    peer_size: int = 112
    seed: int = 0

    @property
    def name(self) -> str:
        """Of the PolyFace."""
        return "PolyFace " + "-".join(map(str, self.blocks))

    @property
    def peer(self) -> str:
        """Of the IResNet."""
        return f"IResNet-{2 * sum(self.layers) + 2}, {self.widths[0]} to {self.widths[-1]} channels"

    def shape(self, variant: Variant) -> str:
        """Text for the result row."""
        return f"{self.images} images of {self.size}x{self.size}, {variant.label}"

    @property
    def gflops(self) -> float:
        """Cost of an image in the PolyFace as the organisers count it, with its norms."""
        return closed_form(self.blocks, self.size, FEATURES, self.width)["organiser"] / 1e9

    def polyface(self) -> nn.Module:
        """With one convolution for each branch, as the authors built it."""
        torch.manual_seed(self.seed)
        net = EfficientPolyFace(self.blocks, FEATURES, self.size, self.width, merge=False)
        return settled(net, self.seed)

    def iresnet(self) -> nn.Module:
        """The network to compare with."""
        torch.manual_seed(self.seed)
        net = IResNet(self.layers, self.widths, input_size=self.peer_size)
        return settled(net, self.seed)


IR_100 = (3, 13, 30, 3)  # 24.2 GFLOPs
QUICK = Work(4, (2, 3, 2), 107, (2, 2, 2, 2), (32, 64, 128, 256))  # 1.2 and 1.3 GFLOPs
BASE = Work(2, (10, 20, 10), 235, IR_100)  # 16.6 GFLOPs
DEEPER = BASE._replace(blocks=(23, 38, 23))  # 28.1 GFLOPs, of arXiv 1909.00632


def infer_rows(
    repeats: int,
    device: torch.device,
    compile: bool = False,
    quick: bool = False,
    full: bool = False,
    seed: int = 0,
) -> Iterator[Row]:
    """Merged, folded, compiled, and beside an IResNet.

    Args:
        repeats: timed calls of each side; at least 20 on CUDA.
        device: where the networks run.
        compile: also compile on a CPU, which takes minutes there.
        quick: a small PolyFace and an IResNet of its cost.
        full: the largest PolyFace of the paper in the place of the smallest.
        seed: of weights and images.

    Raises:
        RuntimeError: two networks that should compute the same do not.
    """
    work = (QUICK if quick else DEEPER if full else BASE)._replace(seed=seed)
    cuda, variant = device.type == "cuda", usual(device)
    if cuda:
        work, repeats = work._replace(images=64), max(repeats, 20)
    separate = work.polyface()
    whole = merged(separate)
    fast = folded(separate)
    yield same_row(work, "merged", whole, "separate 1x1", separate, variant, repeats, device)
    yield same_row(work, "merged and folded", fast, "merged", whole, variant, repeats, device)
    yield iresnet_row(work, fast, variant, repeats, device)
    if cuda or compile:
        yield compiled_row(work, fast, variant, repeats, device)


def same_row(
    work: Work,
    how: str,
    net: nn.Module,
    peer_name: str,
    peer_net: nn.Module,
    variant: Variant,
    repeats: int,
    device: torch.device,
) -> Row:
    """Two forms of one network.

    Raises:
        RuntimeError: their features differ.
    """
    name = f"inference, {work.name}, {how}"
    difference = compare(name, work, (net, variant), (peer_net, variant), device)
    ours, peer = (forward(work, side, variant, device) for side in (net, peer_net))
    ours(), peer()
    timed = measure(ours, peer, repeats)
    cost = dict.fromkeys(("ours", "peer"), work.gflops)
    notes = rates(timed, work.images, "images"), speeds(work, timed, cost)
    return measured(name, work.shape(variant), peer_name, timed, difference, *notes)


def iresnet_row(
    work: Work, net: nn.Module, variant: Variant, repeats: int, device: torch.device
) -> Row:
    """A folded PolyFace against a folded IResNet, by their times per operation."""
    other = work.iresnet()
    cost = {"ours": work.gflops, "peer": count(other, work.peer_size) / 1e9}
    ours, peer = (
        Forward(side, noise(work.images, size, work.seed + 1), variant, device)
        for side, size in ((net, work.size), (folded(other), work.peer_size))
    )
    ours(), peer()
    timed = measure(ours, peer, repeats)
    timed |= {"ratio": timed["peer_ms"] / cost["peer"] / (timed["ours_ms"] / cost["ours"])}
    return measured(
        f"inference, {work.name}, merged and folded", work.shape(variant), work.peer, timed, None,
        "ratio of the times per operation", rates(timed, work.images, "images"),
        speeds(work, timed, cost), f"peer folded, at {work.peer_size}x{work.peer_size}",
    )  # fmt: skip


def compiled_row(
    work: Work, net: nn.Module, variant: Variant, repeats: int, device: torch.device
) -> Row:
    """A folded and compiled PolyFace against the same in eager mode."""
    compiled = variant._replace(compiled=True)
    name, shape = f"inference, {work.name}, merged and folded", work.shape(compiled)
    reason = no_compiler()
    if reason is not None:
        return row(name, shape, "eager", f"not measured: {reason}")
    start = time.perf_counter()
    difference = compare(f"{name}, compiled", work, (net, compiled), (net, variant), device)
    ours, peer = (forward(work, net, how, device) for how in (compiled, variant))
    ours(), peer()
    seconds = time.perf_counter() - start
    timed = measure(ours, peer, repeats)
    return measured(
        name, shape, "eager", timed, difference, f"compiled and compared in {seconds:.0f} s",
        rates(timed, work.images, "images"),
        speeds(work, timed, dict.fromkeys(("ours", "peer"), work.gflops)),
    )  # fmt: skip


def forward(work: Work, net: nn.Module, variant: Variant, device: torch.device) -> Forward:
    """The network on the images of the row."""
    return Forward(net, noise(work.images, work.size, work.seed + 1), variant, device)


def compare(
    name: str,
    work: Work,
    ours: tuple[nn.Module, Variant],
    peer: tuple[nn.Module, Variant],
    device: torch.device,
) -> float:
    """Greatest difference of features in float32, whatever the precision of the row.

    In half precision it would say nothing: that rounding alone changes features of an untrained
    PolyFace 23-38-23 by two thirds of the greatest, folded or not.

    Raises:
        RuntimeError: it is more than `LIMIT` times the greatest feature.
    """
    with full_float32():
        mine, theirs = (
            forward(work, net, how._replace(precision="float32"), device)
            for net, how in (ours, peer)
        )
        return agreement(name, mine, theirs, LIMIT)


def speeds(work: Work, timed: Mapping[str, Any], gflops: Mapping[str, float]) -> str:
    """What an image costs, and what each side did of it in a second."""
    done = {side: 1e3 * work.images * cost / timed[f"{side}_ms"] for side, cost in gflops.items()}
    texts = (
        f"{side} {gflops[side]:.4g} GFLOPs an image, {done[side]:.3g} GFLOP/s" for side in done
    )
    return ", ".join(texts)
