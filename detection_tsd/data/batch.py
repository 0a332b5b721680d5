"""Items of different sizes joined to one batch.

Letters: B images of a batch, H W rows and columns, M proposals.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from detection_tsd.data.detection_data import Batch, Item, Target


def collate(items: Sequence[Item], divisor: int = 32) -> Batch:
    """Join items; smaller images are padded with zeros at the right and the bottom.

    The pictures lie channels-last in memory, as the data workers hand them over.

    Args:
        items: B of them, at least one; all with proposals or all without.
        divisor: height and width of the batch are multiples of it: the coarsest stride.

    Raises:
        ValueError: no item, a divisor below 1, or proposals in some items only.
    """
    if not items or divisor < 1:
        raise ValueError(f"items={len(items)} and divisor={divisor} must be at least 1")
    size_B2 = torch.tensor([item.image.shape[1:] for item in items])
    height, width = (-(-int(side) // divisor) * divisor for side in size_B2.amax(dim=0))
    image_BHW3 = torch.zeros((len(items), height, width, 3), dtype=torch.uint8)
    image_B3HW = image_BHW3.permute(0, 3, 1, 2)
    for x_3HW, item in zip(image_B3HW, items, strict=True):
        x_3HW[:, : item.image.shape[1], : item.image.shape[2]] = item.image
    return Batch(
        image_B3HW=image_B3HW,
        size_B2=size_B2,
        targets=[item.target for item in items],
        proposals=_proposals(items),
        row_B=torch.tensor([item.row for item in items]),
        draw_B=torch.tensor([item.draw for item in items]),
        scale_B2=torch.tensor([item.scale for item in items], dtype=torch.float32),
        original_B2=torch.tensor([item.original for item in items]),
    )


def _proposals(items: Sequence[Item]) -> list[Tensor] | None:
    given = [item.proposals for item in items if item.proposals is not None]
    if given and len(given) < len(items):
        raise ValueError(f"{len(given)} of {len(items)} items have proposals; need all or none")
    return given or None


def to(batch: Batch, device: torch.device | str, masks: bool = True) -> Batch:
    """The batch on a device; asynchronous when it lies in pinned memory.

    Everything that only the host reads stays there: rows, draws, scales and original sizes.

    Args:
        batch: as `collate` makes it.
        device: where the network is.
        masks: False leaves the masks of the targets behind, which may be larger than the images.
    """
    moved = [_move(target, device, masks) for target in batch.targets]
    proposals = batch.proposals
    return batch._replace(
        image_B3HW=batch.image_B3HW.to(device, non_blocking=True),
        size_B2=batch.size_B2.to(device, non_blocking=True),
        targets=moved,
        proposals=proposals and [box_M4.to(device, non_blocking=True) for box_M4 in proposals],
    )


def _move(target: Target, device: torch.device | str, masks: bool) -> Target:
    mask_GHW = target.mask_GHW
    return Target(
        box_G4=target.box_G4.to(device, non_blocking=True),
        label_G=target.label_G.to(device, non_blocking=True),
        crowd_I4=target.crowd_I4.to(device, non_blocking=True),
        mask_GHW=None if mask_GHW is None or not masks else mask_GHW.to(device, non_blocking=True),
    )
