"""Evaluate a run, a release file, or features of any other system.

    python -m face_lfr.evaluate run_dir=DIR                                  *.bin beside its data
    python -m face_lfr.evaluate run_dir=DIR annotations=lfw.bin
    python -m face_lfr.evaluate protocol=all_pairs run_dir=DIR images=DIR fpr=[1e-8]
    python -m face_lfr.evaluate protocol=all_pairs features=f.npy labels=l.npy fpr=[1e-8]
    python -m face_lfr.evaluate protocol=verification features=f.npy annotations=lfw.bin
    python -m face_lfr.evaluate protocol=template checkpoint=FILE annotations=IJBC_DIR
    python -m face_lfr.evaluate protocol=video run_dir=DIR quality=DIR images=DIR method=qanpp
    python -m face_lfr.evaluate protocol=video features=f.npy quality=q.npy images=images.txt \
        annotations=videos.txt labels=labels.txt method=qanpp

Prints a table and writes `metrics.json` into `out`, with the features of a model beside it.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from common import dist, rundir
from common.log import InputError, exit_on_bad_input, setup_logging
from face_lfr.protocols import all_pairs, template, verification, video


@dataclass
class EvalConfig:
    """Schema of configs/eval.yaml."""

    protocol: str = "verification"  # all_pairs | verification | template | video
    run_dir: str | None = None  # recogniser
    checkpoint: str | None = None
    features: str | None = None  # .npy (N, D) instead of a recogniser
    quality: str | None = None  # video: run or release of a quality network, or numbers of frames
    annotations: Any = None  # .bin file(s), IJB folder, or list of videos
    images: str | None = None  # folder of an image or video track, or list of frames
    labels: str | None = None  # .npy or text, one whole number a row; -1 is a distractor
    fpr: Any = None  # false positive rates; null: 1e-8 for images, 1e-4 for videos
    pairs: str = "all"  # all | gallery_probe
    method: str = "mean_l2"  # how frames make a video; see face_lfr.aggregate
    frame_norm: str | None = None  # none | l2 in the place of the method's own choice
    ijb: str = "ijbc"  # ijbb | ijbc
    keep_norm: bool = True  # IJB: images keep the length of their features (N1)
    detector_score: bool = True  # IJB: images weigh as much as their detector was sure (D1)
    concatenated: bool = False  # IJB: features are (N, 2 D), the mirror image's beside the image's
    flip: bool = True  # mean of the features of image and mirror image
    submission: bool = False  # also write the features as the challenge's matrix file
    out: str = "runs/lfr/evaluation"
    batch: int = 128
    workers: int = 4
    precision: str = "float32"
    device: str = "auto"


ConfigStore.instance().store("lfr_eval_schema", EvalConfig)

Protocol = Callable[[EvalConfig, dist.World], dict[str, Any]]
PROTOCOLS: dict[str, Protocol] = {
    "all_pairs": all_pairs,
    "verification": verification,
    "template": template,
    "video": video,
}


def evaluate(cfg: EvalConfig) -> dict[str, Any]:
    """Score what `cfg` names; returns what `metrics.json` holds.

    Raises:
        InputError: nothing to evaluate, an unknown name, or bad content; the message names it.
    """
    if cfg.protocol not in PROTOCOLS:
        raise InputError("protocol", f"must be one of {', '.join(PROTOCOLS)}", cfg.protocol)
    names = ("run_dir", "checkpoint", "features")
    given = [name for name in names if getattr(cfg, name)]
    if len(given) != 1:
        raise InputError(", ".join(names), "give exactly one of them", given)
    world, start = dist.init(cfg.device), time.perf_counter()
    result = {"protocol": cfg.protocol, **PROTOCOLS[cfg.protocol](cfg, world)}
    here = rundir.environment()
    result |= {
        "seconds": round(time.perf_counter() - start, 3),
        "device": str(world.device) if world.device.type == "cpu" else here["device"],
        "commit": here["git"]["revision"],
        "versions": here["versions"],
    }
    if world.main:
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        write_json(Path(cfg.out) / "metrics.json", result)
    return result


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
    points = result.get("points", [])
    if points:
        table = Table("FPR", "TPR, %", "95 %, Wilson", "false accepts", "threshold")
        for point in points:
            low, high = point["interval"]
            table.add_row(
                f"{point['fpr']:g}", f"{100 * point['tpr']:.3f}",
                f"{100 * low:.3f} to {100 * high:.3f}", str(point["false_accepts"]),
                "every pair" if point["threshold"] is None else f"{point['threshold']:.4f}",
            )  # fmt: skip
        console.print(table)
    table = Table("measure", "value")
    for name, value in result.items():
        if isinstance(value, int | float) and name not in ("seconds", "commit"):
            shown = f"{value:.6g}" if isinstance(value, float) else str(value)
            table.add_row(name, shown)
    console.print(table)


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
