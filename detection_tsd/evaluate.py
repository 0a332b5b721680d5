"""Evaluate a run, a release file, or the result file of any other system.

    python -m detection_tsd.evaluate run_dir=DIR                     the run's own validation set
    python -m detection_tsd.evaluate checkpoint=FILE data=coco data.root=DIR
    python -m detection_tsd.evaluate protocol=coco predictions=dets.json annotations=instances.json
    python -m detection_tsd.evaluate protocol=openimages predictions=dets.csv \
        annotations=boxes.csv image_labels=labels.csv hierarchy=h.json classes=c.csv

Prints a table, writes `metrics.json` into `out`, with the detections of a model beside it.
"""

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from common import dist, rundir
from common.log import InputError, exit_on_bad_input, setup_logging
from detection_tsd.protocols import coco, openimages

PROTOCOLS = {"coco": coco, "openimages": openimages}


@dataclass
class EvalConfig:
    """Schema of configs/eval.yaml."""

    protocol: str = "coco"  # coco | openimages
    run_dir: str | None = None
    checkpoint: str | None = None
    predictions: str | None = None  # COCO's JSON, or a CSV of Open Images
    annotations: str | None = None  # of `predictions`; null: the annotation file of the data set
    image_labels: str | None = None  # openimages: CSV of verified image labels
    hierarchy: str | None = None  # openimages: JSON
    classes: str | None = None  # openimages: CSV of MIDs and names
    compat: str | None = None  # openimages: tsd_repo repeats the evaluator of Sense-X/TSD
    group_weight: float = 1.0  # openimages: of a group-of box
    expand_annotations: bool = True  # openimages: copy objects to the parents of their class
    expand_predictions: Any = False  # openimages: true | false | nms
    unknown_images: str = "error"  # openimages, detections of an image without labels: error | drop
    duplicates: str = "error"  # openimages, a row that comes twice: error | drop | keep
    masks: bool = False  # coco: score masks as well
    data: Any = None  # set to test on, a node with `val`; the run's own when null
    post: dict[str, Any] = field(default_factory=dict)  # replaces arguments of PostProcess
    views: Any = None  # [[long, short], ...] in pixels: test at several scales, averaged
    flip: bool = False  # also the mirror image of every view
    out: str = "runs/tsd/evaluation"
    batch: int = 1
    workers: int = 4
    precision: str = "float32"
    device: str = "auto"


ConfigStore.instance().store("tsd_eval_schema", EvalConfig)


def evaluate(cfg: EvalConfig) -> dict[str, Any]:
    """Score what `cfg` names; returns what `metrics.json` holds.

    Raises:
        InputError: nothing to evaluate, an unknown name, or bad content; the message names it.
    """
    if cfg.protocol not in PROTOCOLS:
        raise InputError("protocol", f"must be one of {', '.join(PROTOCOLS)}", cfg.protocol)
    names = ("run_dir", "checkpoint", "predictions")
    given = [name for name in names if getattr(cfg, name)]
    if len(given) != 1:
        raise InputError(", ".join(names), "give exactly one of them", given)
    world, start = dist.init(cfg.device), time.perf_counter()
    if world.main:
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
    dist.barrier()
    result = {"protocol": cfg.protocol, **_known(PROTOCOLS[cfg.protocol](cfg, world))}
    here = rundir.environment()
    result |= {
        "seconds": round(time.perf_counter() - start, 3),
        "device": str(world.device) if world.device.type == "cpu" else here["device"],
        "commit": here["git"]["revision"],
        "versions": here["versions"],
    }
    if world.main:
        write_json(Path(cfg.out) / "metrics.json", result)
    return result


def _known(scores: Any) -> Any:
    """The same with None for shares that are not defined: JSON has no NaN."""
    if isinstance(scores, dict):
        return {name: _known(value) for name, value in scores.items()}
    return None if isinstance(scores, float) and math.isnan(scores) else scores


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1, default=_plain))
    temporary.replace(path)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def show(result: dict[str, Any]) -> None:
    """Print the scores with the counts they stand on."""
    console = Console()
    table = Table("measure", "value")
    for group in ("bbox", "segm", "scores"):
        prefix = "mask " if group == "segm" else ""
        for name, value in result.get(group, {}).items():
            shown = "no such objects" if value is None else f"{100 * value:.2f} %"
            table.add_row(prefix + name, shown)
    for name, value in result.get("counts", {}).items():
        table.add_row(name, str(value))
    console.print(table)
    for name, value in result.get("notes", {}).items():
        console.print(f"{name}: {value}")


@hydra.main(version_base=None, config_path="configs", config_name="eval")
def main(cfg: DictConfig) -> None:
    world = dist.init(cfg.device)
    setup_logging(world.rank)
    result = evaluate(cfg)  # type: ignore[arg-type]
    if world.main:
        show(result)
    dist.shutdown()


if __name__ == "__main__":
    exit_on_bad_input(main)
