"""From the tensors of a checkpoint to a detector of this package, and to its release file.

What can be read off the shapes is read off them: depth, groups and deformable convolutions of the
trunk, widths, head, stages, masks, number of classes. What no shape shows is the converter's to
say: pixel convention, pooling, sampler, anchors.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra import compose
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

import detection_tsd.train  # noqa: F401  (the schema of the configurations composed below)
from common.log import InputError
from detection_tsd.rows import own_hydra
from detection_tsd.tools.key_maps import ZERO_WHEN_ABSENT
from detection_tsd.weights import NODES, write_release

BLOCK = re.compile(r"backbone\.body\.layer([1-4])\.(\d+)\.conv1\.weight")
MASK = re.compile(r"mask\.mask_head\.(\d+)\.0\.weight")
DEFORMABLE = {18: "v1", 27: "v2"}  # by the channels of a 3x3 kernel's offsets


class Structure(NamedTuple):
    """What the shapes of a checkpoint say.

    Attributes:
        layers: blocks of the four stages of the trunk.
        groups: of its 3x3 convolutions. width: channels of a group at 64 planes.
        dcn: version of its deformable convolutions, or None.
        channels: of the pyramid.
        tsd: whether the head is TSD's; otherwise the two-layer head.
        stages: box heads; more than one is a cascade.
        units: of the extractors. offset_units: of the layers that predict shifts, 0 without.
        mask: widths of the convolutions of the mask branch; empty without.
        num_classes: foreground classes.
    """

    layers: tuple[int, ...]
    groups: int
    width: int
    dcn: str | None
    channels: int
    tsd: bool
    stages: int
    units: int
    offset_units: int
    mask: tuple[int, ...]
    num_classes: int

    def overrides(self) -> list[str]:
        """Words that compose a training configuration of this structure."""
        model = ("mask" if self.mask else "faster") if self.stages == 1 else "cascade"
        words = [
            "backbone=r50", f"backbone.layers={list(self.layers)}",
            f"++backbone.groups={self.groups}", f"++backbone.width={self.width}",
            f"backbone.dcn={self.dcn or 'false'}", f"++backbone.channels={self.channels}",
            f"rpn.channels={self.channels}", f"head={'tsd' if self.tsd else 'sibling'}",
            f"head.channels={self.channels}", f"head.width={self.units}", f"model={model}",
        ]  # fmt: skip
        if self.tsd:
            words.append(f"head.offset_width={self.offset_units}")
        if model == "mask":
            words += [f"model.mask.channels={self.channels}"]
            words += [f"model.mask.layers={list(self.mask)}"]
        return words


def read_structure(named: Mapping[str, Tensor], where: Path) -> Structure:
    """The structure of a checkpoint.

    Args:
        named: tensors by our names; only shapes are read.
        where: the file, for messages.

    Raises:
        InputError: a tensor without which nothing is known is missing or has no such shape.
    """
    blocks = [match for match in map(BLOCK.fullmatch, named) if match]
    layers = tuple(sum(match[1] == stage for match in blocks) for stage in "1234")
    if min(layers) < 1:
        raise InputError(where, "is no ResNet or ResNeXt of four stages: blocks", layers)
    stages = {match[1] for name in named if (match := re.match(r"heads\.(\d+)\.", name))}
    head = "heads.0" if stages else "head"
    kernel = _shape(named, "backbone.body.layer1.0.conv2.weight", 4, where)
    channels = _shape(named, "backbone.fpn.inner_blocks.0.0.weight", 4, where)[0]
    classes = _shape(named, f"{head}.box_predictor.cls_score.weight", 2, where)
    offsets = named.get("backbone.body.layer2.0.conv2.conv_offset.weight")
    shared = named.get(f"{head}.offset.shared.weight")
    masks = sorted(int(match[1]) for match in map(MASK.fullmatch, named) if match)
    return Structure(
        layers=layers,
        groups=kernel[0] // kernel[1],
        width=kernel[1],
        dcn=None if offsets is None else DEFORMABLE.get(offsets.shape[0], "v1"),
        channels=channels,
        tsd=shared is not None,
        stages=max(len(stages), 1),
        units=classes[1],
        offset_units=0 if shared is None else shared.shape[0],
        mask=tuple(named[f"mask.mask_head.{number}.0.weight"].shape[0] for number in masks),
        num_classes=classes[0] - 1,
    )


def _shape(named: Mapping[str, Tensor], name: str, dimensions: int, where: Path) -> torch.Size:
    if name not in named:
        raise InputError(
            where, "is no checkpoint of a two-stage detector: it lacks, by our name", name
        )
    shape = named[name].shape
    if len(shape) != dimensions or min(shape) < 1:
        raise InputError(where, f"{name} (our name) has a shape that it cannot have", tuple(shape))
    return shape


def compose_model(words: Iterable[str], where: object) -> DictConfig:
    """The training configuration of these overrides.

    Raises:
        InputError: there is no such experiment, or it does not take them.
    """
    with own_hydra():
        try:
            return compose("train", list(words))
        except HydraException as error:
            raise InputError(where, "cannot be composed", error) from error


def state_on_meta(cfg: DictConfig) -> dict[str, Tensor]:
    """Names, shapes and types of a detector's state, without memory for it.

    Raises:
        InputError: it cannot be built.
    """
    try:
        with torch.device("meta"):
            model: nn.Module = instantiate(cfg.model)
    except InputError:
        raise
    except (TypeError, ValueError, InstantiationException) as error:
        raise InputError("model", "cannot be built", error) from error
    return dict(model.state_dict())


def fit(
    published: Mapping[str, Tensor], ours: Mapping[str, str], own: Mapping[str, Tensor], where: Path
) -> dict[str, Tensor]:
    """The published tensors as the state of our detector.

    Args:
        published: tensors by their published names.
        ours: our name of each of these.
        own: state of our detector; only shapes and types are read.
        where: the file, for messages.

    Raises:
        InputError: tensors that our detector has not, lacks or has in another shape, all in one
            message.
    """
    theirs = {new: old for old, new in ours.items()}  # of two with one name, the last
    unknown = [old for old, new in ours.items() if new not in own or theirs[new] != old]
    missing = [n for n in own if n not in theirs and not n.endswith(ZERO_WHEN_ABSENT)]
    state, shapes = {}, []
    for name, target in own.items():
        if name not in theirs:
            state[name] = torch.zeros(target.shape, dtype=target.dtype)
            continue
        value = _of_every_class(published[theirs[name]], name, target)
        if value.shape != target.shape:
            shapes.append(f"{theirs[name]} {tuple(value.shape)} not {tuple(target.shape)}")
        state[name] = value.to(target.dtype, copy=True, memory_format=torch.contiguous_format)
    kinds = {"unknown": unknown, "missing (by our names)": missing, "wrong shapes": shapes}
    listed = "; ".join(f"{kind}: {', '.join(sorted(x))}" for kind, x in kinds.items() if x)
    if listed:
        raise InputError(where, "is not a checkpoint of this detector", listed)
    return state


def _of_every_class(value: Tensor, name: str, target: Tensor) -> Tensor:
    """Deltas that all classes share (`reg_class_agnostic` of mmdetection), once for each class."""
    shared = ".bbox_pred." in name and not name.startswith("rpn.") and value.shape[:1] == (4,)
    if not shared or target.shape[0] % 4:
        return value
    return value.repeat(target.shape[0] // 4, *[1] * (value.dim() - 1))


def save_release(
    state: Mapping[str, Tensor], cfg: DictConfig, facts: Mapping[str, Any], out: Path
) -> Path:
    """Write a release file that `load_trained` reads; `facts` are its names of classes and such."""
    nodes = {name: OmegaConf.to_container(cfg[name], resolve=True) for name in NODES}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_release(state, nodes | dict(facts), 0, out)
    return out
