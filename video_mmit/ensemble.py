"""Weighted means of the scores of several models, and weights tuned on labels.

arXiv 2003.05837 sums up an ensemble of all its models; with which weights, and whether of logits or
probabilities, it does not say. So both are settings here, and weights that were tuned on the very
labels they are judged by come with a cross-fitted figure, which is not optimistic.

Letters: M members, N videos, K classes, E = N*K entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.log import InputError
from video_mmit.metrics import mmit_map, top_k
from video_mmit.score_file import ScoreFile

Floats = NDArray[np.float64]
Measure = Callable[[Floats, NDArray[Any]], float]
DOMAINS = ("logit", "prob", "rank")
LEAST_PROBABILITY = 1e-7  # of a probability whose logit is wanted


@dataclass(frozen=True)
class Ensemble:
    """How score files are fused.

    Args:
        domain: what is averaged. "logit": logits; "prob": probabilities, sigmoid for multi-label
            sets and softmax otherwise; "rank": places of the classes in their video.
        weights: one number a member, not negative; they are divided by their sum. Equal when None.
        tune: choose the weights on the labels instead.
        step: of the tuned weights, 1/n.
        seed: of the halves of the cross-fitted figure.
    """

    domain: str = "logit"
    weights: Sequence[float] | None = None
    tune: bool = False
    step: float = 0.05
    seed: int = 0


def combine(
    members: Sequence[ScoreFile],
    ids: Sequence[str],
    target_NK: ArrayLike,
    multi_label: bool,
    how: Ensemble,
) -> tuple[ScoreFile, dict[str, Any]]:
    """Fuse score files of the videos `ids`.

    Tuning maximises `mmit_map` in multi-label sets and `top_k` with k = 1 in others; videos without
    a label have no part in it.

    Args:
        members: with the same classes; each holds exactly the videos `ids`, in any order.
        ids: (N,) in the order of the targets.
        target_NK: 0 and 1.
        multi_label: whether a video may have several labels.
        how: weights and domain.

    Returns:
        The fused scores in the order of `ids`, and facts: `domain`, `weights`, `tuned`, and with
        tuning `tuned_value` (on the labels that chose the weights) and `cross_fitted`.

    Raises:
        InputError: members that do not fit, or settings that contradict each other.
    """
    if how.tune and how.weights is not None:
        raise InputError("ensemble.weights", "are given and to be tuned as well", how.weights)
    if not members:
        raise InputError("ensemble.members", "name at least one score file")
    rows = [member.rows(ids) for member in members]
    kinds = [member.kind for member in members]
    scores = _in_domain(rows, kinds, how.domain, multi_label)
    facts: dict[str, Any] = {"domain": how.domain, "tuned": how.tune}
    weights_M = _weights(how.weights, len(scores))
    if how.tune:
        weights_M, judged = _tuned(scores, np.asarray(target_NK), ids, multi_label, how)
        facts |= judged
    facts["weights"] = weights_M.tolist()
    fused_NK = _bounded(_sum(scores, weights_M), how.domain)
    return ScoreFile(np.array(ids), fused_NK, how.domain, "ensemble"), facts


def fuse(
    scores: Sequence[ArrayLike],
    weights: Sequence[float] | None = None,
    domain: str = "logit",
    multi_label: bool = True,
    kinds: Sequence[str] | None = None,
) -> Floats:
    """Weighted mean (N, K) of the members' scores in a domain.

    Args:
        scores: M arrays (N, K).
        weights: M numbers, not negative; they are divided by their sum. Equal when None.
        domain: "logit", "prob" or "rank", see `Ensemble`.
        multi_label: sigmoid or softmax between logits and probabilities.
        kinds: "logit" or "prob" of each member; all logits when None.

    Raises:
        InputError: an unknown domain, weights or shapes that do not fit.
    """
    kinds = ["logit"] * len(scores) if kinds is None else kinds
    members = _in_domain(scores, kinds, domain, multi_label)
    return _bounded(_sum(members, _weights(weights, len(members))), domain)


def to_domain(
    score_NK: ArrayLike, kind: str = "logit", domain: str = "logit", multi_label: bool = True
) -> Floats:
    """Scores of a kind as logits, probabilities or ranks, float64.

    Probabilities become logits by the inverse of what made them, clipped at 1e-7 from 0 and 1. The
    rank of a class counts the classes of the same video that it beats, ties by half, divided by
    K - 1, so that it is 1 for the first class and 0 for the last.

    Raises:
        InputError: an unknown domain, or ranks where logits or probabilities are wanted.
    """
    if domain not in DOMAINS:
        raise InputError("ensemble.domain", f"must be one of {', '.join(DOMAINS)}", domain)
    score_NK = np.asarray(score_NK, dtype=np.float64)
    if domain == "rank":
        return _rank(score_NK)
    if kind == domain:
        return score_NK
    if kind == "rank":
        what = f"a member holds ranks, of which there are no {domain}s; needs the domain"
        raise InputError("ensemble.domain", what, "rank")
    if domain == "prob":
        return _sigmoid(score_NK) if multi_label else _softmax(score_NK)
    p_NK = score_NK.clip(LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
    return np.log(p_NK) - np.log1p(-p_NK) if multi_label else np.log(p_NK)


def tune(
    scores: Sequence[ArrayLike], target_NK: ArrayLike, measure: Measure, step: float = 0.05
) -> tuple[Floats, float]:
    """Weights of the greatest measure that a coordinate search on the simplex finds.

    All weights are multiples of `step` with sum 1. From the better of the equal weights and the
    single members, weight moves from one member to another, a quarter at first, then smaller
    amounts down to one step, as long as a move is a gain. The result is never worse than the exact
    equal weights, which are kept at a tie, or any single member.

    Args:
        scores: M arrays (N, K), in the domain they are averaged in.
        target_NK: 0 and 1.
        measure: maps scores and targets to what is maximised.
        step: 1/n for a whole n.

    Returns:
        Weights (M,) and the measure with them, on these labels.

    Raises:
        ValueError: no member, or a step that is not 1/n.
    """
    units = round(1 / step) if step > 0 else 0
    if units < 1 or abs(units * step - 1) > 1e-9:
        raise ValueError(f"step={step}: need 1/n for a whole n")
    members = _same_shapes(scores)
    target = np.asarray(target_NK)

    def value(weights_M: Floats) -> float:
        return measure(_sum(members, weights_M), target)

    equal_M = _weights(None, len(members))
    best_M, best = _climb(value, len(members), units), value(equal_M)
    found_M = np.array(best_M) / units
    found = value(found_M)
    return (found_M, found) if found > best else (equal_M, best)


def cross_fit(
    scores: Sequence[ArrayLike],
    target_NK: ArrayLike,
    measure: Measure,
    ids: Sequence[str],
    folds: int = 2,
    seed: int = 0,
    step: float = 0.05,
) -> float:
    """Measure of tuned weights on videos that had no part in tuning them.

    The videos are cut into folds by a permutation of their sorted ids, so the order of the rows has
    no influence. The weights tuned on the other folds are measured on each; the mean of the
    measures is weighted by the number of videos.

    Args:
        scores: M arrays (N, K), in the domain they are averaged in.
        target_NK: 0 and 1.
        measure: see `tune`.
        ids: (N,) unique.
        folds: 2 or more.
        seed: of the permutation.
        step: see `tune`.

    Raises:
        InputError: fewer videos than folds.
        ValueError: fewer than two folds, or another number of ids than of rows.
    """
    members, target = _same_shapes(scores), np.asarray(target_NK)
    if folds < 2:
        raise ValueError(f"folds={folds}: need 2 or more")
    if len(ids) != len(members[0]):
        raise ValueError(f"{len(ids)} ids for {len(members[0])} rows of scores")
    if len(ids) < folds:
        raise InputError("ensemble.tune", f"needs {folds} videos or more; here", len(ids))
    order_N = np.argsort(np.asarray(ids, dtype=str), kind="stable")
    fold_N = np.empty(len(ids), dtype=np.int64)
    fold_N[order_N] = np.random.default_rng(seed).permutation(len(ids)) % folds
    total = 0.0
    for fold in range(folds):
        rest, mine = (order_N[fold_N[order_N] != fold], order_N[fold_N[order_N] == fold])
        weights_M, _ = tune([score[rest] for score in members], target[rest], measure, step)
        fused = _sum([score[mine] for score in members], weights_M)
        total += measure(fused, target[mine]) * len(mine)
    return total / len(ids)


def _tuned(
    scores: Sequence[Floats],
    target_NK: NDArray[Any],
    ids: Sequence[str],
    multi_label: bool,
    how: Ensemble,
) -> tuple[Floats, dict[str, float]]:
    """Weights tuned on the videos that have a label, and their measure on these and on others."""
    rows = np.flatnonzero(target_NK.any(axis=1))
    if len(rows) < 2:
        raise InputError("ensemble.tune", "needs two videos with a label; here", len(rows))
    scores, target_NK = [score[rows] for score in scores], target_NK[rows]
    measure: Measure = mmit_map if multi_label else top_1
    weights_M, value = tune(scores, target_NK, measure, how.step)
    names = [ids[row] for row in rows.tolist()]
    honest = cross_fit(scores, target_NK, measure, names, seed=how.seed, step=how.step)
    return weights_M, {"tuned_value": value, "cross_fitted": honest}


def top_1(score_NK: ArrayLike, target_NK: ArrayLike) -> float:
    """`top_k` with k = 1."""
    return top_k(score_NK, target_NK, 1)


def _climb(value: Callable[[Floats], float], members: int, units: int) -> tuple[int, ...]:
    known: dict[tuple[int, ...], float] = {}

    def of(part_M: tuple[int, ...]) -> float:
        if part_M not in known:
            known[part_M] = value(np.array(part_M) / units)
        return known[part_M]

    single = [tuple(units * (m == one) for m in range(members)) for one in range(members)]
    equal = tuple(units // members + (m < units % members) for m in range(members))
    best = max([equal, *single], key=of)
    for size in sorted({max(units // parts, 1) for parts in (4, 10, units)}, reverse=True):
        gained = True
        while gained:
            gained = False
            for giver, taker in permutations(range(members), 2):
                while best[giver] >= size and of(moved := _move(best, giver, taker, size)) > of(
                    best
                ):
                    best, gained = moved, True
    return best


def _move(part_M: tuple[int, ...], giver: int, taker: int, size: int) -> tuple[int, ...]:
    change = {giver: -size, taker: size}
    return tuple(part + change.get(m, 0) for m, part in enumerate(part_M))


def _in_domain(
    scores: Sequence[ArrayLike], kinds: Sequence[str], domain: str, multi_label: bool
) -> list[Floats]:
    if len(kinds) != len(scores):
        raise ValueError(f"{len(kinds)} kinds for {len(scores)} members")
    pairs = zip(scores, kinds, strict=True)
    return _same_shapes([to_domain(score, kind, domain, multi_label) for score, kind in pairs])


def _same_shapes(scores: Sequence[ArrayLike]) -> list[Floats]:
    members = [np.asarray(score, dtype=np.float64) for score in scores]
    shapes = [score.shape for score in members]
    if not members or len(shapes[0]) != 2 or len(set(shapes)) > 1:
        raise InputError("ensemble.members", "need scores of one shape, (videos, classes)", shapes)
    return members


def _weights(weights: Sequence[float] | None, members: int) -> Floats:
    """Weights with the sum 1."""
    weight_M = np.ones(members) if weights is None else np.asarray(weights, dtype=np.float64)
    if weight_M.shape != (members,):
        raise InputError("ensemble.weights", f"needs one number for each of {members}", weights)
    if not (np.isfinite(weight_M).all() and (weight_M >= 0).all() and weight_M.sum() > 0):
        raise InputError("ensemble.weights", "must not be negative, nor all 0", weights)
    return weight_M / weight_M.sum()


def _sum(members: Sequence[Floats], weights_M: Floats) -> Floats:
    """Weighted sum, entry by entry: entries with equal scores stay equal, as ties must.

    A matrix product may round the same sum differently in different places.
    """
    total_NK, term_NK = np.zeros_like(members[0]), np.empty_like(members[0])
    for score_NK, weight in zip(members, weights_M, strict=True):
        if weight:
            total_NK += np.multiply(score_NK, weight, out=term_NK)
    return total_NK


def _bounded(fused_NK: Floats, domain: str) -> Floats:
    """A mean of probabilities may exceed 1 by rounding."""
    return fused_NK if domain == "logit" else fused_NK.clip(0, 1)


def _sigmoid(x_NK: Floats) -> Floats:
    return np.exp(-np.logaddexp(0, -x_NK))


def _softmax(x_NK: Floats) -> Floats:
    power_NK = np.exp(x_NK - x_NK.max(axis=1, keepdims=True))
    return power_NK / power_NK.sum(axis=1, keepdims=True)


def _rank(score_NK: Floats) -> Floats:
    order_NK = np.argsort(score_NK, axis=1)
    sorted_NK = np.take_along_axis(score_NK, order_NK, axis=1)
    place_K = np.arange(score_NK.shape[1])
    new_NK = np.ones(score_NK.shape, dtype=bool)
    new_NK[:, 1:] = sorted_NK[:, 1:] != sorted_NK[:, :-1]
    last_NK = np.roll(new_NK, -1, axis=1)  # the first entry is new, so the last one is last
    first_NK = np.maximum.accumulate(np.where(new_NK, place_K, 0), axis=1)
    end_NK = np.where(last_NK, place_K, len(place_K))[:, ::-1]
    end_NK = np.minimum.accumulate(end_NK, axis=1)[:, ::-1]
    rank_NK = np.empty_like(score_NK)
    np.put_along_axis(rank_NK, order_NK, (first_NK + end_NK) / 2, axis=1)
    return rank_NK / max(len(place_K) - 1, 1)
