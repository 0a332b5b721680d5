"""Speed of training steps: what learned or fixed shifts in time add to a TSN.

The group `train` of `python -m video_mmit.benchmarks`. Both networks of a row have the same
backbone, clips, loss and optimizer, and take their steps in turns. Before that their losses and
gradients are compared where both compute the same: TIN with offset 0 and weight 1 is a TSN, with
offsets of -1 and 1 a TSM.

Letters: N videos, T frame positions, C channels, H W size, K classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from video_mmit.benchmarks.networks import (
    CLASSES,
    Variant,
    no_compiler,
    placed,
    recogniser,
    twins,
    variants,
)
from video_mmit.benchmarks.notes import measured, rates
from video_mmit.benchmarks.results import Row, measure, row
from video_mmit.data.clips import ClipItem
from video_mmit.data.transforms import GroupTransform
from video_mmit.engine import train_step
from video_mmit.losses import Objective, bce
from video_mmit.optim import sgd

TARGETS = {"cpu": 1.15, "cuda": 1.10}  # TIN's step in steps of a TSN
LIMITS = {"cpu": 1e-5, "cuda": 1e-2}  # relative; sums on CUDA have no fixed order


class Work(NamedTuple):
    """What a step trains on."""

    clips: int = 1
    size: int = 224
    depth: int = 50
    frames: int = 8
    seed: int = 0

    def shape(self, variant: Variant) -> str:
        """Text for the result row."""
        clip = f"{self.clips} x {self.frames} frames of {self.size}x{self.size}"
        return f"{clip}, {variant.label}"

    def item(self, device: torch.device) -> ClipItem:
        """Clips of noise with two labels each, on the device."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.clips, self.frames, 3, self.size, self.size)
        image = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        label_N2 = torch.rand(self.clips, CLASSES, generator=generator).topk(2).indices
        target_NK = torch.zeros(self.clips, CLASSES).scatter_(1, label_N2, 1.0)
        return ClipItem(image.to(device), target_NK.to(device))


class Step:
    """A training step of `net`: normalise, forward, scaled BCE, backward, SGD.

    A call without an item takes the one that lies on the device from the start.
    """

    def __init__(
        self, net: nn.Module, item: ClipItem, variant: Variant, device: torch.device
    ) -> None:
        self.net = placed(net, variant, device).train()
        self.item, self.device, self.precision = item, device, variant.precision
        self.optimizer = sgd(net, lr=1e-3)
        self.transform = GroupTransform()
        counts_K = torch.ones(CLASSES, dtype=torch.int64)
        self.objective = Objective(counts_K, bce, scale=160.0).to(device)

    def __call__(self, item: ClipItem | None = None) -> Tensor:
        loss = train_step(
            self.net, item or self.item, self.transform, self.objective, self.device, self.precision
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def gradient(self) -> dict[str, Tensor]:
        """Gradients of the last call, without those of a temporal module."""
        named = self.net.named_parameters()
        return {
            name.replace("conv1.conv.", "conv1."): x.grad
            for name, x in named
            if x.grad is not None and ".temporal." not in name
        }


def train_rows(
    repeats: int,
    device: torch.device,
    compile: bool = False,
    quick: bool = False,
    seed: int = 0,
) -> Iterator[Row]:
    """TIN and TSM against TSN in every variant of the device, then TIN compiled against eager.

    Args:
        repeats: timed steps of each side; at least 20 on CUDA.
        device: where the networks run.
        compile: also compile on a CPU, which takes minutes there.
        quick: 112 instead of 224 pixels on a CPU.
        seed: of weights and clips.
    """
    cuda = device.type == "cuda"
    repeats = max(repeats, 20) if cuda else repeats
    work = Work(8 if cuda else 1, 112 if quick and not cuda else 224, seed=seed)
    reason = no_compiler()
    for variant in variants(device, compile, quick):
        if variant.compiled and reason is not None:
            shape = work.shape(variant)
            yield row("train step, TIN-R50", shape, "TSN-R50", f"not measured: {reason}")
            continue
        for kind in ("TIN", "TSM"):
            yield tsn_row(kind, work, variant, repeats, device)
        if variant.compiled:
            yield compiled_row(work, variant, repeats, device)


def tsn_row(kind: str, work: Work, variant: Variant, repeats: int, device: torch.device) -> Row:
    """Time steps of a TIN or a TSM against those of a TSN.

    Raises:
        RuntimeError: networks that should compute the same have another loss or gradient.
    """
    sizes = (work.depth, work.frames, work.seed)
    twin, peer_net, fixed = twins(kind, *sizes)
    eager = variant._replace(compiled=False)
    difference, gap = compare_steps(f"{twin} and its TIN", fixed, peer_net, work, eager, device)
    item = work.item(device)
    ours, peer = (Step(recogniser(name, *sizes), item, variant, device) for name in (kind, "TSN"))
    timed = measure_steps(ours, peer, repeats, device)
    wanted = f", wanted {TARGETS[device.type]:.2f}" if kind == "TIN" else ""
    return measured(
        f"train step, {kind}-R{work.depth}", work.shape(variant), f"TSN-R{work.depth}",
        timed, difference,
        f"{timed['ours_ms'] / timed['peer_ms']:.3f} times the step of the TSN{wanted}",
        rates(timed, work.clips, "clips"),
        f"a TIN made a {twin}: gradient differs by {gap:.1e}",
    )  # fmt: skip


def compiled_row(work: Work, variant: Variant, repeats: int, device: torch.device) -> Row:
    """A compiled TIN against the same TIN in eager mode."""
    item, sizes = work.item(device), ("TIN", work.depth, work.frames, work.seed)
    eager = variant._replace(compiled=False)
    ours, peer = (Step(recogniser(*sizes), item, how, device) for how in (variant, eager))
    start = time.perf_counter()
    loss = float(ours())
    first = time.perf_counter() - start
    difference = abs(loss - float(peer()))
    if not difference <= 5e-2 * abs(loss):
        raise RuntimeError(f"compiled: first loss {loss} differs by {difference}")
    timed = measure_steps(ours, peer, repeats, device)
    name, first_call = f"train step, TIN-R{work.depth}", f"first call {first:.0f} s"
    return measured(name, work.shape(variant), "eager", timed, difference, first_call)


def compare_steps(
    name: str, ours: nn.Module, peer: nn.Module, work: Work, variant: Variant, device: torch.device
) -> tuple[float, float]:
    """Take one step with each; returns the difference of losses and of gradients (relative).

    Raises:
        RuntimeError: one of them exceeds `LIMITS`, relative to the peer's.
    """
    item, limit = work.item(device), LIMITS[device.type]
    steps = [Step(net, item, variant, device) for net in (ours, peer)]
    losses = [float(step()) for step in steps]
    mine, theirs = (step.gradient() for step in steps)
    if mine.keys() != theirs.keys():
        raise RuntimeError(f"{name}: other parameters, {sorted(mine.keys() ^ theirs.keys())}")
    square = sum(float((mine[key] - theirs[key]).square().sum()) for key in mine)
    gap = (square / sum(float(x.square().sum()) for x in theirs.values())) ** 0.5
    difference = abs(losses[0] - losses[1])
    if not (difference <= limit * abs(losses[1]) and gap <= limit):
        raise RuntimeError(f"{name}: losses differ by {difference}, gradients by {gap}")
    return difference, gap


def measure_steps(ours: Step, peer: Step, repeats: int, device: torch.device) -> Row:
    """Times after a first step of each, which allocates, and on CUDA the memory of a step."""
    ours(), peer()
    memory = {}
    if device.type == "cuda":
        memory = {"ours_mib": peak_mib(ours), "peer_mib": peak_mib(peer)}
    return measure(ours, peer, repeats) | memory


def peak_mib(call: Callable[[], Any]) -> float:
    """Growth of the allocated CUDA memory during a call, MiB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
