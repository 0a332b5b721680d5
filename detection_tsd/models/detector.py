"""Two-stage detectors: regions from an RPN or from a file, a box head, and what is made of it.

Boxes outside of a detector are continuous (width = x2 - x1). With `plus` = 1 everything inside of
it, and so its weights, works on the inclusive pixels of mmdetection v1; boxes are converted at its
border and nowhere else.

Letters: B images of a batch, H W size, R RoIs of the batch, M proposals of an image, D detections,
K class scores with the background at column 0, S mask bins per side.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from detection_tsd import boxes
from detection_tsd.data.detection_data import Detections, Target
from detection_tsd.matching import RoISampler, Sampled
from detection_tsd.models.fpn import Features, PyramidBackbone
from detection_tsd.models.mask_branch import MaskBranch
from detection_tsd.models.prediction import Prediction
from detection_tsd.models.rpn import RPN
from detection_tsd.models.sibling_head import BoxHead
from detection_tsd.ops.pyramid import Pyramid
from detection_tsd.postprocess import PostProcess

RPN_ON = ("cls", "reg")


class Pyramids(NamedTuple):
    """What the RoI operators of the two branches read; one object twice where they share it."""

    cls: Pyramid
    reg: Pyramid


class TwoStage(nn.Module):
    """What `Detector` and `CascadeDetector` share: all around the box head.

    Args:
        backbone: images -> `Features`.
        rpn: proposes regions; None: `forward` is given them.
        sampler: chooses the RoIs that a training step looks at.
        post: scores and deltas -> detections.
        mask: predicts masks of positives and of detections; None for boxes only.
        plus: what a width has beyond x2 - x1 inside of the detector: 0, or 1 (mmdetection v1).
        rpn_on: which maps the RPN reads, "cls" or "reg", where a backbone separates them. The
            paper (arXiv 2003.07540, table 1) does not say.

    Raises:
        ValueError: `rpn_on` unknown, or a part with another `plus`.
    """

    def __init__(
        self,
        backbone: PyramidBackbone,
        rpn: RPN | None,
        sampler: RoISampler | None,
        post: PostProcess | None,
        mask: MaskBranch | None,
        plus: float,
        rpn_on: str,
    ) -> None:
        super().__init__()
        if rpn_on not in RPN_ON:
            raise ValueError(f"rpn_on={rpn_on!r}: need one of {RPN_ON}")
        self.backbone, self.rpn, self.mask = backbone, rpn, mask
        self.sampler, self.post = sampler or RoISampler(), post or PostProcess()
        self.plus, self.rpn_on = float(plus), rpn_on
        for name, part in (("rpn", rpn), ("mask", mask)):
            self._check_plus(name, part)

    def _check_plus(self, name: str, part: nn.Module | None) -> None:
        of_part = getattr(part, "plus", self.plus)
        if of_part != self.plus:
            raise ValueError(f"plus={self.plus}, but that of the {name} is {of_part}")

    @property
    def stds(self) -> tuple[float, ...]:
        """Of the deltas that `_predict` returns."""
        raise NotImplementedError

    def _losses_of_boxes(
        self,
        pyramids: Pyramids,
        proposals: list[Tensor],
        targets: list[Target],
        size_B2: Tensor,
        draw_B: Tensor,
    ) -> tuple[dict[str, Tensor], Sampled]:
        """Losses of the box heads, and the RoIs whose positives the masks are trained on."""
        raise NotImplementedError

    def _predict(self, pyramids: Pyramids, roi_R5: Tensor, size_B2: Tensor | None) -> Prediction:
        """Scores and deltas of RoIs, everything in the detector's own convention."""
        raise NotImplementedError

    def forward(
        self,
        x_B3HW: Tensor,
        size_B2: Tensor,
        targets: Sequence[Target] | None = None,
        proposals: Sequence[Tensor] | None = None,
        draw_B: Tensor | None = None,
    ) -> dict[str, Tensor] | list[Detections]:
        """Losses in training mode, else detections.

        Args:
            x_B3HW: normalised images, padded at the right and the bottom.
            size_B2: height and width of the valid part.
            targets: B of them, in training.
            proposals: B times (M, 4) in network-input pixels, where there is no RPN; with one they
                are not looked at.
            draw_B: number of the draw of each image, in training: all that the random choice of
                RoIs depends on besides the sampler's seed.

        Returns:
            In training the parts of the loss, always under the same names. Else for each image its
            detections in network-input pixels, clipped to the valid part, best first.

        Raises:
            ValueError: an argument is missing, or there are not B of them.
        """
        _check_counts(x_B3HW, size_B2, targets, proposals, draw_B)
        if self.rpn is None and proposals is None:
            raise ValueError("proposals=None: a detector without an RPN needs them")
        features = self.features(x_B3HW)
        image_hw = (x_B3HW.shape[2], x_B3HW.shape[3])
        given = list(proposals or [])
        if not self.training:
            if self.rpn is not None:
                given = self.propose(features, size_B2, image_hw)
            return self._detect(features, given, size_B2)
        if targets is None or draw_B is None:
            raise ValueError("targets and draw_B: training needs both")
        inner = [self._target(target) for target in targets]
        losses, regions = self._regions(features, given, inner, size_B2, image_hw, draw_B.cpu())
        pyramids = self.pyramids(features)
        of_boxes, sampled = self._losses_of_boxes(pyramids, regions, inner, size_B2, draw_B.cpu())
        losses |= of_boxes
        if self.mask is not None:
            losses["loss_mask"] = self.mask.loss(pyramids.reg, sampled, inner)
        return losses

    def _regions(
        self,
        features: Features,
        given: list[Tensor],
        targets: list[Target],
        size_B2: Tensor,
        image_hw: tuple[int, int],
        draw_B: Tensor,
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Losses of the RPN, and the proposals that the box head is trained on."""
        if self.rpn is None:
            return {}, [self._inner(box_M4.float()) for box_M4 in given]
        output = self.rpn(getattr(features, self.rpn_on), size_B2, image_hw)
        losses = dict(self.rpn.losses(output, targets, size_B2, draw_B))
        return losses, self.rpn.proposals(output, size_B2)

    def features(self, x_B3HW: Tensor) -> Features:
        """Maps of normalised images."""
        features: Features = self.backbone(x_B3HW)
        return features

    def pyramids(self, features: Features) -> Pyramids:
        """What the RoI operators read of the maps."""
        levels = self.backbone.roi_levels
        strides = self.backbone.strides[:levels]
        of_cls = Pyramid(features.cls[:levels], strides)
        if features.reg is features.cls:
            return Pyramids(of_cls, of_cls)
        return Pyramids(of_cls, Pyramid(features.reg[:levels], strides))

    def propose(
        self, features: Features, size_B2: Tensor, image_hw: tuple[int, int]
    ) -> list[Tensor]:
        """Proposals (M, 4) of each image, best first.

        Args:
            features: see `features`.
            size_B2: height and width of the valid part.
            image_hw: height and width of the padded input.

        Raises:
            ValueError: the detector has no RPN.
        """
        return [box_M4 for box_M4, _ in self.propose_scored(features, size_B2, image_hw)]

    def propose_scored(
        self, features: Features, size_B2: Tensor, image_hw: tuple[int, int]
    ) -> list[tuple[Tensor, Tensor]]:
        """As `propose`, with the objectness (M,) in [0, 1] of each proposal."""
        if self.rpn is None:
            raise ValueError("rpn=None: this detector does not propose")
        output = self.rpn(getattr(features, self.rpn_on), size_B2, image_hw)
        return [
            (self._outer(box_M4), score_M)
            for box_M4, score_M in self.rpn.scored_proposals(output, size_B2)
        ]

    def score(
        self, features: Features, roi_R5: Tensor, size_B2: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Probabilities and boxes of RoIs: what averaging over several views needs.

        Args:
            features: see `features`.
            roi_R5: (image index, box) in network-input pixels.
            size_B2: a cascade clips the boxes between its stages to it; None: it does not.

        Returns:
            prob_RK, and box_RK4 of each class, not clipped: the deltas applied to the RoI, or to
            the shifted RoI where the head shifts it.
        """
        inner_R5 = torch.cat((roi_R5[:, :1], self._inner(roi_R5[:, 1:])), dim=1)
        said = self._predict(self.pyramids(features), inner_R5, size_B2)
        delta_RK4 = said.delta_RK4.float()
        box_RK4 = boxes.decode(said.box_R4[:, None], delta_RK4, self.stds, self.plus)
        return said.logits_RK.float().softmax(dim=1), self._outer(box_RK4)

    def select(self, prob_RK: Tensor, box_RK4: Tensor, size: tuple[int, int]) -> Detections:
        """Detections of one image from what `score` says of its RoIs.

        Args:
            prob_RK: probabilities.
            box_RK4: decoded boxes, in any frame.
            size: height and width of that frame, which the boxes are clipped to.
        """
        found = self.post.decoded(prob_RK, self._inner(box_RK4), size, self.plus)
        return found._replace(box_D4=self._outer(found.box_D4))

    def masks(self, features: Features, roi_R5: Tensor, label_R: Tensor) -> Tensor:
        """Mask probabilities (R, S, S) of the given classes on a grid over each RoI.

        Raises:
            ValueError: the detector has no mask branch.
        """
        if self.mask is None:
            raise ValueError("mask=None: this detector predicts no masks")
        inner_R5 = torch.cat((roi_R5[:, :1], self._inner(roi_R5[:, 1:])), dim=1)
        mask_RSS: Tensor = self.mask(self.pyramids(features).reg, inner_R5, label_R)
        return mask_RSS

    def _detect(
        self, features: Features, proposals: list[Tensor], size_B2: Tensor
    ) -> list[Detections]:
        pyramids = self.pyramids(features)
        inner = [self._inner(box_M4.float()) for box_M4 in proposals]
        said = self._predict(pyramids, join_rois(inner), size_B2)
        prob_RK = said.logits_RK.float().softmax(dim=1)
        counts = [len(box_M4) for box_M4 in inner]
        rows = zip(
            prob_RK.split(counts), said.delta_RK4.float().split(counts),
            said.box_R4.split(counts), size_B2.tolist(), strict=True,
        )  # fmt: skip
        found = [
            self.post(prob, delta, box, (int(size[0]), int(size[1])), self.stds, self.plus)
            for prob, delta, box, size in rows
        ]
        if self.mask is not None:
            found = self._with_masks(pyramids.reg, found)
        return [one._replace(box_D4=self._outer(one.box_D4)) for one in found]

    def _with_masks(self, pyramid: Pyramid, found: list[Detections]) -> list[Detections]:
        label_R = torch.cat([one.label_D for one in found])
        assert self.mask is not None
        mask_RSS = self.mask(pyramid, join_rois([one.box_D4 for one in found]), label_R)
        parts = mask_RSS.split([len(one.label_D) for one in found])
        return [one._replace(mask_DSS=part) for one, part in zip(found, parts, strict=True)]

    def _target(self, target: Target) -> Target:
        """A target in the detector's own convention."""
        return target._replace(
            box_G4=self._inner(target.box_G4.float()), crowd_I4=self._inner(target.crowd_I4.float())
        )

    def _inner(self, box: Tensor) -> Tensor:
        """Continuous boxes (..., 4) in the detector's own convention."""
        return box if not self.plus else torch.cat((box[..., :2], box[..., 2:] - self.plus), dim=-1)

    def _outer(self, box: Tensor) -> Tensor:
        """Inverse of `_inner`."""
        return box if not self.plus else torch.cat((box[..., :2], box[..., 2:] + self.plus), dim=-1)


class Detector(TwoStage):
    """Faster R-CNN or Mask R-CNN with an FPN and any box head; arguments as of `TwoStage`.

    Args:
        backbone: images -> `Features`.
        head: scores and boxes of RoIs.
        rpn: see `TwoStage`.
        sampler: see `TwoStage`.
        post: see `TwoStage`.
        mask: see `TwoStage`.
        plus: see `TwoStage`; the head's must be the same.
        rpn_on: see `TwoStage`.
    """

    def __init__(
        self,
        backbone: PyramidBackbone,
        head: BoxHead,
        rpn: RPN | None = None,
        sampler: RoISampler | None = None,
        post: PostProcess | None = None,
        mask: MaskBranch | None = None,
        plus: float = 0.0,
        rpn_on: str = "cls",
    ) -> None:
        super().__init__(backbone, rpn, sampler, post, mask, plus, rpn_on)
        self._check_plus("head", head)
        self.head = head

    @property
    def stds(self) -> tuple[float, ...]:
        """Of the head's deltas."""
        return self.head.stds

    def _losses_of_boxes(
        self,
        pyramids: Pyramids,
        proposals: list[Tensor],
        targets: list[Target],
        size_B2: Tensor,
        draw_B: Tensor,
    ) -> tuple[dict[str, Tensor], Sampled]:
        sampled = self.sampler(proposals, targets, draw_B, plus=self.plus)
        losses, _ = self.head.losses(pyramids.cls, pyramids.reg, sampled)
        return dict(losses), sampled

    def _predict(self, pyramids: Pyramids, roi_R5: Tensor, size_B2: Tensor | None) -> Prediction:
        said: Prediction = self.head(pyramids.cls, pyramids.reg, roi_R5)
        return said


def join_rois(proposals: Sequence[Tensor]) -> Tensor:
    """Boxes (M, 4) of each image -> roi_R5, float32 (image index, x1, y1, x2, y2)."""
    parts = [
        torch.cat((box_M4.new_full((len(box_M4), 1), image), box_M4), dim=1)
        for image, box_M4 in enumerate(proposals)
    ]
    return torch.cat(parts).float()


def _check_counts(
    x_B3HW: Tensor,
    size_B2: Tensor,
    targets: Sequence[Target] | None,
    proposals: Sequence[Tensor] | None,
    draw_B: Tensor | None,
) -> None:
    if x_B3HW.ndim != 4 or x_B3HW.shape[1] != 3 or not len(x_B3HW):
        raise ValueError(f"x_B3HW is {tuple(x_B3HW.shape)}, need (B, 3, H, W) with B > 0")
    images = len(x_B3HW)
    if tuple(size_B2.shape) != (images, 2):
        raise ValueError(f"size_B2 is {tuple(size_B2.shape)}, need ({images}, 2)")
    for name, given in (("targets", targets), ("proposals", proposals), ("draw_B", draw_B)):
        if given is not None and len(given) != images:
            raise ValueError(f"{name}: {len(given)} of them, need one for each of {images} images")
    for box_M4 in proposals or ():
        if box_M4.ndim != 2 or box_M4.shape[1] != 4:
            raise ValueError(f"proposals: one is {tuple(box_M4.shape)}, need (M, 4)")
