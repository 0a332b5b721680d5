"""Speed of extraction, from image files to set vectors.

The group `infer` of `python -m reid_rqen.benchmarks`: batches filled with the frames of many
tracklets and a streamed sum (`reid_rqen.engine.extract`) against one forward pass a tracklet.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import numpy as np
import torch

from common.dist import World
from reid_rqen.benchmarks.peer_extract import vectors_one_by_one
from reid_rqen.benchmarks.results import Row, measure, row
from reid_rqen.data.replicas import write_image
from reid_rqen.data.synthetic import load_synthetic
from reid_rqen.data.tracklet import Tracklet
from reid_rqen.data.transforms import FrameTransform
from reid_rqen.engine import Extraction, extract
from reid_rqen.models.googlenet_bn import GoogLeNetBN
from reid_rqen.models.quality import ImageQuality, TinyQuality
from reid_rqen.models.rqen import RQEN
from reid_rqen.models.tiny import TinyTrunk

Result = TypeVar("Result")
LENGTHS = (2, 6, 3, 1, 4, 2, 5, 1)  # frames: tracklets of real sets are uneven
LIMITS = {"float32": 1e-4, "bfloat16": 3e-2}


def infer_rows(repeats: int, device: torch.device, seed: int = 0) -> Iterator[Row]:
    """The tiny model on the synthetic task, then the paper's network on 256x128 frames.

    Args:
        repeats: timed calls of each side; at most 3 of the paper's network on a CPU.
        device: where the model runs.
        seed: of weights and images.
    """
    torch.manual_seed(seed)
    cuda = device.type == "cuda"
    with TemporaryDirectory() as folder:
        tiny = RQEN(TinyTrunk(), TinyQuality(3), auxiliary=False)
        transform = FrameTransform(size=(56, 28), mean=(127.5, 127.5, 127.5), scale=1 / 127.5)
        tracklets = synthetic_tracklets(Path(folder) / "synth", 120 if cuda else 16, seed)
        yield extract_row("extract, tiny", tiny, tracklets, transform, repeats, device)
        paper = RQEN(GoogLeNetBN(), ImageQuality(3))
        tracklets = replica_tracklets(Path(folder) / "replica", LENGTHS, seed)
        tracklets = tracklets * (64 if cuda else 1)
        repeats = repeats if cuda else min(repeats, 3)
        for precision in ("float32", "bfloat16") if cuda else ("float32",):
            yield extract_row(
                f"extract, GoogLeNet-BN {precision}", paper, tracklets, FrameTransform(),
                repeats, device, precision,
            )  # fmt: skip


def extract_row(
    name: str,
    model: RQEN,
    tracklets: Sequence[Tracklet],
    transform: FrameTransform,
    repeats: int,
    device: torch.device,
    precision: str = "float32",
) -> Row:
    """Compare the vectors of both ways, then time them; decoding is part of both.

    Raises:
        RuntimeError: an entry of a unit vector differs by more than `LIMITS` allows.
    """
    model.to(device)
    # Ours as `load_trained` hands it out, the peer as it was built.
    fast = copy.deepcopy(model).to(memory_format=torch.channels_last)
    workers = 4 if device.type == "cuda" else 0
    how = Extraction(transform, World(0, 1, device), workers=workers, precision=precision)
    ours = partial(_quiet, lambda: extract(fast, list(tracklets), how).vector)
    peer = partial(vectors_one_by_one, model, tracklets, transform, device, workers, precision)
    difference = float((ours() - peer()).abs().max())
    if not difference <= LIMITS[precision]:
        raise RuntimeError(f"{name} differs from one tracklet at a time by {difference}")
    frames = sum(len(tracklet.frames) for tracklet in tracklets)
    timed = measure(ours, peer, repeats)
    rate = {side: 1e3 * frames / timed[f"{side}_ms"] for side in ("ours", "peer")}
    note = f"{rate['ours']:.4g} against {rate['peer']:.4g} frames/s"
    note += "".join(f"; {text}" for text in [timed.pop("note", "")] if text)
    shape = f"{len(tracklets)} tracklets, {frames} frames"
    found = row(name, shape, "one tracklet a batch", note)
    return found | timed | {"max_abs_diff": difference}


def synthetic_tracklets(root: Path, identities: int, seed: int) -> list[Tracklet]:
    """Query and gallery of a synthetic set that is generated in `root`."""
    data = _quiet(partial(load_synthetic, root, seed, identities=identities))
    return [*data.query, *data.gallery]


def replica_tracklets(root: Path, lengths: Sequence[int], seed: int) -> list[Tracklet]:
    """Tracklets of 256x128 JPEG images that are written to `root`."""
    rng = np.random.default_rng(seed)
    tracklets = []
    for pid, length in enumerate(lengths):
        paths = tuple(root / str(pid) / f"{number}.jpg" for number in range(length))
        for path in paths:
            write_image(path, pid, 1, rng)
        tracklets.append(Tracklet(paths, pid, 1))
    return tracklets


def _quiet(call: Callable[[], Result]) -> Result:
    """Call without the progress bars: dozens of calls would fill the terminal."""
    with redirect_stderr(io.StringIO()):
        return call()
