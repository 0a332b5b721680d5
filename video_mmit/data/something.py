"""Something-Something versions 1 and 2: hand actions, 174 classes, one label a video.

Version 1 is folders of JPEGs, `20bn-something-something-v1/<id>/00001.jpg`, with
`something-something-v1-labels.csv` (a template a line), `-train.csv` and `-validation.csv`
(`id;template`) and `-test.csv` (`id`). X-Temporal and temporal-shift-module sort the templates,
mmaction2 keeps the order of the file: their checkpoints do not share labels, see `class_order`.

Version 2 is `20bn-something-something-v2/<id>.webm` with `something-something-v2-labels.json`
({template: "index"}) and lists of {id, label, template, placeholders}, in which a template marks
the objects with square brackets; `-test.json` has {id} alone.

Left and right are labels in both: train without flips.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.log import InputError
from video_mmit.data.annotations import (
    Tree,
    Unique,
    checked,
    choose,
    find_file,
    parse_number,
    read_lines,
    read_text,
    reads_folders,
)
from video_mmit.data.lists import read_classes
from video_mmit.data.video_data import Reader, Sampler, Video, VideoData

ORDERS = ("sorted", "file")
TEST_PARTS = ("validation", "test")


def load_something_v1(
    root: Path | str,
    reader: Reader,
    sampler: Sampler,
    class_order: str = "sorted",
    test_part: str = "validation",
    frames: str = "20bn-something-something-v1",
) -> VideoData:
    """List Something-Something version 1.

    Args:
        root: folder of the csv files (they may also lie in its folder `annotations`).
        reader: of frame folders; the set has no video files.
        sampler: which frames make a clip.
        class_order: sorted (X-Temporal, temporal-shift-module) or file (mmaction2).
        test_part: validation, or test, whose videos have no labels.
        frames: folder of the frame folders, below root or absolute.

    Raises:
        InputError: anything missing or malformed, by file and line.
    """
    return load_templates(
        "sthv1", Path(root), reader, sampler, "something-something-v1", class_order, test_part,
        frames,
    )  # fmt: skip


def load_templates(
    name: str,
    root: Path,
    reader: Reader,
    sampler: Sampler,
    prefix: str,
    class_order: str,
    test_part: str,
    frames: str,
) -> VideoData:
    """List a set with files `<prefix>-{labels,train,validation,test}.csv` and frame folders."""
    choose("class_order", class_order, ORDERS)
    choose("test_part", test_part, TEST_PARTS)
    if not reads_folders(reader):
        what = "this set is folders of frames: choose data/reader=frames_5digits, or flow, not"
        raise InputError("data.reader", what, type(reader).__name__)
    classes = read_classes(find_file(root, f"{prefix}-labels.csv"))
    if class_order == "sorted":
        classes = tuple(sorted(classes))
    tree = Tree(root, frames, frames, reader)
    train, test = (
        _read_rows(find_file(root, f"{prefix}-{part}.csv"), classes, tree, part != "test")
        for part in ("train", test_part)
    )
    return checked(VideoData(name, root, classes, False, train, test, reader, sampler))


def _read_rows(path: Path, classes: Sequence[str], tree: Tree, labelled: bool) -> list[Video]:
    """Rows `id;template`, or `id` alone; a template may hold a semicolon, an id cannot."""
    unique, videos = Unique(), []
    numbers = {name: number for number, name in enumerate(classes)}
    for line in read_lines(path):
        name, semicolon, template = line.text.partition(";")
        if bool(semicolon) != labelled:
            what = f"row is not {'<id>;<template>' if labelled else '<id>'}"
            raise InputError(line, what, line.text)
        if labelled and template not in numbers:
            raise InputError(line, "template is none of the labels", template or "''")
        unique.add(_identifier(name, line), line)
        labels = (numbers[template],) if labelled else ()
        videos.append(Video(name, tree.home / name, None, labels))
    return videos


def _identifier(name: str, where: object) -> str:
    if not (name.isascii() and name.isdigit()):
        raise InputError(where, "id is no number", name or "''")
    return name


def load_something_v2(
    root: Path | str,
    reader: Reader,
    sampler: Sampler,
    test_part: str = "validation",
    videos: str = "20bn-something-something-v2",
    frames: str = "rawframes",
) -> VideoData:
    """List Something-Something version 2; its label file numbers the classes itself.

    Args:
        root: folder of the JSON files (they may also lie in its folder `annotations`).
        reader: how frames are read; decides whether `videos` or `frames` is meant.
        sampler: which frames make a clip.
        test_part: validation, or test, whose videos have no labels.
        videos: folder of the video files, below root or absolute.
        frames: folder of the frame folders.

    Raises:
        InputError: anything missing or malformed, by file and entry.
    """
    root, prefix = Path(root), "something-something-v2"
    choose("test_part", test_part, TEST_PARTS)
    numbers = _read_json_labels(find_file(root, f"{prefix}-labels.json"))
    tree = Tree(root, videos, frames, reader)
    train, test = (
        _read_json(find_file(root, f"{prefix}-{part}.json"), numbers, tree, part != "test")
        for part in ("train", test_part)
    )
    classes = tuple(sorted(numbers, key=lambda name: numbers[name]))
    return checked(VideoData("sthv2", root, classes, False, train, test, reader, sampler))


def _load_json(path: Path, kind: type) -> Any:
    try:
        content = json.loads(read_text(path), object_pairs_hook=_no_twins)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}", "is no JSON", error.msg) from error
    except KeyError as error:
        raise InputError(path, "an object has a key twice", error.args[0]) from error
    if not isinstance(content, kind) or not content:
        form = "an object" if kind is dict else "a list"
        raise InputError(path, f"must be {form} with at least one entry", type(content).__name__)
    return content


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; a key that occurs twice raises KeyError, plain `dict` keeps the last."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise KeyError(key)
        found[key] = value
    return found


def _read_json_labels(path: Path) -> dict[str, int]:
    content = _load_json(path, dict)
    numbers, unique = {}, Unique("index of a class")
    for template, index in content.items():
        where = f"{path} entry {template!r}"
        number = parse_number(str(index), where, "index of a class")
        if number >= len(content):
            what = f"index of a class is not in 0..{len(content) - 1}"
            raise InputError(where, what, number)
        unique.add(str(number), where)
        numbers[template] = number
    return numbers


def _read_json(path: Path, numbers: Mapping[str, int], tree: Tree, labelled: bool) -> list[Video]:
    unique, videos = Unique(), []
    for where, entry in _entries(path, ("id", "template") if labelled else ("id",)):
        name = _identifier(entry["id"], where)
        unique.add(name, where)
        labels: tuple[int, ...] = ()
        if labelled:
            template = entry["template"].translate(str.maketrans("", "", "[]"))
            if template not in numbers:
                raise InputError(where, "template is none of the labels", entry["template"])
            labels = (numbers[template],)
        videos.append(Video(name, tree.path(f"{name}.webm"), None, labels))
    return videos


def _entries(path: Path, keys: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Entries of a list with the names a complaint gives them, counted from 1."""
    for number, entry in enumerate(_load_json(path, list), start=1):
        where = f"{path} entry {number}"
        for key in keys:
            if not isinstance(entry, dict) or not isinstance(entry.get(key), str):
                raise InputError(where, f"is no object with a text under {key}", entry)
        yield where, entry
