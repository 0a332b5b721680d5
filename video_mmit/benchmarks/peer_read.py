"""Reading a clip as X-Temporal does: one call of decord for each position, in the order given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from video_mmit.data.video_data import Clip, Video


class FrameByFrame:
    """A reader of video files; like ours it decodes on one thread."""

    @contextmanager
    def open(self, video: Video) -> Iterator[Clip]:
        """Open a video file with decord."""
        import decord

        yield _Clip(decord.VideoReader(str(video.path), num_threads=1))


class _Clip:
    def __init__(self, reader: Any) -> None:
        self.reader, self.frames = reader, len(reader)

    def read(self, index: np.ndarray) -> np.ndarray:
        """Frames (n, H, W, 3)."""
        return np.stack([self.reader[int(position)].asnumpy() for position in index])
