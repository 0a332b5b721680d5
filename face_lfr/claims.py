"""The full evidence on synthetic faces: every loss, aggregator and control, several fresh seeds.

    python -m face_lfr.claims out=DIR

Image level: softmax, ArcFace and ArcNegFace with none, three tenths and six tenths of the labels
random, the last also with a softer margin; a small PolyFace beside the small ResNet of the same
cost. Video level: all aggregators on the features of one frozen recogniser, for videos with and
without bad frames. Resumable: finished trainings are only scored again. Writes
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
from face_lfr.benchmarks.results import FOLDER, hardware, slug
from face_lfr.drawing import Bar, draw_bars, draw_training
from face_lfr.evaluate import write_json
from face_lfr.report import (
    draw_rates,
    draw_some_videos,
    gate,
    gate_line,
    gate_table,
    spread,
)
from face_lfr.scoring import (
    AGGREGATORS,
    FPRS,
    HEADLINE,
    TRACKS,
    Images,
    correlation,
    frames_of,
    measure_images,
    rates,
)
from face_lfr.suite import Job, train_all


class Entry(NamedTuple):
    """One recogniser: a row of configs/experiment/synth, and the share of random labels."""

    row: str
    noise: float


LOSSES, NOISES = ("softmax", "arcface", "arcnegface"), (0.0, 0.3, 0.6)
TRAINED = (
    *(Entry(loss, noise) for noise in NOISES for loss in LOSSES),
    *(Entry(loss, 0.6) for loss in ("arcface_soft", "arcnegface_soft")),
    Entry("polyface_nano", 0.0),
)
TEACHER = Entry("arcface", 0.0)  # whose features the videos are compared by
SCORERS = ("qanpp", "qan")


@dataclass
class Gates:
    """Limits; see configs/claims.yaml."""

    noise30_gain: float = 0.0
    quality_gain_every_seed: float = 0.02
    quality_clean_difference: float = 0.02


@dataclass
class ClaimsConfig:
    """Schema of configs/claims.yaml."""

    out: str = "runs/claims/lfr"
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    steps: int = 700
    quality_steps: dict[str, int] = field(default_factory=dict)  # of each quality network
    jobs: int = 2
    readme: str | None = "face_lfr/README.md"
    results: str = str(FOLDER)
    gates: Gates = field(default_factory=Gates)


ConfigStore.instance().store("lfr_claims_schema", ClaimsConfig)

Found = dict[Entry, list[Images]]
Videos = dict[str, dict[str, list[float]]]  # track -> aggregator -> one rate a seed


def claims(cfg: ClaimsConfig) -> dict[str, Any]:
    """Train what is not trained yet, score everything, write the evidence; returns it."""
    if len(cfg.seeds) < 1:
        raise InputError("seeds", "needs at least one", list(cfg.seeds))
    start, out = time.perf_counter(), Path(cfg.out)
    jobs = {(entry, seed): _job(cfg, entry, seed) for seed in cfg.seeds for entry in TRAINED}
    scorers = {(row, seed): _scorer(cfg, row, seed) for seed in cfg.seeds for row in SCORERS}
    train_all([*jobs.values(), *scorers.values()], cfg.jobs)
    found: Found = {e: [measure_images(jobs[e, seed]) for seed in cfg.seeds] for e in TRAINED}
    videos: Videos = {track: {name: [] for name in AGGREGATORS} for track in TRACKS}
    correlations = []
    for seed in cfg.seeds:
        for track in TRACKS:
            networks = {row: scorers[row, seed] for row in SCORERS}
            recogniser = jobs[TEACHER, seed]
            scored = frames_of(recogniser, networks, track)
            for name, rate in rates(scored).items():
                videos[track][name].append(rate)
            if track == TRACKS[0]:
                where = recogniser.data / track
                correlations.append({row: correlation(scored[row], where) for row in SCORERS})
                if seed == cfg.seeds[0]:
                    draw_some_videos(scored["qanpp"], where, out / "frames.png")
    evidence = {
        "hardware": hardware(torch.get_num_threads()),
        "versions": rundir.environment()["versions"],
        "seeds": list(cfg.seeds),
        "steps": cfg.steps,
        "quality_steps": dict(cfg.quality_steps),
        "rows": [_row(entry, items) for entry, items in found.items()],
        "videos": videos,
        "quality_correlation": correlations,
        "gates": judge(cfg.gates, tprs(found), videos),
        "seconds": round(time.perf_counter() - start, 1),
    }
    evidence["passed"] = all(entry["passed"] for entry in evidence["gates"])
    Path(cfg.results).mkdir(parents=True, exist_ok=True)
    write_json(Path(cfg.results) / f"claims-{slug(evidence['hardware'])}.json", evidence)
    write_json(out / "claims.json", evidence)
    if cfg.readme is not None:
        write_readme(Path(cfg.readme), evidence)
    _draw(cfg, jobs, found, videos)
    return evidence


def _job(cfg: ClaimsConfig, entry: Entry, seed: int) -> Job:
    out = Path(cfg.out)
    run = out / "runs" / f"{entry.row}_{entry.noise:g}_{cfg.steps}_{seed}"
    return Job(entry.row, run, out / "data" / str(seed), seed, cfg.steps, entry.noise)


def _scorer(cfg: ClaimsConfig, row: str, seed: int) -> Job:
    teacher, steps = _job(cfg, TEACHER, seed), cfg.quality_steps[row]
    run = Path(cfg.out) / "runs" / f"{row}_{steps}_{cfg.steps}_{seed}"
    return teacher._replace(row=row, run_dir=run, steps=steps, teacher=teacher.run_dir)


def _row(entry: Entry, items: list[Images]) -> dict[str, Any]:
    points = [item.pairs.points for item in items]
    return {
        "row": entry.row,
        "noise": entry.noise,
        "tpr": {f"{rate:g}": [row[i].tpr for row in points] for i, rate in enumerate(FPRS)},
        "interval": {
            f"{rate:g}": [row[i].interval for row in points] for i, rate in enumerate(FPRS)
        },
        "false_accepts": {
            f"{rate:g}": [row[i].false_accepts for row in points] for i, rate in enumerate(FPRS)
        },
        "accuracy": [item.accuracy for item in items],
    }


def tprs(found: Mapping[Entry, list[Images]]) -> dict[Entry, list[float]]:
    """Rates at `HEADLINE`, one a seed."""
    return {entry: [item.tpr() for item in items] for entry, items in found.items()}


def judge(
    gates: Gates, tpr: Mapping[Entry, list[float]], videos: Mapping[str, Mapping[str, list[float]]]
) -> list[dict[str, Any]]:
    """Compare with the limits: means over the seeds, for one gate the worst seed."""
    neg, arc = (np.mean(tpr[Entry(loss, 0.3)]) for loss in ("arcnegface", "arcface"))
    bad, clean = (
        np.subtract(videos[track]["qanpp_l2"], videos[track]["mean_l2"]) for track in TRACKS
    )
    value = {
        "noise30_gain": (float(neg - arc), "above"),
        "quality_gain_every_seed": (float(bad.min()), "above"),
        "quality_clean_difference": (float(abs(clean.mean())), "at most"),
    }
    names = [entry.name for entry in fields(Gates)]
    return [gate(name, *value[name], getattr(gates, name)) for name in names]


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
    """Rows, aggregators and gates as Markdown tables."""
    seeds = ", ".join(str(seed) for seed in evidence["seeds"])
    rates_asked = [f"{rate:g}" for rate in FPRS]
    lines = [
        f"{evidence['steps']} steps; seeds {seeds}; mean ± standard deviation; "
        f"{evidence['hardware']}. TPR in %, in brackets the false accepts it stands on.",
        "",
        "| random labels | row | " + " | ".join(f"TPR@{r}" for r in rates_asked) + " | 10-fold |",
        "|---|---|---|---|---|---|",
    ]
    for row in evidence["rows"]:
        lines.append("| " + " | ".join(_cells(row, rates_asked)) + " |")
    lines += ["", f"| videos, TPR@{HEADLINE:g} | half of the frames bad | clean |", "|---|---|---|"]
    for name in AGGREGATORS:
        both = (spread(evidence["videos"][track][name]) for track in TRACKS)
        lines.append(f"| {name} | {' | '.join(both)} |")
    known = {row: [seed[row] for seed in evidence["quality_correlation"]] for row in SCORERS}
    said = "; ".join(f"{row} {np.mean(values):.2f}" for row, values in known.items())
    lines += ["", f"Correlation of learned and true quality of a frame: {said}."]
    return "\n".join([*lines, "", *gate_table(evidence["gates"])])


def _cells(row: Mapping[str, Any], asked: list[str]) -> list[str]:
    found = [
        f"{spread(row['tpr'][rate])} ({np.mean(row['false_accepts'][rate]):.0f})" for rate in asked
    ]
    return [f"{row['noise']:g}", row["row"], *found, spread(row["accuracy"])]


def _draw(
    cfg: ClaimsConfig, jobs: Mapping[tuple[Entry, int], Job], found: Found, videos: Videos
) -> None:
    out, seed = Path(cfg.out), cfg.seeds[0]
    groups = {
        f"{100 * noise:.0f} % of the labels random": {
            e.row: items for e, items in found.items() if e.noise == noise
        }
        for noise in NOISES
    }
    curves = {title: {row: x[0] for row, x in group.items()} for title, group in groups.items()}
    draw_rates(curves, out / "roc.png")
    bars = {
        title: [Bar(row, [item.tpr() for item in items]) for row, items in group.items()]
        for title, group in groups.items()
    }
    draw_bars(bars, out / "losses.png", f"TPR at FPR {HEADLINE:g}, unseen persons")
    tracks = {
        title: [Bar(name, values) for name, values in videos[track].items()]
        for title, track in zip(("half of the frames bad", "clean"), TRACKS, strict=True)
    }
    draw_bars(tracks, out / "videos.png", f"TPR at FPR {HEADLINE:g}, videos of unseen persons")
    for noise in NOISES:
        runs = {e.row: jobs[e, seed].run_dir for e in TRAINED if e.noise == noise}
        draw_training(runs, out / f"training_{noise:g}.png")


def show(evidence: Mapping[str, Any]) -> None:
    """Print the rows, the aggregators and the gates."""
    asked = [f"{rate:g}" for rate in FPRS]
    console = Console()
    table = Table(title=f"synthetic faces, seeds {evidence['seeds']}")
    for name in ("random labels", "row", *(f"TPR@{rate}" for rate in asked), "10-fold"):
        table.add_column(name)
    for row in evidence["rows"]:
        table.add_row(*_cells(row, asked))
    console.print(table)
    table = Table("videos", "half of the frames bad", "clean")
    for name in AGGREGATORS:
        table.add_row(name, *(spread(evidence["videos"][track][name]) for track in TRACKS))
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
