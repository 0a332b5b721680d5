"""Published and measured rows, trained and evaluated again: `make reproduce-tsd`.

    python -m detection_tsd.benchmarks.accuracy [rows=[coco/tsd_r50]] [nproc=8] [out=DIR]

Every row of `expected.yaml` whose data is present is trained (a stopped run continues), evaluated
for each of its seeds, averaged and compared with its expected value. Data is looked for in the
folder that VISION_TASKS_DATA names, else in `data`. Writes `reproduce.json` and `reproduce.md`
after every row. Exits with 1 when a row is off or failed, and when no row ran.

Rows of the kind `quoted` are numbers of others, or on labels that only a server has: they stand in
the report for reading and are never run.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table

from common import rundir
from common.checkpoint import newest
from common.log import InputError, exit_on_bad_input, get_logger, setup_logging

EXPECTED = Path(__file__).with_name("expected.yaml")
KINDS = ("trained", "quoted")
BAD = ("off", "failed")
RAN = ("passed", "no expected value", *BAD)
COLUMNS = ("row", "metric", "expected", "tolerance", "measured", "spread", "status", "reason")


@dataclass
class Expected:
    """One row of expected.yaml; values in percent.

    Args:
        name: unique; rows of equal experiment and overrides share their training.
        metric: path into metrics.json to a fraction, for instance bbox/AP or scores/mAP.
        source: who says so.
        kind: trained, or quoted: listed and never run.
        experiment: of configs/experiment; a trained row has one.
        expected: None is measured and not compared.
        tolerance: accepted distance from `expected`; a row that is compared has one.
        seeds: of the training, to average over.
        overrides: of the training; {data} stands for VISION_TASKS_DATA, {seed} for the seed.
        evaluate: overrides of the evaluation, in the same way.
        needs: further files below VISION_TASKS_DATA without which the row is skipped, beside those
            that the overrides name.
        note: for the report.
    """

    name: str = MISSING
    metric: str = MISSING
    source: str = MISSING
    kind: str = "trained"
    experiment: str | None = None
    expected: float | None = None
    tolerance: float | None = None
    seeds: list[int] = field(default_factory=lambda: [0])
    overrides: list[str] = field(default_factory=list)
    evaluate: list[str] = field(default_factory=list)
    needs: list[str] = field(default_factory=list)
    note: str = ""


@dataclass
class AccuracyConfig:
    """Schema of configs/accuracy.yaml."""

    out: str = "runs/tsd/reproduce"
    rows: list[str] | None = None  # names; all when null
    expected: str | None = None  # another file of rows
    allow_empty: bool = False  # exit with 0 although no row ran
    nproc: int = 1  # processes on this machine
    overrides: list[str] = field(default_factory=list)  # added to every training


ConfigStore.instance().store("tsd_accuracy_schema", AccuracyConfig)


@dataclass
class Outcome:
    """What became of a row; `values` has one entry for each seed, in percent."""

    name: str
    metric: str
    expected: float | None
    tolerance: float | None
    source: str
    status: str  # passed | off | no expected value | failed | skipped | quoted
    reason: str = ""
    note: str = ""
    values: list[float] = field(default_factory=list)
    measured: float | None = None
    spread: float | None = None  # sample standard deviation of the values
    runs: list[str] = field(default_factory=list)
    seconds: float = 0.0


class _RunError(RuntimeError):
    """A training or evaluation did not end well."""


def reproduce(cfg: AccuracyConfig) -> list[Outcome]:
    """Run the chosen rows one after another; the report is complete after each.

    Raises:
        InputError: an unknown row, a broken file of rows, or a bad `nproc`.
    """
    if cfg.nproc < 1:
        raise InputError("nproc", "must be at least 1", cfg.nproc)
    rows = choose(read(Path(cfg.expected) if cfg.expected else EXPECTED), cfg.rows)
    outcomes: list[Outcome] = []
    for entry in rows:
        outcomes.append(run_row(entry, cfg))
        last = outcomes[-1]
        get_logger(__name__).info("%s: %s %s", last.name, last.status, last.reason)
        write(outcomes, Path(cfg.out))
    return outcomes


def read(path: Path) -> list[Expected]:
    """Rows of a file.

    Raises:
        InputError: no such file, unknown, missing or contradicting fields, a name that comes twice.
    """
    if not path.is_file():
        raise InputError(path, "no such file")
    try:
        loaded = OmegaConf.load(path)
        rows = [OmegaConf.merge(OmegaConf.structured(Expected), entry) for entry in loaded.rows]
        found: list[Any] = [OmegaConf.to_object(entry) for entry in rows]
    except (OmegaConfBaseException, AttributeError, TypeError, ValueError) as error:
        raise InputError(path, "is no file of expected rows", error) from error
    for entry in found:
        _check(path, entry)
    names = [entry.name for entry in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(path, "rows of the same name", ", ".join(twice))
    return found


def _check(path: Path, entry: Expected) -> None:
    where = f"{path} {entry.name}"
    if entry.kind not in KINDS:
        raise InputError(where, f"kind must be one of {', '.join(KINDS)}", entry.kind)
    trained = entry.kind == "trained"
    if trained != (entry.experiment is not None):
        raise InputError(where, "experiment belongs to trained rows alone", entry.experiment)
    if trained and (entry.expected is None) != (entry.tolerance is None):
        raise InputError(where, "expected and tolerance go together", entry.tolerance)


def choose(rows: Sequence[Expected], names: Sequence[str] | None) -> list[Expected]:
    """The rows of these names, in the order of the file; all for None.

    Raises:
        InputError: a name that no row has.
    """
    if names is None:
        return list(rows)
    unknown = sorted(set(names) - {entry.name for entry in rows})
    if unknown:
        raise InputError("rows", f"accepted: {', '.join(r.name for r in rows)}", ", ".join(unknown))
    return [entry for entry in rows if entry.name in names]


def run_row(entry: Expected, cfg: AccuracyConfig) -> Outcome:
    """Train, evaluate, average and judge one row; a row without its data is skipped."""
    base = Path(os.environ.get("VISION_TASKS_DATA") or "data")
    outcome = Outcome(
        entry.name, entry.metric, entry.expected, entry.tolerance, entry.source, "quoted",
        note=entry.note,
    )  # fmt: skip
    if entry.kind == "quoted":
        return outcome
    absent = next((path for path in needed(entry, base) if not _present(path)), None)
    if absent is not None:
        outcome.status, outcome.reason = "skipped", f"no data in {absent}"
        return outcome
    start = time.perf_counter()
    try:
        for seed in entry.seeds:
            run = Run.of(entry, seed, cfg, base)
            outcome.runs.append(str(run.folder))
            outcome.values.append(100 * run_once(entry, run, cfg.nproc))
    except _RunError as error:
        outcome.status, outcome.reason = "failed", str(error)
    else:
        judge(outcome)
    outcome.seconds = round(time.perf_counter() - start, 1)
    return outcome


def needed(entry: Expected, base: Path) -> Iterator[Path]:
    """Files and folders that a row reads: those its overrides name, and `needs`."""
    for word in (*entry.overrides, *entry.evaluate):
        _, found, path = word.partition("{data}/")
        if found:
            yield base / path
    yield from (base / path for path in entry.needs)


def _present(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and any(path.iterdir()))


@dataclass(frozen=True)
class Run:
    """One seed of a row.

    Args:
        folder: of the training.
        words: its overrides.
        evaluate: overrides of the evaluation.
    """

    folder: Path
    words: list[str]
    evaluate: list[str]

    @staticmethod
    def of(entry: Expected, seed: int, cfg: AccuracyConfig, base: Path) -> Run:
        """The run of a seed, with what the row and the command line say."""
        common = [*entry.overrides, *cfg.overrides]
        words, evaluate = (
            [word.replace("{seed}", str(seed)).replace("{data}", str(base)) for word in part]
            for part in (common, entry.evaluate)
        )
        folder = run_folder(Path(cfg.out), str(entry.experiment), common) / f"seed{seed}"
        return Run(folder, [*words, f"seed={seed}"], evaluate)


def run_folder(out: Path, experiment: str, overrides: Sequence[str]) -> Path:
    """Folder of equal trainings: other overrides never continue an old run."""
    text = json.dumps([experiment, *overrides])
    return out / "runs" / f"{experiment}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def run_once(entry: Expected, run: Run, nproc: int) -> float:
    """Train into the run's folder and evaluate from there; returns the metric as a fraction."""
    train(str(entry.experiment), run.words, run.folder, nproc)
    # A folder for each row: rows that share a training are evaluated in different ways.
    out = run.folder / "evaluation" / entry.name.replace("/", "-")
    words = [f"run_dir={run.folder}", f"out={out}", *run.evaluate]
    _call([*_python(nproc), "detection_tsd.evaluate", *words])
    found = json.loads((out / "metrics.json").read_text())
    for key in entry.metric.split("/"):
        found = found.get(key) if isinstance(found, dict) else None
    if not isinstance(found, int | float):
        raise _RunError(f"{out / 'metrics.json'} has no metric {entry.metric}")
    return float(found)


def train(experiment: str, words: Sequence[str], folder: Path, nproc: int) -> None:
    """Train, or continue, or find that all is done.

    Raises:
        _RunError: the training failed, or was stopped before its last step.
    """
    own = [f"experiment={experiment}", *words, f"run_dir={folder}"]
    _call([*_python(nproc), "detection_tsd.train", *own])
    checkpoint = newest(folder / "checkpoints")
    step = int(checkpoint.name.removeprefix("step_")) if checkpoint else 0
    steps = OmegaConf.load(folder / "config.yaml").total_steps
    if step < steps:
        raise _RunError(f"{folder} stopped at step {step} of {steps}; start again")


def _python(nproc: int) -> list[str]:
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}", "-m"]
    return [sys.executable, "-m", *(launcher if nproc > 1 else [])]


def _call(command: list[str]) -> None:
    """Run a command that shows its own progress; stderr goes through and its last line is kept."""
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    last = ""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        for line in process.stderr:
            sys.stderr.write(line)
            last = line.strip() or last
    if process.returncode:
        module = next(word for word in command if word.startswith("detection_tsd."))
        raise _RunError(f"{module} ended with {process.returncode}: {last}")


def judge(outcome: Outcome) -> None:
    """Average the values and set the status."""
    outcome.measured = mean(outcome.values)
    outcome.spread = stdev(outcome.values) if len(outcome.values) > 1 else None
    if outcome.expected is None or outcome.tolerance is None:
        outcome.status = "no expected value"
        return
    gap = outcome.measured - outcome.expected
    # a hair wider, so that 79.9 is within 0.1 of 80
    outcome.status = "passed" if abs(gap) <= outcome.tolerance + 1e-9 else "off"
    outcome.reason = f"{gap:+.2f}" if outcome.status == "off" else ""


def write(outcomes: Sequence[Outcome], out: Path) -> None:
    """Write `reproduce.json` and `reproduce.md` into `out`.

    Raises:
        InputError: the folder cannot be written.
    """
    report = {
        "task": "tsd",
        "environment": rundir.environment(),
        "rows": [asdict(outcome) for outcome in outcomes],
    }
    lines = ["| " + " | ".join(COLUMNS) + " | source | note |", "|" + "---|" * (len(COLUMNS) + 2)]
    for entry in outcomes:
        lines.append("| " + " | ".join([*cells(entry), entry.source, entry.note]) + " |")
    try:
        out.mkdir(parents=True, exist_ok=True)
        rundir.write_text(out / "reproduce.json", json.dumps(report, indent=2) + "\n")
        rundir.write_text(out / "reproduce.md", "\n".join(lines) + "\n")
    except OSError as error:
        raise InputError(out, "cannot be written", error.strerror) from error


def cells(entry: Outcome) -> list[str]:
    """Texts of one row, in the order of `COLUMNS`."""
    numbers = (entry.expected, entry.tolerance, entry.measured, entry.spread)
    texts = ["-" if number is None else f"{number:.2f}" for number in numbers]
    return [entry.name, entry.metric, *texts, entry.status, entry.reason]


def passed(outcomes: Sequence[Outcome], allow_empty: bool) -> bool:
    """Whether no row is off or failed, and at least one ran (unless `allow_empty`)."""
    ran = any(entry.status in RAN for entry in outcomes)
    return (ran or allow_empty) and not any(entry.status in BAD for entry in outcomes)


def show(outcomes: Sequence[Outcome], out: Path) -> None:
    """Print the table, and how many rows ran."""
    table = Table(*COLUMNS)
    for entry in outcomes:
        table.add_row(*cells(entry))
    console = Console()
    console = console if console.is_terminal else Console(width=150)
    console.print(table)
    ran = sum(entry.status in RAN for entry in outcomes)
    quoted = sum(entry.status == "quoted" for entry in outcomes)
    text = f"{ran} of {len(outcomes) - quoted} rows ran, {quoted} are quotations"
    console.print(f"{text}; wrote {out / 'reproduce.json'}")
    if not ran:
        console.print("no row ran: set VISION_TASKS_DATA to the folder of the data sets")


@hydra.main(version_base=None, config_path="../configs", config_name="accuracy")
def main(cfg: DictConfig) -> None:
    setup_logging(0)
    settings: Any = OmegaConf.to_object(cfg)
    outcomes = reproduce(settings)
    show(outcomes, Path(settings.out))
    if not passed(outcomes, settings.allow_empty):
        sys.exit(1)


if __name__ == "__main__":
    exit_on_bad_input(main)
