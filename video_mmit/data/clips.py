"""Training clips by draw number, and the views of a test.

A training draw is a function of (seed, draw number) alone: whoever asks for draw 17 gets the same
clip, on any rank, in any worker and after any restart. Epoch e consists of draws e * len to
(e + 1) * len - 1, every video once, in the order of a permutation that depends on (seed, e). The
sampler yields draw numbers; the data set is endless (`len` is 2**62), so it needs `shuffle=False`.

Shapes: T frame positions, V views (crops x clips), C channels, H rows, W columns, K classes, F
frames of a video.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from common.log import InputError, get_logger
from video_mmit.data.transforms import GroupTransform
from video_mmit.data.video_data import Clip, Sampler, Video, VideoData

ENDLESS = 2**62
TRIES = 10
ORDER = 2**20  # keeps the permutations apart from the draws: no draw is tried so often
SLOTS = 1024


class ClipItem(NamedTuple):
    """One training clip: `image` uint8 (T, C, H, W), `target` float32 (K,)."""

    image: Tensor
    target: Tensor


class ViewItem(NamedTuple):
    """All views of one video: `image` uint8 (V, T, C, H, W), `target` (K,), `row` of the list.

    The views are ordered by crop, then by clip.
    """

    image: Tensor
    target: Tensor
    row: int


class TrainClips(Dataset[ClipItem]):
    """Random clips of the training videos.

    A video that cannot be read is replaced by another, drawn from (seed, draw number, attempt).
    The listed number of frames only serves to count differences: the decoder's is used.

    Args:
        data: whose `train` list, reader and sampler are used.
        transform: of the clips.
        seed: of order, sampling and augmentation; any non-negative number.
        max_bad_items: unreadable videos that are replaced before training stops, counted over all
            workers of this process. Each is logged.
        cache: keep the decoded videos in memory, whole; for small sets (one copy per worker).

    Raises:
        ValueError: a negative number; `length` differs between sampler and transform.
        InputError: there is no training video.
    """

    def __init__(
        self,
        data: VideoData,
        transform: GroupTransform,
        seed: int = 0,
        max_bad_items: int = 0,
        cache: bool = False,
    ):
        if seed < 0 or max_bad_items < 0:
            raise ValueError(f"seed={seed} and max_bad_items={max_bad_items} must not be negative")
        _check(data.train, "train", data.sampler, transform)
        self.data, self.transform, self.seed = data, transform, int(seed)
        self.max_bad_items = int(max_bad_items)
        self.cache: dict[int, np.ndarray] | None = {} if cache else None
        # A slot for each worker: additions of several processes to one number would be lost.
        self._bad = torch.zeros(SLOTS, dtype=torch.int64).share_memory_()
        self._mismatched = _flags(data.train)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        return ENDLESS

    @property
    def epoch_length(self) -> int:
        """Draws of an epoch: the number of training videos."""
        return len(self.data.train)

    @property
    def bad_items(self) -> int:
        """Videos replaced so far because they could not be read, over all workers."""
        return int(self._bad.sum())

    @property
    def mismatched(self) -> int:
        """Videos met so far whose list states another number of frames than the decoder."""
        return int(self._mismatched.sum())

    def row(self, number: int) -> int:
        """Row of the training list that draw `number` takes when it can be read."""
        epoch, place = divmod(number, self.epoch_length)
        if self._order[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch, ORDER])
            self._order = (epoch, rng.permutation(self.epoch_length))
        return int(self._order[1][place])

    def __getitem__(self, number: int) -> ClipItem:
        if number < 0:
            raise IndexError(number)
        row, rng = self.row(number), np.random.default_rng([self.seed, number])
        for attempt in range(1, TRIES + 1):
            try:
                return self._load(row, rng)
            except InputError as error:
                self._count_bad(error)
                last = error
            rng = np.random.default_rng([self.seed, number, attempt])
            row = int(rng.integers(self.epoch_length))
        raise InputError(f"draw {number}", f"met {TRIES} unreadable videos, at last", last)

    def _load(self, row: int, rng: np.random.Generator) -> ClipItem:
        video = self.data.train[row]
        if self.cache is None:
            with self.data.reader.open(video) as clip:
                _compare(video, clip, self._mismatched, row)
                frames_FHWC = clip.read(self.data.sampler.train(clip.frames, rng))
        else:
            whole_FHWC = self._whole(row)
            frames_FHWC = whole_FHWC[self.data.sampler.train(len(whole_FHWC), rng)]
        return ClipItem(self.transform.train(frames_FHWC, rng), self.data.target(video))

    def _whole(self, row: int) -> np.ndarray:
        assert self.cache is not None
        if row not in self.cache:
            video = self.data.train[row]
            with self.data.reader.open(video) as clip:
                _compare(video, clip, self._mismatched, row)
                self.cache[row] = clip.read(np.arange(clip.frames))
        return self.cache[row]

    def _count_bad(self, error: InputError) -> None:
        worker = get_worker_info()
        self._bad[0 if worker is None else 1 + worker.id % (SLOTS - 1)] += 1
        if self.bad_items > self.max_bad_items:
            raise error
        get_logger(__name__).warning(
            "video replaced (%d of at most %d): %s", self.bad_items, self.max_bad_items, error
        )


class TestViews(Dataset[ViewItem]):
    """Every video once, as crops x clips fixed views; nothing is random.

    Args:
        videos: rows of the evaluation.
        data: whose reader, sampler and classes are used.
        transform: of the clips.
        crops: 1, 3, 5 or 10 crops of a frame.
        clips: clips of a video, at different times.

    Raises:
        ValueError: `length` differs between sampler and transform, or crops or clips is not
            accepted.
        InputError: there is no video; from an item: the video cannot be read.
    """

    __test__ = False  # no test class, whatever pytest makes of the name

    def __init__(
        self,
        videos: Sequence[Video],
        data: VideoData,
        transform: GroupTransform,
        crops: int = 1,
        clips: int = 1,
    ):
        if clips < 1:
            raise ValueError(f"clips={clips} must be at least 1")
        transform.check_crops(crops)
        _check(videos, "test", data.sampler, transform)
        self.videos, self.data, self.transform = list(videos), data, transform
        self.crops, self.clips = int(crops), int(clips)
        self._mismatched = _flags(self.videos)

    def __len__(self) -> int:
        return len(self.videos)

    @property
    def mismatched(self) -> int:
        """Videos met so far whose list states another number of frames than the decoder."""
        return int(self._mismatched.sum())

    def __getitem__(self, row: int) -> ViewItem:
        video = self.videos[row]
        with self.data.reader.open(video) as clip:
            _compare(video, clip, self._mismatched, row)
            frames_FHWC = clip.read(self.data.sampler.test(clip.frames, self.clips).ravel())
        view_VTCHW = self.transform.test(frames_FHWC, self.crops)  # all clips behind one another
        view_VTCHW = view_VTCHW.unflatten(1, (self.clips, -1)).flatten(0, 1)
        return ViewItem(view_VTCHW, self.data.target(video), row)


def _check(
    videos: Sequence[Video], split: str, sampler: Sampler, transform: GroupTransform
) -> None:
    if not videos:
        raise InputError(f"data.{split}", "has no video")
    if sampler.length != transform.length:
        lengths = f"sampler.length={sampler.length}, transform.length={transform.length}"
        raise ValueError(f"{lengths}: both must be the frames of one position")


def _flags(videos: Sequence[Video]) -> Tensor:
    return torch.zeros(len(videos), dtype=torch.bool).share_memory_()


def _compare(video: Video, clip: Clip, mismatched: Tensor, row: int) -> None:
    if video.frames is not None and video.frames != clip.frames:
        mismatched[row] = True
