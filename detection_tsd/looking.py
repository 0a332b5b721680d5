"""From pictures to detections in their pixels, and to entries of JSON.

Letters: H W rows and columns, M proposals, B pictures of a batch, D detections.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from detection_tsd.data.batch import collate, to
from detection_tsd.data.detection_data import Item
from detection_tsd.engine import Found, autocast, in_file_pixels
from detection_tsd.proposals import Grid
from detection_tsd.weights import Trained


class Looking(NamedTuple):
    """A detector and how it looks at pictures; `grid` is None for one that proposes itself."""

    trained: Trained
    device: torch.device
    grid: Grid | None
    precision: str = "float32"


@torch.inference_mode()
def look(
    how: Looking,
    images: Sequence[np.ndarray],
    proposals: Sequence[np.ndarray | None],
    row: int = 0,
) -> list[Found]:
    """Detections of B pictures in their pixels.

    Args:
        how: see `Looking`.
        images: uint8 (H, W, 3), RGB.
        proposals: of each, float32 (M, 4) in its pixels; None is the grid.
        row: of the first, for `Found`.
    """
    transform = how.trained.transform
    items = [
        _item(how, image_HWC, box_M4, row + number)
        for number, (image_HWC, box_M4) in enumerate(zip(images, proposals, strict=True))
    ]
    batch = to(collate(items, transform.divisor), how.device)
    x_B3HW = transform.normalize(batch.image_B3HW, batch.size_B2)
    with autocast(how.device, how.precision):
        detected = how.trained.model(x_B3HW, batch.size_B2, proposals=batch.proposals)
    return [
        in_file_pixels(one, int(batch.row_B[i]), batch.scale_B2[i], batch.original_B2[i])
        for i, one in enumerate(detected)
    ]


def _item(how: Looking, image_HWC: np.ndarray, box_M4: np.ndarray | None, row: int) -> Item:
    view = how.trained.transform.test(image_HWC, box_M4)
    proposals: Tensor | None = view.proposals
    if how.grid is not None and proposals is None:
        proposals = torch.from_numpy(how.grid.boxes(view.image.shape[1], view.image.shape[2]))
    size = (image_HWC.shape[0], image_HWC.shape[1])
    return Item(view.image, view.target, proposals, row, row, view.scale, size)


def above(found: Found, threshold: float) -> Found:
    """The detections that score more: soft suppression may have lowered scores afterwards."""
    keep_D = found.score_D > threshold
    masks = found.masks
    if masks is not None:
        masks = [mask for mask, keep in zip(masks, keep_D, strict=True) if keep]
    kept = (found.box_D4[keep_D], found.score_D[keep_D], found.label_D[keep_D])
    return Found(found.row, found.size, *kept, masks)


def listed(found: Found, trained: Trained) -> list[dict[str, Any]]:
    """Detections of one picture as JSON has them, best first."""
    entries = []
    for row, label in enumerate(found.label_D.tolist()):
        entry = {
            "box": found.box_D4[row].tolist(),
            "score": float(found.score_D[row]),
            "label": label,
            "class": trained.classes[label - 1],
            "class_id": trained.class_ids[label - 1],
        }
        if found.masks is not None:
            entry["mask"] = found.masks[row]
        entries.append(entry)
    return entries
