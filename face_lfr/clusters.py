"""Groups of pictures that show one person, from their similarities alone.

Both rules accept what `face_lfr.all_pairs` accepts: a similarity above the threshold, strictly.

- `connected`: pictures are in one group when a chain of similar pictures leads from one to the
  other (single linkage);
- `average_linkage`: the two groups with the greatest mean similarity of their members become one,
  as long as that mean is above the threshold (Sokal and Michener, 1958). Of equal means the pair
  with the first picture goes first; a group counts as its first picture here.

Groups are numbered in the order of their first picture. Memory grows with N squared.

Letters: N pictures, D embedding width, G groups.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]


def connected(similarity_NN: ArrayLike, threshold: float) -> Labels:
    """Group of each picture, (N,): the connected components of the pairs above the threshold.

    Args:
        similarity_NN: symmetric; its diagonal plays no part.
        threshold: a pair is linked when its similarity is greater.

    Raises:
        ValueError: another shape, not symmetric, or a number that is not finite.
    """
    linked_NN = _checked(similarity_NN, threshold) > threshold
    label_N = np.full(len(linked_NN), -1, np.int64)
    groups = 0
    for row in range(len(linked_NN)):
        if label_N[row] >= 0:
            continue
        member_N = np.zeros(len(linked_NN), bool)
        member_N[row] = True
        fresh_N = member_N
        while fresh_N.any():  # each picture is fresh once, so each row is read once
            fresh_N = linked_NN[fresh_N].any(axis=0) & ~member_N
            member_N |= fresh_N
        label_N[member_N] = groups
        groups += 1
    return label_N


def average_linkage(similarity_NN: ArrayLike, threshold: float) -> Labels:
    """Group of each picture, (N,), by average linkage.

    Sums of similarities are kept and not means of means, so that means are as exact as one
    division, and equal ones stay equal.

    Args:
        similarity_NN: symmetric; its diagonal plays no part.
        threshold: groups become one while their mean similarity is greater.

    Raises:
        ValueError: as `connected`.
    """
    sum_NN = _checked(similarity_NN, threshold)
    pairs = _Pairs(sum_NN)
    first_N = np.arange(len(sum_NN))  # the group each picture's group went into, or itself
    while len(sum_NN) and (found := pairs.best()).mean > threshold:
        pairs.join(found.first, found.second)
        first_N[first_N == found.second] = found.first
    return np.unique(first_N, return_inverse=True)[1].astype(np.int64)


class _Best(NamedTuple):
    """The most similar pair of groups, `first` < `second`."""

    first: int
    second: int
    mean: float


class _Pairs:
    """Mean similarities of the groups that are left, with the nearest group of each.

    A group lies at the place of its first picture. Places that are given up, and the diagonal,
    hold -inf.
    """

    def __init__(self, sum_NN: Floats):
        self.sum_NN, self.size_N = sum_NN.copy(), np.ones(len(sum_NN))
        self.mean_NN = sum_NN.copy()
        np.fill_diagonal(self.mean_NN, -np.inf)
        self.left_N = np.ones(len(sum_NN), bool)
        self.near_N = np.zeros(len(sum_NN), np.int64)
        self.best_N = np.full(len(sum_NN), -np.inf)
        self._search(self.left_N)

    def best(self) -> _Best:
        """Of equal means the first; argmax finds the first place in both directions."""
        first = int(self.best_N.argmax())
        return _Best(first, int(self.near_N[first]), float(self.best_N[first]))

    def join(self, first: int, second: int) -> None:
        """Put the second group into the first."""
        self.sum_NN[first] += self.sum_NN[second]
        self.sum_NN[:, first] = self.sum_NN[first]
        self.size_N[first] += self.size_N[second]
        self.left_N[second] = False
        mean_N = self.sum_NN[first] / (self.size_N[first] * self.size_N)
        mean_N[~self.left_N] = mean_N[first] = -np.inf
        self.mean_NN[first] = self.mean_NN[:, first] = mean_N
        self.mean_NN[second] = self.mean_NN[:, second] = -np.inf
        self.best_N[second] = -np.inf
        lost_N = self.left_N & np.isin(self.near_N, (first, second))
        lost_N[first] = True
        self._search(lost_N)
        self._offer(first, mean_N)

    def _search(self, row_N: NDArray[np.bool_]) -> None:
        """Find the nearest group of some groups anew."""
        if not len(row_N):
            return
        rows = np.flatnonzero(row_N)
        self.near_N[rows] = self.mean_NN[rows].argmax(axis=1)
        self.best_N[rows] = self.mean_NN[rows, self.near_N[rows]]

    def _offer(self, place: int, mean_N: Floats) -> None:
        """Let the others take a changed group as their nearest: it may tie, or win by rounding."""
        taken_N = (mean_N > self.best_N) | ((mean_N == self.best_N) & (place < self.near_N))
        taken_N &= self.left_N
        taken_N[place] = False
        self.near_N[taken_N], self.best_N[taken_N] = place, mean_N[taken_N]


LINKAGES: dict[str, Callable[[ArrayLike, float], Labels]] = {
    "average": average_linkage,
    "connected": connected,
}


def similarity_to_mean(vector_ND: ArrayLike, label_N: ArrayLike) -> Floats:
    """Cosine between each unit row and the mean of its group, (N,).

    A group of one has 1. Rows that cancel out have no direction in common: they get 0.

    Args:
        vector_ND: unit rows.
        label_N: groups, numbered from 0.
    """
    vector_ND, label_N = np.asarray(vector_ND, np.float64), np.asarray(label_N)
    if not len(label_N):
        return np.zeros(0)
    mean_GD = np.zeros((int(label_N.max()) + 1, vector_ND.shape[1]))
    np.add.at(mean_GD, label_N, vector_ND)
    norm_G = np.linalg.norm(mean_GD, axis=1)
    mean_GD /= np.where(norm_G > 1e-12, norm_G, np.inf)[:, None]
    cosine_N: Floats = np.einsum("nd,nd->n", vector_ND, mean_GD[label_N])
    return cosine_N.clip(-1, 1)


def _checked(similarity_NN: ArrayLike, threshold: float) -> Floats:
    found_NN = np.asarray(similarity_NN, np.float64)
    if found_NN.ndim != 2 or found_NN.shape[0] != found_NN.shape[1]:
        raise ValueError(f"similarity_NN has shape {found_NN.shape}, need (N, N)")
    if not np.isfinite(found_NN).all() or not np.isfinite(threshold):
        raise ValueError(f"similarity_NN and threshold={threshold} must be finite")
    if not np.array_equal(found_NN, found_NN.T):
        raise ValueError("similarity_NN is not symmetric")
    return found_NN
