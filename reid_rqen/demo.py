"""Baseline against method on generated data: `python -m reid_rqen.demo out=DIR seeds=[0]`.

Generates people whose body regions are covered independently of each other, trains region mean
pooling (`rqen_fixed1`) and the paper's method (`rqen`) for the same steps, and writes
`report.json`, `report.md` and pictures. Exits with 1 when the rule in configs/demo.yaml fails.
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
from reid_rqen.evaluate import write_json
from reid_rqen.report import (
    Curve,
    draw_cmc,
    draw_tracklets,
    draw_training,
    show_table,
    write_report,
)
from reid_rqen.suite import Job, Measured, measure, train_all

BASELINE, METHOD = "rqen_fixed1", "rqen"
CLAIM = (
    "One quality score per body region and frame finds the right person more often than the plain "
    "mean over the frames, when regions are covered independently."
)


@dataclass
class Rule:
    """What passing means; see configs/demo.yaml."""

    gain: float = 0.12
    auc: float = 0.75


@dataclass
class DemoConfig:
    """Schema of configs/demo.yaml."""

    out: str = "runs/demo/rqen"
    seeds: list[int] = field(default_factory=lambda: [0])
    steps: int = 500
    jobs: int = 2
    rule: Rule = field(default_factory=Rule)


ConfigStore.instance().store("rqen_demo_schema", DemoConfig)


def demo(cfg: DemoConfig) -> dict[str, Any]:
    """Train, score, draw; returns the content of `report.json`."""
    if not cfg.seeds:
        raise InputError("seeds", "needs at least one", list(cfg.seeds))
    start, out = time.perf_counter(), Path(cfg.out)
    jobs = {
        (name, seed): Job(
            name, out / f"{name}_{seed}", out / "data" / f"seed_{seed}", seed, cfg.steps, {}
        )
        for seed in cfg.seeds
        for name in (BASELINE, METHOD)
    }
    train_all(list(jobs.values()), cfg.jobs)
    found = {key: measure(job) for key, job in jobs.items()}
    # The cheap control needs no training: the method's own network with every score set to 1.
    off = [measure(jobs[METHOD, seed], fixed_scores=True) for seed in cfg.seeds]
    report = judge(cfg, found, off)
    _draw(cfg, jobs, found, off)
    report["seconds"] = round(time.perf_counter() - start, 1)
    write_json(out / "report.json", report)
    write_report(out / "report.md", report)
    show_table(report)
    return report


def judge(
    cfg: DemoConfig, found: dict[tuple[str, int], Measured], off: list[Measured]
) -> dict[str, Any]:
    """Apply the rule to the measured values."""
    value = {
        name: [found[name, seed].result["cmc@1"] for seed in cfg.seeds]
        for name in (BASELINE, METHOD)
    }
    control = [item.result["cmc@1"] for item in off]
    auc = np.mean([found[METHOD, seed].auc or (0.5,) * 3 for seed in cfg.seeds], axis=0)
    gain = float(np.mean(value[METHOD]) - np.mean(value[BASELINE]))
    lost = float(np.mean(value[METHOD]) - np.mean(control))
    return {
        "task": "rqen",
        "claim": CLAIM,
        "metric": "cmc@1",
        "baseline": {"name": BASELINE, "values": value[BASELINE]},
        "method": {"name": METHOD, "values": value[METHOD]},
        "controls": [
            {
                "name": "rqen, scores set to 1 at test",
                "values": control,
                "expected": "below the method",
            }
        ],
        "rule": {
            "gain": {"value": gain, "least": cfg.rule.gain},
            "smallest region AUC": {"value": float(auc.min()), "least": cfg.rule.auc},
            "loss without scores": {"value": lost, "least": 0.0},
        },
        "mAP": {name: [found[name, seed].result["mAP"] for seed in cfg.seeds] for name in value},
        "auc": auc.tolist(),
        "passed": bool(gain >= cfg.rule.gain and auc.min() >= cfg.rule.auc and lost > 0),
    }


def _draw(
    cfg: DemoConfig,
    jobs: dict[tuple[str, int], Job],
    found: dict[tuple[str, int], Measured],
    off: list[Measured],
) -> None:
    out, seed = Path(cfg.out), cfg.seeds[0]
    curves = [
        Curve(name, [found[name, s].result["cmc_curve"] for s in cfg.seeds])
        for name in (BASELINE, METHOD)
    ]
    curves.append(Curve("rqen, scores set to 1", [item.result["cmc_curve"] for item in off]))
    draw_cmc(curves, out / "cmc.png")
    draw_training(
        {name: jobs[name, seed].run_dir for name in (BASELINE, METHOD)}, out / "training.png"
    )
    draw_tracklets(jobs[METHOD, seed], out / "scores.png")


@hydra.main(version_base=None, config_path="configs", config_name="demo")
def main(cfg: DictConfig) -> None:
    setup_logging(rank=0)
    if not demo(cfg)["passed"]:  # type: ignore[arg-type]
        sys.exit(1)


if __name__ == "__main__":
    exit_on_bad_input(main)
