"""Two gloo ranks under torchrun compute what one process computes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from detection_tsd.tests.launch import evaluate, finish, rows, start, train
from detection_tsd.weights import load_trained

pytestmark = pytest.mark.slow
STEPS = 10


@pytest.fixture(scope="module")
def calm(tiny: list[str]) -> list[str]:
    """At a small rate: training amplifies the rounding in which the two runs differ."""
    return [*tiny, "optim.lr=1e-4"]


@pytest.fixture(scope="module")
def one(calm: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one") / "run"
    train(*calm, f"run_dir={folder}", f"steps={STEPS + 3}")
    return folder


@pytest.fixture(scope="module")
def two(calm: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on two ranks with the same global batch, ten steps of it."""
    folder = tmp_path_factory.mktemp("two") / "run"
    words = (*calm, "device=cpu", f"run_dir={folder}", f"steps={STEPS}")
    done = finish(start("detection_tsd.train", *words, ranks=2))
    assert done.code == 0, done.err
    return folder


def test_two_ranks_train_like_one(one: Path, two: Path) -> None:
    """Every part of the loss, also those divided by the positives of all ranks."""
    alone, shared = rows(one)[:STEPS], rows(two)
    assert [row["step"] for row in shared] == list(range(1, STEPS + 1))
    for name in sorted(alone[0].keys() - {"step", "time"}):
        got, expected = ([row[name] for row in part] for part in (shared, alone))
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6, err_msg=name)
    mine = load_trained(two).model.state_dict()
    folder = one / "checkpoints" / f"step_{STEPS:08d}"
    other = load_trained(checkpoint=folder).model.state_dict()
    assert mine.keys() == other.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], other[name], rtol=1e-4, atol=1e-5, msg=name)


def test_two_ranks_train_an_rpn_like_one(calm: list[str], tmp_path: Path) -> None:
    words = [*calm, "rpn=tiny", "model=glyphs_rpn", "steps=4", "optim.lr=1e-4"]
    process = start(
        "detection_tsd.train", *words, "device=cpu", f"run_dir={tmp_path / 'two'}", ranks=2
    )
    train(*words, f"run_dir={tmp_path / 'one'}")
    done = finish(process)
    assert done.code == 0, done.err
    for name in ("loss_rpn_cls", "loss_rpn_box", "loss"):
        got, expected = ([row[name] for row in rows(tmp_path / r)] for r in ("two", "one"))
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5, err_msg=name)


def test_a_run_of_two_ranks_goes_on_with_one(
    one: Path, two: Path, calm: list[str], tmp_path: Path
) -> None:
    again = shutil.copytree(two, tmp_path / "again")
    train(*calm, f"run_dir={again}", f"steps={STEPS + 3}")
    expected = [row["loss"] for row in rows(one)]
    assert len(expected) == STEPS + 3
    assert [row["loss"] for row in rows(again)] == pytest.approx(expected, rel=1e-4)


def test_two_ranks_evaluate_exactly_like_one(run: Path, tmp_path: Path) -> None:
    """Eight images; nothing is padded and nothing is counted twice."""
    words = (f"run_dir={run}", "batch=1")
    process = start(
        "detection_tsd.evaluate",
        *words,
        f"out={tmp_path / 'two'}",
        "device=cpu",
        "workers=0",
        ranks=2,
    )
    alone = json.loads(json.dumps(evaluate(*words, f"out={tmp_path / 'one'}")))
    done = finish(process)
    assert done.code == 0, done.err
    assert done.out.count("AP50") == 1  # the main rank alone prints
    shared = json.loads((tmp_path / "two" / "metrics.json").read_text())
    alone.pop("seconds"), shared.pop("seconds")
    assert shared == alone
    one, two = (
        json.loads((tmp_path / r / "detections_bbox.json").read_text()) for r in ("one", "two")
    )
    assert one == two
