"""A small set in the layout of the Open Images Challenge 2019, in both of its formats.

    challenge2019/challenge-2019-{train,validation}-detection-bbox.csv
    challenge2019/challenge-2019-{train,validation}-detection-human-imagelabels.csv
    challenge2019/challenge-2019-classes-description-500.csv
    challenge2019/challenge-2019-label500-hierarchy.json
    challenge2019/challenge-2019-{train,validation}-detection-bbox.txt       text of Sense-X/TSD
    challenge2019/cls-label-description.csv class_label_tree.np class_sample_train.pkl
    challenge2019/detections-validation.csv                                  to be scored
    OpenImages/train_<first character>/*.jpg OpenImages/validation/*.jpg

Eight classes in three levels; a tomato is a fruit and a vegetable. An object is a coloured
rectangle. The CSV files of the training split have the columns of Open Images V4, those of the
validation split the columns of the challenge. In each split

* the first image has a box of a group;
* the second has boxes and no verified label;
* the third has verified labels and no box;
* the fourth has neither: it only occurs in the text, and as a picture.

Letters: G boxes, K classes, D detections. Boxes are xyxy.
"""

import csv
import json
import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.log import InputError
from detection_tsd.data.glyphs import background, finish, place_boxes
from detection_tsd.data.hierarchy import read_hierarchy
from detection_tsd.data.oid_predictions import Predictions, write_predictions

NAMES = ("Food", "Fruit", "Vegetable", "Tomato", "Apple", "Carrot", "Vehicle", "Car")
CLASS_IDS = tuple(f"/m/0{number:03d}r" for number in range(len(NAMES), 0, -1))
LEAVES = (4, 5, 6, 8)  # labels that are annotated; so is Vehicle, when nobody said which
VEHICLE = 7
COLOURS = np.array([
    [0.5, 0.5, 0.5], [0.9, 0.5, 0.1], [0.1, 0.6, 0.1], [0.9, 0.1, 0.1],
    [0.6, 0.9, 0.2], [0.9, 0.6, 0.1], [0.2, 0.2, 0.5], [0.1, 0.3, 0.9],
])  # fmt: skip
GROUPED, UNVERIFIED, BOXLESS, SILENT = range(4)
LEAST = 4  # images of a split, one for each of the oddities
SPLITS = ("train", "validation")
OBJECT = (24.0, 60.0)  # width and height of an object, pixels
GROUP = (60.0, 80.0)
JPEG_QUALITY = 95
FOLDER = "challenge2019"
V4_BOXES = (
    "ImageID", "Source", "LabelName", "Confidence", "XMin", "XMax", "YMin", "YMax",
    "IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction", "IsInside",
)  # fmt: skip
BOXES = ("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax", "IsGroupOf")
V4_LABELS = ("ImageID", "Source", "LabelName", "Confidence")
LABELS = ("ImageID", "LabelName", "Confidence")


class Scene(NamedTuple):
    """One image: its name, pixels, normalised boxes, their labels and groups, verified labels."""

    image_id: str
    image_HW3: np.ndarray
    box_G4: np.ndarray
    label_G: np.ndarray
    group_G: np.ndarray
    present: list[int]
    absent: list[int]


def make_oid_replica(root: Path | str, n: int, seed: int = 0, val: int | None = None) -> Path:
    """Write the set; the same arguments give the same files.

    Args:
        root: folder, made when it is not there.
        n: training images.
        seed: at least 0.
        val: validation images; None for as many as `n`.

    Returns:
        `root`.

    Raises:
        InputError: fewer than four images in a split.
    """
    root, counts = Path(root), (n, n if val is None else val)
    folder = root / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    _write_classes(folder)
    for number, (split, count) in enumerate(zip(SPLITS, counts, strict=True)):
        if count < LEAST:
            raise InputError(split, f"must be at least {LEAST} images", count)
        scenes = [draw_scene(seed, number, row) for row in range(count)]
        for scene in scenes:
            _save(root, split, scene)
        _write_csv_files(folder, split, scenes)
        _write_text(folder, split, scenes)
        if split == "train":
            _write_samples(folder, scenes)
        else:
            _write_detections(folder, scenes, np.random.default_rng([seed, 2]))
    return root


def draw_scene(seed: int, split: int, number: int) -> Scene:
    """The `number`-th image of split 0 (training) or 1; boxes have six decimals."""
    rng = np.random.default_rng([seed, split, number])
    image_id = f"{int(rng.integers(1 << 36)):09x}{split:x}{number:06x}"
    long, short = int(rng.integers(144, 193)), int(rng.integers(112, 145))
    height, width = (short, long) if rng.random() < 0.5 else (long, short)
    image_HW3 = 0.5 * background(rng, long)[:height, :width] + 0.2
    side = np.array([width, height])
    group_G4 = place_boxes(rng, int(number == GROUPED), GROUP, side, np.zeros((0, 4)))
    wish = 0 if number in (BOXLESS, SILENT) else int(rng.integers(1, 5))
    single_G4 = place_boxes(rng, wish, OBJECT, side, group_G4)
    box_G4 = np.round(np.concatenate([group_G4, single_G4]))
    label_G = rng.choice([*LEAVES, VEHICLE], len(box_G4))
    group_G = np.arange(len(box_G4)) < len(group_G4)
    for box, label, group in zip(box_G4, label_G, group_G, strict=True):
        _paint(image_HW3, box, int(label), bool(group))
    related = {1, 2, 3, 4, 5, 6} if (label_G < VEHICLE).any() else set()
    related |= {VEHICLE, 8} if (label_G >= VEHICLE).any() else set()
    absent = [label for label in range(1, len(NAMES) + 1) if label not in related]
    absent = [label for label in absent if rng.random() < 0.5] or [1] * (number == BOXLESS)
    silent = number in (UNVERIFIED, SILENT)
    return Scene(
        image_id,
        finish(image_HW3, rng),
        np.round(box_G4 / [width, height, width, height], 6),
        label_G,
        group_G,
        [] if silent else sorted({int(label) for label in label_G}),
        [] if silent else absent,
    )


def _paint(image_HW3: np.ndarray, box: np.ndarray, label: int, group: bool) -> None:
    """One rectangle in place, or the nine of a group."""
    x1, y1, x2, y2 = (int(side) for side in box)
    cells = 3 if group else 1
    for row in range(cells):
        for column in range(cells):
            top, left = y1 + (y2 - y1) * row // cells, x1 + (x2 - x1) * column // cells
            bottom = y1 + (y2 - y1) * (row + 1) // cells - 3 * (row + 1 < cells)
            right = x1 + (x2 - x1) * (column + 1) // cells - 3 * (column + 1 < cells)
            part = image_HW3[top:bottom, left:right]
            part += 0.85 * (COLOURS[label - 1] - part)


def replica_tree() -> dict[str, Any]:
    """The hierarchy as Open Images publishes its own."""
    names = dict(zip(NAMES, CLASS_IDS, strict=True))

    def node(name: str, *below: dict[str, Any], **more: Any) -> dict[str, Any]:
        found: dict[str, Any] = {"LabelName": names[name], **more}
        return found | {"Subcategory": list(below)} if below else found

    fruit = node("Fruit", node("Tomato"), node("Apple"))
    food = node("Food", fruit, node("Vegetable", node("Tomato"), node("Carrot")))
    part = [{"LabelName": names["Apple"]}]  # says nothing about what an apple is
    return {"LabelName": "/m/0root", "Subcategory": [food, node("Vehicle", node("Car"), Part=part)]}


def _write_classes(folder: Path) -> None:
    rows = list(zip(CLASS_IDS, NAMES, strict=True))
    _write_rows(folder / "challenge-2019-classes-description-500.csv", rows)
    numbered = [(*row, label) for label, row in enumerate(rows, start=1)]
    _write_rows(folder / "cls-label-description.csv", numbered)
    path = folder / "challenge-2019-label500-hierarchy.json"
    path.write_text(json.dumps(replica_tree(), indent=1), encoding="utf-8")
    tree_KK = read_hierarchy(path, CLASS_IDS).above_KK.astype(np.int64)
    (folder / "class_label_tree.np").write_bytes(pickle.dumps(tree_KK, protocol=2))


def _write_csv_files(folder: Path, split: str, scenes: Sequence[Scene]) -> None:
    old = split == "train"
    boxes, labels = [V4_BOXES if old else BOXES], [V4_LABELS if old else LABELS]
    for scene in scenes:
        for box, label, group in zip(scene.box_G4, scene.label_G, scene.group_G, strict=True):
            x1, y1, x2, y2 = (f"{side:.6f}" for side in box)
            place, name = (x1, x2, y1, y2), CLASS_IDS[label - 1]
            head = (scene.image_id, "xclick", name, 1) if old else (scene.image_id, name)
            tail = (0, 0, int(group), 0, 0) if old else (int(group),)
            boxes.append((*head, *place, *tail))
        for sign, found in ((1, scene.present), (0, scene.absent)):
            for label in found:
                source = ("verification",) if old else ()
                labels.append((scene.image_id, *source, CLASS_IDS[label - 1], sign))
    stem = f"challenge-2019-{split}-detection"
    _write_rows(folder / f"{stem}-bbox.csv", boxes)
    _write_rows(folder / f"{stem}-human-imagelabels.csv", labels)


def _write_text(folder: Path, split: str, scenes: Sequence[Scene]) -> None:
    lines = []
    for scene in scenes:
        lines += [f"{split}/{scene.image_id}.jpg", "0 0", str(len(scene.label_G))]
        for box, label, group in zip(scene.box_G4, scene.label_G, scene.group_G, strict=True):
            lines.append(" ".join([str(label), *(f"{side:.6f}" for side in box), str(int(group))]))
    text = "".join(f"{line}\n" for line in lines)
    path = folder / f"challenge-2019-{split}-detection-bbox.txt"
    path.write_text(text, encoding="utf-8")


def _write_samples(folder: Path, scenes: Sequence[Scene]) -> None:
    samples = {
        label: [row for row, scene in enumerate(scenes) if label in scene.label_G]
        for label in range(1, len(NAMES) + 1)
    }
    (folder / "class_sample_train.pkl").write_bytes(pickle.dumps(samples, protocol=2))


def _write_detections(folder: Path, scenes: Sequence[Scene], rng: np.random.Generator) -> None:
    """What a fair detector would find: moved boxes, some of the wrong class; scores with ties."""
    known = [scene for scene in scenes if len(scene.label_G) or scene.present or scene.absent]
    count_N = [len(scene.label_G) for scene in known]
    box_D4 = np.concatenate([scene.box_G4 for scene in known])
    label_D = np.concatenate([scene.label_G for scene in known])
    size_D2 = box_D4[:, 2:] - box_D4[:, :2]
    moved_D4 = box_D4 + rng.normal(0, 0.08, box_D4.shape) * np.tile(size_D2, 2)
    wrong_D = rng.random(len(label_D)) < 0.2
    label_D = np.where(wrong_D, rng.integers(1, len(NAMES) + 1, len(label_D)), label_D)
    score_D = np.round(rng.uniform(0.3, 1, len(label_D)) - 0.2 * wrong_D, 2)
    found = Predictions(
        np.repeat(np.arange(len(known), dtype=np.int32), count_N), label_D.astype(np.int16),
        score_D.astype(float), moved_D4.clip(0, 1).astype(float), {},
    )  # fmt: skip
    ids = [scene.image_id for scene in known]
    write_predictions(folder / "detections-validation.csv", found, CLASS_IDS, ids)


def _write_rows(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def _save(root: Path, split: str, scene: Scene) -> None:
    import cv2

    name = split if split != "train" else f"train_{scene.image_id[0]}"
    path = root / "OpenImages" / name / f"{scene.image_id}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    quality = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    if not cv2.imwrite(str(path), scene.image_HW3[..., ::-1], quality):
        raise InputError(path, "cannot be written")
