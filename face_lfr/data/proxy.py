"""Endless draws over a proxy set, for the two ways to train a quality network.

`ProxyDraws` gives images with the target of their quality, `SetDraws` gives three sets of images
with their features: anchor and positive of one identity, negative of another. Like the draws of a
recogniser (`data/draws.py`) a draw is a function of (seed, number) alone, on any rank, in any
worker and after any restart; the sampler yields draw numbers, so it needs `shuffle=False`.

Letters: M proxy images, D embedding width, T frames of a set, C channels, H rows, W columns.
"""

from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from common.log import InputError, get_logger
from face_lfr.data.face_data import FaceData
from face_lfr.data.proxy_set import Proxy, build_proxy, load_proxy
from face_lfr.quality import targets

__all__ = ["Proxy", "ProxyDraws", "QualityItem", "SetDraws", "SetItem", "build_proxy", "load_proxy"]

ENDLESS = 2**62
TRIES = 10
ORDER = 2**20  # keeps the permutations apart from the draws: no draw is tried so often
SLOTS = 1024
Item = TypeVar("Item")


class QualityItem(NamedTuple):
    """One proxy image uint8 (3, H, W) and its target, a float32 scalar."""

    image: Tensor
    target: Tensor


class SetItem(NamedTuple):
    """Anchor, positive and negative: `image` uint8 (3, T, 3, H, W), `feature` (3, T, D)."""

    image: Tensor
    feature: Tensor


class _Draws(Dataset[Item]):
    """Endless draws over a proxy set; an image that cannot be read replaces the whole draw.

    Args: see `ProxyDraws`.
    """

    def __init__(
        self,
        data: FaceData,
        transform: Any,
        proxy: Proxy,
        seed: int,
        flip: float,
        max_bad_items: int,
    ):
        if seed < 0 or max_bad_items < 0 or not 0 <= flip <= 1:
            given = f"seed={seed}, max_bad_items={max_bad_items}, flip={flip}"
            raise ValueError(f"{given}: need no negative number, and flip in [0, 1]")
        if not len(proxy) or proxy.number_M.max() >= data.epoch_length * proxy.copies:
            images = f"{len(proxy)} proxy images, {data.epoch_length} images"
            raise ValueError(f"{images}: the proxy set is empty or of other data")
        self.data, self.transform, self.proxy = data, transform, proxy
        self.seed, self.flip, self.max_bad_items = int(seed), float(flip), int(max_bad_items)
        # A slot for each worker: additions of several processes to one number would be lost.
        self._bad = torch.zeros(SLOTS, dtype=torch.int64).share_memory_()
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        return ENDLESS

    @property
    def epoch_length(self) -> int:
        """Draws of an epoch."""
        raise NotImplementedError

    def _make(self, place: int, rng: np.random.Generator) -> Item:
        """The draw of entry `place` of an epoch."""
        raise NotImplementedError

    @property
    def bad_items(self) -> int:
        """Draws replaced so far because an image could not be read, over all workers."""
        return int(self._bad.sum())

    def place(self, number: int) -> int:
        """Entry, in [0, epoch_length), that draw `number` takes when it can be read."""
        epoch, position = divmod(number, self.epoch_length)
        if self._order[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch, ORDER])
            self._order = (epoch, rng.permutation(self.epoch_length))
        return int(self._order[1][position])

    def __getitem__(self, number: int) -> Item:
        if number < 0:
            raise IndexError(number)
        place = self.place(number)
        for attempt in range(TRIES):
            rng = np.random.default_rng([self.seed, number, attempt])
            if attempt:
                place = int(rng.integers(self.epoch_length))
            try:
                return self._make(place, rng)
            except InputError as error:
                self._count_bad(error)
                last = error
        raise InputError(f"draw {number}", f"met {TRIES} unreadable images, at last", last)

    def _count_bad(self, error: InputError) -> None:
        worker = get_worker_info()
        self._bad[0 if worker is None else 1 + worker.id % (SLOTS - 1)] += 1
        if self.bad_items > self.max_bad_items:
            raise error
        get_logger(__name__).warning(
            "draw replaced (%d of at most %d): %s", self.bad_items, self.max_bad_items, error
        )

    def _image(self, index: int, rng: np.random.Generator) -> Tensor:
        image_CHW: Tensor = self.transform.test(self.proxy.image(self.data, index))
        # Features are means over image and mirror image, so a mirrored image has the same target;
        # of no other augmentation is that known. The columns that are cropped keep their place.
        if rng.random() < self.flip:
            seen_CHW = image_CHW[..., int(self.transform.crop_first) :]
            seen_CHW.copy_(seen_CHW.flip(-1))
        return image_CHW


class ProxyDraws(_Draws[QualityItem]):
    """Proxy images with the target of their quality; every image once in an epoch.

    Args:
        data: the training set of the proxy set.
        transform: of the quality network; only its `test` is used.
        proxy: what the recogniser says.
        seed: of order and mirroring, not negative.
        target: see `quality.targets`.
        flip: probability that an image is mirrored.
        max_bad_items: draws that are replaced, because an image cannot be read, before training
            stops, counted over all workers of this process. Each is logged.

    Raises:
        ValueError: an argument out of its range, or a proxy set of other data.
    """

    def __init__(
        self,
        data: FaceData,
        transform: Any,
        proxy: Proxy,
        seed: int = 0,
        target: str = "ddl_ratio",
        flip: float = 0.5,
        max_bad_items: int = 0,
    ):
        super().__init__(data, transform, proxy, seed, flip, max_bad_items)
        self.target_M = torch.from_numpy(targets(proxy.own_M, proxy.other_M, target))

    @property
    def epoch_length(self) -> int:
        """Draws of an epoch: the number of proxy images."""
        return len(self.proxy)

    def _make(self, place: int, rng: np.random.Generator) -> QualityItem:
        return QualityItem(self._image(place, rng), self.target_M[place])


class SetDraws(_Draws[SetItem]):
    """Three sets of proxy images; every identity with two images is the anchor once in an epoch.

    Anchor and positive share no image of the training set, not even in different copies. Images
    repeat within a set only where an identity has too few.

    Args:
        frames: T, images of a set.
        data, transform, proxy, seed, flip, max_bad_items: see `ProxyDraws`.

    Raises:
        ValueError: an argument out of its range, or a proxy set of other data.
        InputError: no identity has two images, or there is no second identity.
    """

    def __init__(
        self,
        data: FaceData,
        transform: Any,
        proxy: Proxy,
        seed: int = 0,
        frames: int = 8,
        flip: float = 0.5,
        max_bad_items: int = 0,
    ):
        super().__init__(data, transform, proxy, seed, flip, max_bad_items)
        if frames < 1:
            raise ValueError(f"frames={frames} must be at least 1")
        self.frames = int(frames)
        order_M = np.argsort(proxy.label_M, kind="stable")
        starts = np.flatnonzero(np.diff(proxy.label_M[order_M])) + 1
        self.members = np.split(order_M, starts)  # of each identity, by image row
        rows = [proxy.number_M[member] // proxy.copies for member in self.members]
        self.anchors = np.flatnonzero([row[0] != row[-1] for row in rows])
        if not len(self.anchors) or len(self.members) < 2:
            raise InputError(data.root, "needs two identities, one of them with two images", "")

    @property
    def epoch_length(self) -> int:
        """Draws of an epoch: the number of identities with two images or more."""
        return len(self.anchors)

    def _make(self, place: int, rng: np.random.Generator) -> SetItem:
        own = int(self.anchors[place])
        other = int(rng.integers(len(self.members) - 1))
        halves = self._halves(self.members[own], rng)
        pools = (*halves, self.members[other + (other >= own)])
        index_3T = [
            rng.choice(pool, self.frames, replace=len(pool) < self.frames) for pool in pools
        ]
        image = [torch.stack([self._image(int(i), rng) for i in index]) for index in index_3T]
        feature_3TD = torch.from_numpy(self.proxy.feature_MD[np.stack(index_3T)])
        return SetItem(torch.stack(image), feature_3TD)

    def _halves(
        self, member: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """The identity's proxy images, split by training image."""
        row = self.proxy.number_M[member] // self.proxy.copies
        chosen = rng.permutation(np.unique(row))
        first = np.isin(row, chosen[: len(chosen) // 2])
        return member[first], member[~first]
