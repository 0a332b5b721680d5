"""Small pyramids and samples of RoIs that the tests of the box heads share.

Letters: B images, R RoIs, C channels, H W size of a map, 5 RoI (image index, x1, y1, x2, y2).
"""

from typing import Any

import torch
from torch import Tensor, nn

from detection_tsd.matching import Sampled
from detection_tsd.models.tsd_head import TSDHead
from detection_tsd.ops.pyramid import Pyramid

CLASSES = 3
CHANNELS = 4
# A head that fits `pyramid`: level 1 begins at 32 pixels.
SETTINGS: dict[str, Any] = {"channels": CHANNELS, "width": 8, "size": 3, "level_base": 16.0}
TSD: dict[str, Any] = SETTINGS | {"offset_width": 6}
PLAIN: dict[str, Any] = {"joint": False, "margin_cls": None, "margin_box": None}
EVERY = {"loss_cls", "loss_box", "loss_cls_tsd", "loss_box_tsd", "loss_pc_cls", "loss_pc_box"}


def pyramid(seed: int = 0, batch: int = 2, channels: int = CHANNELS, levels: int = 2) -> Pyramid:
    """Random float64 maps of images of 96 x 64 pixels (width x height), strides 4, 8, ..."""
    rng = torch.Generator().manual_seed(seed)
    maps = [
        torch.randn(batch, channels, 16 >> i, 24 >> i, generator=rng, dtype=torch.float64)
        for i in range(levels)
    ]
    strides = [4 << i for i in range(levels)]
    return Pyramid([one.requires_grad_() for one in maps], strides, base=16.0)


def rois(count: int, batch: int = 2, seed: int = 0) -> Tensor:
    """Random RoIs of both levels, in any order of the images, float64 (count, 5)."""
    rng = torch.Generator().manual_seed(seed + 100)
    corner_R2 = torch.rand(count, 2, generator=rng, dtype=torch.float64)
    corner_R2 = corner_R2 * torch.tensor([56.0, 30.0], dtype=torch.float64) + 2
    size_R2 = 10 + 30 * torch.rand(count, 2, generator=rng, dtype=torch.float64)
    image_R = torch.randint(0, batch, (count, 1), generator=rng)
    return torch.cat((image_R.double(), corner_R2, corner_R2 + size_R2), dim=1)


def sample(positives: int = 4, count: int = 10, padding: int = 0, seed: int = 0) -> Sampled:
    """`count` RoIs of two images; those of image 1 are all background."""
    roi_R5 = rois(count + padding, seed=seed)
    roi_R5[: positives + 1, 0], roi_R5[positives + 1 :, 0] = 0, 1
    rng = torch.Generator().manual_seed(seed + 200)
    label_R = torch.zeros(count + padding, dtype=torch.int64)
    label_R[:positives] = torch.randint(1, CLASSES + 1, (positives,), generator=rng)
    match_R4 = roi_R5[:, 1:].clone()
    moved_R4 = 6 * torch.rand(positives, 4, generator=rng, dtype=torch.float64) - 3
    match_R4[:positives] += moved_R4
    weight_R = torch.ones(count + padding)
    weight_R[count:] = 0
    return Sampled(roi_R5, label_R, match_R4, (label_R > 0).long() - 1, weight_R)


def doubled(head: nn.Module) -> Any:
    """The head in float64, with output layers large enough that scores and boxes differ."""
    with torch.no_grad():
        for name, parameter in head.double().named_parameters():
            if name.endswith(("cls_score.weight", "bbox_pred.weight")):
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return head


def tsd(**other: Any) -> Any:
    """A small TSD head in float64, always the same."""
    torch.manual_seed(0)
    return doubled(TSDHead(**{"num_classes": CLASSES} | TSD | other))


def total(parts: dict[str, Tensor]) -> Tensor:
    return sum(parts.values(), torch.zeros((), dtype=torch.float64))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def slopes(loss: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    """Gradients, zeros where none arrives."""
    found = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True)]
