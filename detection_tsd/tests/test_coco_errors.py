"""Sets in the format of COCO that contradict themselves: one line says where and what."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.log import InputError
from detection_tsd.data.coco import load_coco
from detection_tsd.data.draws import DetectionDraws
from detection_tsd.data.transforms import DetectionTransform
from detection_tsd.tests.test_coco import Table, changed, proposals, table, write

WRONG: list[tuple[str, Callable[[Table], Any], str]] = [
    ("no categories", lambda t: t.pop("categories"), r"\.json: has no list: 'categories'$"),
    ("no images", lambda t: t.pop("images"), "has no list: 'images'$"),
    ("no annotations", lambda t: t.pop("annotations"), "has no list: 'annotations'$"),
    ("empty categories", lambda t: t["categories"].clear(), "has no category$"),
    ("empty images", lambda t: t["images"].clear(), "has no image$"),
    ("categories are an object", lambda t: t.update(categories={"1": "man"}),
     "has 'categories' that is no list: {'1': 'man'}"),
    ("duplicate image", lambda t: t["images"].append(dict(t["images"][1])),
     r"images\[4\]: id is not unique: 7$"),
    ("duplicate category", lambda t: t["categories"].append({"id": 3, "name": "x"}),
     r"categories\[3\]: id is not unique: 3$"),
    ("duplicate annotation", lambda t: t["annotations"][4].update(id=3),
     r"annotations\[4\]: id is not unique: 3$"),
    ("unknown image", lambda t: t["annotations"][2].update(image_id=8),
     r"annotations\[2\]: image_id is unknown: 8$"),
    ("unknown category", lambda t: t["annotations"][2].update(category_id=2),
     r"annotations\[2\]: category_id is unknown: 2$"),
    ("category beyond", lambda t: t["annotations"][2].update(category_id=91),
     r"annotations\[2\]: category_id is unknown: 91$"),
    ("background", lambda t: t["annotations"][2].update(category_id=0),
     "category_id is unknown: 0"),
    ("NaN", lambda t: t["annotations"][1].update(bbox=[1, math.nan, 3, 4]),
     r"annotations\[1\]: bbox is not finite: \[1.0, nan, 3.0, 4.0\]$"),
    ("infinity", lambda t: t["annotations"][1].update(bbox=[1, 2, math.inf, 4]),
     "bbox is not finite"),
    ("NaN area", lambda t: t["annotations"][1].update(area=math.nan), "area is not finite: nan"),
    ("unsorted corners", lambda t: t["annotations"][1].update(bbox=[9, 9, -3, 4]),
     r"annotations\[1\]: bbox has a negative side: \[9.0, 9.0, -3.0, 4.0\]$"),
    ("three numbers", lambda t: t["annotations"][1].update(bbox=[1, 2, 3]),
     r"annotations\[1\]: bbox is no list of four numbers: \[1, 2, 3\]$"),
    ("five numbers", lambda t: t["annotations"][1].update(bbox=[1, 2, 3, 4, 5]), "four numbers"),
    ("text in a box", lambda t: t["annotations"][1].update(bbox=[1, 2, "3", 4]), "four numbers"),
    ("text for a box", lambda t: t["annotations"][1].update(bbox="1 2 3 4"), "four numbers"),
    ("null box", lambda t: t["annotations"][1].update(bbox=None), "four numbers: None"),
    ("no box", lambda t: t["annotations"][1].pop("bbox"),
     r"annotations\[1\]: has no field: 'bbox'$"),
    ("no image_id", lambda t: t["annotations"][1].pop("image_id"), "has no field: 'image_id'"),
    ("no category_id", lambda t: t["annotations"][1].pop("category_id"), "no field: 'category_id'"),
    ("text image_id", lambda t: t["annotations"][1].update(image_id="70"),
     "image_id is no integer: '70'"),
    ("text iscrowd", lambda t: t["annotations"][1].update(iscrowd="no"),
     "iscrowd is no integer: 'no'"),
    ("wild iscrowd", lambda t: t["annotations"][1].update(iscrowd=300),
     "iscrowd is neither 0 nor 1"),
    ("text area", lambda t: t["annotations"][1].update(area="9"), "area is no number: '9'"),
    ("huge id", lambda t: t["annotations"][1].update(id=2**70), "id is no integer"),
    ("a number for an annotation", lambda t: t["annotations"].append(5),
     r"annotations\[5\]: is no object: 5$"),
    ("no file name", lambda t: t["images"][1].pop("file_name"), "has no field: 'file_name'"),
    ("empty file name", lambda t: t["images"][1].update(file_name=""), "file_name is no name: ''"),
    ("no image id", lambda t: t["images"][1].pop("id"), r"images\[1\]: has no field: 'id'"),
    ("text image id", lambda t: t["images"][1].update(id="a"),
     r"images\[1\]: id is no integer: 'a'"),
    ("half an id", lambda t: t["images"][1].update(id=1.5), "id is no integer: 1.5"),
    ("negative height", lambda t: t["images"][1].update(height=-4), "height is not positive: -4"),
    ("no width", lambda t: t["images"][1].update(width=0), "width is not positive: 0"),
    ("null for an image", lambda t: t["images"].append(None), r"images\[4\]: is no object: None$"),
    ("no name", lambda t: t["categories"][1].pop("name"), "has no field: 'name'"),
    ("number for a name", lambda t: t["categories"][1].update(name=5), "name is no name: 5"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "match"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG]
)
def test_check_14_contradictions_stop(
    tmp_path: Path, change: Callable[[Table], Any], match: str
) -> None:
    path = write(tmp_path, changed(change), pictures=False)
    with pytest.raises(InputError, match=match) as error:
        load_coco(tmp_path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("[]", r"is no JSON object, begins with: '\[\]'"),
        ("7", "is no JSON object"),
        ("{", "is no complete JSON"),
        ('{"images": [', "is no complete JSON"),
        ('{"images": [{"id": 1, "file_name": "a"}', "is no complete JSON"),
        ('{"info": [1 2], "images": []}', r"is no JSON \(expected one of , \]\), near"),
        ('{"images": [{"id": 1, "file_name": nope}]}', r"is no JSON \(Expecting value\), near"),
        ('{images: []}', "expected a key"),
        ('{"images" []}', "expected one of :"),
        ('{"info": {}} and more', r"is no JSON \(text after the end\), near"),
        ('{"images": [' + "[" * 100_000, "is no JSON"),
        ("{}", "has no list: 'images'"),
    ],
)  # fmt: skip
def test_check_14_files_that_are_no_annotations(tmp_path: Path, text: str, match: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InputError, match=match) as error:
        load_coco(tmp_path)
    assert str(error.value).startswith(str(path))


def test_check_14_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"instances_train2017\.json: cannot be read: No such file"
    ):
        load_coco(tmp_path)
    write(tmp_path, "x").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(InputError, match=r"is no UTF-8 text"):
        load_coco(tmp_path)
    write(tmp_path, table(), pictures=False)
    with pytest.raises(InputError, match=r"has none of the first pictures of the annotations: 70"):
        load_coco(tmp_path)
    with pytest.raises(ValueError, match="min_side=-1"):
        load_coco(tmp_path, min_side=-1)
    write(tmp_path, changed(lambda t: t["annotations"].clear()))
    assert len(load_coco(tmp_path)) == 4  # a test set may be empty of objects
    with pytest.raises(InputError, match=r"has no image left, dropped: \{'images with a side"):
        load_coco(tmp_path, filter_empty=True)


def test_check_14_a_missing_and_a_truncated_picture(tmp_path: Path) -> None:
    write(tmp_path, table())
    data = load_coco(tmp_path, filter_empty=True)
    path = Path(data.images.name(0))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"70\.jpg: picture cannot be decoded"):
        data.images.read(0)
    path.unlink()
    with pytest.raises(InputError, match=r"70\.jpg: picture cannot be read: No such file"):
        data.images.read(0)
    draws = DetectionDraws(data, DetectionTransform(32, 64), max_bad_items=50)
    assert {draws[number].row for number in range(8)} == {1}
    assert draws.bad_items >= 4


@pytest.mark.parametrize(
    ("outline", "match"),
    [
        (5, "segmentation is neither polygons nor a run-length code: 5"),
        ([5], "has a polygon that is no list of x, y pairs"),
        ([[1, 2, 3]], "has a polygon that is no list of x, y pairs"),
        ([[1, 2, "3", 4, 5, 6]], "has a coordinate that is no number"),
        ([[1, 2, math.nan, 4, 5, 6]], "has a coordinate that is not finite"),
        ({"size": [40, 60]}, "without a proper size or counts"),
        ({"size": [40], "counts": [5]}, "without a proper size or counts"),
        ({"size": [40, 60], "counts": ""}, "without a proper size or counts"),
        ({"size": [40, 60], "counts": [-1, 2401]}, "without a proper size or counts"),
        ({"size": [40, 60], "counts": [5]}, "do not add up"),
        ({"size": [60, 40], "counts": [2400]}, r"a size other than \[40, 60\]: \[60, 40\]"),
        ({"size": [40, 60], "counts": "0Pb`n0"}, "segmentation cannot be decoded"),
    ],
)
def test_check_14_bad_outlines(tmp_path: Path, outline: Any, match: str) -> None:
    write(tmp_path, changed(lambda t: t["annotations"][1].update(segmentation=outline)))
    with pytest.raises(InputError, match=match) as error:
        load_coco(tmp_path, masks=True)
    assert "annotations[1]: segmentation" in str(error.value)
    assert load_coco(tmp_path).objects.read(0).box_G4.tolist() == [[1, 2, 4, 6]]


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (None, r"proposals\.npz: has no proposals of image: 7$"),
        (np.zeros(4), r"proposals\.npz 7: is no \(M, 4\) of numbers: float64 \(4,\)"),
        (np.zeros((2, 5)), r"is no \(M, 4\) of numbers"),
        (np.zeros((2, 4), bool), r"is no \(M, 4\) of numbers"),
        (np.array([[0, 0, 1, 1], [0, np.nan, 1, 1]]), r"not finite .*: \[0.0, nan, 1.0, 1.0\]"),
        (np.array([[5, 0, 1, 1]]), r"or not x1 <= x2, y1 <= y2: \[5, 0, 1, 1\]"),
        (np.array([{}], object), r"is no npz file of numbers"),
    ],
)
def test_check_14_bad_proposals(tmp_path: Path, array: Any, match: str) -> None:
    write(tmp_path, table())
    proposals(tmp_path, **{"7": array})
    with pytest.raises(InputError, match=match):
        load_coco(tmp_path, proposals="proposals.npz")


@pytest.mark.parametrize("content", [None, b"", b"text", b"PK\3\4 cut off"])
def test_check_14_proposals_of_another_kind(tmp_path: Path, content: bytes | None) -> None:
    write(tmp_path, table())
    if content is not None:
        (tmp_path / "p.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"p\.npz: (cannot be read|is no npz file)"):
        load_coco(tmp_path, proposals="p.npz")
    np.save(tmp_path / "p.npy", np.zeros((2, 4)))
    with pytest.raises(InputError, match=r"p\.npy: is no npz file$"):
        load_coco(tmp_path, proposals="p.npy")
