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

GROUPS = ("backbone", "non_local")
CONFIGS = Path(__file__).resolve().parent / "configs"


def build_row(row: str, num_classes: int, overrides: Mapping[str, Any]) -> nn.Module:
    """See `video_mmit.build`."""
    _accept("row", row, CONFIGS / "model")
    groups = {key: x for key, x in overrides.items() if key in GROUPS and x is not None}
    files = {key: x for key, x in groups.items() if isinstance(x, str)}
    for key, name in files.items():
        _accept(key, name, CONFIGS / "model" / key)
    with _own_hydra():
        node = compose(f"model/{row}", [f"model/{key}={name}" for key, name in files.items()]).model
    changes = {key: value for key, value in overrides.items() if key not in files}
    OmegaConf.set_struct(node, False)
    model: nn.Module = instantiate(OmegaConf.merge(node, changes))(num_classes=num_classes)
    return model


def _accept(key: str, name: str, folder: Path) -> None:
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in names:
        raise InputError(key, f"is not there, only {', '.join(names)}", name)


@contextmanager
def _own_hydra() -> Iterator[None]:
    """Compose although a Hydra application may be running, and leave that one as it was."""
    running = GlobalHydra.instance()
    outer = running.hydra
    running.clear()
    try:
        with initialize_config_dir(str(CONFIGS), version_base=None):
            yield
    finally:
        GlobalHydra.instance().hydra = outer
