"""Reproduction of rows: skipping, judging, exit codes, and one real run on a replica."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

from common.log import InputError
from reid_rqen import evaluate, train
from reid_rqen.benchmarks import accuracy
from reid_rqen.benchmarks.accuracy import AccuracyConfig, Expected, Outcome, passed, reproduce
from reid_rqen.data.replicas import write_prid2011

ROW = {"name": "a", "experiment": "prid2011/rqen", "tolerance": 1.0, "source": "a table"}


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
    outcomes, calls = run({"root": "prid2011"}, {"name": "b", "root": "empty"})
    assert [outcome.status for outcome in outcomes] == ["skipped", "skipped"]
    assert outcomes[0].reason == f"no data in {tmp_path / 'sets' / 'prid2011'}"
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
    (tmp_path / "sets" / "set" / "images").mkdir(parents=True)
    row = {"root": "set", "splits": 2, "seeds": [3, 4], "expected": 45.0, "overrides": ["x={seed}"]}
    outcomes, calls = run(row, values=(0.4, 0.5))
    assert outcomes[0].values == pytest.approx([40, 50, 40, 50])
    assert outcomes[0].spread == pytest.approx(5.7735, abs=1e-3)
    assert outcomes[0].status == "passed"
    root = f"data.root={tmp_path / 'sets' / 'set'}"
    assert calls[3][:4] == ["x=4", root, "seed=4", "data.split=1"]
    assert len({words[-1] for words in calls}) == 4


def test_rows_share_a_training_only_when_their_overrides_are_equal(run: Callable) -> None:
    rows = ({"metric": "mAP"}, {"name": "b"}, {"name": "c", "overrides": ["steps=2"]})
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
    assert outcome.reason == "reid_rqen.train ended with 1: out of memory"
    assert not passed([outcome], allow_empty=True)


def test_every_shipped_row_composes() -> None:
    assert evaluate.EvalConfig  # its import stores the schema, as that of `train` does
    rows = accuracy.read(accuracy.EXPECTED)
    assert {"prid2011/rqen", "ilidsvid/rqen", "mars/rqen", "synth/rqen"} <= {r.name for r in rows}
    with initialize_config_dir(str(Path(train.__file__).with_name("configs")), version_base=None):
        for entry in rows:
            words = accuracy.repeats(entry)[0].words(entry.overrides)
            root = [f"data.root={entry.root}"] if entry.root else []
            cfg = compose("train", [f"experiment={entry.experiment}", *words, *root])
            assert cfg.steps > 0
            options = compose("eval", list(entry.evaluate))
            assert options.rerank is (entry.root == "mars")
            assert entry.metric in ("cmc@1", "mAP")


@pytest.mark.slow
def test_a_replica_is_trained_and_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_prid2011(tmp_path / "prid2011", persons=6)
    monkeypatch.setenv("VISION_TASKS_DATA", str(tmp_path))
    small = [
        "model/trunk=tiny", "transform=tiny", "model.auxiliary=false", "steps=2", "workers=0",
        "global_batch=2", "tensorboard=false",
    ]  # fmt: skip
    row = ROW | {
        "experiment": "prid2011/gnbn_avg", "root": "prid2011", "overrides": small,
        "evaluate": ["workers=0"], "expected": 500.0,
    }  # fmt: skip
    path = tmp_path / "rows.yaml"
    path.write_text(yaml.safe_dump({"rows": [row]}))
    command = [sys.executable, "-m", "reid_rqen.benchmarks.accuracy"]
    command += [f"out={tmp_path / 'out'}", f"expected={path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 1, done.stderr
    assert "1 of 1 rows ran" in done.stdout
    report = json.loads((tmp_path / "out" / "reproduce.json").read_text())
    outcome = report["rows"][0]
    assert outcome["status"] == "off"
    assert 0 <= outcome["measured"] <= 100
    assert (Path(outcome["runs"][0]) / "evaluation" / "metrics.json").is_file()
    assert "| a | cmc@1 | 500.00 |" in (tmp_path / "out" / "reproduce.md").read_text()
