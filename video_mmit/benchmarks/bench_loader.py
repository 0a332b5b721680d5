"""Speed of reading clips, and of training with what is read.

The group `read` of `python -m video_mmit.benchmarks`: one batched read of sorted positions without
repeats, as `video_mmit.data.video` reads, against one call of decord a frame as X-Temporal reads;
decord against OpenCV and PyAV; key frames close together against a single one. Every reader decodes
on one thread. Codings that cannot be written here (H.264 needs PyAV) are rows without times.

The group `loader`: a small training with either way of reading, and with its clips in memory.

Frames are compared before they are timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from common.seed import worker_init
from video_mmit.benchmarks.bench_train import Step
from video_mmit.benchmarks.networks import Variant, recogniser
from video_mmit.benchmarks.notes import measured, rates
from video_mmit.benchmarks.peer_read import FrameByFrame
from video_mmit.benchmarks.results import Row, measure, row
from video_mmit.benchmarks.videos import (
    CODINGS,
    FRAMES,
    HEIGHT,
    WIDTH,
    as_data,
    missing,
    write_videos,
)
from video_mmit.data.clips import ClipItem, TrainClips
from video_mmit.data.sampling import Uniform
from video_mmit.data.transforms import GroupTransform
from video_mmit.data.video import FileReader
from video_mmit.data.video_data import Reader, Video

COUNT = 8  # frames of a clip
LONG_VIDEO = 300  # frames; ten seconds, as in Kinetics
DECODERS_AGREE = 3.0  # mean difference in grey levels


class Sample(NamedTuple):
    """Videos, and how many clips of each are read at once."""

    videos: list[Video]
    clips: int
    label: str

    @property
    def shape(self) -> str:
        """Text for the result row."""
        size = f"{WIDTH}x{HEIGHT}"
        what = f"{self.clips} x {COUNT} of {self.videos[0].frames} frames"
        return f"{len(self.videos)} videos, {what}, {size}, {self.label}"

    def read(self, reader: Reader) -> list[np.ndarray]:
        """The clips of every video, clip by clip, (clips * COUNT, H, W, 3)."""
        found = []
        for video in self.videos:
            with reader.open(video) as clip:
                found.append(clip.read(Uniform(COUNT).test(clip.frames, self.clips).ravel()))
        return found


def read_rows(repeats: int, quick: bool = False, seed: int = 0) -> Iterator[Row]:
    """Reading in every coding; none of it depends on the number of threads.

    Args:
        repeats: timed calls of each side.
        quick: fewer videos.
        seed: of the videos.
    """
    count = 3 if quick else 6
    with TemporaryDirectory() as folder:
        for name, coding in CODINGS.items():
            reason = missing(coding)
            if reason is not None:
                yield row("read", coding.label, "frame by frame", f"not measured: {reason}")
                continue
            videos = write_videos(Path(folder) / name, coding, count, seed)
            for clips in (1, 10):
                yield from reader_rows(Sample(videos, clips, coding.label), repeats)
        if not any(missing(CODINGS[name]) for name in ("short", "long")):
            for frames in (FRAMES, LONG_VIDEO):
                yield coding_row(Path(folder) / str(frames), frames, count, repeats, seed)


def reader_rows(sample: Sample, repeats: int) -> Iterator[Row]:
    """Our decord reader against a call for every frame, OpenCV and PyAV.

    Raises:
        RuntimeError: the frames differ (between decoders: by more than rounding).
    """
    ours = partial(sample.read, FileReader())
    frames = ours()
    peers: dict[str, Reader] = {
        "decord, frame by frame": FrameByFrame(),
        "OpenCV": FileReader("opencv"),
    }
    if find_spec("av") is None:
        yield row("read, decord", sample.shape, "PyAV", "not measured: PyAV is not installed")
    else:
        peers["PyAV"] = FileReader("pyav")
    for peer, reader in peers.items():
        theirs = partial(sample.read, reader)
        limit = DECODERS_AGREE if isinstance(reader, FileReader) else 0.0
        difference = greatest_difference(frames, theirs(), limit)
        timed = measure(ours, theirs, repeats)
        note = rates(timed, len(sample.videos) * sample.clips, "clips")
        yield measured("read, decord", sample.shape, peer, timed, difference, note)


def greatest_difference(ours: list[np.ndarray], peer: list[np.ndarray], mean: float) -> float:
    """Greatest difference of frames in grey levels.

    Raises:
        RuntimeError: the mean difference in a video is more than `mean`.
    """
    gaps = [np.abs(a.astype(np.int16) - b) for a, b in zip(ours, peer, strict=True)]
    worst = max(float(gap.mean()) for gap in gaps)
    if worst > mean:
        raise RuntimeError(f"frames differ by {worst} grey levels on average, more than {mean}")
    return max(float(gap.max()) for gap in gaps)


def coding_row(folder: Path, frames: int, count: int, repeats: int, seed: int) -> Row:
    """The same videos with key frames close together, and with one; both read by decord."""
    reader = FileReader()
    short, long = (
        Sample(write_videos(folder / name, CODINGS[name], count, seed, frames), 1, "H.264")
        for name in ("short", "long")
    )
    pairs = zip(short.read(reader), long.read(reader), strict=True)
    gap = np.mean([np.abs(a.astype(np.int16) - b).mean() for a, b in pairs])
    timed = measure(partial(short.read, reader), partial(long.read, reader), repeats)
    clips = rates(timed, len(short.videos), "clips")
    note = f"coded twice, so the frames differ by {gap:.1f} grey levels on average"
    name, peer = "read, decord, key frame every 8", "one key frame"
    return measured(name, short.shape, peer, timed, None, clips, note)


class Feed:
    """A loader of training clips that starts anew, workers included, for every call."""

    def __init__(self, dataset: TrainClips, batch: int, batches: int, workers: int) -> None:
        self.dataset, self.batch, self.batches, self.workers = dataset, batch, batches, workers

    def __iter__(self) -> Iterator[ClipItem]:
        return iter(
            DataLoader(
                self.dataset,
                batch_size=self.batch,
                sampler=range(self.batch * self.batches),
                num_workers=self.workers,
                worker_init_fn=worker_init,
                pin_memory=torch.cuda.is_available(),
                generator=torch.Generator(),
            )
        )

    def load(self) -> int:
        """Read everything; returns the number of clips."""
        return sum(len(item.image) for item in self)

    def train(self, step: Step) -> None:
        """A step with every batch."""
        for item in self:
            step(item)


def loader_rows(
    repeats: int, device: torch.device, quick: bool = False, seed: int = 0
) -> Iterator[Row]:
    """The loader alone, then with training steps of a TSN-R18; the peer reads frame by frame.

    Then training from files against the same steps on clips in memory: a ratio of 1 says that the
    network never waits. Workers are as many as threads, or none for a single thread.

    Args:
        repeats: timed calls of each side.
        device: where the network trains.
        quick: fewer videos and clips.
        seed: of videos, draws and weights.

    Raises:
        RuntimeError: the loaders' clips differ.
    """
    coding = CODINGS["mp4v" if missing(CODINGS["long"]) else "long"]
    with TemporaryDirectory() as folder:
        videos = write_videos(Path(folder), coding, 3 if quick else 6, seed)
        yield from training_rows(videos, coding.label, repeats, device, quick, seed)


def training_rows(
    videos: list[Video], label: str, repeats: int, device: torch.device, quick: bool, seed: int
) -> Iterator[Row]:
    """The rows of `loader_rows` on these videos."""
    batch, batches = (4, 2) if quick else (8, 2)
    threads = torch.get_num_threads()
    workers = min(threads, 16) if threads > 1 else 0
    ours, peer = (
        Feed(_clips(videos, reader, seed), batch, batches, workers)
        for reader in (FileReader(), FrameByFrame())
    )
    kept = list(ours)
    pairs = zip(kept, peer, strict=True)
    difference = float(max((a.image.int() - b.image).abs().max() for a, b in pairs))
    if difference:
        raise RuntimeError(f"the loaders differ by {difference} grey levels")
    step = Step(recogniser("TSN", 18, COUNT, seed), kept[0], Variant(), device)

    def from_memory() -> None:
        for item in kept:
            step(item)

    step()
    shape = f"{batches} x {batch} clips of {COUNT} frames, 112x112, {label}, {workers} workers"
    train, theirs = partial(ours.train, step), partial(peer.train, step)
    calls: list[tuple[str, str, Callable[[], Any], Callable[[], Any]]] = [
        ("load", "decord, frame by frame", ours.load, peer.load),
        ("load and train TSN-R18", "decord, frame by frame", train, theirs),
        ("load and train TSN-R18", "clips in memory", train, from_memory),
    ]
    for name, against, call, other in calls:
        timed = measure(call, other, repeats)
        note = rates(timed, batch * batches, "clips")
        yield measured(name, shape, against, timed, difference, note)


def _clips(videos: list[Video], reader: Reader, seed: int) -> TrainClips:
    return TrainClips(as_data(videos, reader, COUNT), GroupTransform(112, 128), seed)
