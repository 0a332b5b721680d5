"""Data of one's own: two list files and a folder, optionally names of the classes."""

from collections.abc import Sequence
from pathlib import Path

from common.log import InputError
from video_mmit.data.annotations import checked
from video_mmit.data.lists import Entry, read_classes, read_list
from video_mmit.data.video_data import Reader, Sampler, Video, VideoData

MOST_CLASSES = 100_000  # a greater label is a slip, not a class


def load_lists(
    root: Path | str,
    reader: Reader,
    sampler: Sampler,
    train_list: Path | str,
    test_list: Path | str,
    classes: Path | str | None = None,
    format: str = "xtemporal",
    multi_label: bool = True,
    name: str = "lists",
) -> VideoData:
    """List the videos of two list files (see `lists`).

    Nothing below `root` is touched: the reader names a video that is missing when it is read.

    Args:
        root: folder the paths of the lists are relative to; a path may also be absolute. It names
            a video file, or a folder of frames when `reader` reads those.
        reader: how frames are read.
        sampler: which frames make a clip.
        train_list: list of the training videos.
        test_list: list of the evaluation videos.
        classes: file with one name a line, which sets the number of classes; without it the
            training list's greatest label does, and classes are named by their numbers.
        format: xtemporal, mmaction_video or mmaction_frames, of both lists.
        multi_label: False demands exactly one label a video.
        name: of the data set.

    Raises:
        InputError: `root` or a file is missing, or a line is refused (named by its number).
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(root, "folder of videos is missing")
    names = None if classes is None else read_classes(classes)
    listed = _read(train_list, format, names, multi_label)
    if names is None:
        names = _numbered(listed, train_list)
    test_rows = _read(test_list, format, names, multi_label)
    train, test = (
        [Video(row.path, root / row.path, *row[1:]) for row in part] for part in (listed, test_rows)
    )
    return checked(VideoData(name, root, names, multi_label, train, test, reader, sampler))


def _read(
    path: Path | str, format: str, names: Sequence[str] | None, multi_label: bool
) -> list[Entry]:
    entries = read_list(path, format, None if names is None else len(names))
    # Entry n is line n: an empty line between two entries is refused.
    for number, entry in enumerate(entries, start=1):
        if len(entry.labels) > 1 and not multi_label:
            what = "several labels in a set with multi_label=false"
            raise InputError(f"{path}:{number}", what, ",".join(map(str, entry.labels)))
    return entries


def _numbered(entries: Sequence[Entry], path: Path | str) -> tuple[str, ...]:
    """Names of classes that have none: their numbers."""
    last = max(max(entry.labels) for entry in entries)
    if last >= MOST_CLASSES:
        what = f"without a file of classes a label must be below {MOST_CLASSES}"
        raise InputError(path, what, last)
    return tuple(str(label) for label in range(last + 1))
