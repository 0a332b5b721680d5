"""Models by the name of their configuration, for use from Python."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
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
    with own_hydra():
        node = compose(f"model/{row}").model
    OmegaConf.set_struct(node, False)
    model: nn.Module = instantiate(OmegaConf.merge(node, dict(overrides)))
    return model


@contextmanager
def own_hydra() -> Iterator[None]:
    """Compose this package's files although a Hydra application may run; leaves that as it was."""
    running = GlobalHydra.instance()
    outer = running.hydra
    running.clear()
    try:
        with initialize_config_dir(str(CONFIGS), version_base=None):
            yield
    finally:
        GlobalHydra.instance().hydra = outer
