"""Sets in the format of COCO: what is kept, what is counted, what stops."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from detection_tsd.data import coco_json
from detection_tsd.data.coco import Names, load_coco
from detection_tsd.data.coco_json import read_lists
from detection_tsd.data.coco_replica import make_coco_replica
from detection_tsd.data.detection_data import DetectionData
from detection_tsd.data.transforms import DetectionTransform

CONFIGS = Path(__file__).parents[1] / "configs"
Table = dict[str, Any]
TRIANGLE = [[10.1, 10.2, 30.3, 10.4, 30.5, 30.6]]


def box(number: int, image: int, kind: int, bbox: list[float], **more: Any) -> Table:
    area = bbox[2] * bbox[3] if len(bbox) == 4 else 1.0
    return {"id": number, "image_id": image, "category_id": kind, "bbox": bbox, "area": area,
            "iscrowd": 0, "segmentation": TRIANGLE} | more  # fmt: skip


def table() -> Table:
    """Ids with gaps, out of order; categories behind the annotations, as in the official files."""
    sizes = {70: (40, 60), 7: (60, 40), 9000000000: (40, 60), 5: (20, 60)}
    return {
        "info": {"year": 2017},
        "images": [
            {"id": k, "file_name": f"{k}.jpg", "height": h, "width": w}
            for k, (h, w) in sizes.items()
        ],
        "annotations": [
            box(11, 7, 90, [10, 10, 20.5, 20]),
            box(3, 70, 1, [1, 2, 3, 4]),
            box(12, 7, 3, [0, 0, 5, 5]),
            box(13, 7, 1, [5, 5, 30, 30], iscrowd=1,
                segmentation={"size": [60, 40], "counts": [2400]}),
            box(14, 5, 1, [5, 5, 10, 10]),
        ],
        "categories": [
            {"id": 90, "name": "brush"}, {"id": 1, "name": "man"}, {"id": 3, "name": "car"},
        ],
    }  # fmt: skip


def write(root: Path, content: Table | str, pictures: bool = True) -> Path:
    """The set in `root`; returns the annotation file."""
    path = root / "annotations" / "instances_train2017.json"
    path.parent.mkdir(exist_ok=True)
    (root / "train2017").mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    for image in content["images"] if pictures and isinstance(content, dict) else ():
        shape = (image.get("height", 9), image.get("width", 9), 3)
        cv2.imwrite(str(root / "train2017" / image["file_name"]), np.zeros(shape, np.uint8))
    return path


def changed(change: Callable[[Table], Any]) -> Table:
    content = table()
    change(content)
    return content


def boxes(data: DetectionData) -> list[list[list[float]]]:
    return [data.objects.read(row).box_G4.tolist() for row in range(len(data))]


def labels(data: DetectionData) -> list[list[int]]:
    return [data.objects.labels(row).tolist() for row in range(len(data))]


def test_ids_with_gaps_and_file_order(tmp_path: Path) -> None:
    write(tmp_path, table())
    data = load_coco(tmp_path)
    assert data.image_ids == (70, 7, 9000000000, 5)
    assert data.classes == ("man", "car", "brush")
    assert data.class_ids == (1, 3, 90)
    assert data.num_classes == 3
    assert labels(data) == [[1], [3, 2], [], [1]]
    assert boxes(data)[:2] == [[[1, 2, 4, 6]], [[10, 10, 30.5, 30], [0, 0, 5, 5]]]
    assert data.objects.read(1).crowd_I4.tolist() == [[5, 5, 35, 35]]
    assert data.objects.read(1).segments is None
    assert [data.images.size(row) for row in range(4)] == [(40, 60), (60, 40), (40, 60), (20, 60)]
    assert data.images.name(1) == str(tmp_path / "train2017" / "7.jpg")
    assert data.images.read(1).shape == (60, 40, 3)
    assert len(data) == len(data.images) == len(data.objects) == 4
    assert data.skipped == {}
    assert data.name == f"{tmp_path.name}/train2017"
    assert data.objects.path == tmp_path / "annotations" / "instances_train2017.json"  # type: ignore[attr-defined]


def test_training_drops_small_and_empty_images(tmp_path: Path) -> None:
    write(tmp_path, table())
    data = load_coco(tmp_path, filter_empty=True)
    assert data.image_ids == (70, 7)
    assert labels(data) == [[1], [3, 2]]
    assert data.objects.read(1).crowd_I4.shape == (1, 4)
    small, empty = "images with a side below 32 pixels", "images without objects"
    assert data.skipped == {small: 1, empty: 1}
    assert load_coco(tmp_path, filter_empty=True, min_side=0).image_ids == (70, 7, 5)


def test_an_image_with_crowds_only_is_empty(tmp_path: Path) -> None:
    write(tmp_path, changed(lambda t: t["annotations"][1].update(iscrowd=1)))
    assert load_coco(tmp_path, filter_empty=True).image_ids == (7,)


@pytest.mark.parametrize(
    ("bbox", "more", "kept", "reason"),
    [
        ([10, 10, 0, 5], {}, None, "boxes without area"),
        ([10, 10, 0.99, 5], {}, None, "boxes without area"),
        ([10, 10, 5, 0.5], {}, None, "boxes without area"),
        ([10, 10, 5, 5], {"area": 0}, None, "boxes without area"),
        ([10, 10, 5, 5], {"area": -3.5}, None, "boxes without area"),
        ([10, 10, 1, 1], {}, [10, 10, 11, 11], None),
        ([-5, 30, 15, 25.5], {}, [0, 30, 10, 40], "boxes clipped to their picture (kept)"),
        ([50, 30, 10, 10.0001], {}, [50, 30, 60, 40], None),
        ([70, 10, 5, 5], {}, None, "boxes outside their picture"),
        ([-20, 10, 20.5, 5], {}, None, "boxes outside their picture"),
    ],
)
def test_boxes_on_and_beyond_the_edge(
    tmp_path: Path, bbox: list[float], more: Table, kept: list[float] | None, reason: str | None
) -> None:
    write(tmp_path, changed(lambda t: t["annotations"].append(box(99, 70, 3, bbox, **more))))
    data = load_coco(tmp_path)
    assert boxes(data)[0] == [[1, 2, 4, 6]] + ([] if kept is None else [kept])
    assert data.skipped == ({} if reason is None else {reason: 1})


def test_a_missing_area_is_that_of_the_box(tmp_path: Path) -> None:
    write(tmp_path, changed(lambda t: [entry.pop("area") for entry in t["annotations"]]))
    assert load_coco(tmp_path).skipped == {}


def test_sizes_are_read_from_the_pictures_when_the_file_has_none(tmp_path: Path) -> None:
    write(tmp_path, table())
    write(tmp_path, changed(lambda t: t["images"][1].pop("width")), pictures=False)
    assert load_coco(tmp_path).images.size(1) == (60, 40)
    write(tmp_path, changed(lambda t: t["images"][1].update(width=40.0)), pictures=False)
    assert load_coco(tmp_path).images.size(1) == (60, 40)


def test_outlines(tmp_path: Path) -> None:
    code = {"size": [60, 40], "counts": [600, 600, 1200]}

    def change(content: Table) -> None:
        content["annotations"][0]["segmentation"] = code
        content["annotations"][2]["segmentation"] = [[1, 1, 2, 2]]  # no area
        content["annotations"][1]["segmentation"] = [*TRIANGLE, [1, 1, 2, 2], [5, 5, 9, 5, 9, 9]]

    write(tmp_path, changed(change))
    data = load_coco(tmp_path, masks=True)
    assert data.skipped == {"objects without an outline": 1}
    segments = data.objects.read(0).segments
    assert segments is not None
    assert [part.tolist() for part in segments[0]] == [*TRIANGLE, [5, 5, 9, 5, 9, 9]]
    assert data.objects.read(1).segments == [code]
    assert labels(data) == [[1], [3], [], [1]]
    train = load_coco(tmp_path, masks=True, filter_empty=True)
    assert train.objects.read(1).segments == [code]
    view = DetectionTransform(keep_size=True, flip=0).train(
        data.images.read(1), data.objects.read(1), None, np.random.default_rng(0)
    )
    mask_GHW = view.target.mask_GHW
    assert mask_GHW is not None
    assert mask_GHW.shape == (1, 60, 40)
    assert mask_GHW[0, :, 10:20].all()
    assert mask_GHW.sum() == 600


def test_files_without_labels(tmp_path: Path) -> None:
    """As image_info_test-dev2017.json."""
    content = changed(lambda t: t.pop("annotations"))
    write(tmp_path, content)
    path = tmp_path / "annotations" / "info.json"
    path.write_text(json.dumps(content))
    data = load_coco(tmp_path, "test", "annotations/info.json", "train2017", labelled=False)
    assert len(data) == 4
    assert labels(data) == [[]] * 4
    assert data.classes == ("man", "car", "brush")
    unread = table() | {"annotations": [5]}
    path.write_text(json.dumps(unread))
    assert len(load_coco(tmp_path, "x", path, tmp_path / "train2017", labelled=False)) == 4


@pytest.mark.parametrize("outlines", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 22])
@pytest.mark.parametrize("indent", [None, 1])
def test_the_reader_equals_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outlines: bool, chunk: int, indent: int | None
) -> None:
    """Wherever the chunks end, also inside of names, numbers, escapes and outlines."""
    monkeypatch.setattr(coco_json, "CHUNK", chunk)
    content = table() | {"licenses": [], "version": 12345, "note": 'a "segmentation": [[1, 2]], \\'}
    content["images"][0]["file_name"] = '"segmentation": [[1,2]], "x\\\u00e9\U0001f600'
    content["annotations"][0]["segmentation"] = [[1e-3, 2.5e2, -3, 4, 5, 6], [1.0, 2, 3, 4, 5, 6]]
    content["annotations"][1]["segmentation"] = []
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content, indent=indent))
    lists: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": []}
    read_lists(path, {key: _keeper(entries) for key, entries in lists.items()}, outlines)
    if not outlines:
        for entry in (*lists["annotations"], *content["annotations"]):
            entry.pop("segmentation")
    assert lists == {key: content[key] for key in lists}


def _keeper(entries: list[Any]) -> Callable[[int, Any], None]:
    def keep(number: int, entry: Any) -> None:
        assert number == len(entries)
        entries.append(entry)

    return keep


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    path = write(tmp_path, table())
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(load_coco(tmp_path)) == 4


def proposals(root: Path, **arrays: Any) -> Path:
    path = root / "proposals.npz"
    good = {str(k): np.array([[0, 0, 5, 5]], np.float64) for k in (70, 7, 9000000000, 5)}
    np.savez(path, **{key: value for key, value in (good | arrays).items() if value is not None})
    return path


def test_proposals(tmp_path: Path) -> None:
    write(tmp_path, table())
    proposals(tmp_path, **{"7": np.array([[-3, 1, 99, 2], [0, 0, 0, 0]]), "70": np.empty((0, 4))})
    data = load_coco(tmp_path, filter_empty=True, proposals="proposals.npz")
    assert data.proposals is not None
    assert [box_M4.tolist() for box_M4 in data.proposals] == [[], [[-3, 1, 99, 2], [0, 0, 0, 0]]]
    assert all(box_M4.dtype == np.float32 for box_M4 in data.proposals)


def test_names_of_any_characters() -> None:
    names = ["a.jpg", "", "ü/ß.jpg", "\ud800.png", "z" * 300]
    packed = Names(names)
    assert len(packed) == 5
    assert [packed[row] for row in range(5)] == names
    assert len(Names([])) == 0


@pytest.mark.parametrize("masks", [False, True])
def test_agreement_with_pycocotools(tmp_path: Path, masks: bool) -> None:
    """Boxes, labels and masks of the replica, which has the oddities of COCO."""
    from pycocotools.coco import COCO

    make_coco_replica(tmp_path, 8, seed=1)
    data = load_coco(tmp_path, masks=masks)
    api = COCO(tmp_path / "annotations" / "instances_train2017.json")
    assert list(data.image_ids) == api.getImgIds()
    assert list(data.class_ids) == sorted(api.getCatIds())
    still = DetectionTransform(keep_size=True, flip=0)
    for row, image_id in enumerate(data.image_ids):
        image = api.loadImgs([image_id])[0]
        assert data.images.size(row) == (image["height"], image["width"])
        found = [a for a in api.loadAnns(api.getAnnIds([image_id])) if min(a["bbox"][2:]) >= 1]
        regular, crowds = ([a for a in found if a["iscrowd"] == k] for k in (0, 1))
        annotation = data.objects.read(row)
        assert annotation.label_G.tolist() == [
            1 + data.class_ids.index(a["category_id"]) for a in regular
        ]
        for entries, got in ((regular, annotation.box_G4), (crowds, annotation.crowd_I4)):
            expected = np.array([a["bbox"] for a in entries], np.float64).reshape(-1, 4)
            expected[:, 2:] += expected[:, :2]
            assert got == pytest.approx(expected, abs=1e-3)
        if masks:
            pixels = data.images.read(row)
            view = still.train(pixels, annotation, None, np.random.default_rng(0))
            for mask_HW, entry in zip(view.target.mask_GHW, regular, strict=True):  # type: ignore[arg-type]
                assert np.array_equal(mask_HW.numpy(), api.annToMask(entry))
    assert data.skipped["boxes without area"] >= 1
    again = pickle.loads(pickle.dumps(data))
    assert np.array_equal(again.objects.read(0).box_G4, data.objects.read(0).box_G4)


@pytest.mark.parametrize("name", ["coco", "coco_masks", "coco_test_dev"])
def test_configs(tmp_path: Path, name: str) -> None:
    """Fields are arguments of `load_coco`, and files are where the official archives put them."""
    from hydra.utils import instantiate

    make_coco_replica(tmp_path, 4, seed=0)
    info = changed(lambda t: t.pop("annotations"))
    (tmp_path / "test2017").mkdir()
    (tmp_path / "test2017" / "70.jpg").write_bytes(b"")
    (tmp_path / "annotations" / "image_info_test-dev2017.json").write_text(json.dumps(info))
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose(f"data/{name}", [f"data.root={tmp_path}"])
    assert OmegaConf.is_config(cfg.data)
    train, val = instantiate(cfg.data.train), instantiate(cfg.data.val)
    assert train.name.endswith("train2017")
    assert val.name.endswith("test-dev2017" if name == "coco_test_dev" else "val2017")
    assert (train.objects.read(0).segments is not None) == (name == "coco_masks")
    assert train.skipped["images without objects"] == 1
