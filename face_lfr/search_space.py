"""Which PolyFaces fit a budget of operations, and a spread of them to try.

Our search, not the paper's: arXiv 1909.00632 calls its network searched, but neither describes nor
releases the procedure. The space is the authors' own family of networks (trojans-face-recognizer,
EfficientPolyFace/EfficientPolyFace.py): the blocks of the three stages, the side f of the last map
and with it the input of 43 + 32 f pixels, the width D of the embedding, and for budgets far below
the challenge's a multiple of the channels. Cost is what the challenge's organisers count (see
`face_lfr.flops`), taken from the closed form: a network is built only to be trained.

Letters: A, B, C the blocks of the stages, N candidates, K coordinates.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.log import InputError
from face_lfr.flops import closed_form, closed_form_parts

MOST_BLOCKS = 200  # of a stage: the costs of all (A, B, C) are one array
FIRST_SIZE, SIZE_STEP = 43, 32  # pixels of the input: 43 + 32 f


@dataclass
class Space:
    """Bounds of the space; see configs/search.yaml."""

    blocks: list[int] = field(default_factory=lambda: [1, 100])  # fewest and most of a stage
    stage_share: list[float] = field(default_factory=lambda: [0.15, 0.6])  # of all blocks
    maps: list[int] = field(default_factory=lambda: [4, 5, 6, 7])  # f
    features: list[int] = field(default_factory=lambda: [256, 512])
    widths: list[float] = field(default_factory=lambda: [1.0])


class Candidate(NamedTuple):
    """A network of the space; `operations` as the organisers count them, for one image."""

    blocks: tuple[int, int, int]
    input_size: int
    features: int
    width: float
    operations: int

    @property
    def name(self) -> str:
        """For instance a23b38c23_235px_d256; the width follows where it is not 1."""
        a, b, c = self.blocks
        width = "" if self.width == 1 else f"_w{self.width:g}"
        return f"a{a}b{b}c{c}_{self.input_size}px_d{self.features}{width}"

    @property
    def gflops(self) -> float:
        """The cost in units of 1e9 operations."""
        return self.operations / 1e9

    @property
    def params(self) -> int:
        """Parameters of the network."""
        return closed_form(self.blocks, self.input_size, self.features, self.width)["params"]

    def node(self) -> dict[str, int | float | list[int]]:
        """Arguments of the model that a candidate decides, but for the size of its input."""
        return {"blocks": list(self.blocks), "features": self.features, "width": self.width}


class Fitting(NamedTuple):
    """The candidates within a budget, by name, and the ends of the whole space."""

    candidates: list[Candidate]
    cheapest: Candidate
    dearest: Candidate
    total: int  # networks of the space


def check_space(space: Space) -> None:
    """Refuse bounds that describe no network.

    Raises:
        InputError: names the field.
    """
    if len(space.blocks) != 2 or not 1 <= space.blocks[0] <= space.blocks[1] <= MOST_BLOCKS:
        what = f"needs the fewest and the most of a stage, from 1 to {MOST_BLOCKS}"
        raise InputError("space.blocks", what, list(space.blocks))
    share = list(space.stage_share)
    if len(share) != 2 or not 0 <= share[0] <= 1 / 3 <= share[1]:
        what = "needs a lower bound of at most 1/3 and an upper one of at least 1/3"
        raise InputError("space.stage_share", what, share)
    for name in ("maps", "features", "widths"):
        values = list(getattr(space, name))
        if not values or min(values) <= 0:
            raise InputError(f"space.{name}", "needs at least one, all above 0", values)


def fitting(space: Space, budget_gflops: float, fit: Sequence[float]) -> Fitting:
    """All networks of the space that cost between `fit[0]` and `fit[1]` of the budget.

    Raises:
        InputError: no such network (the message names the cheapest and the dearest of the space),
            or bounds that make no sense.
    """
    check_space(space)
    if not 0 < budget_gflops < math.inf:
        raise InputError("budget_gflops", "must be above 0", budget_gflops)
    if len(fit) != 2 or not 0 <= fit[0] < fit[1] <= 1:
        raise InputError("fit", "needs two rising shares of the budget in [0, 1]", list(fit))
    blocks_N3 = _block_counts(space)
    low, high = (share * budget_gflops * 1e9 for share in fit)
    found: list[Candidate] = []
    ends: list[Candidate] = []
    for f, features, width in product(space.maps, space.features, space.widths):
        size = FIRST_SIZE + SIZE_STEP * f
        cost_N = _costs(blocks_N3, size, features, width)
        wanted_N = np.flatnonzero((cost_N >= low) & (cost_N <= high))
        for group, rows in ((found, wanted_N), (ends, [cost_N.argmin(), cost_N.argmax()])):
            for row in rows:
                a, b, c = (int(count) for count in blocks_N3[row])
                group.append(Candidate((a, b, c), size, features, width, int(cost_N[row])))
    ends.sort(key=lambda candidate: candidate.operations)
    if not found:
        what = f"no network costs {fit[0]:.0%} to {fit[1]:.0%} of it ({_ends(ends)})"
        raise InputError("budget_gflops", what, f"{budget_gflops:g}")
    total = len(blocks_N3) * len(ends) // 2
    return Fitting(found, ends[0], ends[-1], total)


def _ends(ends: Sequence[Candidate]) -> str:
    cheapest, dearest = (f"{end.name} with {end.gflops:.4g} G" for end in (ends[0], ends[-1]))
    return f"cheapest {cheapest}, dearest {dearest}"


def _block_counts(space: Space) -> NDArray[np.int64]:
    """(N, 3) blocks of the stages, each stage within its share of all."""
    side = np.arange(space.blocks[0], space.blocks[1] + 1)
    grid_N3 = np.stack(np.meshgrid(side, side, side, indexing="ij"), axis=-1).reshape(-1, 3)
    share_N3 = grid_N3 / grid_N3.sum(axis=1, keepdims=True)
    low, high = space.stage_share
    inside_N = ((share_N3 >= low) & (share_N3 <= high)).all(axis=1)
    found: NDArray[np.int64] = grid_N3[inside_N]
    return found


def _costs(blocks_N3: NDArray[np.int64], size: int, features: int, width: float) -> NDArray:
    """(N,) operations: the blocks of a stage all cost the same."""
    parts = closed_form_parts(size, features, width)
    each = np.array([parts[stage].cost.organiser for stage in "abc"], dtype=np.int64)
    fixed = sum(part.cost.organiser for name, part in parts.items() if name not in "abc")
    return blocks_N3 @ each + fixed


def spread(
    candidates: Sequence[Candidate], count: int, seed: int, include: Sequence[str] = ()
) -> list[Candidate]:
    """At most `count` candidates that differ much; the same for the same seed.

    The rule: the named ones come first (without any, one drawn with the seed), then again and again
    the candidate that is farthest from its nearest chosen one. Coordinates are the logarithms of
    all blocks, of the input size, the embedding's width and the channels' width, and the shares of
    stages A and B, each scaled to [0, 1] over the candidates; equal distances go to the first in
    the order of the space. More candidates begin with the same ones.

    Raises:
        InputError: `count` is below 1, or a name is not among the candidates.
    """
    if count < 1:
        raise InputError("candidates", "must be at least 1", count)
    row_of = {candidate.name: row for row, candidate in enumerate(candidates)}
    for name in include:
        if name not in row_of:
            what = f"is not among the {len(candidates)} candidates that fit the budget"
            raise InputError("include", what, name)
    point_NK = _coordinates(candidates)
    first = int(np.random.default_rng(seed).integers(len(candidates)))
    chosen = list(dict.fromkeys(row_of[name] for name in include)) or [first]
    near_N = np.full(len(candidates), np.inf)
    for row in chosen:
        near_N = np.minimum(near_N, _distances(point_NK, row))
    while len(chosen) < min(count, len(candidates)):
        near_N[chosen] = -1.0  # of two at one place the second is still a candidate
        chosen.append(int(near_N.argmax()))
        near_N = np.minimum(near_N, _distances(point_NK, chosen[-1]))
    return [candidates[row] for row in chosen[: max(count, len(include))]]


def _distances(point_NK: NDArray[np.float64], row: int) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.linalg.norm(point_NK - point_NK[row], axis=1)
    return found


def _coordinates(candidates: Sequence[Candidate]) -> NDArray[np.float64]:
    """(N, K) in [0, 1]; a coordinate in which nothing differs is 0."""
    blocks_N3 = np.array([candidate.blocks for candidate in candidates], dtype=np.float64)
    rest = [(item.input_size, item.features, item.width) for item in candidates]
    total_N1 = blocks_N3.sum(axis=1, keepdims=True)
    plain_NK = np.hstack([np.log(total_N1), blocks_N3[:, :2] / total_N1, np.log(np.array(rest))])
    low_K, high_K = plain_NK.min(axis=0), plain_NK.max(axis=0)
    scaled: NDArray[np.float64] = (plain_NK - low_K) / np.where(high_K > low_K, high_K - low_K, 1)
    return scaled


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points (cost, score) no other beats in one of the two and equals in the other.

    Of equal points all are in the set.
    """
    return [
        not any(x <= cost and y >= score and (x, y) != (cost, score) for x, y in points)
        for cost, score in points
    ]
