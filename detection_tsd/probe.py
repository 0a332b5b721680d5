"""Does the shift of TSD do what it is for? Where the derived proposals go, against the truth.

The regression branch moves its proposal P to P_r (arXiv 2003.07540, equation 3). When it has
learned to re-centre, the shift correlates with the true error of the centre of P, and the error
that is left is smaller. Shifts and errors are in widths and heights of P.

Letters: N images of a set, B of a batch, R proposals, G ground-truth boxes, S bins of a pooling,
2 (x, y), 4 box (xyxy), 5 RoI (image index, box).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from common.log import InputError
from detection_tsd import boxes
from detection_tsd.data.batch import collate, to
from detection_tsd.data.detection_data import Batch, DetectionData
from detection_tsd.data.draws import ImageRows
from detection_tsd.data.transforms import DetectionTransform
from detection_tsd.models.detector import Detector, join_rois
from detection_tsd.models.tsd_head import DeformHead


class Probe(NamedTuple):
    """What the shift of P_r achieves, over the x and y of all positive proposals.

    Attributes:
        correlation: of the shift with the true error of the centre; 0 when either is constant.
        before: mean absolute error of the centres of P, in widths and heights of P.
        after: the same of P_r, in the same units.
        proposals: how many.
    """

    correlation: float
    before: float
    after: float
    proposals: int


class Shifts(NamedTuple):
    """Where the positive proposals of one image go, in the pixels of its file.

    Attributes:
        roi_R4: float32, the proposals P.
        shifted_R4: float32, P_r.
        point_RS2: float32, centres (x, y) of the bins that the classification reads.
        truth_R4: float32, the object of each.
        label_R: int64, its class.
    """

    roi_R4: np.ndarray
    shifted_R4: np.ndarray
    point_RS2: np.ndarray
    truth_R4: np.ndarray
    label_R: np.ndarray


def centre_error(roi_R4: Tensor, truth_R4: Tensor) -> Tensor:
    """(R, 2) way from the centre of each proposal to that of its object, in sizes of the former."""
    size_R2 = roi_R4[:, 2:] - roi_R4[:, :2]
    way_R2 = (truth_R4[:, :2] + truth_R4[:, 2:] - roi_R4[:, :2] - roi_R4[:, 2:]) / 2
    return way_R2 / size_R2


def bin_points(roi_R4: Tensor, offset: Tensor, size: int, gamma: float = 0.1) -> Tensor:
    """(R, S, 2) centres of the bins of a deformable pooling, row by row.

    Args:
        roi_R4: proposals.
        offset: raw output (R, 2, size, size) or (R, 2, 1, 1), channel 0 = x (equation 4).
        size: bins per side.
        gamma: what a raw offset of 1 is, in widths and heights of the proposal.
    """
    line_P = (torch.arange(size, dtype=roi_R4.dtype, device=roi_R4.device) + 0.5) / size
    y_PP, x_PP = torch.meshgrid(line_P, line_P, indexing="ij")
    place_RPP2 = torch.stack([x_PP, y_PP], dim=-1) + gamma * offset.permute(0, 2, 3, 1)
    size_R2 = roi_R4[:, 2:] - roi_R4[:, :2]
    point_RPP2 = roi_R4[:, None, None, :2] + place_RPP2 * size_R2[:, None, None]
    return point_RPP2.flatten(1, 2)


def probe_shifts(roi_R4: Tensor, shifted_R4: Tensor, truth_R4: Tensor) -> Probe:
    """Compare the shifts of some positive proposals with what would have been right.

    Args:
        roi_R4: proposals P.
        shifted_R4: P_r.
        truth_R4: the object of each.

    Raises:
        ValueError: there is no proposal, or the shapes differ.
    """
    if not len(roi_R4) or roi_R4.shape != shifted_R4.shape or roi_R4.shape != truth_R4.shape:
        shapes = [tuple(one.shape) for one in (roi_R4, shifted_R4, truth_R4)]
        raise ValueError(f"proposals, shifted and truth are {shapes}, need the same, (R, 4), R > 0")
    roi_R4, shifted_R4, truth_R4 = (one.double() for one in (roi_R4, shifted_R4, truth_R4))
    error_R2 = centre_error(roi_R4, truth_R4)
    shift_R2 = centre_error(roi_R4, shifted_R4)
    return Probe(
        _correlation(shift_R2.flatten(), error_R2.flatten()),
        float(error_R2.abs().mean()),
        float((error_R2 - shift_R2).abs().mean()),
        len(roi_R4),
    )


def _correlation(a_N: Tensor, b_N: Tensor) -> float:
    a_N, b_N = a_N - a_N.mean(), b_N - b_N.mean()
    length = float(a_N.norm() * b_N.norm())
    return float(a_N @ b_N) / length if length > 1e-12 else 0.0


def positives(roi_R4: Tensor, truth_G4: Tensor, iou: float = 0.5) -> tuple[Tensor, Tensor]:
    """Rows of the proposals that overlap an object by `iou` or more, and the object of each."""
    if not len(truth_G4) or not len(roi_R4):
        none = torch.zeros(0, dtype=torch.int64, device=roi_R4.device)
        return none, none
    best_R, object_R = boxes.iou(roi_R4, truth_G4).max(dim=1)
    row_R = torch.nonzero(best_R >= iou).squeeze(1)
    return row_R, object_R[row_R]


def probe_detector(
    detector: nn.Module,
    data: DetectionData,
    transform: DetectionTransform,
    iou: float = 0.5,
    batch: int = 25,
) -> Probe:
    """`probe_shifts` on all positive proposals of a set; arguments and errors as of `find_shifts`.

    Raises:
        InputError: no proposal is positive.
    """
    parts = list(find_shifts(detector, data, transform, iou=iou, batch=batch))
    joined = [
        torch.from_numpy(np.concatenate([getattr(part, name) for part in parts]))
        for name in ("roi_R4", "shifted_R4", "truth_R4")
    ]
    if not len(joined[0]):
        raise InputError(data.name, "no proposal overlaps an object by", iou)
    return probe_shifts(*joined)


def find_shifts(
    detector: nn.Module,
    data: DetectionData,
    transform: DetectionTransform,
    rows: Sequence[int] | None = None,
    iou: float = 0.5,
    batch: int = 25,
) -> Iterator[Shifts]:
    """Where the positive ones of the fixed proposals go, image after image.

    Args:
        detector: with a head that moves the proposal of the regression as a whole. It runs in
            evaluation mode, and is left in the mode it was in.
        data: a set with proposals.
        transform: of its images.
        rows: of the images; None for all.
        iou: least overlap of a positive proposal.
        batch: images at a time.

    Raises:
        InputError: the set has no proposals, or an image cannot be read.
        ValueError: the head does not move its proposals.
    """
    if data.proposals is None:
        raise InputError(data.name, "has no fixed proposals")
    if not isinstance(detector, Detector):
        raise ValueError(f"detector is a {type(detector).__name__}, need a Detector")
    chosen = range(len(data)) if rows is None else rows
    images = Subset(ImageRows(data, transform), list(chosen))
    device = next(detector.parameters()).device
    with _evaluating(detector), torch.inference_mode():
        for part in DataLoader(images, batch, collate_fn=lambda i: collate(i, transform.divisor)):
            yield from _shifts(detector, data, transform, to(part, device), iou)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _shifts(
    detector: Detector, data: DetectionData, transform: DetectionTransform, part: Batch, iou: float
) -> Iterator[Shifts]:
    """Of the images of one batch."""
    assert part.proposals is not None
    kept: list[Tensor] = []
    truths: list[Tensor] = []
    labels: list[Tensor] = []
    for image, row in enumerate(part.row_B.tolist()):
        objects = data.objects.read(row)
        box_G4 = torch.from_numpy(objects.box_G4).to(part.scale_B2) * part.scale_B2[image].repeat(2)
        row_R, object_R = positives(part.proposals[image].float(), box_G4, iou)
        kept.append(part.proposals[image].float()[row_R])
        truths.append(box_G4[object_R])
        labels.append(torch.from_numpy(objects.label_G).to(object_R.device)[object_R])
    pyramids = detector.pyramids(
        detector.features(transform.normalize(part.image_B3HW, part.size_B2))
    )
    roi_R5 = join_rois(kept)
    roi_R5[:, 3:] -= detector.plus  # the border between boxes and the pixels of mmdetection v1
    head = detector.head
    said = head(pyramids.cls, pyramids.reg, roi_R5)
    whole = said.offset_r is not None and said.offset_r.shape[-1] == 1
    if not isinstance(head, DeformHead) or said.offset_c is None or not whole:
        raise ValueError(f"{type(head).__name__} does not move its proposals as a whole")
    shifted_R4 = said.box_R4.float().clone()
    shifted_R4[:, 2:] += detector.plus
    counts = [len(box_R4) for box_R4 in kept]
    point_RS2 = bin_points(torch.cat(kept), said.offset_c, head.size, head.gamma)
    parts = zip(
        kept, shifted_R4.split(counts), point_RS2.split(counts), truths, labels, part.scale_B2,
        strict=True,
    )  # fmt: skip
    for roi, shifted, point, truth, label, scale in parts:
        four = scale.repeat(2)
        found = (roi / four, shifted / four, point / scale, truth / four, label)
        yield Shifts(*(value.cpu().numpy() for value in found))
