"""Data and one trained run that several tests read; nobody writes into them."""

from pathlib import Path

import pytest

from reid_rqen.data import replicas
from reid_rqen.data.synthetic import generate
from reid_rqen.tests.launch import train

IDENTITIES = 6


@pytest.fixture(scope="session")
def synth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic set with 6 persons a half: 6 queries, 12 gallery tracklets of 12 frames."""
    return generate(tmp_path_factory.mktemp("synth") / "set", identities=IDENTITIES)


@pytest.fixture(scope="session")
def tiny(synth: Path) -> list[str]:
    """Overrides of a small training on `synth`; `run_dir` and `steps` are missing.

    With Adam, because 40 steps of the experiment's plain SGD move no score.
    """
    return [
        "experiment=debug/tiny", f"data.root={synth}", f"data.identities={IDENTITIES}",
        "log_every=1", "save_every=10", "keep=9", "optim=adam", "optim.lr=0.002",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> Path:
    """An undisturbed training of 40 steps, with checkpoints at 10, 20, 30 and 40."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    train(*tiny, f"run_dir={folder}", "steps=40")
    return folder


@pytest.fixture(scope="session")
def replica(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Roots of one small data set in each real layout, by the name of its config."""
    top = tmp_path_factory.mktemp("replicas")
    views = {1: {1: 3, 2: 3, 3: 2}, 2: {1: 2, 2: 2}, 3: {1: 2, 2: 3}}
    return {
        "lpw": replicas.write_lpw(top / "lpw", views, frames=2),
        "prid2011": replicas.write_prid2011(top / "prid2011", persons=4),
        "ilidsvid": replicas.write_ilidsvid(top / "ilidsvid", persons=6),
        "mars": replicas.write_mars(top / "mars", persons=3),
        "duke_video": replicas.write_duke_video(top / "duke_video"),
    }
