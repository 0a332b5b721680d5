"""The two list formats, and data of one's own made of them."""

from pathlib import Path

import pytest

from common.log import InputError
from video_mmit.data.from_lists import load_lists
from video_mmit.data.lists import (
    FORMATS,
    Entry,
    read_classes,
    read_list,
    write_classes,
    write_list,
)
from video_mmit.data.replicas import FRAMES, MMIT_CLASSES, write_lists
from video_mmit.data.sampling import Uniform
from video_mmit.data.video import FileReader, FolderReader
from video_mmit.data.video_data import Reader, VideoData

ENTRIES = [
    Entry("cooking/yt-SSLy25MQb9g_307.mp4", 91, (264, 311, 7, 188, 246)),
    Entry("adult+female+singing/0-3-6_5.mp4", 90, (53,)),
    Entry("#1_(a)&b[c]!.avi", 1, (0, 1)),
]


def lists(root: Path, reader: Reader | None = None, **options: object) -> VideoData:
    files = {"train_list": root / "train.txt", "test_list": root / "val.txt"}
    return load_lists(root, reader or FileReader(), Uniform(), **(files | options))


@pytest.mark.parametrize("format", FORMATS)
def test_written_lists_read_back(tmp_path: Path, format: str) -> None:
    path = tmp_path / "new" / "train.txt"
    write_list(path, ENTRIES, format)
    expected = ENTRIES
    if format == "mmaction_video":
        expected = [entry._replace(frames=None) for entry in ENTRIES]
    assert read_list(path, format, num_classes=312) == expected
    assert [file.name for file in path.parent.iterdir()] == ["train.txt"]


@pytest.mark.parametrize(
    ("format", "line"),
    [
        ("xtemporal", "cooking/yt-SSLy25MQb9g_307.mp4 91 264,311,7,188,246\n"),
        ("mmaction_video", "cooking/yt-SSLy25MQb9g_307.mp4 264 311 7 188 246\n"),
        ("mmaction_frames", "cooking/yt-SSLy25MQb9g_307.mp4 91 264 311 7 188 246\n"),
    ],
)
def test_the_exact_line(tmp_path: Path, format: str, line: str) -> None:
    write_list(tmp_path / "a.txt", ENTRIES[:1], format)
    assert (tmp_path / "a.txt").read_text() == line


@pytest.mark.parametrize(
    "text", ["a.mp4 3 1\r\nb.mp4 4 0,2\r\n", "\ufeffa.mp4 3 1\nb.mp4 4 0,2\n\n \n"]
)
def test_check_11_line_ends_that_are_accepted(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_bytes(text.encode())
    expected = [Entry("a.mp4", 3, (1,)), Entry("b.mp4", 4, (0, 2))]
    assert read_list(tmp_path / "a.txt", num_classes=3) == expected


BAD_LINES = [
    ("xtemporal", "", "line is empty"),
    ("xtemporal", "b.mp4", "row needs a path, a number of frames and a label: b.mp4"),
    ("xtemporal", "b.mp4 9", "row needs a path, a number of frames and a label: b.mp4 9"),
    ("xtemporal", "b.mp4  9 1", "fields are not separated by exactly one space: b.mp4 9 1"),
    ("xtemporal", " b.mp4 9 1", "fields are not separated by exactly one space: b.mp4 9 1"),
    ("xtemporal", "b.mp4\t9\t1", "row needs a path, a number of frames and a label: b.mp4 9 1"),
    ("xtemporal", "b.mp4 9 1 2", "row is not <path> <frames> <label,label,...>: b.mp4 9 1 2"),
    ("xtemporal", "b.mp4 0 1", "number of frames must be at least 1: 0"),
    ("xtemporal", "b.mp4 -9 1", "number of frames is no whole number from 0 on: -9"),
    ("xtemporal", "b.mp4 9 3", "label is not in 0..2: 3"),
    ("xtemporal", "b.mp4 9 -1", "label is no whole number from 0 on: -1"),
    ("xtemporal", "b.mp4 9 1.0", "label is no whole number from 0 on: 1.0"),
    ("xtemporal", "b.mp4 9 1,", "label is no whole number from 0 on: ''"),
    ("xtemporal", "b.mp4 9 0,1,0", "label occurs twice: 0"),
    ("xtemporal", "a.mp4 9 1", "video occurs twice, first at line 1: a.mp4"),
    ("mmaction_video", "b.mp4", "row has no label"),
    ("mmaction_video", "b.mp4 1 1", "label occurs twice: 1"),
    ("mmaction_video", "b.mp4 91 1", "label is not in 0..2: 91"),
    ("mmaction_frames", "b.mp4 9", "row needs a path, a number of frames and a label: b.mp4 9"),
    ("mmaction_frames", "b.mp4 9 1,2", "label is no whole number from 0 on: 1,2"),
]


@pytest.mark.parametrize(("format", "line", "complaint"), BAD_LINES)
def test_check_11_a_bad_line_is_named(
    tmp_path: Path, format: str, line: str, complaint: str
) -> None:
    good = "{}.mp4 0\n" if format == "mmaction_video" else "{}.mp4 5 0\n"
    path = tmp_path / "train.txt"
    path.write_text(f"{good.format('a')}{line}\n{good.format('c')}")
    with pytest.raises(InputError) as error:
        read_list(path, format, num_classes=3)
    assert str(error.value) == f"{path}:2: {complaint}"


def test_files_that_are_no_lists(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with pytest.raises(InputError, match=r"a\.txt: file is missing$"):
        read_list(path)
    path.write_text("\n\n")
    with pytest.raises(InputError, match=r"a\.txt: is empty$"):
        read_list(path)
    path.write_bytes(b"a.mp4 1 \xff\n")
    with pytest.raises(InputError, match=r"a\.txt: is no UTF-8 text, first bad byte at: 8$"):
        read_list(path)
    with pytest.raises(InputError, match=r"format: accepted: xtemporal, .*: csv$"):
        read_list(path, "csv")


def test_entries_that_no_list_can_hold(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_list(path, ENTRIES)
    before = path.read_bytes()
    bad = {
        "a path in a list cannot": Entry("a b.mp4", 1, (0,)),
        "has no label": Entry("a.mp4", 1, ()),
        "occurs twice, first at line 1": ENTRIES[0],
    }
    for complaint, entry in bad.items():
        with pytest.raises(InputError, match=complaint):
            write_list(path, [ENTRIES[0], entry])
    with pytest.raises(ValueError, match=r"no number of frames, which format=mmaction_frames"):
        write_list(path, [Entry("a.mp4", None, (0,))], "mmaction_frames")
    with pytest.raises(ValueError, match="entries is empty"):
        write_list(path, [])
    assert path.read_bytes() == before


def test_classes_read_back(tmp_path: Path) -> None:
    write_classes(tmp_path / "c.txt", ["riding a bike", "b", "a"])
    assert read_classes(tmp_path / "c.txt") == ("riding a bike", "b", "a")
    (tmp_path / "c.txt").write_text("a\nb\na\n")
    with pytest.raises(InputError, match=r"c\.txt:3: class occurs twice, first at line 1: a"):
        read_classes(tmp_path / "c.txt")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("folders", [False, True])
def test_data_of_ones_own(tmp_path: Path, format: str, folders: bool) -> None:
    root = write_lists(tmp_path, format, folders)
    reader = FolderReader() if folders else FileReader()
    data = lists(root, reader, classes=root / "classes.txt", format=format)
    assert (data.name, data.classes, data.multi_label) == ("lists", MMIT_CLASSES, True)
    assert [len(data.train), len(data.test), data.skipped] == [4, 2, {}]
    assert [video.labels for video in data.train] == [(3, 0), (2,), (0,), (1, 3, 2)]
    assert data.class_counts().tolist() == [2, 1, 2, 2]
    assert data.target(data.test[1]).tolist() == [1.0, 1.0, 0.0, 0.0]
    listed = None if format == "mmaction_video" else FRAMES
    for video in data.train + data.test:
        assert video.path == root / video.id
        assert video.frames == listed
        with reader.open(video) as clip:
            assert clip.frames == FRAMES


def test_classes_without_names(tmp_path: Path) -> None:
    root = write_lists(tmp_path)
    assert lists(root).classes == ("0", "1", "2", "3")
    val = (root / "val.txt").read_text()
    (root / "val.txt").write_text(val.replace(" 1,0", " 4"))
    with pytest.raises(InputError, match=r"val\.txt:2: label is not in 0\.\.3: 4$"):
        lists(root)
    (root / "train.txt").write_text("a.mp4 1 1000000000\n")
    with pytest.raises(InputError, match=r"train\.txt: without a file of classes .*: 1000000000$"):
        lists(root)


def test_a_set_with_one_label_a_video(tmp_path: Path) -> None:
    root = write_lists(tmp_path)
    with pytest.raises(InputError, match=r"train\.txt:1: several labels in a set .*: 3,0$"):
        lists(root, multi_label=False)


def test_what_is_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InputError, match="none: folder of videos is missing"):
        lists(tmp_path / "none")
    root = write_lists(tmp_path)
    with pytest.raises(InputError, match=r"none\.txt: file is missing"):
        lists(root, test_list=root / "none.txt")
    (root / "cooking" / "4.mp4").unlink()
    data = lists(root)  # listing touches no video
    with pytest.raises(InputError, match=r"cooking/4\.mp4"), data.reader.open(data.test[0]):
        pass
    lists(root, test_list=root / "train.txt")
    assert "4 videos are in both splits, such as adult+female+singing/0-3_5.mp4" in caplog.text
