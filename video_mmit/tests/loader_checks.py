"""What the tests of the loaders and data tools share."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from common.log import InputError
from video_mmit.data.replicas import FRAMES
from video_mmit.data.video_data import VideoData
from video_mmit.tests.launch import Ended


def refused(load: Callable[[], object], complaint: str) -> None:
    with pytest.raises(InputError) as error:
        load()
    assert str(error.value) == complaint


def readable(data: VideoData, count: int = 6) -> None:
    """All `count` listed videos open and can be read to their ends."""
    videos = data.train + data.test
    assert len(videos) == len({video.path for video in videos}) == count
    for video in videos:
        with data.reader.open(video) as clip:
            assert clip.frames == FRAMES
            clip.read(np.array([0, clip.frames - 1]))


def edit(path: Path, line: int, text: str) -> Path:
    """Put `text` in the place of line number `line`, from 1."""
    lines = path.read_text().split("\n")
    lines[line - 1] = text
    path.write_text("\n".join(lines))
    return path


def set_words(root: Path, name: str) -> list[str]:
    files = [f"data.train_list={root}/train.txt", f"data.test_list={root}/val.txt"]
    return [f"data={name}", f"data.root={root}", *(files if name == "lists" else [])]


def error_line(done: Ended) -> str:
    """The complaint of a command that ended because of bad input, without a traceback."""
    assert done.code == 2, done
    assert "Traceback" not in done.err
    return done.err.splitlines()[-1]
