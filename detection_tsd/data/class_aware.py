"""Class-aware sampling: every class equally often, however rare its pictures are.

arXiv 2003.07557 trains Open Images with it; this is the order of Sense-X/TSD
(mmdet/datasets/samplers/distributed_classaware_sampler.py) from a generator of its own.

Letters: N images, C classes that have images, R rounds, P (image, class) pairs, O objects.
"""

from collections.abc import Sequence

import numpy as np

from detection_tsd.data.detection_data import Objects

STREAM = 2**20 + 1  # keeps its random numbers apart from those of the draws


class ClassAware:
    """Epoch e is draws e * N to (e + 1) * N - 1, in an order of (seed, e).

    A round takes every class that has images once, in random order, and of each a uniformly random
    image, with replacement. An epoch is as many whole rounds as fit, then its own head again. With
    fewer images than classes it is the head of one round.

    Args:
        objects: of the set.
        rows: of the images to draw from; the length of an epoch.
        seed: any non-negative number.

    Raises:
        ValueError: no row has an object.
    """

    def __init__(self, objects: Objects, rows: Sequence[int] | np.ndarray, seed: int):
        self.length, self.seed = len(rows), seed
        entry_P, label_P = _pairs(objects, rows)
        if not len(entry_P):
            raise ValueError(f"none of rows={len(rows)} images has an object")
        counts = np.bincount(label_P)
        self.classes, counts_C = np.flatnonzero(counts), counts[counts > 0]
        self._entry_P, self._counts_C = entry_P, counts_C
        self._starts_C = np.cumsum(counts_C) - counts_C
        self._epoch, self._order = -1, np.empty(0, np.int32)

    @property
    def rounds(self) -> int:
        """Whole rounds of an epoch."""
        return self.length // len(self.classes)

    def row(self, number: int) -> int:
        """Entry of `rows` that a draw takes."""
        epoch, place = divmod(number, self.length)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        return int(self._order[place])

    def _shuffled(self, epoch: int) -> np.ndarray:
        rng, count = np.random.default_rng([self.seed, epoch, STREAM]), len(self.classes)
        class_RC = np.tile(np.arange(count), (max(self.rounds, 1), 1))
        classes = rng.permuted(class_RC, axis=1).ravel()
        picks = self._starts_C[classes] + rng.integers(self._counts_C[classes])
        return np.resize(self._entry_P[picks], self.length)  # repeats the head, or cuts the tail


def _pairs(objects: Objects, rows: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Entry and class of every pair in which the class is in the image, sorted by class."""
    labels = [objects.labels(int(row)) for row in rows]
    count_N = np.array([len(label_G) for label_G in labels], np.int64)
    entry_O = np.repeat(np.arange(len(labels)), count_N)
    label_O = np.concatenate([np.empty(0, np.int64), *labels])
    # Sorting by hand takes a twentieth of the time of np.unique, which hashes: a second for the
    # 12 million boxes of Open Images.
    pair_P = np.sort(label_O * max(len(labels), 1) + entry_O)
    pair_P = pair_P[np.diff(pair_P, prepend=-1) > 0]
    label_P, entry_P = np.divmod(pair_P, max(len(labels), 1))
    return entry_P.astype(np.int32), label_P
