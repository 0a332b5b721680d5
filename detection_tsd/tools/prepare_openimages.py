"""Check a copy of Open Images once, and show what its labels mean.

    python -m detection_tsd.tools.prepare_openimages data.root=DIR out=DIR
    python -m detection_tsd.tools.prepare_openimages data=openimages_text data.root=DIR

Reads every annotation file from end to end, as a training would, and the header of every picture;
the sizes are kept beside the data (sizes-<split>.npz), so that no training waits for them again.
Missing pictures and malformed lines end the command with their place.

Prints how many images and objects there are and which identifier is which name and which label,
with the kinds it belongs to: a wrong class list gives labels that look right and are not. All
classes go to `out`/classes.csv, the counts to `out`/summary.json. `compare` is another class list,
of the other format for instance, that must say the same.

Letters: K classes, S splits.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
import numpy as np
from hydra.core.config_store import ConfigStore
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import MISSING, DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from common.log import InputError, exit_on_bad_input, setup_logging
from detection_tsd.data.detection_data import DetectionData
from detection_tsd.data.hierarchy import Hierarchy, read_hierarchy, read_label_tree
from detection_tsd.data.oid_files import read_classes
from detection_tsd.evaluate import write_json


@dataclass
class PrepareConfig:
    """Schema of configs/prepare_openimages.yaml."""

    out: str = "runs/tsd/openimages"
    data: Any = MISSING
    splits: list[str] = field(default_factory=lambda: ["train", "val"])  # nodes of `data`
    compare: str | None = None  # a class list that must say the same as that of `data`
    show: int = 20  # classes that are printed; 0 prints all


ConfigStore.instance().store("tsd_prepare_openimages_schema", PrepareConfig)

SUMMARY = "summary.json"
CLASSES = "classes.csv"


def prepare(cfg: PrepareConfig) -> dict[str, Any]:
    """Read everything, write both files into `cfg.out`; returns what summary.json holds.

    Raises:
        InputError: a file or picture is missing or malformed, the splits or `compare` say
            something else about the classes, or a setting does not exist.
    """
    sets = _load(cfg)
    first = next(iter(sets.values()))
    for name, data in sets.items():
        _same_classes(first, name, data.class_ids, data.classes)
    if cfg.compare is not None:
        other = read_classes(cfg.compare)
        _same_classes(first, cfg.compare, other, other.names)
    objects_SK = [_objects(data) for data in sets.values()]
    tree = _hierarchy(cfg, first)
    rows = _rows(first, tree, objects_SK)
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    _write_rows(out / CLASSES, ["label", "identifier", "name", "kind of", *sets], rows)
    summary: dict[str, Any] = {"classes": first.num_classes, "root": str(first.root)}
    for (name, data), objects_K in zip(sets.items(), objects_SK, strict=True):
        summary[name] = _counts(data, objects_K)
    write_json(out / SUMMARY, summary)
    return summary | {"rows": rows}


def _load(cfg: PrepareConfig) -> dict[str, DetectionData]:
    if not cfg.splits:
        raise InputError("splits", "names no split", list(cfg.splits))
    if cfg.show < 0:
        raise InputError("show", "must not be below 0", cfg.show)
    for name in cfg.splits:
        if OmegaConf.select(cfg.data, f"{name}._target_") is None:
            raise InputError("splits", f"data has no set of this name, only {list(cfg.data)}", name)
    try:
        return {name: instantiate(cfg.data[name]) for name in cfg.splits}
    except InstantiationException as error:
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from error
        raise


def _same_classes(
    first: DetectionData, where: str, ids: Sequence[Any], names: Sequence[str]
) -> None:
    """Raise `InputError` for the first label that is another class there."""
    if len(ids) != first.num_classes:
        raise InputError(where, f"has another number of classes than {first.num_classes}", len(ids))
    known = zip(first.class_ids, first.classes, strict=True)
    for label, (mine, its) in enumerate(zip(known, zip(ids, names, strict=True), strict=True), 1):
        if mine != its:
            what = f"label {label} is {' '.join(map(str, mine))} elsewhere, here"
            raise InputError(where, what, " ".join(map(str, its)))


def _objects(data: DetectionData) -> np.ndarray:
    """Objects of each class, int64 (K,)."""
    count_K = np.zeros(data.num_classes + 1, np.int64)
    for row in range(len(data)):
        np.add.at(count_K, data.objects.labels(row), 1)
    return count_K[1:]


def _hierarchy(cfg: PrepareConfig, data: DetectionData) -> Hierarchy:
    """Of the first split that names one; otherwise classes without relation."""
    for name in cfg.splits:
        node = cfg.data[name]
        root = Path(node.root)
        if node.get("hierarchy") is not None:
            return read_hierarchy(root / node.hierarchy, data.class_ids)
        if node.get("label_tree") is not None:
            return read_label_tree(root / node.label_tree, data.num_classes)
    return Hierarchy.flat(data.num_classes)


def _rows(
    data: DetectionData, tree: Hierarchy, objects_SK: Sequence[np.ndarray]
) -> list[list[Any]]:
    """Label, identifier, name, kinds it belongs to, and objects in each split, of every class."""
    rows: list[list[Any]] = []
    for label, (identifier, name) in enumerate(zip(data.class_ids, data.classes, strict=True), 1):
        kinds = "; ".join(data.classes[above - 1] for above in tree.ancestors(label))
        counts = [int(objects_K[label - 1]) for objects_K in objects_SK]
        rows.append([label, identifier, name, kinds, *counts])
    return rows


def _write_rows(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
    temporary.replace(path)


def _counts(data: DetectionData, objects_K: np.ndarray) -> dict[str, Any]:
    size_N2 = np.array([data.images.size(row) for row in range(len(data))]).reshape(-1, 2)
    return {
        "annotations": str(data.source),
        "images": len(data),
        "images without objects": sum(not len(data.objects.labels(r)) for r in range(len(data))),
        "objects": int(objects_K.sum()),
        "classes without objects": int((objects_K == 0).sum()),
        "smallest picture (height, width)": size_N2[size_N2.prod(axis=1).argmin()].tolist(),
        "largest picture (height, width)": size_N2[size_N2.prod(axis=1).argmax()].tolist(),
        "left out": dict(data.skipped),
    }


def show(result: Mapping[str, Any], splits: Sequence[str], limit: int) -> None:
    """Print the counts, and the first `limit` classes (0: all)."""
    console = Console()
    counts = Table("count", *splits)
    for name in result[splits[0]]:
        counts.add_row(name, *(str(result[split][name]) for split in splits))
    console.print(counts)
    rows = result["rows"][: limit or None]
    classes = Table(
        "label", "identifier", "name", "kind of", *(f"{name} objects" for name in splits)
    )
    for row in rows:
        classes.add_row(*map(str, row))
    console.print(classes)
    if len(rows) < len(result["rows"]):
        console.print(f"{len(result['rows']) - len(rows)} more classes in {CLASSES}")


@hydra.main(version_base=None, config_path="../configs", config_name="prepare_openimages")
def main(cfg: DictConfig) -> None:
    setup_logging(0)
    result = prepare(cfg)  # type: ignore[arg-type]
    show(result, cfg.splits, cfg.show)


if __name__ == "__main__":
    exit_on_bad_input(main)
