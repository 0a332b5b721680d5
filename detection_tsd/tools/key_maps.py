"""Names of the tensors in published checkpoints, and ours for them.

The names of mmdetection v1 were read off the code of Sense-X/TSD: mmdet/models/backbones/resnet.py
and resnext.py, necks/fpn.py, anchor_heads/rpn_head.py, bbox_heads/tsd_bbox_head.py and
convfc_bbox_head.py, mask_heads/fcn_mask_head.py, detectors/two_stage.py and cascade_rcnn.py,
ops/dcn/deform_conv.py (`conv2.conv_offset`, `conv2_offset` in older files). Those of torchvision
are its own; files older than its version 0.14 lack an index in the pyramid, the RPN and the masks.

The released files themselves were not at hand. A name that such a file has and that code has not
is reported, never skipped.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

SOURCES = ("mmdet_v1", "torchvision")
# What an absent tensor stands for: torchvision's frozen norms do not count batches.
ZERO_WHEN_ABSENT = ".num_batches_tracked"


class Rule(NamedTuple):
    """A regular expression in a name, and what takes its place."""

    pattern: str
    ours: str


STAGE = r"^(head|heads\.\d+)\."  # head of a detector, or of a stage of a cascade
COMMON = (
    Rule(r"^backbone\.", "backbone.body."),
    Rule(r"\.conv2_offset\.", ".conv2.conv_offset."),
    Rule(r"^neck\.lateral_convs\.(\d+)\.conv\.", r"backbone.fpn.inner_blocks.\1.0."),
    Rule(r"^neck\.fpn_convs\.(\d+)\.conv\.", r"backbone.fpn.layer_blocks.\1.0."),
    Rule(r"^rpn_head\.rpn_conv\.", "rpn.head.conv.0.0."),
    Rule(r"^rpn_head\.rpn_cls\.", "rpn.head.cls_logits."),
    Rule(r"^rpn_head\.rpn_reg\.", "rpn.head.bbox_pred."),
    Rule(r"^bbox_head\.(\d+)\.", r"heads.\1."),
    Rule(r"^bbox_head\.", "head."),
    Rule(r"^mask_head\.convs\.(\d+)\.conv\.", r"mask.mask_head.\1.0."),
    Rule(r"^mask_head\.upsample\.", "mask.mask_predictor.conv5_mask."),
    Rule(r"^mask_head\.conv_logits\.", "mask.mask_predictor.mask_fcn_logits."),
)
TSD = (
    Rule(STAGE + r"shared_fc\.0\.", r"\1.offset.shared."),
    Rule(STAGE + r"delta_c\.(\d)\.", r"\1.offset.cls.\2."),
    Rule(STAGE + r"delta_r\.(\d)\.", r"\1.offset.reg.\2."),
    Rule(STAGE + r"TSD_pc_fcs\.0\.", r"\1.cls_head.fc6."),
    Rule(STAGE + r"TSD_pc_fcs\.1\.", r"\1.cls_head.fc7."),
    Rule(STAGE + r"TSD_pr_fcs\.0\.", r"\1.box_head.fc6."),
    Rule(STAGE + r"TSD_pr_fcs\.1\.", r"\1.box_head.fc7."),
    Rule(STAGE + r"TSD_fc_cls\.", r"\1.box_predictor.cls_score."),
    Rule(STAGE + r"TSD_fc_reg\.", r"\1.box_predictor.bbox_pred."),
    Rule(STAGE + r"shared_fcs\.0\.", r"\1.sibling.box_head.fc6."),
    Rule(STAGE + r"shared_fcs\.1\.", r"\1.sibling.box_head.fc7."),
    Rule(STAGE + r"fc_cls\.", r"\1.sibling.box_predictor.cls_score."),
    Rule(STAGE + r"fc_reg\.", r"\1.sibling.box_predictor.bbox_pred."),
)
SIBLING = (
    Rule(STAGE + r"shared_fcs\.0\.", r"\1.box_head.fc6."),
    Rule(STAGE + r"shared_fcs\.1\.", r"\1.box_head.fc7."),
    Rule(STAGE + r"fc_cls\.", r"\1.box_predictor.cls_score."),
    Rule(STAGE + r"fc_reg\.", r"\1.box_predictor.bbox_pred."),
)
TORCHVISION = (
    Rule(r"^backbone\.fpn\.(inner|layer)_blocks\.(\d+)\.(weight|bias)$",
         r"backbone.fpn.\1_blocks.\2.0.\3"),
    Rule(r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.head.conv.0.0.\1"),
    Rule(r"^roi_heads\.mask_", "mask.mask_"),
    Rule(r"^roi_heads\.box_", "head.box_"),
    *(Rule(rf"\.mask_fcn{number}\.", f".{number - 1}.0.") for number in range(1, 5)),
)  # fmt: skip


def rename(names: Iterable[str], source: str) -> dict[str, str]:
    """Our name of each published name; one that no rule knows keeps what is left of its own.

    Two published names can have the same name here when a file is not what it seems.

    Args:
        names: without the `module.` of data parallel training.
        source: one of `SOURCES`.

    Raises:
        ValueError: another source.
    """
    names = list(names)
    if source not in SOURCES:
        raise ValueError(f"source={source!r}: need one of {SOURCES}")
    if source == "torchvision":
        return {name: _apply(TORCHVISION, name) for name in names}
    head = TSD if any(".TSD_" in name for name in names) else SIBLING
    return {name: _apply((*COMMON, *head), name) for name in names}


def _apply(rules: Iterable[Rule], name: str) -> str:
    for rule in rules:
        name = re.sub(rule.pattern, rule.ours, name)
    return name
