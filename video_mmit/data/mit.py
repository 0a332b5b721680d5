"""Moments in Time version 1 (arXiv 1801.03150): one label a video, 339 classes.

`moments_categories.txt` as in M-MiT; `trainingSet.csv` and `validationSet.csv` hold
`class/file.mp4,label_name,positive_votes,negative_votes`; the videos lie in
`training/<class>/<file>.mp4` and `validation/<class>/<file>.mp4`.
"""

from collections.abc import Sequence
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
    two_trees,
)
from video_mmit.data.mmit import read_categories
from video_mmit.data.video_data import Reader, Sampler, Video, VideoData


def load_mit(
    root: Path | str,
    reader: Reader,
    sampler: Sampler,
    videos: Sequence[str] = ("training", "validation"),
    frames: Sequence[str] = ("rawframes/training", "rawframes/validation"),
) -> VideoData:
    """List Moments in Time; no video is touched.

    Args:
        root: folder of the lists (they may also lie in its folder `annotations`).
        reader: how frames are read; decides whether `videos` or `frames` is meant.
        sampler: which frames make a clip.
        videos: folders of the training and validation files, below root or absolute.
        frames: the same for frame folders.

    Raises:
        InputError: anything missing or malformed, by file and line.
    """
    root = Path(root)
    classes = read_categories(find_file(root, "moments_categories.txt"))
    files = [find_file(root, name) for name in ("trainingSet.csv", "validationSet.csv")]
    trees = two_trees(root, videos, frames, reader)
    train, test = (_read_part(file, classes, tree) for file, tree in zip(files, trees, strict=True))
    return checked(VideoData("mit", root, classes, False, train, test, reader, sampler))


def _read_part(path: Path, classes: Sequence[str], tree: Tree) -> list[Video]:
    unique, found = Unique(), []
    numbers = {name: index for index, name in enumerate(classes)}
    for line in read_lines(path):
        fields = line.text.split(",")
        if len(fields) != 4:
            what = "row is not <class/file>,<label>,<positive votes>,<negative votes>"
            raise InputError(line, what, line.text)
        name, label, *votes = fields
        for vote in votes:
            parse_number(vote, line, "number of votes")
        if label not in numbers:
            raise InputError(line, "label is not in moments_categories.txt", label or "''")
        unique.add(parse_place(name, line), line)
        found.append(Video(name, tree.path(name), None, (numbers[label],)))
    return found
