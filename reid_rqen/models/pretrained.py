"""Starting weights of trunks (safetensors)."""

from pathlib import Path

from torch import Tensor, nn

from common.log import InputError


def read_state(path: str) -> dict[str, Tensor]:
    """State dict of a safetensors file.

    Raises:
        InputError: the file is missing or no safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise InputError(path, "no such file")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(path, "no safetensors file", error) from error


def load_trunk(trunk: nn.Module, path: str) -> None:
    """Load a trunk; the keys under `trunk.` of a whole model's file work too.

    Raises:
        InputError: keys or shapes do not fit (they are listed).
    """
    state = read_state(path)
    inner = {k.removeprefix("trunk."): v for k, v in state.items() if k.startswith("trunk.")}
    try:
        trunk.load_state_dict(inner or state)
    except RuntimeError as error:
        raise InputError(path, "does not fit this trunk", error) from error
