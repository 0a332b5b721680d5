"""Folders of classes; images that are files."""

import os
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
from hydra.utils import instantiate

from common.log import InputError
from face_lfr.data.folder import FileImages, Names, load_folder
from face_lfr.tests.launch import config


def save(path: Path, level: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((8, 10, 3), (level, 0, 255), np.uint8))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, level in (("b/2.png", 1), ("b/1.png", 2), ("a/x y.png", 3), ("c/z.PNG", 4)):
        save(tmp_path / name, level)
    return tmp_path


def test_a_folder(root: Path) -> None:
    data = load_folder(root, "mine")
    assert (data.name, data.root, data.num_classes, data.skipped) == ("mine", root, 3, {})
    assert data.labels_N.tolist() == [0, 1, 1, 2]
    assert data.labels_N.dtype == np.int64
    names = [os.path.relpath(data.images.name(row), root) for row in range(4)]
    assert names == ["a/x y.png", "b/1.png", "b/2.png", "c/z.PNG"]
    assert [data.images.label(row) for row in range(4)] == [0, 1, 1, 2]
    for row, level in enumerate([3, 2, 1, 4]):
        image = data.images.read(row)
        assert image.shape == (8, 10, 3)
        assert image[0, 0].tolist() == [255, 0, level]  # red first


def test_numbers_are_ordered_as_numbers(tmp_path: Path) -> None:
    for name in ("10", "9", "100"):
        save(tmp_path / name / "a.png", 1)
    images = load_folder(tmp_path).images
    assert [Path(images.name(row)).parent.name for row in range(3)] == ["9", "10", "100"]
    save(tmp_path / "x" / "a.png", 1)
    images = load_folder(tmp_path).images
    assert [Path(images.name(row)).parent.name for row in range(4)] == ["10", "100", "9", "x"]


def test_other_files_are_counted(root: Path) -> None:
    (root / "readme.txt").write_text("x")
    (root / "a" / "Thumbs.db").write_text("x")
    save(root / "a" / "deeper" / "q.png", 5)
    data = load_folder(root)
    assert data.skipped == {"other files and folders": 3}
    assert data.epoch_length == 4
    assert load_folder(root, suffixes=[".db"], allow_gaps=True).epoch_length == 1


def test_gaps(root: Path) -> None:
    (root / "aa").mkdir()
    with pytest.raises(InputError, match=r"aa: class without an image .*: 1 such folders"):
        load_folder(root)
    data = load_folder(root, allow_gaps=True)
    assert data.labels_N.tolist() == [0, 2, 2, 3]
    assert (data.num_classes, data.skipped) == (4, {"classes without an image": 1})


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no: folder cannot be read: No such file"):
        load_folder(tmp_path / "no")
    with pytest.raises(InputError, match="has no folder of a class"):
        load_folder(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match=r"has no image \(\.jpg, .*\) in its folders: 1"):
        load_folder(tmp_path, allow_gaps=True)
    save(tmp_path / "a" / "a.png", 1)
    with pytest.raises(ValueError, match="fraction=2"):
        load_folder(tmp_path, noise=2)


def test_images_that_cannot_be_read_are_named(root: Path) -> None:
    (root / "a" / "x y.png").write_bytes(b"text")
    (root / "b" / "1.png").write_bytes(b"")
    data = load_folder(root)
    os.remove(root / "b" / "2.png")
    for row, message in enumerate(
        [
            r"a/x y.png: image cannot be decoded: 4 bytes",
            r"b/1.png: image cannot be decoded: 0 bytes",
            r"b/2.png: image cannot be read: No such file",
        ]
    ):
        with pytest.raises(InputError, match=message):
            data.images.read(row)


def test_absolute_names_stay() -> None:
    images = FileImages(Path("/root/set"), ["/other/a.jpg", "b.jpg"], np.zeros(2, np.int64))
    assert [images.name(row) for row in range(2)] == ["/other/a.jpg", "/root/set/b.jpg"]


def test_names_are_a_list_of_strings() -> None:
    texts = ["a", "", "längs/名", "b c", os.fsdecode(b"\xff.jpg")]
    names = Names(iter(texts))
    assert list(names) == texts
    assert [names[row] for row in (-1, -5, 2)] == [texts[-1], "a", texts[2]]
    assert list(names[1:4]) == texts[1:4]
    assert list(names[::-2]) == texts[::-2]
    for row in (5, -6):
        with pytest.raises(IndexError):
            names[row]
    assert list(Names([])) == []
    assert list(pickle.loads(pickle.dumps(names))) == texts
    assert names.index("b c") == 3


def test_config(root: Path) -> None:
    data = instantiate(config("train", "data=folder", f"data.root={root}").data)
    assert (data.name, data.epoch_length) == ("folder", 4)
