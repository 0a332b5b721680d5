"""Which boxes are trained towards which objects, and which of them a step looks at.

Letters: B images, M boxes (anchors or proposals) of an image, G objects of an image, R sampled
RoIs of the batch. Nothing here draws from a generator: choices follow `boxes.random_keys`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from detection_tsd import boxes
from detection_tsd.data.detection_data import Target

NEGATIVE = -1
BETWEEN = -2
# overlaps held at once: what stays in the cache of a CPU (1 MiB in float32), 64 MiB elsewhere,
# and a few times that in temporaries
PAIRS = {"cpu": 2**18}
MOST_PAIRS = 2**24


class Sampled(NamedTuple):
    """RoIs of B images: image after image, and of each the positives, the negatives, the padding.

    Attributes:
        roi_R5: float32 (image index, x1, y1, x2, y2).
        label_R: int64, 0 is the background.
        match_R4: float32, the object of each positive; of the others the RoI itself.
        gt_R: int64, index into the objects of its image; -1 for the others.
        weight_R: float32, 1; 0 for padding, which no loss may count.
    """

    roi_R5: Tensor
    label_R: Tensor
    match_R4: Tensor
    gt_R: Tensor
    weight_R: Tensor


def assign(
    box_M4: Tensor,
    gt_G4: Tensor,
    high: float,
    low: float,
    floor: float | None = None,
    all_ties: bool = True,
    *,
    own_best: bool = False,
    plus: float = 0.0,
) -> Tensor:
    """Object that each box is trained towards (MaxIoUAssigner of mmdetection).

    A box belongs to the object it overlaps most if that IoU is >= `high`, to none if it is < `low`.
    Then the best-anchor rule gives every object whose best IoU is >= `floor` the boxes that reach
    it, so that no object goes without; among objects that claim one box the last wins.

    Args:
        box_M4: anchors or proposals.
        gt_G4: objects.
        high: IoU from which a box is positive.
        low: IoU below which it is negative.
        floor: None switches the best-anchor rule off; 0 claims boxes even without overlap, as
            torchvision does.
        all_ties: all boxes that reach an object's best IoU; otherwise the first only.
        own_best: a claimed box goes to the object it overlaps most, not to the claimant
            (torchvision, detectron2).
        plus: see `boxes`.

    Returns:
        int64 (M,): index of the object, -1 negative, -2 neither.

    Raises:
        ValueError: low > high.
    """
    if low > high:
        raise ValueError(f"low={low} must not exceed high={high}")
    if not len(box_M4) or not len(gt_G4):
        return torch.full((len(box_M4),), NEGATIVE, dtype=torch.int64, device=box_M4.device)
    # in bands of boxes, so that many anchors and objects fit
    step = max(1, PAIRS.get(box_M4.device.type, MOST_PAIRS) // len(gt_G4))
    bands = box_M4.detach().split(step)
    overlaps = lru_cache(maxsize=1)(lambda band: boxes.iou(gt_G4, bands[band], plus))
    matched, own, best = [], [], []
    for band in range(len(bands)):
        label_M, own_M, most = _of_band(overlaps(band), high, low)
        matched.append(label_M)
        own.append(own_M)
        best.append(most)
    if floor is None:
        return torch.cat(matched)
    most_G, first_G, claimed = _claims(best, step, floor)
    for band in claimed:
        reached_GM = overlaps(band) == most_G[:, None]
        if not all_ties:
            reached_GM = _numbers(bands[band]) + band * step == first_G[:, None]
        last_M = _greatest(reached_GM)
        matched[band] = torch.where(last_M >= 0, own[band] if own_best else last_M, matched[band])
    return torch.cat(matched)


def _of_band(
    iou_GM: Tensor, high: float, low: float
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Object, -1 or -2 of each box by the thresholds; the object it overlaps most; best of objects.

    The last are the greatest overlap of each object and the first box that has it.
    """
    most_M = iou_GM.amax(dim=0)
    own_M = len(iou_GM) - 1 - _greatest(iou_GM == most_M, reverse=True)  # the first of equals
    label_M = own_M.masked_fill(most_M < high, BETWEEN).masked_fill(most_M < low, NEGATIVE)
    best = iou_GM.max(dim=1)
    return label_M.masked_fill(most_M.isnan(), BETWEEN), own_M, (best.values, best.indices)


def _claims(
    best: Sequence[tuple[Tensor, Tensor]], step: int, floor: float
) -> tuple[Tensor, Tensor, list[int]]:
    """What the best-anchor rule asks for, from the best overlap and box of each object in a band.

    Returns:
        (G,) best overlap, NaN below the floor; (G,) number of the first box that has it, -1 below;
        the bands with such boxes, which are few where there are many.
    """
    most_KG = torch.stack([most_G for most_G, _ in best])
    most_G, band_G = most_KG.max(dim=0)
    box_G = torch.stack([box_G for _, box_G in best]).gather(0, band_G[None])[0]
    missed_G = most_G < floor
    most_G = most_G.masked_fill(missed_G, torch.nan)
    first_G = (box_G + step * band_G).masked_fill(missed_G, -1)
    if len(best) == 1:
        return most_G, first_G, [0]
    return most_G, first_G, (most_KG == most_G).any(dim=1).nonzero()[:, 0].tolist()


def _greatest(mask_GM: Tensor, reverse: bool = False) -> Tensor:
    """Number of the last row that is True, -1 where none is; counted from the end in `reverse`.

    A maximum of products: several times faster than argmax along a dimension.
    """
    number_G = _numbers(mask_GM).to(torch.int32) + 1
    number_G = number_G.flip(0) if reverse else number_G
    return (mask_GM * number_G[:, None]).amax(dim=0).to(torch.int64) - 1


def _numbers(rows: Tensor) -> Tensor:
    return torch.arange(len(rows), device=rows.device)


def sample(matched_M: Tensor, count: int, positive_share: float, key: int) -> tuple[Tensor, Tensor]:
    """Boxes of an image that a step looks at: those with the smallest `boxes.random_keys`.

    Args:
        matched_M: of `assign`.
        count: boxes wanted, fewer where there are not enough.
        positive_share: at most int(count * positive_share) are positive, the rest is negative.
        key: of the image and the purpose, see `boxes.fold_key`.

    Returns:
        Indices of the positives and of the negatives, int64, each ascending.
    """
    key_M = boxes.random_keys(len(matched_M), key, matched_M.device)
    positive = _smallest((matched_M >= 0).nonzero()[:, 0], key_M, int(count * positive_share))
    negative = _smallest((matched_M == NEGATIVE).nonzero()[:, 0], key_M, count - len(positive))
    return positive, negative


def _smallest(index: Tensor, key_M: Tensor, count: int) -> Tensor:
    if len(index) <= count:
        return index
    return index[key_M[index].topk(count, largest=False).indices].sort().values


def sample_rois(
    proposals: Sequence[Tensor],
    targets: Sequence[Target],
    draw_B: Tensor,
    *,
    seed: int,
    stage: int = 0,
    count: int = 512,
    positive_share: float = 0.25,
    iou: float = 0.5,
    add_gt: bool = True,
    pad: bool = False,
    plus: float = 0.0,
) -> Sampled:
    """RoIs that a box head is trained on (assigner and sampler of mmdetection's two-stage models).

    Proposals are positive from `iou` on, negative below; an object whose best proposal reaches
    `iou` claims it. Crowds are not looked at: proposals on them are ordinary negatives. The choice
    depends on (seed, draw, stage) and the proposals only.

    Args:
        proposals: of each of the B images, float (M, 4); gradients stop here.
        targets: of each image.
        draw_B: int64, number of the draw of each image.
        seed: of the run.
        stage: of a cascade, so that its stages choose independently.
        count: RoIs an image.
        positive_share: of the RoIs, at most.
        iou: see above.
        add_gt: put the objects in front of the proposals, each matched with itself.
        pad: fill every image up to `count` rows of weight 0 and background label, for fixed shapes.
        plus: see `boxes`.

    Raises:
        ValueError: the three lists are of different lengths.
    """
    if not len(proposals) == len(targets) == len(draw_B):
        lengths = f"{len(proposals)} proposals, {len(targets)} targets, {len(draw_B)} draws"
        raise ValueError(f"{lengths}: one of each is needed for every image")
    parts = []
    pairs = zip(proposals, targets, draw_B.tolist(), strict=True)
    for image, (box_M4, target, draw) in enumerate(pairs):
        box_M4 = box_M4.detach().to(torch.float32)
        gt_G4 = target.box_G4.to(box_M4)
        matched_M = assign(box_M4, gt_G4, iou, iou, iou, plus=plus)
        if add_gt:
            box_M4 = torch.cat((gt_G4, box_M4))
            own_G = torch.arange(len(gt_G4), device=matched_M.device)
            matched_M = torch.cat((own_G, matched_M))
        key = boxes.fold_key(seed, draw, stage)
        chosen = torch.cat(sample(matched_M, count, positive_share, key))
        part = _rows(image, box_M4[chosen], matched_M[chosen], gt_G4, target.label_G)
        parts.append(_padded(part, image, count) if pad else part)
    return Sampled(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _rows(image: int, box_R4: Tensor, gt_R: Tensor, gt_G4: Tensor, label_G: Tensor) -> Sampled:
    """Sampled boxes of one image with what they are trained towards."""
    positive_R = gt_R >= 0
    if len(gt_G4):
        index_R = gt_R.clamp(min=0)
        match_R4 = torch.where(positive_R[:, None], gt_G4[index_R], box_R4)
        label_R = label_G.to(gt_R)[index_R] * positive_R
    else:
        match_R4, label_R = box_R4, torch.zeros_like(gt_R)
    roi_R5 = torch.cat((box_R4.new_full((len(box_R4), 1), image), box_R4), dim=1)
    return Sampled(roi_R5, label_R, match_R4, gt_R, torch.ones_like(box_R4[:, 0]))


def _padded(part: Sampled, image: int, count: int) -> Sampled:
    """The rows of one image and boxes of one pixel that weigh nothing, `count` together."""
    missing = count - len(part.roi_R5)
    box_R4 = part.roi_R5.new_tensor((0.0, 0.0, 1.0, 1.0)).expand(missing, 4)
    none_R = torch.full((missing,), NEGATIVE, device=box_R4.device)
    filling = _rows(image, box_R4, none_R, box_R4[:0], none_R[:0])
    filling = filling._replace(weight_R=torch.zeros_like(filling.weight_R))
    return Sampled(*(torch.cat(pair) for pair in zip(part, filling, strict=True)))


@dataclass(frozen=True)
class RoISampler:
    """`sample_rois` with its settings, for a configuration."""

    count: int = 512
    positive_share: float = 0.25
    iou: float = 0.5
    add_gt: bool = True
    seed: int = 0
    pad: bool = False

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.positive_share <= 1 or not 0 < self.iou <= 1:
            given = f"count={self.count} positive_share={self.positive_share} iou={self.iou}"
            raise ValueError(f"{given}: count >= 1, a share in [0, 1] and 0 < iou <= 1 are needed")

    def __call__(
        self,
        proposals: Sequence[Tensor],
        targets: Sequence[Target],
        draw_B: Tensor,
        stage: int = 0,
        iou: float | None = None,
        plus: float = 0.0,
    ) -> Sampled:
        """See `sample_rois`; `iou` takes the place of the setting, for stages of a cascade."""
        return sample_rois(
            proposals,
            targets,
            draw_B,
            seed=self.seed,
            stage=stage,
            count=self.count,
            positive_share=self.positive_share,
            iou=self.iou if iou is None else iou,
            add_gt=self.add_gt,
            pad=self.pad,
            plus=plus,
        )
