"""Training sets by draw number, and the frames of an evaluation.

A draw is a function of (seed, draw number) alone: whoever asks for draw 17 gets the same frames,
on any rank, in any worker and after any restart. The sampler yields draw numbers; the data sets
are endless (`len` is 2**62), so they need `shuffle=False`.

Shapes: D sets of a draw, T frames of a set, C channels, H rows, W columns, B inner boundaries.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.log import InputError, get_logger
from reid_rqen.data.boundaries import check_covered
from reid_rqen.data.tracklet import Tracklet
from reid_rqen.data.transforms import Cache, FlowTransform, FrameTransform

ENDLESS = 2**62
Transform = FrameTransform | FlowTransform
Boundaries = Mapping[Path, np.ndarray]


class Draw(NamedTuple):
    """Which frames make up a draw: rows of the tracklet list (D,), frame positions (D, T)."""

    tracklet: tuple[int, ...]
    frames: np.ndarray


class SetItem(NamedTuple):
    """The sets of one draw.

    `image` (D, T, C, H, W) is what the transform's `load` returns (uint8, or float32 for flow),
    `pid` and `camid` (D,) int64, `boundaries` (D, T, B) float32 with B = 0 when there are none.
    """

    image: Tensor
    pid: Tensor
    camid: Tensor
    boundaries: Tensor


class SetDraws(Dataset[SetItem]):
    """What the draws share: frames within a tracklet, decoding, and unreadable files.

    Args:
        tracklets: training tracklets, pid = label.
        transform: loads the frames of a set.
        frames: T, frames of a set.
        seed: of the draws; any non-negative number.
        sample: "uniform" draws T different frames, in temporal order; "window" draws T
            neighbours, which recurrent and flow models need.
        short: what happens to a tracklet of fewer than T frames. "replace" draws with
            replacement ("window" repeats the last frame); "error" refuses it at construction.
        boundaries: {frame path: (B,)} of `load_boundaries`.
        cache: keep resized frames in memory; for small sets (one copy per worker).
        max_bad_items: draws with an unreadable file that are replaced by another draw before
            training stops, counted over all workers of this process. Each is logged with its path.

    Raises:
        ValueError: an argument is not accepted.
        InputError: no tracklets, a short one with `short="error"`, a frame without boundaries.
    """

    def __init__(
        self,
        tracklets: Sequence[Tracklet],
        transform: Transform,
        frames: int = 8,
        seed: int = 0,
        sample: str = "uniform",
        short: str = "replace",
        boundaries: Boundaries | None = None,
        cache: bool = False,
        max_bad_items: int = 0,
    ):
        if frames < 1 or seed < 0:
            raise ValueError(f"frames={frames} must be positive and seed={seed} not negative")
        _accept("sample", sample, "uniform", "window")
        _accept("short", short, "replace", "error")
        if boundaries is not None and getattr(transform, "crop", None):
            raise ValueError("boundaries are fractions of the whole image: crop must be 0")
        _check_tracklets(tracklets, boundaries, least=frames if short == "error" else 1)
        self.tracklets, self.transform = list(tracklets), transform
        self.frames, self.seed, self.sample = frames, seed, sample
        self.boundaries, self.max_bad_items = boundaries, max_bad_items
        self.cache: Cache | None = {} if cache else None
        self._bad = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return ENDLESS

    @property
    def bad_items(self) -> int:
        """Draws replaced so far because a file of theirs could not be read."""
        return int(self._bad)

    def draw(self, index: int) -> Draw:
        """Say which frames draw `index` consists of, without decoding them."""
        return self._draw(np.random.default_rng([self.seed, index]))

    def __getitem__(self, index: int) -> SetItem:
        entropy = [self.seed, index]
        while True:
            rng = np.random.default_rng(entropy)
            try:
                return self._load(self._draw(rng), rng)
            except InputError as error:
                self._count_bad(error)
            entropy.append(len(entropy))  # the replacement depends on (seed, draw) as well

    def _choose(self, rng: np.random.Generator) -> Sequence[int]:
        """Rows of the tracklets whose sets make up a draw."""
        raise NotImplementedError

    def _draw(self, rng: np.random.Generator) -> Draw:
        rows = tuple(int(row) for row in self._choose(rng))
        return Draw(rows, np.stack([self._frames(rng, row) for row in rows]))

    def _frames(self, rng: np.random.Generator, row: int) -> np.ndarray:
        count = len(self.tracklets[row].frames)
        if self.sample == "window":
            start = rng.integers(max(count - self.frames, 0) + 1)
            return np.minimum(np.arange(start, start + self.frames), count - 1)
        if count < self.frames:
            return np.sort(rng.integers(count, size=self.frames))
        return np.sort(rng.permutation(count)[: self.frames])

    def _load(self, draw: Draw, rng: np.random.Generator) -> SetItem:
        chosen = [self.tracklets[row] for row in draw.tracklet]
        paths = [
            [tracklet.frames[i] for i in spots]
            for tracklet, spots in zip(chosen, draw.frames, strict=True)
        ]
        return SetItem(
            torch.stack([self.transform.load(p, rng, self.cache) for p in paths]),
            torch.tensor([tracklet.pid for tracklet in chosen]),
            torch.tensor([tracklet.camid for tracklet in chosen]),
            torch.stack([_boundaries(self.boundaries, p) for p in paths]),
        )

    def _count_bad(self, error: InputError) -> None:
        self._bad += 1
        if self.bad_items > self.max_bad_items:
            raise error
        get_logger(__name__).warning(
            "draw replaced (%d of at most %d): %s", self.bad_items, self.max_bad_items, error
        )


class TripletDraws(SetDraws):
    """Anchor, positive and negative set (D = 3) by the reference's rule.

    The views of the three sets are drawn first, each uniformly and independently; then the
    anchor's identity, uniformly among those seen in the anchor's and in the positive's view; then
    the negative's, uniformly among the others seen in its view. A (view, view) pair without a
    common identity is drawn again. This is the LPW script of sciencefans/Quality-Aware-Network,
    with views of the same number pooled over scenes; with two cameras that both see everyone
    (PRID 2011, iLIDS-VID) it is also its PRID script, which draws two identities and then three
    cameras. When one person has several tracklets in a view (MARS), one is drawn uniformly.

    In the reference anchor and positive often are the same tracklet (every second time for two
    cameras): `positive="any_view"`. `positive="cross_view"` asks for two different views.
    """

    def __init__(
        self,
        tracklets: Sequence[Tracklet],
        transform: Transform,
        frames: int = 8,
        seed: int = 0,
        positive: str = "any_view",
        sample: str = "uniform",
        short: str = "replace",
        boundaries: Boundaries | None = None,
        cache: bool = False,
        max_bad_items: int = 0,
    ):
        super().__init__(
            tracklets, transform, frames, seed, sample, short, boundaries, cache, max_bad_items
        )
        _accept("positive", positive, "any_view", "cross_view")
        if len({tracklet.pid for tracklet in tracklets}) < 2:
            raise InputError("tracklets", "a triplet needs two identities", len(tracklets))
        self._rows: dict[tuple[int, int], list[int]] = defaultdict(list)
        for row, tracklet in enumerate(self.tracklets):
            self._rows[tracklet.group, tracklet.pid].append(row)
        self._views = sorted({view for view, _ in self._rows})
        self._ids = {v: sorted(pid for view, pid in self._rows if view == v) for v in self._views}
        self._spot = {v: {pid: i for i, pid in enumerate(ids)} for v, ids in self._ids.items()}
        self._pairs = self._common(same=positive == "any_view")
        if not self._pairs:
            raise InputError("tracklets", "no identity is seen in two views", positive)

    def _common(self, *, same: bool) -> list[tuple[int, int, list[int]]]:
        """(anchor view, positive view, identities seen in both), without the empty pairs."""
        pairs = [(u, v) for u in self._views for v in self._views if same or u != v]
        common = [(u, v, [p for p in self._ids[u] if p in self._spot[v]]) for u, v in pairs]
        return [entry for entry in common if entry[2]]

    def _choose(self, rng: np.random.Generator) -> Sequence[int]:
        anchor, positive, identities = self._pairs[rng.integers(len(self._pairs))]
        pid = identities[rng.integers(len(identities))]
        chosen = ((anchor, pid), (positive, pid), self._negative(rng, pid))
        return [self._one(rng, self._rows[key]) for key in chosen]

    def _negative(self, rng: np.random.Generator, pid: int) -> tuple[int, int]:
        while True:  # ends: some view shows another identity
            view = self._views[rng.integers(len(self._views))]
            others, spot = self._ids[view], self._spot[view].get(pid)
            if spot is None:
                return view, others[rng.integers(len(others))]
            if len(others) > 1:
                pick = rng.integers(len(others) - 1)
                return view, others[pick + (pick >= spot)]

    def _one(self, rng: np.random.Generator, rows: list[int]) -> int:
        return rows[0] if len(rows) == 1 else rows[rng.integers(len(rows))]


class PKDraws(SetDraws):
    """P identities x K sets (D = P*K, sets of one identity adjacent), for batch-hard triplets.

    The K sets of an identity come from different tracklets as far as it has them. Arguments as
    for `SetDraws`; `identities` is P and `sets` is K.
    """

    def __init__(
        self,
        tracklets: Sequence[Tracklet],
        transform: Transform,
        identities: int = 8,
        sets: int = 4,
        frames: int = 8,
        seed: int = 0,
        sample: str = "uniform",
        short: str = "replace",
        boundaries: Boundaries | None = None,
        cache: bool = False,
        max_bad_items: int = 0,
    ):
        super().__init__(
            tracklets, transform, frames, seed, sample, short, boundaries, cache, max_bad_items
        )
        rows = defaultdict(list)
        for row, tracklet in enumerate(self.tracklets):
            rows[tracklet.pid].append(row)
        if not 1 <= identities <= len(rows) or sets < 1:
            raise ValueError(
                f"identities={identities} must be in [1, {len(rows)}] and sets={sets} positive"
            )
        self.identities, self.sets = identities, sets
        self._rows = [rows[pid] for pid in sorted(rows)]

    def _choose(self, rng: np.random.Generator) -> Sequence[int]:
        chosen: list[int] = []
        for identity in rng.permutation(len(self._rows))[: self.identities]:
            chosen += np.resize(rng.permutation(self._rows[identity]), self.sets).tolist()
        return chosen


class FrameDraws(SetDraws):
    """One set of one frame, uniform over all training frames: the frame classifier's batches."""

    def __init__(
        self,
        tracklets: Sequence[Tracklet],
        transform: Transform,
        seed: int = 0,
        boundaries: Boundaries | None = None,
        cache: bool = False,
        max_bad_items: int = 0,
    ):
        super().__init__(
            tracklets, transform, 1, seed, boundaries=boundaries, cache=cache,
            max_bad_items=max_bad_items,
        )  # fmt: skip
        self._offsets = _offsets(self.tracklets)

    def _draw(self, rng: np.random.Generator) -> Draw:
        frame = rng.integers(self._offsets[-1])
        row = int(np.searchsorted(self._offsets, frame, side="right")) - 1
        return Draw((row,), np.array([[frame - self._offsets[row]]]))


class FrameItem(NamedTuple):
    """One frame (C, H, W), the row of its tracklet, and its boundaries (B,), B = 0 without."""

    image: Tensor
    tracklet: int
    boundaries: Tensor


class TrackletFrames(Dataset[FrameItem]):
    """All frames of all tracklets in order, for models that look at single frames.

    Batches may mix tracklets. An unreadable file stops the evaluation (`InputError`).
    """

    def __init__(
        self,
        tracklets: Sequence[Tracklet],
        transform: FrameTransform,
        boundaries: Boundaries | None = None,
    ):
        _check_tracklets(tracklets, boundaries)
        self.tracklets, self.transform = list(tracklets), transform
        self.boundaries = boundaries
        self.offsets = _offsets(self.tracklets)

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def __getitem__(self, index: int) -> FrameItem:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = int(np.searchsorted(self.offsets, index, side="right")) - 1
        path = self.tracklets[row].frames[index - int(self.offsets[row])]
        return FrameItem(
            self.transform.load([path])[0], row, _boundaries(self.boundaries, [path])[0]
        )


class SequenceItem(NamedTuple):
    """All frames of one tracklet (V, T, C, H, W), its row, and its boundaries (T, B).

    V views (crops, mirrors) where the transform has several for a test, else 1.
    """

    image: Tensor
    tracklet: int
    boundaries: Tensor


class TrackletSequences(Dataset[SequenceItem]):
    """One whole tracklet per item, for models of order or motion."""

    def __init__(
        self,
        tracklets: Sequence[Tracklet],
        transform: Transform,
        boundaries: Boundaries | None = None,
    ):
        _check_tracklets(tracklets, boundaries)
        self.tracklets, self.transform = list(tracklets), transform
        self.boundaries = boundaries

    def __len__(self) -> int:
        return len(self.tracklets)

    def __getitem__(self, index: int) -> SequenceItem:
        paths = self.tracklets[index].frames
        several = getattr(self.transform, "views", None)
        image_VTCHW = self.transform.load(paths)[None] if several is None else several(paths)
        return SequenceItem(image_VTCHW, index, _boundaries(self.boundaries, paths))


def _accept(argument: str, value: str, *accepted: str) -> None:
    if value not in accepted:
        raise ValueError(f"{argument}={value!r}; accepted: {', '.join(accepted)}")


def _check_tracklets(
    tracklets: Sequence[Tracklet], boundaries: Boundaries | None, least: int = 1
) -> None:
    if not tracklets:
        raise InputError("tracklets", "there are none")
    for tracklet in tracklets:
        if not tracklet.frames:
            raise InputError(f"tracklet of identity {tracklet.pid}", "has no frame")
        if len(tracklet.frames) < least:
            where = tracklet.frames[0].parent
            raise InputError(where, f"tracklet has fewer than {least} frames", len(tracklet.frames))
    if boundaries is not None:
        check_covered(tracklets, boundaries)


def _offsets(tracklets: Sequence[Tracklet]) -> np.ndarray:
    return np.cumsum([0] + [len(tracklet.frames) for tracklet in tracklets])


def _boundaries(table: Boundaries | None, paths: Sequence[Path]) -> Tensor:
    """(T, B) float32; B = 0 without a table."""
    if table is None:
        return torch.zeros(len(paths), 0)
    return torch.from_numpy(np.stack([table[path] for path in paths]))
