"""Synthetic checkpoints with the names and shapes of the published ones.

Written out by hand from the structure of the published networks, without this package's models:
shapes first (`mmdet`, `torchvision_detector`), then tensors (`random`, `zeros`, `on_meta`), then
the file around them (`mmcv_file`).
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
BINS = 7


class Size(NamedTuple):
    """Of a detector; the default is what was published."""

    layers: tuple[int, ...] = BLOCKS[50]
    groups: int = 1
    base_width: int = 64
    channels: int = 256
    units: int = 1024
    offset_units: int = 256
    classes: int = 81  # with the background


SMALL = Size((1, 1, 1, 1), channels=8, units=12, offset_units=10, classes=6)


def norm(shapes: Shapes, name: str, channels: int, counted: bool = True) -> None:
    for part in ("weight", "bias", "running_mean", "running_var"):
        shapes[f"{name}.{part}"] = (channels,)
    if counted:
        shapes[f"{name}.num_batches_tracked"] = ()


def affine(shapes: Shapes, name: str, *shape: int, outputs: int | None = None) -> None:
    shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, (outputs or shape[0],)


def trunk(root: str, size: Size, offsets: str | None = None, counted: bool = True) -> Shapes:
    """ResNet or ResNeXt; `offsets` is the name of what moves the 3x3 kernels of stages 2 to 4."""
    shapes = Shapes()
    shapes[f"{root}.conv1.weight"] = (64, 3, 7, 7)
    norm(shapes, f"{root}.bn1", 64, counted)
    inputs = 64
    for stage, blocks in enumerate(size.layers, start=1):
        planes, outputs = 32 << stage, 128 << stage
        middle = planes * size.base_width // 64 * size.groups
        for index in range(blocks):
            block = f"{root}.layer{stage}.{index}"
            shapes[f"{block}.conv1.weight"] = (middle, inputs, 1, 1)
            shapes[f"{block}.conv2.weight"] = (middle, middle // size.groups, 3, 3)
            shapes[f"{block}.conv3.weight"] = (outputs, middle, 1, 1)
            if offsets and stage > 1:
                affine(shapes, f"{block}.{offsets}", 18, middle, 3, 3)
            for number, channels in enumerate((middle, middle, outputs), start=1):
                norm(shapes, f"{block}.bn{number}", channels, counted)
            if index == 0:
                shapes[f"{block}.downsample.0.weight"] = (outputs, inputs, 1, 1)
                norm(shapes, f"{block}.downsample.1", outputs, counted)
            inputs = outputs
    return shapes


def tsd_head(root: str, size: Size) -> Shapes:
    """TSDSharedFCBBoxHead; the order is that of its constructor."""
    shapes, pooled = Shapes(), size.channels * BINS * BINS
    affine(shapes, f"{root}.fc_cls", size.classes, size.units)
    affine(shapes, f"{root}.fc_reg", 4 * size.classes, size.units)
    affine(shapes, f"{root}.shared_fc.0", size.offset_units, pooled)
    for name, shifts in (("delta_c", 2 * BINS * BINS), ("delta_r", 2)):
        affine(shapes, f"{root}.{name}.0", size.offset_units, size.offset_units)
        affine(shapes, f"{root}.{name}.2", shifts, size.offset_units)
    for name in ("shared_fcs", "TSD_pc_fcs", "TSD_pr_fcs"):
        affine(shapes, f"{root}.{name}.0", size.units, pooled)
        affine(shapes, f"{root}.{name}.1", size.units, size.units)
    affine(shapes, f"{root}.TSD_fc_cls", size.classes, size.units)
    affine(shapes, f"{root}.TSD_fc_reg", 4 * size.classes, size.units)
    return shapes


def sibling_head(root: str, size: Size, agnostic: bool = False) -> Shapes:
    """SharedFCBBoxHead."""
    shapes = Shapes()
    affine(shapes, f"{root}.shared_fcs.0", size.units, size.channels * BINS * BINS)
    affine(shapes, f"{root}.shared_fcs.1", size.units, size.units)
    affine(shapes, f"{root}.fc_cls", size.classes, size.units)
    affine(shapes, f"{root}.fc_reg", 4 if agnostic else 4 * size.classes, size.units)
    return shapes


def mmdet(
    size: Size = SMALL,
    head: str = "tsd",
    stages: int = 1,
    mask: bool = False,
    offsets: str | None = None,
    agnostic: bool = False,
) -> Shapes:
    """A detector of Sense-X/TSD, or of mmdetection v1 with `head="sibling"`."""
    shapes, c = trunk("backbone", size, offsets), size.channels
    for level in range(4):
        affine(shapes, f"neck.lateral_convs.{level}.conv", c, 256 << level, 1, 1)
        affine(shapes, f"neck.fpn_convs.{level}.conv", c, c, 3, 3)
    affine(shapes, "rpn_head.rpn_conv", c, c, 3, 3)
    affine(shapes, "rpn_head.rpn_cls", 3, c, 1, 1)
    affine(shapes, "rpn_head.rpn_reg", 12, c, 1, 1)
    for stage in range(stages):
        root = "bbox_head" if stages == 1 else f"bbox_head.{stage}"
        shapes |= tsd_head(root, size) if head == "tsd" else sibling_head(root, size, agnostic)
    if mask:
        for number in range(4):
            affine(shapes, f"mask_head.convs.{number}.conv", c, c, 3, 3)
        affine(shapes, "mask_head.upsample", c, c, 2, 2)
        affine(shapes, "mask_head.conv_logits", size.classes, c, 1, 1)
    return shapes


def torchvision_detector(size: Size, mask: bool, old: bool) -> Shapes:
    """fasterrcnn_resnet50_fpn and maskrcnn_resnet50_fpn; `old` as in the published files."""
    shapes, c, inner = (
        trunk("backbone.body", size, counted=False),
        size.channels,
        "" if old else ".0",
    )
    for level in range(4):
        affine(shapes, f"backbone.fpn.inner_blocks.{level}{inner}", c, 256 << level, 1, 1)
        affine(shapes, f"backbone.fpn.layer_blocks.{level}{inner}", c, c, 3, 3)
    affine(shapes, f"rpn.head.conv{'' if old else '.0.0'}", c, c, 3, 3)
    affine(shapes, "rpn.head.cls_logits", 3, c, 1, 1)
    affine(shapes, "rpn.head.bbox_pred", 12, c, 1, 1)
    affine(shapes, "roi_heads.box_head.fc6", size.units, c * BINS * BINS)
    affine(shapes, "roi_heads.box_head.fc7", size.units, size.units)
    affine(shapes, "roi_heads.box_predictor.cls_score", size.classes, size.units)
    affine(shapes, "roi_heads.box_predictor.bbox_pred", 4 * size.classes, size.units)
    if mask:
        for number in range(4):
            name = f"mask_fcn{number + 1}" if old else f"{number}.0"
            affine(shapes, f"roi_heads.mask_head.{name}", c, c, 3, 3)
        affine(shapes, "roi_heads.mask_predictor.conv5_mask", c, c, 2, 2)
        affine(shapes, "roi_heads.mask_predictor.mask_fcn_logits", size.classes, c, 1, 1)
    return shapes


def published() -> list[tuple[str, Shapes]]:
    """Experiments and the released checkpoints of Sense-X/TSD that belong to them."""
    deep, deeper = Size(BLOCKS[101]), Size(BLOCKS[152])
    wide = Size(BLOCKS[101], groups=64, base_width=4)
    return [
        ("tsd_r50", mmdet(Size())),
        ("tsd_r101", mmdet(deep)),
        ("tsd_r152", mmdet(deeper)),
        ("tsd_x101_dcn", mmdet(wide, offsets="conv2.conv_offset")),
        ("tsd_x101_dcn", mmdet(wide, offsets="conv2_offset")),
        ("mask_tsd_r50", mmdet(Size(), mask=True)),
        ("cascade_tsd_r50", mmdet(Size(), stages=3)),
        ("cascade_tsd_r101", mmdet(deep, stages=3)),
        ("cascade_sibling_r101", mmdet(deep, "sibling", stages=3)),
        ("openimages/tsd_r50", mmdet(Size(classes=501))),
        ("openimages/sibling_r50", mmdet(Size(classes=501), "sibling")),
    ]


def random(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Values that keep the maps of a network in bounds and let every tensor matter."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
        elif name.endswith("running_var"):
            state[name] = torch.rand(shape, generator=generator) + 0.5
        elif name.endswith("weight") and len(shape) == 1:
            state[name] = torch.rand(shape, generator=generator) * 0.4 + 0.3
        else:
            inputs = max(1, int(np.prod(shape[1:])))
            scale = (2 / inputs) ** 0.5 if len(shape) > 1 else 0.3
            state[name] = torch.randn(shape, generator=generator) * scale
    return state


def zeros(shapes: Shapes) -> dict[str, Tensor]:
    """Tensors of these shapes that share one number of memory, also in a file."""
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}


def on_meta(shapes: Shapes) -> dict[str, Tensor]:
    """Tensors of these shapes without memory."""
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def mmcv_file(state: dict[str, Tensor], **meta: Any) -> dict[str, Any]:
    """As mmcv's runner saves it."""
    group = {"lr": 0.04, "momentum": 0.9, "params": [0]}
    buffers = {0: {"momentum_buffer": next(iter(state.values()))}}
    about = {"epoch": 14, "iter": 51296, "time": "Mon Mar 23 2020", "mmdet_version": "1.0.0"}
    return {
        "meta": about | {"config": "model = dict()", "best": np.float64(0.409)} | meta,
        "state_dict": state,
        "optimizer": {"state": buffers, "param_groups": [group]},
    }
