"""The small copy of COCO: its layout, its oddities, and that its objects can be seen."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools import mask
from pycocotools.coco import COCO

from common.log import InputError
from detection_tsd.data.coco import load_coco
from detection_tsd.data.coco_replica import make_coco_replica, run_lengths

SPLITS = ("train2017", "val2017")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_coco_replica(tmp_path_factory.mktemp("replica"), 9, seed=2, val=6)


def content(root: Path, split: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((root / f"annotations/instances_{split}.json").read_text())
    return loaded


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_has_the_oddities(root: Path, split: str) -> None:
    table = content(root, split)
    assert [entry["id"] for entry in table["categories"]] == [1, 3, 90]
    ids = [image["id"] for image in table["images"]]
    assert len(ids) == {"train2017": 9, "val2017": 6}[split]
    assert set(np.diff(ids)) != {1}
    of = {i: [a for a in table["annotations"] if a["image_id"] == i] for i in ids}
    assert [a["iscrowd"] for a in of[ids[0]]].count(1) == 1
    assert "counts" in of[ids[0]][0]["segmentation"]
    assert of[ids[1]] == []
    assert [0.5, 0.5] in [a["bbox"][2:] for a in of[ids[2]]]
    assert len(of[ids[2]]) > 1
    stored = cv2.imread(str(root / split / table["images"][3]["file_name"]), cv2.IMREAD_UNCHANGED)
    assert stored.ndim == 2
    suffixes = {Path(image["file_name"]).suffix for image in table["images"]}
    assert suffixes == {".png", ".jpg"}


@pytest.mark.parametrize("split", SPLITS)
def test_files_and_entries_agree(root: Path, split: str) -> None:
    table = content(root, split)
    shapes = set()
    for image in table["images"]:
        stored = cv2.imread(str(root / split / image["file_name"]))
        assert stored.shape == (image["height"], image["width"], 3)
        shapes.add(image["height"] > image["width"])
    assert shapes == {True, False}  # portrait and landscape
    size = {image["id"]: (image["height"], image["width"]) for image in table["images"]}
    assert len({a["id"] for a in table["annotations"]}) == len(table["annotations"])
    for entry in table["annotations"]:
        height, width = size[entry["image_id"]]
        x, y, w, h = entry["bbox"]
        assert min(x, y) >= 0
        assert x + w <= width + 0.01
        assert y + h <= height + 0.01
        if not entry["iscrowd"]:
            point_P2 = np.array(entry["segmentation"][0]).reshape(-1, 2)
            assert np.allclose(point_P2.min(axis=0), (x, y), atol=0.02)
            assert np.allclose(point_P2.max(axis=0), (x + w, y + h), atol=0.02)


def test_pycocotools_reads_it(root: Path) -> None:
    coco = COCO(str(root / "annotations/instances_train2017.json"))
    for entry in coco.loadAnns(coco.getAnnIds()):
        if entry["bbox"][2] < 1:
            continue
        area = coco.annToMask(entry).sum()
        # An outline may gain or lose half a pixel all along.
        assert abs(int(area) - entry["area"]) < sum(entry["bbox"][2:])
        if entry["iscrowd"]:
            assert area == entry["area"]
            code = mask.frPyObjects(entry["segmentation"], *entry["segmentation"]["size"])
            assert mask.toBbox(code).tolist() == entry["bbox"]


@pytest.mark.parametrize("split", SPLITS)
def test_every_object_can_be_seen(root: Path, split: str) -> None:
    """In grey pictures too: it differs from what is around it."""
    coco = COCO(str(root / f"annotations/instances_{split}.json"))
    for entry in coco.loadAnns(coco.getAnnIds()):
        if entry["bbox"][2] < 1:
            continue
        name = coco.imgs[entry["image_id"]]["file_name"]
        image = cv2.imread(str(root / split / name)).astype(float)
        inside_HW = coco.annToMask(entry).astype(np.uint8)
        ring_HW = cv2.dilate(inside_HW, np.ones((9, 9))) > cv2.dilate(inside_HW, np.ones((3, 3)))
        gap = image[inside_HW > 0].mean(axis=0) - image[ring_HW].mean(axis=0)
        assert np.abs(gap).max() > 25, (name, entry["category_id"])


def test_the_loader_takes_it(root: Path) -> None:
    data = load_coco(root, "train2017", masks=True)
    assert data.classes == ("person", "car", "toothbrush")
    assert len(data) == 9
    assert len(data.objects.read(0).crowd_I4) == 1
    assert len(data.objects.read(1).box_G4) == 0
    assert sum(data.skipped.values()) >= 1  # the box of half a pixel


def test_the_arguments_decide_everything(root: Path, tmp_path: Path) -> None:
    def files(folder: Path) -> dict[str, bytes]:
        paths = [path for path in folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths}

    assert files(make_coco_replica(tmp_path / "again", 9, seed=2, val=6)) == files(root)
    other = files(make_coco_replica(tmp_path / "other", 9, seed=3, val=6))
    assert not [name for name, data in files(root).items() if other.get(name) == data]
    even = make_coco_replica(tmp_path / "even", 4)
    assert len(content(even, "val2017")["images"]) == 4


@pytest.mark.parametrize(("n", "val", "match"), [(2, 5, "train"), (5, 2, "val"), (5, 0, "val")])
def test_too_few_images_are_refused(n: int, val: int, match: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"^{match}: must be at least 3 images"):
        make_coco_replica(tmp_path, n, val=val)


@pytest.mark.parametrize("fill", [0.0, 0.3, 1.0])
def test_run_lengths_are_those_of_coco(fill: float) -> None:
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (3, 5), (17, 9)):
        mask_HW = rng.random((height, width)) < fill
        counts = run_lengths(mask_HW)
        assert sum(counts) == mask_HW.size
        code = mask.frPyObjects({"counts": counts, "size": [height, width]}, height, width)
        assert np.array_equal(mask.decode(code).astype(bool), mask_HW)
