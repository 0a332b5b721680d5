"""Speed of inference: of the networks, and of a test with thirty views of a video.

The group `infer` of `python -m video_mmit.benchmarks`. TIN and R(2+1)D meet torchvision's R(2+1)D,
another network with other weights, so that the ratio is of the times per multiply-accumulate.

Letters: N videos, T frame positions, C channels, H W size, K classes.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.dist import World
from video_mmit.benchmarks.networks import (
    CLASSES,
    Variant,
    gmac,
    no_compiler,
    placed,
    recogniser,
    twins,
    variants,
)
from video_mmit.benchmarks.notes import measured, rates
from video_mmit.benchmarks.peer_views import scores_by_view
from video_mmit.benchmarks.results import Row, measure, row
from video_mmit.benchmarks.videos import CODINGS, as_data, write_videos
from video_mmit.data.transforms import GroupTransform
from video_mmit.data.video import FileReader
from video_mmit.engine import Views, autocast, score_videos
from video_mmit.models.r2plus1d import R2Plus1D

LIMITS = {"float32": 1e-4, "bfloat16": 3e-2}  # of a logit, relative to the greatest
CROPS, CLIPS = 3, 10

Call = Callable[[], Tensor]


class Work(NamedTuple):
    """Clips of noise that go through a network at once."""

    clips: int
    frames: int
    size: int
    seed: int = 0

    @property
    def text(self) -> str:
        """For the result row."""
        return f"{self.clips} x {self.frames} frames of {self.size}x{self.size}"

    def x(self) -> Tensor:
        """(N, T, 3, H, W)."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.clips, self.frames, 3, self.size, self.size)
        return torch.randn(shape, generator=generator)


class Forward:
    """Logits of a batch that lies on the device."""

    def __init__(self, net: nn.Module, x: Tensor, variant: Variant, device: torch.device) -> None:
        self.net = placed(net, variant, device).eval()
        self.x, self.device, self.precision = x.to(device), device, variant.precision

    def __call__(self) -> Tensor:
        with torch.inference_mode(), autocast(self.device, self.precision):
            found: Tensor = self.net(self.x)
        return found.float()


def infer_rows(
    repeats: int,
    device: torch.device,
    compile: bool = False,
    quick: bool = False,
    seed: int = 0,
) -> Iterator[Row]:
    """Forward passes in every variant of the device, then thirty views of a video.

    Args:
        repeats: timed calls of each side; at least 20 of a forward pass on CUDA.
        device: where the networks run.
        compile: also compile on a CPU, which takes minutes there.
        quick: smaller pictures on a CPU.
        seed: of weights, clips and video.
    """
    cuda = device.type == "cuda"
    clips, small = (8 if cuda else 1), quick and not cuda
    frame = Work(clips, 8, 112 if small else 224, seed)
    volume = Work(clips, 16, 56 if small else 112, seed)
    often = max(repeats, 20) if cuda else repeats
    for variant in variants(device, compile, quick):
        reason = no_compiler() if variant.compiled else None
        if reason is not None:
            shape = f"{frame.text}, {variant.label}"
            yield row("inference, TIN-R50", shape, "TSN-R50", f"not measured: {reason}")
            continue
        yield tsn_row(50, frame, variant, often, device)
        if variant.compiled:
            yield compiled_row(50, frame, variant, often, device)
            continue
        tin, split = recogniser("TIN", 50, 8, seed), R2Plus1D(CLASSES, 18, max_pool=False)
        yield volume_row("TIN-R50", tin, frame, volume, variant, often, device)
        yield volume_row("R(2+1)D-18", split, volume, volume, variant, often, device)
    yield views_row(50 if cuda else 18, 224 if cuda else 112, repeats, device, seed)


def tsn_row(depth: int, work: Work, variant: Variant, repeats: int, device: torch.device) -> Row:
    """TIN against TSN, after a TIN with offset 0 and weight 1 gave the logits of the TSN."""
    sizes = (depth, work.frames, work.seed)
    twin, peer, fixed = twins("TIN", *sizes)
    eager = variant._replace(compiled=False)
    same, plain = (Forward(net, work.x(), eager, device) for net in (fixed, peer))
    difference = agreement(f"{twin} and its TIN", same, plain, LIMITS[variant.precision])
    ours, theirs = (
        Forward(recogniser(kind, *sizes), work.x(), variant, device) for kind in ("TIN", "TSN")
    )
    ours(), theirs()
    timed = measure(ours, theirs, repeats)
    return measured(
        f"inference, TIN-R{depth}", f"{work.text}, {variant.label}", f"TSN-R{depth}",
        timed, difference,
        f"{timed['ours_ms'] / timed['peer_ms']:.3f} times the TSN",
        rates(timed, work.clips, "videos"),
    )  # fmt: skip


def compiled_row(
    depth: int, work: Work, variant: Variant, repeats: int, device: torch.device
) -> Row:
    """A compiled TIN against the same TIN in eager mode."""
    ours, peer = (
        Forward(recogniser("TIN", depth, work.frames, work.seed), work.x(), how, device)
        for how in (variant, variant._replace(compiled=False))
    )
    start = time.perf_counter()
    ours()
    first = time.perf_counter() - start
    difference = agreement("compiled TIN", ours, peer, LIMITS[variant.precision])
    timed = measure(ours, peer, repeats)
    return measured(
        f"inference, TIN-R{depth}", f"{work.text}, {variant.label}", "eager", timed, difference,
        f"first call {first:.0f} s", rates(timed, work.clips, "videos"),
    )  # fmt: skip


def volume_row(
    name: str,
    net: nn.Module,
    work: Work,
    other: Work,
    variant: Variant,
    repeats: int,
    device: torch.device,
) -> Row:
    """One of our networks against torchvision's R(2+1)D-18, per multiply-accumulate.

    Args:
        name: of our network.
        net: takes the clips of `work`.
        work: clips of ours.
        other: as many clips of the peer.
        variant: how both run.
        repeats: timed calls of each side.
        device: where both run.
    """
    from torchvision import __version__
    from torchvision.models.video import r2plus1d_18

    sides = {
        "ours": (net, work.x()),
        "peer": (r2plus1d_18(weights=None), other.x().transpose(1, 2)),
    }
    cost = {side: gmac(model, x[:1]) for side, (model, x) in sides.items()}
    ours, peer = (Forward(model, x, variant, device) for model, x in sides.values())
    ours(), peer()
    timed = measure(ours, peer, repeats)
    spent = {side: timed[f"{side}_ms"] / work.clips / cost[side] for side in sides}
    timed |= {"ratio": spent["peer"] / spent["ours"]}
    costs = [f"{side} {cost[side]:.1f} GMAC a clip, {spent[side]:.3g} ms each" for side in sides]
    return measured(
        f"inference, {name}", f"{work.text}, {variant.label}", "torchvision r2plus1d_18",
        timed, None, "ratio of the times per GMAC", *costs, rates(timed, work.clips, "videos"),
        f"peer: torchvision {__version__} at {other.text}",
    )  # fmt: skip


def views_row(depth: int, size: int, repeats: int, device: torch.device, seed: int) -> Row:
    """Thirty views of a file: read once, in batches, against a clip and then a view at a time."""
    variant = Variant("bfloat16" if device.type == "cuda" else "float32", channels_last=True)
    net = placed(recogniser("TIN", depth, 8, seed), variant, device).eval()
    with TemporaryDirectory() as folder:
        videos = write_videos(Path(folder), CODINGS["mp4v"], 1, seed)
        data = as_data(videos, FileReader())
        how = Views(
            GroupTransform(size, size * 8 // 7), World(0, 1, device), CROPS, CLIPS,
            precision=variant.precision,
        )  # fmt: skip
        ours = partial(_quiet, partial(score_videos, net, videos, data, how))
        peer = partial(scores_by_view, net, videos, data, how)
        difference = agreement("30 views", ours, peer, LIMITS[variant.precision])
        timed = measure(ours, peer, repeats)
    shape = f"{CROPS} crops x {CLIPS} clips x 8 frames of {size}x{size}, {variant.label}"
    note = f"{rates(timed, 1, 'videos')}, reading included"
    name = f"30 views, TIN-R{depth}"
    return measured(name, shape, "one view at a time", timed, difference, note)


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


def _quiet(call: Callable[[], object]) -> Tensor:
    """Scores of a call without its progress bar: dozens of them would fill the terminal."""
    with redirect_stderr(io.StringIO()):
        scores = call().scores  # type: ignore[attr-defined]
    return torch.from_numpy(scores)
