"""Data and trained runs that several tests read; nobody writes into them."""

from pathlib import Path

import pytest

SIZES = {
    "train_ids": 12, "train_images": 6, "glint_ids": 8, "glint_images": 4, "distractors": 10,
    "video_ids": 4, "videos": 2, "frames": 3, "fold_pairs": 2,
}  # fmt: skip
SMALL = ["model.widths=[4,8,8,8]", "model.features=16", "model.input_size=24", "transform.size=24"]
PROXY = ["model.channels=[4,4,4,4]", "model.input_size=24", "transform.size=24"]


@pytest.fixture(scope="session")
def synth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic data set of 72 training images of 12 persons, with all its test sets."""
    from face_lfr.data.synthetic import generate

    return generate(tmp_path_factory.mktemp("synth") / "set", 0, **SIZES)


@pytest.fixture(scope="session")
def sized(synth: Path) -> list[str]:
    """Overrides that name the data set."""
    return [f"data.root={synth}", *(f"data.{name}={count}" for name, count in SIZES.items())]


@pytest.fixture(scope="session")
def tiny(sized: list[str]) -> list[str]:
    """Overrides of a small training on `synth`; `run_dir` and `steps` are missing.

    At a constant rate, so that runs of different length begin alike.
    """
    return [
        "experiment=debug/tiny", *sized, *SMALL, "global_batch=16", "log_every=1", "save_every=10",
        "keep=9", "schedule=constant", "optim.lr=0.02", "draws.cache=false",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> Path:
    """An undisturbed training of 40 steps, with checkpoints at 10, 20, 30 and 40."""
    from face_lfr.tests.launch import train

    folder = tmp_path_factory.mktemp("run") / "whole"
    train(*tiny, f"run_dir={folder}", "steps=40")
    return folder


@pytest.fixture(scope="session")
def scorer(tmp_path_factory: pytest.TempPathFactory, sized: list[str], run: Path) -> Path:
    """A quality network that learned for 20 steps what `run` recognises."""
    from face_lfr.tests.launch import train

    folder = tmp_path_factory.mktemp("scorer") / "run"
    words = ["experiment=synth/qanpp", f"teacher={run}", *sized, *PROXY, "global_batch=16"]
    train(*words, f"run_dir={folder}", "steps=20", "log_every=1", "schedule=constant")
    return folder
