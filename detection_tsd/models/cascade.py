"""Cascade R-CNN (arXiv 1712.00726): box heads one after another, each on the boxes of the last.

As in Sense-X/TSD, mmdet/models/detectors/cascade_rcnn.py: every stage has its own sampling IoU and
deltas, class-specific regression, and with TSD heads its own sibling, shifted boxes and
progressive constraint.

Letters: B images of a batch, R RoIs of the batch, K class scores with the background at column 0.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from detection_tsd import boxes
from detection_tsd.data.detection_data import Target
from detection_tsd.matching import RoISampler, Sampled
from detection_tsd.models.detector import Pyramids, TwoStage
from detection_tsd.models.fpn import PyramidBackbone
from detection_tsd.models.mask_branch import MaskBranch
from detection_tsd.models.prediction import Prediction
from detection_tsd.models.rpn import RPN
from detection_tsd.models.sibling_head import BoxHead
from detection_tsd.postprocess import PostProcess

REFINE = ("foreground", "any")


class CascadeDetector(TwoStage):
    """Detector with several box heads.

    A stage's boxes become the RoIs of the next one without a gradient: decoded relative to the
    shifted RoI where the head shifts, for the class of the ground truth in training and for the
    most probable class in a test. Final scores are the softmax of the mean logits of all stages,
    final boxes those of the last.

    A mask branch is trained on the positives of the first stage and reads the final boxes, as in
    detectron2; mmdetection has one branch for each stage.

    Args:
        backbone: images -> `Features`.
        heads: one for each stage; their `stds` should shrink from stage to stage.
        rpn: see `TwoStage`.
        sampler: see `TwoStage`; its IoU is replaced by `ious`.
        post: see `TwoStage`.
        mask: see `TwoStage`.
        ious: least overlap of a positive in each stage.
        stage_weights: of the losses of each stage. Sense-X/TSD has (1, 1, 1) with TSD heads and
            (1, 0.5, 0.25) in its baseline.
        refine_class: which class's box goes to the next stage: "foreground", the most probable but
            for the background (also of background RoIs in training); "any", as in Sense-X/TSD,
            where the background has deltas that are never trained.
        plus: see `TwoStage`; the heads' must be the same.
        rpn_on: see `TwoStage`.

    Raises:
        ValueError: numbers of heads, `ious` and `stage_weights` differ, or `refine_class` unknown.
    """

    def __init__(
        self,
        backbone: PyramidBackbone,
        heads: Sequence[BoxHead],
        rpn: RPN | None = None,
        sampler: RoISampler | None = None,
        post: PostProcess | None = None,
        mask: MaskBranch | None = None,
        ious: Sequence[float] = (0.5, 0.6, 0.7),
        stage_weights: Sequence[float] = (1.0, 1.0, 1.0),
        refine_class: str = "foreground",
        plus: float = 0.0,
        rpn_on: str = "cls",
    ) -> None:
        super().__init__(backbone, rpn, sampler, post, mask, plus, rpn_on)
        if not heads or not len(heads) == len(ious) == len(stage_weights):
            raise ValueError(
                f"heads, ious, stage_weights: {len(heads)}, {len(ious)} and {len(stage_weights)} "
                "of them, need one each for every stage"
            )
        if refine_class not in REFINE:
            raise ValueError(f"refine_class={refine_class!r}: need one of {REFINE}")
        for number, head in enumerate(heads, start=1):
            self._check_plus(f"head {number}", head)
        self.heads = nn.ModuleList(heads)
        self.ious, self.stage_weights = tuple(ious), tuple(stage_weights)
        self.refine_class = refine_class

    @property
    def stds(self) -> tuple[float, ...]:
        """Of the last head's deltas."""
        return self._stages()[-1].stds

    def _stages(self) -> list[BoxHead]:
        return cast(list[BoxHead], list(self.heads))

    def _losses_of_boxes(
        self,
        pyramids: Pyramids,
        proposals: list[Tensor],
        targets: list[Target],
        size_B2: Tensor,
        draw_B: Tensor,
    ) -> tuple[dict[str, Tensor], Sampled]:
        losses: dict[str, Tensor] = {}
        first: Sampled | None = None
        for stage, head in enumerate(self._stages()):
            sampled: Sampled = self.sampler(
                proposals, targets, draw_B, stage=stage, iou=self.ious[stage], plus=self.plus
            )
            parts, said = head.losses(pyramids.cls, pyramids.reg, sampled)
            for name, value in parts.items():
                losses[f"stage{stage + 1}_{name}"] = value * self.stage_weights[stage]
            first = first or sampled
            if stage + 1 < len(self.heads):
                proposals = self._next_proposals(said, sampled, size_B2, head.stds)
        assert first is not None
        return losses, first

    def _predict(self, pyramids: Pyramids, roi_R5: Tensor, size_B2: Tensor | None) -> Prediction:
        total_RK: Tensor | None = None
        for stage, head in enumerate(self._stages()):
            said: Prediction = head(pyramids.cls, pyramids.reg, roi_R5)
            logits_RK = said.logits_RK.float()
            total_RK = logits_RK if total_RK is None else total_RK + logits_RK
            if stage + 1 < len(self.heads):
                roi_R5 = self._refine(said, roi_R5, None, size_B2, head.stds)
        assert total_RK is not None
        return said._replace(logits_RK=total_RK / len(self.heads))

    def _next_proposals(
        self, said: Prediction, sampled: Sampled, size_B2: Tensor, stds: tuple[float, ...]
    ) -> list[Tensor]:
        """Refined RoIs of each image, without padding and without the ground truth itself.

        A sampler that adds the ground truth to the proposals adds it again in the next stage; kept
        here it would be in the set twice (`pos_is_gts` of mmdetection).
        """
        roi_R5 = self._refine(said, sampled.roi_R5, sampled.label_R, size_B2, stds)
        keep_R = sampled.weight_R > 0
        if self.sampler.add_gt:
            is_gt_R = (sampled.roi_R5[:, 1:] == sampled.match_R4).all(dim=1)
            keep_R = keep_R & ~(is_gt_R & (sampled.label_R > 0))
        image_R = sampled.roi_R5[:, 0].long()
        kept_B = torch.zeros(len(size_B2), dtype=torch.int64, device=keep_R.device)
        kept_B = kept_B.index_add(0, image_R, keep_R.long())
        return list(roi_R5[keep_R, 1:].split(kept_B.tolist()))  # the RoIs lie image after image

    @torch.no_grad()
    def _refine(
        self,
        said: Prediction,
        roi_R5: Tensor,
        label_R: Tensor | None,
        size_B2: Tensor | None,
        stds: tuple[float, ...],
    ) -> Tensor:
        """RoIs of the next stage, clipped to their images; no gradient."""
        label_R = self._class_to_refine(said.logits_RK, label_R)
        at_R14 = label_R[:, None, None].expand(-1, 1, 4)
        delta_R4 = said.delta_RK4.float().gather(1, at_R14).squeeze(1)
        box_R4 = boxes.decode(said.box_R4.float(), delta_R4, stds, self.plus)
        if size_B2 is not None:
            size_R2 = size_B2.to(box_R4.device)[roi_R5[:, 0].long()]
            limit_R4 = size_R2.flip(1).repeat(1, 2).to(box_R4) - self.plus
            box_R4 = torch.minimum(box_R4.clamp(min=0), limit_R4)
        return torch.cat((roi_R5[:, :1], box_R4), dim=1)

    def _class_to_refine(self, logits_RK: Tensor, label_R: Tensor | None) -> Tensor:
        """Class whose box each RoI becomes: of the ground truth where there is one."""
        if self.refine_class == "any":
            return logits_RK.argmax(dim=1) if label_R is None else label_R
        best_R = logits_RK[:, 1:].argmax(dim=1) + 1
        return best_R if label_R is None else torch.where(label_R > 0, label_R, best_R)


def with_stds(head: BoxHead, stds: Sequence[float]) -> BoxHead:
    """The head itself, with other standard deviations of its deltas.

    By nothing else do the heads of a cascade differ, so one node of a configuration serves all.

    Args:
        head: any box head.
        stds: four positive numbers, of the deltas of the centre (x, y) and of width and height.

    Raises:
        ValueError: not four positive numbers.
    """
    if len(stds) != 4 or min(stds) <= 0:
        raise ValueError(f"stds={list(stds)}: need four positive numbers")
    head.stds = tuple(float(std) for std in stds)
    return head
