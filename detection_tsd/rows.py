"""Detectors by the name of their experiment, for use from Python."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.utils import instantiate
from torch import nn

from common.log import InputError

CONFIGS = Path(__file__).resolve().parent / "configs"


def build_row(row: str, *overrides: str) -> nn.Module:
    """See `detection_tsd.build`."""
    import detection_tsd.train  # noqa: F401 - it registers the schema that is composed

    rows = sorted(
        str(path.relative_to(CONFIGS / "experiment").with_suffix(""))
        for path in (CONFIGS / "experiment").rglob("*.yaml")
    )
    if row not in rows:
        raise InputError("row", f"is not there, only {', '.join(rows)}", row)
    with own_hydra():
        try:
            node = compose("train", [f"experiment={row}", *overrides]).model
        except HydraException as error:
            raise InputError("overrides", "cannot be composed", error) from error
    model: nn.Module = instantiate(node)
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
