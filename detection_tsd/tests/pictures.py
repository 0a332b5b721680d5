"""Pictures and films that tests write."""

from pathlib import Path

import cv2
import numpy as np


def save(path: Path, image: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image[..., ::-1] if image.ndim == 3 else image)
    return path


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    cells = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return cv2.GaussianBlur(cells, (5, 5), 0)


def film(path: Path, frames: int = 6, height: int = 48, width: int = 64) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 8, (width, height))
    for number in range(frames):
        writer.write(noise(height, width, number)[..., ::-1])
    writer.release()
    return path
