"""Reading of published PyTorch checkpoints without running what they contain."""

import pickle
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.log import InputError

# Where training frameworks put the weights beside optimizers, epochs and the like.
ENTRIES = ("state_dict", "model")
# A broken pickle fails in any of these ways.
UNREADABLE = (
    pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError,
    AttributeError, AssertionError, struct.error,
)  # fmt: skip


class Published(NamedTuple):
    """Tensors of a checkpoint by their published names, and what it says about itself."""

    tensors: dict[str, Tensor]
    meta: Mapping[str, Any]


class _Nothing:
    """Stands for a number or array of numpy beside the weights; nothing of numpy is called."""

    def __init__(self, *_: object):
        pass

    def __setstate__(self, _: object) -> None:
        pass


NUMPY: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_Nothing, name)
    for name in (
        "numpy.dtype",
        "numpy.ndarray",
        *(f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")),
        *(f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")),
    )
]


def read_checkpoint(path: Path) -> Published:
    """Tensors of a PyTorch file, without the `module.` of data parallel training.

    They are the file itself, or its entry `state_dict` or `model`; `meta` is the entry of that
    name where mmcv wrote one. Only tensors and plain values are unpickled.

    Raises:
        InputError: no such file, not a PyTorch file, one that holds other objects (the first is
            named, with a way to save the weights alone), or no dictionary of tensors.
    """
    content = _load(path)
    meta = content.get("meta") if isinstance(content, dict) else None
    for key in ENTRIES:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise InputError(path, "holds no dictionary of tensors", type(content).__name__)
    others = sorted(str(key) for key, value in content.items() if not isinstance(value, Tensor))
    if others:
        raise InputError(path, "has entries among its weights that are no tensors", others)
    tensors = {str(name).removeprefix("module."): value for name, value in content.items()}
    return Published(tensors, meta if isinstance(meta, Mapping) else {})


def _load(path: Path) -> Any:
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
            "holds objects that are not loaded because that could run code. If you trust it, save "
            "its weights alone where it comes from: c = torch.load(FILE, weights_only=False); "
            "torch.save({'state_dict': c.get('state_dict', c.get('model', c))}, NEW). "
            "The first of them is"
        )
        raise InputError(path, what, refused[1]) from error
