"""Region proposal network on a feature pyramid (arXiv 1506.01497, arXiv 1612.03144).

Letters: B images, C channels, H W size, L levels, T anchors of all levels of an image, M proposals,
G objects. Keys of the state dict are those of torchvision's RPNHead under `head.`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.rpn import RPNHead

from detection_tsd import boxes, matching, nms
from detection_tsd.data.detection_data import Target
from detection_tsd.models.normalise import over_ranks

STDS = (1.0, 1.0, 1.0, 1.0)
BETA = 1 / 9
PURPOSE = 0x52504E  # sets the draws of anchors apart from those of RoIs


class RPNOutput(NamedTuple):
    """What the network says about every anchor.

    Attributes:
        logits: of each level, float32 (B, anchors of the level); row, column, ratio.
        deltas: of each level, float32 (B, anchors of the level, 4).
        anchors: of each level, float32 (anchors of the level, 4).
    """

    logits: list[Tensor]
    deltas: list[Tensor]
    anchors: list[Tensor]


class Proposals(NamedTuple):
    """Proposals of one image, best first.

    Attributes:
        box_M4: float32, cut at the image. score_M: float32, probability of an object.
    """

    box_M4: Tensor
    score_M: Tensor


def base_anchors(
    stride: int,
    size: float,
    ratios: Sequence[float],
    *,
    rounded: bool = False,
    offset: float = 0.0,
    plus: float = 0.0,
) -> Tensor:
    """Anchors of the cell at the origin, float32 (ratios, 4), all of the same area.

    Args:
        stride: of the level, pixels.
        size: side of a square anchor in strides.
        ratios: height over width.
        rounded: corners to whole pixels, halves to even (torchvision, mmdetection v1).
        offset: centre of the anchor in its cell, in strides: 0 in torchvision, detectron2 and
            mmdetection v2, 0.5 in mmdetection v1.
        plus: see `boxes`.
    """
    height = torch.tensor(ratios, dtype=torch.float32).sqrt()
    half_width = (size * stride / height - plus) / 2
    half_height = (size * stride * height - plus) / 2
    centre = offset * (stride - plus)
    corners = torch.stack((-half_width, -half_height, half_width, half_height), dim=1) + centre
    return corners.round() if rounded else corners


def grid_anchors(base_A4: Tensor, stride: int, height: int, width: int) -> Tensor:
    """The base anchors at every cell of a map, (height * width * A, 4); row, column, ratio."""
    x = torch.arange(width, device=base_A4.device, dtype=base_A4.dtype) * stride
    y = torch.arange(height, device=base_A4.device, dtype=base_A4.dtype) * stride
    y_HW, x_HW = torch.meshgrid(y, x, indexing="ij")
    shift = torch.stack((x_HW, y_HW, x_HW, y_HW), dim=-1)
    return (shift[:, :, None] + base_A4).reshape(-1, 4)


class RPN(nn.Module):
    """Proposals from L maps, and the two losses they are trained with.

    With `border=None, floor=0.0, own_best=True, rounded_anchors=True, min_size=1e-3` it is
    torchvision's RegionProposalNetwork for images whose sides are multiples of the greatest stride
    (that one derives strides from sizes, which is not exact elsewhere).

    Args:
        channels: of the maps.
        strides: of the maps, ascending.
        size: side of an anchor in strides.
        ratios: height over width of the anchors of a cell.
        pre_train: best anchors of a level that enter the suppression in training.
        post_train: proposals of an image in training.
        pre_test: as `pre_train`, in evaluation.
        post_test: as `post_train`, in evaluation.
        nms: IoU above which a worse proposal of the same level goes.
        high: IoU from which an anchor is positive.
        low: IoU below which it is negative.
        floor: least IoU at which an object claims its best anchors, ties included; None: never.
        border: anchors that reach more than this many pixels over the image are not trained; None
            trains all.
        count: anchors of an image that a step trains.
        positive_share: of them, at most.
        seed: of the choice of these anchors.
        min_size: pixels; smaller proposals are left out.
        rounded_anchors: see `base_anchors`.
        offset: see `base_anchors`.
        own_best: a claimed anchor is trained towards the object it overlaps most.
        plus: see `boxes`.
    """

    def __init__(
        self,
        channels: int = 256,
        strides: Sequence[int] = (4, 8, 16, 32, 64),
        size: float = 8.0,
        ratios: Sequence[float] = (0.5, 1.0, 2.0),
        pre_train: int = 2000,
        post_train: int = 2000,
        pre_test: int = 1000,
        post_test: int = 1000,
        nms: float = 0.7,
        high: float = 0.7,
        low: float = 0.3,
        floor: float | None = 0.3,
        border: float | None = 0.0,
        count: int = 256,
        positive_share: float = 0.5,
        seed: int = 0,
        min_size: float = 0.0,
        rounded_anchors: bool = False,
        offset: float = 0.0,
        own_best: bool = False,
        plus: float = 0.0,
    ):
        super().__init__()
        if low > high or min(pre_train, post_train, pre_test, post_test, count) < 1:
            counts = (pre_train, post_train, pre_test, post_test, count)
            raise ValueError(f"low={low} high={high} counts={counts}: low <= high, counts >= 1")
        self.head = RPNHead(channels, len(ratios))
        self.strides = tuple(strides)
        self.pre = {True: pre_train, False: pre_test}
        self.post = {True: post_train, False: post_test}
        self.nms, self.min_size, self.plus = nms, min_size, plus
        self.high, self.low, self.floor, self.own_best = high, low, floor, own_best
        self.border, self.count, self.positive_share = border, count, positive_share
        self.seed = seed
        for level, stride in enumerate(self.strides):
            base_A4 = base_anchors(
                stride, size, ratios, rounded=rounded_anchors, offset=offset, plus=plus
            )
            self.register_buffer(f"base_{level}", base_A4, persistent=False)

    def forward(
        self, maps: Sequence[Tensor], size_B2: Tensor, image_hw: tuple[int, int]
    ) -> RPNOutput:
        """Scores and deltas of all anchors.

        Args:
            maps: L maps (B, C, H_l, W_l).
            size_B2: heights and widths of the valid parts.
            image_hw: height and width of the padded input.

        Raises:
            ValueError: the maps do not belong to the strides, the input or the batch.
        """
        self._check(maps, size_B2, image_hw)
        logits, deltas, anchors = [], [], []
        for level, (logit, delta) in enumerate(zip(*self.head(list(maps)), strict=True)):
            batch, _, height, width = logit.shape
            logits.append(logit.permute(0, 2, 3, 1).reshape(batch, -1).to(torch.float32))
            delta = delta.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2)
            deltas.append(delta.reshape(batch, -1, 4).to(torch.float32))
            base_A4 = self.get_buffer(f"base_{level}")
            anchors.append(grid_anchors(base_A4, self.strides[level], height, width))
        return RPNOutput(logits, deltas, anchors)

    def _check(self, maps: Sequence[Tensor], size_B2: Tensor, image_hw: tuple[int, int]) -> None:
        wanted = [tuple(math.ceil(side / stride) for side in image_hw) for stride in self.strides]
        given = [tuple(x_BCHW.shape[-2:]) for x_BCHW in maps]
        if given != wanted:
            raise ValueError(
                f"maps of {given} cells do not cover {tuple(image_hw)} pixels at strides "
                f"{self.strides}: {wanted} are needed"
            )
        if len(size_B2) != len(maps[0]):
            raise ValueError(f"size_B2 has {len(size_B2)} rows, the maps {len(maps[0])} images")

    def proposals(self, output: RPNOutput, size_B2: Tensor) -> list[Tensor]:
        """Boxes of `scored_proposals`."""
        return [found.box_M4 for found in self.scored_proposals(output, size_B2)]

    @torch.no_grad()
    def scored_proposals(self, output: RPNOutput, size_B2: Tensor) -> list[Proposals]:
        """Proposals of each image: the best of every level, suppressed there, the best of all.

        Raises:
            ValueError: a score or a box is NaN.
        """
        logits, found, levels = [], [], []
        for level, (logit, delta, anchor) in enumerate(zip(*output, strict=True)):
            best = logit.topk(min(self.pre[self.training], logit.shape[1]), dim=1)
            delta = delta.gather(1, best.indices[..., None].expand(-1, -1, 4))
            logits.append(best.values)
            found.append(boxes.decode(anchor[best.indices], delta, STDS, self.plus))
            levels.append(torch.full_like(best.indices[0], level))
        box_BM4, logit_BM, level_M = torch.cat(found, 1), torch.cat(logits, 1), torch.cat(levels)
        images = zip(box_BM4, logit_BM, size_B2, strict=True)
        return [self._suppress(box, logit, level_M, size) for box, logit, size in images]

    def _suppress(
        self, box_M4: Tensor, logit_M: Tensor, level_M: Tensor, size: Tensor
    ) -> Proposals:
        nms.refuse_nan(box_M4, logit_M)
        box_M4 = boxes.clip_boxes(box_M4, size, self.plus)
        sized = boxes.valid_mask(box_M4, self.min_size, self.plus).nonzero()[:, 0]
        # by logits, which still differ where their sigmoids are both one
        kept = nms.hard(
            box_M4[sized],
            logit_M[sized],
            level_M[sized],
            self.nms,
            plus=self.plus,
            limit=self.post[self.training],
        )
        return Proposals(box_M4[sized[kept.index_D]], kept.score_D.sigmoid())

    def losses(
        self, output: RPNOutput, targets: Sequence[Target], size_B2: Tensor, draw_B: Tensor
    ) -> dict[str, Tensor]:
        """Cross-entropy of the scores and smooth L1 (beta 1/9) of the positives' deltas.

        Both are sums over the chosen anchors, divided by their number over all images (and ranks).
        Which ones depends on (seed, draw) only. Without any, both are 0 and have a gradient.

        Args:
            output: of `forward`.
            targets: of each image.
            size_B2: heights and widths of the valid parts.
            draw_B: int64, number of the draw of each image.

        Returns:
            loss_rpn_cls and loss_rpn_box.
        """
        anchor_T4 = torch.cat(output.anchors)
        logit_BT, delta_BT4 = torch.cat(output.logits, 1), torch.cat(output.deltas, 1)
        images = zip(targets, size_B2, draw_B.tolist(), strict=True)
        chosen = [self._choose(anchor_T4, *image) for image in images]
        scores, truths, offsets = [], [], []
        for image, (positive, negative, match) in enumerate(chosen):
            index = torch.cat((positive, negative))
            scores.append(logit_BT[image, index])
            truths.append((torch.arange(len(index), device=index.device) < len(positive)).float())
            target = boxes.encode(anchor_T4[positive], match, STDS, self.plus)
            delta = delta_BT4[image, positive]
            offsets.append(F.smooth_l1_loss(delta, target, beta=BETA, reduction="sum"))
        score, truth = torch.cat(scores), torch.cat(truths)
        count = over_ranks(score.new_tensor(float(len(score)))).clamp(min=1)
        loss_cls = F.binary_cross_entropy_with_logits(score, truth, reduction="sum") / count
        return {"loss_rpn_cls": loss_cls, "loss_rpn_box": torch.stack(offsets).sum() / count}

    @torch.no_grad()
    def _choose(
        self, anchor_T4: Tensor, target: Target, size: Tensor, draw: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Anchors of one image to train as positives and as negatives, and the positives' boxes."""
        gt_G4 = target.box_G4.to(anchor_T4)
        inside = self._inside(anchor_T4, size)
        matched = matching.assign(
            anchor_T4 if inside is None else anchor_T4[inside],
            gt_G4,
            self.high,
            self.low,
            self.floor,
            own_best=self.own_best,
            plus=self.plus,
        )
        key = boxes.fold_key(self.seed, draw, PURPOSE)
        positive, negative = matching.sample(matched, self.count, self.positive_share, key)
        match = gt_G4[matched[positive]]
        if inside is None:
            return positive, negative, match
        return inside[positive], inside[negative], match

    def _inside(self, anchor_T4: Tensor, size: Tensor) -> Tensor | None:
        """Indices of the anchors that stay within the border; None where all do."""
        if self.border is None:
            return None
        height, width = size
        x1, y1, x2, y2 = anchor_T4.unbind(1)
        least, most = -self.border, self.border - self.plus
        inside = (x1 >= least) & (y1 >= least) & (x2 <= width + most) & (y2 <= height + most)
        return inside.nonzero()[:, 0]
