"""Kinetics: csv files, directory rules, class orders, clips that are gone."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from common.log import InputError
from video_mmit.data import replicas
from video_mmit.data.kinetics import load_kinetics
from video_mmit.data.sampling import Uniform
from video_mmit.data.video import FileReader
from video_mmit.data.video_data import VideoData
from video_mmit.tests.loader_checks import edit, readable, refused


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return replicas.write_kinetics(tmp_path_factory.mktemp("kinetics"))


@pytest.fixture
def root(replica: Path, tmp_path: Path) -> Path:
    return shutil.copytree(replica, tmp_path / "kinetics")


def kinetics(root: Path, **options: Any) -> VideoData:
    return load_kinetics(root, FileReader(), Uniform(), **options)


@pytest.mark.parametrize(
    ("directory", "first"),
    [
        ("label", "passing American football (in game)/"),
        ("mmaction2", "passing_American_football_(in_game)/"),
        ("xtemporal", "passing_American_football_in_game/"),
        ("flat", ""),
    ],
)
def test_kinetics_directories(tmp_path: Path, directory: str, first: str) -> None:
    root = replicas.write_kinetics(tmp_path, directory)
    data = kinetics(root, version=600, directory=directory)
    assert data.name == "kinetics600"
    assert data.train[0].id == f"{first}aB-_0123456_000003_000013.mp4"
    assert data.train[0].path == root / "train" / data.train[0].id
    assert data.train[3].path.name == "c123456789a_001234_001244.mp4"
    readable(data)


def test_kinetics_class_orders(root: Path) -> None:
    data = kinetics(root)
    alphabetical = [
        "abseiling", "massaging person's head", "passing American football (in game)",
        "tying knot (not on a tie)",
    ]  # fmt: skip
    assert list(data.classes) == alphabetical
    assert [video.labels[0] for video in data.train + data.test] == [2, 0, 3, 1, 0, 1]
    label_map = root / "kinetics_label_map.txt"
    data = kinetics(root, class_order="label_map", label_map=label_map)
    assert [video.labels[0] for video in data.train + data.test] == [0, 1, 2, 3, 1, 3]


def test_label_maps_are_written_in_several_ways(root: Path) -> None:
    path = edit(root / "kinetics_label_map.txt", 1, "passing_American_football_in_game")
    data = kinetics(root, class_order="label_map", label_map=path)
    assert data.train[0].labels == (0,)
    edit(path, 2, "passing American football (in game)")
    refused(
        lambda: kinetics(root, class_order="label_map", label_map=path),
        "label_map: two labels differ only in quotes, brackets or spaces",
    )
    edit(path, 2, "another class")
    refused(
        lambda: kinetics(root, class_order="label_map", label_map=path),
        f"{root / 'train.csv'}:3: label is none of the 4 classes: abseiling",
    )


def test_order_is_that_of_directories(root: Path) -> None:
    """mmaction2 sorts after the replacement, where a space is `_` and comes after capitals."""
    (root / "train.csv").write_text(
        "label,youtube_id,time_start,time_end,split,is_cc\n"
        "a bc,id1,1,2,train,0\naZ,id2,1,2,train,0\na bc,id3,1,2,train,0\n"
    )
    (root / "val.csv").write_text(
        'split,label,youtube_id,time_start,time_end\nvalidate,"a bc",id4,1,2\n'
    )
    data = kinetics(root)
    assert data.classes == ("aZ", "a bc")
    assert [video.labels for video in data.train + data.test] == [(1,), (0,), (1,), (1,)]


def test_names_of_the_csv_files(root: Path) -> None:
    (root / "val.csv").rename(root / "validate.csv")
    (root / "annotations").mkdir()
    (root / "train.csv").rename(root / "annotations" / "kinetics_train.csv")
    readable(kinetics(root))
    (root / "validate.csv").rename(root / "other.csv")
    readable(kinetics(root, val_csv="other.csv"))
    refused(
        lambda: kinetics(root),
        f"{root / 'val.csv'}: file is missing, nor is there validate.csv or kinetics_val.csv",
    )


def test_missing_clips(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = kinetics(root)
    gone = [data.train[1].path, data.train[3].path, data.test[0].path]
    for path in gone:
        path.unlink()
    gone[2].parent.rmdir()
    assert kinetics(root).train == data.train
    left = kinetics(root, missing="skip")
    assert left.train == [data.train[0], data.train[2]]
    assert left.test == [data.test[1]]
    assert left.classes == data.classes
    assert left.skipped == {f"missing from {root}/train": 2, f"missing from {root}/val": 1}
    assert f"2 clips are missing, such as {min(gone[:2])}" in caplog.text
    shutil.rmtree(root / "val")
    (root / "val").mkdir()
    with pytest.raises(InputError, match=r"kinetics400 has no test video; skipped: .*val': 2"):
        kinetics(root, missing="skip")


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("abseiling,x,1,2", "row has not 5 fields: abseiling,x,1,2"),
        ("abseiling,x,1,2,test", "split is not train: test"),
        ("abseiling,x,one,2,train", "time_start is no whole number from 0 on: one"),
        ("abseiling,x,1,-2,train", "time_end is no whole number from 0 on: -2"),
        ("abseiling,x,2,2,train", "time_end is not after time_start: 2..2"),
        (",x,1,2,train", "label is empty or holds a slash: ''"),
        ("abseiling,../x,1,2,train", "youtube_id is empty or holds a slash: ../x"),
        ("", "line is empty"),
    ],
)
def test_bad_rows_of_kinetics(root: Path, row: str, complaint: str) -> None:
    path = edit(root / "train.csv", 3, row)
    refused(lambda: kinetics(root), f"{path}:3: {complaint}")


def test_bad_csv_files(root: Path) -> None:
    path = edit(root / "val.csv", 3, "abseiling,d123456789a,5,15,val")
    clip = "abseiling/d123456789a_000005_000015.mp4"
    refused(
        lambda: kinetics(root),
        f"{path}:3: video occurs twice, first at {path}:2: {clip}",
    )
    edit(path, 1, "label,youtube_id,time_start,time_end")
    refused(
        lambda: kinetics(root),
        f"{path}:1: header has no column split: label,youtube_id,time_start,time_end",
    )
    path.write_text('label,youtube_id,time_start,time_end,split\n"' + "a" * 200_000)
    with pytest.raises(InputError, match=r"val\.csv:2: is no csv: field larger"):
        kinetics(root)
    path.write_text("")
    with pytest.raises(InputError, match=r"val\.csv:1: header has no column label"):
        kinetics(root)


def test_csv_line_ends_that_are_accepted(root: Path) -> None:
    expected = kinetics(root)
    for path in root.glob("*.csv"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n\r\n")
    assert kinetics(root) == expected


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"version": 500}, "version: accepted: 400, 600, 700: 500"),
        ({"class_order": "file"}, "class_order: accepted: alphabetical, label_map: file"),
        ({"class_order": "label_map"}, "label_map: class_order=label_map needs the file"),
        ({"label_map": "m"}, "label_map: is not used with class_order=alphabetical: m"),
        ({"directory": "x"}, "directory: accepted: label, mmaction2, xtemporal, flat: x"),
        ({"missing": "warn"}, "missing: accepted: error, skip: warn"),
    ],
)
def test_options_of_kinetics(root: Path, options: dict[str, Any], complaint: str) -> None:
    refused(lambda: kinetics(root, **options), complaint)
