"""Speed and memory of the margined softmax; run by `python -m face_lfr.benchmarks`.

Every row is forward and backward, products with the centres included, from unit features and
centres. Values and gradients are compared first, then both sides are timed in turns and their peak
memory is taken: on CUDA from the allocator, on a CPU as the results of operators that are alive at
a time, which leaves out what an operator allocates inside itself. ArcNegFace against the plain
cross entropy compares the costs of different losses; the row above it, without a margin, shows that
values agree where they should.

Letters: B images of a batch, D embedding width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple
from weakref import finalize

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from face_lfr.benchmarks.peer_margin import (
    arcface_in_place,
    arcnegface_eager,
    arcnegface_loop,
    plain_cross_entropy,
)
from face_lfr.benchmarks.results import Row, measure, row
from face_lfr.margins import ArcFace, ArcNegFace, Margin, NormSoftmax
from face_lfr.ops.margin_softmax import margin_softmax

QUICK_SHAPES = ((128, 10_000),)  # B, C
SHAPES = ((128, 10_000), (512, 10_000), (128, 93_431), (512, 93_431))  # 93,431: MS1MV3
WIDTH, SCALE, M, ALPHA = 256, 64.0, 0.5, 1.2  # D of PolyFace; s, m, alpha of arXiv 1909.00632
TOLERANCE = 1e-4
LOOP = "loop over the batch (authors)"
LOOP_ENTRIES = 2e7  # of B x C: each image copies the whole gradient in its backward pass

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Case(NamedTuple):
    """Unit features and centres with a graph, and labels."""

    feature_BD: Tensor
    weight_CD: Tensor
    label_B: Tensor

    @property
    def label(self) -> str:
        count, width = self.feature_BD.shape
        return f"{count}x{width}, {len(self.weight_CD)} classes"


class Pair(NamedTuple):
    """Two sides of a row; `same` when their values must agree."""

    name: str
    ours: Loss
    peer_name: str
    peer: Loss
    same: bool = True
    note: str = ""


def margin_rows(
    repeats: int, device: torch.device, quick: bool = False, seed: int = 0
) -> Iterator[Row]:
    """Rows of every shape against every peer; one shape when `quick`."""
    for count, classes in QUICK_SHAPES if quick else SHAPES:
        case = problem(count, classes, device, seed)
        for pair in pairs():
            if pair.peer_name == LOOP and device.type == "cpu" and count * classes > LOOP_ENTRIES:
                yield _row(pair, case, "not measured: the loop takes minutes here on a CPU")
            else:
                yield compare(pair, case, repeats)


def pairs() -> list[Pair]:
    """The comparisons, ours against each peer."""
    negative, identity = ArcNegFace(M, ALPHA), ArcFace(M, "identity")
    cost = "different losses, costs only"
    return [
        Pair("ArcNegFace", ours(negative), LOOP,
             partial(arcnegface_loop, scale=SCALE, m=M, alpha=ALPHA)),
        Pair("ArcNegFace", ours(negative), "whole-matrix operators",
             partial(arcnegface_eager, scale=SCALE, m=M, alpha=ALPHA)),
        Pair("ArcFace, identity gradient", ours(identity), "insightface arcface_torch",
             partial(arcface_in_place, scale=SCALE, m=M)),
        Pair("no margin", ours(NormSoftmax()), "F.cross_entropy",
             partial(plain_cross_entropy, scale=SCALE)),
        Pair("ArcNegFace", ours(negative), "F.cross_entropy, no margin",
             partial(plain_cross_entropy, scale=SCALE), same=False, note=cost),
    ]  # fmt: skip


def ours(margin: Margin) -> Loss:
    """The operator of this package with a margin."""
    return partial(margin_softmax, margin=margin, scale=SCALE)


def problem(count: int, classes: int, device: torch.device, seed: int, width: int = WIDTH) -> Case:
    """Features at about 73 degrees from their centres, where probabilities are neither 0 nor 1."""
    generator = torch.Generator().manual_seed(seed)
    weight_CD = F.normalize(torch.randn(classes, width, generator=generator))
    label_B = torch.randint(classes, (count,), generator=generator)
    noise_BD = F.normalize(torch.randn(count, width, generator=generator))
    feature_BD = F.normalize(0.3 * weight_CD[label_B] + noise_BD)
    leaves = [tensor.to(device).requires_grad_() for tensor in (feature_BD, weight_CD)]
    return Case(leaves[0], leaves[1], label_B.to(device))


def compare(pair: Pair, case: Case, repeats: int) -> Row:
    """One row: equality, times, memory.

    Raises:
        RuntimeError: the two sides should give the same and do not.
    """
    mine, theirs = partial(step, pair.ours, case), partial(step, pair.peer, case)
    found = _row(pair, case, pair.note)
    if pair.same:
        difference = max(map(_difference, mine(), theirs()))
        if not difference <= TOLERANCE:
            raise RuntimeError(
                f"{pair.name} differs from {pair.peer_name} by {difference}, more than {TOLERANCE}"
            )
        found["max_abs_diff"] = difference
    timed = measure(mine, theirs, repeats)
    notes = [text for text in (found.get("note"), timed.pop("note", None)) if text]
    device = case.feature_BD.device
    found |= timed | {"ours_mib": peak_mib(mine, device), "peer_mib": peak_mib(theirs, device)}
    return found | ({"note": "; ".join(notes)} if notes else {})


def _row(pair: Pair, case: Case, note: str) -> Row:
    return row(f"{pair.name}, forward and backward", case.label, pair.peer_name, note)


def step(loss: Loss, case: Case) -> tuple[Tensor, ...]:
    """The loss and its gradients by features and centres."""
    value = loss(*case)
    return value.detach(), *torch.autograd.grad(value, case[:2])


def peak_mib(call: Callable[[], object], device: torch.device) -> float:
    """Greatest memory in MiB that a call holds at a time beyond what was held before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with _Held() as held:
        call()
    return held.peak / 2**20


class _Held(TorchDispatchMode):
    """Counts the bytes of the storages that operators return, for as long as these live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = {id(storage) for storage in _storages((args, kwargs))}
        found = func(*args, **(kwargs or {}))
        for storage in _storages(found):
            if id(storage) not in given and id(storage) not in self.sizes:
                self._add(storage)
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        self.sizes[id(storage)] = storage.nbytes()
        finalize(storage, self._remove, id(storage))
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)

    def _remove(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def _storages(tree: object) -> list[torch.UntypedStorage]:
    return [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _difference(mine: Tensor, theirs: Tensor) -> float:
    """Greatest difference, relative to the greatest entry."""
    gap = (mine.double() - theirs.double()).abs().max().item()
    return gap / max(theirs.abs().max().item(), 1e-12)
