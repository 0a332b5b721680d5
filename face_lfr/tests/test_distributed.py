"""Two gloo ranks under torchrun compute what one process computes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from face_lfr.tests.conftest import PROXY
from face_lfr.tests.launch import evaluate, finish, rows, start, train
from face_lfr.weights import load_centres, load_trained

pytestmark = pytest.mark.slow
STEPS = 10


@pytest.fixture(scope="module")
def calm(tiny: list[str]) -> list[str]:
    """At a small rate: training amplifies the rounding in which the two runs differ."""
    return [*tiny, "optim.lr=0.002"]


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
    done = finish(start("face_lfr.train", *words, ranks=2))
    assert done.code == 0, done.err
    return folder


def test_two_ranks_train_like_one(one: Path, two: Path) -> None:
    alone, shared = rows(one)[:STEPS], rows(two)
    assert [row["step"] for row in shared] == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm", "lr"):
        got, expected = ([row[name] for row in part] for part in (shared, alone))
        np.testing.assert_allclose(got, expected, rtol=1e-4, err_msg=name)
    left = load_trained(two)
    right = load_trained(checkpoint=one / "checkpoints" / f"step_{STEPS:08d}")
    mine, other = left.model.state_dict(), right.model.state_dict()
    assert mine.keys() == other.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], other[name], rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(load_centres(left), load_centres(right), rtol=1e-4, atol=1e-5)


def test_a_run_of_two_ranks_goes_on_with_one(
    one: Path, two: Path, calm: list[str], tmp_path: Path
) -> None:
    """The classifier and its momentum come from the shares of both ranks."""
    again = shutil.copytree(two, tmp_path / "again")
    train(*calm, f"run_dir={again}", f"steps={STEPS + 3}")
    expected = [row["loss"] for row in rows(one)]
    assert len(expected) == STEPS + 3
    assert [row["loss"] for row in rows(again)] == pytest.approx(expected, rel=1e-4)


def test_two_ranks_learn_quality_like_one(run: Path, sized: list[str], tmp_path: Path) -> None:
    """Both ranks look at half of the proxy images, and share every batch."""
    words = [
        "experiment=synth/qanpp", f"teacher={run}", *sized, *PROXY, "global_batch=16",
        "log_every=1", "schedule=constant", "batch_norm=sync", "steps=4", "optim.lr=1e-4",
    ]  # fmt: skip
    process = start("face_lfr.train", *words, "device=cpu", f"run_dir={tmp_path / 'two'}", ranks=2)
    train(*words, f"run_dir={tmp_path / 'one'}")
    done = finish(process)
    assert done.code == 0, done.err
    got, expected = ([row["loss"] for row in rows(tmp_path / name)] for name in ("two", "one"))
    np.testing.assert_allclose(got, expected, rtol=1e-3)


def test_two_ranks_evaluate_exactly_like_one(run: Path, synth: Path, tmp_path: Path) -> None:
    """42 images and their pairs; nothing is padded and nothing is counted twice."""
    words = (
        "protocol=all_pairs", f"run_dir={run}", f"images={synth / 'glint_syn'}",
        "fpr=[0.01,0.1]", "batch=5",
    )  # fmt: skip
    process = start(
        "face_lfr.evaluate", *words, f"out={tmp_path / 'two'}", "device=cpu", "workers=0", ranks=2
    )
    alone = json.loads(json.dumps(evaluate(*words, f"out={tmp_path / 'one'}")))
    done = finish(process)
    assert done.code == 0, done.err
    assert done.out.count("Wilson") == 1  # the main rank alone prints
    shared = json.loads((tmp_path / "two" / "metrics.json").read_text())
    alone.pop("seconds"), shared.pop("seconds")
    one, two = (np.load(tmp_path / name / "features.npy") for name in ("one", "two"))
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)  # batches are cut differently
    for left, right in zip(alone.pop("points"), shared.pop("points"), strict=True):
        for name in ("true_accepts", "false_accepts", "negatives", "positives"):
            assert right[name] == left[name]
        assert right["threshold"] == pytest.approx(left["threshold"], rel=1e-4)
    assert shared == alone
