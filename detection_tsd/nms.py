"""Non-maximum suppression within classes: hard, soft and adjusted, exact on the best candidates.

Letters: M boxes, R RoIs, K scores of a RoI with the background at column 0, D kept boxes. Scores
compare in one order everywhere: descending, and among equals the box that comes first; where scores
are lowered, among equals the box that began higher.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torchvision
from torch import Tensor

from detection_tsd import boxes

SPAN = 2.0**17  # pixels between classes when one call serves them all
KINDS = ("linear", "gaussian")


class Kept(NamedTuple):
    """Boxes that are left, best first.

    Attributes:
        index_D: int64, into the boxes that were given.
        score_D: float32, lowered where the method lowers scores.
    """

    index_D: Tensor
    score_D: Tensor


class Selected(NamedTuple):
    """Detections of an image, best first.

    Attributes:
        box_D4: float32. score_D: float32. label_D: int64, column of the scores.
        roi_D: int64, RoI that each came from.
    """

    box_D4: Tensor
    score_D: Tensor
    label_D: Tensor
    roi_D: Tensor


class Rule(Protocol):
    """A suppression with its settings, such as `partial(soft, iou=0.5)`."""

    def __call__(
        self, box_M4: Tensor, score_M: Tensor, label_M: Tensor, *, limit: int | None
    ) -> Kept: ...


Decode = Callable[[Tensor, Tensor], Tensor]


def hard(
    box_M4: Tensor,
    score_M: Tensor,
    label_M: Tensor,
    iou: float = 0.5,
    *,
    plus: float = 0.0,
    limit: int | None = None,
) -> Kept:
    """Boxes that no better kept box of their class overlaps with an IoU > `iou`.

    On a CPU one call of torchvision per class. On other devices one call for all, in float64 and
    with the classes moved apart: whether two boxes suppress each other then depends on these two
    only, never on what else is in the call.

    Args:
        box_M4: within 65536 pixels of the origin.
        score_M: any order.
        label_M: int64, or any groups that must not suppress each other, such as levels.
        iou: see above.
        plus: see `boxes`.
        limit: boxes wanted; the rest is cut off.

    Raises:
        ValueError: a score or a box is NaN; names the row.
    """
    refuse_nan(box_M4, score_M)
    order = score_M.argsort(descending=True, stable=True)
    box, label = _continuous(box_M4, plus)[order], label_M[order]
    kept = (_per_class if box.device.type == "cpu" else _moved_apart)(box, label, iou)
    index = order[kept[:limit]]
    return Kept(index, score_M[index].to(torch.float32))


def _continuous(box_M4: Tensor, plus: float) -> Tensor:
    """Boxes whose x2 - x1 is the width: overlaps of inclusive pixels by continuous arithmetic."""
    box_M4 = box_M4.to(torch.float32)
    return box_M4 + box_M4.new_tensor((0.0, 0.0, plus, plus)) if plus else box_M4


def _per_class(box_M4: Tensor, label_M: Tensor, iou: float) -> Tensor:
    """Ascending indices that survive, of boxes that are sorted best first."""
    by_class = label_M.argsort(stable=True)
    lengths = label_M[by_class].unique_consecutive(return_counts=True)[1].tolist()
    rank = -torch.arange(max(lengths, default=0), dtype=torch.float32)
    kept = [
        part if length == 1 else part[_greedy(box_M4[part], rank[:length], iou)]
        for part, length in zip(by_class.split(lengths), lengths, strict=True)
    ]
    return torch.cat([*kept, by_class[:0]]).sort().values


def _greedy(box_M4: Tensor, rank_M: Tensor, iou: float) -> Tensor:
    # the rank in place of the score, so that torchvision's own sort cannot reorder equals
    kept: Tensor = torchvision.ops.nms(box_M4, rank_M, iou)
    return kept


def _moved_apart(box_M4: Tensor, label_M: Tensor, iou: float) -> Tensor:
    """As `_per_class`, in one call; float64 keeps the shifted coordinates apart to 1e-8 pixels."""
    moved = box_M4.to(torch.float64) + label_M.to(torch.float64)[:, None] * SPAN
    rank = -torch.arange(len(moved), dtype=torch.float64, device=moved.device)
    return _greedy(moved, rank, iou).sort().values


def soft(
    box_M4: Tensor,
    score_M: Tensor,
    label_M: Tensor,
    *,
    kind: str = "gaussian",
    iou: float = 0.5,
    sigma: float = 0.5,
    min_score: float = 1e-3,
    plus: float = 0.0,
    limit: int | None = None,
) -> Kept:
    """Soft-NMS (arXiv 1704.04503): each kept box lowers the scores of those of its class.

    Every round keeps the box with the greatest current score and multiplies the others by
    1 - IoU where IoU > `iou` (linear) or by exp(-IoU^2 / sigma) (Gaussian). Scores only fall, so
    `limit` rounds give the `limit` best; each round waits for the device once.

    Args:
        box_M4: boxes.
        score_M: probabilities, any order.
        label_M: int64 groups that do not touch each other.
        kind: "linear" or "gaussian".
        iou: of the linear kind.
        sigma: of the Gaussian kind.
        min_score: a box whose current score is below it is not kept.
        plus: see `boxes`.
        limit: boxes wanted.

    Raises:
        ValueError: a score or a box is NaN; unknown kind; sigma <= 0.
    """
    if kind not in KINDS or sigma <= 0:
        raise ValueError(f"kind={kind!r} sigma={sigma}: one of {KINDS} and sigma > 0 are needed")
    refuse_nan(box_M4, score_M)
    order = score_M.argsort(descending=True, stable=True)  # then argmax finds the first of equals
    box, label = box_M4[order].to(torch.float32), label_M[order]
    current = score_M[order].to(torch.float32)
    index, score = [], []
    for _ in range(len(order) if limit is None else min(limit, len(order))):
        most, best = current.max(dim=0)
        if not most >= min_score:
            break
        index.append(best)
        score.append(most)
        overlap = boxes.iou(box[best][None], box, plus)[0]
        weight = torch.exp(-overlap.square() / sigma)
        if kind == "linear":
            weight = torch.where(overlap > iou, 1 - overlap, 1.0)
        current[best] = -torch.inf  # which no weight may touch: 0 * inf is NaN
        lowered = (label == label[best]) & (current > -torch.inf)
        current = torch.where(lowered, current * weight, current)
    if not index:
        return Kept(order[:0], current[:0])
    return Kept(order[torch.stack(index)], torch.stack(score))


def adjusted(
    box_M4: Tensor,
    score_M: Tensor,
    label_M: Tensor,
    *,
    iou: float = 0.5,
    sigma: float = 0.5,
    min_score: float = 1e-3,
    plus: float = 0.0,
    limit: int | None = None,
) -> Kept:
    """Adjusted NMS (arXiv 2003.07557): hard NMS, then Gaussian soft-NMS lowers what is left.

    Args and Raises as in `soft`.
    """
    first = hard(box_M4, score_M, label_M, iou, plus=plus)
    lowered = soft(
        box_M4[first.index_D],
        first.score_D,
        label_M[first.index_D],
        sigma=sigma,
        min_score=min_score,
        plus=plus,
        limit=limit,
    )
    return Kept(first.index_D[lowered.index_D], lowered.score_D)


def select(
    score_RK: Tensor,
    decode: Decode,
    rule: Rule,
    *,
    threshold: float = 0.0,
    per_image: int = 100,
    candidates: int = 4096,
    plus: float = 0.0,
) -> Selected:
    """What `rule` leaves of all R x (K - 1) pairs of RoI and class, from the best pairs only.

    Only the `candidates` best pairs are decoded and compared. A rule takes boxes in the order of
    their scores and never raises one, so a pair outside can change nothing that scores at least
    as much as itself: once `per_image` boxes do, the result is that of all pairs, ties included.
    Otherwise the candidates are doubled. Boxes without an area are left out.

    Args:
        score_RK: probabilities; column 0, the background, is not looked at.
        decode: boxes (n, 4) of n pairs, given as RoIs and columns, both int64 (n,).
        rule: suppression with its settings.
        threshold: pairs must score more.
        per_image: detections wanted.
        candidates: pairs to begin with.
        plus: see `boxes`.

    Raises:
        ValueError: a score or a decoded box is NaN; candidates or per_image < 1.
    """
    if candidates < 1 or per_image < 1:
        raise ValueError(f"candidates={candidates} per_image={per_image}: both must be >= 1")
    refuse_nan(score_RK)
    score_P = score_RK[:, 1:].to(torch.float32).flatten()
    classes = max(score_RK.shape[1] - 1, 1)
    while True:
        pair, rest = _best_pairs(score_P, threshold, candidates)
        roi, label = pair // classes, pair % classes + 1
        box = decode(roi, label)
        refuse_nan(box)
        sized = boxes.valid_mask(box, plus=plus).nonzero()[:, 0]
        kept = rule(box[sized], score_P[pair[sized]], label[sized], limit=per_image)
        if rest is None or (len(kept.score_D) == per_image and float(kept.score_D[-1]) >= rest):
            index = sized[kept.index_D]
            return Selected(box[index].to(torch.float32), kept.score_D, label[index], roi[index])
        candidates *= 2


def _best_pairs(score_P: Tensor, threshold: float, count: int) -> tuple[Tensor, float | None]:
    """First `count` pairs above the threshold, and the score of the best pair after them."""
    pair = (score_P > threshold).nonzero()[:, 0]
    rest = None
    if len(pair) > count:
        score = score_P[pair]
        best = score.topk(count + 1).values
        rest = float(best[count])
        # topk does not say which of equals it takes; those at its end are put in order below
        pair = pair[score >= best[count - 1]]
    return pair[score_P[pair].argsort(descending=True, stable=True)[:count]], rest


def hard_nms_topk(
    score_RK: Tensor,
    decode: Decode,
    *,
    iou: float = 0.5,
    threshold: float = 0.0,
    per_image: int = 100,
    candidates: int = 4096,
    plus: float = 0.0,
) -> Selected:
    """`select` with `hard`: equal, byte for byte, to hard NMS of all pairs above the threshold."""
    return select(
        score_RK,
        decode,
        partial(hard, iou=iou, plus=plus),
        threshold=threshold,
        per_image=per_image,
        candidates=candidates,
        plus=plus,
    )


def refuse_nan(*tensors: Tensor) -> None:
    """Raise for the first row of boxes or scores that holds a NaN; waits for the device once.

    Raises:
        ValueError: names the row.
    """
    for values in tensors:
        if bool(values.isnan().any()):
            row = int(values.isnan().reshape(len(values), -1).any(dim=1).nonzero()[0, 0])
            raise ValueError(f"row {row} of {tuple(values.shape)} boxes or scores is NaN")
