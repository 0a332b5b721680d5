"""Speed of the measures, of tuning an ensemble and of the wLSEP loss, on one thread.

Every row compares outputs first, then times both sides in turns in this process. The sizes are
those of the validation set of Multi-Moments in Time: 10,000 videos, 313 classes, two labels a video
on average.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from video_mmit.benchmarks.results import Row, measure, row
from video_mmit.ensemble import cross_fit, tune
from video_mmit.losses import wlsep
from video_mmit.metrics import macro_map, micro_map, mmit_map

CLASSES = 313
Score = Callable[[], float]


class Problem(NamedTuple):
    """Logits and labels, both (videos, classes)."""

    score: NDArray[np.float32]
    target: NDArray[np.bool_]


def metric_rows(repeats: int, quick: bool = False, seed: int = 0) -> Iterator[Row]:
    """Measures against scikit-learn, then tuning and the loss; `quick` is ten times smaller."""
    case = problem(1000 if quick else 10_000, seed)
    shape = f"{len(case.score)}x{CLASSES}"
    for name, ours, peer, theirs in comparisons(case):
        difference = abs(ours() - theirs())
        _agree(name, peer, difference, 1e-12)
        # a peer that takes seconds is called three times
        timed = measure(ours, theirs, repeats if quick else min(repeats, 3))
        yield row(name, shape, peer) | timed | {"max_abs_diff": difference}
    yield tuning_row(case, seed)
    yield wlsep_row(16 if quick else 64, repeats, seed)


def problem(videos: int, seed: int) -> Problem:
    """Frequencies of classes as 1/rank, two labels a video, scores that know something of them."""
    rng = np.random.default_rng(seed)
    frequency = 1 / np.arange(1, CLASSES + 1)
    target = rng.random((videos, CLASSES)) < 2 * frequency / frequency.sum()
    target[np.arange(videos), rng.integers(0, CLASSES, videos)] |= ~target.any(axis=1)
    score = rng.standard_normal((videos, CLASSES), dtype=np.float32) + 2 * target
    return Problem(score.astype(np.float32), target)


def comparisons(case: Problem) -> Iterator[tuple[str, Score, str, Score]]:
    """Name, our call, name of the peer, its call."""
    from sklearn.metrics import average_precision_score, label_ranking_average_precision_score

    def per_video() -> float:
        pairs = zip(case.target, case.score, strict=True)
        return float(np.mean([average_precision_score(t, s) for t, s in pairs]))

    def lrap() -> float:
        return float(label_ranking_average_precision_score(case.target, case.score))

    def per_class() -> float:
        known = case.target.any(axis=0)
        return float(average_precision_score(case.target[:, known], case.score[:, known]))

    def micro() -> float:
        return float(average_precision_score(case.target, case.score, average="micro"))

    table = (case.score, case.target)
    yield "mmit mAP", partial(mmit_map, *table), "scikit-learn AP per video", per_video
    yield "mmit mAP", partial(mmit_map, *table), "scikit-learn LRAP", lrap
    yield "macro mAP", partial(macro_map, *table), "scikit-learn AP, macro", per_class
    yield "micro mAP", partial(micro_map, *table), "scikit-learn AP, micro", micro


def tuning_row(case: Problem, seed: int) -> Row:
    """Weights of five members and their cross-fitted figure, once."""
    rng = np.random.default_rng(seed)
    noise = (0.5, 1.0, 1.5, 2.0, 4.0)
    scores = [case.score + x * rng.standard_normal(case.score.shape) for x in noise]
    ids = [f"{number}.mp4" for number in range(len(case.score))]
    start = time.perf_counter()
    tune(scores, case.target, mmit_map)
    middle = time.perf_counter()
    cross_fit(scores, case.target, mmit_map, ids)
    note = f"once, in steps of 0.05; {time.perf_counter() - middle:.1f} s more for two halves"
    found = row("tune 5 members", f"{len(case.score)}x{CLASSES}", "none", note)
    return found | {"ours_ms": (middle - start) * 1e3}


def wlsep_row(batch: int, repeats: int, seed: int) -> Row:
    """Value and gradient against the comparison of all pairs."""
    case = problem(batch, seed)
    score = torch.from_numpy(case.score).double().requires_grad_()
    target = torch.from_numpy(case.target).double()

    def gradient(loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return torch.autograd.grad(loss(score, target), score)[0]

    difference = float((gradient(wlsep) - gradient(all_pairs)).abs().max())
    _agree("wLSEP", "all pairs", difference, 1e-10)
    timed = measure(partial(gradient, wlsep), partial(gradient, all_pairs), repeats)
    found = row("wLSEP, forward and backward", f"{batch}x{CLASSES}", "all pairs, N x K x K")
    return found | timed | {"max_abs_diff": difference}


def all_pairs(score_NK: Tensor, target_NK: Tensor) -> Tensor:
    """The definition of wLSEP, on the differences of every class with every other."""
    gap_NKK = score_NK[:, :, None] - score_NK[:, None, :]
    used_NKK = (1 - target_NK)[:, :, None] * target_NK[:, None, :]
    term_NK = (1 + (gap_NKK.exp() * used_NKK).sum(dim=1)).log()
    return (term_NK * target_NK).sum() / target_NK.sum()


def _agree(name: str, peer: str, difference: float, limit: float) -> None:
    if not difference <= limit:
        raise RuntimeError(f"{name} differs from {peer} by {difference}, more than {limit}")
