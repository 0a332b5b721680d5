"""A small set in the layout of COCO 2017, with the oddities that its loaders and users meet.

`root` holds `train2017`, `val2017` and `annotations/instances_{train,val}2017.json`. Pictures are
landscape and portrait, JPEG and PNG; an object is a coloured rectangle (person), ellipse (car) or
triangle (toothbrush) with its outline as a polygon. In each split

* the first image has a crowd, given as an uncompressed run-length code;
* the second has no object;
* the third has, beside others, a box of half a pixel;
* the fourth is a grey JPEG;
* ids of images and annotations have gaps, and those of the categories are 1, 3 and 90.

Letters: H W rows and columns, P points of an outline.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.log import InputError
from detection_tsd.data.glyphs import background, finish, place_boxes

CATEGORIES = {1: "person", 3: "car", 90: "toothbrush"}
GROUPS = ("person", "vehicle", "indoor")
COLOURS = np.array([[0.85, 0.15, 0.15], [0.1, 0.45, 0.9], [0.95, 0.85, 0.1]])
LEAST = 3  # images of a split, one for each of the oddities that are always there
CROWDED, EMPTY, TINY, GREY = range(4)
OBJECT = (24.0, 60.0)  # width and height of an object, pixels
SPECK = 0.5  # pixels, of the box that is too small to be an object
POINTS = 24  # of the outline of an ellipse
JPEG_QUALITY = 95


class _Picture(NamedTuple):
    image_HW3: np.ndarray
    annotations: list[dict[str, Any]]


def make_coco_replica(root: Path | str, n: int, seed: int = 0, val: int | None = None) -> Path:
    """Write the set; the same arguments give the same images and annotations.

    Args:
        root: folder, made when it is not there.
        n: training images.
        seed: at least 0.
        val: validation images, drawn independently; None for as many as `n`.

    Returns:
        `root`.

    Raises:
        InputError: fewer than three images in a split.
    """
    root = Path(root)
    counts = {"train2017": n, "val2017": n if val is None else val}
    for split, (name, count) in enumerate(counts.items()):
        if count < LEAST:
            raise InputError(name.removesuffix("2017"), f"must be at least {LEAST} images", count)
        _write_split(root, name, count, [seed, split])
    return root


def _write_split(root: Path, name: str, count: int, key: list[int]) -> None:
    (root / name).mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(count):
        picture = _draw(np.random.default_rng([*key, number]), number)
        image_id = 9 + 7 * number  # the ids of COCO have gaps, too
        height, width = picture.image_HW3.shape[:2]
        file_name = _save(root / name, picture.image_HW3, image_id, number)
        images.append(
            {"id": image_id, "file_name": file_name, "height": height, "width": width, "license": 1}
        )
        for annotation in picture.annotations:
            annotations.append(
                {"id": 100 + 3 * len(annotations), "image_id": image_id} | annotation
            )
    categories = [
        {"id": number, "name": title, "supercategory": group}
        for (number, title), group in zip(CATEGORIES.items(), GROUPS, strict=True)
    ]
    content = {
        "info": {"description": "replica of the layout of COCO 2017"},
        "licenses": [{"id": 1, "name": "none", "url": ""}],
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }
    (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))


def _save(folder: Path, image_HW3: np.ndarray, image_id: int, number: int) -> str:
    """Write every third picture as PNG, the others as JPEG; returns the name."""
    import cv2

    suffix = ".png" if number % 3 == 1 else ".jpg"
    name = f"{image_id:012d}{suffix}"
    written = image_HW3[..., ::-1] if number != GREY else image_HW3.mean(axis=2).astype(np.uint8)
    quality = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY] if suffix == ".jpg" else []
    if not cv2.imwrite(str(folder / name), written, quality):
        raise InputError(folder / name, "cannot be written")
    return name


def _draw(rng: np.random.Generator, number: int) -> _Picture:
    long, short = int(rng.integers(144, 193)), int(rng.integers(112, 145))
    height, width = (short, long) if rng.random() < 0.5 else (long, short)
    # dark, so that no object vanishes in a grey picture
    image_HW3 = 0.3 * background(rng, long)[:height, :width] + 0.05
    annotations: list[dict[str, Any]] = []
    taken_B4 = np.zeros((0, 4))
    if number == CROWDED:
        crowd, taken_B4 = _crowd(image_HW3, rng)
        annotations.append(crowd)
    wish = 0 if number == EMPTY else int(rng.integers(1, 5))
    for box in place_boxes(rng, wish, OBJECT, np.array([width, height]), taken_B4):
        kind = int(rng.integers(len(CATEGORIES)))
        outline_P2 = _outline(kind, box)
        _fill(image_HW3, outline_P2, kind)
        annotations.append(_annotation(kind, outline_P2))
    if number == TINY:
        corner = np.array([width, height]) * rng.uniform(0.2, 0.8, 2)
        annotations.append(_annotation(0, _outline(0, np.concatenate([corner, corner + SPECK]))))
    return _Picture(finish(image_HW3, rng), annotations)


def _outline(kind: int, box: np.ndarray) -> np.ndarray:
    """Points (P, 2) of a rectangle, ellipse or triangle that touches all sides of the box."""
    angle_P = np.arange(POINTS) * (2 * np.pi / POINTS)
    shapes = (
        np.array([[0.0, 0], [1, 0], [1, 1], [0, 1]]),
        0.5 + 0.5 * np.stack([np.cos(angle_P), np.sin(angle_P)], axis=1),
        np.array([[0.5, 0], [1, 1], [0, 1]]),
    )
    return np.round(box[:2] + shapes[kind] * (box[2:] - box[:2]), 2)


def _fill(image_HW3: np.ndarray, outline_P2: np.ndarray, kind: int) -> None:
    """Paint a shape in place; a coordinate of 0 is the left side of the first pixel."""
    import cv2

    mask_HW = np.zeros(image_HW3.shape[:2], np.uint8)
    point_P2 = np.round((outline_P2 - 0.5) * 16).astype(np.int32)
    cv2.fillPoly(mask_HW, [point_P2], 255, lineType=cv2.LINE_AA, shift=4)
    strength_HW1 = mask_HW[..., None] / 255
    image_HW3 += 0.85 * strength_HW1 * (COLOURS[kind] - image_HW3)


def _annotation(kind: int, outline_P2: np.ndarray) -> dict[str, Any]:
    low, high = outline_P2.min(axis=0), outline_P2.max(axis=0)
    x_P, y_P = outline_P2.T
    doubled = x_P @ np.roll(y_P, -1) - y_P @ np.roll(x_P, -1)
    box = [float(value) for value in (*low, *(high - low))]
    return {
        "category_id": list(CATEGORIES)[kind],
        "bbox": [round(value, 2) for value in box],
        "area": round(abs(float(doubled)) / 2, 4),
        "iscrowd": 0,
        "segmentation": [[float(value) for value in outline_P2.ravel()]],
    }


def _crowd(image_HW3: np.ndarray, rng: np.random.Generator) -> tuple[dict[str, Any], np.ndarray]:
    """Paint many small persons in place; returns their common annotation and its box (1, 4)."""
    height, width = image_HW3.shape[:2]
    left, top = (int(rng.integers(0, size // 3)) for size in (width, height))
    mask_HW = np.zeros((height, width), bool)
    for column in range(5):
        x, y = left + 9 * column, top + int(rng.integers(0, 4))
        mask_HW[y : y + 18, x : x + 6] = True
    image_HW3[mask_HW] += 0.85 * (COLOURS[0] - image_HW3[mask_HW])
    row_H, column_W = (np.flatnonzero(mask_HW.any(axis=axis)) for axis in (1, 0))
    x1, y1 = int(column_W[0]), int(row_H[0])
    x2, y2 = int(column_W[-1]) + 1, int(row_H[-1]) + 1
    annotation = {
        "category_id": 1,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": int(mask_HW.sum()),
        "iscrowd": 1,
        "segmentation": {"counts": run_lengths(mask_HW), "size": [height, width]},
    }
    return annotation, np.array([[x1, y1, x2, y2]], float)


def run_lengths(mask_HW: np.ndarray) -> list[int]:
    """Uncompressed code of a mask: lengths of its runs down the columns, zeros first."""
    flat = mask_HW.ravel(order="F").astype(np.int8)
    change = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0], change, [len(flat)]])).tolist()
    return [0, *runs] if flat[0] else runs
