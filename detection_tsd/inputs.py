"""Pictures, folders and videos to look at, and films of what was seen.

Letters: H W rows and columns, 3 red, green, blue.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from common.log import InputError, get_logger

PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
VIDEOS = (
    ".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".webm",
    ".wmv",
)  # fmt: skip
USUAL_RATE = 25.0  # frames per second of a film whose source states none


class Source(NamedTuple):
    """A file to look at; `id` is its path below the folder that was named, or its name."""

    path: Path
    id: str

    @property
    def is_video(self) -> bool:
        """By its suffix; anything else is taken for a picture."""
        return self.path.suffix.lower() in VIDEOS


def find_sources(path: Path, leave_out: Path | None = None) -> list[Source]:
    """The file at `path`, or all pictures and videos of a folder and its folders.

    They are in the order of their names, numbers in names by their value. Hidden files and folders
    are passed over.

    Args:
        path: a file or folder.
        leave_out: a folder that is not searched, where output goes.

    Raises:
        InputError: nothing there, or a folder without a picture or video.
    """
    if path.is_file():
        return [Source(path, path.name)]
    if not path.is_dir():
        raise InputError(path, "no such file or folder")
    found = list(_walk(path, None if leave_out is None else leave_out.resolve()))
    if not found:
        raise InputError(path, f"has no picture or video ({', '.join(PICTURES + VIDEOS)})")
    sources = [Source(item, item.relative_to(path).as_posix()) for item in found]
    return sorted(sources, key=lambda source: _natural(source.id))


def _walk(root: Path, leave_out: Path | None) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and (Path(folder) / name).resolve() != leave_out
        ]
        for name in names:
            if name.lower().endswith(PICTURES + VIDEOS) and not name.startswith("."):
                yield Path(folder) / name


def _natural(text: str) -> tuple[list[tuple[str, int]], str]:
    words = re.findall(r"(\D*)(\d*)", text)
    return [(letters, int(digits or -1)) for letters, digits in words], text


class Film:
    """A video that is read frame after frame; use as a context manager and iterate.

    Attributes:
        stated: frames that the file says it has, or None.
        rate: frames per second, or None where the file states none.

    Raises:
        InputError: it cannot be opened; while iterating, no frame can be decoded.
    """

    def __init__(self, path: Path):
        import cv2

        self.path, self._video = path, cv2.VideoCapture(str(path))
        if not self._video.isOpened():
            raise InputError(path, "is no video that can be decoded")
        stated = int(self._video.get(cv2.CAP_PROP_FRAME_COUNT))
        rate = float(self._video.get(cv2.CAP_PROP_FPS))
        self.stated = stated if stated > 0 else None
        self.rate = rate if 0 < rate < 1000 else None

    def __iter__(self) -> Iterator[np.ndarray]:
        """Frames uint8 (H, W, 3), RGB."""
        import cv2

        count = 0
        while True:
            there, frame_HW3 = self._video.read()
            if not there:
                break
            count += 1
            yield cv2.cvtColor(frame_HW3, cv2.COLOR_BGR2RGB)
        if not count:
            raise InputError(self.path, "has no frame that can be decoded")
        if self.stated is not None and count < self.stated:
            message = "%s: %d frames could be decoded, the file states %d"
            get_logger(__name__).warning(message, self.path, count, self.stated)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._video.release()


class FilmWriter:
    """Writes frames of one size as MPEG-4; the file appears under its name when it is complete.

    Args:
        path: of the mp4; folders are made.
        rate: frames per second.
    """

    def __init__(self, path: Path, rate: float | None):
        self.path, self.rate = path, rate or USUAL_RATE
        self._part = path.with_name(f".{path.stem}.part{path.suffix}")
        self._writer: Any = None

    def write(self, frame_HW3: np.ndarray) -> None:
        """Append a frame uint8 (H, W, 3), RGB; an odd side is filled up to an even one.

        Raises:
            InputError: the file cannot be written.
        """
        import cv2

        height, width = frame_HW3.shape[:2]
        even = ((0, height % 2), (0, width % 2), (0, 0))
        frame_HW3 = np.ascontiguousarray(np.pad(frame_HW3, even)[..., ::-1])
        if self._writer is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            code, size = cv2.VideoWriter.fourcc(*"mp4v"), frame_HW3.shape[1::-1]
            self._writer = cv2.VideoWriter(str(self._part), code, self.rate, size)
            if not self._writer.isOpened():
                raise InputError(self.path, "cannot be written")
        self._writer.write(frame_HW3)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._writer is not None:
            self._writer.release()
        if error is None and self._part.exists():
            self._part.replace(self.path)
        self._part.unlink(missing_ok=True)
