"""What the loaders share: lines of a text file, labels, unique ids, places of videos, final checks.

Every complaint names file and line ("trainingSet.txt:17"). CR LF line ends, a byte order mark and
empty lines at the end are accepted; an empty line before the end is not, because it usually means
that a tool cut the file short and something was appended later.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from common.log import InputError, get_logger
from video_mmit.data.video import FlowReader, FolderReader
from video_mmit.data.video_data import Reader, VideoData


class Line(NamedTuple):
    """A line of a text file without its end; `str()` gives "path:number" for complaints."""

    path: Path
    number: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.number}"


def read_text(path: Path) -> str:
    """Content of a UTF-8 file.

    Raises:
        InputError: the file is missing or no UTF-8 text.
    """
    if not path.is_file():
        raise InputError(path, "file is missing")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(path, "is no UTF-8 text, first bad byte at", error.start) from error


def read_lines(path: Path) -> list[Line]:
    """Lines of a file from 1 on, without white space at their ends.

    Raises:
        InputError: as `read_text`; or the file is empty, or a line before the last text is.
    """
    texts = [text.rstrip() for text in read_text(path).split("\n")]
    while texts and not texts[-1]:
        texts.pop()
    if not texts:
        raise InputError(path, "is empty")
    lines = [Line(path, number, text) for number, text in enumerate(texts, start=1)]
    blank = next((line for line in lines if not line.text), None)
    if blank is not None:
        raise InputError(blank, "line is empty")
    return lines


def find_file(root: Path, *names: str) -> Path:
    """The one of `names` that lies in `root` or in its folder `annotations`, as mmaction2 has it.

    Raises:
        InputError: none is there, or two are and differ.
    """
    if not root.is_dir():
        raise InputError(root, "data set not found")
    places = [folder / name for folder in (root, root / "annotations") for name in names]
    present = [path for path in places if path.is_file()]
    if not present:
        others = f", nor is there {' or '.join(names[1:])}" if names[1:] else ""
        raise InputError(root / names[0], f"file is missing{others}")
    for other in present[1:]:
        if other.read_bytes() != present[0].read_bytes():
            raise InputError(present[0], "differs from another file that could be meant", other)
    return present[0]


def parse_number(text: str, where: object, what: str) -> int:
    """A whole number from 0 on; `what` names it in the complaint."""
    word = text.strip()
    if not (word.isascii() and word.isdigit()):
        raise InputError(where, f"{what} is no whole number from 0 on", word or "''")
    return int(word)


def parse_labels(words: Sequence[str], num_classes: int | None, where: object) -> tuple[int, ...]:
    """0-based labels in the order of the file; `num_classes` None accepts any from 0 on.

    Raises:
        InputError: no label, one that is no number of a class, or one that occurs twice.
    """
    if not words:
        raise InputError(where, "row has no label")
    labels = tuple(parse_number(word, where, "label") for word in words)
    for label in labels:
        if num_classes is not None and label >= num_classes:
            raise InputError(where, f"label is not in 0..{num_classes - 1}", label)
    if len(set(labels)) != len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise InputError(where, "label occurs twice", twice)
    return labels


class Unique:
    """Refuses a name that was there before; `what` says what it names."""

    def __init__(self, what: str = "video"):
        self.what = what
        self._first: dict[str, object] = {}

    def add(self, name: str, where: object) -> None:
        """Note `name`, read at `where`; `InputError` when it is known."""
        first = self._first.setdefault(name, where)
        if first is not where:
            place = f"line {first.number}" if isinstance(first, Line) else first
            raise InputError(where, f"{self.what} occurs twice, first at {place}", name)


def choose(name: str, value: str, accepted: Sequence[str]) -> str:
    """`value`, which must be one of `accepted`; `name` is the option it was given for."""
    if value not in accepted:
        raise InputError(name, f"accepted: {', '.join(accepted)}", value)
    return value


def reads_folders(reader: Reader) -> bool:
    """Whether a video is a folder of frames for this reader, and not a file."""
    return isinstance(reader, FolderReader | FlowReader)


class Tree:
    """Where the videos of a split lie: files below one folder, or frame folders below another.

    A frame folder has the name of the video file without its suffix, as `tools.extract_frames`
    and mmaction2 write them.

    Args:
        root: folder of the data set.
        videos: folder of the video files, below root or absolute.
        frames: folder of the frame folders, likewise.
        reader: decides which of the two is meant.

    Raises:
        InputError: that folder is missing.
    """

    def __init__(self, root: Path, videos: str, frames: str, reader: Reader):
        self.folders = reads_folders(reader)
        self.home = root / (frames if self.folders else videos)
        if not self.home.is_dir():
            kind = "frames" if self.folders else "videos"
            raise InputError(self.home, f"folder of {kind} is missing")

    def path(self, name: str) -> Path:
        """Place of the video `name`, which is relative and has a suffix; nothing is touched."""
        return self.home / (name.rpartition(".")[0] if self.folders else name)


def two_trees(
    root: Path, videos: Sequence[str], frames: Sequence[str], reader: Reader
) -> tuple[Tree, Tree]:
    """Trees of a set whose training and validation videos lie in folders of their own."""
    for name, folders in (("videos", videos), ("frames", frames)):
        if isinstance(folders, str) or len(folders) != 2:
            raise InputError(name, "must be two folders, [training, validation]", folders)
    return Tree(root, videos[0], frames[0], reader), Tree(root, videos[1], frames[1], reader)


def parse_place(text: str, where: object) -> str:
    """`class_dir/file.suffix`, the only form of a path in M-MiT, MiT and UCF101."""
    folder, slash, file = text.partition("/")
    stem, dot, suffix = file.rpartition(".")
    if not (folder and slash and stem and dot and suffix) or "/" in file or folder == "..":
        raise InputError(where, "path is not of the form class/file.suffix", text or "''")
    return text


def checked(data: VideoData) -> VideoData:
    """`data`, logged in one line and checked as a whole; counts of 0 in `skipped` are dropped.

    Raises:
        InputError: a split is empty.
    """
    for part, videos in (("training", data.train), ("test", data.test)):
        if not videos:
            raise InputError(data.root, f"{data.name} has no {part} video; skipped", data.skipped)
    logger = get_logger(__name__)
    counts = (data.name, len(data.train), len(data.test), data.num_classes)
    logger.info("%s: %d training videos, %d test videos, %d classes", *counts)
    skipped = {reason: count for reason, count in data.skipped.items() if count}
    for reason, count in skipped.items():
        logger.info("%s: left out, %s: %d", data.name, reason, count)
    shared = {video.id for video in data.train} & {video.id for video in data.test}
    if shared:
        example = min(shared)
        logger.warning(
            "%s: %d videos are in both splits, such as %s", data.name, len(shared), example
        )
    return replace(data, skipped=skipped)
