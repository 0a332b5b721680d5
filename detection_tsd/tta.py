"""Test-time augmentation: one image seen at several sizes and mirrored, answers averaged.

As in Sense-X/TSD (mmdet/models/detectors/test_mixins.py): proposals of all views are joined, every
view scores all of them, and probabilities and boxes of each proposal are averaged before the
suppression. Shifts, and so the shifted boxes that deltas are relative to, are predicted in every
view anew.

Letters: B images of a batch, H W size, M proposals of an image, V views, D detections, K class
scores with the background at column 0, S mask bins per side.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detection_tsd.data.detection_data import Detections
from detection_tsd.data.transforms import resized
from detection_tsd.models.detector import TwoStage, join_rois
from detection_tsd.models.fpn import Features
from detection_tsd.nms import hard


class View(NamedTuple):
    """How an image is looked at.

    Attributes:
        long: most that the long side may be, in pixels.
        short: short side; None, together with `long`: the image stays as large as it is.
        flip: mirrored left to right.
    """

    long: int | None = None
    short: int | None = None
    flip: bool = False


class Seen(NamedTuple):
    """A view of one image.

    Attributes:
        features: of the detector.
        size: height and width of the valid part of its input.
        scale: its pixels per pixel of the image, (x, y).
        flip: it is mirrored.
        padded: height and width of its input.
    """

    features: Features
    size: tuple[int, int]
    scale: tuple[float, float]
    flip: bool
    padded: tuple[int, int]


class Views(nn.Module):
    """A detector that looks at every image in several views; called as the detector in a test.

    Args:
        detector: an ordinary one.
        sizes: (long side, short side) of each view in pixels; None: the size that images come in.
            Larger views than the images that are handed over only interpolate: hand over the
            pictures as large as their files are.
        flip: also the mirror image of every view.
        divisor: height and width of a view are padded to a multiple of it.
        iou: overlap above which a better proposal of another view suppresses one.
        count: proposals that are left of those of all views.

    Raises:
        ValueError: no view, or a side below 1.
    """

    def __init__(
        self,
        detector: TwoStage,
        sizes: Sequence[Sequence[int]] | None = None,
        flip: bool = False,
        divisor: int = 32,
        iou: float = 0.7,
        count: int = 1000,
    ) -> None:
        super().__init__()
        self.detector, self.views = detector, views_of(sizes, flip)
        self.divisor, self.iou, self.count = divisor, iou, count
        self.train(detector.training)

    def forward(
        self,
        x_B3HW: Tensor,
        size_B2: Tensor,
        targets: None = None,
        proposals: Sequence[Tensor] | None = None,
        draw_B: None = None,
    ) -> list[Detections]:
        """Detections of each image in the pixels of `x_B3HW`.

        Args:
            x_B3HW: normalised images, padded at the right and the bottom.
            size_B2: height and width of the valid part.
            targets: None; the signature is that of a detector.
            proposals: B times (M, 4) where the detector has no RPN.
            draw_B: None.

        Raises:
            ValueError: in training mode, with targets, or without proposals that are needed.
        """
        if self.training or targets is not None or draw_B is not None:
            raise ValueError("several views are for tests: no training mode, no targets, no draws")
        if self.detector.rpn is None and proposals is None:
            raise ValueError("proposals=None: a detector without an RPN needs them")
        sizes = [(int(height), int(width)) for height, width in size_B2.tolist()]
        given = [None] * len(sizes) if self.detector.rpn is not None else proposals
        assert given is not None
        return [
            self.detect(x_3HW[:, : size[0], : size[1]], box_M4)
            for x_3HW, size, box_M4 in zip(x_B3HW, sizes, given, strict=True)
        ]

    def detect(self, x_3HW: Tensor, proposals: Tensor | None) -> Detections:
        """Detections of one normalised image without padding."""
        seen = [look(self.detector, x_3HW, view, self.divisor) for view in self.views]
        box_M4 = self._joined(seen) if proposals is None else proposals.float()
        total_MK, total_MK4 = torch.zeros(()), torch.zeros(())
        for one in seen:
            device = one.features.cls[0].device
            roi_M5 = join_rois([into(box_M4, one)])
            prob_MK, box_MK4 = self.detector.score(one.features, roi_M5, _sizes(one, device))
            total_MK = total_MK.to(device) + prob_MK
            total_MK4 = total_MK4.to(device) + out_of(box_MK4, one)
        size = x_3HW.shape[1], x_3HW.shape[2]
        found = self.detector.select(total_MK / len(seen), total_MK4 / len(seen), size)
        return self._with_masks(seen, found) if self.detector.mask is not None else found

    def _joined(self, seen: list[Seen]) -> Tensor:
        """Proposals of all views in the pixels of the image; one view has nothing to join."""
        boxes, scores = [], []
        for one in seen:
            size_12 = _sizes(one, one.features.cls[0].device)
            ((box_M4, score_M),) = self.detector.propose_scored(one.features, size_12, one.padded)
            boxes.append(out_of(box_M4, one))
            scores.append(score_M)
        if len(seen) == 1:
            return boxes[0]
        box_M4, score_M = torch.cat(boxes), torch.cat(scores)
        group_M = torch.zeros_like(score_M, dtype=torch.int64)
        return box_M4[hard(box_M4, score_M, group_M, self.iou, limit=self.count).index_D]

    def _with_masks(self, seen: list[Seen], found: Detections) -> Detections:
        views = []
        for one in seen:
            roi_D5 = join_rois([into(found.box_D4, one)])
            mask_DSS = self.detector.masks(one.features, roi_D5, found.label_D)
            views.append(mask_DSS.flip(2) if one.flip else mask_DSS)
        return found._replace(mask_DSS=torch.stack(views).mean(dim=0))


def views_of(sizes: Sequence[Sequence[int]] | None, flip: bool = False) -> list[View]:
    """Views of the given (long side, short side), each also mirrored with `flip`.

    Raises:
        ValueError: no view, or a side below 1.
    """
    if sizes is not None and (not len(sizes) or any(len(s) != 2 or min(s) < 1 for s in sizes)):
        raise ValueError(f"sizes={sizes}: need pairs (long side, short side) of at least 1 pixel")
    plain = [View()] if sizes is None else [View(int(long), int(short)) for long, short in sizes]
    return [one for view in plain for one in (view, view._replace(flip=True))[: 1 + flip]]


def look(detector: TwoStage, x_3HW: Tensor, view: View, divisor: int = 32) -> Seen:
    """What the backbone sees of a normalised image without padding.

    Resizing comes after the normalisation: being linear it gives what the other order gives, but
    for the rounding of pictures to 8 bits.
    """
    old = (x_3HW.shape[1], x_3HW.shape[2])
    new = old
    if view.long is not None and view.short is not None:
        new = resized(old, view.short, view.long)
    x_13HW = x_3HW[None]
    if new != old:
        x_13HW = F.interpolate(x_13HW, size=new, mode="bilinear", align_corners=False)
    if view.flip:
        x_13HW = x_13HW.flip(3)
    x_13HW = F.pad(x_13HW, (0, -new[1] % divisor, 0, -new[0] % divisor))
    x_13HW = x_13HW.contiguous(memory_format=torch.channels_last)
    scale = (new[1] / old[1], new[0] / old[0])
    padded = (x_13HW.shape[2], x_13HW.shape[3])
    return Seen(detector.features(x_13HW), new, scale, view.flip, padded)


def into(box: Tensor, seen: Seen) -> Tensor:
    """Boxes (..., 4) of the image in the pixels of a view."""
    box = box * box.new_tensor(seen.scale * 2)
    return _mirrored(box, seen.size[1]) if seen.flip else box


def out_of(box: Tensor, seen: Seen) -> Tensor:
    """Boxes (..., 4) of a view in the pixels of the image; inverse of `into`."""
    box = _mirrored(box, seen.size[1]) if seen.flip else box
    return box / box.new_tensor(seen.scale * 2)


def _mirrored(box: Tensor, width: int) -> Tensor:
    left, top, right, bottom = box.unbind(dim=-1)
    return torch.stack((width - right, top, width - left, bottom), dim=-1)


def _sizes(seen: Seen, device: torch.device) -> Tensor:
    return torch.tensor([seen.size], device=device)
