"""What a video data set consists of, and what reading and sampling must offer.

Shapes: K classes, F frames of a video, n frames asked for, H rows, W columns, C channels.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor


class Video(NamedTuple):
    """One entry of a list.

    `id` as in the list, unique within a split; `path` of the video file or of the folder of its
    frames; `frames` the number the list states, None when it states none; `labels` 0-based, ()
    only in sets without labels.
    """

    id: str
    path: Path
    frames: int | None
    labels: tuple[int, ...]


class Clip(Protocol):
    """An opened video; `frames` is what the decoder or the folder says."""

    frames: int

    def read(self, index: np.ndarray) -> np.ndarray:
        """Frames `index` (0-based, any order, repeats allowed) as (n, H, W, C) uint8.

        C = 3 in the order R, G, B, or C = 2 (x, y) for flow.
        """
        ...


class Reader(Protocol):
    """How the frames of a video are read."""

    def open(self, video: Video) -> AbstractContextManager[Clip]:
        """Open a video for the length of a `with` block."""
        ...


class Sampler(Protocol):
    """Which frames of a video make a clip; positions are 0-based."""

    @property
    def length(self) -> int:
        """Consecutive frames of one position."""
        ...

    def train(self, frames: int, rng: np.random.Generator) -> np.ndarray:
        """Positions of one random clip, (count * length,)."""
        ...

    def test(self, frames: int, clips: int = 1) -> np.ndarray:
        """Positions of the test clips, (clips, count * length)."""
        ...


@dataclass(frozen=True)
class VideoData:
    """A data set: its videos, and how clips are read and sampled from them.

    Attributes:
        name: "mmit", "kinetics400", ...
        root: folder of the set.
        classes: K names in label order.
        multi_label: whether a video may have several labels.
        train: videos with labels.
        test: videos of the evaluation split.
        reader: how frames are read.
        sampler: which frames make a clip.
        skipped: reason -> number of videos that the loader left out.
    """

    name: str
    root: Path
    classes: tuple[str, ...]
    multi_label: bool
    train: list[Video]
    test: list[Video]
    reader: Reader
    sampler: Sampler
    skipped: dict[str, int] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.classes)

    def target(self, video: Video) -> Tensor:
        """Multi-hot (K,) float32; one-hot in sets with one label a video."""
        target_K = torch.zeros(self.num_classes)
        target_K[list(video.labels)] = 1.0
        return target_K

    def class_counts(self) -> Tensor:
        """Training videos of each class, (K,) int64."""
        labels = [label for video in self.train for label in video.labels]
        return torch.bincount(torch.tensor(labels, dtype=torch.int64), minlength=self.num_classes)
