"""The full evidence on the synthetic task: every row and control, several fresh seeds.

    python -m reid_rqen.claims out=DIR

Three data sets per seed: regions covered independently (`region`), all three together (`frame`),
nothing covered (`clean`), and `other_cover`, the first with a family of covers at test time that
training never shows. Resumable: finished trainings are only scored again. Writes
`benchmarks/results/claims-<hardware>.json`, the table of the README, and pictures into `out`.
Exits with 1 when a gate of configs/claims.yaml is missed.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
from reid_rqen.benchmarks.results import FOLDER, hardware, slug
from reid_rqen.data.synthetic import generate
from reid_rqen.evaluate import write_json
from reid_rqen.report import Curve, draw_cmc, draw_tracklets, draw_training, spread
from reid_rqen.suite import REGIONS, Job, Measured, measure, train_all

MODES: dict[str, dict[str, Any]] = {
    "region": {},
    "frame": {"mode": "frame"},
    "clean": {"cover": 0.0},
}
OTHER_COVER = {"test_cover": "blur_dark"}


class Entry(NamedTuple):
    """One line of the table: a row, on which data, for how many times the steps."""

    mode: str
    row: str
    times: int = 1

    @property
    def name(self) -> str:
        return self.row if self.times == 1 else f"{self.row}, {self.times}x steps"


TRAINED = (
    *(Entry("region", row) for row in ("gnbn_avg", "rqen_fixed1", "qan", "qan_parts", "rqen")),
    Entry("region", "rqen_fixed1", 3),
    *(Entry("frame", row) for row in ("rqen_fixed1", "qan_parts", "rqen")),
    *(Entry("clean", row) for row in ("rqen_fixed1", "rqen")),
)
# Trained on `region`, tested on covers of another family.
TRANSFERRED = tuple(Entry("other_cover", row) for row in ("rqen_fixed1", "qan_parts", "rqen"))


@dataclass
class Gates:
    """Limits; see configs/claims.yaml."""

    region_rqen_over_qan_parts: float = 0.08
    region_rqen_over_fixed1: float = 0.12
    region_auc: float = 0.75
    frame_rqen_near_qan_parts: float = 0.08
    frame_both_over_fixed1: float = 0.2
    clean_rqen_near_fixed1: float = 0.03


@dataclass
class ClaimsConfig:
    """Schema of configs/claims.yaml."""

    out: str = "runs/claims/rqen"
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    steps: int = 500
    jobs: int = 2
    readme: str | None = "reid_rqen/README.md"
    results: str = str(FOLDER)
    gates: Gates = field(default_factory=Gates)


ConfigStore.instance().store("rqen_claims_schema", ClaimsConfig)

Found = dict[Entry, list[Measured]]


def claims(cfg: ClaimsConfig) -> dict[str, Any]:
    """Train what is not trained yet, score everything, write the evidence; returns it."""
    if len(cfg.seeds) < 1:
        raise InputError("seeds", "needs at least one", list(cfg.seeds))
    start, out = time.perf_counter(), Path(cfg.out)
    jobs = {(entry, seed): _job(cfg, entry, seed) for seed in cfg.seeds for entry in TRAINED}
    train_all(list(jobs.values()), cfg.jobs)
    found: Found = {e: [measure(jobs[e, seed]) for seed in cfg.seeds] for e in TRAINED}
    for entry in TRANSFERRED:
        found[entry] = [
            measure(jobs[entry._replace(mode="region"), seed], _other_cover(out, seed))
            for seed in cfg.seeds
        ]
    evidence = {
        "hardware": hardware(torch.get_num_threads()),
        "versions": rundir.environment()["versions"],
        "seeds": list(cfg.seeds),
        "steps": cfg.steps,
        "rows": [_row(entry, items) for entry, items in found.items()],
        "gates": judge(cfg.gates, found),
        "seconds": round(time.perf_counter() - start, 1),
    }
    evidence["passed"] = all(gate["passed"] for gate in evidence["gates"])
    write_json(Path(cfg.results) / f"claims-{slug(evidence['hardware'])}.json", evidence)
    write_json(out / "claims.json", evidence)
    if cfg.readme is not None:
        write_readme(Path(cfg.readme), evidence)
    _draw(cfg, jobs, found)
    return evidence


def _job(cfg: ClaimsConfig, entry: Entry, seed: int) -> Job:
    out = Path(cfg.out)
    steps = cfg.steps * entry.times
    run = out / "runs" / f"{entry.mode}_{entry.row}_{steps}_{seed}"
    data = out / "data" / f"{entry.mode}_{seed}"
    return Job(entry.row, run, data, seed, steps, MODES[entry.mode])


def _other_cover(out: Path, seed: int) -> Path:
    return generate(out / "data" / f"other_cover_{seed}", seed, **OTHER_COVER)


def _row(entry: Entry, items: Sequence[Measured]) -> dict[str, Any]:
    auc = [item.auc for item in items if item.auc is not None]
    return {
        "data": entry.mode,
        "row": entry.name,
        "cmc@1": [item.result["cmc@1"] for item in items],
        "mAP": [item.result["mAP"] for item in items],
        "auc": np.mean(auc, axis=0).tolist() if auc else None,
    }


def judge(gates: Gates, found: Mapping[Entry, Sequence[Measured]]) -> list[dict[str, Any]]:
    """Compare the means over the seeds with the limits."""

    def first(mode: str, row: str) -> float:
        return float(np.mean([item.result["cmc@1"] for item in found[Entry(mode, row)]]))

    region, frame, clean = (
        {row: first(mode, row) for m, row, times in found if m == mode and times == 1}
        for mode in ("region", "frame", "clean")
    )
    scores = [item.auc or (0.5,) * 3 for item in found[Entry("region", "rqen")]]
    both = min(frame["rqen"], frame["qan_parts"]) - frame["rqen_fixed1"]
    least = {
        "region_rqen_over_qan_parts": region["rqen"] - region["qan_parts"],
        "region_rqen_over_fixed1": region["rqen"] - region["rqen_fixed1"],
        "region_auc": float(np.mean(scores, axis=0).min()),
        "frame_both_over_fixed1": both,
    }
    most = {
        "frame_rqen_near_qan_parts": abs(frame["rqen"] - frame["qan_parts"]),
        "clean_rqen_near_fixed1": abs(clean["rqen"] - clean["rqen_fixed1"]),
    }
    return [
        *(_gate(name, value, getattr(gates, name), value >= getattr(gates, name), "at least")
          for name, value in least.items()),
        *(_gate(name, value, getattr(gates, name), value <= getattr(gates, name), "at most")
          for name, value in most.items()),
    ]  # fmt: skip


def _gate(name: str, value: float, limit: float, passed: bool, kind: str) -> dict[str, Any]:
    return {"name": name, "value": value, "kind": kind, "limit": limit, "passed": bool(passed)}


def write_readme(path: Path, evidence: Mapping[str, Any]) -> None:
    """Replace the table between the claims markers of a README.

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
    """The rows and gates as Markdown tables."""
    seeds = ", ".join(str(seed) for seed in evidence["seeds"])
    lines = [
        f"{evidence['steps']} steps, seeds {seeds}, mean ± standard deviation, "
        f"{evidence['hardware']}.",
        "",
    ]
    lines += ["| data | row | CMC@1, % | mAP, % | score AUC u / m / l |", "|---|---|---|---|---|"]
    for row in evidence["rows"]:
        auc = " / ".join(f"{value:.3f}" for value in row["auc"]) if row["auc"] else "-"
        cells = (row["data"], row["row"], spread(row["cmc@1"]), spread(row["mAP"]), auc)
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| gate | value | limit | |", "|---|---|---|---|"]
    for gate in evidence["gates"]:
        passed = "met" if gate["passed"] else "**missed**"
        limit = f"{gate['kind']} {gate['limit']:.2f}"
        lines.append(f"| {gate['name']} | {gate['value']:.3f} | {limit} | {passed} |")
    return "\n".join(lines)


def _draw(cfg: ClaimsConfig, jobs: Mapping[tuple[Entry, int], Job], found: Found) -> None:
    out, seed = Path(cfg.out), cfg.seeds[0]
    for mode in MODES:
        curves = [
            Curve(entry.name, [item.result["cmc_curve"] for item in items])
            for entry, items in found.items()
            if entry.mode == mode
        ]
        draw_cmc(curves, out / f"cmc_{mode}.png", title=f"{mode}: CMC over {len(cfg.seeds)} seeds")
    method = jobs[Entry("region", "rqen"), seed]
    draw_tracklets(method, out / "scores.png")
    runs = {e.name: jobs[e, seed].run_dir for e in TRAINED if e.mode == "region" and e.times == 1}
    draw_training(runs, out / "training.png")


def show(evidence: Mapping[str, Any]) -> None:
    """Print the rows and the gates."""
    table = Table(title=f"synthetic task, seeds {evidence['seeds']}")
    for name in ("data", "row", "cmc@1", "mAP", "AUC " + "/".join(REGIONS)):
        table.add_column(name)
    for row in evidence["rows"]:
        auc = " ".join(f"{value:.3f}" for value in row["auc"] or [])
        table.add_row(row["data"], row["row"], spread(row["cmc@1"]), spread(row["mAP"]), auc)
    console = Console()
    console.print(table)
    for gate in evidence["gates"]:
        verdict = "met" if gate["passed"] else "MISSED"
        console.print(
            f"{gate['name']}: {gate['value']:.3f}, {gate['kind']} {gate['limit']}: {verdict}"
        )


@hydra.main(version_base=None, config_path="configs", config_name="claims")
def main(cfg: DictConfig) -> None:
    setup_logging(rank=0)
    evidence = claims(cfg)  # type: ignore[arg-type]
    show(evidence)
    if not evidence["passed"]:
        sys.exit(1)


if __name__ == "__main__":
    exit_on_bad_input(main)
