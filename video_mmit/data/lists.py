"""Lists of videos: one video a line, in the format of X-Temporal or in one of mmaction2's two.

- xtemporal: `<path> <frames> <label>,<label>,...`
- mmaction_video: `<path> <label> <label> ...`
- mmaction_frames: `<path> <frames> <label> <label> ...`

Fields are separated by exactly one space, so a path cannot hold one. Labels count from 0.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from common.log import InputError
from video_mmit.data.annotations import (
    Line,
    Unique,
    choose,
    parse_labels,
    parse_number,
    read_lines,
)

FORMATS = ("xtemporal", "mmaction_video", "mmaction_frames")


class Entry(NamedTuple):
    """One line: path as written, number of frames (None when the format has none), labels."""

    path: str
    frames: int | None
    labels: tuple[int, ...]


def read_list(
    path: Path | str, format: str = "xtemporal", num_classes: int | None = None
) -> list[Entry]:
    """Read a list; `num_classes` None accepts any label from 0 on.

    Raises:
        InputError: unknown format, missing or empty file, malformed line, label outside the
            classes or twice in a line, path twice in the file. Names file and line.
    """
    choose("format", format, FORMATS)
    unique, entries = Unique(), []
    for line in read_lines(Path(path)):
        entry = parse_entry(line, format, num_classes)
        unique.add(entry.path, line)
        entries.append(entry)
    return entries


def parse_entry(line: Line, format: str, num_classes: int | None = None) -> Entry:
    """One line in the given format; `InputError` as `read_list`."""
    name, *words = line.text.split(" ")
    if not name or not all(words):
        raise InputError(line, "fields are not separated by exactly one space", line.text)
    frames = None
    if format != "mmaction_video":
        frames = _parse_frames(words, line)
        words = words[1:]
    if format == "xtemporal":
        if len(words) != 1:
            raise InputError(line, "row is not <path> <frames> <label,label,...>", line.text)
        words = words[0].split(",")
    return Entry(name, frames, parse_labels(words, num_classes, line))


def _parse_frames(words: Sequence[str], line: Line) -> int:
    if len(words) < 2:
        raise InputError(line, "row needs a path, a number of frames and a label", line.text)
    frames = parse_number(words[0], line, "number of frames")
    if not frames:
        raise InputError(line, "number of frames must be at least 1", frames)
    return frames


def format_entry(entry: Entry, format: str = "xtemporal") -> str:
    """The line of an entry, without its end.

    Raises:
        InputError: unknown format, a path with white space, or no labels.
        ValueError: the format has a number of frames and the entry none.
    """
    choose("format", format, FORMATS)
    if not entry.path or entry.path.split() != [entry.path]:
        raise InputError(entry.path or "''", "a path in a list cannot be empty or hold a space")
    if not entry.labels:
        raise InputError(entry.path, "has no label, and a list needs one")
    if format == "mmaction_video":
        return " ".join([entry.path, *map(str, entry.labels)])
    if entry.frames is None:
        raise ValueError(f"entry={entry} has no number of frames, which format={format} needs")
    separator = "," if format == "xtemporal" else " "
    return f"{entry.path} {entry.frames} {separator.join(map(str, entry.labels))}"


def write_list(path: Path | str, entries: Iterable[Entry], format: str = "xtemporal") -> None:
    """Write a list; `path` is complete or as it was before.

    Raises:
        InputError: as `format_entry`; or a path occurs twice.
        ValueError: no entries, or as `format_entry`.
    """
    unique, lines = Unique(), []
    for number, entry in enumerate(entries, start=1):
        unique.add(entry.path, Line(Path(path), number, ""))
        lines.append(format_entry(entry, format) + "\n")
    if not lines:
        raise ValueError("entries is empty; a list holds at least one video")
    write_text(Path(path), "".join(lines))


def read_classes(path: Path | str) -> tuple[str, ...]:
    """Names of the classes, one a line in the order of their labels.

    Raises:
        InputError: missing or empty file, empty line, or a name that occurs twice.
    """
    unique, lines = Unique("class"), read_lines(Path(path))
    for line in lines:
        unique.add(line.text, line)
    return tuple(line.text for line in lines)


def write_classes(path: Path | str, classes: Sequence[str]) -> None:
    """Write what `read_classes` reads."""
    write_text(Path(path), "".join(f"{name}\n" for name in classes))


def write_text(path: Path, text: str) -> None:
    """Write a file that is complete or as it was before; its folder is made when absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
