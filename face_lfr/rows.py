"""Models by the name of their configuration, for use from Python."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from common.log import InputError

CONFIGS = Path(__file__).resolve().parent / "configs"


def build_row(row: str, overrides: Mapping[str, Any]) -> nn.Module:
    """See `face_lfr.build`."""
    names = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))
    if row not in names:
        raise InputError("row", f"is not there, only {', '.join(names)}", row)
    node = OmegaConf.merge(OmegaConf.load(CONFIGS / "model" / f"{row}.yaml"), dict(overrides))
    model: nn.Module = instantiate(node)
    return model
