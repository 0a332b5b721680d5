"""Average precision after COCO: pycocotools computes, this file reads, checks and names.

Shapes: T IoU thresholds 0.50, 0.55 .. 0.95, R 101 recall points, K classes, A areas (all, small,
medium, large), M limits of detections an image (1, 10, 100).
"""

import contextlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.log import InputError

SUMMARY = (
    "AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl",
)  # fmt: skip
THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
KINDS = ("bbox", "segm")


class CocoScores(NamedTuple):
    """What pycocotools found; a share that is not defined (no object of its kind) is NaN.

    Attributes:
        summary: the 12 numbers of COCO by their names in `SUMMARY`.
        by_threshold: AP at each of `THRESHOLDS`, "AP50" .. "AP95".
        by_class: AP of each class that has objects, by its name.
        precision_TRK: precision envelope, all areas, 100 detections an image; NaN where a class has
            no objects.
        counts: images, objects, ignored (crowd) regions, detections.
    """

    summary: dict[str, float]
    by_threshold: dict[str, float]
    by_class: dict[str, float]
    precision_TRK: np.ndarray
    counts: dict[str, int]


def evaluate_files(predictions: Path, annotations: Path, kind: str = "bbox") -> CocoScores:
    """Score a result file against an annotation file.

    Args:
        predictions: JSON list of `{image_id, category_id, bbox: [x, y, w, h], score}`, for masks
            with `segmentation` as a run-length code.
        annotations: JSON of COCO's instances.
        kind: bbox or segm.

    Raises:
        InputError: a file cannot be read, names unknown images or classes, or holds no numbers.
    """
    dataset = read_dataset(annotations)
    return evaluate(read_predictions(predictions, dataset, kind), dataset, kind)


def evaluate(
    predictions: Sequence[Mapping[str, Any]], dataset: Mapping[str, Any], kind: str = "bbox"
) -> CocoScores:
    """Score checked predictions against a checked data set, see `evaluate_files`."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: need one of {KINDS}")
    with contextlib.redirect_stdout(io.StringIO()):  # it reports on its speed
        truth = COCO()
        # It writes into the entries, which are the caller's.
        truth.dataset = {**dataset, "annotations": [dict(e) for e in dataset["annotations"]]}
        truth.createIndex()
        found = COCO()
        found.dataset = {**dataset, "annotations": _as_annotations(predictions, kind)}
        found.createIndex()
        run = COCOeval(truth, found, kind)
        run.evaluate()
        run.accumulate()
        run.summarize()
    names = {entry["id"]: str(entry["name"]) for entry in dataset["categories"]}
    return _scores(run, names, _counts(dataset, len(predictions)))


def _as_annotations(predictions: Sequence[Mapping[str, Any]], kind: str) -> list[dict[str, Any]]:
    """As `COCO.loadRes` does, without writing into what the caller gave."""
    from pycocotools import mask as coder

    found = []
    for number, entry in enumerate(predictions, start=1):
        if kind == "segm":
            area = float(coder.area(entry["segmentation"]))
        else:
            area = entry["bbox"][2] * entry["bbox"][3]
        found.append({**entry, "id": number, "area": area, "iscrowd": 0})
    return found


def _scores(run: Any, names: Mapping[Any, str], counts: dict[str, int]) -> CocoScores:
    precision_TRKAM = np.where(run.eval["precision"] < 0, np.nan, run.eval["precision"])
    precision_TRK = precision_TRKAM[:, :, :, 0, -1]
    by_threshold = {
        f"AP{round(100 * threshold)}": _mean(precision_TRK[row])
        for row, threshold in enumerate(THRESHOLDS)
    }
    by_class = {
        names[category]: _mean(precision_TRK[:, :, row])
        for row, category in enumerate(run.params.catIds)
        if not np.isnan(precision_TRK[:, :, row]).all()
    }
    summary = {n: float(v) if v >= 0 else math.nan for n, v in zip(SUMMARY, run.stats, strict=True)}
    return CocoScores(summary, by_threshold, by_class, precision_TRK, counts)


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def _counts(dataset: Mapping[str, Any], detections: int) -> dict[str, int]:
    ignored = sum(bool(entry["iscrowd"]) for entry in dataset["annotations"])
    return {
        "images": len(dataset["images"]),
        "objects": len(dataset["annotations"]) - ignored,
        "ignored": ignored,
        "detections": detections,
    }


def read_dataset(path: Path) -> dict[str, Any]:
    """An annotation file of COCO, checked for what the evaluation reads.

    Raises:
        InputError: names the file, the entry and the value.
    """
    content = _read_json(path)
    if not isinstance(content, dict):
        raise InputError(path, "is no COCO annotation file, but", type(content).__name__)
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list):
            raise InputError(path, "has no list", key)
    images = _ids(path, "images", content["images"])
    categories = _ids(path, "categories", content["categories"])
    _ids(path, "annotations", content["annotations"])
    for row, entry in enumerate(content["categories"]):
        if "name" not in entry:
            raise InputError(f"{path} categories[{row}]", "has no", "name")
    for row, entry in enumerate(content["annotations"]):
        where = f"{path} annotations[{row}]"
        _check_known(where, entry, images, categories)
        _check_box(where, entry)
        if not _is_number(entry.get("area")):
            raise InputError(where, "area is no number", entry.get("area"))
        entry.setdefault("iscrowd", 0)
    return content


def read_predictions(
    path: Path, dataset: Mapping[str, Any], kind: str = "bbox"
) -> list[dict[str, Any]]:
    """A result file of COCO, checked against a data set.

    Raises:
        InputError: names the file, the entry and the value.
    """
    content = _read_json(path)
    if not isinstance(content, list):
        raise InputError(path, "is no list of detections, but", type(content).__name__)
    images = {entry["id"] for entry in dataset["images"]}
    categories = {entry["id"] for entry in dataset["categories"]}
    for row, entry in enumerate(content):
        where = f"{path} [{row}]"
        if not isinstance(entry, dict):
            raise InputError(where, "is no object", entry)
        _check_known(where, entry, images, categories)
        if kind == "bbox":
            _check_box(where, entry)
        elif not isinstance(entry.get("segmentation"), dict):
            raise InputError(where, "has no run-length code", "segmentation")
        if not _is_number(entry.get("score")):
            raise InputError(where, "score is no finite number", entry.get("score"))
    return content


def _read_json(path: Path) -> Any:
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise InputError(path, "cannot be read", error.strerror) from error
    except (ValueError, RecursionError) as error:
        raise InputError(path, "is not JSON", error) from error


def _ids(path: Path, key: str, entries: Sequence[Any]) -> set[Any]:
    seen: set[Any] = set()
    for row, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), int | str):
            raise InputError(f"{path} {key}[{row}]", "has no usable id", entry)
        if entry["id"] in seen:
            raise InputError(f"{path} {key}[{row}]", "id comes twice", entry["id"])
        seen.add(entry["id"])
    return seen


def _check_known(where: str, entry: Any, images: set[Any], categories: set[Any]) -> None:
    for key, known in (("image_id", images), ("category_id", categories)):
        value = entry.get(key)
        if not isinstance(value, int | str) or value not in known:
            raise InputError(where, f"{key} is not in the annotation file", value)


def _check_box(where: str, entry: Mapping[str, Any]) -> None:
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise InputError(where, "bbox is not four finite numbers", box)
    if box[2] < 0 or box[3] < 0:
        raise InputError(where, "bbox has a negative side", box)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
