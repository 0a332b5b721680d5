"""Training images by draw number, and images by row for a test.

A training draw is a function of (seed, draw number) alone: whoever asks for draw 17 gets the same
image with the same boxes, on any rank, in any worker and after any restart. The sampler yields
draw numbers; the data set is endless (`len` is 2**62), so it needs `shuffle=False`.

Letters: N images to draw from, H rows, W columns.
"""

import shutil
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from common.log import InputError, get_logger
from detection_tsd.data.class_aware import ClassAware
from detection_tsd.data.detection_data import DetectionData, Item
from detection_tsd.data.transforms import DetectionTransform, View

ENDLESS = 2**62
TRIES = 10
STREAM = 2**20  # keeps the permutations apart from the draws: no draw is tried so often
SLOTS = 1024
SHARED_MEMORY = Path("/dev/shm")


class Order(Protocol):
    """Which entry, in 0..N-1, a draw takes.

    Attributes:
        length: draws of an epoch.
    """

    length: int

    def row(self, number: int) -> int: ...


class Shuffled:
    """Epoch e is draws e * N to (e + 1) * N - 1: every entry once, in an order of (seed, e)."""

    def __init__(self, length: int, seed: int):
        self.length, self.seed = length, seed
        self._epoch, self._order = -1, np.empty(0, np.int32)

    def row(self, number: int) -> int:
        """Entry of a draw."""
        epoch, place = divmod(number, self.length)
        if self._epoch != epoch:
            rng = np.random.default_rng([self.seed, epoch, STREAM])
            self._epoch, self._order = epoch, np.arange(self.length, dtype=np.int32)
            rng.shuffle(self._order)
        return int(self._order[place])


class Grouped:
    """As `Shuffled`, in runs of `group` draws whose images are all wide or all not.

    Each of the two kinds is filled up to whole runs by repeating the head of its order, so an
    epoch has up to 2 * (group - 1) more draws than images (mmdetection, GroupSampler).

    Args:
        wide_N: whether an image is wider than high.
        seed: of the orders.
        group: draws of a run.
    """

    def __init__(self, wide_N: np.ndarray, seed: int, group: int):
        self.seed, self.group = seed, group
        self._kinds = [np.flatnonzero(wide_N == kind).astype(np.int32) for kind in (False, True)]
        self.length = sum(-(-len(kind) // group) * group for kind in self._kinds)
        self._epoch, self._order = -1, np.empty(0, np.int32)

    def row(self, number: int) -> int:
        """Entry of a draw."""
        epoch, place = divmod(number, self.length)
        if self._epoch != epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        return int(self._order[place])

    def _shuffled(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch, STREAM])
        runs = []
        for entries in self._kinds:
            filled = -(-len(entries) // self.group) * self.group
            runs.append(np.resize(rng.permutation(entries), filled).reshape(-1, self.group))
        return rng.permutation(np.concatenate(runs)).ravel()


class DetectionDraws(Dataset[Item]):
    """Random views of the images of a training set.

    An image that cannot be read is replaced by another, drawn from (seed, draw number, attempt).

    Args:
        data: the set.
        transform: of the images.
        seed: of order and augmentation; any non-negative number.
        max_bad_items: unreadable images that are replaced before training stops, counted over all
            workers of this process. Each is logged.
        cache: keep the decoded images in shared memory, one copy for all workers of this process.
            For small sets.
        group: every run of so many draws, counted from draw 0, has images of one orientation, so
            that a batch needs little padding. `ResumableSampler` deals the draws of a step out in
            turn: give it the global batch, then the share of every rank is of one orientation.
        class_aware: draw every class equally often, see `ClassAware`.
        filter_empty: leave out images without objects.

    Raises:
        ValueError: a number is out of its range, or class_aware comes with groups.
        InputError: there is no image, or no image with an object, or too little shared memory.
    """

    def __init__(
        self,
        data: DetectionData,
        transform: DetectionTransform,
        seed: int = 0,
        max_bad_items: int = 0,
        cache: bool = False,
        group: int = 1,
        class_aware: bool = False,
        filter_empty: bool = True,
    ):
        if min(seed, max_bad_items) < 0 or group < 1:
            numbers = f"seed={seed}, max_bad_items={max_bad_items}"
            raise ValueError(f"{numbers} must not be negative, group={group} must be at least 1")
        if class_aware and group > 1:
            raise ValueError(f"class_aware=True draws from everywhere, group={group} does not")
        self.data, self.transform, self.seed = data, transform, int(seed)
        self.max_bad_items, self.group = int(max_bad_items), int(group)
        self.rows_N = _rows(data, filter_empty or class_aware)
        # A slot for each worker: additions of several processes to one number would be lost.
        self._bad = torch.zeros(SLOTS, dtype=torch.int64).share_memory_()
        self._cache = _Cache(data, self.rows_N) if cache else None
        self.order = self._order(class_aware)

    def _order(self, class_aware: bool) -> Order:
        if class_aware:
            return ClassAware(self.data.objects, self.rows_N, self.seed)
        if self.group > 1:
            sizes = np.array([self.data.images.size(int(row)) for row in self.rows_N])
            return Grouped(sizes[:, 1] > sizes[:, 0], self.seed, self.group)
        return Shuffled(len(self.rows_N), self.seed)

    def __len__(self) -> int:
        return ENDLESS

    @property
    def epoch_length(self) -> int:
        """Draws of an epoch: the number of images drawn from, more with groups."""
        return self.order.length

    @property
    def bad_items(self) -> int:
        """Images replaced so far because they could not be read, over all workers."""
        return int(self._bad.sum())

    def row(self, number: int) -> int:
        """Row of the set that draw `number` takes when it can be read."""
        return int(self.rows_N[self.order.row(number)])

    def __getitem__(self, number: int) -> Item:
        if number < 0:
            raise IndexError(number)
        row, rng = self.row(number), np.random.default_rng([self.seed, number])
        for attempt in range(1, TRIES + 1):
            try:
                return self._item(number, row, rng)
            except InputError as error:
                self._count_bad(error)
                last = error
            rng = np.random.default_rng([self.seed, number, attempt])
            row = self._other(row, rng)
        raise InputError(f"draw {number}", f"met {TRIES} unreadable images, at last", last)

    def _item(self, number: int, row: int, rng: np.random.Generator) -> Item:
        image_HWC = self._image(row)
        boxes = None if self.data.proposals is None else self.data.proposals[row]
        view = self.transform.train(image_HWC, self.data.objects.read(row), boxes, rng)
        return _item(view, row, number, image_HWC)

    def _image(self, row: int) -> np.ndarray:
        if self._cache is None:
            return read_image(self.data, row)
        image_HWC = self._cache.get(row)
        if image_HWC is None:
            image_HWC = read_image(self.data, row)
            self._cache.put(row, image_HWC)
        return image_HWC

    def _other(self, row: int, rng: np.random.Generator) -> int:
        """A random row, with groups one of the same orientation."""
        height, width = self.data.images.size(row)
        while True:
            other = int(self.rows_N[rng.integers(len(self.rows_N))])
            new_height, new_width = self.data.images.size(other)
            if self.group == 1 or (new_width > new_height) == (width > height):
                return other

    def _count_bad(self, error: InputError) -> None:
        worker = get_worker_info()
        self._bad[0 if worker is None else 1 + worker.id % (SLOTS - 1)] += 1
        if self.bad_items > self.max_bad_items:
            raise error
        get_logger(__name__).warning(
            "image replaced (%d of at most %d): %s", self.bad_items, self.max_bad_items, error
        )


def _rows(data: DetectionData, filter_empty: bool) -> np.ndarray:
    """Rows of the images to draw from."""
    rows_N = np.arange(len(data), dtype=np.int32)
    if not len(rows_N):
        raise InputError(data.root, "has no image")
    if filter_empty:
        rows_N = rows_N[[len(data.objects.labels(row)) > 0 for row in range(len(data))]]
        if not len(rows_N):
            raise InputError(data.root, "has no image with an object")
    return rows_N


def read_image(data: DetectionData, row: int) -> np.ndarray:
    """Image of a row, uint8 (H, W, 3).

    Raises:
        InputError: it cannot be read, or has another size than the set says: its boxes would be
            wrong.
    """
    image_HWC, (height, width) = data.images.read(row), data.images.size(row)
    if image_HWC.shape[:2] != (height, width):
        what = f"picture is {image_HWC.shape[1]} x {image_HWC.shape[0]}, the set says"
        raise InputError(data.images.name(row), what, f"{width} x {height}")
    return image_HWC


def _item(view: View, row: int, draw: int, image_HWC: np.ndarray) -> Item:
    original = image_HWC.shape[0], image_HWC.shape[1]
    return Item(view.image, view.target, view.proposals, row, draw, view.scale, original)


class _Cache:
    """Images of any sizes that all workers of a process share."""

    def __init__(self, data: DetectionData, rows_N: np.ndarray):
        self.size_N2 = np.zeros((len(data), 2), np.int64)
        self.size_N2[rows_N] = [data.images.size(int(row)) for row in rows_N]
        ends = np.cumsum(3 * self.size_N2.prod(axis=1))
        self.starts, needed = np.concatenate([[0], ends[:-1]]), int(ends[-1])
        if SHARED_MEMORY.is_dir() and needed > shutil.disk_usage(SHARED_MEMORY).free:
            what = f"{len(rows_N)} images need more shared memory than {SHARED_MEMORY} has, in MiB"
            raise InputError("draws.cache", what, needed >> 20)
        self.bytes = torch.empty(needed, dtype=torch.uint8).share_memory_()
        self.filled_N = torch.zeros(len(data), dtype=torch.bool).share_memory_()

    def get(self, row: int) -> np.ndarray | None:
        """The image, not to be changed; None when nobody has put it there."""
        if not self.filled_N[row]:
            return None
        height, width = (int(side) for side in self.size_N2[row])
        start = int(self.starts[row])
        return self.bytes[start : start + 3 * height * width].numpy().reshape(height, width, 3)

    def put(self, row: int, image_HWC: np.ndarray) -> None:
        """Keep an image; two workers that do so at once write the same bytes."""
        start = int(self.starts[row])
        self.bytes[start : start + image_HWC.size] = torch.from_numpy(image_HWC.reshape(-1))
        self.filled_N[row] = True


class ImageRows(Dataset[Item]):
    """Every image once, in order, for a test; its target is empty and `draw` is the row.

    Args:
        data: the set.
        transform: of the images.

    Raises:
        InputError: from an item: its image cannot be read.
    """

    def __init__(self, data: DetectionData, transform: DetectionTransform):
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> Item:
        if not 0 <= row < len(self):
            raise IndexError(row)
        image_HWC = read_image(self.data, row)
        boxes = None if self.data.proposals is None else self.data.proposals[row]
        return _item(self.transform.test(image_HWC, boxes), row, row, image_HWC)
