"""Average precision of videos and classes, exactly and with ties, and accuracies.

For scores s_m and positives Y of one ranking

    AP = 1/|Y| sum_{k in Y} #{m in Y: s_m >= s_k} / #{m: s_m >= s_k},

so the order in which tied entries happen to lie has no influence: a ranking whose entries are all
tied has AP p/K with p positives of K. A ranking is, for

- `mmit_map`, the measure of Multi-Moments in Time: the classes of one video (mean over videos;
  X-Temporal `calculate_map.py`, mmaction2 `mmit_mean_average_precision`), equal to scikit-learn's
  `label_ranking_average_precision_score`;
- `macro_map`: the videos of one class, mean over the classes that have a positive;
- `micro_map`: all entries at once.

Accuracies break ties by the lower class number. All values are fractions in [0, 1], in float64.
Scores and targets are read in blocks, so that beside the input only a fixed amount is in memory;
infinite scores are ordered like others, NaN is refused.

Shapes: N videos, K classes, B rows of a block, R length of a ranking, P positives of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.log import InputError

Array = NDArray[Any]
Floats = NDArray[np.float64]
BLOCK = 2**22  # entries looked at at once


def mmit_map(
    score_NK: ArrayLike,
    target_NK: ArrayLike,
    ignore_empty: bool = False,
    ids: Sequence[str] | None = None,
) -> float:
    """Mean over the videos of the AP of each video's ranking of the classes.

    Args:
        score_NK: greater is better.
        target_NK: 0 and 1, or bool.
        ignore_empty: leave out videos without a positive, which have no AP.
        ids: of the videos, for messages.

    Raises:
        InputError: no video, a video without a positive (its id is named), a NaN score, targets
            other than 0 and 1, shapes that differ.
    """
    score, target = _checked(score_NK, target_NK, ids)
    score, target, _ = _with_labels(score, target, ignore_empty, ids)
    return _mean(_average_precision(score, target))


def video_ap(score_NK: ArrayLike, target_NK: ArrayLike) -> Floats:
    """AP of every video's ranking, (N,); NaN for a video without a positive.

    Raises:
        InputError: see `mmit_map`.
    """
    return _average_precision(*_checked(score_NK, target_NK, None))


def class_ap(score_NK: ArrayLike, target_NK: ArrayLike) -> Floats:
    """AP of every class's ranking of the videos, (K,); NaN for a class without a positive.

    Raises:
        InputError: see `mmit_map`.
    """
    score, target = _checked(score_NK, target_NK, None)
    return _average_precision(score.T, target.T)


def macro_map(score_NK: ArrayLike, target_NK: ArrayLike) -> float:
    """Mean of `class_ap` over the classes that have a positive.

    Raises:
        InputError: see `mmit_map`; also when no class has a positive.
    """
    return _mean(class_ap(score_NK, target_NK))


def micro_map(score_NK: ArrayLike, target_NK: ArrayLike) -> float:
    """AP of the ranking of all N*K entries.

    Raises:
        InputError: see `mmit_map`; also when nothing is positive.
    """
    return _micro(*_checked(score_NK, target_NK, None))


def hit_at_k(score_NK: ArrayLike, target_NK: ArrayLike, k: int) -> float:
    """Fraction of the videos with a true label among their k greatest scores.

    Args:
        score_NK: greater is better; ties go to the lower class number.
        target_NK: 0 and 1, or bool. A video without a positive is a miss.
        k: 1 or more; above K it counts as K.

    Raises:
        InputError: see `mmit_map`.
        ValueError: k is not positive.
    """
    return float(_hits(*_checked(score_NK, target_NK, None), k).mean())


def top_k(score_NK: ArrayLike, target_NK: ArrayLike, k: int) -> float:
    """`hit_at_k` for sets with one label a video.

    Raises:
        InputError: also when a video has not exactly one label.
        ValueError: k is not positive.
    """
    score, target = _checked(score_NK, target_NK, None)
    _single_labels(target, None)
    return float(_hits(score, target, k).mean())


def mean_class_accuracy(score_NK: ArrayLike, target_NK: ArrayLike) -> float:
    """Mean of the top-1 accuracy of each class, over the classes that have a video.

    Raises:
        InputError: see `top_k`.
    """
    score, target = _checked(score_NK, target_NK, None)
    return _class_accuracy(score, _single_labels(target, None))


def terciles(class_ap_K: ArrayLike, counts_K: ArrayLike) -> dict[str, float]:
    """Mean AP of the classes that are frequent, middling and rare in training.

    The classes are ordered by their count (ties: lower class number first) and cut into thirds,
    the first ones greater where K is no multiple of 3.

    Args:
        class_ap_K: from `class_ap`; NaN is left out.
        counts_K: training videos of each class.

    Returns:
        "head", "mid" and "tail"; NaN for a third in which no class has an AP.

    Raises:
        ValueError: the lengths differ.
    """
    ap_K, count_K = np.asarray(class_ap_K, dtype=np.float64), np.asarray(counts_K)
    if ap_K.ndim != 1 or ap_K.shape != count_K.shape:
        raise ValueError(f"counts_K has shape {count_K.shape}, need {ap_K.shape}, one a class")
    parts = np.array_split(np.argsort(-count_K.astype(np.float64), kind="stable"), 3)
    known = [ap_K[part][~np.isnan(ap_K[part])] for part in parts]
    values = [math.fsum(part) / len(part) if len(part) else math.nan for part in known]
    return dict(zip(("head", "mid", "tail"), values, strict=True))


def evaluate_scores(
    score_NK: ArrayLike,
    target_NK: ArrayLike,
    multi_label: bool,
    counts_K: ArrayLike | None = None,
    ids: Sequence[str] | None = None,
    ignore_empty: bool = False,
) -> dict[str, float]:
    """Every measure of a set of its kind, over the same videos.

    Args:
        score_NK: greater is better.
        target_NK: 0 and 1, or bool.
        multi_label: whether a video may have several labels.
        counts_K: training videos of each class, for the terciles.
        ids: of the videos, for messages.
        ignore_empty: leave videos without a label out of every measure, and count them.

    Returns:
        Multi-label: `mmit_mAP`, `macro_mAP`, `micro_mAP`, `hit@1`, `hit@5`,
        `classes_without_positive`, and with counts `head_mAP`, `mid_mAP`, `tail_mAP` (each only
        where one of its classes has a positive). Single-label: `top1`, `top5`,
        `mean_class_accuracy`. Both: `videos`, and `ignored_empty` with `ignore_empty`.

    Raises:
        InputError: see `mmit_map` and `top_k`; the message names the id.
    """
    score, target = _checked(score_NK, target_NK, ids)
    score, target, ignored = _with_labels(score, target, ignore_empty, ids)
    found = _multi(score, target, counts_K) if multi_label else _single(score, target, ids)
    sizes: dict[str, float] = {"videos": len(score)}
    return found | sizes | ({"ignored_empty": ignored} if ignore_empty else {})


def _multi(score: Array, target: Array, counts_K: ArrayLike | None) -> dict[str, float]:
    ap_K = _average_precision(score.T, target.T)
    found: dict[str, float] = {
        "mmit_mAP": _mean(_average_precision(score, target)),
        "macro_mAP": _mean(ap_K),
        "micro_mAP": _micro(score, target),
        "hit@1": float(_hits(score, target, 1).mean()),
        "hit@5": float(_hits(score, target, 5).mean()),
        "classes_without_positive": int(np.isnan(ap_K).sum()),
    }
    if counts_K is not None:
        thirds = terciles(ap_K, counts_K).items()
        found |= {f"{name}_mAP": value for name, value in thirds if not math.isnan(value)}
    return found


def _single(score: Array, target: Array, ids: Sequence[str] | None) -> dict[str, float]:
    label_N = _single_labels(target, ids)
    return {
        "top1": float(_hits(score, target, 1).mean()),
        "top5": float(_hits(score, target, 5).mean()),
        "mean_class_accuracy": _class_accuracy(score, label_N),
    }


def _average_precision(score_NR: Array, target_NR: Array) -> Floats:
    """AP of every row, (N,); NaN for a row without a positive."""
    found = np.full(len(score_NR), np.nan)
    for part in _parts(score_NR):
        found[part] = _block_precision(_ordered(score_NR[part]), target_NR[part] != 0)
    return found


def _block_precision(score_BR: Array, positive_BR: NDArray[np.bool_]) -> Floats:
    row_P, place_P = np.nonzero(positive_BR)
    value_P = score_BR[row_P, place_P]
    order_P = np.lexsort((-value_P, row_P))
    row_P, value_P = row_P[order_P], value_P[order_P]
    precision_P = _positives_at_least(row_P, value_P) / _entries_at_least(score_BR, row_P, value_P)
    count_B = np.bincount(row_P, minlength=len(score_BR))
    total_B = np.bincount(row_P, weights=precision_P, minlength=len(score_BR))
    return np.where(count_B > 0, total_B, np.nan) / np.maximum(count_B, 1)


def _positives_at_least(row_P: NDArray[np.intp], value_P: Array) -> NDArray[np.intp]:
    """Positives of the same row whose score is not smaller; sorted by row, then from the top."""
    index_P = np.arange(len(row_P))
    last_P = np.ones(len(row_P), dtype=bool)
    last_P[:-1] = (row_P[1:] != row_P[:-1]) | (value_P[1:] != value_P[:-1])
    # Of a group of ties all get the place of the last one.
    end_P = np.minimum.accumulate(np.where(last_P, index_P, len(row_P))[::-1])[::-1]
    return end_P + 1 - np.searchsorted(row_P, row_P, side="left")


def _entries_at_least(score_BR: Array, row_P: NDArray[np.intp], value_P: Array) -> NDArray[np.intp]:
    """Entries of the row whose score is not smaller: a binary search in all sorted rows at once."""
    length = score_BR.shape[1]
    sorted_E = np.sort(score_BR, axis=1).reshape(-1)
    low_P, high_P = np.zeros_like(row_P), np.full_like(row_P, length - 1)
    for _ in range((length - 1).bit_length()):
        middle_P = (low_P + high_P) >> 1
        below_P = sorted_E[row_P * length + middle_P] < value_P
        low_P = np.where(below_P, middle_P + 1, low_P)
        high_P = np.where(below_P, high_P, middle_P)
    return length - low_P


def _micro(score_NK: Array, target_NK: Array) -> float:
    positive = [_ordered(score_NK[part])[target_NK[part] != 0] for part in _parts(score_NK)]
    value_P = np.sort(np.concatenate(positive))
    if not len(value_P):
        raise InputError("target", "nothing is positive, so there is no average precision")
    above_P = np.zeros(len(value_P), dtype=np.int64)
    for part in _parts(score_NK):
        sorted_E = np.sort(_ordered(score_NK[part]), axis=None)
        above_P += len(sorted_E) - np.searchsorted(sorted_E, value_P, side="left")
    hits_P = len(value_P) - np.searchsorted(value_P, value_P, side="left")
    return math.fsum(hits_P / above_P) / len(value_P)


def _hits(score_NK: Array, target_NK: Array, k: int) -> NDArray[np.bool_]:
    """Whether one of the k first classes is positive, (N,)."""
    if k < 1:
        raise ValueError(f"k={k}: need 1 or more")
    found = np.zeros(len(score_NK), dtype=bool)
    for part in _parts(score_NK):
        first_BK = _first(_ordered(score_NK[part]), min(k, score_NK.shape[1]))
        found[part] = (first_BK & (target_NK[part] != 0)).any(axis=1)
    return found


def _first(score_BK: Array, k: int) -> NDArray[np.bool_]:
    """The k greatest scores of each row; of those tied with the k-th, the lower classes."""
    place = score_BK.shape[1] - k
    least_B1 = np.partition(score_BK, place, axis=1)[:, place, None]
    above_BK, tied_BK = score_BK > least_B1, score_BK == least_B1
    room_B1 = k - above_BK.sum(axis=1, keepdims=True)
    return above_BK | (tied_BK & (tied_BK.cumsum(axis=1) <= room_B1))


def _class_accuracy(score_NK: Array, label_N: NDArray[np.intp]) -> float:
    best_N = np.concatenate([score_NK[part].argmax(axis=1) for part in _parts(score_NK)])
    size_K = np.bincount(label_N, minlength=score_NK.shape[1])
    right_K = np.bincount(label_N[best_N == label_N], minlength=score_NK.shape[1])
    return math.fsum(right_K[size_K > 0] / size_K[size_K > 0]) / int((size_K > 0).sum())


def _single_labels(target_NK: Array, ids: Sequence[str] | None) -> NDArray[np.intp]:
    """The label of every video, (N,)."""
    count_N = _counts(target_NK)
    wrong = np.flatnonzero(count_N != 1)
    if wrong.size:
        what = f"{wrong.size} videos have not exactly one label, as a single-label set needs; here"
        raise InputError(_name(ids, wrong[0]), what, int(count_N[wrong[0]]))
    return np.concatenate([(target_NK[part] != 0).argmax(axis=1) for part in _parts(target_NK)])


def _with_labels(
    score_NK: Array, target_NK: Array, ignore_empty: bool, ids: Sequence[str] | None
) -> tuple[Array, Array, int]:
    """The videos that have a label, and how many have none."""
    empty_N = _counts(target_NK) == 0
    if not empty_N.any():
        return score_NK, target_NK, 0
    first, count = int(empty_N.argmax()), int(empty_N.sum())
    if not ignore_empty:
        what = f"has no label ({count} such videos); ignore_empty=true leaves them out"
        raise InputError(_name(ids, first), what)
    if count == len(empty_N):
        raise InputError("target", "no video has a label; videos", count)
    return score_NK[~empty_N], target_NK[~empty_N], count


def _counts(target_NK: Array) -> NDArray[np.intp]:
    return np.concatenate([(target_NK[part] != 0).sum(axis=1) for part in _parts(target_NK)])


def _checked(
    score_NK: ArrayLike, target_NK: ArrayLike, ids: Sequence[str] | None
) -> tuple[Array, Array]:
    score, target = np.asarray(score_NK), np.asarray(target_NK)
    if score.ndim != 2 or 0 in score.shape or score.dtype.kind not in "fiu":
        what = "must be numbers, (videos, classes), none of them 0; here"
        raise InputError("scores", what, f"{score.dtype} {score.shape}")
    if target.shape != score.shape or target.dtype.kind not in "bfiu":
        what = f"must be 0 and 1 in the shape of the scores, {score.shape}; here"
        raise InputError("target", what, f"{target.dtype} {target.shape}")
    if ids is not None and len(ids) != len(score):
        raise InputError("ids", f"needs {len(score)} entries, one a video", len(ids))
    for part in _parts(score):
        _check_block(score[part], target[part], ids, part.start)
    return score, target


def _check_block(score_BK: Array, target_BK: Array, ids: Sequence[str] | None, start: int) -> None:
    if score_BK.dtype.kind == "f" and np.isnan(score_BK).any():
        row = int(np.isnan(score_BK).any(axis=1).argmax())
        raise InputError(_name(ids, start + row), "a score is not a number", "nan")
    if target_BK.dtype.kind != "b":
        wrong_BK = (target_BK != 0) & (target_BK != 1)
        if wrong_BK.any():
            row = int(wrong_BK.any(axis=1).argmax())
            value = target_BK[row][wrong_BK[row]][0]
            raise InputError(_name(ids, start + row), "a target is neither 0 nor 1", value)


def _name(ids: Sequence[str] | None, row: int) -> str:
    return f"row {row}" if ids is None else str(ids[row])


def _ordered(score_BR: Array) -> Array:
    """Contiguous, in a type that is compared exactly and fast: float16 would be neither."""
    exact = score_BR.dtype.kind == "f" and score_BR.dtype.itemsize >= 4
    kind = score_BR.dtype if exact else np.float64
    return np.ascontiguousarray(score_BR, dtype=kind)


def _parts(table: Array) -> Iterator[slice]:
    """Blocks of rows, together all."""
    rows = max(BLOCK // table.shape[1], 1)
    return (slice(start, start + rows) for start in range(0, len(table), rows))


def _mean(ap: Floats) -> float:
    """Over the rankings that have a positive; exact, so that their order has no influence."""
    known = ap[~np.isnan(ap)]
    if not len(known):
        raise InputError("target", "nothing is positive, so there is no average precision")
    return math.fsum(known) / len(known)
