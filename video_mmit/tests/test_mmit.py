"""Multi-Moments in Time: the layout, what is refused and where, three ways to the same frames."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from common.log import InputError
from video_mmit.data.mmit import load_mmit, read_categories
from video_mmit.data.replicas import FRAMES, MMIT_CLASSES, MMIT_ROWS, write_mmit
from video_mmit.data.sampling import Uniform
from video_mmit.data.video import FileReader, FlowReader, FolderReader
from video_mmit.data.video_data import VideoData
from video_mmit.tests.launch import config
from video_mmit.tools.extract_frames import extract


def mmit(root: Path) -> VideoData:
    return load_mmit(root, FileReader(), Uniform())


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mmit(tmp_path_factory.mktemp("mmit"))


@pytest.fixture
def copy(replica: Path, tmp_path: Path) -> Path:
    return shutil.copytree(replica, tmp_path / "set")


@pytest.mark.parametrize("suffix", [".txt", ".csv"])
def test_check_11_both_names_of_the_lists(copy: Path, suffix: str) -> None:
    for name in ("trainingSet", "validationSet"):
        (copy / f"{name}.txt").rename(copy / f"{name}{suffix}")
    data = mmit(copy)
    assert (data.name, data.root, data.multi_label) == ("mmit", copy, True)
    assert data.classes == MMIT_CLASSES
    rows = [(video.id, video.labels) for video in data.train + data.test]
    assert rows == list(MMIT_ROWS)
    assert len(data.train) == 4
    for video in data.train + data.test:
        assert video.path == copy / "videos" / video.id
        assert video.path.is_file()
        assert video.frames is None


def test_lists_in_the_folder_of_mmaction2(copy: Path) -> None:
    (copy / "annotations").mkdir()
    for path in copy.glob("*.txt"):
        path.rename(copy / "annotations" / path.name)
    assert len(mmit(copy).train) == 4


def test_two_lists_that_differ(copy: Path) -> None:
    shutil.copy(copy / "trainingSet.txt", copy / "trainingSet.csv")
    assert len(mmit(copy).train) == 4
    (copy / "trainingSet.csv").write_text("cooking/a.mp4,1\n")
    with pytest.raises(InputError, match=r"trainingSet\.txt: differs from .*: \S+Set\.csv$"):
        mmit(copy)


def test_classes_follow_their_index(copy: Path) -> None:
    path = copy / "moments_categories.txt"
    path.write_text("paddling,1\ncooking,3\nadult+female+singing,2\ncrafting,0\n")
    assert mmit(copy).classes == MMIT_CLASSES


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a,0\nb\n", "2: row is not <name>,<index>: b"),
        ("a,0\n,1\n", "2: row is not <name>,<index>: ,1"),
        ("a,0\nb,one\n", "2: index of a class is no whole number from 0 on: one"),
        ("a,1\nb,2\n", "2: index of a class is not in 0..1: 2"),
        ("a,0\nb,0\n", "2: index of a class occurs twice, first at line 1: 0"),
        ("a,0\na,1\n", "2: class occurs twice, first at line 1: a"),
        ("a,0\n\nb,1\n", "2: line is empty"),
    ],
)
def test_bad_categories(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "moments_categories.txt"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        read_categories(path)
    assert str(error.value) == f"{path}:{complaint}"


FORM = "path is not of the form class/file.suffix"


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("cooking/b.mp4,4", "label is not in 0..3: 4"),
        ("cooking/b.mp4,3,-1", "label is no whole number from 0 on: -1"),
        ("cooking/b.mp4,1,2,1", "label occurs twice: 1"),
        ("cooking/b.mp4,cooking", "label is no whole number from 0 on: cooking"),
        ("cooking/b.mp4,3,,1", "label is no whole number from 0 on: ''"),
        ("cooking/b.mp4", "row has no label"),
        ("", "line is empty"),
        ("b.mp4,1", f"{FORM}: b.mp4"),
        ("cooking/b,1", f"{FORM}: cooking/b"),
        ("videos/cooking/b.mp4,1", f"{FORM}: videos/cooking/b.mp4"),
        ("../b.mp4,1", f"{FORM}: ../b.mp4"),
        ("/b.mp4,1", f"{FORM}: /b.mp4"),
        (",1", f"{FORM}: ''"),
        ("cooking/yt-a_1.mp4,3", "video occurs twice, first at line 1: cooking/yt-a_1.mp4"),
    ],
)
@pytest.mark.parametrize("name", ["trainingSet.txt", "validationSet.txt"])
def test_check_11_a_bad_row_is_named(copy: Path, name: str, row: str, complaint: str) -> None:
    path = copy / name
    path.write_text(f"cooking/yt-a_1.mp4,3,0\n{row}\ncrafting/c.mp4,0\n")
    with pytest.raises(InputError) as error:
        mmit(copy)
    assert str(error.value) == f"{path}:2: {complaint}"


def test_check_11_line_ends_that_are_accepted(copy: Path) -> None:
    expected = mmit(copy)
    for path in copy.glob("*.txt"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n\r\n")
    assert mmit(copy) == expected


def test_a_file_that_counts_from_one_is_suspicious(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mmit(copy)
    assert "is no label of the row" not in caplog.text
    path = copy / "trainingSet.txt"
    path.write_text("crafting/a.mp4,1\nadult+female+singing/b.mp4,3\nother/c.mp4,0\n")
    mmit(copy)
    assert "in 2 of 3 rows the folder names a class that is no label of the row" in caplog.text


def test_check_11_missing_parts_and_broken_files(copy: Path) -> None:
    data = mmit(copy)
    good, gone, empty, text, cut = (video.path for video in data.train + data.test[:1])
    gone.unlink()
    empty.write_bytes(b"")
    text.write_text("no video")
    cut.write_bytes(good.read_bytes()[:600])
    videos = data.train + data.test[:1]
    assert mmit(copy) == data  # the loader looks at no video
    for video in videos[1:]:
        with pytest.raises(InputError) as error, data.reader.open(video) as clip:
            clip.read(np.arange(FRAMES))
        assert str(error.value).startswith(f"{video.path}: ")
    shutil.rmtree(copy / "videos")
    with pytest.raises(InputError, match="videos: folder of videos is missing"):
        mmit(copy)
    (copy / "validationSet.txt").unlink()
    where = r"validationSet\.txt: file is missing, nor is there validationSet\.csv"
    (copy / "videos").mkdir()
    with pytest.raises(InputError, match=where):
        mmit(copy)
    (copy / "moments_categories.txt").unlink()
    with pytest.raises(InputError, match=r"moments_categories\.txt: file is missing$"):
        mmit(copy)
    with pytest.raises(InputError, match="none: data set not found"):
        mmit(copy / "none")


def test_check_11_three_ways_to_the_same_frames(replica: Path, tmp_path: Path) -> None:
    """Files through decord and OpenCV, and frame folders made by the tool: same ids and frames."""
    cfg = config("extract_frames", f"input={replica}/videos", f"out={tmp_path}", "workers=0")
    extract(cfg)  # type: ignore[arg-type]
    sets = [
        load_mmit(replica, FileReader("decord"), Uniform(4)),
        load_mmit(replica, FileReader("opencv"), Uniform(4)),
        load_mmit(replica, FolderReader(), Uniform(4), frames=str(tmp_path)),
    ]
    assert len({tuple((v.id, v.labels) for v in data.train + data.test) for data in sets}) == 1
    for row in range(4):
        clips = []
        for data in sets:
            with data.reader.open(data.train[row]) as clip:
                assert clip.frames == FRAMES
                clips.append(clip.read(data.sampler.test(clip.frames)[0]).astype(float))
        assert clips[0].shape == (4, 32, 32, 3)
        assert clips[0][:, 0, 0, 0] == pytest.approx([44, 92, 140, 188], abs=6)
        assert max(np.abs(clips[0] - other).mean() for other in clips[1:]) < 3


def test_frame_folders_have_no_suffix(tmp_path: Path) -> None:
    root = write_mmit(tmp_path, folders=True)
    data = load_mmit(root, FolderReader(), Uniform())
    assert data.train[0].id == "cooking/yt-a_1.mp4"
    assert data.train[0].path == root / "rawframes" / "cooking" / "yt-a_1"
    assert load_mmit(root, FlowReader(), Uniform()).train == data.train
    with pytest.raises(InputError, match="elsewhere: folder of frames is missing"):
        load_mmit(root, FolderReader(), Uniform(), frames="elsewhere")
