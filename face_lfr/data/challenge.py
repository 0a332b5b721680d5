"""Test sets of the LFR challenge (ICCV 2019): deepglint-large (images) and iQiyi-large (videos).

    <root>/filelist.txt   images: one relative path a line; videos: the first word of a line
    <root>/labels.txt     ours: one whole number a line, in list order; -1 is a distractor

The labels of the challenge stayed on its server, so `labels.txt` is optional. Formats: insightface
challenges/iccv19-lfr; the list of frames: trojans-face-recognizer (the authors' code).

Shapes: N images or frames, V videos, H rows, W columns.
"""

import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.log import InputError, get_logger
from face_lfr.data.folder import Names
from face_lfr.data.transforms import read_rgb as read_image

Numbers = NDArray[np.int64]
DISTRACTOR = -1
SUFFIXES = frozenset(".jpg .jpeg .png .bmp".split())
_WHOLE = re.compile(r"[+-]?[0-9]+")


def read_lines(path: Path) -> list[str]:
    """Lines of a UTF-8 text without white space at their ends; line k of the file is entry k - 1.

    Empty lines at the end are dropped; CR LF and a byte order mark are accepted.

    Raises:
        InputError: the file is missing, empty or no UTF-8, or a line before the last text is empty.
    """
    if not path.is_file():
        raise InputError(path, "file is missing")
    try:
        lines = [line.rstrip() for line in path.read_bytes().decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise InputError(path, "is no UTF-8 text, first bad byte at", error.start) from error
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise InputError(path, "is empty")
    if not all(lines):
        raise InputError(f"{path}:{lines.index('') + 1}", "line is empty")
    return lines


def read_integers(path: Path, columns: int) -> Numbers:
    """A text of `columns` whole numbers a line, (lines, columns) int64; millions of lines a second.

    Raises:
        InputError: as `read_lines`; or a line that holds anything else, which is named.
    """
    if not path.is_file():
        raise InputError(path, "file is missing")
    content = path.read_bytes().rstrip()
    if not content:
        raise InputError(path, "is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)  # 1.0 in the place of 1
            found_RC = np.loadtxt(path, np.int64, comments=None, ndmin=2, encoding="utf-8")
    except (ValueError, DeprecationWarning) as error:
        _check_integers(path, columns)
        raise InputError(path, "does not hold whole numbers only", error) from error
    if found_RC.shape != (content.count(b"\n") + 1, columns):  # an empty line, or too many words
        _check_integers(path, columns)
    return found_RC


def _check_integers(path: Path, columns: int) -> None:
    """Name the first line that is no row of `columns` whole numbers."""
    for number, line in enumerate(read_lines(path), start=1):
        words = line.split()
        if len(words) != columns or not all(_WHOLE.fullmatch(word) for word in words):
            what = "is no whole number" if columns == 1 else f"line is not {columns} whole numbers"
            raise InputError(f"{path}:{number}", what, line)


def read_labels(path: Path, count: int | None = None) -> Numbers:
    """Labels, one a line: an identity from 0 on, or -1 for a distractor; (N,) int64.

    Args:
        path: of the text.
        count: entries it has to have.

    Raises:
        InputError: no whole number, one below -1, or another count; names the line.
    """
    labels_N = read_integers(path, 1)[:, 0]
    low = np.flatnonzero(labels_N < DISTRACTOR)
    if low.size:
        what = "label is below -1, which stands for a distractor"
        raise InputError(f"{path}:{low[0] + 1}", what, int(labels_N[low[0]]))
    if count is not None and len(labels_N) != count:
        raise InputError(
            path, f"needs {count} labels, one for each line of the list", len(labels_N)
        )
    return labels_N


@dataclass(frozen=True)
class ImageFiles:
    """N image files by row; labels are -1 where there are none.

    Attributes:
        root: folder the names are relative to.
        names: of the files.
        labels_N: int64, or None.
    """

    root: Path
    names: Sequence[str]
    labels_N: Numbers | None = None

    def __len__(self) -> int:
        return len(self.names)

    def read(self, row: int) -> np.ndarray:
        """Image uint8 (H, W, 3), RGB; `InputError` naming the file when it cannot be read."""
        return read_image(self.name(row))

    def label(self, row: int) -> int:
        """Label of the row, or -1."""
        return DISTRACTOR if self.labels_N is None else int(self.labels_N[row])

    def name(self, row: int) -> str:
        """Path of the row."""
        return str(self.root / self.names[row])


def load_deepglint(
    root: Path | str, filelist: str = "filelist.txt", labels: str = "labels.txt"
) -> ImageFiles:
    """The image track: aligned 112 x 112 faces in list order (1,862,120 in the published list).

    No image is touched. Without the file `labels` the set can be embedded and not scored.

    Raises:
        InputError: a missing or malformed list, a path twice in it, or labels that do not fit.
    """
    root = Path(root)
    names = read_lines(root / filelist)
    _refuse_twice(root / filelist, names, "image")
    labels_N = _optional_labels(root / labels, len(names))
    get_logger(__name__).info("%s: %d images%s", root, len(names), _count(labels_N))
    return ImageFiles(root, Names(names), labels_N)


@dataclass(frozen=True)
class Videos:
    """V videos of N frames in all.

    Attributes:
        videos: names in list order.
        frames: the N frames; the label of a frame is that of its video.
        video_N: int64, number of the video of each frame, in [0, V).
        labels_V: int64 with -1 for a distractor, or None.
    """

    videos: Sequence[str]
    frames: ImageFiles
    video_N: Numbers
    labels_V: Numbers | None = None


def load_iqiyi(
    root: Path | str, filelist: str = "filelist.txt", labels: str = "labels.txt"
) -> Videos:
    """The video track: `<root>/<video>/*.jpg` of aligned faces, 203,848 videos when published.

    The video is the first word of each line; its frames are ordered by number.

    Raises:
        InputError: a missing or malformed list, a video twice in it, one without a folder or
            without frames, or labels that do not fit.
    """
    root = Path(root)
    lines = read_lines(root / filelist)
    videos = [line.split()[0] for line in lines]
    _refuse_twice(root / filelist, videos, "video")
    names: list[str] = []
    counts = []
    for number, video in enumerate(videos, start=1):
        frames = _frames_of(root / video, f"{root / filelist}:{number}")
        names += (f"{video}/{frame}" for frame in frames)
        counts.append(len(frames))
    video_N = np.repeat(np.arange(len(videos)), counts)
    return _videos(root, videos, names, video_N, root / labels)


def load_frame_lists(
    image_list: Path | str,
    video_list: Path | str,
    root: Path | str = "",
    labels: Path | str | None = None,
) -> Videos:
    """Videos of two lists, in the form of trojans-face-recognizer; frames keep their list order.

    Args:
        image_list: a frame a line, `prefix/<video>/<frame>.jpg`; its second field is the video.
        video_list: lines that begin with the name of a video; their order numbers the videos.
        root: folder the frames are relative to.
        labels: one whole number for each video.

    Raises:
        InputError: a malformed line, a video twice, a frame of a video that is not listed, or a
            video without a frame.
    """
    videos = [line.split()[0] for line in read_lines(Path(video_list))]
    _refuse_twice(Path(video_list), videos, "video")
    number_of = {video: number for number, video in enumerate(videos)}
    names, numbers = [], []
    for line, text in enumerate(read_lines(Path(image_list)), start=1):
        where, name = f"{image_list}:{line}", text.split()[0]
        fields = name.split("/")
        if len(fields) < 3:
            raise InputError(where, "path is not prefix/<video>/<frame>", name)
        if fields[1] not in number_of:
            raise InputError(where, f"video is not in {video_list}", fields[1])
        names.append(name)
        numbers.append(number_of[fields[1]])
    video_N = np.array(numbers, np.int64)
    empty = np.flatnonzero(np.bincount(video_N, minlength=len(videos)) == 0)
    if empty.size:
        what = f"video has no frame in {image_list}"
        raise InputError(f"{video_list}:{empty[0] + 1}", what, videos[empty[0]])
    return _videos(Path(root), videos, names, video_N, None if labels is None else Path(labels))


def _videos(
    root: Path, videos: Sequence[str], names: Sequence[str], video_N: Numbers, labels: Path | None
) -> Videos:
    labels_V = None if labels is None else _optional_labels(labels, len(videos))
    labels_N = None if labels_V is None else labels_V[video_N]
    counts = len(videos), len(names), _count(labels_V)
    get_logger(__name__).info("%s: %d videos of %d frames%s", root, *counts)
    return Videos(videos, ImageFiles(root, Names(names), labels_N), video_N, labels_V)


def _frames_of(folder: Path, where: str) -> list[str]:
    if not folder.is_dir():
        raise InputError(where, "video has no folder", folder)
    names = [name for name in os.listdir(folder) if os.path.splitext(name)[1].lower() in SUFFIXES]
    if not names:
        raise InputError(where, "video has no frame in", folder)
    return sorted(names, key=lambda name: ([int(n) for n in re.findall(r"\d+", name)], name))


def _optional_labels(path: Path, count: int) -> Numbers | None:
    return read_labels(path, count) if path.is_file() else None


def _count(labels_N: Numbers | None) -> str:
    if labels_N is None:
        return ", no labels"
    known = labels_N[labels_N >= 0]
    return f", {len(np.unique(known))} identities, {len(labels_N) - len(known)} distractors"


def _refuse_twice(path: Path, names: Sequence[str], what: str) -> None:
    if len(set(names)) == len(names):
        return
    first: dict[str, int] = {}
    for number, name in enumerate(names, start=1):
        if first.setdefault(name, number) != number:
            message = f"{what} occurs twice, first in line {first[name]}"
            raise InputError(f"{path}:{number}", message, name)
