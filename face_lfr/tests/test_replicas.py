"""Replicas: every loader reads its own, and two of one seed are the same."""

from pathlib import Path

import numpy as np
import pytest

from face_lfr.data.bins import load_bin
from face_lfr.data.challenge import load_deepglint, load_iqiyi
from face_lfr.data.face_data import FaceData, Images
from face_lfr.data.folder import load_folder
from face_lfr.data.ijb import load_ijb
from face_lfr.data.image_list import load_list
from face_lfr.data.rec import load_rec
from face_lfr.data.replicas import DISTRACTORS, IMAGES, PERSONS, WRITERS, face, write_replica


def load_training(kind: str, path: Path) -> FaceData:
    if kind == "rec":
        return load_rec(path)
    return load_folder(path) if kind == "folder" else load_list(path, path.parent)


def load_images(kind: str, path: Path) -> Images:
    if kind == "bin":
        return load_bin(path).images
    if kind == "ijb":
        return load_ijb(path).images()
    return load_deepglint(path) if kind == "deepglint" else load_iqiyi(path).frames


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kind", ["rec", "folder", "list"])
def test_training_replicas(kind: str, tmp_path: Path) -> None:
    data = load_training(kind, write_replica(kind, tmp_path))
    assert (data.num_classes, data.epoch_length) == (PERSONS, PERSONS * IMAGES)
    assert np.bincount(data.labels_N).tolist() == [IMAGES] * PERSONS
    for row in range(data.epoch_length):
        image = data.images.read(row).astype(float)
        gaps = [np.abs(image - face(person, 0)).mean() for person in range(PERSONS)]
        assert int(np.argmin(gaps)) == data.images.label(row) == data.labels_N[row]
    assert sum(data.skipped.values()) == {"rec": PERSONS, "folder": 1, "list": 0}[kind]


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("bin", 80),
        ("ijb", 5 * PERSONS),
        ("deepglint", PERSONS * IMAGES + DISTRACTORS),
        ("iqiyi", 20),
    ],
)
def test_test_replicas(kind: str, count: int, tmp_path: Path) -> None:
    images = load_images(kind, write_replica(kind, tmp_path))
    assert len(images) == count
    for row in range(count):
        assert images.read(row).shape == (112, 112, 3)
        assert images.read(row).dtype == np.uint8


@pytest.mark.parametrize("kind", sorted(WRITERS))
def test_the_seed_decides(kind: str, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_replica(kind, tmp_path / name, seed)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert tree(tmp_path / "a") != tree(tmp_path / "c")


def test_an_unknown_kind() -> None:
    with pytest.raises(ValueError, match="kind='lmdb'; accepted: rec, folder, list, bin, ijb"):
        write_replica("lmdb", ".")
