"""Data and one trained run that several tests read; nobody writes into them."""

from pathlib import Path

import pytest

VIDEOS = {"train": 24, "val": 11}


@pytest.fixture(scope="session")
def synth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic data set of 24 training and 11 test videos in which labels need time."""
    from video_mmit.data.synthetic import generate

    return generate(tmp_path_factory.mktemp("synth") / "set", 0, part="order", **VIDEOS)


@pytest.fixture(scope="session")
def tiny(synth: Path) -> list[str]:
    """Overrides of a small training on `synth`; `run_dir` and `steps` are missing.

    At a constant rate, so that runs of different length begin alike.
    """
    sizes = [f"data.{name}={count}" for name, count in VIDEOS.items()]
    return [
        "experiment=debug/tiny", f"data.root={synth}", *sizes,
        "log_every=1", "save_every=10", "keep=9", "schedule=constant", "optim.lr=0.02",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> Path:
    """An undisturbed training of 40 steps, with checkpoints at 10, 20, 30 and 40."""
    from video_mmit.tests.launch import train

    folder = tmp_path_factory.mktemp("run") / "whole"
    train(*tiny, f"run_dir={folder}", "steps=40")
    return folder
