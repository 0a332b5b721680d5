"""Speed of aggregation: from the frames of all videos to one vector each.

The group `video` of `python -m face_lfr.benchmarks`. QAN++ of `aggregate` against a loop over a
dictionary of videos, and against rows that are multiplied and added by `index_add_`. Vectors are
compared before they are timed. On a CPU, where `evaluate` aggregates features that are mapped from
a file; here they lie in memory.

Letters: N frames of all videos, V videos, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from face_lfr.aggregate import aggregate
from face_lfr.benchmarks.peer_video import aggregate_dict, aggregate_index_add, stacked
from face_lfr.benchmarks.results import Row, measure, measured, rates

VIDEOS, QUICK_VIDEOS = 4000, 400
LONGEST = 48  # frames of a video; every length from 1 on is as likely
WIDTH = 256  # D of PolyFace
LIMIT = 1e-5  # of an entry, relative to the greatest


class Frames(NamedTuple):
    """Frames of videos in the order of the videos, as a list of files has them."""

    feature_ND: Tensor
    video_N: Tensor
    quality_N: Tensor

    @property
    def shape(self) -> str:
        """Text for the result row."""
        frames, width = self.feature_ND.shape
        return f"{int(self.video_N[-1]) + 1} videos, {frames} frames, {width} features"


def frames_of(videos: int, seed: int, longest: int = LONGEST, width: int = WIDTH) -> Frames:
    """Random features and qualities of videos of 1 to `longest` frames."""
    generator = torch.Generator().manual_seed(seed)
    count_V = torch.randint(1, longest + 1, (videos,), generator=generator)
    video_N = torch.arange(videos).repeat_interleave(count_V)
    feature_ND = torch.randn(len(video_N), width, generator=generator)
    return Frames(feature_ND, video_N, torch.randn(len(video_N), generator=generator))


def video_rows(repeats: int, quick: bool = False, seed: int = 0) -> Iterator[Row]:
    """QAN++ against each peer.

    Args:
        repeats: timed calls of each side.
        quick: fewer videos.
        seed: of features and qualities.

    Raises:
        RuntimeError: vectors differ.
    """
    frames = frames_of(QUICK_VIDEOS if quick else VIDEOS, seed)
    yield compare("dictionary of videos, NumPy", dict_loop(frames), frames, repeats)
    yield compare("index_add_", partial(aggregate_index_add, *frames), frames, repeats)


def dict_loop(frames: Frames) -> Callable[[], Tensor]:
    """The loop over videos, which know each other by name."""
    names = [f"{video:06d}" for video in frames.video_N.tolist()]
    arrays = frames.feature_ND.numpy(), frames.quality_N.numpy()
    return lambda: stacked(aggregate_dict(names, *arrays))


def compare(name: str, peer: Callable[[], Tensor], frames: Frames, repeats: int) -> Row:
    """One row.

    Raises:
        RuntimeError: vectors differ by more than `LIMIT` times the greatest entry.
    """

    def ours() -> Tensor:
        return aggregate(*frames, "qanpp").vector_VD

    theirs_VD = peer()
    difference = float((ours() - theirs_VD).abs().max())
    if not difference <= LIMIT * float(theirs_VD.abs().max()):
        raise RuntimeError(f"vectors differ from those of {name} by {difference}")
    timed = measure(ours, peer, repeats)
    note = rates(timed, len(theirs_VD), "videos")
    return measured("aggregation, QAN++", frames.shape, name, timed, difference, note)
