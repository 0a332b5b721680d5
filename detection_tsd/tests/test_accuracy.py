"""Reproduction of rows: skipping, quoting, judging, exit codes, and one real run."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from common.log import InputError
from detection_tsd.benchmarks import accuracy
from detection_tsd.benchmarks.accuracy import (
    AccuracyConfig,
    Expected,
    Outcome,
    Run,
    passed,
    reproduce,
)
from detection_tsd.tests.launch import CONFIGS, command, config

ROW: dict[str, Any] = {
    "name": "a", "experiment": "synth/sibling", "metric": "bbox/AP", "source": "a table",
}  # fmt: skip
COMPARED = ROW | {"expected": 50.0, "tolerance": 1.0}
QUOTED = {"name": "q", "kind": "quoted", "metric": "bbox/AP", "source": "a", "expected": 40.0}
SHIPPED = accuracy.read(accuracy.EXPECTED)
TRAINED = [entry for entry in SHIPPED if entry.kind == "trained"]


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[list[Outcome], list[Run]]]:
    """Run rows with trainings that are only noted and give the listed values."""

    def call(
        *rows: dict, values: tuple[float, ...] = (0.5,), **changes: object
    ) -> tuple[list[Outcome], list[Run]]:
        calls: list[Run] = []

        def once(entry: Expected, run: Run, nproc: int) -> float:
            calls.append(run)
            return values[(len(calls) - 1) % len(values)]

        monkeypatch.setattr(accuracy, "run_once", once)
        path = tmp_path / "rows.yaml"
        path.write_text(yaml.safe_dump({"rows": list(rows)}))
        cfg = AccuracyConfig(out=str(tmp_path / "out"), expected=str(path), **changes)  # type: ignore[arg-type]
        return reproduce(cfg), calls

    monkeypatch.setenv("VISION_TASKS_DATA", str(tmp_path / "sets"))
    return call


def test_a_row_without_data_is_skipped_with_the_reason(run: Callable, tmp_path: Path) -> None:
    sets = tmp_path / "sets"
    (sets / "empty").mkdir(parents=True)
    (sets / "full" / "images").mkdir(parents=True)
    (sets / "weights.pth").touch()
    full = ["data.root={data}/full"]
    outcomes, calls = run(
        ROW | {"overrides": ["data.root={data}/coco"]},
        ROW | {"name": "b", "overrides": ["data.root={data}/empty"]},
        ROW | {"name": "c", "overrides": [*full, "backbone.weights={data}/r50.pth"]},
        ROW | {"name": "d", "overrides": full, "evaluate": ["hierarchy={data}/h.json"]},
        ROW | {"name": "e", "overrides": full, "needs": ["labels.csv"]},
        ROW | {"name": "f", "overrides": [*full, "backbone.weights={data}/weights.pth"]},
    )
    wanted = ["coco", "empty", "r50.pth", "h.json", "labels.csv"]
    assert [outcome.reason for outcome in outcomes[:5]] == [
        f"no data in {sets / x}" for x in wanted
    ]
    assert [outcome.status for outcome in outcomes] == ["skipped"] * 5 + ["no expected value"]
    assert len(calls) == 1
    assert not passed(outcomes[:5], allow_empty=False)
    assert passed(outcomes[:5], allow_empty=True)
    report = json.loads((tmp_path / "out" / "reproduce.json").read_text())
    assert [row["status"] for row in report["rows"]][:5] == ["skipped"] * 5
    assert f"no data in {sets / 'coco'}" in (tmp_path / "out" / "reproduce.md").read_text()


def test_quoted_rows_are_listed_and_never_run(run: Callable, tmp_path: Path) -> None:
    outcomes, calls = run(QUOTED, QUOTED | {"name": "r", "note": "12 epochs"})
    assert not calls
    assert [(entry.status, entry.measured, entry.reason) for entry in outcomes] == [
        ("quoted", None, ""), ("quoted", None, ""),
    ]  # fmt: skip
    assert not passed(outcomes, allow_empty=False), "a quotation is no run"
    assert (
        "| r | bbox/AP | 40.00 | - | - | - | quoted |"
        in (tmp_path / "out" / "reproduce.md").read_text()
    )


@pytest.mark.parametrize(
    ("expected", "status", "good"),
    [(49.0, "passed", True), (48.9, "off", False), (51.1, "off", False)],
)
def test_the_tolerance_decides(run: Callable, expected: float, status: str, good: bool) -> None:
    outcomes, _ = run(COMPARED | {"expected": expected}, QUOTED)
    assert (outcomes[0].status, outcomes[0].measured) == (status, 50.0)
    assert passed(outcomes, allow_empty=False) is good
    assert passed(outcomes, allow_empty=True) is good


def test_a_row_without_an_expected_value_ran_but_is_not_compared(run: Callable) -> None:
    outcomes, _ = run(ROW)
    assert outcomes[0].status == "no expected value"
    assert passed(outcomes, allow_empty=False)


def test_seeds_are_averaged(run: Callable, tmp_path: Path) -> None:
    (tmp_path / "sets" / "set" / "images").mkdir(parents=True)
    words = ["data.root={data}/set", "x={seed}"]
    row = COMPARED | {"seeds": [3, 4], "expected": 45.0, "overrides": words}
    outcomes, calls = run(row, values=(0.4, 0.5), overrides=["steps=2"])
    assert outcomes[0].values == pytest.approx([40, 50])
    assert outcomes[0].spread == pytest.approx(7.0711, abs=1e-3)
    assert outcomes[0].status == "passed"
    root = f"data.root={tmp_path / 'sets' / 'set'}"
    assert [call.words for call in calls] == [
        [root, "x=3", "steps=2", "seed=3"], [root, "x=4", "steps=2", "seed=4"],
    ]  # fmt: skip
    assert [call.folder.name for call in calls] == ["seed3", "seed4"]
    assert calls[0].folder.parent == calls[1].folder.parent


def test_an_evaluation_knows_the_data_and_the_seed(run: Callable, tmp_path: Path) -> None:
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "h.json").touch()
    words = ["hierarchy={data}/h.json", "annotations=runs/set_{seed}.json", "flip=true"]
    _, calls = run(ROW | {"evaluate": words, "seeds": [7]})
    assert calls[0].evaluate == [
        f"hierarchy={tmp_path / 'sets'}/h.json", "annotations=runs/set_7.json", "flip=true",
    ]  # fmt: skip


def test_rows_share_a_training_only_when_their_overrides_are_equal(run: Callable) -> None:
    rows = (
        ROW | {"metric": "bbox/AP75"},
        ROW | {"name": "b", "evaluate": ["flip=true"]},
        ROW | {"name": "c", "overrides": ["steps=2"]},
        ROW | {"name": "d", "experiment": "synth/tsd"},
    )
    _, calls = run(*rows)
    assert calls[0].folder == calls[1].folder
    assert len({call.folder for call in calls}) == 3


def test_rows_are_chosen_by_name(run: Callable) -> None:
    outcomes, _ = run(ROW, ROW | {"name": "b"}, rows=["b"])
    assert [outcome.name for outcome in outcomes] == ["b"]
    with pytest.raises(InputError, match="rows: accepted: a, b: c"):
        run(ROW, ROW | {"name": "b"}, rows=["c"])
    with pytest.raises(InputError, match="nproc: must be at least 1"):
        run(ROW, nproc=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows: [{name: a, colour: red}]", "is no file of expected rows"),
        ("rows: [{name: a, seeds: 3}]", "is no file of expected rows"),
        ("[]", "is no file of expected rows"),
        (yaml.safe_dump({"rows": [ROW | {"kind": "guess"}]}), "kind must be one of"),
        (yaml.safe_dump({"rows": [QUOTED | {"experiment": "b"}]}), "trained rows alone"),
        (yaml.safe_dump({"rows": [QUOTED | {"kind": "trained"}]}), "trained rows alone"),
        (yaml.safe_dump({"rows": [ROW | {"expected": 4.0}]}), "expected and tolerance"),
        (yaml.safe_dump({"rows": [ROW, ROW]}), "rows of the same name: a"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rows.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        accuracy.read(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        accuracy.read(tmp_path / "nothing.yaml")


def test_a_failed_command_is_quoted() -> None:
    script = "import sys; sys.stderr.write('error: steps: must be at least 1\\n'); sys.exit(2)"
    wanted = "detection_tsd.train ended with 2: error: steps: must be at least 1"
    with pytest.raises(accuracy._RunError, match=wanted):
        accuracy._call([sys.executable, "-c", script, "detection_tsd.train"])


def test_a_failed_training_fails_the_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stop(command: list[str]) -> None:
        raise accuracy._RunError("detection_tsd.train ended with 1: out of memory")

    monkeypatch.setattr(accuracy, "_call", stop)
    outcome = accuracy.run_row(Expected(**ROW), AccuracyConfig(out=str(tmp_path)))
    assert (outcome.status, outcome.values) == ("failed", [])
    assert outcome.reason == "detection_tsd.train ended with 1: out of memory"
    assert not passed([outcome], allow_empty=True)


class Commands:
    """Stands in for the commands of a run; trainings end at `step` of 40."""

    def __init__(self, found: dict[str, Any], step: int = 40) -> None:
        self.found, self.step = found, step
        self.calls: list[tuple[str, dict[str, str], list[str]]] = []

    def __call__(self, command: list[str]) -> None:
        at = next(k for k, word in enumerate(command) if word.startswith("detection_tsd."))
        words = dict(word.split("=", 1) for word in command[at + 1 :])
        self.calls.append((command[at], words, command[:at]))
        if command[at] == "detection_tsd.train":
            save = Path(words["run_dir"]) / "checkpoints" / f"step_{self.step:08d}"
            save.mkdir(parents=True, exist_ok=True)
            (save / "manifest.json").touch()
            (Path(words["run_dir"]) / "config.yaml").write_text("total_steps: 40\n")
        else:
            Path(words["out"]).mkdir(parents=True)
            (Path(words["out"]) / "metrics.json").write_text(json.dumps(self.found))


def test_a_row_is_trained_and_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = Commands({"bbox": {"AP": 0.5}, "segm": {"AP": 0.25}})
    monkeypatch.setattr(accuracy, "_call", commands)
    entry = Expected(**ROW | {"name": "coco/b"}, evaluate=["flip=true"], overrides=["steps=40"])
    run = Run.of(entry, 3, AccuracyConfig(out=str(tmp_path)), tmp_path)
    assert accuracy.run_once(entry, run, 2) == 0.5
    (first, trained, launched), (second, scored, _) = commands.calls
    assert (first, second) == ("detection_tsd.train", "detection_tsd.evaluate")
    assert "--nproc_per_node=2" in launched
    assert trained == {
        "experiment": "synth/sibling", "steps": "40", "seed": "3", "run_dir": str(run.folder),
    }  # fmt: skip
    assert scored == {
        "run_dir": str(run.folder), "flip": "true",
        "out": str(run.folder / "evaluation" / "coco-b"),
    }  # fmt: skip
    entry = Expected(**ROW | {"name": "coco/c", "metric": "segm/AP"})
    assert accuracy.run_once(entry, run, 1) == 0.25


def test_a_run_that_stopped_early_fails_the_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = Commands({"bbox": {"AP": 0.5}}, step=20)
    monkeypatch.setattr(accuracy, "_call", commands)
    outcome = accuracy.run_row(Expected(**ROW), AccuracyConfig(out=str(tmp_path)))
    assert outcome.status == "failed"
    assert outcome.reason.endswith("seed0 stopped at step 20 of 40; start again")
    assert [module for module, *_ in commands.calls] == ["detection_tsd.train"]


@pytest.mark.parametrize("found", [{}, {"bbox": {"AP": None}}, {"bbox": {"AR": 1.0}}, {"bbox": 1}])
def test_a_metric_that_is_not_there_fails_the_row(
    found: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accuracy, "_call", Commands(found))
    outcome = accuracy.run_row(Expected(**ROW), AccuracyConfig(out=str(tmp_path)))
    assert outcome.status == "failed"
    assert outcome.reason.endswith("metrics.json has no metric bbox/AP")


@pytest.mark.parametrize("entry", TRAINED, ids=lambda row: row.name)
def test_every_shipped_row_composes(entry: Expected) -> None:
    run = Run.of(entry, entry.seeds[0], AccuracyConfig(), Path("sets"))
    cfg = config("train", f"experiment={entry.experiment}", *run.words)
    assert (cfg.steps or cfg.epochs) > 0
    assert cfg.data.get("root") != "???"
    assert "{" not in " ".join([*run.words, *run.evaluate])
    options = config("eval", *run.evaluate)
    group, name = entry.metric.split("/")
    assert options.protocol == ("openimages" if group == "scores" else "coco")
    assert (group, name) == ("scores", "mAP") or name.startswith("AP")
    assert (group == "segm") <= (cfg.model.mask is not None)
    assert (options.views is not None) == (entry.name.endswith("_views") or "x101" in entry.name)
    assert (options.compat is not None) == entry.name.endswith("_compat")
    if group == "scores":
        assert options.hierarchy
        assert options.classes
        assert options.image_labels
    if not entry.name.startswith("synth/"):
        assert cfg.backbone.weights.startswith("sets/imagenet/")


def test_names_of_rows_are_those_of_experiments() -> None:
    for entry in TRAINED:
        assert (CONFIGS / "experiment" / f"{entry.experiment}.yaml").is_file()
        assert entry.name.startswith(str(entry.experiment))


def test_numbers_of_others_are_quoted() -> None:
    quoted = [entry for entry in SHIPPED if entry.kind == "quoted"]
    assert all(entry.name.split("/")[0] in ("peer", "test_dev") for entry in quoted)
    assert all(entry.expected is not None for entry in quoted)


def test_recalled_numbers_are_not_compared() -> None:
    recalled = [entry for entry in TRAINED if re.match(r"[\d.]+ recalled", entry.note)]
    assert len(recalled) == 8
    assert all(entry.expected is None for entry in recalled)


def test_rows_of_published_numbers_are_there() -> None:
    rows = {entry.name: entry for entry in SHIPPED}
    wanted = {
        "coco/sibling_r50": 36.2, "coco/tsd_r50": 40.9, "coco/sibling_r101": 38.9,
        "coco/tsd_r101": 42.3, "coco/sibling_r152": 40.5, "coco/tsd_r152": 43.7,
        "coco/tsd_x101_dcn": 49.2, "coco/mask_tsd_r50": 41.2, "coco/mask_tsd_r50_masks": 35.8,
        "coco/cascade_tsd_r50": 42.0, "coco/cascade_tsd_r101": 42.9,
        "coco/cascade_tsd_r101_views": 45.0, "coco/tsd_r50_paper": 41.0,
        "openimages/sibling_r50_compat": 70.7, "openimages/tsd_r50_compat": 72.2,
        "test_dev/tsd_r101_dcn_multiscale": 49.4, "test_dev/tsd_senet154_dcn_multiscale": 51.2,
    }  # fmt: skip
    assert {name: rows[name].expected for name in wanted} == wanted
    tolerances = [entry.tolerance for entry in TRAINED if entry.tolerance is not None]
    assert max(tolerances) <= 1.5
    assert min(tolerances) >= 0.3


@pytest.mark.parametrize(("words", "code"), [([], 1), (["allow_empty=true"], 0)])
def test_a_run_without_rows_says_so(
    words: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VISION_TASKS_DATA", str(tmp_path / "sets"))
    chosen = "rows=[coco/tsd_r50,openimages/tsd_r50,peer/fpn_r101]"
    ended = command("detection_tsd.benchmarks.accuracy", f"out={tmp_path}", chosen, *words)
    assert ended.code == code, ended.err
    assert "0 of 2 rows ran, 1 are quotations" in ended.out
    assert "set VISION_TASKS_DATA to the folder of the data sets" in ended.out


def in_this_process(line: list[str]) -> None:
    """A command of a run, without the seconds that its imports take."""
    ended = command(line[2], *line[3:])
    if ended.code:
        raise accuracy._RunError(ended.err)


@pytest.mark.slow
def test_a_row_runs_through(
    tmp_path: Path, sized: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = ROW | {
        "experiment": "synth/tsd", "expected": 500.0, "tolerance": 1.0,
        "overrides": [*sized, "steps=2", "global_batch=4", "tensorboard=false"],
        "evaluate": ["workers=0", "batch=8"],
    }  # fmt: skip
    path = tmp_path / "rows.yaml"
    path.write_text(yaml.safe_dump({"rows": [row]}))
    monkeypatch.setattr(accuracy, "_call", in_this_process)
    cfg = AccuracyConfig(out=str(tmp_path / "out"), expected=str(path))
    (outcome,) = reproduce(cfg)
    assert outcome.status == "off", outcome.reason
    assert not passed([outcome], allow_empty=True)
    assert 0 <= outcome.values[0] <= 100
    run = Path(outcome.runs[0])
    assert OmegaConf.load(run / "config.yaml").total_steps == 2
    found = json.loads((run / "evaluation" / "a" / "metrics.json").read_text())
    assert found["bbox"]["AP"] == pytest.approx(outcome.values[0] / 100)
    assert "| a | bbox/AP | 500.00 |" in (tmp_path / "out" / "reproduce.md").read_text()
    assert reproduce(cfg)[0].values == outcome.values, "nothing is trained twice"
