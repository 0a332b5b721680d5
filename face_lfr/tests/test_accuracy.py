"""Reproduction of rows: skipping, judging, exit codes, and one real run on a replica."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from common.log import InputError
from face_lfr.benchmarks import accuracy
from face_lfr.benchmarks.accuracy import AccuracyConfig, Expected, Outcome, passed, reproduce
from face_lfr.data.replicas import write_ucf101
from face_lfr.tests.launch import config

ROW = {"name": "a", "experiment": "lfr/tin_r50_8f", "tolerance": 1.0, "source": "a table"}


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[list[Outcome], list[list[str]]]]:
    """Run rows with trainings that only note their overrides and give the listed values."""

    def call(
        *rows: dict, values: tuple[float, ...] = (0.5,), **changes: object
    ) -> tuple[list[Outcome], list[list[str]]]:
        calls: list[list[str]] = []

        def once(entry: Expected, words: list[str], folder: Path, nproc: int) -> float:
            calls.append([*words, str(folder)])
            return values[(len(calls) - 1) % len(values)]

        monkeypatch.setattr(accuracy, "run_once", once)
        path = tmp_path / "rows.yaml"
        path.write_text(yaml.safe_dump({"rows": [ROW | row for row in rows]}))
        cfg = AccuracyConfig(out=str(tmp_path / "out"), expected=str(path), **changes)
        return reproduce(cfg), calls

    monkeypatch.setenv("VISION_TASKS_DATA", str(tmp_path / "sets"))
    return call


def test_a_row_without_data_is_skipped_with_the_reason(run: Callable, tmp_path: Path) -> None:
    (tmp_path / "sets" / "empty").mkdir(parents=True)
    outcomes, calls = run({"root": "lfr"}, {"name": "b", "root": "empty"})
    assert [outcome.status for outcome in outcomes] == ["skipped", "skipped"]
    assert outcomes[0].reason == f"no data in {tmp_path / 'sets' / 'lfr'}"
    assert not calls
    assert not passed(outcomes, allow_empty=False)
    assert passed(outcomes, allow_empty=True)
    report = json.loads((tmp_path / "out" / "reproduce.json").read_text())
    assert [row["status"] for row in report["rows"]] == ["skipped", "skipped"]


@pytest.mark.parametrize(
    ("expected", "status", "good"),
    [(49.0, "passed", True), (48.9, "off", False), (51.1, "off", False)],
)
def test_the_tolerance_decides(run: Callable, expected: float, status: str, good: bool) -> None:
    outcomes, _ = run({"expected": expected})
    assert (outcomes[0].status, outcomes[0].measured) == (status, 50.0)
    assert passed(outcomes, allow_empty=False) is good
    assert passed(outcomes, allow_empty=True) is good


def test_a_row_without_an_expected_value_ran_but_is_not_compared(run: Callable) -> None:
    outcomes, _ = run({"expected": None})
    assert outcomes[0].status == "no expected value"
    assert passed(outcomes, allow_empty=False)


def test_splits_and_seeds_are_averaged(run: Callable, tmp_path: Path) -> None:
    (tmp_path / "sets" / "set" / "videos").mkdir(parents=True)
    row = {"root": "set", "splits": 2, "seeds": [3, 4], "expected": 45.0, "overrides": ["x={seed}"]}
    outcomes, calls = run(row, values=(0.4, 0.5))
    assert outcomes[0].values == pytest.approx([40, 50, 40, 50])
    assert outcomes[0].spread == pytest.approx(5.7735, abs=1e-3)
    assert outcomes[0].status == "passed"
    root = f"data.root={tmp_path / 'sets' / 'set'}"
    assert calls[0][:4] == ["x=3", root, "seed=3", "data.split=1"]
    assert calls[3][:4] == ["x=4", root, "seed=4", "data.split=2"]
    assert len({words[-1] for words in calls}) == 4


def test_rows_share_a_training_only_when_their_overrides_are_equal(run: Callable) -> None:
    rows = ({"metric": "macro_mAP"}, {"name": "b"}, {"name": "c", "overrides": ["steps=2"]})
    _, calls = run(*rows)
    folders = [words[-1] for words in calls]
    assert folders[0] == folders[1] != folders[2]


def test_starting_weights_are_used_when_present(run: Callable, tmp_path: Path) -> None:
    outcomes, calls = run({"init": "w.safetensors"})
    assert outcomes[0].reason.startswith("from scratch: no")
    assert not any(word.startswith("init=") for word in calls[0])
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "w.safetensors").touch()
    outcomes, calls = run({"init": "w.safetensors"})
    assert outcomes[0].init == str(tmp_path / "sets" / "w.safetensors")
    assert f"init={outcomes[0].init}" in calls[0]


def test_rows_are_chosen_by_name(run: Callable) -> None:
    outcomes, _ = run({}, {"name": "b"}, rows=["b"])
    assert [outcome.name for outcome in outcomes] == ["b"]
    with pytest.raises(InputError, match="rows: accepted: a, b: c"):
        run({}, {"name": "b"}, rows=["c"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows: [{name: a, colour: red}]", "is no file of expected rows"),
        ("rows: [{name: a}]", "is no file of expected rows"),
        ("[]", "is no file of expected rows"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rows.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        accuracy.read(path)
    with pytest.raises(InputError, match="no such file"):
        accuracy.read(tmp_path / "nothing.yaml")


def test_two_rows_of_one_name_are_refused(run: Callable) -> None:
    with pytest.raises(InputError, match="rows of the same name: a"):
        run({}, {})


def test_a_failed_command_is_quoted() -> None:
    script = "import sys; sys.stderr.write('error: steps: must be at least 1\\n'); sys.exit(2)"
    with pytest.raises(accuracy._RunError, match="ended with 2: error: steps: must be at least 1"):
        accuracy._call([sys.executable, "-c", script])


def test_a_failed_training_fails_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(command: list[str]) -> None:
        raise accuracy._RunError(f"{command[2]} ended with 1: out of memory")

    monkeypatch.setattr(accuracy, "_call", stop)
    outcome = accuracy.run_row(Expected(**ROW), AccuracyConfig())
    assert (outcome.status, outcome.values) == ("failed", [])
    assert outcome.reason == "face_lfr.train ended with 1: out of memory"
    assert not passed([outcome], allow_empty=True)


def test_a_row_of_several_splits_counts_them_from_1() -> None:
    found = accuracy.repeats(Expected(**ROW, splits=3, seeds=[0, 5]))
    assert [(repeat.seed, repeat.split) for repeat in found] == [
        (0, 1), (0, 2), (0, 3), (5, 1), (5, 2), (5, 3),
    ]  # fmt: skip


@pytest.mark.parametrize("entry", accuracy.read(accuracy.EXPECTED), ids=lambda row: row.name)
def test_every_shipped_row_composes(entry: Expected) -> None:
    words = accuracy.repeats(entry)[0].words(entry.overrides)
    root = [f"data.root={entry.root}"] if entry.root else []
    cfg = config("train", f"experiment={entry.experiment}", *words, *root)
    assert (cfg.steps or cfg.epochs) > 0
    assert (entry.splits is not None) == ("split" in cfg.data)
    options = config("eval", *entry.evaluate)
    if entry.name.endswith("_30views"):
        assert options.eval.spatial_crops * options.eval.temporal_clips == 30
    assert entry.name.removesuffix("_30views") == entry.experiment
    several = cfg.loss.function._target_.endswith(".bce")
    assert entry.metric == ("lfr_mAP" if several else "top1")


def test_one_and_thirty_views_share_a_training() -> None:
    rows = {entry.name: entry for entry in accuracy.read(accuracy.EXPECTED)}
    pairs = [
        (rows[name.removesuffix("_30views")], rows[name])
        for name in rows
        if "views" in name and name.removesuffix("_30views") in rows
    ]
    assert len(pairs) >= 5
    for one, thirty in pairs:
        shared = ("experiment", "overrides", "seeds", "splits", "root", "init")
        assert all(getattr(one, field) == getattr(thirty, field) for field in shared)


@pytest.mark.slow
def test_a_replica_is_trained_and_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_ucf101(tmp_path / "ucf101")
    monkeypatch.setenv("VISION_TASKS_DATA", str(tmp_path))
    small = [
        "model/backbone=resnet18", "model.backbone.weights=null",
        "model.backbone.layers=[1,1,1,1]", "transform=synth_32", "steps=2", "epochs=null",
        "workers=0", "global_batch=2", "tensorboard=false",
    ]  # fmt: skip
    row = ROW | {
        "experiment": "ucf101/tin_r50_8f", "root": "ucf101", "splits": 1, "overrides": small,
        "metric": "top1", "evaluate": ["workers=0"], "expected": 500.0,
    }  # fmt: skip
    path = tmp_path / "rows.yaml"
    path.write_text(yaml.safe_dump({"rows": [row]}))
    command = [sys.executable, "-m", "face_lfr.benchmarks.accuracy"]
    command += [f"out={tmp_path / 'out'}", f"expected={path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 1, done.stderr
    assert "1 of 1 rows ran" in done.stdout
    report = json.loads((tmp_path / "out" / "reproduce.json").read_text())
    outcome = report["rows"][0]
    assert outcome["status"] == "off", outcome["reason"]
    assert 0 <= outcome["measured"] <= 100
    run = Path(outcome["runs"][0])
    assert run.name == "seed0-split1"
    assert OmegaConf.load(run / "config.yaml").total_steps == 2
    assert (run / "evaluation" / "metrics.json").is_file()
    assert "| a | top1 | 500.00 |" in (tmp_path / "out" / "reproduce.md").read_text()


def test_a_run_that_stopped_early_fails_the_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(command: list[str]) -> None:
        (tmp_path / "evaluation").mkdir(exist_ok=True)
        (tmp_path / "config.yaml").write_text("total_steps: 40\n")
        (tmp_path / "evaluation" / "metrics.json").write_text(json.dumps(found))

    monkeypatch.setattr(accuracy, "_call", train)
    found = {"step": 20, "lfr_mAP": 0.5}
    with pytest.raises(accuracy._RunError, match="stopped at step 20 of 40"):
        accuracy.run_once(Expected(**ROW), [], tmp_path, 1)
    found = {"step": 40, "top1": 0.5}
    with pytest.raises(accuracy._RunError, match="has no metric lfr_mAP"):
        accuracy.run_once(Expected(**ROW), [], tmp_path, 1)
    found = {"step": 40, "lfr_mAP": 0.5}
    assert accuracy.run_once(Expected(**ROW), [], tmp_path, 1) == 0.5
