"""Losses of the box heads: classification, boxes, and the progressive constraint of TSD.

All are pure functions, float32 inside autocast (float64 stays), and 0 with a graph when no row
counts. No function reads a value back from the device.

Letters: R RoIs, K class scores with the background at column 0, B images of a batch, 4 box (xyxy)
or its deltas, 3 kinds of rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from detection_tsd import boxes
from detection_tsd.models.normalise import divisor

PC_MODES = ("repo", "paper")


class Rows(NamedTuple):
    """Which RoIs a loss counts, as weights, and what its sum is divided by.

    Attributes:
        every_R: 1 for a RoI, 0 for padding.
        positive_R: 1 for a RoI with a foreground label.
        contrast_R: 1 for a RoI of an image that has a positive one, background included.
        divisor_3: rows of each kind, mean over the ranks, at least one in all.
    """

    every_R: Tensor
    positive_R: Tensor
    contrast_R: Tensor
    divisor_3: Tensor


def count_rows(label_R: Tensor, weight_R: Tensor, image_R: Tensor, images: int) -> Rows:
    """Sort the sampled RoIs into the rows that the losses count (one exchange between ranks).

    Args:
        label_R: int64, 0 for the background.
        weight_R: 0 for rows that only fill up a fixed count.
        image_R: image of the batch that a RoI lies in; any order.
        images: B.
    """
    weight_R = full(weight_R.detach())
    positive_R = (label_R > 0) & (weight_R > 0)
    image_B1 = torch.arange(images, device=label_R.device)[:, None]
    has_positive_B = ((image_B1 == image_R.long()) & positive_R).any(dim=1)
    contrast_R = has_positive_B[image_R.long()] * weight_R
    kinds = (weight_R, positive_R * weight_R, contrast_R)
    return Rows(*kinds, divisor(torch.stack([kind.sum() for kind in kinds])))


def cross_entropy_rows(logits_RK: Tensor, label_R: Tensor) -> Tensor:
    """Cross entropy of each RoI, -ln p(y), (R,).

    Raises:
        ValueError: a label is outside 0..K-1 (looked at on the CPU alone; a GPU asserts by itself).
    """
    if label_R.device.type == "cpu" and len(label_R):
        low, high = label_R.aminmax()
        if low < 0 or high >= logits_RK.shape[1]:
            raise ValueError(
                f"label in {low.item()}..{high.item()}, need 0..{logits_RK.shape[1] - 1}"
            )
    with torch.autocast(logits_RK.device.type, enabled=False):
        return F.cross_entropy(full(logits_RK), label_R, reduction="none")


def classification(cross_entropy_R: Tensor, rows: Rows) -> Tensor:
    """Mean cross entropy over all RoIs, background included (arXiv 2003.07540, equation 9)."""
    return _mean(cross_entropy_R, rows.every_R, rows.divisor_3[0])


def deltas_of(delta_RK4: Tensor, label_R: Tensor) -> Tensor:
    """Deltas of the class of each RoI, float32 (R, 4)."""
    at_R14 = label_R[:, None, None].expand(-1, 1, 4)
    return full(delta_RK4.gather(1, at_R14).squeeze(1))


def box_regression(
    delta_R4: Tensor,
    box_R4: Tensor,
    match_R4: Tensor,
    rows: Rows,
    stds: tuple[float, ...],
    plus: float = 0.0,
) -> Tensor:
    """Smooth L1 (beta 1) to the deltas that lead from a box to its object, over the positives.

    The sum is divided by the number of ALL sampled RoIs, as in Fast R-CNN. The target is a function
    of `box_R4`: when that is the shifted RoI P_r = P + gamma * delta * size, the target of the
    centre is t - gamma / std * delta, and the loss trains the shift (Sense-X/TSD does this;
    simpledet detaches it).

    Args:
        delta_R4: predicted deltas of the class of the ground truth.
        box_R4: what they are relative to; takes gradient.
        match_R4: ground-truth box of each RoI; rows that are not positive may hold anything.
        rows: see `count_rows`.
        stds: of the four deltas.
        plus: 1 when a box includes its last pixel.
    """
    with torch.autocast(delta_R4.device.type, enabled=False):
        box_R4, match_R4 = _safe(box_R4, match_R4, rows)
        target_R4 = boxes.encode(box_R4, match_R4, stds, plus)
        cost_R = F.smooth_l1_loss(full(delta_R4), target_R4, reduction="none").sum(dim=1)
        return _mean(cost_R, rows.positive_R, rows.divisor_3[0])


def overlap_rows(
    delta_R4: Tensor,
    box_R4: Tensor,
    match_R4: Tensor,
    rows: Rows,
    stds: tuple[float, ...],
    plus: float = 0.0,
) -> Tensor:
    """IoU of each decoded box with its ground truth, (R,); anything where a row is not positive.

    The boxes are not clipped to the image, which would stop the gradient at its border. Arguments
    as of `box_regression`; the gradient reaches the deltas and `box_R4`.
    """
    with torch.autocast(delta_R4.device.type, enabled=False):
        box_R4, match_R4 = _safe(box_R4, match_R4, rows)
        decoded_R4 = boxes.decode(box_R4, full(delta_R4), stds, plus)
        return boxes.iou_rows(decoded_R4, match_R4, plus)


def progressive_rows(sibling_R: Tensor, branch_R: Tensor, margin: float, mode: str) -> Tensor:
    """Hinge that asks the disentangled branch to beat the sibling by a margin, (R,).

        repo:   max(0, min(1, s + m) - d), s a constant
        paper:  max(0, s - d + m), gradient to both

    (arXiv 2003.07540, equations 7 and 8; "repo" is a closed form of what Sense-X/TSD computes.) The
    paper's form asks for more than 1 where s > 1 - m, and pushes the sibling down.

    Args:
        sibling_R: s, probability of the true class or IoU, in [0, 1].
        branch_R: d, the same of the disentangled branch.
        margin: m, in units of both.
        mode: "repo" or "paper".

    Raises:
        ValueError: an unknown mode or a negative margin.
    """
    check_progressive(margin, mode)
    if mode == "paper":
        return F.relu(sibling_R - branch_R + margin)
    return F.relu((sibling_R.detach() + margin).clamp(max=1.0) - branch_R)


def check_progressive(margin: float | None, mode: str) -> None:
    """Raise ValueError for settings that `progressive_rows` does not know."""
    if mode not in PC_MODES:
        raise ValueError(f"pc_mode={mode!r}: need one of {PC_MODES}")
    if margin is not None and margin < 0:
        raise ValueError(f"margin={margin}: need at least 0")


def progressive_classification(
    sibling_R: Tensor, branch_R: Tensor, rows: Rows, margin: float, mode: str = "repo"
) -> Tensor:
    """M_cls: mean hinge over all RoIs of the images that have a positive one.

    Args:
        sibling_R: cross entropies (not probabilities) of the sibling, see `cross_entropy_rows`.
        branch_R: those of the disentangled branch.
        rows: see `count_rows`.
        margin: m_c.
        mode: see `progressive_rows`.
    """
    hinge_R = progressive_rows(full(-sibling_R).exp(), full(-branch_R).exp(), margin, mode)
    return _mean(hinge_R, rows.contrast_R, rows.divisor_3[2])


def progressive_box(
    sibling_R: Tensor, branch_R: Tensor, rows: Rows, margin: float, mode: str = "repo"
) -> Tensor:
    """M_loc: mean hinge over the positives.

    Args:
        sibling_R: IoU of the sibling's box with the ground truth, see `overlap_rows`.
        branch_R: that of the disentangled branch.
        rows: see `count_rows`.
        margin: m_r.
        mode: see `progressive_rows`.
    """
    hinge_R = progressive_rows(full(sibling_R), full(branch_R), margin, mode)
    return _mean(hinge_R, rows.positive_R, rows.divisor_3[1])


def _mean(value_R: Tensor, weight_R: Tensor, divisor: Tensor) -> Tensor:
    return (full(value_R) * weight_R).sum() / divisor


def _safe(box_R4: Tensor, match_R4: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Both with unit boxes where a row does not count: its NaN would survive a weight of 0."""
    keep_R1 = rows.positive_R[:, None] > 0
    box_R4, match_R4 = full(box_R4), full(match_R4)
    unit_4 = box_R4.new_zeros(4)
    unit_4[2:] = 1.0  # no copy from the host, which would wait for the device
    return torch.where(keep_R1, box_R4, unit_4), torch.where(keep_R1, match_R4, unit_4)


def full(x: Tensor) -> Tensor:
    """The tensor in float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
