"""Speed of training steps.

The group `train` of `python -m reid_rqen.benchmarks`: our trunk against torchvision's, and what
memory layout, precision and compilation change in a whole step. Letters: B frames, C channels,
H W size.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from reid_rqen.benchmarks.results import Row, measure, row
from reid_rqen.data.sets import SetItem
from reid_rqen.data.transforms import FrameTransform
from reid_rqen.engine import train_step
from reid_rqen.losses import SetObjective
from reid_rqen.models.googlenet_bn import GoogLeNetBN
from reid_rqen.models.quality import ImageQuality
from reid_rqen.models.rqen import RQEN
from reid_rqen.optim import caffe_sgd

SIZE = 224
PEER_SIZE = 264  # torchvision's network then costs within 1 % of what ours costs at 224
CLASSES = 100


class Variant(NamedTuple):
    """How a step is run."""

    precision: str = "float32"
    channels_last: bool = False
    compiled: bool = False


class Work(NamedTuple):
    """What a step trains: a model, and `draws` triplets of sets of `frames` frames."""

    model: RQEN
    draws: int
    frames: int
    size: tuple[int, int] = (SIZE, SIZE)

    @property
    def shape(self) -> str:
        """Text for the result row."""
        rows, columns = self.size
        count = 3 * self.draws * self.frames
        return f"{self.draws} x 3 sets x {self.frames} = {count} frames of {rows}x{columns}"


class Step:
    """A training step on a copy of the work's model: normalise, forward, loss, backward, SGD.

    The frames are drawn once and lie on the device; every call is one update.
    """

    def __init__(self, work: Work, variant: Variant, device: torch.device, seed: int = 0) -> None:
        layout = torch.channels_last if variant.channels_last else torch.contiguous_format
        self.model = copy.deepcopy(work.model).to(device).to(memory_format=layout).train()
        if variant.compiled:
            self.model.compile()
        self.optimizer = caffe_sgd(self.model, lr=1e-3, momentum=0.9, weight_decay=2e-4)
        self.device, self.precision = device, variant.precision
        self.transform, self.objective = FrameTransform(size=work.size), SetObjective()
        self.item = _triplets(work, device, seed)

    def __call__(self) -> Tensor:
        loss, _ = train_step(
            self.model, self.item, self.transform, self.objective, self.device, self.precision
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def gradient(self) -> Tensor:
        """Gradients of the last call, flat."""
        found = [x.grad for x in self.model.parameters() if x.grad is not None]
        return torch.cat([grad.flatten() for grad in found])


def _triplets(work: Work, device: torch.device, seed: int) -> SetItem:
    generator = torch.Generator().manual_seed(seed)
    shape = (work.draws, 3, work.frames, 3, *work.size)
    image = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    pid = torch.randint(CLASSES // 2, (work.draws, 3), generator=generator)
    pid[:, 1], pid[:, 2] = pid[:, 0], pid[:, 0] + CLASSES // 2
    return SetItem(image.to(device), pid, torch.zeros_like(pid), torch.zeros(0))


def train_rows(
    repeats: int, device: torch.device, compile: bool = False, seed: int = 0
) -> Iterator[Row]:
    """The trunk alone, then whole steps; one triplet of few frames on a CPU, 1 and 8 on CUDA.

    Args:
        repeats: timed calls of each side; at most 3 on a CPU.
        device: where to train.
        compile: also compile the step on a CPU, which takes more than a minute there.
        seed: of weights and frames.
    """
    torch.manual_seed(seed)
    cuda = device.type == "cuda"
    repeats = repeats if cuda else min(repeats, 3)
    yield trunk_row(64 if cuda else 4, repeats, device)
    model = RQEN(GoogLeNetBN(), ImageQuality(3), CLASSES)
    for draws in (1, 8) if cuda else (1,):
        yield from step_rows(Work(model, draws, 8 if cuda else 2), repeats, device, compile)


def step_rows(
    work: Work, repeats: int, device: torch.device, compile: bool = False
) -> Iterator[Row]:
    """Layouts, then precisions (CUDA), then compilation (CUDA, or asked for)."""
    cuda = device.type == "cuda"
    plain, last = Variant(), Variant(channels_last=True)
    limit = 1e-2 if cuda else 1e-3  # convolutions in TF32 on CUDA
    yield step_row("step, channels_last", last, "contiguous", plain, work, repeats, device, limit)
    if cuda:
        half = Variant("bfloat16", channels_last=True)
        yield step_row("step, bfloat16", half, "float32", last, work, repeats, device, 5e-2)
    compiled = plain._replace(compiled=True)
    reason = None if cuda or compile else "takes over a minute on a CPU; ask with compile=true"
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        reason = "torch.compile needs a C compiler"
    if reason is not None:
        yield row("step, torch.compile", work.shape, "eager", f"not measured: {reason}")
    else:
        yield step_row(
            "step, torch.compile", compiled, "eager", plain, work, repeats, device, limit
        )


def step_row(
    name: str,
    variant: Variant,
    peer: str,
    other: Variant,
    work: Work,
    repeats: int,
    device: torch.device,
    limit: float,
) -> Row:
    """Compare the first loss of both variants on equal weights, then time further steps.

    Raises:
        RuntimeError: the losses differ by more than the fraction `limit`.
    """
    ours, theirs = Step(work, variant, device), Step(work, other, device)
    start = time.perf_counter()
    loss = float(ours())
    first = time.perf_counter() - start
    difference = abs(loss - float(theirs()))
    if not difference <= limit * abs(loss):
        raise RuntimeError(f"{name}: first loss {loss} differs from {peer} by {difference}")
    gap = (ours.gradient() - theirs.gradient()).norm() / theirs.gradient().norm()
    note = f"differences: of the first loss {difference:.1e}, of its gradient {gap:.1e} (relative)"
    if variant.compiled:
        note += f"; first call {first:.0f} s"
    timed = measure(ours, theirs, repeats)
    note += "".join(f"; {text}" for text in [timed.pop("note", "")] if text)
    return row(name, work.shape, peer, note) | timed | {"max_abs_diff": difference}


def trunk_row(
    frames: int,
    repeats: int,
    device: torch.device,
    size: int = SIZE,
    peer_size: int = PEER_SIZE,
) -> Row:
    """Forward and backward of our trunk and of torchvision's at about equal MACs.

    The networks differ, so there are no outputs to compare; `ratio` is of the times per GMAC.
    """
    import torchvision

    theirs = torchvision.models.googlenet(weights=None, aux_logits=False, init_weights=False)
    ours = GoogLeNetBN()
    count = {"ours": gmac(ours, size), "peer": gmac(theirs, peer_size)}
    timed = measure(
        _trunk_step(ours, frames, size, device),
        _trunk_step(theirs, frames, peer_size, device),
        repeats,
    )
    cost = {side: timed[f"{side}_ms"] / frames / count[side] for side in count}
    sides = {
        "ours": f"ours at {size}",
        "peer": f"torchvision {torchvision.__version__} at {peer_size}",
    }
    texts = [
        f"{text}: {count[side]:.3f} GMAC a frame, {cost[side]:.3g} ms per GMAC, "
        f"{1e3 * frames / timed[f'{side}_ms']:.3g} frames/s"
        for side, text in sides.items()
    ]
    note = "; ".join(["ratio of ms per forward GMAC", *texts, "other weights: no difference"])
    shape = f"{frames} frames, forward and backward"
    ratio = {"ratio": cost["peer"] / cost["ours"], "note": note}
    return row("trunk step", shape, "torchvision googlenet") | timed | ratio


def gmac(model: nn.Module, size: int) -> float:
    """Multiply-accumulates of one square frame, forward, in 10^9; two FLOPs each."""
    model.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, size, size))
    return counter.get_total_flops() / 2e9


def _trunk_step(
    model: nn.Module, frames: int, size: int, device: torch.device
) -> Callable[[], None]:
    model.to(device).train()
    image_BCHW = torch.rand(frames, 3, size, size, device=device)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        out = model(image_BCHW)
        (out if isinstance(out, Tensor) else out.map_BCHW).mean().backward()

    return run
