"""All speed benchmarks: `python -m detection_tsd.benchmarks [out=DIR] [quick=true] [compare=true]`.

    ops      RoIAlign and deformable pooling, forward and backward
    nms      suppression, with the decoding before it
    infer    our detector beside torchvision's, stage by stage; TSD beside the sibling head
    train    training steps of TSD, of the sibling head and of torchvision's, and loading
    data     annotations and evaluation

Writes `<hardware>.json` and `.md` into `out`; the thread count is part of the hardware name. The
group `data` works on one thread: it runs with the first of `threads` only. A GPU is used when there
is one. With more threads than free cores the rows of networks say little. Peers that are not
installed have a row that says so.

`quick=true` is for continuous integration: smaller inputs and fewer repeats. `full=true` adds
memory layouts and types to `ops`; on CUDA it is the default.

`compare=true` compares with the stored results of the same hardware name (see `compare.py`) and
exits with 1 when a row is worse; its own results go to runs/tsd/bench unless `out` says otherwise,
so that the stored ones stay.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from common.log import InputError, exit_on_bad_input, get_logger, setup_logging
from detection_tsd.benchmarks import compare, results
from detection_tsd.benchmarks.bench_data import data_rows
from detection_tsd.benchmarks.bench_infer import infer_rows
from detection_tsd.benchmarks.bench_nms import nms_rows
from detection_tsd.benchmarks.bench_ops import pool_rows
from detection_tsd.benchmarks.bench_train import train_rows
from detection_tsd.benchmarks.results import Row

GROUPS = ("ops", "nms", "infer", "train", "data")
ONE_THREAD = ("data",)
QUICK_REPEATS = 2


@dataclass
class BenchConfig:
    """Schema of configs/bench.yaml."""

    out: str | None = None  # default: results/ beside this file
    groups: list[str] = field(default_factory=lambda: list(GROUPS))
    threads: list[int] = field(default_factory=lambda: [1, 0])  # 0: all
    repeats: int = 5
    quick: bool = False  # smaller inputs, fewer repeats
    full: bool | None = None  # every memory layout and type of ops; null: on CUDA
    seed: int = 0
    compile: bool = False  # a compiled backbone on a CPU too; on CUDA always
    compare: bool = False
    tolerance: float = 0.1  # fraction by which a row may be slower than stored


ConfigStore.instance().store("tsd_bench_schema", BenchConfig)


def run(cfg: BenchConfig) -> int:
    """Measure, print and write; returns the number of rows that are worse than stored.

    Raises:
        InputError: unknown groups, numbers that are not positive, or quick and full together.
    """
    _check(cfg)
    console = _console()
    before, worse = torch.get_num_threads(), 0
    console.print(f"versions: {results.version_line()}")
    for threads, groups in plan(list(cfg.groups), list(cfg.threads), before).items():
        torch.set_num_threads(threads)
        report = compare.stored(threads, results.FOLDER) if cfg.compare else None
        measured = {group: list(_rows(cfg, group)) for group in groups}
        if report is not None:
            _measure_worse_again(cfg, measured, report)
        rows = [entry for group in measured.values() for entry in group]
        console.print(_table(rows, threads))
        console.print(f"wrote {results.merge(rows, threads, _out(cfg))}")
        if report is not None:
            changes = compare.compare(rows, report, cfg.tolerance)
            console.print(compare.table(changes, report))
            worse += sum(change.status == "worse" for change in changes)
        elif cfg.compare:
            console.print(f"not compared: no stored results for {results.hardware(threads)}")
    torch.set_num_threads(before)
    return worse


def plan(groups: list[str], threads: list[int], every: int) -> dict[int, list[str]]:
    """Groups to run for each thread count; a count of 0 stands for `every` thread."""
    counts = list(dict.fromkeys(count or every for count in threads))
    later = [name for name in groups if name not in ONE_THREAD]
    chosen = {count: groups if count == counts[0] else later for count in counts}
    return {count: names for count, names in chosen.items() if names}


def _rows(cfg: BenchConfig, group: str) -> Iterator[Row]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    repeats = min(cfg.repeats, QUICK_REPEATS) if cfg.quick else cfg.repeats
    full = device.type == "cuda" and not cfg.quick if cfg.full is None else cfg.full
    # Ratios of networks are near 1, and their quick inputs are small: every repeat is needed.
    networks = (cfg.repeats, device)
    runs: dict[str, Callable[[], Iterator[Row]]] = {
        "ops": partial(pool_rows, repeats, cfg.quick, full, cfg.seed),
        "nms": partial(nms_rows, repeats, cfg.quick, cfg.seed),
        "infer": partial(infer_rows, *networks, cfg.compile, cfg.quick, cfg.seed),
        "train": partial(train_rows, *networks, cfg.quick, cfg.seed),
        "data": partial(data_rows, repeats, cfg.quick, cfg.seed),
    }
    for entry in runs[group]():
        texts = (entry["name"], entry["shape"], entry["peer"])
        get_logger(__name__).info("%s: %s, %s against %s", group, *texts)
        yield entry


def _measure_worse_again(
    cfg: BenchConfig, measured: dict[str, list[Row]], report: dict[str, Any]
) -> None:
    """Replace rows by a second measurement in the groups that look worse than stored."""
    for group, rows in measured.items():
        changes = compare.compare(rows, report, cfg.tolerance)
        names = ", ".join(change.name for change in changes if change.status == "worse")
        if names:
            get_logger(__name__).warning("%s: worse than stored, once more: %s", group, names)
            measured[group] = compare.better(rows, _rows(cfg, group))


def _out(cfg: BenchConfig) -> Path:
    if cfg.out is not None:
        return Path(cfg.out)
    return Path("runs/tsd/bench") if cfg.compare else results.FOLDER


def _check(cfg: BenchConfig) -> None:
    if set(cfg.groups) - set(GROUPS) or not cfg.groups:
        raise InputError("groups", f"must be some of {GROUPS}", list(cfg.groups))
    if not cfg.threads or min(cfg.threads) < 0:
        raise InputError("threads", "must be counts, 0 for all", list(cfg.threads))
    if cfg.repeats < 1 or not cfg.tolerance > 0:
        raise InputError("repeats, tolerance", "must be positive", (cfg.repeats, cfg.tolerance))
    if cfg.quick and cfg.full:
        raise InputError("quick, full", "exclude each other", (cfg.quick, cfg.full))


def _table(rows: list[Row], threads: int) -> Table:
    found = Table(*results.COLUMNS, title=results.hardware(threads))
    for entry in rows:
        found.add_row(*results.cells(entry))
    return found


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=150)


@hydra.main(version_base=None, config_path="../configs", config_name="bench")
def main(cfg: DictConfig) -> None:
    setup_logging(0)
    settings: Any = OmegaConf.to_object(cfg)
    if run(settings):
        sys.exit(1)


if __name__ == "__main__":
    exit_on_bad_input(main)
