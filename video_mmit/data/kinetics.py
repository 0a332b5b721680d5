"""Kinetics-400, -600 and -700: one label a video, from a csv file per split.

The csv has the header `label,youtube_id,time_start,time_end,split` (more columns are passed over);
a clip is `<class directory>/<youtube_id>_<start, 6 digits>_<end, 6 digits>.mp4`, times in seconds.
Copies differ in the rule that makes a directory of a label:

- label: the label itself, `passing American football (in game)`
- mmaction2: space to `_`, no `"`: `passing_American_football_(in_game)`
- xtemporal: also no `'`, `(`, `)`: `passing_American_football_in_game`
- flat: no directory at all
"""

import csv
import io
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from common.log import InputError, get_logger
from video_mmit.data.annotations import (
    Tree,
    Unique,
    checked,
    choose,
    find_file,
    parse_number,
    read_text,
    two_trees,
)
from video_mmit.data.lists import read_classes
from video_mmit.data.video_data import Reader, Sampler, Video, VideoData

COLUMNS = ("label", "youtube_id", "time_start", "time_end", "split")
SPLITS = {"train": ("train",), "val": ("val", "validate", "validation")}
ORDERS = ("alphabetical", "label_map")


class _Clip(NamedTuple):
    where: str
    label: str
    name: str


def load_kinetics(
    root: Path | str,
    reader: Reader,
    sampler: Sampler,
    version: int = 400,
    train_csv: str | None = None,
    val_csv: str | None = None,
    class_order: str = "alphabetical",
    label_map: Path | str | None = None,
    directory: str = "mmaction2",
    missing: str = "error",
    videos: Sequence[str] = ("train", "val"),
    frames: Sequence[str] = ("rawframes_train", "rawframes_val"),
) -> VideoData:
    """List a version of Kinetics.

    Args:
        root: folder of the csv files (they may also lie in its folder `annotations`).
        reader: how frames are read; decides whether `videos` or `frames` is meant.
        sampler: which frames make a clip.
        version: 400, 600 or 700.
        train_csv: file below root; None takes train.csv or mmaction2's kinetics_train.csv.
        val_csv: likewise val.csv, validate.csv or kinetics_val.csv.
        class_order: alphabetical (by directory name, as mmaction2) or label_map (X-Temporal).
        label_map: file with a label a line, in the order of the classes.
        directory: label, mmaction2, xtemporal or flat.
        missing: what becomes of clips that are not on the disk, as many have left YouTube.
            "error" looks for none, and the reader names the first one it meets; "skip" looks for
            all, leaves them out and counts them in `skipped`.
        videos: folders of the training and validation files, below root or absolute.
        frames: the same for frame folders.

    Raises:
        InputError: anything missing or malformed, by file and line.
    """
    root = Path(root)
    _check_options(version, class_order, label_map, missing)
    rule = DIRECTORIES[choose("directory", directory, tuple(DIRECTORIES))]
    files = {
        "train": _csv_file(root, train_csv, "train.csv", "kinetics_train.csv"),
        "val": _csv_file(root, val_csv, "val.csv", "validate.csv", "kinetics_val.csv"),
    }
    clips = {part: list(_read_csv(file, part)) for part, file in files.items()}
    classes = _alphabetical(clips["train"]) if label_map is None else read_classes(label_map)
    parts: dict[str, list[Video]] = {}
    skipped: dict[str, int] = {}
    for part, tree in zip(files, two_trees(root, videos, frames, reader), strict=True):
        listed = _videos(clips[part], classes, rule, tree)
        kept = _present(listed) if missing == "skip" else listed
        parts[part] = kept
        skipped[f"missing from {tree.home}"] = len(listed) - len(kept)
    name = f"kinetics{version}"
    return checked(
        VideoData(
            name, root, classes, False, parts["train"], parts["val"], reader, sampler, skipped
        )
    )


def _check_options(
    version: int, class_order: str, label_map: Path | str | None, missing: str
) -> None:
    choose("version", str(version), ("400", "600", "700"))
    choose("class_order", class_order, ORDERS)
    choose("missing", missing, ("error", "skip"))
    if class_order == "label_map" and label_map is None:
        raise InputError("label_map", "class_order=label_map needs the file")
    if class_order != "label_map" and label_map is not None:
        raise InputError("label_map", f"is not used with class_order={class_order}", label_map)


def _csv_file(root: Path, given: str | None, *usual: str) -> Path:
    return find_file(root, *(usual if given is None else (given,)))


def _read_csv(path: Path, part: str) -> Iterator[_Clip]:
    """Rows of the split; `where` is the line a row ends in."""
    rows = csv.reader(io.StringIO(read_text(path), newline=""))
    try:
        header = next(rows, [])
        lacking = [name for name in COLUMNS if name not in header]
        if lacking:
            raise InputError(f"{path}:1", f"header has no column {lacking[0]}", ",".join(header))
        for row in rows:
            where = f"{path}:{rows.line_num}"
            if not row:
                _only_at_the_end(rows, where)
                return
            if len(row) != len(header):
                raise InputError(where, f"row has not {len(header)} fields", ",".join(row)[:80])
            yield _parse_row(dict(zip(header, row, strict=True)), where, part)
    except csv.Error as error:
        raise InputError(f"{path}:{rows.line_num}", "is no csv", error) from error


def _only_at_the_end(rows: Iterator[list[str]], where: str) -> None:
    if any(rows):
        raise InputError(where, "line is empty")


def _parse_row(row: dict[str, str], where: str, part: str) -> _Clip:
    if row["split"] not in SPLITS[part]:
        raise InputError(where, f"split is not {' or '.join(SPLITS[part])}", row["split"] or "''")
    for name in ("label", "youtube_id"):
        if not row[name].strip() or "/" in row[name]:
            raise InputError(where, f"{name} is empty or holds a slash", row[name] or "''")
    start, end = (parse_number(row[name], where, name) for name in ("time_start", "time_end"))
    if end <= start:
        raise InputError(where, "time_end is not after time_start", f"{start}..{end}")
    return _Clip(where, row["label"], f"{row['youtube_id']}_{start:06d}_{end:06d}.mp4")


def _mmaction2(label: str) -> str:
    return label.replace(" ", "_").replace('"', "")


def _xtemporal(label: str) -> str:
    return _mmaction2(label).translate(str.maketrans("", "", "'()"))


DIRECTORIES: dict[str, Callable[[str], str]] = {
    "label": lambda label: f"{label}/",
    "mmaction2": lambda label: f"{_mmaction2(label)}/",
    "xtemporal": lambda label: f"{_xtemporal(label)}/",
    "flat": lambda label: "",
}


def _alphabetical(clips: Sequence[_Clip]) -> tuple[str, ...]:
    """Labels sorted as mmaction2 sorts them: by the directory, where a space is already `_`."""
    return tuple(sorted({clip.label for clip in clips}, key=_mmaction2))


def _videos(
    clips: Sequence[_Clip], classes: Sequence[str], rule: Callable[[str], str], tree: Tree
) -> list[Video]:
    # Label maps are written with and without quotes, brackets and spaces.
    numbers = {_xtemporal(name): number for number, name in enumerate(classes)}
    if len(numbers) != len(classes):
        raise InputError("label_map", "two labels differ only in quotes, brackets or spaces")
    videos, unique = [], Unique()
    for clip in clips:
        number = numbers.get(_xtemporal(clip.label))
        if number is None:
            what = f"label is none of the {len(classes)} classes"
            raise InputError(clip.where, what, clip.label)
        name = rule(clip.label) + clip.name
        unique.add(name, clip.where)
        videos.append(Video(name, tree.path(name), None, (number,)))
    return videos


def _present(videos: Sequence[Video]) -> list[Video]:
    """Videos that are on the disk; lists every folder once instead of asking for every file."""
    listed: dict[Path, set[str]] = {}
    kept = []
    for video in videos:
        folder = video.path.parent
        if folder not in listed:
            listed[folder] = set(os.listdir(folder)) if folder.is_dir() else set()
        if video.path.name in listed[folder]:
            kept.append(video)
    gone = {video.path for video in videos} - {video.path for video in kept}
    if gone:
        get_logger(__name__).warning("%d clips are missing, such as %s", len(gone), min(gone))
    return kept
