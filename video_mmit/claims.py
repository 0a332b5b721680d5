"""The full evidence on the synthetic task: every row and control, several fresh seeds.

    python -m video_mmit.claims out=DIR

Three data sets a seed: labels that need the order of the frames (`order`, and for fewer steps
`short`, where an ensemble has something left to gain), motion seen through gaps of different
lengths by a network with one temporal block (`gap`), and labels that every frame shows (`static`).
Resumable: finished trainings are only scored again. Writes
`benchmarks/results/claims-<hardware>.json`, the table of the README, and pictures into `out`.
Exits with 1 when a gate of configs/claims.yaml is missed.
"""

import sys
import time
from collections.abc import Mapping, Sequence
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
from video_mmit.benchmarks.results import FOLDER, hardware, slug
from video_mmit.ensemble import fuse
from video_mmit.evaluate import write_json
from video_mmit.report import (
    Bar,
    draw_bars,
    draw_learned_offsets,
    draw_training,
    draw_videos,
    gate,
    gate_line,
    gate_table,
    spread,
)
from video_mmit.suite import PAIR_NAMES, Job, Measured, figures, measure, train_all


class Entry(NamedTuple):
    """One line of the table: a row trained in a setting, or something made of trained rows."""

    setting: str
    row: str


PARTS = {"order": "order", "short": "order", "gap": "gap", "static": "static"}  # of the settings
MEMBERS = ("tsn", "trn", "tsm", "tin")
TRAINED = tuple(
    Entry(setting, row)
    for setting, rows in {
        "order": MEMBERS,
        "short": MEMBERS,
        "gap": (
            "tsn", "tsm", "tin", "tin_start1", "tin_fixed1", "tin_fixed1.9", "tin_no_weight",
            "tsm_both", "tin_both",
        ),
        "static": MEMBERS,
    }.items()
    for row in rows
)  # fmt: skip
SHUFFLED = tuple(Entry("order", row) for row in MEMBERS)
ENSEMBLES = {"ensemble of four": MEMBERS, "ensemble tsm + tin": ("tsm", "tin")}


@dataclass
class Gates:
    """Limits; see configs/claims.yaml."""

    order_tin_over_tsn: float = 0.10
    order_tsm_over_tsn: float = 0.10
    order_tsn_pair_off_chance: float = 0.08
    order_shuffled_gain: float = 0.03
    short_ensemble_over_best: float = 0.0
    gap_tsn: float = 0.56
    gap_tsm: float = 0.88
    gap_tin: float = 0.95
    gap_tsm_both: float = 0.95
    static_tin_over_tsn: float = 0.02


@dataclass
class ClaimsConfig:
    """Schema of configs/claims.yaml."""

    out: str = "runs/claims/mmit"
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    steps: dict[str, int] = field(default_factory=dict)  # of each setting
    jobs: int = 2
    readme: str | None = "video_mmit/README.md"
    results: str = str(FOLDER)
    gates: Gates = field(default_factory=Gates)


ConfigStore.instance().store("mmit_claims_schema", ClaimsConfig)

Found = dict[Entry, list[Measured]]


def claims(cfg: ClaimsConfig) -> dict[str, Any]:
    """Train what is not trained yet, score everything, write the evidence; returns it."""
    if len(cfg.seeds) < 1:
        raise InputError("seeds", "needs at least one", list(cfg.seeds))
    start, out = time.perf_counter(), Path(cfg.out)
    jobs = {(entry, seed): _job(cfg, entry, seed) for seed in cfg.seeds for entry in TRAINED}
    train_all(list(jobs.values()), cfg.jobs)
    found: Found = {e: [measure(jobs[e, seed]) for seed in cfg.seeds] for e in TRAINED}
    for entry in SHUFFLED:
        shuffled = [measure(jobs[entry, seed], shuffle=True) for seed in cfg.seeds]
        found[entry._replace(row=f"{entry.row}, frames shuffled")] = shuffled
    for setting in ("order", "short"):
        for name, members in ENSEMBLES.items():
            rows = [found[Entry(setting, row)] for row in members]
            found[Entry(setting, name)] = ensemble(rows)
    evidence = {
        "hardware": hardware(torch.get_num_threads()),
        "versions": rundir.environment()["versions"],
        "seeds": list(cfg.seeds),
        "steps": {setting: cfg.steps[setting] for setting in PARTS},
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
    out, part, steps = Path(cfg.out), PARTS[entry.setting], cfg.steps[entry.setting]
    run = out / "runs" / f"{entry.setting}_{entry.row}_{steps}_{seed}"
    return Job(part, entry.row, run, out / "data" / f"{part}_{seed}", seed, steps)


def ensemble(members: Sequence[Sequence[Measured]]) -> list[Measured]:
    """The mean of the members' logits, seed by seed; nothing is tuned."""
    found = []
    for items in zip(*members, strict=True):
        score_NK = fuse([item.score for item in items], None, "logit", multi_label=True)
        found.append(figures(score_NK, items[0].target, "order"))
    return found


def _row(entry: Entry, items: Sequence[Measured]) -> dict[str, Any]:
    return {
        "data": entry.setting,
        "row": entry.row,
        "mmit_mAP": [item.result["mmit_mAP"] for item in items],
        "macro_mAP": [item.result["macro_mAP"] for item in items],
        "pairs": [list(item.pairs) for item in items],
    }


def judge(gates: Gates, found: Mapping[Entry, Sequence[Measured]]) -> list[dict[str, Any]]:
    """Compare the means over the seeds with the limits."""

    def quality(setting: str, row: str) -> float:
        return float(np.mean([item.result["mmit_mAP"] for item in found[Entry(setting, row)]]))

    def pair(setting: str, row: str) -> float:
        return float(np.mean([item.pair for item in found[Entry(setting, row)]]))

    tsn = quality("order", "tsn")
    shuffled = max(quality("order", f"{row}, frames shuffled") for row in ("tsm", "tin"))
    best = max(quality("short", row) for row in MEMBERS)
    static = quality("static", "tin") - quality("static", "tsn")
    value = {
        "order_tin_over_tsn": (quality("order", "tin") - tsn, "at least"),
        "order_tsm_over_tsn": (quality("order", "tsm") - tsn, "at least"),
        "order_tsn_pair_off_chance": (abs(pair("order", "tsn") - 0.5), "at most"),
        "order_shuffled_gain": (shuffled - tsn, "at most"),
        "short_ensemble_over_best": (quality("short", "ensemble of four") - best, "at least"),
        "gap_tsn": (pair("gap", "tsn"), "at most"),
        "gap_tsm": (pair("gap", "tsm"), "at most"),
        "gap_tin": (pair("gap", "tin"), "at least"),
        "gap_tsm_both": (pair("gap", "tsm_both"), "at least"),
        "static_tin_over_tsn": (static, "at most"),
    }
    names = [entry.name for entry in fields(Gates)]
    return [gate(name, *value[name], getattr(gates, name)) for name in names]


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
    steps = ", ".join(f"{part} {count}" for part, count in evidence["steps"].items())
    lines = [
        f"Steps: {steps}; seeds {seeds}; mean ± standard deviation; {evidence['hardware']}.",
        "",
        "| data | row | mmit mAP, % | macro mAP, % | pairs told apart, % | pair by pair |",
        "|---|---|---|---|---|---|",
    ]
    for row in evidence["rows"]:
        cells = (row["data"], row["row"], spread(row["mmit_mAP"]), spread(row["macro_mAP"]))
        lines.append(f"| {' | '.join((*cells, *_pair_cells(row)))} |")
    return "\n".join([*lines, "", *gate_table(evidence["gates"])])


def _pair_cells(row: Mapping[str, Any]) -> tuple[str, str]:
    """Mean pair accuracy, and the single pairs."""
    pairs_SP = np.asarray(row["pairs"], dtype=float)
    if not pairs_SP.size:
        return "-", "-"
    each = " / ".join(f"{100 * value:.0f}" for value in pairs_SP.mean(axis=0))
    return spread(pairs_SP.mean(axis=1)), each


def _draw(cfg: ClaimsConfig, jobs: Mapping[tuple[Entry, int], Job], found: Found) -> None:
    out, seed = Path(cfg.out), cfg.seeds[0]
    rows = {name: {e.row: x for e, x in found.items() if e.setting == name} for name in PARTS}
    quality = {
        name: [
            Bar(row, [item.result["mmit_mAP"] for item in items]) for row, items in group.items()
        ]
        for name, group in rows.items()
    }
    draw_bars(quality, out / "mAP.png", "mmit mAP on the test videos")
    for name in PARTS:
        runs = {e.row: jobs[e, seed].run_dir for e in TRAINED if e.setting == name}
        draw_training(runs, out / f"training_{name}.png")
    for name in ("order", "gap"):
        pairs = {
            title: [Bar(row, [i.pairs[spot] for i in items]) for row, items in rows[name].items()]
            for spot, title in enumerate(PAIR_NAMES[name])
        }
        draw_bars(pairs, out / f"pairs_{name}.png", "Opposite labels told apart", chance=0.5)
        method = jobs[Entry(name, "tin"), seed]
        draw_learned_offsets(method, out / f"offsets_{name}.png")
        draw_videos(method, rows[name]["tin"][0], out / f"videos_{name}.png")


def show(evidence: Mapping[str, Any]) -> None:
    """Print the rows and the gates."""
    table = Table(title=f"synthetic task, seeds {evidence['seeds']}")
    for name in ("data", "row", "mmit mAP", "macro mAP", "pairs", "pair by pair"):
        table.add_column(name)
    for row in evidence["rows"]:
        cells = (row["data"], row["row"], spread(row["mmit_mAP"]), spread(row["macro_mAP"]))
        table.add_row(*cells, *_pair_cells(row))
    console = Console()
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
