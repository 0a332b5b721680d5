"""The (k+1)-th largest score of a stream of tiles, exactly, in bounded memory.

* `TopScores` keeps the largest scores behind a rising lower bound: one pass, for small k.
* `Histogram` counts float32 scores in bins and so brackets the score that is looked for.
* `Window` looks at the scores within a bracket: it collects them, or, where they are too many,
  counts them in bins of the bracket, which narrows it 65,536 times.

All of them read tiles (`add`), join what the ranks found (`merge`) and answer in keys, the exact
scores of `face_lfr.ops.pair_scores`. A float32 score is at most `Rows.bound` off. So is, then, the
(k+1)-th largest of all float32 scores off the (k+1)-th largest score, and only pairs within twice
the bound of it need an exact look.

Letters: S segments, E entries of a segment, P pairs.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from common import dist
from common.dist import World
from face_lfr.ops.pair_scores import EXCLUDED, SEGMENT, UNIT, Rows, Tile, exact_pairs

LOWEST_KEY = -(2**60)  # less than the key of any score
RESOLUTION = 2.0**-15  # width of a bin of `Histogram`
_BINS = int(3 / RESOLUTION) + 64  # from EXCLUDED to a little above 1
_FINE = 2**16  # bins of a `Window`
_FEW = 2**14


class Cut(NamedTuple):
    """A threshold as a key, and the number of scores above it."""

    key: int
    above: int

    @property
    def threshold(self) -> float:
        """The key as a score; -inf for the one below all scores."""
        return -math.inf if self.key == LOWEST_KEY else self.key / UNIT


class Reader(Protocol):
    """Takes in the tiles of one pass."""

    def add(self, tile: Tile) -> None:
        """Read the next tile; its memory is used again afterwards."""

    def merge(self, world: World | None) -> None:
        """Join with the other ranks, after the last tile."""


def over_ranks(count: Tensor, world: World | None) -> Tensor:
    """Sum of the counts of all ranks."""
    if world is None or world.size == 1:
        return count
    return dist.gather_rows(count[None]).sum(dim=0)


def _joined(part: Tensor, world: World | None) -> Tensor:
    return part if world is None or world.size == 1 else dist.gather_rows(part)


def _above(score_P: Tensor, limit: float) -> Tensor:
    """Positions of the scores above a limit; NumPy finds them several times faster on a CPU."""
    if score_P.device.type != "cpu":
        return (score_P > limit).nonzero().flatten()
    return torch.from_numpy(np.flatnonzero(score_P.numpy() > limit))


def _split(score_P: Tensor, low: float, high: float) -> tuple[int, Tensor]:
    """How many scores lie above `high`, and the positions of those from `low` to `high`."""
    if score_P.device.type != "cpu":
        over_P = score_P > high
        return int(over_P.sum()), ((score_P >= low) ^ over_P).nonzero().flatten()
    score = score_P.numpy()
    over = score > high
    return int(np.count_nonzero(over)), torch.from_numpy(np.flatnonzero((score >= low) ^ over))


class TopScores:
    """The `kept` largest scores, and all within twice the bound of the last of them.

    `overflow` is set, and nothing more is read, when these are more than twice `kept` and `spare`:
    there are many ties.
    """

    def __init__(self, rows: Rows, kept: int, spare: int):
        self.rows, self.kept, self.capacity = rows, kept, 2 * kept + spare
        self.lower = EXCLUDED / 2 - 0.5  # between the excluded and all others
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self.count, self.full, self.overflow = 0, self._next_full(0), False

    def _next_full(self, count: int) -> int:
        """The count to raise the bound at: soon, but not so soon that it takes long itself."""
        return min(self.capacity, count + max(self.kept, _FEW))

    def add(self, tile: Tile) -> None:
        """Keep what exceeds the lower bound; a look at the maxima of segments skips the most."""
        if self.overflow:
            return
        score_SE = tile.score.view(-1, SEGMENT)
        hit_S = _above(score_SE.amax(dim=1), self.lower)
        if not len(hit_S):
            return
        score_P = score_SE[hit_S].flatten()
        at_P = _above(score_P, self.lower)
        if len(at_P) > self.full:  # a bound from this tile alone, mostly the first
            self._raise(score_P)
            at_P = _above(score_P, self.lower)
        places = tile.pairs(hit_S[at_P // SEGMENT] * SEGMENT + at_P % SEGMENT)
        first_P, second_P = (place_P.int() for place_P in places)
        self.parts.append((score_P[at_P], first_P, second_P))
        self.count += len(at_P)
        if self.count > self.full:
            self._compact()

    def _raise(self, score_P: Tensor) -> None:
        if len(score_P) >= self.kept:
            least = float(score_P.topk(self.kept, sorted=False).values.min())
            self.lower = max(self.lower, least - 2 * self.rows.bound)

    def _compact(self) -> None:
        score_P, first_P, second_P = self._whole()
        self._raise(score_P)
        kept_P = score_P > self.lower
        self.parts = [(score_P[kept_P], first_P[kept_P], second_P[kept_P])]
        self.count = len(self.parts[0][0])
        self.full = self._next_full(self.count)
        if self.count > self.capacity:
            self.overflow, self.parts = True, []

    def _whole(self) -> tuple[Tensor, Tensor, Tensor]:
        if not self.parts:
            device = self.rows.unit.device
            nothing = torch.empty(0, dtype=torch.int32, device=device)
            return torch.empty(0, device=device), nothing, nothing
        score_P, first_P, second_P = map(torch.cat, zip(*self.parts, strict=True))
        return score_P, first_P, second_P

    def merge(self, world: World | None) -> None:
        """Join with the other ranks; an overflow of one is one of all."""
        if not self.overflow:
            self._compact()
        flag = torch.tensor(int(self.overflow), device=self.rows.unit.device)
        if over_ranks(flag, world):
            self.overflow, self.parts = True, []
            return
        score_P, *places = (_joined(part, world) for part in self._whole())
        score_P, order_P = score_P.sort(descending=True)
        first_P, second_P = (part[order_P].long() for part in places)
        self.parts = [(score_P, first_P, second_P)]

    def cut(self, place: int) -> Cut:
        """The score with `place` greater or equal ones, `place` < `kept`; after `merge`."""
        score_P, first_P, second_P = self.parts[0]
        reach = 2 * self.rows.bound
        near = float(score_P[place])
        above = int((score_P > near + reach).sum())
        last = int((score_P >= near - reach).sum())
        key_P = exact_pairs(self.rows, first_P[above:last], second_P[above:last])
        return _cut(key_P, place, above)


def _cut(key_P: Tensor, place: int, above: int) -> Cut:
    """The cut at `place`, when `above` scores lie above all of these."""
    key = int(key_P.sort(descending=True).values[place - above])
    return Cut(key, above + int((key_P > key).sum()))


class Histogram:
    """Counts float32 scores in bins of `RESOLUTION`; bin b holds those from b*RESOLUTION - 2 on.

    A score within `Rows.bound` of an edge may be counted on either side of it.
    """

    def __init__(self, rows: Rows):
        self.rows = rows
        self.count_B = torch.zeros(_BINS, dtype=torch.int64, device=rows.unit.device)

    def add(self, tile: Tile) -> None:
        """Count a tile; what is excluded falls into bin 0."""
        self.add_scores(tile.score)

    def add_scores(self, score_P: Tensor) -> None:
        """Count scores."""
        bin_P = (score_P - EXCLUDED).mul_(1 / RESOLUTION).to(torch.int32)
        self.count_B += torch.bincount(bin_P, minlength=_BINS)

    def merge(self, world: World | None) -> None:
        """Join with the other ranks."""
        self.count_B = over_ranks(self.count_B, world)
        self.count_B[0] = 0

    def bracket(self, place: int) -> tuple[float, float]:
        """Two scores that enclose the one with `place` greater or equal ones."""
        edge = _bin_of(self.count_B, place)[0] * RESOLUTION + EXCLUDED
        return edge - self.rows.bound, edge + RESOLUTION + self.rows.bound

    def reaching(self) -> Tensor:
        """Scores in each bin and those above it."""
        return self.count_B.flip(0).cumsum(0).flip(0)


def _bin_of(count_B: Tensor, place: int) -> tuple[int, int]:
    """The bin of the score with `place` greater or equal ones, and the count above that bin."""
    reach_B = count_B.flip(0).cumsum(0)
    at = int((reach_B <= place).sum())
    above = int(reach_B[at - 1]) if at else 0
    return len(count_B) - 1 - at, above


class Window:
    """Finds the score with `place` greater or equal ones between two others, in some passes.

    Args:
        rows: what the scores are of.
        place: how many scores may be accepted.
        bracket: a score at or below the one looked for, and one at or above.
        budget: scores that may be collected; more are counted in bins, and `cut` stays None.
    """

    def __init__(self, rows: Rows, place: int, bracket: tuple[float, float], budget: int):
        self.rows, self.place, self.budget = rows, place, budget
        self.first, self.last = math.floor(bracket[0] * UNIT), math.ceil(bracket[1] * UNIT)
        self.cut: Cut | None = None
        self._restart()

    def _restart(self) -> None:
        reach = self.rows.bound
        self.low, self.high = self.first / UNIT - reach, self.last / UNIT + reach
        self.shift = max(0, (self.last - self.first).bit_length() - _FINE.bit_length() + 1)
        self.above, self.collected = 0, 0
        self.keys: list[Tensor] = []
        self.count_B: Tensor | None = None

    def add(self, tile: Tile) -> None:
        """Count what lies above the bracket; collect, or count in bins, what lies in it."""
        above, position_P = _split(tile.score, self.low, self.high)
        self.above += above
        if not len(position_P):
            return
        key_P = tile.keys(position_P)
        self.above += int((key_P > self.last).sum())
        self.keys.append(key_P[(key_P >= self.first) & (key_P <= self.last)])
        self.collected += len(self.keys[-1])
        if self.count_B is not None or self.collected > self.budget:
            self._count()

    def _count(self) -> Tensor:
        if self.count_B is None:
            self.count_B = torch.zeros(_FINE, dtype=torch.int64, device=self.rows.unit.device)
        for key_P in self.keys:
            self.count_B += torch.bincount((key_P - self.first) >> self.shift, minlength=_FINE)
        self.keys = []
        return self.count_B

    def merge(self, world: World | None) -> None:
        """Join with the other ranks, then find the cut, or narrow the bracket to one bin."""
        device = self.rows.unit.device
        mine = (self.above, self.collected, int(self.count_B is not None))
        counts = over_ranks(torch.tensor(mine, device=device), world)
        self.above, collected, counted = counts.tolist()
        if not counted and collected <= self.budget:
            nothing = torch.empty(0, dtype=torch.int64, device=device)
            key_P = _joined(torch.cat([*self.keys, nothing]), world)
            self.cut = _cut(key_P, self.place, self.above)
            self.keys = []
        else:
            self._narrow(over_ranks(self._count(), world))

    def _narrow(self, count_B: Tensor) -> None:
        at, above = _bin_of(count_B, self.place - self.above)
        first = self.first + (at << self.shift)
        if self.shift == 0:  # a bin is a single score
            self.cut = Cut(first, self.above + above)
            return
        self.first, self.last = first, min(self.last, first + (1 << self.shift) - 1)
        self._restart()
