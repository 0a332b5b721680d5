"""Moments in Time, UCF101 and HMDB51: layouts, splits, what is refused and where."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from common.log import InputError
from video_mmit.data import replicas
from video_mmit.data.hmdb51 import load_hmdb51
from video_mmit.data.mit import load_mit
from video_mmit.data.sampling import Uniform
from video_mmit.data.ucf101 import load_ucf101
from video_mmit.data.video import FileReader
from video_mmit.tests.loader_checks import edit, readable, refused

FILES = FileReader()
WRITERS = {
    "mit": replicas.write_mit,
    "ucf101": replicas.write_ucf101,
    "hmdb51": replicas.write_hmdb51,
}


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("sets")
    return {name: write(top / name) for name, write in WRITERS.items()}


@pytest.fixture
def copy(roots: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: shutil.copytree(roots[name], tmp_path / name)


# Moments in Time


def test_mit(roots: dict[str, Path]) -> None:
    root = roots["mit"]
    data = load_mit(root, FILES, Uniform())
    assert data.classes == replicas.MMIT_CLASSES
    assert [video.labels for video in data.train + data.test] == [
        (3,),
        (2,),
        (0,),
        (1,),
        (3,),
        (1,),
    ]
    assert data.train[0].path == root / "training" / "cooking" / "yt-a_1.mp4"
    assert data.test[0].path == root / "validation" / "cooking" / "4.mp4"


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (
            "cooking/b.mp4,cooking,3",
            "row is not <class/file>,<label>,<positive votes>,<negative votes>: "
            "cooking/b.mp4,cooking,3",
        ),
        ("cooking/b.mp4,cook,3,0", "label is not in moments_categories.txt: cook"),
        ("cooking/b.mp4,cooking,3,-1", "number of votes is no whole number from 0 on: -1"),
        ("b.mp4,cooking,3,0", "path is not of the form class/file.suffix: b.mp4"),
        ("paddling/yt-5_6.mp4,paddling,1,0", "video occurs twice, first at line 2: "),
        ("", "line is empty"),
    ],
)
def test_bad_rows_of_mit(copy: Callable[[str], Path], row: str, complaint: str) -> None:
    path = copy("mit") / "validationSet.csv"
    path.write_text(path.read_text() + f"{row}\ncooking/z.mp4,cooking,1,0\n")
    if complaint.endswith(": "):
        complaint += row.split(",")[0]
    refused(lambda: load_mit(path.parent, FILES, Uniform()), f"{path}:3: {complaint}")


def test_two_folders_are_needed(roots: dict[str, Path]) -> None:
    for value in ("videos", ["a", "b", "c"]):
        with pytest.raises(InputError, match="videos: must be two folders"):
            load_mit(roots["mit"], FILES, Uniform(), videos=value)


# UCF101


@pytest.mark.parametrize("split", [1, 2, 3])
def test_ucf101(roots: dict[str, Path], split: int) -> None:
    root = roots["ucf101"]
    data = load_ucf101(root, FILES, Uniform(), split)
    assert data.classes == replicas.UCF_CLASSES
    readable(data)
    tested = {1: {0, 3}, 2: {2, 5}, 3: {4, 1}}[split]
    names = [f"{c}/v_{c}_g{g:02d}_c01.avi" for c in data.classes for g in (1, 2)]
    assert {names.index(video.id) for video in data.test} == tested
    for video in data.train + data.test:
        assert video.labels == (names.index(video.id) // 2,)
        assert video.path == root / "UCF-101" / video.id


@pytest.mark.parametrize(
    ("file", "line", "text", "complaint"),
    [
        ("classInd.txt", 2, "3 Archery", "row is not <2> <class>: 3 Archery"),
        ("classInd.txt", 1, "0 ApplyEyeMakeup", "row is not <1> <class>: 0 ApplyEyeMakeup"),
        ("classInd.txt", 2, "2", "row is not <2> <class>: 2"),
        ("classInd.txt", 3, "3 Archery", "class occurs twice, first at line 2: Archery"),
        ("trainlist01.txt", 1, "YoYo/v.avi", "row is not <class/file> <index>: YoYo/v.avi"),
        ("trainlist01.txt", 1, "YoYo/v.avi 2", "index of YoYo is 3 in classInd.txt: 2"),
        ("trainlist01.txt", 1, "Yo/v.avi 2", "class is not in classInd.txt: Yo"),
        ("trainlist01.txt", 2, "YoYo/v 3", "path is not of the form class/file.suffix: YoYo/v"),
        ("testlist01.txt", 1, "YoYo/v.avi 3", "row is not <class/file>: YoYo/v.avi 3"),
        ("testlist01.txt", 1, "", "line is empty"),
    ],
)
def test_bad_files_of_ucf101(
    copy: Callable[[str], Path], file: str, line: int, text: str, complaint: str
) -> None:
    root = copy("ucf101")
    path = edit(root / "ucfTrainTestlist" / file, line, text)
    refused(lambda: load_ucf101(root, FILES, Uniform()), f"{path}:{line}: {complaint}")


def test_splits_end_at_three(roots: dict[str, Path]) -> None:
    for load, name in ((load_ucf101, "ucf101"), (load_hmdb51, "hmdb51")):
        for split in (0, 4):
            with pytest.raises(InputError, match=f"split: accepted: 1, 2, 3: {split}"):
                load(roots[name], FILES, Uniform(), split)


# HMDB51


def test_hmdb51(roots: dict[str, Path]) -> None:
    root = roots["hmdb51"]
    data = load_hmdb51(root, FILES, Uniform())
    assert data.classes == ("brush_hair", "cartwheel")
    assert data.skipped == {"not used in split 1": 1}
    readable(data, 5)
    assert [video.labels for video in data.test] == [(0,), (1,)]
    assert data.test[0].id == "brush_hair/#0_brush_hair_goo_0(a)&.avi"
    assert data.test[0].path == root / "videos" / data.test[0].id
    second = load_hmdb51(root, FILES, Uniform(), 2)
    assert (len(second.train), len(second.test), second.skipped) == (4, 2, {})
    assert second.test[1].id == "cartwheel/#1_cartwheel_goo_1(a)&.avi"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("a.avi 3", "row is not <video.avi> <0, 1 or 2>: a.avi 3"),
        ("a.avi", "row is not <video.avi> <0, 1 or 2>: a.avi"),
        ("b/a.avi 1", "row is not <video.avi> <0, 1 or 2>: b/a.avi 1"),
        ("#0_brush_hair_goo_0(a)&.avi 1", "video occurs twice, first at line 1: "),
    ],
)
def test_bad_rows_of_hmdb51(copy: Callable[[str], Path], line: str, complaint: str) -> None:
    root = copy("hmdb51")
    path = edit(root / "testTrainMulti_7030_splits" / "brush_hair_test_split1.txt", 2, line)
    if complaint.endswith(": "):
        complaint += line.rpartition(" ")[0]
    refused(lambda: load_hmdb51(root, FILES, Uniform()), f"{path}:2: {complaint}")


def test_missing_lists_of_hmdb51(copy: Callable[[str], Path]) -> None:
    root = copy("hmdb51")
    folder = root / "testTrainMulti_7030_splits"
    path = folder / "cartwheel_test_split1.txt"
    path.unlink()
    refused(lambda: load_hmdb51(root, FILES, Uniform()), f"{path}: file is missing")
    shutil.rmtree(folder)
    what = f"{folder}: folder of lists is missing"
    refused(lambda: load_hmdb51(root, FILES, Uniform()), what)
    folder.mkdir()
    what = f"{folder}: holds no file <class>_test_split<k>.txt"
    refused(lambda: load_hmdb51(root, FILES, Uniform()), what)
