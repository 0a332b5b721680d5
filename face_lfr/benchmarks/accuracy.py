"""Published and measured rows, trained and evaluated again: `make reproduce-lfr`.

    python -m face_lfr.benchmarks.accuracy [rows=[lfr/tin_r50_8f]] [nproc=8] [out=DIR]

Every row of `expected.yaml` whose data is present is trained (a stopped run continues), evaluated
over its splits and seeds, averaged and compared with its expected value. Data is looked for in
the folder that VISION_TASKS_DATA names, else in `data`. Writes `reproduce.json` and
`reproduce.md` after every row. Exits with 1 when a row is off or failed, and when no row ran.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table

from common import rundir
from common.log import InputError, exit_on_bad_input, get_logger, setup_logging

EXPECTED = Path(__file__).with_name("expected.yaml")
BAD = ("off", "failed")
RAN = ("passed", "no expected value", *BAD)
COLUMNS = ("row", "metric", "expected", "tolerance", "measured", "spread", "status", "reason")


@dataclass
class Expected:
    """One row of expected.yaml; values in percent.

    Args:
        name: unique; rows of equal experiment and overrides share their training.
        experiment: of configs/experiment.
        metric: key of metrics.json, for instance lfr_mAP or top1.
        expected: None is measured and not compared.
        tolerance: accepted distance from `expected`.
        source: who says so.
        root: data folder below VISION_TASKS_DATA; None for generated data.
        splits: number of splits to average over, data.split=1, 2, ...; None for sets without.
        seeds: of the training, to average over.
        overrides: of the training; {seed} stands for the seed.
        evaluate: overrides of the evaluation.
        init: starting weights below VISION_TASKS_DATA; without the file training starts from
            scratch, which the report says.
        note: for the report.
    """

    name: str = MISSING
    experiment: str = MISSING
    metric: str = "lfr_mAP"
    expected: float | None = None
    tolerance: float = MISSING
    source: str = MISSING
    root: str | None = None
    splits: int | None = None
    seeds: list[int] = field(default_factory=lambda: [0])
    overrides: list[str] = field(default_factory=list)
    evaluate: list[str] = field(default_factory=list)
    init: str | None = None
    note: str = ""


@dataclass
class AccuracyConfig:
    """Schema of configs/accuracy.yaml."""

    out: str = "runs/lfr/reproduce"
    rows: list[str] | None = None  # names; all when null
    expected: str | None = None  # another file of rows
    allow_empty: bool = False  # exit with 0 although no row ran
    nproc: int = 1  # training processes on this machine
    overrides: list[str] = field(default_factory=list)  # added to every training


ConfigStore.instance().store("lfr_accuracy_schema", AccuracyConfig)


@dataclass
class Outcome:
    """What became of a row; `values` has one entry for each split and seed, in percent."""

    name: str
    metric: str
    expected: float | None
    tolerance: float
    source: str
    status: str  # passed | off | no expected value | failed | skipped
    reason: str = ""
    note: str = ""
    init: str | None = None
    values: list[float] = field(default_factory=list)
    measured: float | None = None
    spread: float | None = None  # sample standard deviation of the values
    runs: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Repeat(NamedTuple):
    """One training of a row."""

    seed: int
    split: int | None = None

    @property
    def name(self) -> str:
        """Of its run folder."""
        return f"seed{self.seed}" + ("" if self.split is None else f"-split{self.split}")

    def words(self, common: Sequence[str]) -> list[str]:
        """All overrides of this training."""
        own = [f"seed={self.seed}"] + ([] if self.split is None else [f"data.split={self.split}"])
        return [*(word.replace("{seed}", str(self.seed)) for word in common), *own]


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
        InputError: no such file, unknown or missing fields, a name that comes twice.
    """
    if not path.is_file():
        raise InputError(path, "no such file")
    try:
        loaded = OmegaConf.load(path)
        rows = [OmegaConf.merge(OmegaConf.structured(Expected), entry) for entry in loaded.rows]
        found: list[Any] = [OmegaConf.to_object(entry) for entry in rows]
    except (OmegaConfBaseException, AttributeError, TypeError, ValueError) as error:
        raise InputError(path, "is no file of expected rows", error) from error
    names = [entry.name for entry in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(path, "rows of the same name", ", ".join(twice))
    return found


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
    init = base / entry.init if entry.init and (base / entry.init).is_file() else None
    outcome = Outcome(
        entry.name, entry.metric, entry.expected, entry.tolerance, entry.source, "skipped",
        note=entry.note, init=str(init) if init else None,
    )  # fmt: skip
    root = base / entry.root if entry.root else None
    if root is not None and not (root.is_dir() and any(root.iterdir())):
        outcome.reason = f"no data in {root}"
        return outcome
    start = time.perf_counter()
    common = [*entry.overrides, *cfg.overrides]
    common += [f"data.root={root}"] if root else []
    common += [f"init={init}"] if init else []
    try:
        for repeat in repeats(entry):
            folder = run_folder(Path(cfg.out), entry.experiment, common) / repeat.name
            outcome.runs.append(str(folder))
            value = run_once(entry, repeat.words(common), folder, cfg.nproc)
            outcome.values.append(100 * value)
    except _RunError as error:
        outcome.status, outcome.reason = "failed", str(error)
    else:
        judge(outcome)
    outcome.seconds = round(time.perf_counter() - start, 1)
    if entry.init and init is None:
        scratch = f"from scratch: no {base / entry.init}"
        outcome.reason = "; ".join(filter(None, [outcome.reason, scratch]))
    return outcome


def repeats(entry: Expected) -> list[Repeat]:
    """Every seed with every split."""
    splits = range(1, entry.splits + 1) if entry.splits else (None,)
    return [Repeat(seed, split) for seed in entry.seeds for split in splits]


def run_folder(out: Path, experiment: str, overrides: Sequence[str]) -> Path:
    """Folder of equal trainings: other overrides never continue an old run."""
    text = json.dumps([experiment, *overrides])
    return out / "runs" / f"{experiment}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def run_once(entry: Expected, overrides: Sequence[str], folder: Path, nproc: int) -> float:
    """Train into `folder` and evaluate from there; returns the metric as a fraction."""
    words = [f"experiment={entry.experiment}", *overrides, f"run_dir={folder}"]
    python = [sys.executable, "-m"]
    if nproc > 1:
        launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}", "-m"]
        _call([*python, *launcher, "face_lfr.train", *words])
    else:
        _call([*python, "face_lfr.train", *words])
    out = folder / "evaluation"
    where = [f"run_dir={folder}", f"out={out}"]
    _call([*python, "face_lfr.evaluate", *where, *entry.evaluate])
    found = json.loads((out / "metrics.json").read_text())
    steps = OmegaConf.load(folder / "config.yaml").total_steps
    if found["step"] < steps:
        raise _RunError(f"{folder} stopped at step {found['step']} of {steps}; start again")
    if entry.metric not in found:
        raise _RunError(f"{out / 'metrics.json'} has no metric {entry.metric}")
    return float(found[entry.metric])


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
        raise _RunError(f"{command[2]} ended with {process.returncode}: {last}")


def judge(outcome: Outcome) -> None:
    """Average the values and set the status."""
    outcome.measured = mean(outcome.values)
    outcome.spread = stdev(outcome.values) if len(outcome.values) > 1 else None
    if outcome.expected is None:
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
        "task": "lfr",
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
    console.print(f"{ran} of {len(outcomes)} rows ran; wrote {out / 'reproduce.json'}")
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
