"""Person crops of a picture, a folder, a folder of folders or a video, one at a time."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.log import InputError, get_logger
from reid_rqen.data.tracklet import IMAGE_SUFFIXES, numbers, subfolders
from reid_rqen.data.transforms import read_bgr

PICTURES = (*IMAGE_SUFFIXES, ".webp", ".tif", ".tiff", ".ppm")
VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
KEPT_ROWS = 256  # pictures kept for drawing are not larger


class Crop(NamedTuple):
    """One frame: its path (`path#number` in a video) and (H, W, 3) uint8, blue first."""

    name: str
    image: np.ndarray


class CropSet(NamedTuple):
    """The frames of one person: `pictures` in order, or a video when there are none."""

    path: Path
    pictures: tuple[Path, ...]

    def read(self) -> Iterator[Crop]:
        """Decode frame by frame.

        Raises:
            InputError: names the picture or video that cannot be decoded.
        """
        if not self.pictures:
            return read_video(self.path)
        return (Crop(str(path), read_bgr(path)) for path in self.pictures)


def find_crops(path: Path) -> list[CropSet]:
    """The sets of crops at `path`; numbers in names sort by value.

    Raises:
        InputError: nothing there, an empty folder, or pictures beside folders.
    """
    if path.is_file():
        return [CropSet(path, () if path.suffix.lower() in VIDEOS else (path,))]
    if not path.is_dir():
        raise InputError(path, "no such file or folder")
    pictures, folders = _pictures(path), [path / name for name in subfolders(path)]
    if pictures and folders:
        raise InputError(path, "holds pictures and folders; give one kind", folders[0].name)
    if pictures:
        return [CropSet(path, pictures)]
    if not folders:
        raise InputError(path, "holds no picture and no folder of pictures")
    sets = [CropSet(folder, _pictures(folder)) for folder in folders]
    for crops in sets:
        if not crops.pictures:
            raise InputError(crops.path, "holds no picture")
    return sets


def read_video(path: Path) -> Iterator[Crop]:
    """Every frame of a video, decoded as it is asked for.

    Raises:
        InputError: the file cannot be opened, or holds no frame.
    """
    import cv2

    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # it would print before our error does
    capture = cv2.VideoCapture(str(path))
    try:
        announced, count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), 0
        while (image := _next(capture)) is not None:
            yield Crop(f"{path}#{count}", image)
            count += 1
    finally:
        capture.release()
    if not count:
        raise InputError(path, "video cannot be decoded, or holds no frame")
    if count < announced:
        get_logger(__name__).warning("%s: %d of %d frames decoded", path, count, announced)


class Sample:
    """Evenly spaced pictures of a stream of unknown length, in bounded memory.

    Every `step`-th frame is kept; when there are eight times too many, every second one goes and
    the step doubles.
    """

    def __init__(self, most: int):
        self.most, self.step = most, 1
        self.kept: list[tuple[int, np.ndarray]] = []

    def offer(self, position: int, image: np.ndarray) -> None:
        """Consider the frame (blue first) at `position`; positions count up from 0."""
        if not self.most or position % self.step:
            return
        self.kept.append((position, _shrink(image)))
        if len(self.kept) > 8 * self.most:
            self.kept = self.kept[::2]
            self.step *= 2

    def chosen(self) -> list[tuple[int, np.ndarray]]:
        """At most `most` (position, picture with red first), from the first to the last kept."""
        count = min(self.most, len(self.kept))
        rows = np.linspace(0, len(self.kept) - 1, count).round().astype(int)
        return [self.kept[i] for i in rows]


def _pictures(folder: Path) -> tuple[Path, ...]:
    found = (p for p in folder.iterdir() if p.suffix.lower() in PICTURES)
    found = (p for p in found if not p.name.startswith(".") and p.is_file())
    return tuple(sorted(found, key=lambda p: (numbers(p.stem), p.name)))


def _next(capture: Any) -> np.ndarray | None:
    found, image = capture.read()
    return image if found else None


def _shrink(image: np.ndarray) -> np.ndarray:
    """A copy with red first and at most `KEPT_ROWS` rows."""
    import cv2

    rows, columns = image.shape[:2]
    if rows > KEPT_ROWS:
        size = (max(1, round(columns * KEPT_ROWS / rows)), KEPT_ROWS)
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(image[..., ::-1])
