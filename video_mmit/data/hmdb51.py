"""HMDB51: 51 classes, three splits of 70 training and 30 test videos a class.

For every class and split there is `<class>_test_split<k>.txt` with a line `video.avi {0|1|2}` a
video: 1 is trained on, 2 is tested on, 0 is not used in this split.
"""

import re
from pathlib import Path

from common.log import InputError
from video_mmit.data.annotations import Tree, Unique, checked, read_lines
from video_mmit.data.video_data import Reader, Sampler, Video, VideoData

UNUSED, TRAIN, TEST = "0", "1", "2"
LIST = re.compile(r"(.+)_test_split([0-9]+)\.txt")


def load_hmdb51(
    root: Path | str,
    reader: Reader,
    sampler: Sampler,
    split: int = 1,
    lists: str = "testTrainMulti_7030_splits",
    videos: str = "videos",
    frames: str = "rawframes",
) -> VideoData:
    """List one split of HMDB51; published numbers are means over the three.

    Classes are numbered alphabetically. The videos a split does not use are counted in `skipped`.

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
    if split not in (1, 2, 3):
        raise InputError("split", "accepted: 1, 2, 3", split)
    files = _list_files(root / lists, split)
    tree = Tree(root, videos, frames, reader)
    found: dict[str, list[Video]] = {UNUSED: [], TRAIN: [], TEST: []}
    for label, (name, path) in enumerate(files.items()):
        unique = Unique()
        for line in read_lines(path):
            file, _, flag = line.text.rpartition(" ")
            if flag not in found or not file.rpartition(".")[0] or "/" in file:
                raise InputError(line, "row is not <video.avi> <0, 1 or 2>", line.text)
            unique.add(file, line)
            place = f"{name}/{file.rstrip()}"
            found[flag].append(Video(place, tree.path(place), None, (label,)))
    skipped = {f"not used in split {split}": len(found[UNUSED])}
    parts = (found[TRAIN], found[TEST])
    return checked(VideoData("hmdb51", root, tuple(files), False, *parts, reader, sampler, skipped))


def _list_files(folder: Path, split: int) -> dict[str, Path]:
    """List file of every class, alphabetical; each class must have one for this split."""
    if not folder.is_dir():
        raise InputError(folder, "folder of lists is missing")
    matches = [match for path in folder.iterdir() if (match := LIST.fullmatch(path.name))]
    classes = sorted({match[1] for match in matches})
    if not classes:
        raise InputError(folder, "holds no file <class>_test_split<k>.txt")
    return {name: folder / f"{name}_test_split{split}.txt" for name in classes}
