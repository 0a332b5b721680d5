"""Multi-Moments in Time (arXiv 1911.00232): several labels a video, 313 classes in version 1.

`moments_categories.txt` holds `name,index` (from 0) a line; `trainingSet` and `validationSet`,
with the suffix .txt or .csv, hold `class_dir/file.mp4,index,index,...` with one or more labels;
the videos lie in `videos/<class_dir>/<file>.mp4`. Version 2 has 292 classes in the same format;
numbers of the two versions cannot be compared. The labels of the challenge's test videos were
never published: the validation videos are the test split here.
"""

from collections.abc import Sequence
from pathlib import Path

from common.log import InputError, get_logger
from video_mmit.data.annotations import (
    Tree,
    Unique,
    checked,
    find_file,
    parse_labels,
    parse_number,
    parse_place,
    read_lines,
)
from video_mmit.data.video_data import Reader, Sampler, Video, VideoData


def load_mmit(
    root: Path | str,
    reader: Reader,
    sampler: Sampler,
    videos: str = "videos",
    frames: str = "rawframes",
) -> VideoData:
    """List M-MiT; no video is touched, as there are more than a million.

    Args:
        root: folder of the lists (they may also lie in its folder `annotations`).
        reader: how frames are read; decides whether `videos` or `frames` is meant.
        sampler: which frames make a clip.
        videos: folder of the video files, below root or absolute.
        frames: folder of the frame folders, `<class_dir>/<file>/`.

    Raises:
        InputError: anything missing, malformed or contradictory, by file and line.
    """
    root = Path(root)
    classes = read_categories(find_file(root, "moments_categories.txt"))
    tree = Tree(root, videos, frames, reader)
    lists = [
        find_file(root, f"{part}.txt", f"{part}.csv") for part in ("trainingSet", "validationSet")
    ]
    train, test = (_read_part(path, classes, tree) for path in lists)
    return checked(VideoData("mmit", root, classes, True, train, test, reader, sampler))


def read_categories(path: Path) -> tuple[str, ...]:
    """Class names in the order of their indices, from lines `name,index` in any order.

    Raises:
        InputError: a line of another form, a name or an index twice, or a gap in the indices.
    """
    names, indices, found = Unique("class"), Unique("index of a class"), {}
    lines = read_lines(path)
    for line in lines:
        name, comma, number = line.text.rpartition(",")
        if not name or not comma:
            raise InputError(line, "row is not <name>,<index>", line.text)
        index = parse_number(number, line, "index of a class")
        if index >= len(lines):
            raise InputError(line, f"index of a class is not in 0..{len(lines) - 1}", index)
        names.add(name, line)
        indices.add(str(index), line)
        found[index] = name
    return tuple(found[index] for index in range(len(found)))


def _read_part(path: Path, classes: Sequence[str], tree: Tree) -> list[Video]:
    unique, videos, strange = Unique(), [], []
    numbers = {name: index for index, name in enumerate(classes)}
    for line in read_lines(path):
        name, *words = line.text.split(",")
        parse_place(name, line)
        labels = parse_labels(words, len(classes), line)
        unique.add(name, line)
        videos.append(Video(name, tree.path(name), None, labels))
        if numbers.get(name.partition("/")[0], labels[0]) not in labels:
            strange.append(line)
    if strange:
        # Not an error: the format does not promise it. A file that counts from 1 shows up here.
        what = "%s: in %d of %d rows the folder names a class that is no label of the row, first %s"
        get_logger(__name__).warning(what, path, len(strange), len(videos), strange[0])
    return videos
