"""The sibling head against TSD on generated pictures, with a report.

    python -m detection_tsd.demo out=DIR [seeds=[0]]

Trains both on pictures whose objects are told apart by a small glyph and bounded by soft edges,
from the same bad proposals, for the same steps; scores unseen pictures; writes `report.json`,
`report.md` and pictures. Exits with 1 when the rule in configs/demo.yaml fails.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
import numpy as np
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from common.log import InputError, exit_on_bad_input, setup_logging
from detection_tsd.curves import draw_thresholds, draw_training
from detection_tsd.evaluate import write_json
from detection_tsd.examples import draw_examples
from detection_tsd.report import gate, show_table, write_report
from detection_tsd.scoring import Measured, measure
from detection_tsd.suite import DATA, Job, train_all

BASELINE, METHOD = "sibling", "tsd"
CLAIM = (
    "Class and box want features from different places: a head that shifts the proposal for the "
    "box and deforms it for the class finds better boxes than one that pools once."
)
PICTURES = {
    "thresholds.png": "AP against the IoU it asks for",
    "detections.png": "detections",
    "shifts.png": "where the two branches look",
    "training.png": "training",
}


@dataclass
class Rule:
    """What passing means; see configs/demo.yaml."""

    gain: float = 0.01
    baseline_ap50: float = 0.9
    correlation: float = 0.5


@dataclass
class DemoConfig:
    """Schema of configs/demo.yaml."""

    out: str = "runs/demo/tsd"
    seeds: list[int] = field(default_factory=lambda: [0])
    kind: str = "glyphs"  # of the pictures: glyphs | digits | centred, see `suite.DATA`
    steps: int = 2000
    jobs: int = 2
    sizes: dict[str, int] = field(default_factory=dict)  # of the data set; usual when empty
    rule: Rule = field(default_factory=Rule)


ConfigStore.instance().store("tsd_demo_schema", DemoConfig)


def demo(cfg: DemoConfig) -> dict[str, Any]:
    """Train, score, draw; returns the content of `report.json`."""
    if not cfg.seeds:
        raise InputError("seeds", "needs at least one", list(cfg.seeds))
    if cfg.kind not in DATA:
        raise InputError("kind", f"must be one of {', '.join(DATA)}", cfg.kind)
    start, out = time.perf_counter(), Path(cfg.out)
    jobs = {row: [_job(cfg, row, seed) for seed in cfg.seeds] for row in (METHOD, BASELINE)}
    train_all([job for row in jobs.values() for job in row], cfg.jobs)
    found = {row: [measure(job) for job in jobs[row]] for row in (BASELINE, METHOD)}
    report = judge(cfg.rule, found)
    curves = {row: np.stack([item.curve for item in items]) for row, items in found.items()}
    draw_thresholds({cfg.kind: curves}, out / "thresholds.png", "Unseen pictures")
    draw_training({row: jobs[row][0].run_dir for row in found}, out / "training.png")
    draw_examples({row: jobs[row][0] for row in found}, out)
    report["seconds"] = round(time.perf_counter() - start, 1)
    write_json(out / "report.json", report)
    write_report(out / "report.md", report, PICTURES)
    show_table(report)
    return report


def _job(cfg: DemoConfig, row: str, seed: int) -> Job:
    out = Path(cfg.out)
    data, run = out / "data" / f"{cfg.kind}_{seed}", out / f"{cfg.kind}_{row}_{seed}"
    return Job(row, run, data, cfg.kind, seed, cfg.steps, dict(cfg.sizes))


def judge(rule: Rule, found: Mapping[str, Sequence[Measured]]) -> dict[str, Any]:
    """Apply the rule to the measured values."""
    value = {row: [item.ap for item in items] for row, items in found.items()}
    gain = float(np.mean(value[METHOD]) - np.mean(value[BASELINE]))
    ap50 = [item.scores.summary["AP50"] for item in found[BASELINE]]
    probes = [item.probe for item in found[METHOD] if item.probe is not None]
    known = float(np.mean([probe.correlation for probe in probes]))
    gates = [
        gate("AP of TSD above AP of the sibling head", gain, "at least", rule.gain),
        gate("AP50 of the sibling head", float(np.mean(ap50)), "at least", rule.baseline_ap50),
        gate("correlation of shift and true error", known, "at least", rule.correlation),
    ]
    return {
        "task": "tsd",
        "claim": CLAIM,
        "metric": "AP",
        "baseline": {"name": BASELINE, "values": value[BASELINE]},
        "method": {"name": METHOD, "values": value[METHOD]},
        "controls": [
            {"name": "sibling, AP50", "values": ap50, "expected": "it finds the objects"},
            {"name": "sibling, AP90", "values": _at(found[BASELINE], "AP90"),
             "expected": "baseline of the next row"},
            {"name": "tsd, AP90", "values": _at(found[METHOD], "AP90"),
             "expected": "the gain is largest where boxes must be exact"},
            {"name": "centre error of the proposals", "values": [probe.before for probe in probes],
             "expected": "in widths and heights of the proposal"},
            {"name": "after the shift", "values": [probe.after for probe in probes],
             "expected": "smaller"},
        ],
        "parameters": {row: list(items[0].parameters) for row, items in found.items()},
        "rule": gates,
        "passed": all(entry["passed"] for entry in gates),
    }  # fmt: skip


def _at(items: Sequence[Measured], threshold: str) -> list[float]:
    return [item.scores.by_threshold[threshold] for item in items]


@hydra.main(version_base=None, config_path="configs", config_name="demo")
def main(cfg: DictConfig) -> None:
    setup_logging(rank=0)
    if not demo(cfg)["passed"]:  # type: ignore[arg-type]
        sys.exit(1)


if __name__ == "__main__":
    exit_on_bad_input(main)
