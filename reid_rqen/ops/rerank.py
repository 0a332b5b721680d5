"""k-reciprocal re-ranking with sparse sets (Zhong et al., CVPR 2017, arXiv 1701.08398).

Over the union of queries and gallery, N rows:

1. D_ij = squared distance, each row divided by its maximum; rank(i) = ascending, i itself first.
2. R(i, k) = {j among the first k+1 of rank(i) : i among the first k+1 of rank(j)}.
3. R* = R(i, k1), plus R(j, k1/2) for every j in R(i, k1) that shares more than 2/3 of it with
   R(i, k1); k1/2 is rounded half to even, as the authors' numpy code does.
4. V_i = exp(-D_ij) on R*, normalised to sum 1.
5. V_i becomes the mean of V_j over the first k2 of rank(i).
6. d_J(i, j) = 1 - m / (2 - m) with m = sum_l min(V_il, V_jl).
7. The result is (1 - w) d_J + w D.

Nothing of size N x N is kept: neighbours come from blocks of one matrix product, sets are sorted
keys i * N + j, V is compressed rows, d_J walks the columns that a query's row touches. Equal
distances are ordered by row number, so the result does not depend on the block size beyond the
rounding of the products. Where a metric is indefinite all distances are shifted to start at 0.

Shapes: N rows, K neighbours of a row (itself first), B rows of a block, E stored entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.log import InputError
from reid_rqen.ops.distance import (
    Points,
    block_buffer,
    distance_block,
    full_precision,
    pair_distance,
)

Labels = NDArray[np.int64]
Reals = NDArray[np.floating]


class Neighbours(NamedTuple):
    """(N, K) closest rows, itself first; the shift and the (N,) row maxima that scale D."""

    row: Labels
    shift: float
    highest: Tensor


class SparseRows(NamedTuple):
    """Compressed rows: entries start[i] : start[i + 1] belong to row i."""

    start: Labels
    column: Labels
    value: Reals


@dataclass(frozen=True)
class KReciprocal:
    """Settings; the defaults are the paper's. `weight` is lambda, the share of D, in [0, 1].

    `k1` neighbours make a reciprocal set, `k2` rows are averaged (1 turns that off), `chunk` rows
    of distances are in memory at a time.
    """

    k1: int = 20
    k2: int = 6
    weight: float = 0.3
    chunk: int = 256

    def __post_init__(self) -> None:
        for name in ("k1", "k2", "chunk"):
            if getattr(self, name) < 1:
                raise InputError(f"rerank.{name}", "must be 1 or more", getattr(self, name))
        if not 0 <= self.weight <= 1:
            raise InputError("rerank.weight", "must lie in [0, 1]", self.weight)

    def blocks(
        self, points: Points, query_row: Labels, gallery_row: Labels
    ) -> Iterator[tuple[slice, NDArray]]:
        """Yield (queries, (B, G) re-ranked distances) in the order of `query_row`.

        The memory of a block is that of the next one: use it, or copy it, before going on.

        Args:
            points: all N rows, each once: a query that is also a gallery row must not be repeated,
                its copy would fill every neighbour list.
            query_row: (Q,) rows that are queries.
            gallery_row: (G,) rows that are ranked, in the wanted column order.
        """
        with full_precision():
            near = nearest(points, max(self.k1 + 1, self.k2), self.chunk)
            rows = _encode(points, near, self.k1)
        dtype = rows.value.dtype
        if self.k2 > 1:
            rows = _expand(rows, near.row[:, : self.k2], self.chunk)
        columns = _transpose(rows, gallery_row)
        gallery = _part(points, gallery_row)
        chunk = min(self.chunk, len(query_row))
        buffer, final_BG = block_buffer(gallery, chunk), np.empty((chunk, len(gallery_row)), dtype)
        for start in range(0, len(query_row), chunk):
            part = slice(start, min(start + chunk, len(query_row)))
            block = slice(part.stop - start)
            _jaccard(rows, columns, query_row[part], final_BG[block])
            with full_precision():
                scaled_BG = _scaled(points, gallery, near, query_row[part], buffer[block])
            final_BG[block] *= 1 - self.weight
            final_BG[block] += scaled_BG.mul_(self.weight).cpu().numpy()
            yield part, final_BG[block]


def rerank(
    points: Points,
    query_row: Labels,
    gallery_row: Labels,
    k1: int = 20,
    k2: int = 6,
    weight: float = 0.3,
    chunk: int = 256,
) -> NDArray:
    """(Q, G) re-ranked distances in the dtype of the points; see `KReciprocal.blocks`."""
    final_QG = points.value.new_empty(len(query_row), len(gallery_row), device="cpu").numpy()
    for part, block_BG in KReciprocal(k1, k2, weight, chunk).blocks(points, query_row, gallery_row):
        final_QG[part] = block_BG
    return final_QG


def nearest(points: Points, count: int, chunk: int) -> Neighbours:
    """The `count` closest rows of each row by (itself, distance, row number), from blocks."""
    total = len(points.norm)
    count = min(count, total)
    row_NK, highest_N = np.empty((total, count), np.int64), torch.empty_like(points.norm)
    lowest, buffer = float("inf"), block_buffer(points, min(chunk, total))
    for start in range(0, total, chunk):
        part = slice(start, min(start + chunk, total))
        distance_BN = distance_block(points.rows(part), points, buffer[: part.stop - start])
        highest_N[part] = distance_BN.amax(dim=1)
        lowest = min(lowest, float(distance_BN.min()))
        own_B = torch.arange(len(distance_BN), device=distance_BN.device)
        distance_BN[own_B, own_B + start] = -torch.inf
        row_NK[part] = _closest(distance_BN, count).cpu().numpy()
    shift = max(0.0, -lowest)
    highest_N = (highest_N + shift).clamp_min(torch.finfo(highest_N.dtype).tiny)
    return Neighbours(row_NK, shift, highest_N)


def _closest(distance_BN: Tensor, count: int) -> Tensor:
    """(B, count) columns by (distance, column); `topk` alone leaves ties undefined."""
    extra = min(count + 1, distance_BN.shape[1])
    value_BK, column_BK = distance_BN.topk(extra, dim=1, largest=False)
    if extra > count:
        cut = value_BK[:, count - 1] == value_BK[:, count]
        value_BK, column_BK = value_BK[:, :count], column_BK[:, :count]
    else:
        cut = torch.zeros(len(value_BK), dtype=torch.bool, device=value_BK.device)
    column_BK, order_BK = column_BK.sort(dim=1)
    order_BK = value_BK.gather(1, order_BK).argsort(dim=1, stable=True)
    column_BK = column_BK.gather(1, order_BK)
    # a tie across the end of the list: any of the tied columns may be in it, so sort the row
    column_BK[cut] = distance_BN[cut].argsort(dim=1, stable=True)[:, :count]
    return column_BK


def _part(points: Points, row: Labels) -> Points:
    """The listed rows; a run of neighbouring rows is not copied."""
    if len(row) and np.array_equal(row, np.arange(row[0], row[0] + len(row))):
        return points.rows(slice(int(row[0]), int(row[0]) + len(row)))
    return points.rows(torch.as_tensor(row, device=points.norm.device))


def _reciprocal(row_NK: Labels, k: int) -> tuple[Labels, NDArray[np.bool_]]:
    """The first k+1 neighbours of each row and which of them are mutual: R(i, k)."""
    near_NK = row_NK[:, : k + 1]
    total = len(near_NK)
    own_N1 = np.arange(total)[:, None]
    forward = np.sort((own_N1 * total + near_NK).ravel())
    return near_NK, _contains(forward, near_NK * total + own_N1)


def _contains(sorted_keys: Labels, keys: Labels) -> NDArray[np.bool_]:
    position = np.searchsorted(sorted_keys, keys)
    return sorted_keys[np.minimum(position, len(sorted_keys) - 1)] == keys


def _expanded_sets(row_NK: Labels, k1: int, block: int = 1024) -> Labels:
    """Sorted keys i * N + j of all j in R*(i)."""
    total = len(row_NK)
    near_NK, mutual_NK = _reciprocal(row_NK, k1)
    half_NH, mutual_NH = _reciprocal(row_NK, int(np.around(k1 / 2)))
    sets = []
    for start in range(0, total, block):
        own_P, slot_P = np.nonzero(mutual_NK[start : start + block])
        own_P = own_P + start
        other_P = near_NK[own_P, slot_P]
        keys = np.sort(own_P * total + other_P)
        candidate_PH = own_P[:, None] * total + half_NH[other_P]
        member_PH = mutual_NH[other_P]
        shared_P = (_contains(keys, candidate_PH) & member_PH).sum(axis=1)
        # whole numbers: 2/3 of a size is not exact in floating point, and the test is strict
        joins_P = 3 * shared_P > 2 * member_PH.sum(axis=1)
        sets.append(np.union1d(keys, candidate_PH[joins_P][member_PH[joins_P]]))
    return np.concatenate(sets)


def _encode(points: Points, near: Neighbours, k1: int) -> SparseRows:
    """V of step 4."""
    total = len(near.row)
    row_E, column_E = np.divmod(_expanded_sets(near.row, k1), total)
    device = points.norm.device
    left_E, right_E = (torch.as_tensor(side, device=device) for side in (row_E, column_E))
    scaled_E = (pair_distance(points, left_E, right_E) + near.shift) / near.highest[left_E]
    weight_E = torch.exp(-scaled_E).cpu().numpy()
    start_N1 = np.searchsorted(row_E, np.arange(total + 1))
    sum_N = np.add.reduceat(weight_E, start_N1[:-1])  # no row is empty: i is in R*(i)
    return SparseRows(start_N1, column_E, weight_E / sum_N[row_E])


def _entries(start: Labels, rows: Labels) -> tuple[Labels, Labels]:
    """Positions of all entries of the listed rows, in order, and the count of each row."""
    count = start[rows + 1] - start[rows]
    skip = start[rows] - (np.cumsum(count) - count)
    return np.repeat(skip, count) + np.arange(count.sum()), count


def _expand(rows: SparseRows, near_NK: Labels, block: int) -> SparseRows:
    """V of step 5: each row is the mean of its neighbours' rows."""
    total, width = near_NK.shape
    keys, values = [], []
    for start in range(0, total, block):
        near_BK = near_NK[start : start + block]
        entry, count = _entries(rows.start, near_BK.ravel())
        own = np.repeat(np.repeat(np.arange(len(near_BK)) + start, width), count)
        key = own * total + rows.column[entry]
        order = np.argsort(key, kind="stable")
        first = np.flatnonzero(np.diff(key[order], prepend=-1))
        keys.append(key[order][first])
        values.append(np.add.reduceat(rows.value[entry][order], first) / width)
    row_E, column_E = np.divmod(np.concatenate(keys), total)
    start_N1 = np.searchsorted(row_E, np.arange(total + 1))
    return SparseRows(start_N1, column_E, np.concatenate(values))


def _transpose(rows: SparseRows, gallery_row: Labels) -> SparseRows:
    """By column of V: which gallery rows, as positions in `gallery_row`, hold it and its value."""
    total = len(rows.start) - 1
    entry, count = _entries(rows.start, gallery_row)
    owner = np.repeat(np.arange(len(gallery_row)), count)
    order = np.argsort(rows.column[entry], kind="stable")
    column = rows.column[entry][order]
    start = np.searchsorted(column, np.arange(total + 1))
    return SparseRows(start, owner[order], rows.value[entry][order])


def _jaccard(rows: SparseRows, columns: SparseRows, query_row: Labels, out_BG: NDArray) -> None:
    """Step 6, into `out_BG`."""
    for position, row in enumerate(query_row):
        own = slice(rows.start[row], rows.start[row + 1])
        entry, count = _entries(columns.start, rows.column[own])
        smaller = np.minimum(np.repeat(rows.value[own], count), columns.value[entry])
        shared_G = np.bincount(columns.column[entry], smaller, minlength=out_BG.shape[1])
        out_BG[position] = 1 - shared_G / (2 - shared_G)


def _scaled(
    points: Points, gallery: Points, near: Neighbours, query_row: Labels, out_BG: Tensor
) -> Tensor:
    """(B, G) rows of D, in `out_BG`."""
    row_B = torch.as_tensor(query_row, device=points.norm.device)
    distance_BG = distance_block(points.rows(row_B), gallery, out_BG)
    return distance_BG.add_(near.shift).div_(near.highest[row_B, None])
