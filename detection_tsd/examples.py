"""Pictures of what trained rows find on unseen images, and of where their heads look."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from detection_tsd.data.detection_data import DetectionData
from detection_tsd.data.draws import read_image
from detection_tsd.drawing import (
    DETECTION_SIGNS,
    SHIFT_SIGNS,
    draw_detections,
    draw_shifts,
    gallery,
)
from detection_tsd.engine import Found
from detection_tsd.probe import Shifts, find_shifts
from detection_tsd.scoring import detections, open_job
from detection_tsd.suite import Job
from detection_tsd.weights import Trained

SHIFTED = 8  # objects of the picture of shifts


def draw_examples(jobs: Mapping[str, Job], out: Path, columns: int = 4) -> None:
    """Write `detections.png`, a line for each row, and `shifts.png` of the last row.

    Args:
        jobs: row -> finished job; all on one data set, the last with a head that shifts proposals.
        out: folder of the pictures.
        columns: images of a line.
    """
    pictures, captions = [], []
    for row, job in jobs.items():
        trained, data = open_job(job)
        found = detections(trained, data, f"draw {job.title}")
        for image in np.linspace(0, len(data) - 1, columns).round().astype(int):
            pictures.append(_drawn(found[image], data, trained))
            captions.append(row)
    gallery(pictures, out / "detections.png", captions, DETECTION_SIGNS, "Unseen pictures", columns)
    _draw_shifts(trained, data, out / "shifts.png", columns)


def _drawn(found: Found, data: DetectionData, trained: Trained) -> np.ndarray:
    image_HW3, truth = read_image(data, found.row), data.objects.read(found.row)
    return draw_detections(image_HW3, found, trained.classes, truth)


def _draw_shifts(trained: Trained, data: DetectionData, path: Path, columns: int) -> None:
    """The proposal with the largest error of its centre, of images spread over the set."""
    rows = [int(row) for row in np.linspace(0, len(data) - 1, 3 * SHIFTED)]
    chosen = [(row, shifts) for row, shifts in _shifts(trained, data, rows) if len(shifts.roi_R4)]
    pictures, captions = [], []
    for row, shifts in chosen[:SHIFTED]:
        worst = _farthest(shifts)
        pictures.append(draw_shifts(read_image(data, row), shifts, worst))
        captions.append(trained.classes[int(shifts.label_R[worst]) - 1])
    title = "Where the two branches look"
    gallery(pictures, path, captions, SHIFT_SIGNS, title, columns)


def _shifts(trained: Trained, data: DetectionData, rows: list[int]) -> list[tuple[int, Shifts]]:
    found = find_shifts(trained.model, data, trained.transform, rows)
    return list(zip(rows, found, strict=True))


def _farthest(shifts: Shifts) -> int:
    centre = (shifts.roi_R4[:, :2] + shifts.roi_R4[:, 2:]) / 2
    truth = (shifts.truth_R4[:, :2] + shifts.truth_R4[:, 2:]) / 2
    return int(np.linalg.norm(centre - truth, axis=1).argmax())
