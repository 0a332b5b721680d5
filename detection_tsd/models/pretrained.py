"""ImageNet weights of a trunk from a file."""

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

from common.log import InputError

# Layers that a trunk lacks: the classifiers of torchvision and of the SENet collections.
CLASSIFIERS = ("fc.", "classifier.", "last_linear.")


def load_imagenet(body: nn.Module, path: str, optional: Sequence[str] = ("conv_offset",)) -> None:
    """Fill a trunk with the weights of a classifier; its last layer in the file is ignored.

    Args:
        body: the trunk, changed in place.
        path: a state dict, safetensors or a PyTorch file of tensors; keys may start with
            "module.".
        optional: parts of keys that the file may lack (they keep their start values).

    Raises:
        InputError: the file is missing, cannot be read, or does not fit; names it and the key.
    """
    state = {k: v for k, v in read_state(path).items() if not k.startswith(CLASSIFIERS)}
    own = body.state_dict()
    for key, value in state.items():
        if key not in own:
            raise InputError(path, "holds weights that this backbone lacks", key)
        if value.shape != own[key].shape:
            shapes = f"{tuple(value.shape)}, need {tuple(own[key].shape)}"
            raise InputError(path, f"weights do not fit this backbone, {key}", shapes)
    # Files from before batch norms counted their batches have no such entry.
    missing = [
        key
        for key in own
        if key not in state and not key.endswith("num_batches_tracked")
        and not any(part in key for part in optional)
    ]  # fmt: skip
    if missing:
        raise InputError(path, f"lacks {len(missing)} weights of this backbone", missing[0])
    body.load_state_dict(state, strict=False)


def read_state(path: str) -> dict[str, Tensor]:
    """Tensors of a file by key.

    Raises:
        InputError: the file is missing or holds something else.
    """
    if not Path(path).is_file():
        raise InputError(path, "no such weights file")
    state = _safetensors(path) if path.endswith(".safetensors") else _torch_file(path)
    return {key.removeprefix("module."): value for key, value in state.items()}


def _safetensors(path: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(path, "is not a safetensors file", error) from error


def _torch_file(path: str) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise InputError(path, "is not a PyTorch file of tensors", error) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(path, "holds no dictionary of tensors", type(state).__name__)
    return state
