"""UCF101: 13,320 videos, 101 classes, three splits.

`classInd.txt` holds `1 ApplyEyeMakeup` a line, from 1; `trainlist0{1,2,3}.txt` holds
`Class/v_Class_g08_c01.avi 1` a line, `testlist0{1,2,3}.txt` the same without the number.
"""

from collections.abc import Mapping
from pathlib import Path

from common.log import InputError
from video_mmit.data.annotations import (
    Tree,
    Unique,
    checked,
    find_file,
    parse_number,
    parse_place,
    read_lines,
)
from video_mmit.data.video_data import Reader, Sampler, Video, VideoData

SPLITS = (1, 2, 3)


def load_ucf101(
    root: Path | str,
    reader: Reader,
    sampler: Sampler,
    split: int = 1,
    lists: str = "ucfTrainTestlist",
    videos: str = "UCF-101",
    frames: str = "rawframes",
) -> VideoData:
    """List one split of UCF101; published numbers are means over the three.

    Args:
        root: folder of the data set.
        reader: how frames are read; decides whether `videos` or `frames` is meant.
        sampler: which frames make a clip.
        split: 1, 2 or 3.
        lists: folder of the text files, below root or absolute.
        videos: folder of the class folders.
        frames: the same for frame folders.

    Raises:
        InputError: anything missing or malformed, by file and line.
    """
    root = Path(root)
    if split not in SPLITS:
        raise InputError("split", "accepted: 1, 2, 3", split)
    numbers = _read_classes(find_file(root / lists, "classInd.txt"))
    tree = Tree(root, videos, frames, reader)
    train, test = (
        _read_part(find_file(root / lists, f"{part}list{split:02d}.txt"), numbers, tree, part)
        for part in ("train", "test")
    )
    return checked(VideoData("ucf101", root, tuple(numbers), False, train, test, reader, sampler))


def _read_classes(path: Path) -> dict[str, int]:
    """0-based number of every class, in order; the file counts from 1, upwards without a gap."""
    numbers: dict[str, int] = {}
    unique = Unique("class")
    for line in read_lines(path):
        number, _, name = line.text.partition(" ")
        if not name or parse_number(number, line, "index of a class") != line.number:
            raise InputError(line, f"row is not <{line.number}> <class>", line.text)
        unique.add(name, line)
        numbers[name] = line.number - 1
    return numbers


def _read_part(path: Path, numbers: Mapping[str, int], tree: Tree, part: str) -> list[Video]:
    unique, videos = Unique(), []
    for line in read_lines(path):
        name, space, number = line.text.partition(" ")
        if bool(space) != (part == "train"):
            form = "<class/file> <index>" if part == "train" else "<class/file>"
            raise InputError(line, f"row is not {form}", line.text)
        folder = parse_place(name, line).partition("/")[0]
        if folder not in numbers:
            raise InputError(line, "class is not in classInd.txt", folder)
        label = numbers[folder]
        if space and parse_number(number, line, "index of a class") != label + 1:
            raise InputError(line, f"index of {folder} is {label + 1} in classInd.txt", number)
        unique.add(name, line)
        videos.append(Video(name, tree.path(name), None, (label,)))
    return videos
