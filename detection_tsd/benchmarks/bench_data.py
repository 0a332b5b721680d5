"""Speed of reading annotations and of scoring detections, on one thread.

The group `data` of `python -m detection_tsd.benchmarks`. COCO's annotations beside pycocotools',
COCO's AP from files beside a script on pycocotools (which also computes ours) and beside
faster-coco-eval, and the Open Images metric beside a loop over images and classes. Results are
compared before anything is timed.

Letters: N images, D detections, G boxes.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from detection_tsd.benchmarks.peer_openimages import average_precisions
from detection_tsd.benchmarks.pictures import CATEGORIES, write_set
from detection_tsd.benchmarks.results import Row, measure, measured, rates, row
from detection_tsd.data.coco import load_coco
from detection_tsd.data.detection_data import DetectionData
from detection_tsd.data.oid_files import Boxes, Classes, ImageLabels
from detection_tsd.data.oid_predictions import Predictions
from detection_tsd.metrics.coco import SUMMARY, evaluate_files
from detection_tsd.metrics.oid_truth import GroundTruth
from detection_tsd.metrics.openimages import evaluate

IMAGES, SCORED, QUICK_IMAGES = 5000, 500, 100  # val2017 has 5000; pycocotools takes 20 ms each
DETECTIONS = 100  # of an image
OID_CLASSES = 500
GROUPS = 0.05  # share of the boxes that hold a group
LIMIT = 1e-9
TF = "TF Object Detection API"


def data_rows(repeats: int, quick: bool = False, seed: int = 0) -> Iterator[Row]:
    """Annotations, COCO's AP, and the Open Images metric.

    Args:
        repeats: timed calls of each side.
        quick: fewer images.
        seed: of the generated sets.

    Raises:
        RuntimeError: the sides of a row have different results.
    """
    images = QUICK_IMAGES if quick else IMAGES
    with tempfile.TemporaryDirectory() as folder:
        root = write_set(Path(folder) / "set", images, seed, pictures=1)
        yield annotation_row(root, images, repeats)
        scored = min(images, SCORED)
        root = write_set(Path(folder) / "scored", scored, seed, pictures=1)
        yield from coco_rows(root, scored, seed, repeats)
    yield from openimages_rows(images, seed, repeats)


def annotation_row(root: Path, images: int, repeats: int) -> Row:
    """Reading an annotation file, outlines left aside.

    Raises:
        RuntimeError: the boxes differ.
    """
    path = root / "annotations" / "instances_train2017.json"
    ours, peer = partial(load_coco, root), partial(_index, import_module("pycocotools.coco"), path)
    difference = _box_difference(ours(), peer())
    _agree("annotations", difference, 1e-3)
    timed = measure(ours, peer, repeats)
    shape = f"{images} images, {path.stat().st_size / 1e6:.1f} MB"
    notes = "greatest difference of a box in pixels: ours are float32", rates(timed, 1, "files")
    return measured("read COCO annotations", shape, "pycocotools COCO", timed, difference, *notes)


def _index(module: ModuleType, path: Path) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):  # it reports on its speed
        return module.COCO(str(path))


def _box_difference(data: DetectionData, peer: Any) -> float:
    """Of the boxes of all images; infinite when an image has others."""
    found = 0.0
    for row_, image in enumerate(data.image_ids):
        theirs = peer.loadAnns(peer.getAnnIds(imgIds=[image], iscrowd=False))
        box_G4 = np.array([entry["bbox"] for entry in theirs]).reshape(-1, 4)
        box_G4[:, 2:] += box_G4[:, :2]
        ours = data.objects.read(row_)
        labels = [data.class_ids.index(entry["category_id"]) + 1 for entry in theirs]
        if ours.label_G.tolist() != labels:
            return float("inf")
        found = max(found, float(np.abs(ours.box_G4 - box_G4).max(initial=0.0)))
    return found


def coco_rows(root: Path, images: int, seed: int, repeats: int) -> Iterator[Row]:
    """AP from a result file; `repeats` is cut to three, since pycocotools takes seconds.

    Raises:
        RuntimeError: the twelve numbers differ.
    """
    path = root / "annotations" / "instances_train2017.json"
    results = root / "detections.json"
    results.write_text(json.dumps(detections(json.loads(path.read_text()), seed)))
    shape = f"{images} images, {DETECTIONS} detections each"
    for package in ("pycocotools", "faster_coco_eval"):
        name, peer_name = "COCO AP from files", package.replace("_", "-")
        if find_spec(package) is None:
            yield row(name, shape, peer_name, f"not measured: {peer_name} is not installed")
            continue
        ours, peer = partial(_ours, results, path), partial(_script, package, results, path)
        difference = float(np.nanmax(np.abs(np.subtract(ours(), peer()))))
        _agree(name, difference, LIMIT)
        timed = measure(ours, peer, min(repeats, 3))
        yield measured(name, shape, peer_name, timed, difference, rates(timed, images, "images"))


def _ours(results: Path, path: Path) -> list[float]:
    summary = evaluate_files(results, path).summary
    return [summary[name] for name in SUMMARY]


def _script(package: str, results: Path, path: Path) -> list[float]:
    """The usual lines of a script, with -1 as NaN."""
    if package == "pycocotools":
        coco = import_module("pycocotools.coco").COCO
        run_class = import_module("pycocotools.cocoeval").COCOeval
    else:
        module = import_module(package)
        coco, run_class = module.COCO, module.COCOeval_faster
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco(str(path))
        run = run_class(truth, truth.loadRes(str(results)), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return [float("nan") if value < 0 else float(value) for value in run.stats[:12]]


def detections(content: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """Of every image as many: its own objects moved a little, then boxes anywhere."""
    rng = np.random.default_rng([seed, 1])
    own: dict[int, list[dict[str, Any]]] = {entry["id"]: [] for entry in content["images"]}
    for entry in content["annotations"]:
        own[entry["image_id"]].append(entry)
    found = []
    for image, objects in own.items():
        for number in range(DETECTIONS):
            score = float(rng.random())
            if number < 2 * len(objects):
                entry = objects[number % len(objects)]
                category = entry["category_id"]
                box_4 = np.array(entry["bbox"]) + rng.normal(0, 8, 4)
            else:
                category = int(rng.integers(1, CATEGORIES + 1))
                box_4 = rng.uniform(1, 200, 4)
            box = np.maximum(box_4, 1).round(2).tolist()
            found.append({"image_id": image, "category_id": category, "bbox": box, "score": score})
    return found


def openimages_rows(images: int, seed: int, repeats: int) -> Iterator[Row]:
    """The metric of the challenge, on columns in memory.

    Raises:
        RuntimeError: a class has another average precision.
    """
    truth, found = openimages_problem(images, seed)
    name = "Open Images mAP"
    shape = f"{images} images, {OID_CLASSES} classes, {DETECTIONS} detections each"
    ours, peer = partial(evaluate, truth, found), partial(average_precisions, truth, found)
    mine, theirs = ours().ap_K, peer()
    if not np.array_equal(np.isnan(mine), np.isnan(theirs)):
        raise RuntimeError(f"{name}: other classes have objects")
    difference = float(np.nanmax(np.abs(mine - theirs)))
    _agree(name, difference, LIMIT)
    timed = measure(ours, peer, repeats)
    note = rates(timed, images, "images")
    yield measured(name, shape, "loop over images and classes", timed, difference, note)
    yield row(name, shape, TF, f"not measured: {TF} needs TensorFlow; the loop restates it")


def openimages_problem(images: int, seed: int) -> tuple[GroundTruth, Predictions]:
    """Boxes of classes with a long tail, verified absent classes, detections as for COCO."""
    rng = np.random.default_rng([seed, 2])
    count_N = 1 + rng.poisson(6, images)
    image_G = np.repeat(np.arange(images, dtype=np.int32), count_N)
    label_G = _labels(rng, len(image_G))
    box_G4 = _boxes(rng, len(image_G))
    group_G = rng.random(len(image_G)) < GROUPS
    image_V = np.repeat(np.arange(images, dtype=np.int32), 5)
    labels = ImageLabels(image_V, _labels(rng, len(image_V)), np.zeros(len(image_V), bool), {})
    image_D = np.repeat(np.arange(images, dtype=np.int32), DETECTIONS)
    label_D, box_D4 = _labels(rng, len(image_D)), _boxes(rng, len(image_D))
    first_N = np.concatenate([[0], count_N.cumsum()[:-1]])
    near_D = rng.random(len(image_D)) < 0.3
    own_D = (first_N[image_D] + rng.integers(0, count_N[image_D]))[near_D]
    label_D[near_D] = label_G[own_D]
    box_D4[near_D] = np.sort(
        (box_G4[own_D] + rng.normal(0, 0.02, (len(own_D), 4))).reshape(-1, 2, 2), axis=1
    ).reshape(-1, 4)
    classes = Classes(f"/m/{k}" for k in range(OID_CLASSES))
    boxes = Boxes(image_G, label_G, box_G4, group_G, {})
    truth = GroundTruth(tuple(f"{row_:016x}" for row_ in range(images)), classes, boxes, labels)
    return truth, Predictions(image_D, label_D, rng.random(len(image_D)), box_D4, {})


def _labels(rng: np.random.Generator, count: int) -> np.ndarray:
    """Of 1..K, the first ones more often."""
    return (1 + OID_CLASSES * rng.random(count) ** 3).astype(np.int16)


def _boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    side = rng.uniform(0.05, 0.5, (count, 2))
    corner = rng.random((count, 2)) * (1 - side)
    return np.concatenate([corner, corner + side], axis=1)


def _agree(name: str, difference: float, limit: float) -> None:
    if not difference <= limit:
        raise RuntimeError(f"{name}: results differ by {difference}, more than {limit}")
