"""Open Images in the text format of Sense-X/TSD."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.log import InputError
from detection_tsd.data import openimages_text
from detection_tsd.data.oid_files import ImageIndex
from detection_tsd.data.oid_replica import make_oid_replica
from detection_tsd.data.openimages_text import (
    check_class_samples,
    load_text,
    read_records,
    read_text_boxes,
)

FIRST = "train/a.jpg\n0 0\n2\n3 0.0 0.25 0.5 1.0 0\n1 0.5 0.5 1.0 1.0 1\n"
EMPTY = "train/b.jpg\n\n0\n"
LAST = "val/c.jpg\n7 12 9\n1\n2 0.125 0 0.25 1 0\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "boxes.txt"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("block", [1, 2, 100])
def test_records(tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openimages_text, "BLOCK_ROWS", block)
    names, boxes = read_records(write(tmp_path, FIRST + EMPTY + LAST + "\n\n"), 3)
    assert names == ["train/a.jpg", "train/b.jpg", "val/c.jpg"]
    assert boxes.image_G.tolist() == [0, 0, 2]
    assert boxes.label_G.tolist() == [3, 1, 2]
    assert boxes.group_G.tolist() == [False, True, False]
    assert boxes.box_G4.tolist() == [[0, 0.25, 0.5, 1], [0.5, 0.5, 1, 1], [0.125, 0, 0.25, 1]]


def test_records_without_any_box(tmp_path: Path) -> None:
    names, boxes = read_records(write(tmp_path, EMPTY), 3)
    assert names == ["train/b.jpg"]
    assert boxes.box_G4.shape == (0, 4)


@pytest.mark.parametrize("block", [1, 100])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "boxes.txt: file is empty"),
        ("\n\n", "boxes.txt: file is empty"),
        ("a.jpg\n0 0\n0\n", ":1: is no path with exactly one slash"),
        ("x/y/a.jpg\n0 0\n0\n", ":1: is no path with exactly one slash"),
        (EMPTY + "\n" + LAST, ":4: is no path with exactly one slash"),
        (EMPTY + "val/d.jpg\nx\n0\n", ":5: second line of a record"),
        (EMPTY + "val/d.jpg\n0 0\n1.5\n", ":6: is no number of boxes: 1.5"),
        (EMPTY + "val/d.jpg\n0 0\n-1\n", ":6: is no number of boxes: -1"),
        (EMPTY + "val/d.jpg\n0 0\n", ":6: is no number of boxes: ''"),
        (EMPTY + LAST.replace("\n1\n", "\n3\n"), ":6: file ends after 1 of the boxes"),
        (FIRST.replace("\n2\n", "\n1\n") + LAST, ":5: is no path"),
        (FIRST.replace("\n2\n", "\n3\n") + LAST, ":6: line is not label x1 y1 x2 y2 group"),
        (EMPTY + LAST + EMPTY, ":8: path is there twice: train/b.jpg"),
        (EMPTY + LAST.replace("2 0.125", "4 0.125"), ":7: label is no whole number in 1..3: 4"),
        (EMPTY + LAST.replace("2 0.125", "0 0.125"), ":7: label is no whole number in 1..3: 0"),
        (EMPTY + LAST.replace("2 0.125", "1.5 0.125"), ":7: label is no whole number"),
        (EMPTY + LAST.replace("0.25 1 0", "0.25 1 2"), ":7: group is neither 0 nor 1: 2"),
        (EMPTY + LAST.replace("0.25 1 0", "nan 1 0"), ":7: XMax is no finite number: nan"),
        (EMPTY + LAST.replace("0.25 1 0", "x 1 0"), ":7: XMax is no finite number: x"),
        (EMPTY + LAST.replace("0.25 1 0", "80 1 0"), ":7: XMax is outside of .0, 1.: 80"),
        (EMPTY + LAST.replace("0.25 1 0", "0 1 0"), ":7: XMin is above XMax: 0.125"),
        (EMPTY + LAST.replace("0.25 1 0", "0.25 1"), ":7: line is not label x1 y1 x2 y2 group"),
        (FIRST.replace("1 0.5 0.5 1.0 1.0 1", "3 0 0.25 0.5 1 1"), ":5: box is there twice"),
    ],
)
def test_check_14_bad_records_are_named(
    tmp_path: Path, text: str, message: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openimages_text, "BLOCK_ROWS", block)
    with pytest.raises(InputError, match=message):
        read_records(write(tmp_path, text), 3)


def test_files_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "boxes.txt"
    path.write_bytes(b"train/\xff.jpg\n")
    with pytest.raises(InputError, match="0xff"):
        read_records(path, 3)
    with pytest.raises(InputError, match="file is missing"):
        read_records(tmp_path / "absent.txt", 3)


def test_overshoot_and_duplicates_are_counted(tmp_path: Path) -> None:
    text = "t/a.jpg\n0 0\n3\n1 -0.001 0 0.5 1.002 0\n1 0 0 1 1 0\n1 0 0 1 1 0\n"
    boxes = read_records(write(tmp_path, text), 3, duplicates="drop").boxes
    assert boxes.box_G4.tolist() == [[0, 0, 0.5, 1], [0, 0, 1, 1]]
    assert boxes.counts == {"coordinates clipped": 1, "box repeated, dropped": 1}


def test_stems_name_the_images(tmp_path: Path) -> None:
    images = ImageIndex(["c", "x"])
    boxes = read_text_boxes(write(tmp_path, FIRST + EMPTY + LAST), 3, images)
    assert images.ids == ("c", "x", "a", "b")
    assert boxes.image_G.tolist() == [2, 2, 0]
    with pytest.raises(InputError, match="two paths name one image: b"):
        read_text_boxes(write(tmp_path, EMPTY + EMPTY.replace("train", "val")), 3, ImageIndex())


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_oid_replica(tmp_path_factory.mktemp("oid") / "set", 8, seed=3)


def test_loading(replica: Path) -> None:
    data = load_text(
        replica,
        label_tree="challenge2019/class_label_tree.np",
        class_samples="challenge2019/class_sample_train.pkl",
    )
    assert len(data) == 8
    assert data.num_classes == 8
    assert data.images.read(3).shape[:2] == data.images.size(3)
    assert (replica / "sizes-train-text.npz").is_file()
    first = data.objects.read(0)
    first.box_G4[:] = 0
    assert data.objects.read(0).box_G4.min(axis=0).max() > 0
    groups = load_text(replica, "val", group_of="ignore").objects.read(0)
    assert groups.crowd_I4.shape == (1, 4)


def test_samples_of_classes_are_compared(replica: Path, tmp_path: Path) -> None:
    folder = replica / "challenge2019"
    records = read_records(folder / "challenge-2019-train-detection-bbox.txt", 8)
    path = folder / "class_sample_train.pkl"
    check_class_samples(path, records, 8)
    table: dict[Any, Any] = pickle.loads(path.read_bytes())
    label = next(key for key in table if table[key])

    def refused(changed: Any, message: str) -> None:
        other = tmp_path / "samples.pkl"
        other.write_bytes(pickle.dumps(changed))
        with pytest.raises(InputError, match=message):
            check_class_samples(other, records, 8)

    refused(table | {label: table[label][:-1]}, f"records of label {label}, the annotations have")
    refused({key: table[key] for key in range(1, 8)}, "no dict with the keys 1..8")
    refused([1, 2], "no dict with the keys 1..8: list")
    check = tmp_path / "arrays.pkl"
    check.write_bytes(pickle.dumps({key: np.array(value, int) for key, value in table.items()}))
    check_class_samples(check, records, 8)
