"""Published checkpoints of X-Temporal and its relatives -> a release file of this package.

    python -m video_mmit.tools.convert_xtemporal checkpoint=FILE out=FILE \
        experiment=mmit/tin_r50_8f classes=moments_categories.txt

The network is that of an experiment, or given by its groups (`model=tsm model/backbone=resnet101
model.tsm.n_round=2 data=sthv2`). What has no weights comes from there alone and must be that of the
published network: place and width of a shift, number of frames, pools, transform and sampler. The
number of classes is the checkpoint's. The file can be evaluated (`checkpoint=FILE`) and trained
from (`init=FILE`); an evaluation on a data set compares the names of the classes and so needs
`classes`.

`video_mmit.tools.key_maps` says which names are known.
"""

import pickle
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.config_store import ConfigStore
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import MISSING, DictConfig, OmegaConf
from torch import Tensor, nn

from common.log import InputError, exit_on_bad_input, get_logger, setup_logging
from video_mmit.data.annotations import read_lines
from video_mmit.data.lists import read_classes
from video_mmit.data.mmit import read_categories
from video_mmit.tools.key_maps import (
    FIXED,
    POOLED,
    SOURCES,
    ZERO_WHEN_ABSENT,
    detect,
    rename,
    without_prefix,
)
from video_mmit.train import TrainConfig
from video_mmit.weights import write_release


@dataclass
class ConvertConfig(TrainConfig):
    """Schema of configs/convert_xtemporal.yaml: an experiment, and what the command needs."""

    checkpoint: str = MISSING
    out: str = MISSING
    source: str = "auto"  # auto | xtemporal | tsm | mmaction2
    classes: str | None = None  # names, one a line or `name,index`; numbered when null
    train_set: str = MISSING  # what the network was trained on
    multi_label: bool | None = None  # null: unless the experiment's loss is cross entropy


ConfigStore.instance().store("mmit_convert_xtemporal_schema", ConvertConfig)

CLASSIFIERS = ("head.weight", "trn.relations.0.3.weight")
OFFSETS = ".offset_net.fc1.weight"  # (T, T)
# A broken pickle fails in any of these ways.
UNREADABLE = (
    pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError,
    AttributeError, AssertionError, struct.error,
)  # fmt: skip


class _Nothing:
    """Stands for a number or array of numpy beside the weights; nothing of numpy is called."""

    def __init__(self, *_: object):
        pass

    def __setstate__(self, _: object) -> None:
        pass


# X-Temporal saves the best score so far, which is numpy's for several labels a video.
NUMPY: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_Nothing, name)
    for name in (
        "numpy.dtype",
        "numpy.ndarray",
        *(f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")),
        *(f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")),
    )
]


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Tensors of a PyTorch file, without the `module.` of data parallel training.

    They are the file itself, or its entry `state_dict` or `model`; other entries (optimiser,
    epoch, ...) are passed over. Only tensors and plain values are unpickled.

    Raises:
        InputError: no such file, not a PyTorch file, one that holds other objects (the first is
            named), or no dictionary of tensors.
    """
    if not path.is_file():
        raise InputError(path, "no such file")
    try:
        with torch.serialization.safe_globals(NUMPY):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise InputError(path, "is not a PyTorch file of tensors", error) from error
        what = (
            "holds objects that are not loaded because that could run code; save its state_dict "
            "alone, in the environment it comes from; the first is"
        )
        raise InputError(path, what, refused[1]) from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise InputError(path, "holds no dictionary of tensors", type(content).__name__)
    others = sorted(str(key) for key, value in content.items() if not isinstance(value, Tensor))
    if others:
        raise InputError(path, "has entries among its weights that are no tensors", others)
    return without_prefix(content)


def convert(cfg: ConvertConfig) -> Path:
    """Write the release file `cfg.out` and return its path.

    Raises:
        InputError: a file that cannot be read, weights that are not those of the network (every
            name is listed), names of the classes that are too many or too few, or a setting of
            the network that the published code does not have.
    """
    where = Path(cfg.checkpoint)
    published = read_checkpoint(where)
    source = _source(cfg.source, published, where)
    ours = rename(published, source)
    named = {new: published[old] for old, new in ours.items()}
    num_classes = _count_classes(named, where)
    classes = read_names(cfg.classes, num_classes)
    _check_fixed(cfg, source, published)
    _check_frames(cfg, named, where)
    if OmegaConf.select(cfg.model, "backbone.weights") is not None:
        cfg.model.backbone.weights = None  # the checkpoint has them
    own = _network(cfg, num_classes).state_dict()
    state = fit(published, ours, own, source, where)
    config = {name: _plain(node) for name, node in _nodes(cfg).items()} | {
        "train_set": cfg.train_set,
        "num_classes": num_classes,
        "classes": list(classes),
        "multi_label": _multi_label(cfg),
        "seed": None,  # not known
    }
    out = Path(cfg.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_release(state, config, 0, out)
    get_logger(__name__).info(
        "%s: %d tensors with names of %s, %d classes", out, len(state), source, num_classes
    )
    return out


def fit(
    published: Mapping[str, Tensor],
    ours: Mapping[str, str],
    own: Mapping[str, Tensor],
    source: str,
    where: Path,
) -> dict[str, Tensor]:
    """The published tensors as the state of our network.

    Args:
        published: tensors by their published names.
        ours: our name of each of these.
        own: state of our network; only shapes and types are read.
        source: whose names these are.
        where: the file, for messages.

    Raises:
        InputError: tensors that our network has not, lacks or has in another shape, all in one
            message.
    """
    theirs = {new: old for old, new in ours.items()}  # of two with one name, the last
    unknown = [old for old, new in ours.items() if new not in own or theirs[new] != old]
    absent = ZERO_WHEN_ABSENT[source]
    missing = [name for name in own if name not in theirs and not name.endswith(absent)]
    state, shapes = {}, []
    for name, target in own.items():
        if name not in theirs:
            state[name] = torch.zeros(target.shape, dtype=target.dtype)
            continue
        value = _as_linear(published[theirs[name]], target)
        if value.shape != target.shape:
            shapes.append(f"{theirs[name]} {tuple(value.shape)} not {tuple(target.shape)}")
        state[name] = value.to(target.dtype, copy=True, memory_format=torch.contiguous_format)
    kinds = {"unknown": unknown, "missing (by our names)": missing, "wrong shapes": shapes}
    listed = "; ".join(f"{kind}: {', '.join(sorted(x))}" for kind, x in kinds.items() if x)
    if listed:
        raise InputError(where, "is not a checkpoint of this network", listed)
    return state


def _as_linear(value: Tensor, target: Tensor) -> Tensor:
    """A 1x1x1 convolution of a published non-local block is a linear layer on channels here."""
    convolution = value.dim() == 5 and value.shape[2:] == (1, 1, 1)
    return value.flatten(1) if convolution and target.dim() == 2 else value


def read_names(path: str | None, num_classes: int) -> tuple[str, ...]:
    """Names of the classes in the order of the scores; their numbers when there is no file.

    Raises:
        InputError: a file that cannot be read, or that names another number of classes.
    """
    if path is None:
        return tuple(str(number) for number in range(num_classes))
    indexed = all(re.search(r",\d+$", line.text) for line in read_lines(Path(path)))
    names = read_categories(Path(path)) if indexed else read_classes(path)
    if len(names) != num_classes:
        what = f"names {len(names)} classes, the classifier of the checkpoint has"
        raise InputError(path, what, num_classes)
    return names


def _source(asked: str, published: Mapping[str, Tensor], where: Path) -> str:
    if asked not in SOURCES:
        raise InputError("source", f"must be one of {', '.join(SOURCES)}", asked)
    source = detect(published) if asked == "auto" else asked
    if source is None:
        what = "has names of no known source, or a backbone alone (model.backbone.weights takes it)"
        raise InputError(where, what, min(published))
    return source


def _count_classes(named: Mapping[str, Tensor], where: Path) -> int:
    for name in CLASSIFIERS:
        if name in named and named[name].dim() == 2:
            return named[name].shape[0]
    raise InputError(where, "has no classifier", "none of new_fc, fc, base_model.fc, cls_head")


def _check_fixed(cfg: ConvertConfig, source: str, published: Mapping[str, Tensor]) -> None:
    """Raise `InputError` for a network that the weights would fit without being that one."""
    expected = dict(FIXED[source])
    expected["tsm.temporal_pool"] = pooled = any(POOLED in name for name in published)
    for key, value in expected.items():
        found = OmegaConf.select(cfg.model, key)
        if found is None and pooled and key == "tsm.temporal_pool":
            found = False  # a network without TSM
        if found is not None and found != value:
            raise InputError(f"model.{key}", f"is {value} in the published network", found)


def _check_frames(cfg: ConvertConfig, named: Mapping[str, Tensor], where: Path) -> None:
    """Raise `InputError` unless weights, network and sampler agree on the number of frames."""
    segments = OmegaConf.select(cfg.model, "num_segments")
    trained = {value.shape[0] for name, value in named.items() if name.endswith(OFFSETS)}
    if trained and segments is not None and trained != {segments}:
        counts = ", ".join(map(str, sorted(trained)))
        raise InputError("model.num_segments", f"{where} has offsets for {counts} frames", segments)
    of_one_length = any(OmegaConf.select(cfg.model, key) is not None for key in ("tin", "trn"))
    frames = segments if of_one_length else OmegaConf.select(cfg.model, "frames")
    count = OmegaConf.select(cfg.data, "sampler.count")
    if frames is not None and count != frames:
        raise InputError("data.sampler.count", f"the network takes clips of {frames} frames", count)


def _network(cfg: ConvertConfig, num_classes: int) -> nn.Module:
    """The network without memory for its weights."""
    try:
        with torch.device("meta"):
            network: nn.Module = instantiate(cfg.model)(num_classes=num_classes)
    except InputError:
        raise
    except (TypeError, ValueError, InstantiationException) as error:
        raise InputError("model", "cannot be built", error) from error
    return network


def _nodes(cfg: ConvertConfig) -> dict[str, Any]:
    sampler = OmegaConf.select(cfg.data, "sampler")
    return {"model": cfg.model, "transform": cfg.transform, "sampler": sampler}


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True)


def _multi_label(cfg: ConvertConfig) -> bool:
    if cfg.multi_label is not None:
        return cfg.multi_label
    return not str(OmegaConf.select(cfg.loss, "function._target_")).endswith(".losses.ce")


@hydra.main(version_base=None, config_path="../configs", config_name="convert_xtemporal")
def main(cfg: DictConfig) -> None:
    setup_logging(0)
    convert(cfg)  # type: ignore[arg-type]


if __name__ == "__main__":
    exit_on_bad_input(main)
