"""Lists of the challenge: order, labels, frames of videos, and complaints with the line."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from common.log import InputError
from face_lfr.data.challenge import (
    load_deepglint,
    load_frame_lists,
    load_iqiyi,
    read_integers,
    read_labels,
    read_lines,
)
from face_lfr.data.replicas import write_replica


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_replica("deepglint", tmp_path / "glint")


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    return write_replica("iqiyi", tmp_path / "iQIYI_VID_FACE")


def refused(load: Callable[[], object], complaint: str) -> None:
    with pytest.raises(InputError) as error:
        load()
    assert str(error.value) == complaint


def edit(path: Path, line: int, text: str) -> None:
    lines = path.read_text().split("\n")
    lines[line - 1] = text
    path.write_text("\n".join(lines))


def test_images_are_in_the_order_of_the_list(images: Path) -> None:
    lines = (images / "filelist.txt").read_text().split()
    found = load_deepglint(images)
    assert len(found) == len(lines) == 17
    assert [found.name(row) for row in range(17)] == [str(images / line) for line in lines]
    assert found.labels_N is not None
    assert found.labels_N.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [-1] * 5
    assert [found.label(0), found.label(16)] == [0, -1]
    edit(images / "filelist.txt", 1, lines[16])
    edit(images / "filelist.txt", 17, lines[0])
    again = load_deepglint(images)
    np.testing.assert_array_equal(again.read(0), found.read(16))
    (images / lines[3]).unlink()
    refused(
        lambda: again.read(3),
        f"{images / lines[3]}: image cannot be read: No such file or directory",
    )


def test_images_without_labels(images: Path) -> None:
    (images / "labels.txt").unlink()
    found = load_deepglint(images)
    assert found.labels_N is None
    assert found.label(0) == -1


def test_complaints_about_images(images: Path) -> None:
    filelist, labels = images / "filelist.txt", images / "labels.txt"
    edit(labels, 4, "x")
    refused(lambda: load_deepglint(images), f"{labels}:4: is no whole number: x")
    edit(labels, 4, "-2")
    what = "label is below -1, which stands for a distractor: -2"
    refused(lambda: load_deepglint(images), f"{labels}:4: {what}")
    edit(labels, 4, "1")
    edit(filelist, 5, "000/00001.jpg")
    what = "image occurs twice, first in line 2: 000/00001.jpg"
    refused(lambda: load_deepglint(images), f"{filelist}:5: {what}")
    edit(filelist, 5, "")
    refused(lambda: load_deepglint(images), f"{filelist}:5: line is empty")
    edit(filelist, 5, "a.jpg\nb.jpg")
    what = "needs 18 labels, one for each line of the list: 17"
    refused(lambda: load_deepglint(images), f"{labels}: {what}")
    filelist.unlink()
    refused(lambda: load_deepglint(images), f"{filelist}: file is missing")


def test_frames_of_videos(videos: Path) -> None:
    found = load_iqiyi(videos)
    listed = [line.split()[0] for line in (videos / "filelist.txt").read_text().splitlines()]
    assert list(found.videos) == listed
    assert np.bincount(found.video_N).tolist() == [1, 2, 3, 4, 1, 2, 3, 4]
    assert (np.diff(found.video_N) >= 0).all()
    assert found.labels_V is not None
    assert found.labels_V.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    names = [Path(found.frames.name(row)).name for row in np.flatnonzero(found.video_N == 3)]
    assert names == ["9.jpg", "10.jpg", "11.jpg", "12.jpg"]  # by number, not by letter
    assert [found.frames.label(row) for row in range(20)] == found.labels_V[found.video_N].tolist()
    assert found.frames.read(19).shape == (112, 112, 3)


def test_videos_follow_the_list_and_other_files_are_no_frames(videos: Path) -> None:
    lines = (videos / "filelist.txt").read_text().splitlines()
    (videos / "filelist.txt").write_text("\n".join(lines[::-1]))
    (videos / lines[0].split()[0] / "readme.txt").write_text("no frame")
    (videos / "unlisted").mkdir()
    found = load_iqiyi(videos)
    assert list(found.videos) == [line.split()[0] for line in lines[::-1]]
    assert np.bincount(found.video_N).tolist() == [4, 3, 2, 1, 4, 3, 2, 1]


def test_complaints_about_videos(videos: Path) -> None:
    filelist = videos / "filelist.txt"
    first = filelist.read_text().split()[0]
    edit(filelist, 3, f"{first} again")
    what = f"video occurs twice, first in line 1: {first}"
    refused(lambda: load_iqiyi(videos), f"{filelist}:3: {what}")
    edit(filelist, 3, "nowhere 3")
    what = f"video has no folder: {videos / 'nowhere'}"
    refused(lambda: load_iqiyi(videos), f"{filelist}:3: {what}")
    (videos / "nowhere").mkdir()
    what = f"video has no frame in: {videos / 'nowhere'}"
    refused(lambda: load_iqiyi(videos), f"{filelist}:3: {what}")


def test_lists_of_frames(tmp_path: Path) -> None:
    images, videos, labels = (tmp_path / name for name in ("images", "videos", "labels"))
    images.write_text("p/b/1.jpg\np/a/1.jpg x\np/b/0.jpg\n")
    videos.write_text("a 1\nb 2\n")
    labels.write_text("7\n-1\n")
    found = load_frame_lists(images, videos, "/data", labels)
    assert list(found.videos) == ["a", "b"]
    assert found.video_N.tolist() == [1, 0, 1]
    assert list(found.frames.names) == ["p/b/1.jpg", "p/a/1.jpg", "p/b/0.jpg"]
    assert found.frames.name(1) == "/data/p/a/1.jpg"
    assert [found.frames.label(row) for row in range(3)] == [-1, 7, -1]
    assert load_frame_lists(images, videos).labels_V is None
    edit(images, 2, "p/c/1.jpg")
    refused(lambda: load_frame_lists(images, videos), f"{images}:2: video is not in {videos}: c")
    edit(images, 2, "a/1.jpg")
    what = "path is not prefix/<video>/<frame>: a/1.jpg"
    refused(lambda: load_frame_lists(images, videos), f"{images}:2: {what}")
    edit(images, 2, "p/b/2.jpg")
    refused(
        lambda: load_frame_lists(images, videos), f"{videos}:1: video has no frame in {images}: a"
    )


def test_lines(tmp_path: Path) -> None:
    path = tmp_path / "l.txt"
    path.write_bytes(b"\xef\xbb\xbfa b\r\n c \r\n\r\n")
    assert read_lines(path) == ["a b", " c"]
    path.write_bytes(b"\r\n")
    refused(lambda: read_lines(path), f"{path}: is empty")
    path.write_bytes(b"a\n\xff")
    refused(lambda: read_lines(path), f"{path}: is no UTF-8 text, first bad byte at: 2")


def test_integers(tmp_path: Path) -> None:
    path = tmp_path / "n.txt"
    path.write_bytes(b"1 -2\r\n+3\t4\r\n\n")
    assert read_integers(path, 2).tolist() == [[1, -2], [3, 4]]
    for content, complaint in {
        "1 2\n3\n4 5 6": ":2: line is not 2 whole numbers: 3",
        "1 2\n3 4.0": ":2: line is not 2 whole numbers: 3 4.0",
        "1 2 3\n4 5 6": ":1: line is not 2 whole numbers: 1 2 3",
        "1 2\n\n3 4": ":2: line is empty",
        "1 2\n# 3": ":2: line is not 2 whole numbers: # 3",
        "": ": is empty",
    }.items():
        path.write_text(content)
        refused(lambda: read_integers(path, 2), f"{path}{complaint}")
    path.write_text("1\n99999999999999999999\n")
    with pytest.raises(InputError, match=f"{path}: does not hold whole numbers only"):
        read_integers(path, 1)
    path.write_text("0\n-1")
    assert read_labels(path).tolist() == [0, -1]
