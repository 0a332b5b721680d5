"""Published checkpoints of face networks -> a release file of this package.

    python -m face_lfr.tools.convert_faces checkpoint=FILE out=FILE model=ir50 train_set=ms1mv3

Known are Efficient PolyFace (`model=polyface_deeper`), the file of QAN++, which holds a feature
network (`model=polyface_deep`) and a quality network (`model=quality_net`), and IResNet and
MobileFaceNet of insightface arcface_torch (`model=ir50`, `model=mobilefacenet`). Channel order,
crop, size and values that belong to the weights are written into the release as its transform.

`face_lfr.tools.key_maps` says which names are known.
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
from face_lfr.tools.key_maps import (
    FIXED,
    SOURCES,
    TRANSFORMS,
    ZERO_WHEN_ABSENT,
    detect,
    merge_parallel,
    rename,
    without_wrappers,
)
from face_lfr.weights import write_release


@dataclass
class ConvertConfig:
    """Schema of configs/convert_faces.yaml."""

    checkpoint: str = MISSING
    out: str = MISSING
    train_set: str = MISSING  # what the network was trained on
    model: Any = MISSING
    source: str = "auto"  # auto | polyface | quality | iresnet | mobilefacenet
    num_classes: int | None = None  # of the training; not needed to evaluate


ConfigStore.instance().store("lfr_convert_faces_schema", ConvertConfig)

# A broken pickle fails in any of these ways.
UNREADABLE = (
    pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError,
    AttributeError, AssertionError, struct.error,
)  # fmt: skip
HOLDERS = ("state_dict", "state_dict_backbone")


class _Nothing:
    """Stands for a number or array of numpy beside the weights; nothing of numpy is called."""

    def __init__(self, *_: object):
        pass

    def __setstate__(self, _: object) -> None:
        pass


# A training saves its best score so far, which may be numpy's.
NUMPY: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_Nothing, name)
    for name in (
        "numpy.dtype",
        "numpy.ndarray",
        *(f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")),
        *(f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")),
    )
]


def read_checkpoint(path: Path, quality: bool = False) -> dict[str, Tensor]:
    """Tensors of a published file by their names; only tensors and plain values are unpickled.

    Args:
        path: the file.
        quality: which network of a file that holds two (QAN++) is meant.

    Raises:
        InputError: no such file, not a PyTorch file, one that holds other objects (the first is
            named), or no dictionary of tensors.
    """
    content = _unpickle(path)
    for key in (*HOLDERS, "ckpt_quality" if quality else "ckpt_feature"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise InputError(path, "holds no dictionary of tensors", type(content).__name__)
    others = sorted(str(key) for key, value in content.items() if not isinstance(value, Tensor))
    if others:
        raise InputError(path, "has entries among its weights that are no tensors", others)
    state, left = without_wrappers(content)
    if left:
        get_logger(__name__).info("%s: no part of the network, left behind: %s", path, left)
    return state


def _unpickle(path: Path) -> Any:
    if not path.is_file():
        raise InputError(path, "no such file")
    try:
        with torch.serialization.safe_globals(NUMPY):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise InputError(path, "is not a PyTorch file of tensors", error) from error
        what = (
            "holds objects that are not loaded because that could run code; save its state_dict "
            "alone, in the environment it comes from; the first is"
        )
        raise InputError(path, what, refused[1]) from error


def convert(cfg: ConvertConfig) -> Path:
    """Write the release file `cfg.out` and return its path.

    Raises:
        InputError: a file that cannot be read, weights that are not those of the network (every
            name is listed), or a setting of the network that the published code does not have.
    """
    where = Path(cfg.checkpoint)
    network = _network(cfg)
    kind = "embedding" if hasattr(network, "embed") else "quality"
    published = read_checkpoint(where, quality=kind == "quality")
    source = _source(cfg.source, published, where)
    _check_fixed(cfg, source)
    state = fit(published, network.state_dict(), source, where)
    config = {
        "model": OmegaConf.to_container(cfg.model, resolve=True),
        "transform": TRANSFORMS[source],
        "train_set": cfg.train_set,
        "num_classes": cfg.num_classes,
        "seed": None,  # not known
        "kind": kind,
    }
    out = Path(cfg.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_release(state, config, 0, out)
    get_logger(__name__).info("%s: %d tensors with names of %s", out, len(state), source)
    return out


def fit(
    published: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str, where: Path
) -> dict[str, Tensor]:
    """The published tensors as the state of our network.

    Args:
        published: tensors by their published names.
        own: state of our network; only shapes and types are read.
        source: whose names these are.
        where: the file, for messages.

    Raises:
        InputError: tensors that our network has not, lacks or has in another shape, all in one
            message, by our names where they are known.
    """
    ours = rename(published, source)
    twice = sorted(old for old, new in ours.items() if list(ours.values()).count(new) > 1)
    if twice:
        raise InputError(where, "has several tensors for one place", ", ".join(twice))
    named = {new: published[old] for old, new in ours.items()}
    if not any(".entry.convs.1." in name for name in own):
        named = merge_parallel(named)
    unknown = [old for old, new in ours.items() if new not in own and new in named]
    missing = [n for n in own if n not in named and not n.endswith(ZERO_WHEN_ABSENT)]
    state, shapes = {}, []
    for name, target in own.items():
        value = named.get(name)
        if value is None:
            state[name] = torch.zeros(target.shape, dtype=target.dtype)
            continue
        value = _as_linear(value, target)
        if value.shape != target.shape:
            shapes.append(f"{name} {tuple(value.shape)} not {tuple(target.shape)}")
        state[name] = value.to(target.dtype, copy=True, memory_format=torch.contiguous_format)
    kinds = {"unknown": unknown, "missing (by our names)": missing, "wrong shapes": shapes}
    listed = "; ".join(f"{kind}: {', '.join(sorted(x))}" for kind, x in kinds.items() if x)
    if listed:
        raise InputError(where, "is not a checkpoint of this network", listed)
    return state


def _as_linear(value: Tensor, target: Tensor) -> Tensor:
    """The 1x1 convolution at the end of the quality network is a linear layer here."""
    pointwise = value.dim() == 4 and value.shape[2:] == (1, 1)
    return value.flatten(1) if pointwise and target.dim() == 2 else value


def _source(asked: str, published: Mapping[str, Tensor], where: Path) -> str:
    if asked not in SOURCES:
        raise InputError("source", f"must be one of {', '.join(SOURCES)}", asked)
    source = detect(published) if asked == "auto" else asked
    if source is None:
        raise InputError(where, "has names of no known source; the first is", min(published))
    return source


def _check_fixed(cfg: ConvertConfig, source: str) -> None:
    """Raise `InputError` for a network that the weights would fit without being that one."""
    for key, value in FIXED[source].items():
        found = OmegaConf.select(cfg.model, key)
        if found is not None and found != value:
            raise InputError(f"model.{key}", f"is {value} in the published network", found)


def _network(cfg: ConvertConfig) -> nn.Module:
    """The network without memory for its weights."""
    try:
        with torch.device("meta"):
            network: nn.Module = instantiate(cfg.model)
    except (TypeError, ValueError, InstantiationException) as error:
        raise InputError("model", "cannot be built", error) from error
    return network


@hydra.main(version_base=None, config_path="../configs", config_name="convert_faces")
def main(cfg: DictConfig) -> None:
    setup_logging(0)
    convert(cfg)  # type: ignore[arg-type]


if __name__ == "__main__":
    exit_on_bad_input(main)
