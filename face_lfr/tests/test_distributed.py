"""Two gloo ranks under torchrun compute what one process computes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from face_lfr.score_file import ScoreFile
from face_lfr.tests.launch import evaluate, finish, rows, start, train
from face_lfr.weights import load_trained

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
    left = load_trained(two).model.state_dict()
    folder = one / "checkpoints" / f"step_{STEPS:08d}"
    right = load_trained(checkpoint=folder).model.state_dict()
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_run_of_two_ranks_goes_on_with_one(
    one: Path, two: Path, calm: list[str], tmp_path: Path
) -> None:
    again = shutil.copytree(two, tmp_path / "again")
    train(*calm, f"run_dir={again}", f"steps={STEPS + 3}")
    expected = [row["loss"] for row in rows(one)]
    assert len(expected) == STEPS + 3
    assert [row["loss"] for row in rows(again)] == pytest.approx(expected, rel=1e-4)


def test_check_08_two_ranks_evaluate_exactly_like_one(run: Path, tmp_path: Path) -> None:
    """Eleven videos do not divide by two; nothing is padded and nothing is counted twice."""
    words = (f"run_dir={run}", "eval.temporal_clips=2", "batch=4")
    process = start(
        "face_lfr.evaluate", *words, f"out={tmp_path / 'two'}", "device=cpu", "workers=0", ranks=2
    )
    result = evaluate(*words, f"out={tmp_path / 'one'}")
    done = finish(process)
    assert done.code == 0, done.err
    assert done.out.count("lfr_mAP") == 1  # the main rank alone prints
    shared = json.loads((tmp_path / "two" / "metrics.json").read_text())
    alone = json.loads(json.dumps(result))
    for facts in (shared, alone):
        facts.pop("seconds")
    assert alone["videos"] % 2 == 1
    assert shared == alone
    one = ScoreFile.load(tmp_path / "one" / "scores.npz")
    two = ScoreFile.load(tmp_path / "two" / "scores.npz")
    assert one.ids.tolist() == two.ids.tolist()
    np.testing.assert_array_equal(one.scores, two.scores)
