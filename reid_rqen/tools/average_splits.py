"""Mean and standard deviation of evaluations over the splits of PRID 2011 or iLIDS-VID.

    python -m reid_rqen.tools.average_splits metrics=[a/metrics.json,b/metrics.json] out=DIR

The published numbers of both sets are means of ten half splits; one split is not comparable with
them. Reads what `evaluate` wrote, writes `metrics.json` with the number of splits into `out`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
import numpy as np
from hydra.core.config_store import ConfigStore
from rich.console import Console
from rich.table import Table

from common import rundir
from common.log import InputError, exit_on_bad_input, get_logger, setup_logging

# What must agree, or the numbers do not measure the same thing.
SETTINGS = (
    "protocol",
    "metric",
    "rerank",
    "trained_on",
    "evaluated_on",
    "max_frames",
    "fixed_scores",
)
COUNTS = ("queries", "valid", "skipped", "gallery", "frames")
PUBLISHED = 10


def average(paths: Sequence[Path]) -> dict[str, Any]:
    """Average the scores of evaluations that differ in nothing but the split.

    Returns:
        The settings they share, the mean of every score under its own name, `std` (sample
        standard deviation), `values` and the counts (one entry per split), `splits`,
        `splits_averaged`.

    Raises:
        InputError: fewer than two files, one that `evaluate` did not write for a single split,
            different settings, or a split that occurs twice.
    """
    if len(paths) < 2:
        raise InputError("metrics", "needs the files of at least two splits", len(paths))
    parts = [_read(path) for path in paths]
    for path, part in zip(paths, parts, strict=True):
        for name in SETTINGS:
            if part.get(name) != parts[0].get(name):
                what = f"{name} differs from {parts[0].get(name)} of {paths[0]}"
                raise InputError(path, what, part.get(name))
    splits = [part["split"] for part in parts]
    for row, split in enumerate(splits):
        if split in splits[:row]:
            raise InputError(paths[row], f"same split as {paths[splits.index(split)]}", split)
    values = {name: [part[name] for part in parts] for name in _scores(parts[0])}
    shared = {name: parts[0].get(name) for name in SETTINGS}
    return {
        **shared,
        **{name: float(np.mean(column)) for name, column in values.items()},
        "std": {name: float(np.std(column, ddof=1)) for name, column in values.items()},
        "values": values,
        "cmc_curve": np.mean([part["cmc_curve"] for part in parts], axis=0).tolist(),
        **{name: [part.get(name) for part in parts] for name in (*COUNTS, "seed", "commit")},
        "splits": splits,
        "splits_averaged": len(parts),
        "files": [str(path) for path in paths],
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(path, "cannot be read as JSON", error) from error
    needed = ("protocol", "cmc@1", "cmc_curve", "splits_averaged")
    for name in needed:
        if not isinstance(content, dict) or name not in content:
            raise InputError(path, "was not written by evaluate, it has no", name)
    if content["splits_averaged"] != 1:
        raise InputError(path, "is an average already, of splits", content["splits_averaged"])
    if content.get("split") is None:
        what = "is of a data set without splits"
        raise InputError(path, what, content.get("evaluated_on", "a feature file"))
    return content


def _scores(part: dict[str, Any]) -> list[str]:
    heads = ("cmc@", "mAP", "mINP", "tie_fraction")
    return [name for name in part if name.startswith(heads) and isinstance(part[name], float)]


@dataclass
class AverageSplitsConfig:
    """Schema of configs/average_splits.yaml."""

    metrics: list[str] = field(default_factory=list)
    out: str = "runs/rqen/average"


ConfigStore.instance().store("rqen_average_splits_schema", AverageSplitsConfig)


def show(result: dict[str, Any]) -> None:
    """Print mean and standard deviation in percent."""
    title = f"{result['evaluated_on']}, mean of {result['splits_averaged']} splits"
    table = Table("measure", "mean", "std", title=title)
    for name in ("cmc@1", "cmc@5", "cmc@10", "cmc@20"):
        if name in result:
            table.add_row(name, f"{100 * result[name]:.2f}", f"{100 * result['std'][name]:.2f}")
    Console().print(table)


@hydra.main(version_base=None, config_path="../configs", config_name="average_splits")
def main(cfg: AverageSplitsConfig) -> None:
    setup_logging(rank=0)
    result = average([Path(path) for path in cfg.metrics])
    if result["splits_averaged"] != PUBLISHED:
        get_logger(__name__).warning(
            "%d splits; published numbers average %d", result["splits_averaged"], PUBLISHED
        )
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    rundir.write_text(Path(cfg.out) / "metrics.json", json.dumps(result, indent=1))
    show(result)


if __name__ == "__main__":
    exit_on_bad_input(main)
