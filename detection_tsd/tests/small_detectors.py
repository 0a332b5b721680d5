"""Detectors, images and a peer that the tests of several files build alike.

Letters: B images of a batch, H W size, G objects of an image, M proposals of an image.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from detection_tsd.data.detection_data import Target
from detection_tsd.matching import RoISampler
from detection_tsd.models.cascade import CascadeDetector, with_stds
from detection_tsd.models.d_head import DHead
from detection_tsd.models.detector import Detector, TwoStage
from detection_tsd.models.mask_branch import MaskBranch
from detection_tsd.models.rpn import RPN
from detection_tsd.models.sibling_head import BoxHead, SiblingHead
from detection_tsd.models.tiny import TinyFPN
from detection_tsd.models.tsd_head import TSDHead
from detection_tsd.postprocess import PostProcess

CLASSES = 3
SMALL: dict[str, Any] = {"channels": 32, "width": 32, "level_base": 18.0}
HEADS: dict[str, Callable[..., BoxHead]] = {"sibling": SiblingHead, "d_head": DHead, "tsd": TSDHead}
STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))


class Input(NamedTuple):
    """Arguments of a detector's training step."""

    x_B3HW: Tensor
    size_B2: Tensor
    targets: list[Target]
    proposals: list[Tensor]
    draw_B: Tensor


def small_head(name: str, **other: Any) -> BoxHead:
    settings = SMALL | ({"offset_width": 16} if name == "tsd" else {}) | other
    return HEADS[name](settings.pop("num_classes", CLASSES), **settings)


def small_rpn(**other: Any) -> RPN:
    settings: dict[str, Any] = {
        "channels": 32, "strides": (4, 8), "size": 6.0, "pre_train": 200, "post_train": 60,
        "pre_test": 200, "post_test": 40, "count": 64, "border": None,
    }  # fmt: skip
    return RPN(**settings | other)


def small_mask(num_classes: int = CLASSES, **other: Any) -> MaskBranch:
    settings: dict[str, Any] = {"channels": 32, "layers": (16, 16), "size": 7, "level_base": 18.0}
    return MaskBranch(num_classes, **settings | other)


def small(
    head: str = "sibling",
    rpn: bool = False,
    mask: bool = False,
    stages: int = 1,
    seed: int = 0,
    plus: float = 0.0,
    post: PostProcess | None = None,
    sampler: RoISampler | None = None,
    norm: str = "frozen",
    num_classes: int = CLASSES,
    **other: Any,
) -> TwoStage:
    """A detector of 32 channels on maps of strides 4 and 8; with `stages` above 1 a cascade."""
    torch.manual_seed(seed)
    parts: dict[str, Any] = {
        "backbone": TinyFPN((8, 16, 24), 32, norm=norm),
        "rpn": small_rpn(plus=plus) if rpn else None,
        "sampler": sampler or RoISampler(count=24, positive_share=0.5),
        "post": post or PostProcess(per_image=20),
        "mask": small_mask(num_classes, plus=plus) if mask else None,
        "plus": plus,
    }

    def make() -> BoxHead:
        return small_head(head, plus=plus, num_classes=num_classes)

    if stages == 1:
        return Detector(head=make(), **parts | other)
    given: dict[str, Any] = {"ious": (0.5, 0.6, 0.7)[:stages], "stage_weights": (1.0,) * stages}
    heads = [with_stds(make(), STDS[stage]) for stage in range(stages)]
    return CascadeDetector(heads=heads, **parts | given | other)


def an_input(images: int = 2, seed: int = 0, objects: int = 3, proposals: int = 30) -> Input:
    """Images of 64 x 96 pixels, the last 56 x 80 of them, with masks and jittered proposals."""
    rng = torch.Generator().manual_seed(seed)
    size_B2 = torch.tensor([[64, 96]] * (images - 1) + [[56, 80]])
    x_B3HW = torch.randn(images, 3, 64, 96, generator=rng)
    x_B3HW[-1, :, 56:] = 0
    x_B3HW[-1, :, :, 80:] = 0
    targets, boxes = [], []
    for height, width in size_B2.tolist():
        corner_G2 = torch.rand(objects, 2, generator=rng) * torch.tensor([width - 42, height - 34])
        size_G2 = 14 + torch.rand(objects, 2, generator=rng) * torch.tensor([26.0, 18.0])
        box_G4 = torch.cat((corner_G2, corner_G2 + size_G2), dim=1)
        label_G = torch.randint(1, CLASSES + 1, (objects,), generator=rng)
        mask_GHW = torch.zeros(objects, height, width, dtype=torch.uint8)
        for mask_HW, (x1, y1, x2, y2) in zip(mask_GHW, box_G4.int().tolist(), strict=True):
            mask_HW[y1:y2, x1:x2] = 1
        targets.append(Target(box_G4, label_G, torch.zeros(0, 4), mask_GHW))
        near_M4 = box_G4.repeat(proposals, 1)[:proposals] if objects else torch.rand(proposals, 4)
        size_M2 = (near_M4[:, 2:] - near_M4[:, :2]).repeat(1, 2).abs()
        moved_M4 = near_M4 + size_M2 * (torch.rand(len(near_M4), 4, generator=rng) - 0.5) * 0.6
        boxes.append(moved_M4)
    return Input(x_B3HW, size_B2, targets, boxes, torch.arange(images) + 7)


def liven(model: nn.Module, scale: float = 20.0) -> None:
    """Larger output layers, so that random scores and boxes differ."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("cls_score.weight") or name.endswith("cls_logits.weight"):
                parameter.mul_(scale)
            if name.endswith("bbox_pred.weight"):
                parameter.mul_(scale)
