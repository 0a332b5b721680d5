"""Training faces by draw number, and images by row for features.

A training draw is a function of (seed, draw number) alone: whoever asks for draw 17 gets the same
image, on any rank, in any worker and after any restart. The sampler yields draw numbers; the data
set is endless (`len` is 2**62), so it needs `shuffle=False`.

Letters: N images of the set, C classes, H rows, W columns.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from common.log import InputError, get_logger
from face_lfr.data.face_data import FaceData, Images
from face_lfr.data.transforms import FaceTransform, read_rgb

ENDLESS = 2**62
TRIES = 10
ORDER = 2**20  # keeps the permutations apart from the draws: no draw is tried so often
SLOTS = 1024
POOL = 16  # blocks that are mixed with one another
SHARED_MEMORY = Path("/dev/shm")


class FaceItem(NamedTuple):
    """One training image: uint8 (3, H, W) and its class."""

    image: Tensor
    label: int


class RowItem(NamedTuple):
    """One image for its features: uint8 (3, H, W) and its row."""

    image: Tensor
    row: int


class Order(Protocol):
    """Which row a draw takes."""

    def row(self, number: int) -> int: ...


class Shuffled:
    """Epoch e is draws e * N to (e + 1) * N - 1: every row once, in an order of (seed, e)."""

    def __init__(self, length: int, seed: int):
        self.length, self.seed = length, seed
        self._rows: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def row(self, number: int) -> int:
        """Row of a draw."""
        epoch, place = divmod(number, self.length)
        if self._rows[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch, ORDER])
            rows = np.arange(self.length, dtype=np.int32 if self.length < 2**31 else np.int64)
            rng.shuffle(rows)
            self._rows = (epoch, rows)
        return int(self._rows[1][place])


class Blocks:
    """As `Shuffled`, but nearly sequential: for disks that seek slowly.

    Rows lie in blocks of neighbours. An epoch takes the blocks in random order, `POOL` of them at
    a time, whose rows it mixes. In files sorted by identity a batch then holds fewer identities.
    """

    def __init__(self, length: int, seed: int, block: int):
        self.length, self.seed, self.block = length, seed, block
        self._epoch, self._order, self._ends = -1, np.empty(0, np.int64), np.empty(0, np.int64)
        self._pool: tuple[int, int, np.ndarray] = (-1, -1, np.empty(0, np.int64))

    def row(self, number: int) -> int:
        """Row of a draw."""
        epoch, place = divmod(number, self.length)
        if self._epoch != epoch:
            count = -(-self.length // self.block)
            self._order = np.random.default_rng([self.seed, epoch, ORDER]).permutation(count)
            sizes = np.minimum(self.block, self.length - self._order * self.block)
            self._epoch, self._ends = epoch, np.cumsum(sizes)
        pool = int(np.searchsorted(self._ends, place, side="right")) // POOL
        start = int(self._ends[pool * POOL - 1]) if pool else 0
        if self._pool[:2] != (epoch, pool):
            firsts = self._order[pool * POOL : (pool + 1) * POOL] * self.block
            spans = [range(k, min(k + self.block, self.length)) for k in firsts.tolist()]
            rng = np.random.default_rng([self.seed, epoch, ORDER, pool + 1])
            self._pool = (epoch, pool, rng.permutation(np.concatenate(spans)))
        return int(self._pool[2][place - start])


class Balanced:
    """Every class equally often: a round takes each class with images once, in random order.

    The image of the class is drawn with replacement.
    """

    def __init__(self, labels_N: np.ndarray, seed: int):
        self.seed = seed
        self._by_class = np.argsort(labels_N, kind="stable")
        counts = np.bincount(labels_N)
        filled = counts > 0
        self._counts, self._starts = counts[filled], (np.cumsum(counts) - counts)[filled]
        self._classes = Shuffled(len(self._counts), seed)

    def row(self, number: int) -> int:
        """Row of a draw."""
        entry = self._classes.row(number)
        rng = np.random.default_rng([self.seed, number, ORDER + 1])
        return int(self._by_class[self._starts[entry] + rng.integers(self._counts[entry])])


class FaceDraws(Dataset[FaceItem]):
    """Random faces of a training set.

    An image that cannot be read is replaced by another, drawn from (seed, draw number, attempt).

    Args:
        data: the set; its `labels_N` are the labels.
        transform: of the images.
        seed: of order and augmentation; any non-negative number.
        max_bad_items: unreadable images that are replaced before training stops, counted over all
            workers of this process. Each is logged.
        cache: keep the decoded images in shared memory, 3 * size**2 bytes each; one copy for all
            workers of this process. For small sets.
        balanced: draw every class equally often.
        block: rows of a block that is read at once, for slow disks; 0 shuffles rows.

    Raises:
        ValueError: a negative number, or both balanced and block.
        InputError: there is no image, or too little shared memory.
    """

    def __init__(
        self,
        data: FaceData,
        transform: FaceTransform,
        seed: int = 0,
        max_bad_items: int = 0,
        cache: bool = False,
        balanced: bool = False,
        block: int = 0,
    ):
        if min(seed, max_bad_items, block) < 0:
            numbers = f"seed={seed}, max_bad_items={max_bad_items}, block={block}"
            raise ValueError(f"{numbers} must not be negative")
        if balanced and block:
            raise ValueError(f"balanced=True draws from everywhere, block={block} does not")
        if not len(data.labels_N):
            raise InputError(data.root, "has no image")
        self.data, self.transform, self.seed = data, transform, int(seed)
        self.max_bad_items = int(max_bad_items)
        # A slot for each worker: additions of several processes to one number would be lost.
        self._bad = torch.zeros(SLOTS, dtype=torch.int64).share_memory_()
        self._cache = _Cache(data.epoch_length, transform.size) if cache else None
        self.order = self._order(balanced, int(block))

    def _order(self, balanced: bool, block: int) -> Order:
        if balanced:
            return Balanced(self.data.labels_N, self.seed)
        if block:
            return Blocks(self.epoch_length, self.seed, block)
        return Shuffled(self.epoch_length, self.seed)

    def __len__(self) -> int:
        return ENDLESS

    @property
    def epoch_length(self) -> int:
        """Draws of an epoch: the number of images."""
        return self.data.epoch_length

    @property
    def bad_items(self) -> int:
        """Images replaced so far because they could not be read, over all workers."""
        return int(self._bad.sum())

    def row(self, number: int) -> int:
        """Row of the set that draw `number` takes when it can be read."""
        return self.order.row(number)

    def __getitem__(self, number: int) -> FaceItem:
        if number < 0:
            raise IndexError(number)
        row, rng = self.row(number), np.random.default_rng([self.seed, number])
        for attempt in range(1, TRIES + 1):
            try:
                image_HWC = self._image(row)
                label = int(self.data.labels_N[row])
                return FaceItem(self.transform.train(image_HWC, rng), label)
            except InputError as error:
                self._count_bad(error)
                last = error
            rng = np.random.default_rng([self.seed, number, attempt])
            row = int(rng.integers(self.epoch_length))
        raise InputError(f"draw {number}", f"met {TRIES} unreadable images, at last", last)

    def _image(self, row: int) -> np.ndarray:
        if self._cache is None:
            return self.data.images.read(row)
        image_HWC = self._cache.get(row)
        if image_HWC is None:
            image_HWC = self.transform.fit(self.data.images.read(row))
            self._cache.put(row, image_HWC)
        return image_HWC

    def _count_bad(self, error: InputError) -> None:
        worker = get_worker_info()
        self._bad[0 if worker is None else 1 + worker.id % (SLOTS - 1)] += 1
        if self.bad_items > self.max_bad_items:
            raise error
        get_logger(__name__).warning(
            "image replaced (%d of at most %d): %s", self.bad_items, self.max_bad_items, error
        )


class _Cache:
    """Images of one size that all workers of a process share."""

    def __init__(self, length: int, size: int):
        needed = length * (3 * size * size + 1)
        if SHARED_MEMORY.is_dir() and needed > shutil.disk_usage(SHARED_MEMORY).free:
            what = f"{length} images need more shared memory than {SHARED_MEMORY} has, in MiB"
            raise InputError("draws.cache", what, needed >> 20)
        self.image_NHWC = torch.empty((length, size, size, 3), dtype=torch.uint8).share_memory_()
        self.filled_N = torch.zeros(length, dtype=torch.bool).share_memory_()

    def get(self, row: int) -> np.ndarray | None:
        """The image, not to be changed; None when nobody has put it there."""
        return self.image_NHWC[row].numpy() if self.filled_N[row] else None

    def put(self, row: int, image_HWC: np.ndarray) -> None:
        """Keep an image; two workers that do so at once write the same bytes."""
        self.image_NHWC[row] = torch.from_numpy(image_HWC)
        self.filled_N[row] = True


class ImageRows(Dataset[RowItem]):
    """Every image once, in order, as it is: for features.

    Args:
        images: paths, or the images of a `FaceData`.
        transform: of the images.

    Raises:
        InputError: from an item: its image cannot be read.
    """

    def __init__(self, images: Sequence[Path | str] | Images, transform: FaceTransform):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> RowItem:
        if not 0 <= row < len(self):
            raise IndexError(row)
        # A sequence of paths has no `read`.
        read = getattr(self.images, "read", None)
        image_HWC = read_rgb(self.images[row]) if read is None else read(row)  # type: ignore[index]
        return RowItem(self.transform.test(image_HWC), row)
