"""Detections as the files that the evaluators and the servers of the data sets read."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detection_tsd.data.detection_data import DetectionData
from detection_tsd.engine import Found


def coco_results(found: Sequence[Found], data: DetectionData, kind: str) -> list[dict[str, Any]]:
    """COCO's result list: boxes as x, y, width, height in pixels; with `kind="segm"` masks."""
    entries = []
    for item in found:
        for number, (box, score, label) in enumerate(
            zip(item.box_D4.tolist(), item.score_D.tolist(), item.label_D.tolist(), strict=True)
        ):
            entry = {
                "image_id": data.image_ids[item.row],
                "category_id": data.class_ids[label - 1],
                "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                "score": score,
            }
            if kind == "segm":
                assert item.masks is not None
                entry["segmentation"] = item.masks[number]
            entries.append(entry)
    return entries


def write_coco(found: Sequence[Found], data: DetectionData, path: Path, kind: str = "bbox") -> None:
    """Write `coco_results` as JSON; a reader sees the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(coco_results(found, data, kind)))
    temporary.replace(path)


COLUMNS = ("ImageID", "LabelName", "Score", "XMin", "XMax", "YMin", "YMax")


def write_openimages(found: Sequence[Found], data: DetectionData, path: Path) -> None:
    """Write the prediction CSV of the Open Images challenge: coordinates in [0, 1]."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for item in found:
            height, width = item.size
            for box, score, label in zip(item.box_D4, item.score_D, item.label_D, strict=True):
                x1, y1, x2, y2 = (float(value) for value in box)
                writer.writerow([
                    data.image_ids[item.row], data.class_ids[label - 1], repr(float(score)),
                    x1 / width, x2 / width, y1 / height, y2 / height,
                ])  # fmt: skip
    temporary.replace(path)
