"""Data and trained runs that several tests read; nobody writes into them."""

from pathlib import Path

import pytest

SIZES = {"train": 24, "val": 8}


@pytest.fixture(scope="session")
def glyphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic set of 24 training and 8 validation images with fixed proposals."""
    from detection_tsd.data.synthetic import write_glyphs

    return write_glyphs(tmp_path_factory.mktemp("glyphs") / "set", 0, **SIZES)


@pytest.fixture(scope="session")
def sized(glyphs: Path) -> list[str]:
    """Overrides that name the data set."""
    sizes = [f"data.train.{name}={count}" for name, count in SIZES.items()]
    return [f"data.root={glyphs}", *sizes]


@pytest.fixture(scope="session")
def tiny(sized: list[str]) -> list[str]:
    """Overrides of a small training on `glyphs`; `run_dir` and `steps` are missing.

    At a constant rate, so that runs of different length begin alike.
    """
    return [
        "experiment=debug/tiny", *sized, "global_batch=4", "log_every=1", "save_every=10", "keep=9",
        "tensorboard=false",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> Path:
    """An undisturbed training of 40 steps, with checkpoints at 10, 20, 30 and 40."""
    from detection_tsd.tests.launch import train

    folder = tmp_path_factory.mktemp("run") / "whole"
    train(*tiny, f"run_dir={folder}", "steps=40")
    return folder
