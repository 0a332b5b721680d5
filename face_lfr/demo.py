"""Loss and aggregation against their baselines on synthetic faces, with a report.

    python -m face_lfr.demo out=DIR [seeds=[0]]

Trains ArcFace and ArcNegFace on labels of which a share is random, and a quality network on what
the better of the two recognises; scores unseen persons, images and videos; writes `report.json`,
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
from face_lfr.drawing import draw_training
from face_lfr.evaluate import write_json
from face_lfr.report import draw_rates, draw_some_videos, gate, show_table, write_report
from face_lfr.scoring import (
    HEADLINE,
    TRACKS,
    Images,
    correlation,
    frames_of,
    measure_images,
    rates,
)
from face_lfr.suite import Job, train_all

BASELINE, METHOD, QUALITY = "arcface", "arcnegface", "qanpp"
CLAIM = (
    "ArcNegFace lets go of images with a wrong label, whose true class it no longer pushes away; "
    "frames weighted by a learned quality recognise a person better than their mean."
)


@dataclass
class Rule:
    """What passing means; see configs/demo.yaml."""

    gain: float = 0.0
    quality_gain: float = 0.02
    clean_tie: float = 0.02


@dataclass
class DemoConfig:
    """Schema of configs/demo.yaml."""

    out: str = "runs/demo/lfr"
    seeds: list[int] = field(default_factory=lambda: [0])
    noise: float = 0.3  # share of the training images with a random label
    steps: int = 700
    quality_steps: int = 400
    jobs: int = 2
    sizes: dict[str, int] = field(default_factory=dict)  # of the data set; usual when empty
    rule: Rule = field(default_factory=Rule)


ConfigStore.instance().store("lfr_demo_schema", DemoConfig)


def demo(cfg: DemoConfig) -> dict[str, Any]:
    """Train, score, draw; returns the content of `report.json`."""
    if not cfg.seeds:
        raise InputError("seeds", "needs at least one", list(cfg.seeds))
    start, out = time.perf_counter(), Path(cfg.out)
    jobs = {row: [_job(cfg, row, seed) for seed in cfg.seeds] for row in (BASELINE, METHOD)}
    jobs[QUALITY] = [_scorer(cfg, recogniser) for recogniser in jobs[METHOD]]
    train_all([job for row in jobs.values() for job in row], cfg.jobs)
    images = {row: [measure_images(job) for job in jobs[row]] for row in (BASELINE, METHOD)}
    videos: dict[str, list[dict[str, float]]] = {track: [] for track in TRACKS}
    correlations = []
    for number, (recogniser, scorer) in enumerate(zip(jobs[METHOD], jobs[QUALITY], strict=True)):
        for track in TRACKS:
            scored = frames_of(recogniser, {QUALITY: scorer}, track)
            videos[track].append(rates(scored))
            if track == TRACKS[0]:
                correlations.append(correlation(scored[QUALITY], recogniser.data / track))
                if number == 0:
                    draw_some_videos(scored[QUALITY], recogniser.data / track, out / "frames.png")
    report = judge(cfg.rule, images, videos) | {"quality_correlation": correlations}
    draw_rates({"image level": {name: row[0] for name, row in images.items()}}, out / "roc.png")
    draw_training({name: jobs[name][0].run_dir for name in images}, out / "training.png")
    report["seconds"] = round(time.perf_counter() - start, 1)
    write_json(out / "report.json", report)
    write_report(out / "report.md", report)
    show_table(report)
    return report


def _job(cfg: DemoConfig, row: str, seed: int) -> Job:
    out = Path(cfg.out)
    return Job(
        row, out / f"{row}_{seed}", out / "data" / f"seed_{seed}", seed, cfg.steps, cfg.noise,
        sizes=dict(cfg.sizes),
    )  # fmt: skip


def _scorer(cfg: DemoConfig, recogniser: Job) -> Job:
    run = Path(cfg.out) / f"{QUALITY}_{recogniser.seed}"
    return recogniser._replace(
        row=QUALITY, run_dir=run, steps=cfg.quality_steps, teacher=recogniser.run_dir
    )


def judge(
    rule: Rule,
    images: Mapping[str, Sequence[Images]],
    videos: Mapping[str, Sequence[Mapping[str, float]]],
) -> dict[str, Any]:
    """Apply the rule to the measured values."""
    value = {name: [item.tpr() for item in row] for name, row in images.items()}
    track = {
        (name, method): [row[method] for row in videos[name]]
        for name in TRACKS
        for method in ("mean_l2", "qanpp_l2")
    }
    bad, clean = (
        float(np.mean(track[name, "qanpp_l2"]) - np.mean(track[name, "mean_l2"])) for name in TRACKS
    )
    gain = float(np.mean(value[METHOD]) - np.mean(value[BASELINE]))
    gates = [
        gate("gain of ArcNegFace over ArcFace", gain, "above", rule.gain),
        gate("gain of QAN++ over the mean, bad frames", bad, "above", rule.quality_gain),
        gate("loss of QAN++ against the mean, clean frames", -clean, "at most", rule.clean_tie),
    ]
    return {
        "task": "lfr",
        "claim": CLAIM,
        "metric": f"TPR@FPR={HEADLINE:g}",
        "baseline": {"name": BASELINE, "values": value[BASELINE]},
        "method": {"name": METHOD, "values": value[METHOD]},
        "controls": [
            {"name": "videos with bad frames, mean", "values": track[TRACKS[0], "mean_l2"],
             "expected": "baseline of the next row"},
            {"name": "videos with bad frames, QAN++", "values": track[TRACKS[0], "qanpp_l2"],
             "expected": "better than the mean"},
            {"name": "clean videos, mean", "values": track[TRACKS[1], "mean_l2"],
             "expected": "baseline of the next row"},
            {"name": "clean videos, QAN++", "values": track[TRACKS[1], "qanpp_l2"],
             "expected": "as good as the mean"},
        ],
        "accuracy": {name: [item.accuracy for item in row] for name, row in images.items()},
        "false_accepts": {
            name: [[point.false_accepts for point in item.pairs.points] for item in row]
            for name, row in images.items()
        },
        "rule": gates,
        "passed": all(entry["passed"] for entry in gates),
    }  # fmt: skip


@hydra.main(version_base=None, config_path="configs", config_name="demo")
def main(cfg: DictConfig) -> None:
    setup_logging(rank=0)
    if not demo(cfg)["passed"]:  # type: ignore[arg-type]
        sys.exit(1)


if __name__ == "__main__":
    exit_on_bad_input(main)
