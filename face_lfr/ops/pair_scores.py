"""Scores of all pairs of unit rows: a float32 tile with a proven error bound, and exact integers.

The score of two rows is the inner product of the rows after normalisation, in float64, rounded to a
multiple of 2**-40, so that equal cosines are equal scores. It is first taken in float32, a tile of
pairs at a time; `Rows.bound` limits how far that is from the score. Where that cannot decide, the
score is taken exactly, as an integer (its key), in a way that does not depend on the order of a
sum, hence not on tile, thread, rank or device.

How: a normalised component is split into a multiple of 2**-26 (high) and a multiple of 2**-46
(low). Products of two high parts are multiples of 2**-52, their sums stay below 2; products of high
and low are multiples of 2**-72, their sums stay below 2**-19. Both fit into the 53 bits of a
float64, so that no sum of them ever rounds; only the last addition and the rounding to a key do.
What is left out, the product of the low parts and what lies below 2**-46, is about 1e-14.

Letters: N rows, D their width, R rows and C columns of a tile, P pairs, U rows that pairs use.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from common.log import InputError

DISTRACTOR = -1
WIDEST = 8192
UNIT = 2.0**40  # a key is a score in units of 2**-40
EXCLUDED = -2.0  # stands for pairs that do not count; less than any score
SEGMENT = 128  # scores whose maximum is looked at before the scores
PAIRS_AT_ONCE = 4096
DENSE = 64  # one product of whole tiles costs as much as the rows of every 64th pair
_BLOCK = 2**21  # numbers read from the features at once


@dataclass(frozen=True)
class Rows:
    """Normalised rows in the order of their labels, distractors last.

    Attributes:
        unit: (N, D) float32, on the device of the products.
        label: (N,) int64, on the same device.
        end: (N,) int64, behind the last row with the label of this one; labelled rows only.
        order: (N,) int64, where the row stands in `features`.
        norm: (N,) float64, length of the row there.
        labelled: rows with a label; the distractors follow.
        features: (N, D), as given.
    """

    unit: Tensor
    label: Tensor
    end: NDArray[np.int64]
    order: NDArray[np.int64]
    norm: NDArray[np.float64]
    labelled: int
    features: NDArray[Any]

    def __len__(self) -> int:
        return len(self.unit)

    @cached_property
    def bound(self) -> float:
        """Greatest distance of a float32 score from the score.

        Rounding both rows gives 2 units of 2**-24, adding D products in any order D more. The rest
        is for limits and bin edges that are themselves rounded to float32.
        """
        return 1.01 * (self.unit.shape[1] + 8) * 2.0**-24

    def parts(self, rows_U: Tensor) -> tuple[Tensor, Tensor]:
        """(U, D) high and low parts of rows, float64, from the features as they were given."""
        at_U = rows_U.cpu().numpy()
        row_UD = np.asarray(self.features[self.order[at_U]], dtype=np.float64)
        unit_UD = torch.from_numpy(row_UD / self.norm[at_U, None]).to(self.unit.device)
        high_UD = (unit_UD * 2.0**26).round() * 2.0**-26
        return high_UD, ((unit_UD - high_UD) * 2.0**46).round() * 2.0**-46


@dataclass
class Tile:
    """Scores of rows `row`.. with rows `column`.., row by row, `width` to a row.

    `score` is float32 and padded with `EXCLUDED` to a multiple of `SEGMENT`.
    """

    rows: Rows
    row: int
    column: int
    height: int
    width: int
    score: Tensor

    def pairs(self, position_P: Tensor) -> tuple[Tensor, Tensor]:
        """(P,) and (P,) rows of the scores at these positions."""
        row_P = torch.div(position_P, self.width, rounding_mode="floor")
        return row_P + self.row, position_P - row_P * self.width + self.column

    def places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(R,) and (C,) numbers of its rows."""
        ends = ((self.row, self.height), (self.column, self.width))
        at_R, at_C = (torch.arange(at, at + count, device=device) for at, count in ends)
        return at_R, at_C

    def keys(self, position_P: Tensor) -> Tensor:
        """(P,) keys of the scores at these positions, taken in whichever way is cheaper."""
        if len(position_P) * DENSE > self.height * self.width:
            return self._all_keys[position_P]
        return exact_pairs(self.rows, *self.pairs(position_P))

    @cached_property
    def _all_keys(self) -> Tensor:
        places = self.places(torch.device("cpu"))
        (high_RD, low_RD), (high_CD, low_CD) = map(self.rows.parts, places)
        cross_RC = torch.cat([high_RD, low_RD], dim=1) @ torch.cat([low_CD, high_CD], dim=1).T
        return _key(high_RD @ high_CD.T, cross_RC).flatten()


def sorted_rows(features: ArrayLike, labels: ArrayLike, device: torch.device) -> Rows:
    """Check, normalise and sort.

    Args:
        features: (N, D) numbers; an array or a memory map, which is read in blocks.
        labels: (N,) integers, -1 for a distractor.
        device: where the products are taken.

    Raises:
        InputError: shapes or types that do not fit, or a row without a direction.
    """
    source, label_N = np.asarray(features), np.asarray(labels)
    _check(source, label_N)
    label_N = label_N.astype(np.int64)
    order_N = np.argsort(np.where(label_N < 0, np.iinfo(np.int64).max, label_N), kind="stable")
    place_N = np.empty_like(order_N)
    place_N[order_N] = np.arange(len(order_N))
    unit_ND = np.empty(source.shape, dtype=np.float32)
    norm_N = np.empty(len(source))
    step = max(1, _BLOCK // source.shape[1])
    for first in range(0, len(source), step):
        row_UD = np.asarray(source[first : first + step], dtype=np.float64)
        length_U = _lengths(row_UD, first)
        at_U = place_N[first : first + step]
        unit_ND[at_U], norm_N[at_U] = row_UD / length_U[:, None], length_U
    sorted_N = label_N[order_N]
    labelled = int((label_N >= 0).sum())
    end_N = np.searchsorted(sorted_N[:labelled], sorted_N[:labelled], side="right")
    return Rows(
        unit=torch.from_numpy(unit_ND).to(device),
        label=torch.from_numpy(sorted_N).to(device),
        end=end_N,
        order=order_N,
        norm=norm_N,
        labelled=labelled,
        features=source,
    )


def _check(source: NDArray[Any], label_N: NDArray[Any]) -> None:
    if source.ndim != 2 or source.dtype.kind not in "fiu":
        found = f"{source.dtype} {source.shape}"
        raise InputError("features", "must be numbers, images by width", found)
    if not 1 <= source.shape[1] <= WIDEST:
        raise InputError("features", f"must be 1 to {WIDEST} wide", source.shape[1])
    if label_N.ndim != 1 or label_N.dtype.kind not in "iu":
        raise InputError("labels", "must be integers", f"{label_N.dtype} {label_N.shape}")
    if len(label_N) != len(source):
        raise InputError("labels", f"needs {len(source)}, as many as features", len(label_N))
    wrong = np.flatnonzero(label_N < DISTRACTOR)
    if wrong.size:
        what = f"entry {wrong[0]} must be a class or {DISTRACTOR} for a distractor"
        raise InputError("labels", what, label_N[wrong[0]])


def _lengths(row_UD: NDArray[np.float64], first: int) -> NDArray[np.float64]:
    with np.errstate(over="ignore", invalid="ignore"):
        length_U: NDArray[np.float64] = np.sqrt((row_UD * row_UD).sum(axis=1))
    wrong = np.flatnonzero(~(np.isfinite(length_U) & (length_U > 0)))
    if wrong.size:
        where = f"features row {first + wrong[0]}"
        raise InputError(where, "has no direction, its length is", length_U[wrong[0]])
    return length_U


def negative_corners(rows: Rows, pairs: str, side: int) -> Iterator[tuple[int, int]]:
    """First row and column of the tiles that hold every negative pair once.

    Of "gallery_probe" these are the labelled rows by the distractors; of "all" the triangle of the
    labelled rows as well.
    """
    for row in range(0, rows.labelled, side):
        first = row if pairs == "all" else rows.labelled
        yield from ((row, column) for column in range(first, len(rows), side))


def positive_corners(rows: Rows, side: int) -> Iterator[tuple[int, int]]:
    """First row and column of the tiles near the diagonal that hold every positive pair once."""
    for row in range(0, rows.labelled, side):
        end = int(rows.end[min(row + side, rows.labelled) - 1])
        yield from ((row, column) for column in range(row, end, side))


class Product:
    """Takes tiles of at most side x side scores into one piece of memory, used again and again."""

    def __init__(self, rows: Rows, side: int):
        self.rows, self.side = rows, side
        size = -(-side * side // SEGMENT) * SEGMENT
        self.memory = torch.empty(size, dtype=torch.float32, device=rows.unit.device)

    def negatives(self, row: int, column: int) -> Tile:
        """The tile with that corner; pairs of one label, and pairs seen before, are excluded."""
        tile, score_RC = self._tile(row, column, len(self.rows))
        if column < self.rows.end[row + tile.height - 1]:
            same_RC, later_RC = self._masks(tile)
            score_RC.masked_fill_(same_RC | ~later_RC, EXCLUDED)
        return tile

    def positives(self, row: int, column: int) -> tuple[Tile, Tensor]:
        """The tile with that corner, and the positions of its positive pairs."""
        end = int(self.rows.end[min(row + self.side, self.rows.labelled) - 1])
        tile, _ = self._tile(row, column, end)
        same_RC, later_RC = self._masks(tile)
        return tile, (same_RC & later_RC).flatten().nonzero().flatten()

    def _tile(self, row: int, column: int, last: int) -> tuple[Tile, Tensor]:
        unit_RD = self.rows.unit[row : min(row + self.side, self.rows.labelled)]
        unit_CD = self.rows.unit[column : min(column + self.side, last)]
        height, width = len(unit_RD), len(unit_CD)
        size = height * width
        score_RC = self.memory[:size].view(height, width)
        torch.mm(unit_RD, unit_CD.T, out=score_RC)
        padded = -(-size // SEGMENT) * SEGMENT
        self.memory[size:padded] = EXCLUDED
        return Tile(self.rows, row, column, height, width, self.memory[:padded]), score_RC

    def _masks(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """(R, C) pairs of one label, and pairs whose second row stands behind the first."""
        place_N = torch.arange(len(self.rows), device=self.memory.device)
        rows = slice(tile.row, tile.row + tile.height)
        columns = slice(tile.column, tile.column + tile.width)
        label_N = self.rows.label
        same_RC = label_N[rows, None] == label_N[None, columns]
        return same_RC, place_N[None, columns] > place_N[rows, None]


def exact_pairs(rows: Rows, first_P: Tensor, second_P: Tensor) -> Tensor:
    """(P,) keys of the scores of pairs of rows."""
    found = [torch.empty(0, dtype=torch.int64, device=first_P.device)]
    for start in range(0, len(first_P), PAIRS_AT_ONCE):
        both = torch.stack([part[start : start + PAIRS_AT_ONCE] for part in (first_P, second_P)])
        used_U, at_2P = both.unique(return_inverse=True)
        high_UD, low_UD = rows.parts(used_U)
        (high_PD, other_high_PD), (low_PD, other_low_PD) = high_UD[at_2P], low_UD[at_2P]
        high_P = (high_PD * other_high_PD).sum(dim=1)
        cross_P = (high_PD * other_low_PD + low_PD * other_high_PD).sum(dim=1)
        found.append(_key(high_P, cross_P))
    return torch.cat(found)


def _key(high: Tensor, cross: Tensor) -> Tensor:
    return high.add_(cross).mul_(UNIT).round_().long()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Float32 products in float32 inside: no TF32, no bfloat16, no autocast."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False), torch.inference_mode():
            yield
    finally:
        torch.set_float32_matmul_precision(before)
