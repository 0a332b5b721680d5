"""Names of the tensors in published checkpoints, ours for them, and what no tensor shows.

Every name was read off the code that builds the published networks:

- polyface: trojans-face-recognizer, EfficientPolyFace/EfficientPolyFace.py and the feature network
  of QAN++/PolyFace.py (the same names);
- quality: the quality network of QAN++/PolyFace.py;
- iresnet, mobilefacenet: insightface arcface_torch, backbones/iresnet.py and mobilefacenet.py.

The released files themselves were not at hand. A name that such a file has and that code has not
is reported, never skipped.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Rule(NamedTuple):
    """A regular expression in a name, and what takes its place."""

    pattern: str
    ours: str


ENTRY = r"\1.branches.entry.convs"
TAIL = r"\1.branches.tails"
STAGE = r"^(stage_\w\.\d+|[ab]_to_[bc])"
POLYFACE = (
    Rule(r"^stem\.step1\.stem\.", "stem.start."),
    Rule(r"^stem\.step1\.branch1\.", "stem.halve.conv."),
    Rule(r"^stem\.step2\.branch(\d)\.0\.", r"stem.middle.entry.convs.\1."),
    *(
        Rule(rf"^stem\.step2\.branch(\d)\.{place}\.", rf"stem.middle.tails.\1.{place - 1}.")
        for place in (1, 2, 3)
    ),
    Rule(r"^stem\.step3\.branch1\.", "stem.end.conv."),
    Rule(r"^a10\.", "stage_a."),
    Rule(r"^b20\.", "stage_b."),
    Rule(r"^c10\.", "stage_c."),
    Rule(r"^a2b\.branch1\.", "a_to_b.branches.direct.0."),
    Rule(r"^a2b\.", "a_to_b."),
    Rule(r"^b2c\.", "b_to_c."),
    Rule(STAGE + r"\.branch(\d)\.(?:0\.)?(conv|bn)\.", ENTRY + r".\2.\3."),
    *(
        Rule(STAGE + rf"\.branch(\d)\.{place}\.(conv|bn)\.", TAIL + rf".\2.{place - 1}.\3.")
        for place in (1, 2)
    ),
    Rule(r"^(stage_\w\.\d+)\.stem\.0\.", r"\1.closing.conv."),
    Rule(r"^(stage_\w\.\d+)\.stem\.1\.", r"\1.closing.norm."),
    Rule(r"^fc\.bn1\.", "head.norm."),
    Rule(r"^fc\.fc\.", "head.fc."),
    Rule(r"^fc\.bn2\.", "last_norm."),
    Rule(r"\.bn\.", ".norm."),
)
SHORTCUT = (
    Rule(r"\.downsample\.0\.", ".shortcut.conv."),
    Rule(r"\.downsample\.1\.", ".shortcut.norm."),
)
QUALITY = (
    Rule(r"^group1\.conv1\.", "start.conv."),
    Rule(r"^group1\.bn1\.", "start.norm."),
    Rule(r"^group1\.act1\.", "start.act."),
    *(Rule(rf"^layer{stage}\.", f"stages.{stage - 1}.") for stage in (1, 2, 3, 4)),
    Rule(r"\.group1\.", "."),
    *SHORTCUT,
    Rule(r"^fc1\.1\.", "score."),
)
IRESNET = (*SHORTCUT, Rule(r"^features\.", "last_norm."))
MOBILEFACENET = (
    Rule(r"^conv_sep\.", "body.8."),
    Rule(r"^features\.layers\.0\.", "head."),
    Rule(r"^features\.layers\.2\.", "fc."),
    Rule(r"^features\.layers\.3\.", "last_norm."),
    Rule(r"^layers\.(\d)\.layers\.(\d+)\.(layers\.\d\.layers\.)", r"body.\1.\2.\3"),
    Rule(r"^layers\.", "body."),
    *(
        Rule(rf"\.layers\.{place}\.(\w+)$", rf".{kind}.\1")
        for place, kind in enumerate(("conv", "norm", "act"))
    ),
)
RULES: dict[str, tuple[Rule, ...]] = {
    "polyface": POLYFACE,
    "quality": QUALITY,
    "iresnet": IRESNET,
    "mobilefacenet": MOBILEFACENET,
}
SOURCES = ("auto", *RULES)
SIGNS = {
    "polyface": "stem.step1.stem.0.conv.weight",
    "quality": "group1.conv1.weight",
    "iresnet": "layer1.0.prelu.weight",
    "mobilefacenet": "conv_sep.layers.0.weight",
}
# Absent from files older than the counting of batches, and from all others' files.
ZERO_WHEN_ABSENT = (".num_batches_tracked", "depth.forwards")
# What the published code fixes and no shape shows, by the argument of our model.
FIXED: dict[str, dict[str, object]] = {
    "polyface": {"input_size": 235, "keep": 0.8, "scale": 0.3, "bn_eps": 1e-10, "drop": "batch"},
    "quality": {"input_size": 112},
    "iresnet": {"input_size": 112, "stem_stride": 1},
    "mobilefacenet": {"input_size": 112},
}
_FACE = {"_target_": "face_lfr.data.transforms.FaceTransform", "size": 112}
_TROJANS = _FACE | {"colour": "bgr", "crop_first": True, "centre": 127.5, "scale": 79.6875}
_INSIGHTFACE = _FACE | {"colour": "rgb", "crop_first": False, "centre": 127.5, "scale": 127.5}
# Channel order, crop, size and values that the network was trained with.
TRANSFORMS: dict[str, dict[str, Any]] = {
    "polyface": _TROJANS | {"resize": 235},
    "quality": _TROJANS | {"resize": 112},
    "iresnet": _INSIGHTFACE | {"resize": None},
    "mobilefacenet": _INSIGHTFACE | {"resize": None},
}
WRAPPERS = ("module.", "_orig_mod.")  # of data parallel training and of torch.compile


def without_wrappers(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors by their names without wrappers, and the names that were left behind.

    The authors of PolyFace trained a `base` with a classifier beside it; what is not of the base
    is left behind.
    """
    plain = dict(state)
    for wrapper in WRAPPERS:
        plain = {name.removeprefix(wrapper): value for name, value in plain.items()}
    if not any(name.startswith("base.") for name in plain):
        return plain, []
    base = {n.removeprefix("base."): x for n, x in plain.items() if n.startswith("base.")}
    return base, sorted(name for name in plain if not name.startswith("base."))


def detect(names: Iterable[str]) -> str | None:
    """The source whose names these are; None when they are of no source."""
    known = set(names)
    return next((source for source, sign in SIGNS.items() if sign in known), None)


def rename(names: Iterable[str], source: str) -> dict[str, str]:
    """Our name of each published name; one that no rule knows keeps its own.

    The names are those of a network whose parallel convolutions are not merged.
    """
    found = {}
    for name in names:
        ours = name
        for rule in RULES[source]:
            ours = re.sub(rule.pattern, rule.ours, ours)
        found[name] = ours
    return found


PARALLEL = re.compile(r"(.*\.entry\.convs)\.(\d+)\.(.+)")


def merge_parallel(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of parallel convolutions as those of one: joined along their outputs.

    Tensors that cannot be joined keep their names.
    """
    merged: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for name, value in state.items():
        found = PARALLEL.fullmatch(name)
        if found is None:
            merged[name] = value
        else:
            parts.setdefault(f"{found[1]}.0.{found[3]}", {})[int(found[2])] = value
    for name, numbered in parts.items():
        values = [value for _, value in sorted(numbered.items())]
        if len({value.shape[1:] for value in values}) > 1 or len({x.dim() for x in values}) > 1:
            stem, _, last = name.partition(".convs.0.")
            merged |= {f"{stem}.convs.{number}.{last}": x for number, x in numbered.items()}
        else:
            merged[name] = values[0] if values[0].dim() == 0 else torch.cat(values)
    return merged
