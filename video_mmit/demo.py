"""Baseline against method on generated data: `python -m video_mmit.demo out=DIR seeds=[0]`.

Generates videos half of whose labels are told by the order of the frames alone, trains TSN and TIN
for the same steps, and writes `report.json`, `report.md` and pictures. Exits with 1 when the rule
in configs/demo.yaml fails.
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
import numpy as np
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from common.log import InputError, exit_on_bad_input, setup_logging
from video_mmit.evaluate import write_json
from video_mmit.report import (
    Bar,
    draw_bars,
    draw_learned_offsets,
    draw_training,
    draw_videos,
    gate,
    show_table,
    write_report,
)
from video_mmit.suite import PAIR_NAMES, Job, Measured, measure, train_all

PART, BASELINE, METHOD = "order", "tsn", "tin"
CLAIM = (
    "Temporal interlacing lets a network of single frames see the order of the frames; the mean "
    "over the frames alone (TSN) stays at chance where only the order decides."
)


@dataclass
class Rule:
    """What passing means; see configs/demo.yaml."""

    gain: float = 0.10
    method_pair: float = 0.70
    baseline_pair_off_chance: float = 0.08
    shuffled_gain: float = 0.03


@dataclass
class DemoConfig:
    """Schema of configs/demo.yaml."""

    out: str = "runs/demo/mmit"
    seeds: list[int] = field(default_factory=lambda: [0])
    steps: int = 600
    jobs: int = 2
    videos: dict[str, int] = field(default_factory=dict)  # train, val: how many; usual when empty
    rule: Rule = field(default_factory=Rule)


ConfigStore.instance().store("mmit_demo_schema", DemoConfig)

Found = dict[str, list[Measured]]  # row -> one entry a seed


def demo(cfg: DemoConfig) -> dict[str, Any]:
    """Train, score, draw; returns the content of `report.json`."""
    if not cfg.seeds:
        raise InputError("seeds", "needs at least one", list(cfg.seeds))
    start, out = time.perf_counter(), Path(cfg.out)
    jobs = {row: [_job(cfg, row, seed) for seed in cfg.seeds] for row in (BASELINE, METHOD)}
    train_all([job for row in jobs.values() for job in row], cfg.jobs)
    found: Found = {name: [measure(job) for job in row] for name, row in jobs.items()}
    # The control needs no training: the method's network sees the frames in a random order.
    found["shuffled"] = [measure(job, shuffle=True) for job in jobs[METHOD]]
    report = judge(cfg.rule, found)
    _draw(out, {name: row[0] for name, row in jobs.items()}, found)
    report["seconds"] = round(time.perf_counter() - start, 1)
    write_json(out / "report.json", report)
    write_report(out / "report.md", report)
    show_table(report)
    return report


def _job(cfg: DemoConfig, row: str, seed: int) -> Job:
    out = Path(cfg.out)
    data = out / "data" / f"seed_{seed}"
    return Job(PART, row, out / f"{row}_{seed}", data, seed, cfg.steps, dict(cfg.videos))


def judge(rule: Rule, found: Found) -> dict[str, Any]:
    """Apply the rule to the measured values."""
    value = {name: [item.result["mmit_mAP"] for item in row] for name, row in found.items()}
    mean = {name: float(np.mean(values)) for name, values in value.items()}
    pair = {name: [item.pair for item in row] for name, row in found.items()}
    gates = [
        gate("gain in mmit_mAP", mean[METHOD] - mean[BASELINE], "at least", rule.gain),
        gate("pair accuracy of TIN", float(np.mean(pair[METHOD])), "at least", rule.method_pair),
        gate(
            "distance of TSN's pair accuracy from chance",
            abs(float(np.mean(pair[BASELINE])) - 0.5), "at most", rule.baseline_pair_off_chance,
        ),
        gate(
            "gain left with shuffled frames",
            mean["shuffled"] - mean[BASELINE], "at most", rule.shuffled_gain,
        ),
    ]  # fmt: skip
    return {
        "task": "mmit",
        "claim": CLAIM,
        "metric": "mmit_mAP",
        "baseline": {"name": BASELINE, "values": value[BASELINE]},
        "method": {"name": METHOD, "values": value[METHOD]},
        "controls": [
            {
                "name": "tin, frames shuffled at test",
                "values": value["shuffled"],
                "expected": "no better than the baseline",
            }
        ],
        "rule": gates,
        "pair_accuracy": pair,
        "macro_mAP": {n: [item.result["macro_mAP"] for item in row] for n, row in found.items()},
        "passed": all(entry["passed"] for entry in gates),
    }


def _draw(out: Path, jobs: dict[str, Job], found: Found) -> None:
    groups = {
        title: [Bar(name, [item.pairs[i] for item in row]) for name, row in found.items()]
        for i, title in enumerate(PAIR_NAMES[PART])
    }
    draw_bars(groups, out / "pairs.png", "Opposite labels told apart, % of videos", chance=0.5)
    draw_training({name: job.run_dir for name, job in jobs.items()}, out / "training.png")
    draw_videos(jobs[METHOD], found[METHOD][0], out / "videos.png")
    draw_learned_offsets(jobs[METHOD], out / "offsets.png")


@hydra.main(version_base=None, config_path="configs", config_name="demo")
def main(cfg: DictConfig) -> None:
    setup_logging(rank=0)
    if not demo(cfg)["passed"]:  # type: ignore[arg-type]
        sys.exit(1)


if __name__ == "__main__":
    exit_on_bad_input(main)
