"""Training sets as lists of images.

- plain: `<path> <class>` (FaceX-Zoo, TFace); the path may hold spaces, a tab separates as well
- lst: `<index><tab><class>[<tab>...]<tab><path>`, as MXNet's im2rec writes it
- insightface: `<aligned><tab><path><tab><class>[<tab>...]`, its own kind of .lst

Letters: N images.
"""

import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.log import InputError
from face_lfr.data.face_data import FaceData, check_labels, count_gaps
from face_lfr.data.folder import FileImages, Names
from face_lfr.data.noise import with_label_noise

FORMATS = ("plain", "lst", "insightface")


class Entry(NamedTuple):
    """One line: path as written, class."""

    path: str
    label: int


def read_list(path: Path | str, format: str | None = None) -> list[Entry]:
    """Read a list.

    Args:
        path: of the list.
        format: "plain", "lst" or "insightface"; None takes "lst" for files of this suffix, else
            "plain".

    Raises:
        InputError: the file cannot be read or is empty, or a line is not of the format. Names
            file and line.
        ValueError: another format.
    """
    return list(_entries(Path(path), format))


def _entries(path: Path, format: str | None) -> Iterator[Entry]:
    format, number = _format(path, format), 0
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                yield _parse(path, number, line.rstrip("\n"), format)
    except OSError as error:
        raise InputError(path, "list cannot be read", error.strerror or "") from error
    except UnicodeDecodeError as error:
        raise InputError(path, "list is no UTF-8 text", error.reason) from error
    if not number:
        raise InputError(path, "list is empty")


def _format(path: Path, format: str | None) -> str:
    if format is None:
        return "lst" if path.suffix == ".lst" else "plain"
    if format not in FORMATS:
        raise ValueError(f"format={format!r}; accepted: {', '.join(FORMATS)}")
    return format


def _parse(path: Path, number: int, line: str, format: str) -> Entry:
    if format == "plain":
        words = line.rsplit(maxsplit=1)
        name, label, least = words[0] if words else "", words[-1] if words else "", 2
    else:
        words, least = line.split("\t"), 3
        at, where = (1, -1) if format == "lst" else (2, 1)
        name, label = (words[where].strip(), words[at]) if len(words) >= least else ("", "")
    if len(words) < least or not name:
        raise InputError(f"{path} line {number}", f"is not of the format {format}", repr(line))
    try:
        value = float(label)
    except ValueError:
        value = np.nan
    if not (0 <= value < 2**53 and value == int(value)):
        raise InputError(f"{path} line {number}", "label is no class number", repr(label))
    return Entry(name, int(value))


def write_list(
    path: Path | str, entries: Iterable[Entry | tuple[str, int]], format: str | None = None
) -> None:
    """Write a list that `read_list` reads; `path` is complete or as it was before.

    Args:
        path: of the list.
        entries: path and class of each image.
        format: as `read_list`.

    Raises:
        ValueError: another format, no entry, a negative class, or a path that is empty or holds a
            tab, a line break or white space at an end.
    """
    path, lines = Path(path), []
    format = _format(path, format)
    for number, (name, label) in enumerate(entries):
        if not name or name != name.strip() or "\t" in name or len(name.splitlines()) != 1:
            raise ValueError(f"path={name!r} cannot stand in a list")
        if label < 0:
            raise ValueError(f"label={label} of {name!r} must not be negative")
        lines.append(
            {
                "plain": f"{name} {label}\n",
                "lst": f"{number}\t{label:.6f}\t{name}\n",
                "insightface": f"1\t{name}\t{label}\n",
            }[format]
        )
    if not lines:
        raise ValueError("entries is empty; a list has at least one image")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(lines), encoding="utf-8")
    os.replace(temporary, path)


def load_list(
    path: Path | str,
    root: Path | str,
    name: str = "list",
    noise: float = 0.0,
    noise_seed: int = 0,
    format: str | None = None,
    classes: int | None = None,
    allow_gaps: bool = False,
) -> FaceData:
    """Load a training set from a list of image files, which are only opened when they are needed.

    Args:
        path: of the list.
        root: folder that its paths start from; absolute paths stay as they are.
        name: of the set.
        noise: fraction of the images that get a random class.
        noise_seed: of their choice.
        format: as `read_list`.
        classes: C; None takes the largest label + 1.
        allow_gaps: accept classes without an image; they are counted in `skipped`.

    Raises:
        InputError: as `read_list`; a label is not in [0, classes), or a class has no image.
        ValueError: format or noise is not accepted.
    """
    path, root = Path(path), Path(root)
    labels = array("q")

    def paths() -> Iterator[str]:
        for entry in _entries(path, format):
            labels.append(entry.label)
            yield entry.path

    names = Names(paths())
    labels_N = np.array(labels, dtype=np.int64)
    images = FileImages(root, names, labels_N)
    num_classes = int(labels_N.max()) + 1 if classes is None else int(classes)
    check_labels(labels_N, num_classes, "data.classes", lambda row: f"{path} line {row + 1}")
    skipped = count_gaps(labels_N, num_classes, path, allow_gaps)
    data = FaceData(name, root, num_classes, images, labels_N, skipped)
    return with_label_noise(data, noise, noise_seed)
