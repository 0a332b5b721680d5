"""The full evidence on generated pictures: every head and control, several fresh seeds.

    python -m detection_tsd.claims out=DIR

Rows: the sibling head and its controls (as many parameters as TSD, two extractors, deformable
pooling, twice the steps), TSD with its companion, with the progressive constraint too, and with a
detached target. Then the sibling head and TSD where there should be little to gain (glyphs in the
middle, exact proposals). Resumable: finished trainings are only scored again. Writes
`benchmarks/results/claims-<hardware>.json`, the tables of the README, and pictures into `out`.
Exits with 1 when a gate of configs/claims.yaml is missed.
"""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import numpy as np
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from common import rundir
from common.log import InputError, exit_on_bad_input, setup_logging
from detection_tsd.benchmarks.results import FOLDER, hardware, slug
from detection_tsd.curves import Bar, draw_bars, draw_thresholds, draw_training
from detection_tsd.evaluate import write_json
from detection_tsd.examples import draw_examples
from detection_tsd.metrics.coco import SUMMARY
from detection_tsd.report import gate, gate_line, gate_table, spread
from detection_tsd.scoring import Measured, measure
from detection_tsd.suite import Job, train_all


class Entry(NamedTuple):
    """One detector: a row of configs/experiment/synth on a kind of data set.

    `times` multiplies the steps, with the whole schedule.
    """

    kind: str
    row: str
    times: int = 1

    @property
    def name(self) -> str:
        """For tables and pictures."""
        return self.row if self.times == 1 else f"{self.row}, {self.times}x steps"


ROWS = ("sibling", "sibling_wide", "d_head", "dpool", "tsd_joint", "tsd", "tsd_detached")
LONG = Entry("glyphs", "sibling", 2)
TRAINED = (
    *(Entry("glyphs", row) for row in ROWS),
    LONG,
    *(Entry("centred", row) for row in ("sibling", "tsd")),
)
TITLES = {
    "glyphs": "glyphs, bad proposals",
    "centred": "control: centred glyphs, exact proposals",
}
COLUMNS = ("AP", "AP50", "AP75", "AP90")


@dataclass
class Gates:
    """Limits; see configs/claims.yaml."""

    sibling_ap50: float = 0.97
    gain: float = 0.03
    gain_every_seed: float = 0.0
    gain_over_d_head: float = 0.015
    gain_over_wide: float = 0.0
    gain_over_long: float = 0.0
    ap90_over_ap50: float = 0.0
    correlation: float = 0.8
    error_left: float = 0.5
    centred_gain_share: float = 0.5


@dataclass
class ClaimsConfig:
    """Schema of configs/claims.yaml."""

    out: str = "runs/claims/tsd"
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    steps: int = 2000
    jobs: int = 2
    sizes: dict[str, int] = field(default_factory=dict)  # of the data sets; usual when empty
    readme: str | None = "detection_tsd/README.md"
    results: str = str(FOLDER)
    gates: Gates = field(default_factory=Gates)


ConfigStore.instance().store("tsd_claims_schema", ClaimsConfig)

Found = dict[Entry, list[Measured]]


def claims(cfg: ClaimsConfig) -> dict[str, Any]:
    """Train what is not trained yet, score everything, write the evidence; returns it."""
    if len(cfg.seeds) < 1:
        raise InputError("seeds", "needs at least one", list(cfg.seeds))
    start, out = time.perf_counter(), Path(cfg.out)
    jobs = {(entry, seed): _job(cfg, entry, seed) for seed in cfg.seeds for entry in TRAINED}
    train_all(list(jobs.values()), cfg.jobs)
    found: Found = {e: [measure(jobs[e, seed]) for seed in cfg.seeds] for e in TRAINED}
    evidence = {
        "hardware": hardware(torch.get_num_threads()),
        "versions": rundir.environment()["versions"],
        "seeds": list(cfg.seeds),
        "steps": cfg.steps,
        "rows": [_row(entry, items) for entry, items in found.items()],
        "gates": judge(cfg.gates, found),
        "seconds": round(time.perf_counter() - start, 1),
    }
    evidence["passed"] = all(entry["passed"] for entry in evidence["gates"])
    Path(cfg.results).mkdir(parents=True, exist_ok=True)
    write_json(Path(cfg.results) / f"claims-{slug(evidence['hardware'])}.json", evidence)
    write_json(out / "claims.json", evidence)
    if cfg.readme is not None:
        write_readme(Path(cfg.readme), evidence)
    _draw(cfg, jobs, found)
    return evidence


def _job(cfg: ClaimsConfig, entry: Entry, seed: int) -> Job:
    out = Path(cfg.out)
    steps = cfg.steps * entry.times
    run = out / "runs" / f"{entry.kind}_{entry.row}_{steps}_{seed}"
    data = out / "data" / f"{entry.kind}_{seed}"
    return Job(entry.row, run, data, entry.kind, seed, steps, dict(cfg.sizes))


def _row(entry: Entry, items: list[Measured]) -> dict[str, Any]:
    probes = [item.probe for item in items if item.probe is not None]
    summaries = [item.scores.summary for item in items]
    thresholds = [item.scores.by_threshold for item in items]
    return {
        "kind": entry.kind,
        "row": entry.name,
        "summary": {name: [one[name] for one in summaries] for name in SUMMARY},
        "by_threshold": {name: [one[name] for one in thresholds] for name in thresholds[0]},
        "ap_at_nine_tenths": [item.before for item in items],
        "parameters": list(items[0].parameters),
        "probe": [probe._asdict() for probe in probes],
    }  # fmt: skip


def judge(gates: Gates, found: Mapping[Entry, list[Measured]]) -> list[dict[str, Any]]:
    """Compare with the limits: means over the seeds, paired by seed."""
    glyphs = {row: found[Entry("glyphs", row)] for row in ROWS}
    ap = {row: np.array([item.ap for item in items]) for row, items in glyphs.items()}
    centred = [np.mean([i.ap for i in found[Entry("centred", row)]]) for row in ("sibling", "tsd")]
    gain = ap["tsd"] - ap["sibling"]
    at = {
        name: _at(glyphs["tsd"], name) - _at(glyphs["sibling"], name) for name in ("AP50", "AP90")
    }
    long = np.array([item.ap for item in found[LONG]])
    probes = [item.probe for item in glyphs["tsd"] if item.probe is not None]
    left = np.mean([probe.after / probe.before for probe in probes])
    value = {
        "sibling_ap50": (_at(glyphs["sibling"], "AP50").mean(), "at least"),
        "gain": (gain.mean(), "at least"),
        "gain_every_seed": (gain.min(), "above"),
        "gain_over_d_head": ((ap["tsd"] - ap["d_head"]).mean(), "at least"),
        "gain_over_wide": ((ap["tsd"] - ap["sibling_wide"]).mean(), "above"),
        "gain_over_long": ((ap["tsd"] - long).mean(), "above"),
        "ap90_over_ap50": ((at["AP90"] - at["AP50"]).mean(), "above"),
        "correlation": (np.mean([probe.correlation for probe in probes]), "at least"),
        "error_left": (left, "at most"),
        "centred_gain_share": ((centred[1] - centred[0]) / gain.mean(), "at most"),
    }
    names = [entry.name for entry in fields(Gates)]
    return [
        gate(name, float(value[name][0]), value[name][1], getattr(gates, name)) for name in names
    ]


def _at(items: list[Measured], threshold: str) -> np.ndarray:
    return np.array([item.scores.by_threshold[threshold] for item in items])


def write_readme(path: Path, evidence: Mapping[str, Any]) -> None:
    """Replace the tables between the claims markers of a README.

    Raises:
        InputError: no such file, or it has no markers.
    """
    begin, end = "<!-- claims:begin -->", "<!-- claims:end -->"
    if not path.is_file() or begin not in path.read_text() or end not in path.read_text():
        raise InputError(path, "needs the markers", f"{begin} {end}")
    before, _, rest = path.read_text().partition(begin)
    after = rest.partition(end)[2]
    path.write_text(f"{before}{begin}\n{markdown(evidence)}\n{end}{after}")


def markdown(evidence: Mapping[str, Any]) -> str:
    """Rows and gates as Markdown tables."""
    seeds = ", ".join(str(seed) for seed in evidence["seeds"])
    lines = [
        f"{evidence['steps']} steps; seeds {seeds}; mean ± standard deviation; "
        f"{evidence['hardware']}. Parameters in training (at inference); the last columns: "
        "correlation of the shift with the true error of the proposal's centre, and that error "
        "before and after, in % of the proposal's size.",
    ]
    for kind, title in TITLES.items():
        lines += ["", f"| {title} | parameters | {' | '.join(COLUMNS)} | correlation | error |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        rows = [row for row in evidence["rows"] if row["kind"] == kind]
        lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    return "\n".join([*lines, "", *gate_table(evidence["gates"])])


def _cells(row: Mapping[str, Any]) -> list[str]:
    whole, used = (f"{count / 1e6:.2f} M" for count in row["parameters"])
    size = whole if whole == used else f"{whole} ({used})"
    values = {**row["by_threshold"], **row["summary"]}
    cells = [row["row"], size, *(spread(values[name]) for name in COLUMNS)]
    if not row["probe"]:
        return [*cells, "", ""]
    known, before, after = (
        np.mean([p[name] for p in row["probe"]]) for name in ("correlation", "before", "after")
    )
    return [*cells, f"{known:.2f}", f"{100 * before:.1f} → {100 * after:.1f}"]


def _draw(cfg: ClaimsConfig, jobs: Mapping[tuple[Entry, int], Job], found: Found) -> None:
    out, seed = Path(cfg.out), cfg.seeds[0]
    groups = {
        title: {e.name: items for e, items in found.items() if e.kind == kind}
        for kind, title in TITLES.items()
    }
    curves = {
        title: {row: np.stack([item.curve for item in items]) for row, items in group.items()}
        for title, group in groups.items()
    }
    draw_thresholds(
        curves, out / "thresholds.png", "AP on unseen pictures, mean and range of the seeds"
    )
    bars = {
        title: [Bar(row, [item.ap for item in items]) for row, items in group.items()]
        for title, group in groups.items()
    }
    draw_bars(bars, out / "heads.png", "AP on unseen pictures")
    glyphs = {e.name: jobs[e, seed] for e in TRAINED if e.kind == "glyphs"}
    draw_training({row: job.run_dir for row, job in glyphs.items()}, out / "training.png")
    draw_examples({row: glyphs[row] for row in ("sibling", "tsd")}, out)


def show(evidence: Mapping[str, Any]) -> None:
    """Print the rows and the gates."""
    console = Console()
    table = Table(title=f"glyph boxes, seeds {evidence['seeds']}")
    for name in ("data", "row", "parameters", *COLUMNS, "correlation", "error, %"):
        table.add_column(name)
    for row in evidence["rows"]:
        table.add_row(row["kind"], *_cells(row))
    console.print(table)
    for entry in evidence["gates"]:
        console.print(gate_line(entry))


@hydra.main(version_base=None, config_path="configs", config_name="claims")
def main(cfg: DictConfig) -> None:
    setup_logging(rank=0)
    evidence = claims(cfg)  # type: ignore[arg-type]
    show(evidence)
    if not evidence["passed"]:
        sys.exit(1)


if __name__ == "__main__":
    exit_on_bad_input(main)
