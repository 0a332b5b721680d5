"""Readers: single frames of a video file, of a folder of pictures, of a folder of flow pictures.

A reader opens its file for one item and closes it again, so that nothing is shared with data
workers, and decodes on one thread: many workers, one thread each. It never guesses. Whatever
cannot be decoded is an `InputError` that names the file, never another frame.

Shapes: n frames asked for, H rows, W columns, C channels.
"""

import os
import re
import string
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from common.log import InputError
from video_mmit.data.decoders import (
    DecodedClip,
    inspect,
    open_decord,
    open_opencv,
    open_pyav,
    stack,
)
from video_mmit.data.video_data import Clip, Reader, Video

__all__ = ["Clip", "FileReader", "FlowReader", "FolderReader", "Reader", "read_frames"]

MODULES = {"decord": "decord", "opencv": "cv2", "pyav": "av"}
EXTRAS = {"decord": "mmit", "opencv": "mmit", "pyav": "video-av"}


@dataclass(frozen=True)
class FileReader:
    """Reads video files.

    All backends return the same frames for the same positions, turned upright where the file says
    that it was recorded on its side. decord seeks to the key frame before a position, the others
    decode from the start to the last position asked for.

    Args:
        backend: "decord", "opencv" (without optional packages) or "pyav".

    Raises:
        ValueError: another backend.
        InputError: the package of the backend is not installed.
    """

    backend: str = "decord"

    def __post_init__(self) -> None:
        if self.backend not in MODULES:
            raise ValueError(f"backend={self.backend!r}; accepted: {', '.join(MODULES)}")
        if find_spec(MODULES[self.backend]) is None:
            extra = f"pip install 'vision-tasks[{EXTRAS[self.backend]}]', or choose another"
            raise InputError("reader.backend", f"is not installed: {extra}", self.backend)

    @contextmanager
    def open(self, video: Video) -> Iterator[Clip]:
        """Open a video file.

        Raises:
            InputError: it is missing, empty, cut off, or no video.
        """
        head = inspect(video.path)
        # An absolute path cannot be mistaken for a protocol ("a:b.mp4").
        path = os.path.abspath(video.path)
        if self.backend == "decord":
            clip = open_decord(path)
        elif self.backend == "opencv":
            clip = open_opencv(path, head)
        else:
            clip = open_pyav(path)
        try:
            yield clip
        finally:
            clip.close()


@dataclass(frozen=True)
class FolderReader:
    """Reads folders with one picture per frame, numbered without a hole.

    Args:
        template: name of a picture, with a field for its number.
        first: number of the first picture.

    Raises:
        ValueError: the template has not exactly one field.
    """

    template: str = "img_{:05d}.jpg"
    first: int = 1

    def __post_init__(self) -> None:
        _check_template(self.template, 1)

    @contextmanager
    def open(self, video: Video) -> Iterator[Clip]:
        """Open a folder of pictures.

        Raises:
            InputError: the folder is missing or has no picture, or the numbering has a hole.
        """
        import cv2

        files = _numbered(video.path, self.template, (), self.first)

        def decode(wanted: np.ndarray) -> np.ndarray:
            paths = [files[i] for i in wanted]
            bgr = [_picture(path, cv2.IMREAD_COLOR) for path in paths]
            return stack([cv2.cvtColor(image, cv2.COLOR_BGR2RGB) for image in bgr], paths)

        yield DecodedClip(video.path, len(files), decode)


@dataclass(frozen=True)
class FlowReader:
    """Reads folders with two grey pictures per frame: horizontal (x) and vertical (y) flow, C = 2.

    Args:
        template: name of a picture, with a field for "x" or "y" and then one for its number.
        first: number of the first picture.

    Raises:
        ValueError: the template has not exactly two fields.
    """

    template: str = "flow_{}_{:05d}.jpg"
    first: int = 1

    def __post_init__(self) -> None:
        _check_template(self.template, 2)

    @contextmanager
    def open(self, video: Video) -> Iterator[Clip]:
        """Open a folder of flow pictures.

        Raises:
            InputError: as `FolderReader.open`, or x and y differ in number.
        """
        import cv2

        x, y = (_numbered(video.path, self.template, (axis,), self.first) for axis in "xy")
        if len(x) != len(y):
            raise InputError(video.path, "differs in number of x and y", f"{len(x)} and {len(y)}")

        def decode(wanted: np.ndarray) -> np.ndarray:
            paths = [files[i] for i in wanted for files in (x, y)]
            grey = stack([_picture(path, cv2.IMREAD_GRAYSCALE) for path in paths], paths)
            return np.stack([grey[::2], grey[1::2]], axis=-1)

        yield DecodedClip(video.path, len(x), decode)


def read_frames(path: str | Path, index: np.ndarray, backend: str = "decord") -> np.ndarray:
    """Frames of one video file.

    Args:
        path: of the file.
        index: (n,) 0-based positions in any order; repeats are allowed.
        backend: of `FileReader`.

    Returns:
        (n, H, W, 3) uint8, RGB.

    Raises:
        InputError: names the file, when it cannot be read or has fewer frames.
    """
    with FileReader(backend).open(Video(str(path), Path(path), None, ())) as clip:
        return clip.read(index)


def _check_template(template: str, fields: int) -> None:
    parts = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    if len(parts) != fields:
        raise ValueError(f"template={template!r} must have {fields} fields like {{:05d}}")


def _numbered(folder: Path, template: str, axis: tuple[str, ...], first: int) -> list[Path]:
    """The pictures of a folder in order, from one listing."""
    pattern, values = "", list(axis)
    for literal, field, _, _ in string.Formatter().parse(template):
        value = re.escape(values.pop(0)) if field is not None and values else r"(\d+)"
        pattern += re.escape(literal) + (value if field is not None else "")
    below = template.rpartition("/")[0].format(*axis)  # "{}/frame_{:05d}.jpg" has subfolders
    try:
        names = {f"{below}/{name}" if below else name for name in os.listdir(folder / below)}
    except OSError as error:
        raise InputError(folder / below, "folder cannot be read", error.strerror or "") from error
    found = [match for name in names if (match := re.fullmatch(pattern, name))]
    count = sum(int(match[1]) >= first for match in found)
    if not count:
        raise InputError(folder, "has no frame like", template.format(*axis, first))
    files = [template.format(*axis, first + i) for i in range(count)]
    for name in files:
        if name not in names:
            raise InputError(folder, f"frame is missing, of {count} numbered from {first}", name)
    return [folder / name for name in files]


def _picture(path: Path, mode: int) -> np.ndarray:
    import cv2

    try:
        data = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise InputError(path, "frame cannot be read", error.strerror or "") from error
    picture = cv2.imdecode(data, mode) if data.size else None
    if picture is None:
        raise InputError(path, "frame cannot be decoded", f"{data.size} bytes")
    return np.asarray(picture)
