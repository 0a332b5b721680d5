"""True positive rate at very low false positive rates over all pairs of images, exactly.

Positives are the unordered pairs of two images with one label, negatives those with different
labels of which at least one is known; two distractors (label -1) are no pair, since nobody knows
whether they show one person. The score is the cosine: the inner product of the rows after
normalisation, in float64. `face_lfr.metrics` says what the threshold is, and
`face_lfr.ops.pair_scores` how a score is taken so that the result depends on nothing but features
and labels: not on the order of the rows, the tile, the number of threads or ranks, or the device.

No matrix of all pairs exists at any time. Rates that allow at most `buffer` false accepts take one
pass over the negatives, any number of larger ones together two, and further passes where more than
`buffer` scores lie closer together than float32 tells apart. Memory beyond the features, for N rows
of width D, t = tile and b = buffer: 4*N*D bytes for float32 rows, 60*N for places and labels, about
64*t*t for tiles, 100*b for candidates and 16*b more for each rate that takes a second pass, and
64 MiB; on every rank.

The protocol is that of the Lightweight Face Recognition Challenge (deepinsight/insightface,
challenges/iccv19-lfr): images at 1e-8, videos at 1e-4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from rich.progress import Progress
from torch import Tensor

from common.dist import World
from common.log import InputError
from face_lfr.metrics import INTERVAL, OperatingPoint, allowed_accepts, operating_point
from face_lfr.ops.pair_scores import (
    EXCLUDED,
    Product,
    Rows,
    Tile,
    full_precision,
    negative_corners,
    positive_corners,
    sorted_rows,
)
from face_lfr.ops.pair_select import (
    LOWEST_KEY,
    RESOLUTION,
    Cut,
    Histogram,
    Reader,
    TopScores,
    Window,
    over_ranks,
)

PAIRS = ("all", "gallery_probe")
BUFFER = 2**22
# Side of a tile: its product stays in the cache of a processor; a GPU is kept busy between two
# looks of the host.
TILE = {"cpu": 1024, "cuda": 16384}
POSITIVE_TILE = 256  # near the diagonal a large tile is mostly negatives


@dataclass(frozen=True)
class Curve:
    """Points of a ROC plot, rates rising, from the histogram of float32 scores.

    Accepted is score >= threshold; thresholds are multiples of `resolution`. Unlike the operating
    points these counts are not exact: a score within about 1e-5 of a threshold (`Rows.bound`) may
    be counted on either side.
    """

    fpr: NDArray[np.float64]
    tpr: NDArray[np.float64]
    threshold: NDArray[np.float64]
    false_accepts: NDArray[np.int64]
    resolution: float = RESOLUTION


@dataclass(frozen=True)
class AllPairs:
    """The operating points in the order of the rates asked for."""

    points: tuple[OperatingPoint, ...]
    negatives: int
    positives: int
    distractors: int
    pairs: str
    passes: int  # over the negatives
    curve: Curve | None = None
    interval: str = INTERVAL

    def metrics(self) -> dict[str, float]:
        """Numbers by name: tpr, threshold, false_accepts and the interval's ends, `@` the rate."""
        found: dict[str, float] = {}
        for point in self.points:
            low, high = point.interval
            named = {"tpr": point.tpr, "tpr_low": low, "tpr_high": high}
            named |= {"threshold": point.threshold, "false_accepts": point.false_accepts}
            found |= {f"{name}@{point.fpr:g}": value for name, value in named.items()}
        sizes = ("negatives", "positives", "distractors")
        return found | {name: getattr(self, name) for name in sizes}


def all_pairs(
    features: ArrayLike,
    labels: ArrayLike,
    fprs: Sequence[float],
    pairs: str = "all",
    *,
    tile: int | None = None,
    device: str | torch.device | None = None,
    world: World | None = None,
    curve_points: int = 0,
    buffer: int = BUFFER,
    progress: Progress | None = None,
) -> AllPairs:
    """Score every pair once.

    Args:
        features: (N, D) numbers, not necessarily normalised; an array or a memory map, the same on
            every rank.
        labels: (N,) integers, -1 for a distractor.
        fprs: false positive rates in (0, 1]; all of them come out of the same passes.
        pairs: "all", or "gallery_probe": negatives are labelled images with distractors only.
        tile: side of a tile of pairs; by default 1024 on a CPU, 16384 on a GPU.
        device: where products are taken; by default that of `world`, else the CPU.
        world: ranks that share the work, all of which call this; None is this process alone.
        curve_points: about how many points of the ROC curve to return; 0 for none.
        buffer: candidates to keep; larger rates than these allow take a second pass.
        progress: a bar to show the passes on.

    Raises:
        InputError: malformed features or labels (a NaN or zero row, lengths that differ), no
            positive or no negative pair, a rate that is not in (0, 1] or less than one negative.
        ValueError: `pairs`, `tile`, `buffer` or `curve_points` is out of range.
    """
    _check_arguments(pairs, tile, buffer, curve_points)
    place = torch.device(device or (world.device if world else "cpu"))
    rows = sorted_rows(features, labels, place)
    negatives, positives = count_pairs(rows, pairs)
    allowed = [allowed_accepts(float(fpr), negatives) for fpr in fprs]
    scan = _Scan(rows, pairs, tile or TILE.get(place.type, TILE["cpu"]), world, progress)
    with full_precision(place):
        counts = Histogram(rows) if curve_points else None
        cuts = _cuts(scan, allowed, negatives, buffer, counts)
        accepted, matches = _positives(scan, cuts.values(), counts is not None)
        points = [
            operating_point(
                fpr, cuts[k].threshold, cuts[k].above, accepted[cuts[k]], negatives, positives
            )
            for fpr, k in zip(fprs, allowed, strict=True)
        ]
        curve = _curve(counts, matches, curve_points) if counts and matches else None
    distractors = len(rows) - rows.labelled
    return AllPairs(tuple(points), negatives, positives, distractors, pairs, scan.passes, curve)


def _check_arguments(pairs: str, tile: int | None, buffer: int, curve_points: int) -> None:
    if pairs not in PAIRS:
        raise ValueError(f"pairs={pairs!r}: must be one of {PAIRS}")
    if tile is not None and tile < 1:
        raise ValueError(f"tile={tile}: must be at least 1")
    if buffer < 1 or curve_points < 0:
        raise ValueError(f"buffer={buffer}, curve_points={curve_points}: must be 1, 0 or more")


def count_pairs(rows: Rows, pairs: str) -> tuple[int, int]:
    """Negative and positive pairs.

    Raises:
        InputError: one of them is 0.
    """
    known, others = rows.labelled, len(rows) - rows.labelled
    size_C = np.unique(rows.end, return_counts=True)[1].astype(object)  # no overflow
    positives = int((size_C * (size_C - 1) // 2).sum()) if known else 0
    inner = known * (known - 1) // 2 - positives if pairs == "all" else 0
    negatives = inner + known * others
    if not positives:
        raise InputError("labels", "no two images have one label; images with a label", known)
    if not negatives:
        what = "no two images of different identities; identities"
        if pairs == "gallery_probe":
            what = "gallery_probe needs distractors (-1); identities"
        raise InputError("labels", what, len(size_C))
    return negatives, positives


class _Scan:
    """Passes over the tiles; ranks take turns at them."""

    def __init__(
        self, rows: Rows, pairs: str, side: int, world: World | None, progress: Progress | None
    ):
        self.rows, self.pairs, self.world, self.progress = rows, pairs, world, progress
        self.side, self.passes = min(side, len(rows)), 0

    def negatives(self, readers: Sequence[Reader]) -> None:
        """Show every negative pair once to the readers."""
        self.passes += 1
        product = Product(self.rows, self.side)
        corners = partial(negative_corners, self.rows, self.pairs, self.side)
        for row, column in self._mine(corners, f"pass {self.passes} over all pairs"):
            tile = product.negatives(row, column)
            for reader in readers:
                reader.add(tile)
        for reader in readers:
            reader.merge(self.world)

    def positives(self) -> Iterator[tuple[Tile, Tensor]]:
        """Tiles of this rank, with the positions of their positive pairs."""
        product = Product(self.rows, min(self.side, POSITIVE_TILE))
        corners = partial(positive_corners, self.rows, product.side)
        for row, column in self._mine(corners, "positive pairs"):
            yield product.positives(row, column)

    def _mine(
        self, corners: Callable[[], Iterator[tuple[int, int]]], title: str
    ) -> Iterator[tuple[int, int]]:
        rank, size = (self.world.rank, self.world.size) if self.world else (0, 1)
        task = None
        if self.progress:
            task = self.progress.add_task(title, total=sum(1 for _ in corners()))
        for corner in islice(corners(), rank, None, size):
            yield corner
            if self.progress and task is not None:
                self.progress.advance(task, size)


def _cuts(
    scan: _Scan, allowed: Sequence[int], negatives: int, buffer: int, counts: Histogram | None
) -> dict[int, Cut]:
    """The threshold for every count of allowed false accepts."""
    cuts = {k: Cut(LOWEST_KEY, negatives) for k in allowed if k == negatives}
    wanted = sorted(set(allowed) - set(cuts))
    few = [k for k in wanted if k < buffer]
    top = TopScores(scan.rows, few[-1] + 1, buffer // 8) if few else None
    many = wanted[len(few) :]
    if many and counts is None:
        counts = Histogram(scan.rows)
    first: list[Reader] = [reader for reader in (top, counts) if reader is not None]
    if first:
        scan.negatives(first)
    if top is not None and top.overflow:
        many = wanted
        if counts is None:
            counts = Histogram(scan.rows)
            scan.negatives([counts])
    elif top is not None:
        cuts |= {k: top.cut(k) for k in few}
    if many and counts is not None:
        cuts |= _look(scan, {k: counts.bracket(k) for k in many}, buffer)
    return cuts


def _look(scan: _Scan, brackets: dict[int, tuple[float, float]], buffer: int) -> dict[int, Cut]:
    """Passes over the scores within the brackets, until every threshold is known."""
    windows = {k: Window(scan.rows, k, bracket, buffer) for k, bracket in brackets.items()}
    found: dict[int, Cut] = {}
    while len(found) < len(windows):
        scan.negatives([window for k, window in windows.items() if k not in found])
        found = {k: window.cut for k, window in windows.items() if window.cut is not None}
    return found


def _positives(
    scan: _Scan, cuts: Iterable[Cut], histogram: bool
) -> tuple[dict[Cut, int], Histogram | None]:
    """How many positives lie above each cut, and their histogram."""
    accepted = {
        cut: torch.zeros((), dtype=torch.int64, device=scan.rows.unit.device) for cut in cuts
    }
    counts = Histogram(scan.rows) if histogram else None
    for tile, position_P in scan.positives():
        score_P = tile.score[position_P]
        if counts is not None:
            counts.add_scores(score_P)
        for cut in accepted:
            accepted[cut] += _above(tile, position_P, score_P, cut)
    if counts is not None:
        counts.merge(scan.world)
    return {cut: int(over_ranks(count, scan.world)) for cut, count in accepted.items()}, counts


def _above(tile: Tile, position_P: Tensor, score_P: Tensor, cut: Cut) -> Tensor:
    """How many of the scores lie above the cut; only what float32 cannot tell is taken exactly."""
    if cut.key == LOWEST_KEY:
        return torch.tensor(len(score_P), device=score_P.device)
    reach = tile.rows.bound
    over_P = score_P > cut.threshold + reach
    near_P = (score_P >= cut.threshold - reach) & ~over_P
    key_P = tile.keys(position_P[near_P])
    return over_P.sum() + (key_P > cut.key).sum()


def _curve(negative: Histogram, positive: Histogram, points: int) -> Curve:
    """Bins whose rates are about evenly spread on a logarithmic axis, and the last."""
    false_B, true_B = (counts.reaching().cpu().numpy() for counts in (negative, positive))
    share = np.geomspace(1, false_B[0], points)
    at_T = np.unique(len(false_B) - np.searchsorted(false_B[::-1], share, side="left") - 1)[::-1]
    return Curve(
        fpr=false_B[at_T] / false_B[0],
        tpr=true_B[at_T] / true_B[0],
        threshold=(at_T * RESOLUTION + EXCLUDED).astype(np.float64),
        false_accepts=false_B[at_T],
    )
