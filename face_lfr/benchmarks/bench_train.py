"""Speed of training steps.

The group `train` of `python -m face_lfr.benchmarks`. A step is that of `engine.train_step` with the
classifier, the backward pass and SGD. Two ways to run one network have to give the same loss and
gradient before they are timed; torchvision's ResNet-50, another network of another cost, gives the
time per multiplication a context.

Letters: B images of a batch, D embedding width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.dist import World
from face_lfr.benchmarks.networks import Variant, no_compiler, placed, usual
from face_lfr.benchmarks.results import Row, measure, measured, rates, row
from face_lfr.classifier import Classifier
from face_lfr.data.draws import FaceItem
from face_lfr.data.transforms import FaceTransform
from face_lfr.engine import train_step
from face_lfr.flops import count
from face_lfr.margins import ArcFace
from face_lfr.models.iresnet import IResNet
from face_lfr.optim import sgd

FEATURES = 512
LIMITS = {"float32": 1e-2, "bfloat16": 0.3}  # of the gradient, relative; of the loss a tenth


class Work(NamedTuple):
    """What a step trains, and on what."""

    images: int = 4  # fewer make the last norm, and so every gradient, degenerate
    size: int = 112
    layers: tuple[int, int, int, int] = (3, 4, 14, 3)
    widths: tuple[int, int, int, int] = (64, 128, 256, 512)
    classes: int = 10_000
    seed: int = 0

    @property
    def name(self) -> str:
        """Of the network."""
        return f"IResNet-{2 * sum(self.layers) + 2}"

    def shape(self, variant: Variant) -> str:
        """Text for the result row."""
        images = f"{self.images} images of {self.size}x{self.size}"
        return f"{images}, {self.classes} classes, {variant.label}"

    def net(self) -> nn.Module:
        """Equal weights for equal seeds."""
        torch.manual_seed(self.seed)
        return IResNet(self.layers, self.widths, FEATURES, self.size)

    def item(self, device: torch.device) -> FaceItem:
        """Images of noise with their classes, on the device."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.images, 3, self.size, self.size)
        image = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        label_B: Any = torch.randint(self.classes, (self.images,), generator=generator)
        return FaceItem(image.to(device), label_B.to(device))


class Step:
    """A training step: normalise, forward, margin softmax, backward, SGD."""

    def __init__(self, net: nn.Module, work: Work, variant: Variant, device: torch.device) -> None:
        self.net = placed(net, variant, device).train()
        if variant.compiled:
            self.net.compile()
        self.item, self.device, self.precision = work.item(device), device, variant.precision
        self.transform = FaceTransform(work.size)
        world = World(0, 1, device)
        self.objective = Classifier(FEATURES, work.classes, ArcFace(0.5), world=world).to(device)
        self.optimizer = sgd(net, self.objective, lr=1e-3)

    def __call__(self) -> Tensor:
        loss = train_step(
            self.net, self.item, self.transform, self.objective, self.device, self.precision
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def gradient(self) -> dict[str, Tensor]:
        """Gradients of the network in the last call."""
        named = self.net.named_parameters()
        return {name: x.grad.clone() for name, x in named if x.grad is not None}


def train_rows(
    repeats: int,
    device: torch.device,
    compile: bool = False,
    quick: bool = False,
    seed: int = 0,
) -> Iterator[Row]:
    """IResNet-50: by layout, compiled against eager, and beside torchvision's ResNet-50.

    Args:
        repeats: timed steps of each side; at least 20 on CUDA.
        device: where the networks run.
        compile: also compile on a CPU, which takes minutes there.
        quick: 56 instead of 112 pixels on a CPU.
        seed: of weights and images.

    Raises:
        RuntimeError: two ways to run one network give another loss or gradient.
    """
    cuda, variant = device.type == "cuda", usual(device)
    repeats = max(repeats, 20) if cuda else repeats
    work = Work(128 if cuda else 4, 56 if quick and not cuda else 112, seed=seed)
    yield same_row(work, variant, variant._replace(channels_last=False), repeats, device)
    yield context_row(work, variant, repeats, device)
    if cuda or compile:
        yield same_row(work, variant._replace(compiled=True), variant, repeats, device)


def same_row(
    work: Work, variant: Variant, other: Variant, repeats: int, device: torch.device
) -> Row:
    """One network run in two ways.

    Raises:
        RuntimeError: losses or gradients of the first step differ.
    """
    name, peer_name = f"train step, {work.name}", other.label
    reason = no_compiler() if variant.compiled else None
    if reason is not None:
        return row(name, work.shape(variant), peer_name, f"not measured: {reason}")
    ours, peer = (Step(work.net(), work, how, device) for how in (variant, other))
    start = time.perf_counter()
    loss = float(ours())
    first = f"first call {time.perf_counter() - start:.0f} s" if variant.compiled else ""
    difference, gap = compare_steps(f"{name}, {variant.label}", ours, loss, peer)
    timed = measure_steps(ours, peer, repeats, device)
    return measured(
        name, work.shape(variant), peer_name, timed, difference, first,
        rates(timed, work.images, "images"), f"gradient differs by {gap:.1e}",
    )  # fmt: skip


def compare_steps(name: str, ours: Step, loss: float, peer: Step) -> tuple[float, float]:
    """Differences of losses and, relative, of gradients, after a first step of `ours`.

    Args:
        name: for the message.
        ours: has taken its first step.
        loss: of that step.
        peer: takes its first step here.

    Raises:
        RuntimeError: one of them exceeds `LIMITS`, relative to the peer's.
    """
    theirs_loss = float(peer())
    mine, theirs = ours.gradient(), peer.gradient()
    if mine.keys() != theirs.keys():
        raise RuntimeError(f"{name}: other parameters, {sorted(mine.keys() ^ theirs.keys())}")
    square = sum(float((mine[key] - theirs[key]).square().sum()) for key in mine)
    gap = (square / sum(float(x.square().sum()) for x in theirs.values())) ** 0.5
    difference, limit = abs(loss - theirs_loss), LIMITS[ours.precision]
    if not (difference <= 0.1 * limit * abs(theirs_loss) and gap <= limit):
        raise RuntimeError(f"{name}: losses differ by {difference}, gradients by {gap}")
    return difference, gap


def context_row(work: Work, variant: Variant, repeats: int, device: torch.device) -> Row:
    """An IResNet against torchvision's ResNet-50 with as many features, per multiplication."""
    from torchvision import __version__
    from torchvision.models import resnet50

    net, other = work.net(), resnet50(weights=None, num_classes=FEATURES)
    cost = {
        "ours": count(net, work.size, "mac") / 1e9,
        "peer": count(other, work.size, "mac") / 1e9,
    }
    ours, peer = (Step(side, work, variant, device) for side in (net, other))
    timed = measure_steps(ours, peer, repeats, device)
    spent = {side: timed[f"{side}_ms"] / work.images / cost[side] for side in cost}
    timed |= {"ratio": spent["peer"] / spent["ours"]}
    costs = (f"{side} {cost[side]:.3g} GMAC forward, {spent[side]:.3g} ms each" for side in cost)
    return measured(
        f"train step, {work.name}", work.shape(variant), "torchvision resnet50", timed, None,
        "ratio of the times per GMAC", *costs, rates(timed, work.images, "images"),
        f"peer: torchvision {__version__}",
    )  # fmt: skip


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
