"""Generated sets in the layout of COCO, for rows that read files.

Letters: H W rows and columns, G objects of an image.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

SIDES = (480, 640)  # height and width of the usual picture of COCO
OBJECTS = 7  # of an image on average, as in COCO
CATEGORIES = 80
CORNERS = 20  # of the outline of an object
QUALITY = 90  # of the JPEG files


def write_set(
    root: Path, images: int, seed: int, pictures: int | None = None, sides: tuple[int, int] = SIDES
) -> Path:
    """Write `train2017` and `annotations/instances_train2017.json`; returns `root`.

    Args:
        root: folder, made when it is not there.
        images: entries of the annotation file.
        seed: of boxes and pictures.
        pictures: files that are written; None writes all. The loaders look at the first few only.
        sides: height and width of the pictures.
    """
    import cv2

    rng = np.random.default_rng(seed)
    content = annotation_file(images, rng, sides)
    folder = root / "train2017"
    folder.mkdir(parents=True)
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    for entry in content["images"][:pictures]:
        picture_HW3 = a_picture(rng, sides)
        cv2.imwrite(
            str(folder / entry["file_name"]), picture_HW3, [cv2.IMWRITE_JPEG_QUALITY, QUALITY]
        )
    return root


def annotation_file(
    images: int, rng: np.random.Generator, sides: tuple[int, int]
) -> dict[str, Any]:
    """Content of an annotation file: ids with gaps, outlines, a crowd in every hundredth image."""
    height, width = sides
    entries: list[dict[str, Any]] = []
    for image in range(images):
        for number in range(1 + rng.poisson(OBJECTS - 1)):
            size_2 = rng.uniform(0.05, 0.5, 2) * (width, height)
            corner_2 = rng.uniform(0, 1, 2) * ((width, height) - size_2)
            x, y, w, h = np.round([*corner_2, *size_2], 2).tolist()
            entries.append({
                "id": len(entries) + 1,
                "image_id": 2 * image + 1,
                "category_id": int(rng.integers(1, CATEGORIES + 1)),
                "bbox": [x, y, w, h],
                "area": round(0.7 * w * h, 2),
                "iscrowd": int(number > 0 and image % 100 == 0),
                "segmentation": [np.round(_outline(rng, x, y, w, h), 2).tolist()],
            })  # fmt: skip
    return {
        "images": [
            {"id": 2 * row + 1, "file_name": f"{row:012}.jpg", "height": height, "width": width}
            for row in range(images)
        ],
        "annotations": entries,
        "categories": [{"id": k, "name": f"class {k}"} for k in range(1, CATEGORIES + 1)],
    }


def _outline(rng: np.random.Generator, x: float, y: float, w: float, h: float) -> np.ndarray:
    """Corners x, y, x, y, ... around the middle of a box."""
    angle = np.sort(rng.uniform(0, 2 * np.pi, CORNERS))
    corners = np.stack([x + w / 2 * (1 + np.cos(angle)), y + h / 2 * (1 + np.sin(angle))], axis=1)
    return corners.ravel()


def a_picture(rng: np.random.Generator, sides: tuple[int, int]) -> np.ndarray:
    """Smooth colours and a little noise, uint8 (H, W, 3): a JPEG file of about 100 KiB."""
    import cv2

    height, width = sides
    coarse_HW3 = rng.integers(0, 256, (12, 16, 3)).astype(np.float32)
    smooth_HW3 = cv2.resize(coarse_HW3, (width, height), interpolation=cv2.INTER_CUBIC)
    noise_HW3 = rng.normal(0, 12, (height, width, 3))
    found: np.ndarray = np.clip(smooth_HW3 + noise_HW3, 0, 255).astype(np.uint8)
    return found
