"""Mask branch of Mask R-CNN (arXiv 1703.06870): a small mask of every class for each region.

Layers, their keys and all values are those of torchvision's Mask R-CNN.

Letters: B images of a batch, R RoIs, C channels, K classes with the background at 0, G ground-truth
objects of an image, D detections, H W size, S bins of a mask per side, 4 box (xyxy).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import roi_align as plain_roi_align

from detection_tsd.data.detection_data import Target
from detection_tsd.matching import Sampled
from detection_tsd.models.normalise import divisor
from detection_tsd.ops.levels import roi_levels
from detection_tsd.ops.pyramid import Pyramid
from detection_tsd.ops.roi_align import roi_align

POOLINGS = ("aligned", "torchvision", "mmdet_v1")


class MaskBranch(nn.Module):
    """RoIAlign, 3x3 convolutions, a transposed convolution of stride 2, one map for each class.

    Keys `mask_head.0.0.weight` ... and `mask_predictor.conv5_mask.weight` ... are torchvision's
    behind `roi_heads.`; the map of the background is never used.

    Args:
        num_classes: foreground classes.
        channels: of the pyramid.
        layers: widths of the 3x3 convolutions; the last one is that of the transposed one too.
        size: bins per side that are pooled; masks have twice as many.
        samples: of RoIAlign, per side of a bin.
        pooling: convention of RoIAlign, as that of the box heads.
        plus: 1 where a RoI includes its last pixel, see `TwoStage`.
        level_base: see `roi_levels`.

    Raises:
        ValueError: an argument that is not accepted.
    """

    def __init__(
        self,
        num_classes: int,
        channels: int = 256,
        layers: Sequence[int] = (256, 256, 256, 256),
        size: int = 14,
        samples: int = 2,
        pooling: str = "aligned",
        plus: float = 0.0,
        level_base: float = 56.0,
    ) -> None:
        super().__init__()
        if num_classes < 1 or size < 1 or not layers:
            raise ValueError(
                f"num_classes={num_classes}, size={size}, layers={list(layers)}: "
                "need at least one of each"
            )
        if pooling not in POOLINGS:
            raise ValueError(f"pooling={pooling!r}: need one of {POOLINGS}")
        self.num_classes, self.size, self.samples, self.pooling = (
            num_classes,
            size,
            samples,
            pooling,
        )
        self.plus, self.level_base = float(plus), level_base
        self.mask_head = MaskRCNNHeads(channels, list(layers), dilation=1)
        self.mask_predictor = MaskRCNNPredictor(layers[-1], layers[-1], num_classes + 1)

    def forward(self, pyramid: Pyramid, roi_R5: Tensor, label_R: Tensor) -> Tensor:
        """Probabilities float32 (R, S, S) of the mask of each RoI's class, on a grid over the RoI.

        Args:
            pyramid: feature maps.
            roi_R5: float32, in network-input pixels; may be empty.
            label_R: int64, 1..num_classes.
        """
        return self._of_class(self.logits(pyramid, roi_R5), label_R).sigmoid()

    def logits(self, pyramid: Pyramid, roi_R5: Tensor) -> Tensor:
        """Logits (R, K, S, S) of every class."""
        level_R = roi_levels(roi_R5, len(pyramid.maps), self.level_base, self.plus)
        with torch.autocast(roi_R5.device.type, enabled=False):
            x_RCSS = roi_align(
                pyramid, roi_R5, level_R, size=self.size, samples=self.samples, mode=self.pooling
            )
        logits_RKSS: Tensor = self.mask_predictor(self.mask_head(x_RCSS))
        return logits_RKSS

    def loss(self, pyramid: Pyramid, sampled: Sampled, targets: Sequence[Target]) -> Tensor:
        """Mean binary cross entropy of the mask of the true class, over bins of all positives.

        Args:
            pyramid: feature maps.
            sampled: RoIs of the batch, image after image.
            targets: B of them, with masks.

        Returns:
            Scalar; 0 with a graph when there is no positive.

        Raises:
            ValueError: a target without masks.
        """
        positive_R = ((sampled.label_R > 0) & (sampled.weight_R > 0)).nonzero()[:, 0]
        roi_R5, gt_R = sampled.roi_R5[positive_R], sampled.gt_R[positive_R]
        logits_RSS = self._of_class(self.logits(pyramid, roi_R5), sampled.label_R[positive_R])
        wanted_RSS = self._wanted(roi_R5, gt_R, targets, logits_RSS.shape[-1])
        with torch.autocast(logits_RSS.device.type, enabled=False):
            total = F.binary_cross_entropy_with_logits(logits_RSS, wanted_RSS, reduction="sum")
        bins = logits_RSS.shape[-1] ** 2
        return total / (divisor(logits_RSS.new_tensor(float(len(roi_R5)))) * bins)

    def _of_class(self, logits_RKSS: Tensor, label_R: Tensor) -> Tensor:
        """Logits float32 (R, S, S) of one class for each RoI."""
        row_R = torch.arange(len(label_R), device=label_R.device)
        return logits_RKSS[row_R, label_R].float()

    def _wanted(self, roi_R5: Tensor, gt_R: Tensor, targets: Sequence[Target], side: int) -> Tensor:
        """Share of each bin that the object covers, (R, S, S): RoIAlign of its mask.

        Image after image, because the masks of two images have different sizes and must not be
        padded: RoIAlign reads the border pixel beyond the border.
        """
        counts = torch.bincount(roi_R5[:, 0].long(), minlength=len(targets)).tolist()
        parts = [roi_R5.new_empty((0, side, side))]
        rows = zip(roi_R5[:, 1:].split(counts), gt_R.split(counts), targets, strict=True)
        for box_R4, index_R, target in rows:
            if target.mask_GHW is None:
                raise ValueError("target.mask_GHW=None: the mask branch is trained with masks")
            if len(box_R4):
                box_R4 = torch.cat((box_R4[:, :2], box_R4[:, 2:] + self.plus), dim=1)
                at_R5 = torch.cat((index_R[:, None].to(box_R4), box_R4), dim=1)
                mask_G1HW = target.mask_GHW[:, None].to(at_R5)
                parts.append(plain_roi_align(mask_G1HW, at_R5, (side, side), 1.0)[:, 0])
        return torch.cat(parts)


def paste(
    mask_DSS: Tensor, box_D4: Tensor, height: int, width: int, threshold: float = 0.5
) -> Tensor:
    """Masks on the grid of an image: 1 where the interpolated probability is above `threshold`.

    The same pixels as torchvision's `paste_masks_in_image`: the mask gets a border of one empty
    bin, the box grows with it and is cut to whole pixels, and the mask is resized to it.

    Args:
        mask_DSS: probabilities, float.
        box_D4: boxes in pixels of the image, which they may leave.
        height: of the image.
        width: of the image.
        threshold: in [0, 1).

    Returns:
        uint8 (D, height, width) in {0, 1}, on the device of the masks.

    Raises:
        ValueError: numbers of masks and boxes differ.
    """
    if len(mask_DSS) != len(box_D4):
        raise ValueError(f"{len(mask_DSS)} masks and {len(box_D4)} boxes: need as many")
    out_DHW = torch.zeros((len(box_D4), height, width), dtype=torch.uint8, device=mask_DSS.device)
    if not len(box_D4):
        return out_DHW
    padded_DSS = F.pad(mask_DSS.float(), (1, 1, 1, 1))
    growth = padded_DSS.shape[-1] / mask_DSS.shape[-1]
    centre_D2 = (box_D4[:, 2:] + box_D4[:, :2]) * 0.5
    half_D2 = (box_D4[:, 2:] - box_D4[:, :2]) * 0.5 * growth
    corners = torch.cat((centre_D2 - half_D2, centre_D2 + half_D2), dim=1).long().tolist()
    for out_HW, mask_SS, (x1, y1, x2, y2) in zip(out_DHW, padded_DSS, corners, strict=True):
        left, right, top, bottom = max(x1, 0), min(x2 + 1, width), max(y1, 0), min(y2 + 1, height)
        if left >= right or top >= bottom:
            continue
        size = max(y2 - y1 + 1, 1), max(x2 - x1 + 1, 1)
        pasted_HW = F.interpolate(mask_SS[None, None], size=size, mode="bilinear")[0, 0]
        part_HW = pasted_HW[top - y1 : bottom - y1, left - x1 : right - x1]
        out_HW[top:bottom, left:right] = part_HW > threshold
    return out_DHW
