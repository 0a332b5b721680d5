"""Videos to predict: a file, a picture, a folder of numbered frames, or a folder of such things."""

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.log import InputError
from video_mmit.data.decoders import DecodedClip
from video_mmit.data.video import FileReader, FlowReader, FolderReader
from video_mmit.data.video_data import Clip, Reader, Video

PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
FILMS = (
    ".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts",
    ".webm", ".wmv",
)  # fmt: skip
NUMBERED = re.compile(r"(.*?)(\d+)(\.[^.]+)")
FLOW = re.compile(r"(|.*[^a-zA-Z])([xy])(_?)")  # what stands before the number of a flow picture


class Source(NamedTuple):
    """One video to look at, and how it is read."""

    video: Video
    reader: Reader

    def rate(self) -> float | None:
        """Frames per second that the file states; None for pictures, which state nothing."""
        return frame_rate(self.video.path) if isinstance(self.reader, FileReader) else None


class PictureReader:
    """Reads one picture as a video of one frame."""

    @contextmanager
    def open(self, video: Video) -> Iterator[Clip]:
        """Open a picture; decoding it raises `InputError` when it is none."""
        import cv2

        def decode(wanted: np.ndarray) -> np.ndarray:
            data = np.fromfile(video.path, dtype=np.uint8)
            image_HW3 = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
            if image_HW3 is None:
                raise InputError(video.path, "picture cannot be decoded", f"{data.size} bytes")
            return cv2.cvtColor(image_HW3, cv2.COLOR_BGR2RGB)[None]

        yield DecodedClip(video.path, 1, decode)


@dataclass(frozen=True)
class SeriesReader:
    """Reads the one series of numbered pictures of a folder, whatever their names.

    Args:
        flow: read pictures of optical flow instead.
    """

    flow: bool = False

    @contextmanager
    def open(self, video: Video) -> Iterator[Clip]:
        """Open a folder of pictures.

        Raises:
            InputError: a picture without a number, no series of this kind or more than one, or a
                number is missing.
        """
        with _folder_reader(video.path, self.flow).open(video) as clip:
            yield clip


def find_videos(
    path: Path, backend: str = "decord", flow: bool = False, leave_out: Path | None = None
) -> list[Source]:
    """The videos at `path`, in the order of their names; numbers in names sort by value.

    A file is one video, or one frame when it is a picture. A folder with pictures is one video:
    their common name and first number are found when it is opened. Any other folder is searched,
    with the folders in it. Names that begin with a dot are left out.

    Args:
        path: of a file or folder.
        backend: that decodes files, see `FileReader`.
        flow: look for pictures of optical flow ("flow_x_00001.jpg" and "flow_y_00001.jpg").
        leave_out: a folder that is not searched, because results are written there.

    Returns:
        At least one source; ids are paths relative to `path`, or its name for a single video.

    Raises:
        InputError: nothing there, or a folder whose content is ambiguous; unknown backend.
    """
    try:
        films = FileReader(backend)
    except InputError:
        raise
    except ValueError as error:
        raise InputError("backend", "is not known", error) from error
    if not path.exists():
        raise InputError(path, "no such file or folder")
    ignored = None if leave_out is None else leave_out.resolve()
    if path.is_file():
        found = [(path, path)]
    else:
        found = [(item, path) for item in _search(path, ignored)]
    if not found:
        raise InputError(path, "holds no video and no picture")
    return [_source(item, top, films, flow) for item, top in found]


def _search(folder: Path, ignored: Path | None) -> Iterator[Path]:
    """Files and folders that are one video each."""
    names = sorted((n for n in os.listdir(folder) if not n.startswith(".")), key=_by_number)
    paths = [folder / name for name in names]
    films = [p for p in paths if p.suffix.lower() in FILMS and p.is_file()]
    pictures = [p for p in paths if p.suffix.lower() in PICTURES and p.is_file()]
    if films and pictures:
        what = "holds videos and pictures, give one kind"
        raise InputError(folder, what, f"{films[0].name}, {pictures[0].name}")
    if pictures:
        yield folder
        return
    yield from films
    for below in paths:
        if below.is_dir() and not below.is_symlink() and below.resolve() != ignored:
            yield from _search(below, ignored)


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sort key under which "10" comes after "9"."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if i % 2 else (-1, part) for i, part in enumerate(parts)]


def _source(item: Path, top: Path, films: FileReader, flow: bool) -> Source:
    single = item == top
    name = item.name or item.resolve().name
    video = Video(name if single else item.relative_to(top).as_posix(), item, None, ())
    if item.is_dir():
        return Source(video, SeriesReader(flow))
    if flow:
        raise InputError(item, "the model needs a folder of optical-flow pictures, this is a file")
    if item.suffix.lower() in PICTURES:
        return Source(video, PictureReader())
    return Source(video, films)


def _folder_reader(folder: Path, flow: bool) -> Reader:
    """The reader for the one series of numbered pictures in a folder.

    Raises:
        InputError: a picture without a number, no series of this kind, or more than one.
    """
    series = _series(folder)
    flows, used = {}, set()
    for (start, suffix), numbers in series.items():
        match = FLOW.fullmatch(start)
        other = (f"{match[1]}y{match[3]}", suffix) if match and match[2] == "x" else None
        if match is not None and other in series:
            flows[f"{_escape(match[1])}{{}}{_escape(match[3])}", suffix] = numbers
            used |= {(start, suffix), other}
    plain = {(_escape(key[0]), key[1]): n for key, n in series.items() if key not in used}
    wanted = flows if flow else plain
    if len(wanted) != 1:
        kind = "optical-flow pictures" if flow else "pictures"
        names = ", ".join(f"{start}NUMBER{suffix}" for start, suffix in wanted)
        raise InputError(folder, f"need one series of {kind}, found {len(wanted)}", names)
    (((start, suffix), numbers),) = wanted.items()
    template = f"{start}{{:0{min(map(len, numbers))}d}}{_escape(suffix)}"
    first = min(map(int, numbers))
    return FlowReader(template, first) if flow else FolderReader(template, first)


def _series(folder: Path) -> dict[tuple[str, str], list[str]]:
    """Digits of the pictures by what stands before and behind them in the name."""
    series: dict[tuple[str, str], list[str]] = {}
    for name in sorted(os.listdir(folder)):
        if name.startswith(".") or Path(name).suffix.lower() not in PICTURES:
            continue
        match = NUMBERED.fullmatch(name)
        if match is None:
            raise InputError(folder, "has a picture without a number at the end of its name", name)
        series.setdefault((match[1], match[3]), []).append(match[2])
    return series


def _escape(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def frame_rate(path: Path) -> float | None:
    """Frames per second that a video file states; None when it states none."""
    import cv2

    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # FFmpeg would write to stderr
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    capture = cv2.VideoCapture(os.path.abspath(path), cv2.CAP_FFMPEG)
    try:
        rate = float(capture.get(cv2.CAP_PROP_FPS)) if capture.isOpened() else 0.0
    finally:
        capture.release()
        cv2.utils.logging.setLogLevel(level)
    return rate if math.isfinite(rate) and rate > 0 else None
