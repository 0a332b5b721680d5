"""Reproduction of rows: skipping, judging, exit codes, and one real run with a teacher."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from common.log import InputError
from face_lfr.benchmarks import accuracy
from face_lfr.benchmarks.accuracy import AccuracyConfig, Expected, Outcome, Run, passed, reproduce
from face_lfr.tests.conftest import SIZES
from face_lfr.tests.launch import CONFIGS, command, config

ROW = {
    "name": "a", "experiment": "synth/arcface", "metric": "tpr@0.0001", "tolerance": 1.0,
    "source": "a table",
}  # fmt: skip
SHIPPED = accuracy.read(accuracy.EXPECTED)


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
        path.write_text(yaml.safe_dump({"rows": [ROW | row for row in rows]}))
        cfg = AccuracyConfig(out=str(tmp_path / "out"), expected=str(path), **changes)
        return reproduce(cfg), calls

    monkeypatch.setenv("VISION_TASKS_DATA", str(tmp_path / "sets"))
    return call


def test_a_row_without_data_is_skipped_with_the_reason(run: Callable, tmp_path: Path) -> None:
    sets = tmp_path / "sets"
    (sets / "empty").mkdir(parents=True)
    (sets / "full" / "images").mkdir(parents=True)
    (sets / "test").mkdir()
    (sets / "test" / "filelist.txt").touch()
    evaluate = ["protocol=all_pairs", "images={data}/test", "fpr=[1e-4]"]
    outcomes, calls = run(
        {"root": "ms1mv3"},
        {"name": "b", "root": "empty"},
        {"name": "c", "root": "full", "evaluate": ["annotations={data}/ijbc"]},
        {"name": "d", "root": "full", "evaluate": evaluate, "needs": ["test/labels.txt"]},
        {"name": "e", "root": "full", "evaluate": evaluate, "needs": ["test/filelist.txt"]},
    )
    wanted = ["ms1mv3", "empty", "ijbc", "test/labels.txt"]
    assert [outcome.reason for outcome in outcomes[:4]] == [
        f"no data in {sets / x}" for x in wanted
    ]
    assert [outcome.status for outcome in outcomes] == ["skipped"] * 4 + ["no expected value"]
    assert len(calls) == 1
    assert not passed(outcomes[:4], allow_empty=False)
    assert passed(outcomes[:4], allow_empty=True)
    report = json.loads((tmp_path / "out" / "reproduce.json").read_text())
    assert [row["status"] for row in report["rows"]][:4] == ["skipped"] * 4
    assert f"no data in {sets / 'ijbc'}" in (tmp_path / "out" / "reproduce.md").read_text()


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


def test_seeds_are_averaged(run: Callable, tmp_path: Path) -> None:
    (tmp_path / "sets" / "set" / "images").mkdir(parents=True)
    row = {"root": "set", "seeds": [3, 4], "expected": 45.0, "overrides": ["x={seed}"]}
    outcomes, calls = run(row, values=(0.4, 0.5), overrides=["steps=2"])
    assert outcomes[0].values == pytest.approx([40, 50])
    assert outcomes[0].spread == pytest.approx(7.0711, abs=1e-3)
    assert outcomes[0].status == "passed"
    root = f"data.root={tmp_path / 'sets' / 'set'}"
    assert [call.words for call in calls] == [
        ["x=3", "steps=2", root, "seed=3"], ["x=4", "steps=2", root, "seed=4"],
    ]  # fmt: skip
    assert [call.folder.name for call in calls] == ["seed3", "seed4"]
    assert calls[0].folder.parent == calls[1].folder.parent


def test_an_evaluation_knows_the_data_and_the_seed(run: Callable, tmp_path: Path) -> None:
    (tmp_path / "sets" / "test").mkdir(parents=True)
    (tmp_path / "sets" / "test" / "filelist.txt").touch()
    words = ["images={data}/test", "annotations=runs/set_{seed}/syn.bin", "fpr=[1e-4]"]
    _, calls = run({"evaluate": words, "seeds": [7]})
    sets = tmp_path / "sets"
    assert calls[0].evaluate == [
        f"images={sets}/test", "annotations=runs/set_7/syn.bin", "fpr=[1e-4]",
    ]  # fmt: skip


def test_rows_share_a_training_only_when_their_overrides_are_equal(run: Callable) -> None:
    rows = ({"metric": "accuracy"}, {"name": "b"}, {"name": "c", "overrides": ["steps=2"]})
    _, calls = run(*rows)
    assert calls[0].folder == calls[1].folder != calls[2].folder


def test_a_teacher_shares_the_training_of_a_row(run: Callable) -> None:
    quality = {"experiment": "synth/qanpp", "teacher": "synth/arcface", "overrides": ["x={seed}"]}
    _, calls = run(
        {"overrides": ["x={seed}"]},
        quality | {"name": "b"},
        quality | {"name": "c", "overrides": []},
        quality | {"name": "d", "teacher": "synth/softmax"},
    )
    assert calls[0].teacher is None
    assert calls[1].teacher == calls[0].folder
    assert calls[2].teacher != calls[0].folder
    assert len({call.folder for call in calls}) == 4, "another teacher is another training"


def test_rows_are_chosen_by_name(run: Callable) -> None:
    outcomes, _ = run({}, {"name": "b"}, rows=["b"])
    assert [outcome.name for outcome in outcomes] == ["b"]
    with pytest.raises(InputError, match="rows: accepted: a, b: c"):
        run({}, {"name": "b"}, rows=["c"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows: [{name: a, colour: red}]", "is no file of expected rows"),
        ("rows: [{name: a, splits: 3}]", "is no file of expected rows"),
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


def test_a_failed_command_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import sys; sys.stderr.write('error: steps: must be at least 1\\n'); sys.exit(2)"
    wanted = "face_lfr.train ended with 2: error: steps: must be at least 1"
    with pytest.raises(accuracy._RunError, match=wanted):
        accuracy._call([sys.executable, "-c", script, "face_lfr.train"])


def test_a_failed_training_fails_the_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stop(command: list[str]) -> None:
        raise accuracy._RunError("face_lfr.train ended with 1: out of memory")

    monkeypatch.setattr(accuracy, "_call", stop)
    outcome = accuracy.run_row(Expected(**ROW), AccuracyConfig(out=str(tmp_path)))
    assert (outcome.status, outcome.values) == ("failed", [])
    assert outcome.reason == "face_lfr.train ended with 1: out of memory"
    assert not passed([outcome], allow_empty=True)


class Commands:
    """Stands in for the commands of a run; trainings end at `step` of 40."""

    def __init__(self, found: dict[str, float], step: int = 40) -> None:
        self.found, self.step = found, step
        self.calls: list[tuple[str, dict[str, str], list[str]]] = []

    def __call__(self, command: list[str]) -> None:
        at = next(k for k, word in enumerate(command) if word.startswith("face_lfr."))
        words = dict(word.split("=", 1) for word in command[at + 1 :])
        self.calls.append((command[at], words, command[:at]))
        if command[at] == "face_lfr.train":
            save = Path(words["run_dir"]) / "checkpoints" / f"step_{self.step:08d}"
            save.mkdir(parents=True, exist_ok=True)
            (save / "manifest.json").touch()
            (Path(words["run_dir"]) / "config.yaml").write_text("total_steps: 40\n")
        else:
            Path(words["out"]).mkdir(parents=True)
            (Path(words["out"]) / "metrics.json").write_text(json.dumps(self.found))


def test_a_quality_network_is_trained_and_evaluated_with_its_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = Commands({"tpr@0.0001": 0.5})
    monkeypatch.setattr(accuracy, "_call", commands)
    row = ROW | {"name": "synth/b", "experiment": "synth/qanpp", "teacher": "synth/arcface"}
    entry = Expected(**row, evaluate=["protocol=video"], overrides=["steps=40"])
    run = Run.of(entry, 3, AccuracyConfig(out=str(tmp_path)), tmp_path)
    assert accuracy.run_once(entry, run, 2) == 0.5
    (first, teacher, launched), (second, student, _), (third, scored, _) = commands.calls
    assert (first, second, third) == ("face_lfr.train", "face_lfr.train", "face_lfr.evaluate")
    assert "--nproc_per_node=2" in launched
    shared = {"steps": "40", "seed": "3"}
    assert teacher == shared | {"experiment": "synth/arcface", "run_dir": str(run.teacher)}
    assert student == shared | {
        "experiment": "synth/qanpp", "run_dir": str(run.folder), "teacher": str(run.teacher),
    }  # fmt: skip
    assert scored == {
        "run_dir": str(run.teacher), "quality": str(run.folder), "protocol": "video",
        "out": str(run.folder / "evaluation" / "synth-b"),
    }  # fmt: skip


@pytest.mark.parametrize("teacher", [None, "synth/softmax"])
def test_a_run_that_stopped_early_fails_the_row(
    teacher: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = Commands({"tpr@0.0001": 0.5}, step=20)
    monkeypatch.setattr(accuracy, "_call", commands)
    outcome = accuracy.run_row(Expected(**ROW, teacher=teacher), AccuracyConfig(out=str(tmp_path)))
    assert outcome.status == "failed"
    assert outcome.reason.endswith("seed0 stopped at step 20 of 40; start again")
    assert [module for module, *_ in commands.calls] == ["face_lfr.train"]


def test_a_metric_that_is_not_there_fails_the_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accuracy, "_call", Commands({"tpr@0.001": 0.5}))
    outcome = accuracy.run_row(Expected(**ROW), AccuracyConfig(out=str(tmp_path)))
    assert outcome.status == "failed"
    assert outcome.reason.endswith("metrics.json has no metric tpr@0.0001")


@pytest.mark.parametrize("entry", SHIPPED, ids=lambda row: row.name)
def test_every_shipped_row_composes(entry: Expected) -> None:
    run = Run.of(entry, entry.seeds[0], AccuracyConfig(), Path("sets"))
    teacher = [f"teacher={run.teacher}"] if run.teacher else []
    cfg = config("train", f"experiment={entry.experiment}", *run.words, *teacher)
    assert (cfg.steps or cfg.epochs) > 0
    assert cfg.data.root != "???"
    assert (cfg.teacher is not None) == (entry.teacher is not None)
    if entry.teacher:
        taught = config("train", f"experiment={entry.teacher}", *run.words)
        assert taught.teacher is None
        assert taught.data == cfg.data
    options = config("eval", *run.evaluate)
    assert "{" not in " ".join([*run.words, *run.evaluate])
    assert (options.protocol == "video") == (entry.teacher is not None or "mean" in entry.name)
    assert options.protocol == {"iqiyi": "video", "deepglint": "all_pairs"}.get(
        entry.name.split("/")[0], options.protocol
    )
    if options.protocol == "template":
        assert entry.metric == "tpr_nearest@0.0001"
    else:
        assert entry.metric == f"tpr@{options.fpr[0]:g}"
        assert options.images
    if entry.teacher:
        assert options.method.startswith("qanpp")


def test_rows_of_closed_sets_need_labels() -> None:
    for entry in SHIPPED:
        track = entry.name.split("/")[0]
        closed = track in ("deepglint", "iqiyi")
        assert entry.needs == ([f"{track}/labels.txt"] if closed else [])
        assert (entry.root is None) == (track == "synth")


def test_rows_that_share_a_training_could_not_be_told_apart() -> None:
    rows = {entry.name: entry for entry in SHIPPED}
    image, video = rows["deepglint/r100_arcface"], rows["iqiyi/r100_mean"]
    cfg, base = AccuracyConfig(), Path("sets")
    assert Run.of(image, 0, cfg, base).folder == Run.of(video, 0, cfg, base).folder
    nodes = [
        OmegaConf.to_container(config("train", f"experiment={track}/r100_arcface", "data.root=a"))
        for track in ("deepglint", "iqiyi")
    ]
    assert nodes[0] | {"run_dir": ""} == nodes[1] | {"run_dir": ""}
    taught = Run.of(rows["synth/qanpp"], 1, cfg, base).teacher
    assert taught == Run.of(rows["synth/arcface"], 1, cfg, base).folder


def test_names_of_rows_are_those_of_experiments() -> None:
    for entry in SHIPPED:
        assert (CONFIGS / "experiment" / f"{entry.experiment}.yaml").is_file()
        assert entry.name.split("/")[0] in ("deepglint", "iqiyi", "synth") or (
            entry.experiment.startswith(entry.name)
        )


@pytest.mark.parametrize(("words", "code"), [([], 1), (["allow_empty=true"], 0)])
def test_a_run_without_rows_says_so(
    words: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VISION_TASKS_DATA", str(tmp_path / "sets"))
    chosen = "rows=[ms1mv3/ir100_arcface,iqiyi/polyface_qanpp]"
    ended = command("face_lfr.benchmarks.accuracy", f"out={tmp_path}", chosen, *words)
    assert ended.code == code, ended.err
    assert "0 of 2 rows ran" in ended.out
    assert "set VISION_TASKS_DATA to the folder of the data sets" in ended.out


def in_this_process(line: list[str]) -> None:
    """A command of a run, without the seconds that its imports take."""
    ended = command(line[2], *line[3:])
    if ended.code:
        raise accuracy._RunError(ended.err)


@pytest.mark.slow
def test_a_row_is_trained_and_evaluated_with_its_teacher(
    tmp_path: Path, synth: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = [f"data.root={synth}", *(f"data.{name}={count}" for name, count in SIZES.items())]
    row = ROW | {
        "experiment": "synth/qanpp", "teacher": "synth/arcface", "expected": 500.0,
        "overrides": [*small, "steps=2", "global_batch=16"], "metric": "tpr@0.1",
        "evaluate": [
            "protocol=video", f"images={synth}/iqiyi_syn", "method=qanpp", "fpr=[0.1]", "workers=0",
        ],
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
    assert (found["method"], found["trained_on"]) == ("qanpp", "synthetic")
    assert "| a | tpr@0.1 | 500.00 |" in (tmp_path / "out" / "reproduce.md").read_text()
    assert reproduce(cfg)[0].values == outcome.values, "nothing is trained twice"
