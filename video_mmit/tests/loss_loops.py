"""Every loss once more, in loops of Python floats, and the program of one of two ranks.

`python -m video_mmit.tests.loss_loops` prints, as JSON, the gradients that a rank of the group in
the environment ends up with.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common import dist
from video_mmit.losses import bce, bce_weighted, bpmll, ce, lsep, warp, wlsep

Loss = Callable[..., Tensor]
WEIGHT = torch.tensor([1.0, 0.3, 0.7, 0.25, 0.5], dtype=torch.float64)
PLAIN: dict[str, Loss] = {f.__name__: f for f in (bce, wlsep, lsep, warp, bpmll, ce)}
WEIGHTED = (bce_weighted, wlsep, warp, bpmll)
EVERY = PLAIN | {f"weighted {f.__name__}": partial(f, weight_K=WEIGHT) for f in WEIGHTED}


def problem(rows: int = 6, seed: int = 0, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    """Distinct scores, and targets whose first rows have all positives, none, one and four."""
    generator = torch.Generator().manual_seed(seed)
    score = spread * torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    target = (torch.rand(rows, 5, generator=generator) < 0.4).double()
    special = torch.tensor([[1] * 5, [0] * 5, [0, 0, 1, 0, 0], [1, 1, 0, 1, 1]])
    target[:4] = special[:rows]
    return score, target


class Pairs(NamedTuple):
    """A positive class of a video: s_m - s_k for every negative m, and its rank."""

    k: int
    gap: list[float]
    rank: int


def pairs(score: Tensor, target: Tensor) -> list[list[Pairs]]:
    found = []
    for s, y in zip(score.tolist(), target.tolist(), strict=True):
        negative = [m for m in range(len(s)) if not y[m]]
        found.append(
            [
                Pairs(k, [s[m] - s[k] for m in negative], 1 + sum(other > s[k] for other in s))
                for k in range(len(s))
                if y[k]
            ]
        )
    return found


def loop_pairwise(name: str, score: Tensor, target: Tensor, weight: list[float]) -> float:
    found = pairs(score, target)
    entries = [entry for row in found for entry in row]
    if name == "wlsep":
        terms = [weight[e.k] * math.log(1 + sum(map(math.exp, e.gap))) for e in entries]
        return sum(terms) / len(terms)
    if name == "warp":
        total = 0.0
        for e in entries:
            hinge = sum(max(0.0, 1 + x) for x in e.gap) / max(len(e.gap), 1)
            total += weight[e.k] * sum(1 / i for i in range(1, e.rank + 1)) * hinge
        return total / len(entries)
    sums = [sum(weight[e.k] * math.exp(x) for e in row for x in e.gap) for row in found]
    if name == "lsep":
        return sum(math.log(1 + x) for x in sums) / len(score)
    counts = [sum(len(e.gap) for e in row) for row in found]
    return sum(x / max(n, 1) for x, n in zip(sums, counts, strict=True)) / len(score)


def loop_entropy(name: str, score: Tensor, target: Tensor, weight: list[float]) -> float:
    total = 0.0
    for s, y in zip(score.tolist(), target.tolist(), strict=True):
        for x, t, w in zip(s, y, weight, strict=True):
            p = 1 / (1 + math.exp(-x))
            entropy = -t * math.log(p) - (1 - t) * math.log(1 - p)
            if name == "ce" and t:
                total -= math.log(math.exp(x) / sum(map(math.exp, s))) / sum(y)
            if name == "bce":
                total += entropy / len(s)
            if name == "bce_weighted":
                total += ((1 - w) * t + w * (1 - t)) * entropy
    return total / len(score)


def by_loops(name: str, score: Tensor, target: Tensor) -> float:
    """Every loss from its definition, in Python floats."""
    weight = WEIGHT.tolist() if "weighted" in name else [1.0] * score.shape[1]
    name = name.removeprefix("weighted ")
    loop = loop_entropy if name in ("bce", "bce_weighted", "ce") else loop_pairwise
    return loop(name, score, target, weight)


def shares(case: str) -> tuple[Tensor, Tensor]:
    """Eight videos whose positives lie unevenly in the two halves."""
    score, target = problem(8, seed=7)
    if case == "one rank without positives":
        target[4:] = 0
    return score, target


def gradient(name: str, score: Tensor, target: Tensor) -> list[float]:
    """Of a linear layer on the scores, wrapped by DDP inside a group; and the loss."""
    torch.manual_seed(0)
    layer: nn.Module = nn.Linear(5, 5).double()
    model = nn.parallel.DistributedDataParallel(layer) if dist.size() > 1 else layer
    loss = EVERY[name](model(score), target)
    loss.backward()
    slopes = torch.cat([p.grad.flatten() for p in layer.parameters() if p.grad is not None])
    mean = dist.mean_over_ranks({"loss": loss.item()})["loss"]
    return [mean, *slopes.tolist()]


CASES = ("uneven", "one rank without positives")


def run_rank() -> dict[str, list[float]]:
    dist.init("cpu", timeout_s=60)
    half = slice(4 * dist.rank(), 4 * dist.rank() + 4)
    found = {}
    for case in CASES:
        score, target = shares(case)
        for name in EVERY:
            found[f"{case}, {name}"] = gradient(name, score[half], target[half])
    dist.shutdown()
    return found


if __name__ == "__main__":
    text = json.dumps(run_rank())
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
    os._exit(0)  # threads of gloo can abort an interpreter that is torn down
