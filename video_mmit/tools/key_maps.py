"""Names of the tensors in published checkpoints, and ours for them.

Every name below was read off the code that builds the published networks:

- X-Temporal: core/models.py (`base_model`, `new_fc`), core/tin.py, core/tsm.py, models/slowfast.py,
  models/stresnet.py (R(2+1)D), models/resnet3D.py; deepcs233/TIN: ops/temporal_interlace.py;
- temporal-shift-module: ops/models.py, ops/temporal_shift.py, ops/non_local.py;
- TRN-pytorch: TRNmodule.py, whose `consensus` the released X-Temporal lacks;
- mmaction2: models/backbones/resnet.py, resnet_tin.py, resnet_tsm.py, models/heads; its non-local
  block is mmcv's (cnn/bricks/non_local.py).

The released files themselves were not at hand. A name that such a file has and that code has not
is reported, never skipped.

Frame networks of all but mmaction2 share the names of torchvision's ResNet below `base_model`.
mmaction2 pairs each convolution with its norm (`conv1.conv`, `conv1.bn`, `downsample.conv`).
What stands before or around the first convolution `conv1` of a residual block, by source:

- offsets of TIN: `conv1.net1.biasnet.net` with `conv`, `fc`, `lastlayer` in X-Temporal and
  deepcs233/TIN, `conv1.conv.net1.offset_net` with `conv`, `fc1`, `fc2` in mmaction2;
- weights of TIN: `conv1.net1.weightnet.net.lastlayer`, `conv1.conv.net1.weight_net.conv`;
- the convolution behind them: `conv1.net2`, `conv1.conv.net2`;
- the convolution behind a shift of TSM: `conv1.net`, `conv1.conv.net`.

TSM with its shift in front of whole blocks wraps these (`layer1.0.net`); a temporal pool wraps the
second stage (`layer2.net`).
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

POOLED = ".layer2.net."  # in the names behind a temporal pool, which has no weights itself


class Rule(NamedTuple):
    """A regular expression in a name, and what takes its place."""

    pattern: str
    ours: str


WRAPPED = (
    Rule(r"\.layer2\.net\.", ".layer2."),
    Rule(r"\.layer(\d)\.(\d+)\.net\.", r".layer\1.\2.block."),
)
# The attention of temporal-shift-module pools keys and values: they are the first of a pair.
SHARED_FRAME = (
    *WRAPPED,
    Rule(r"^base_model\.", "backbone."),
    Rule(r"^(new_fc|backbone\.fc)\.", "head."),  # the second when trained without dropout
    Rule(r"\.conv1\.net\.weight$", ".conv1.conv.weight"),
    Rule(r"\.nl\.(g|phi)\.0\.", r".non_local.\1."),
    Rule(r"\.nl\.theta\.", ".non_local.theta."),
    Rule(r"\.nl\.W\.0\.", ".non_local.out."),
    Rule(r"\.nl\.W\.1\.", ".non_local.norm."),
    Rule(r"^consensus\.fc_fusion_scales\.", "trn.relations."),
    Rule(r"^consensus\.classifier\.", "trn.relations.0."),
)
INTERLACED = (
    Rule(r"\.conv1\.net1\.biasnet\.net\.conv\.", ".conv1.temporal.offset_net.conv."),
    Rule(r"\.conv1\.net1\.biasnet\.net\.fc\.", ".conv1.temporal.offset_net.fc1."),
    Rule(r"\.conv1\.net1\.biasnet\.net\.lastlayer\.", ".conv1.temporal.offset_net.fc2."),
    Rule(r"\.conv1\.net1\.weightnet\.net\.lastlayer\.", ".conv1.temporal.weight_net.conv."),
    Rule(r"\.conv1\.net2\.weight$", ".conv1.conv.weight"),
)
# Stage k of a pathway is `res<k + 1>`, the lateral connection behind it `lateral_res<k + 1>`.
CLIPS = (
    *(
        Rule(rf"^{path}_res{stage + 1}\.", f"{path}.layer{stage}.")
        for path in ("fast", "slow")
        for stage in (1, 2, 3, 4)
    ),
    Rule(r"^(fast|slow)_(conv1|bn1)\.", r"\1.\2."),
    Rule(r"^lateral_p1\.", "lateral.0."),
    *(Rule(rf"^lateral_res{stage + 1}\.", f"lateral.{stage}.") for stage in (1, 2, 3)),
    Rule(r"\.spatial_conv\.", ".spatial."),
    Rule(r"\.temporal_conv\.", ".temporal."),
    Rule(r"^fc\.", "head."),
)
MMACTION2 = (
    *WRAPPED,
    Rule(r"\.conv(\d)\.conv\.weight$", r".conv\1.weight"),
    Rule(r"\.conv(\d)\.bn\.", r".bn\1."),
    Rule(r"\.downsample\.conv\.", ".downsample.0."),
    Rule(r"\.downsample\.bn\.", ".downsample.1."),
    Rule(r"\.conv1\.conv\.net1\.(offset_net|weight_net)\.", r".conv1.temporal.\1."),
    Rule(r"\.conv1\.conv\.net2?\.weight$", ".conv1.conv.weight"),
    Rule(r"\.non_local_block\.(g|phi)\.0\.conv\.", r".non_local.\1."),
    Rule(r"\.non_local_block\.theta\.conv\.", ".non_local.theta."),
    Rule(r"\.non_local_block\.conv_out\.conv\.", ".non_local.out."),
    Rule(r"\.non_local_block\.conv_out\.bn\.", ".non_local.norm."),
    Rule(r"^cls_head\.fc_cls\.", "head."),
    Rule(r"^cls_head\.consensus\.fc_fusion_scales\.", "trn.relations."),
    Rule(r"^cls_head\.consensus\.classifier\.", "trn.relations.0."),
)
RULES: dict[str, tuple[Rule, ...]] = {
    "xtemporal": (*SHARED_FRAME, *INTERLACED, *CLIPS),
    "tsm": SHARED_FRAME,
    "mmaction2": MMACTION2,
}
SOURCES = ("auto", *RULES)

# What an absent tensor stands for: old files do not count the batches of a norm; mmaction2's
# non-local block ends in a convolution without bias, ours has one.
ZERO_WHEN_ABSENT = {
    "xtemporal": (".num_batches_tracked",),
    "tsm": (".num_batches_tracked",),
    "mmaction2": (".num_batches_tracked", ".non_local.out.bias"),
}
# What the published code fixes and no shape shows, by the argument of our model.
FIXED: dict[str, dict[str, object]] = {
    "xtemporal": {
        "tin.offset_scale": 4.0, "alpha": 4, "non_local.pool": True, "non_local.mode": "embedded",
    },
    "tsm": {"non_local.pool": True, "non_local.mode": "embedded"},
    "mmaction2": {"tin.offset_scale": 4.0, "non_local.pool": True},
}  # fmt: skip


def without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by their names without the `module.` of data parallel training."""
    return {name.removeprefix("module."): value for name, value in state.items()}


def detect(state: Mapping[str, Tensor]) -> str | None:
    """The source whose names these are; None when they are of no source."""
    if any(name.startswith(("backbone.", "cls_head.")) for name in state):
        return "mmaction2"
    if any(name.startswith(("base_model.", "new_fc.")) for name in state):
        return "xtemporal"  # temporal-shift-module's names are among its
    first = state.get("fast_conv1.weight", state.get("conv1.spatial_conv.weight"))
    first = state.get("conv1.weight") if first is None else first
    return "xtemporal" if first is not None and first.dim() == 5 else None


def rename(names: Iterable[str], source: str) -> dict[str, str]:
    """Our name of each published name; one that no rule knows keeps its own.

    Two published names can have the same name here when a file is not what it seems.
    """
    found = {name: _apply(RULES[source], name) for name in names}
    if any(ours.startswith("trn.relations.") for ours in found.values()):
        # With relations behind it, the linear layer on the frames is no classifier.
        found = {name: re.sub(r"^head\.", "trn.reduce.", ours) for name, ours in found.items()}
    return found


def _apply(rules: Iterable[Rule], name: str) -> str:
    for rule in rules:
        name = re.sub(rule.pattern, rule.ours, name)
    return name
