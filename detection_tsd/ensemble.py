"""Detections of several systems become those of one.

    python -m detection_tsd.ensemble predictions=[a.json,b.json] annotations=instances.json out=DIR

Reads result files of COCO, of any system, on the same images. Writes `fused.json` in the same
format and `ensemble.json`; with `annotations` also the scores of the ensemble beside those of its
members. `method=voting` is weighted box voting (`detection_tsd.voting`); the others pool the
detections of all members, their scores times the member's weight, and suppress them again.

Letters: N detections of all members together, D fused detections.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor

from common.log import InputError, exit_on_bad_input, progress, setup_logging
from common.rundir import write_text
from detection_tsd.data.detection_data import Detections
from detection_tsd.metrics.coco import evaluate, read_dataset, read_predictions
from detection_tsd.postprocess import METHODS
from detection_tsd.voting import SCORES, box_voting

VOTING = "voting"
SHOWN = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")
Entries = list[dict[str, Any]]


@dataclass
class EnsembleConfig:
    """Schema of configs/ensemble.yaml."""

    out: str = MISSING
    predictions: list[str] = field(default_factory=list)  # result files of the members
    weights: list[float] | None = None  # of each member, > 0; only their ratios matter
    annotations: str | None = None  # of the images, to score members and ensemble
    method: str = VOTING  # voting | hard | soft_linear | soft_gaussian | adjusted
    iou: float = 0.5  # above which a worse box goes, or is lowered
    vote_iou: float = 0.5  # voting: from which a box votes
    score: str = "mean"  # voting: mean over the members | max
    sigma: float = 0.5  # soft_gaussian, adjusted
    min_score: float = 1e-3  # soft_*, adjusted: of what is kept
    per_image: int = 100


ConfigStore.instance().store("tsd_ensemble_schema", EnsembleConfig)


class Member(NamedTuple):
    """A result file.

    Attributes:
        path: of the file.
        entries: its content, checked.
        rows: image id -> rows of its entries.
    """

    path: Path
    entries: Entries
    rows: dict[Any, list[int]]


def ensemble(cfg: EnsembleConfig) -> dict[str, Any]:
    """Fuse what `cfg` names; returns what `ensemble.json` holds.

    Raises:
        InputError: no member, settings that are not accepted, or a file that cannot be used.
    """
    _check(cfg)
    paths = [Path(path) for path in cfg.predictions]
    dataset = None if cfg.annotations is None else read_dataset(Path(cfg.annotations))
    members = [read_member(path, dataset or named_by(paths)) for path in paths]
    fused = fuse(members, cfg)
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "fused.json", json.dumps(fused))
    result: dict[str, Any] = {
        "members": [str(path) for path in paths],
        "weights": _weights(cfg),
        "method": cfg.method,
        "settings": _settings(cfg) | {"per_image": cfg.per_image},
        "detections": {"members": [len(one.entries) for one in members], "fused": len(fused)},
        "fused": "fused.json",
        "scores": None,
    }
    if dataset is not None:
        systems = [one.entries for one in members] + [fused]
        scores = [evaluate(entries, dataset) for entries in systems]
        bbox = [_known(one.summary | one.by_threshold) for one in scores]
        result["scores"] = {"members": bbox[:-1], "fused": bbox[-1], "counts": scores[-1].counts}
    write_text(out / "ensemble.json", json.dumps(result, indent=1) + "\n")
    return result


def _known(scores: Mapping[str, float]) -> dict[str, float | None]:
    """Scores with None where one is not defined; NaN has no form in JSON."""
    return {name: None if math.isnan(value) else value for name, value in scores.items()}


def _check(cfg: EnsembleConfig) -> None:
    if not cfg.predictions:
        raise InputError("predictions", "name at least one result file", list(cfg.predictions))
    if cfg.method != VOTING and cfg.method not in METHODS:
        names = ", ".join((VOTING, *METHODS))
        raise InputError("method", f"must be one of {names}", cfg.method)
    if cfg.score not in SCORES:
        raise InputError("score", f"must be one of {', '.join(SCORES)}", cfg.score)
    for name in ("iou", "vote_iou"):
        if not 0 <= getattr(cfg, name) <= 1:
            raise InputError(name, "must be in [0, 1]", getattr(cfg, name))
    if not cfg.sigma > 0:
        raise InputError("sigma", "must be above 0", cfg.sigma)
    if cfg.per_image < 1:
        raise InputError("per_image", "must be at least 1", cfg.per_image)
    weights = _weights(cfg)
    if len(weights) != len(cfg.predictions) or not all(0 < w < torch.inf for w in weights):
        what = f"needs one number above 0 for each of {len(cfg.predictions)} files"
        raise InputError("weights", what, weights)


def _weights(cfg: EnsembleConfig) -> list[float]:
    given = [1.0] * len(cfg.predictions) if cfg.weights is None else cfg.weights
    return [float(weight) for weight in given]


def _settings(cfg: EnsembleConfig) -> dict[str, Any]:
    """Arguments of the method besides the detections."""
    if cfg.method == VOTING:
        return {"iou": cfg.iou, "vote_iou": cfg.vote_iou, "score": cfg.score}
    settings: dict[str, Any] = {"iou": cfg.iou}
    return settings | (
        {} if cfg.method == "hard" else {"sigma": cfg.sigma, "min_score": cfg.min_score}
    )


def named_by(paths: Sequence[Path]) -> dict[str, Any]:
    """The images and classes that result files name, in the place of an annotation file.

    Raises:
        InputError: a file cannot be read.
    """
    everything: dict[str, Any] = {"images": [], "categories": []}
    for path in paths:
        try:
            content = json.loads(path.read_bytes())
        except OSError as error:
            raise InputError(path, "cannot be read", error.strerror) from error
        except (ValueError, RecursionError) as error:
            raise InputError(path, "is not JSON", error) from error
        entries = [e for e in content if isinstance(e, dict)] if isinstance(content, list) else []
        for key, name in (("images", "image_id"), ("categories", "category_id")):
            known = {entry.get(name) for entry in entries if isinstance(entry.get(name), int | str)}
            everything[key] += [{"id": value} for value in known]
    return everything


def read_member(path: Path, dataset: Mapping[str, Any]) -> Member:
    """A result file whose scores are probabilities, as those of other members must be.

    Raises:
        InputError: names the file, the entry and the value.
    """
    entries = read_predictions(path, dataset)
    rows: dict[Any, list[int]] = {}
    for row, entry in enumerate(entries):
        if not 0 <= entry["score"] <= 1:
            raise InputError(f"{path} [{row}]", "score is not in [0, 1]", entry["score"])
        rows.setdefault(entry["image_id"], []).append(row)
    return Member(path, entries, rows)


def fuse(members: Sequence[Member], cfg: EnsembleConfig) -> Entries:
    """Entries of the ensemble: image after image in the order in which members name them.

    An entry that a suppression keeps has all that the member's entry had (its mask, for instance);
    voted boxes are new, and have none.
    """
    weights = _weights(cfg)
    images = list(dict.fromkeys(image for one in members for image in one.rows))
    category_ids = sorted({e["category_id"] for one in members for e in one.entries}, key=_order)
    label_of = {value: label for label, value in enumerate(category_ids, start=1)}
    fused: Entries = []
    with progress() as bar:
        for image in bar.track(images, description="fuse"):
            entries = [[one.entries[row] for row in one.rows.get(image, ())] for one in members]
            found = [_detections(part, label_of) for part in entries]
            if cfg.method == VOTING:
                voted = box_voting(found, weights, per_image=cfg.per_image, **_settings(cfg))
                fused += _voted(voted, image, category_ids)
            else:
                fused += _pooled(found, weights, [e for part in entries for e in part], cfg)
    return fused


def _order(value: Any) -> tuple[bool, Any]:
    """Sort key of ids that are numbers or texts."""
    return isinstance(value, str), value


def _detections(entries: Entries, label_of: Mapping[Any, int]) -> Detections:
    box_D4 = torch.tensor([entry["bbox"] for entry in entries], dtype=torch.float64)
    box_D4 = box_D4.reshape(-1, 4)
    corners_D4 = torch.cat((box_D4[:, :2], box_D4[:, :2] + box_D4[:, 2:]), dim=1)
    score_D = torch.tensor([entry["score"] for entry in entries], dtype=torch.float64)
    labels = [label_of[entry["category_id"]] for entry in entries]
    return Detections(corners_D4, score_D, torch.tensor(labels, dtype=torch.int64))


def _voted(found: Detections, image: Any, category_ids: Sequence[Any]) -> Entries:
    box_D4: Tensor = torch.cat((found.box_D4[:, :2], found.box_D4[:, 2:] - found.box_D4[:, :2]), 1)
    rows = zip(box_D4.tolist(), found.score_D.tolist(), found.label_D.tolist(), strict=True)
    return [
        {"image_id": image, "category_id": category_ids[label - 1], "bbox": box, "score": score}
        for box, score, label in rows
    ]


def _pooled(
    found: Sequence[Detections], weights: Sequence[float], entries: Entries, cfg: EnsembleConfig
) -> Entries:
    """What a suppression leaves of the detections of all members."""
    score_N = torch.cat([
        one.score_D * (weight / max(weights))
        for one, weight in zip(found, weights, strict=True)
    ])  # fmt: skip
    rule = partial(METHODS[cfg.method], **_settings(cfg))
    box_N4 = torch.cat([one.box_D4 for one in found])
    label_N = torch.cat([one.label_D for one in found])
    kept = rule(box_N4, score_N, label_N, limit=cfg.per_image)
    rows = zip(kept.index_D.tolist(), kept.score_D.tolist(), strict=True)
    return [{**entries[index], "score": score} for index, score in rows]


def show(result: dict[str, Any]) -> None:
    """Print the scores of the members and of the ensemble, or the numbers of detections."""
    names = [*result["members"], f"ensemble, {result['method']}"]
    numbers = [*result["detections"]["members"], result["detections"]["fused"]]
    scores = result["scores"]
    table = Table("system", "detections", *(SHOWN if scores else ()))
    rows = [*scores["members"], scores["fused"]] if scores else [{}] * len(names)
    for name, number, row in zip(names, numbers, rows, strict=True):
        known = [row[key] for key in SHOWN] if row else []
        values = ["-" if value is None else f"{100 * value:.2f}" for value in known]
        table.add_row(name, str(number), *values)
    Console().print(table)


@hydra.main(version_base=None, config_path="configs", config_name="ensemble")
def main(cfg: DictConfig) -> None:
    setup_logging(rank=0)
    show(ensemble(cfg))  # type: ignore[arg-type]


if __name__ == "__main__":
    exit_on_bad_input(main)
