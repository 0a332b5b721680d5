"""Whether two sides of a benchmark row computed the same; a row that disagrees is not timed.

Letters: D detections, M proposals.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

from detection_tsd.data.detection_data import Detections

SAME_IOU, SAME_SCORE = 0.99, 1e-2
# Rounding may swap two boxes of equal score, or let one more through a suppression.
LEAST = 0.97


def tensors_agree(
    name: str, ours: Iterable[Tensor], theirs: Iterable[Tensor], limit: float
) -> float:
    """Greatest difference of two lists of tensors, relative to the greatest entry of each.

    Raises:
        RuntimeError: it exceeds the limit, or the shapes differ.
    """
    found = 0.0
    for one, other in zip(ours, theirs, strict=True):
        if one.shape != other.shape:
            raise RuntimeError(f"{name}: shapes {tuple(one.shape)} and {tuple(other.shape)}")
        scale = float(other.abs().max()) if other.numel() else 1.0
        gap = float((one.float() - other.float()).abs().max()) if other.numel() else 0.0
        found = max(found, gap / max(scale, 1e-12)) if gap == gap else gap
        if not found <= limit:
            raise RuntimeError(f"{name}: results differ by {found}, relative")
    return found


def boxes_agree(
    name: str, ours: Sequence[Detections], theirs: Sequence[Detections]
) -> tuple[float, float]:
    """Share of the boxes that both sides have, and the greatest difference of their scores.

    Two boxes are the same when class and score agree and they overlap by 0.99.

    Raises:
        RuntimeError: less than 97 % of the boxes of one side are on the other.
    """
    pairs = [_matched(*images) for images in zip(ours, theirs, strict=True)]
    count = max(sum(len(side.score_D) for side in sides) for sides in (ours, theirs))
    share = sum(len(gap_D) for gap_D in pairs) / count if count else 1.0
    if not share >= LEAST:
        raise RuntimeError(f"{name}: only {share:.1%} of the boxes are on both sides")
    return share, max((float(gap_D.max()) for gap_D in pairs if len(gap_D)), default=0.0)


def _matched(ours: Detections, theirs: Detections) -> Tensor:
    """Differences of the scores of the boxes that are on both sides; each counts once."""
    if not len(ours.score_D) or not len(theirs.score_D):
        return torch.zeros(0)
    gap_DD = (ours.score_D[:, None] - theirs.score_D[None]).abs().float()
    same_DD = box_iou(ours.box_D4.float(), theirs.box_D4.float()) >= SAME_IOU
    same_DD &= (ours.label_D[:, None] == theirs.label_D[None]) & (gap_DD <= SAME_SCORE)
    # Boxes of one class that overlap so much are suppressed, so a box has one partner at most.
    both_DD = same_DD & (same_DD.cumsum(dim=1) == 1) & (same_DD.cumsum(dim=0) == 1)
    return gap_DD[both_DD]


def as_detections(proposals: Sequence[Tensor]) -> list[Detections]:
    """Proposals (M, 4) of each image, to be compared like detections of one class and score."""
    return [
        Detections(box_M4, box_M4.new_ones(len(box_M4)), torch.ones_like(box_M4[:, 0]).long())
        for box_M4 in proposals
    ]
