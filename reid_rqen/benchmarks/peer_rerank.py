"""Dense k-reciprocal re-ranking, the usual way, restated to be timed and compared against.

The algorithm of zhunzhong07/person-re-ranking (python-version) and of torchreid: one matrix of all
distances, a full argsort of it, a dense V and Python loops over rows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def rerank_dense(
    distance_NN: NDArray, queries: int, k1: int = 20, k2: int = 6, weight: float = 0.3
) -> NDArray:
    """(queries, N - queries) re-ranked distances.

    Args:
        distance_NN: unsquared distances of the queries followed by the gallery.
        queries: how many of the rows are queries.
        k1: neighbours of a reciprocal set.
        k2: rows averaged into one; 1 turns it off.
        weight: share of the original distance.
    """
    scaled_NN = np.power(distance_NN, 2).astype(np.float32)
    scaled_NN = scaled_NN / scaled_NN.max(axis=1, keepdims=True)
    order_NN = np.argsort(scaled_NN, axis=1)
    code_NN = np.zeros_like(scaled_NN)
    for row in range(len(scaled_NN)):
        members = _expanded(order_NN, row, k1)
        share = np.exp(-scaled_NN[row, members])
        code_NN[row, members] = share / share.sum()
    if k2 > 1:
        code_NN = np.stack([code_NN[order_G[:k2]].mean(axis=0) for order_G in order_NN])
    holders = [np.flatnonzero(column) for column in code_NN.T]
    jaccard_QN = np.empty((queries, len(scaled_NN)), np.float32)
    for row in range(queries):
        shared = np.zeros(len(scaled_NN), np.float32)
        for column in np.flatnonzero(code_NN[row]):
            who = holders[column]
            shared[who] += np.minimum(code_NN[row, column], code_NN[who, column])
        jaccard_QN[row] = 1 - shared / (2 - shared)
    final_QN = (1 - weight) * jaccard_QN + weight * scaled_NN[:queries]
    return final_QN[:, queries:]


def _mutual(order_NN: NDArray, row: int, k: int) -> NDArray:
    forward = order_NN[row, : k + 1]
    return forward[(order_NN[forward, : k + 1] == row).any(axis=1)]


def _expanded(order_NN: NDArray, row: int, k1: int) -> NDArray:
    mutual = _mutual(order_NN, row, k1)
    parts = [mutual]
    for neighbour in mutual:
        half = _mutual(order_NN, neighbour, int(np.around(k1 / 2)))
        if len(np.intersect1d(half, mutual)) > 2 / 3 * len(half):
            parts.append(half)
    return np.unique(np.concatenate(parts))
