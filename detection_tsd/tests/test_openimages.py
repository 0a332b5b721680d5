"""Loading Open Images from its official files, and the reader of their columns."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.log import InputError
from detection_tsd.data import csv_columns
from detection_tsd.data.csv_columns import read_blocks
from detection_tsd.data.detection_data import DetectionData
from detection_tsd.data.oid_files import (
    Classes,
    ImageIndex,
    read_boxes,
    read_classes,
    read_image_labels,
    repeated_rows,
)
from detection_tsd.data.openimages import find_images, load_openimages

CLASSES = Classes(("/m/a", "/m/b"))
HEAD = "ImageID,LabelName,XMin,XMax,YMin,YMax,IsGroupOf\n"
GOOD = "i0,/m/a,0.25,0.5,0.25,1.0,0\n"


def write(folder: Path, text: str, name: str = "boxes.csv") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def picture(path: Path, height: int, width: int) -> None:
    import cv2

    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full((height, width, 3), 90, np.uint8))


def small_set(root: Path, boxes: str, grouped: bool = False) -> Path:
    """Pictures i0 (40 x 80) and j1 (60 x 30), and the files of the challenge."""
    for name, height, width in (("i0", 40, 80), ("j1", 60, 30)):
        folder = f"train_{name[0]}" if grouped else "train"
        picture(root / "OpenImages" / folder / f"{name}.jpg", height, width)
    write(root, boxes, "challenge2019/challenge-2019-train-detection-bbox.csv")
    classes = "challenge2019/challenge-2019-classes-description-500.csv"
    write(root, "/m/a,Apple\n/m/b,Bear\n", classes)
    return root


BOXES = (
    HEAD
    + "j1,/m/b,0.0,1.0,0.5,1.0,1\n"
    + GOOD
    + "j1,/m/a,0.1,0.5,0.0,0.5,0\n"
    + "i0,/m/b,0.5,0.5,0.0,0.5,0\n"
)


def test_boxes_are_in_the_pixels_of_the_file(tmp_path: Path) -> None:
    data = load_openimages(small_set(tmp_path, BOXES))
    assert data.image_ids == ("j1", "i0")
    assert (data.classes, data.class_ids) == (("Apple", "Bear"), ("/m/a", "/m/b"))
    assert data.name == f"{tmp_path.name}/train"
    assert data.source is not None
    assert data.source.is_file()
    first, second = data.objects.read(0), data.objects.read(1)
    np.testing.assert_allclose(first.box_G4, [[0, 30, 30, 60], [3, 0, 15, 30]], rtol=1e-6)
    np.testing.assert_array_equal(first.label_G, [2, 1])
    np.testing.assert_allclose(second.box_G4, [[20, 10, 40, 40]])
    assert first.box_G4.dtype == np.float32
    assert first.label_G.dtype == data.objects.labels(0).dtype == np.int64
    assert first.crowd_I4.shape == (0, 4)
    assert data.skipped == {"boxes without area": 1}
    assert data.images.size(0) == (60, 30)
    assert data.images.read(1).shape == (40, 80, 3)


def test_check_11_an_image_that_is_drawn_twice_has_the_same_boxes(tmp_path: Path) -> None:
    """The reference scales its cached boxes in place, the second time once too often."""
    data = load_openimages(small_set(tmp_path, BOXES))
    first = data.objects.read(0)
    wanted = first.box_G4.copy()
    first.box_G4[:] *= 7
    first.label_G[:] = 1
    again = data.objects.read(0)
    np.testing.assert_array_equal(again.box_G4, wanted)
    np.testing.assert_array_equal(again.label_G, [2, 1])


def test_boxes_of_groups(tmp_path: Path) -> None:
    root = small_set(tmp_path, BOXES)
    ignored = load_openimages(root, group_of="ignore").objects.read(0)
    np.testing.assert_allclose(ignored.crowd_I4, [[0, 30, 30, 60]])
    np.testing.assert_array_equal(ignored.label_G, [1])
    dropped = load_openimages(root, group_of="drop")
    assert dropped.objects.read(0).crowd_I4.shape == (0, 4)
    assert dropped.objects.labels(0).tolist() == [1]
    assert dropped.skipped == {"boxes without area": 1, "boxes of groups": 1}
    with pytest.raises(InputError, match="accepted: box, ignore, drop"):
        load_openimages(root, group_of="keep")  # type: ignore[arg-type]


def test_training_folders_by_the_first_character(tmp_path: Path) -> None:
    data = load_openimages(small_set(tmp_path, BOXES, grouped=True))
    assert data.images.name(0).endswith("OpenImages/train_j/j1.jpg")
    assert data.images.read(0).shape == (60, 30, 3)


def test_a_folder_with_the_pictures_themselves(tmp_path: Path) -> None:
    root = small_set(tmp_path, BOXES)
    data = load_openimages(root, images="OpenImages/train")
    assert data.images.name(1) == str(root / "OpenImages/train/i0.jpg")
    with pytest.raises(InputError, match=r"none of the first pictures.*j1\.jpg"):
        load_openimages(root, images="elsewhere")


def test_the_archives_below_the_split() -> None:
    with pytest.raises(InputError, match="none of the first pictures"):
        find_images(Path("/nowhere"), [("train", "abc.jpg")])


def test_sizes_are_read_once(tmp_path: Path) -> None:
    root = small_set(tmp_path, BOXES)
    load_openimages(root)
    assert (root / "sizes-train.npz").is_file()
    for path in (root / "OpenImages" / "train").iterdir():
        path.write_bytes(b"no picture")
    data = load_openimages(root)
    assert data.images.size(1) == (40, 80)
    with pytest.raises(InputError, match=r"j1\.jpg"):
        data.images.read(0)


def test_a_missing_picture_is_named(tmp_path: Path) -> None:
    root = small_set(tmp_path, BOXES)
    (root / "OpenImages" / "train" / "i0.jpg").unlink()
    with pytest.raises(InputError, match=r"i0\.jpg"):
        load_openimages(root)


def test_verified_images_without_boxes_join(tmp_path: Path) -> None:
    root = small_set(tmp_path, HEAD + GOOD)
    write(root, "ImageID,LabelName,Confidence\nj1,/m/a,0\ni0,/m/a,1\n", "labels.csv")
    data = load_openimages(root, image_labels="labels.csv")
    assert data.image_ids == ("i0", "j1")
    assert data.objects.read(1).box_G4.shape == (0, 4)
    assert data.objects.labels(1).shape == (0,)


def test_a_hierarchy_of_other_classes_is_noticed(tmp_path: Path) -> None:
    root = small_set(tmp_path, BOXES)
    write(root, '{"LabelName": "r", "Subcategory": [{"LabelName": "/m/x"}]}', "h.json")
    with pytest.raises(InputError, match="none of the classes of the list"):
        load_openimages(root, hierarchy="h.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "file is empty"),
        (HEAD, "header and no rows"),
        (HEAD.replace(",IsGroupOf", "") + GOOD, "1: column IsGroupOf is missing"),
        (HEAD + GOOD + GOOD.replace("/m/a", "/m/c"), "3: class is not in the list.*: /m/c"),
        (HEAD + GOOD.replace("0.25,0.5", "nan,0.5"), "2: XMin is not finite: nan"),
        (HEAD + GOOD.replace("0.25,0.5", "0.25,1.5"), "2: XMax is outside of .0, 1.: 1.5"),
        (HEAD + GOOD.replace("0.25,0.5", "0.5,0.25"), "2: XMin is above XMax: 0.5"),
        (HEAD + GOOD.replace("0.25,1.0", "1.0,0.25"), "2: YMin is above YMax: 1.0"),
        (HEAD + GOOD.replace("1.0,0", "1.0,2"), "2: IsGroupOf is not 0, 1 or -1: 2.0"),
        (HEAD + GOOD.replace("1.0,0", "1.0,yes"), "2: IsGroupOf is no finite number: yes"),
        (HEAD + GOOD + "i0,/m/a,0.2\n", "3: line has 3 fields"),
        (HEAD + GOOD + "i1,/m/a,0,1,0,1,0\n" + GOOD, r"4: box is there twice \(1 such"),
    ],
)
def test_check_14_bad_boxes_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InputError, match=message) as caught:
        read_boxes(path, CLASSES, ImageIndex())
    assert str(caught.value).startswith(str(path))


def test_counts_of_what_is_mended(tmp_path: Path) -> None:
    text = HEAD + GOOD + GOOD + "i0,/m/b,-0.005,0.5,0.25,1.004,-1\n"
    for duplicates, count in (("keep", 3), ("drop", 2)):
        found = read_boxes(write(tmp_path, text), CLASSES, ImageIndex(), duplicates)  # type: ignore[arg-type]
        assert len(found.label_G) == count
        assert found.box_G4[-1].tolist() == [0, 0.25, 0.5, 1]
        assert not found.group_G[-1]
        word = "kept" if duplicates == "keep" else "dropped"
        assert found.counts == {
            "coordinates clipped": 1, "IsGroupOf unknown": 1, f"box repeated, {word}": 1,
        }  # fmt: skip


def test_columns_in_any_order_and_line_endings(tmp_path: Path) -> None:
    text = (
        "\ufeffYMax,IsInside,LabelName, XMin ,YMin,XMax,IsGroupOf,ImageID\r\n"
        '1.0,0,"/m/b",0.25,0.5,0.75,1,"i,0"\r\n0.5,0,/m/a,0,0,1e-1,0,i1\r\n\r\n\r\n'
    )
    path = tmp_path / "boxes.csv"
    path.write_bytes(text.encode())
    images = ImageIndex()
    found = read_boxes(path, CLASSES, images)
    assert images.ids == ("i,0", "i1")
    assert found.box_G4.tolist() == [[0.25, 0.5, 0.75, 1.0], [0, 0, 0.1, 0.5]]
    assert (found.label_G.tolist(), found.group_G.tolist()) == ([2, 1], [True, False])


def test_blocks_number_their_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f"i{row // 3},/m/a,{row / 100},0.9,0.1,0.2,0\n" for row in range(10)]
    path = write(tmp_path, HEAD + "".join(lines))
    blocks = list(read_blocks(path, {"ImageID": "text", "XMin": "number"}, rows=4))
    assert [block.where(0).rpartition(":")[2] for block in blocks] == ["2", "6", "10"]
    assert np.concatenate([b.columns["XMin"] for b in blocks]).tolist() == [
        row / 100 for row in range(10)
    ]
    monkeypatch.setattr(csv_columns.read_blocks, "__defaults__", (4, None))
    images = ImageIndex()
    assert read_boxes(path, CLASSES, images).image_G.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    path = write(tmp_path, HEAD + "".join([*lines[:7], "i1,/m/q,0,1,0,1,0\n", *lines[7:]]))
    with pytest.raises(InputError, match=r"boxes\.csv:9: class"):
        read_boxes(path, CLASSES, ImageIndex())
    path = write(tmp_path, HEAD + "".join([*lines[:4], "\n", *lines[4:]]))
    with pytest.raises(InputError, match=r"boxes\.csv:6: line is empty"):
        read_boxes(path, CLASSES, ImageIndex())
    path = write(tmp_path, HEAD + "".join([*lines[:3], "\n", *lines[3:]]))
    with pytest.raises(InputError, match=r"boxes\.csv:5: line is empty"):
        read_boxes(path, CLASSES, ImageIndex())


def test_other_encodings_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "boxes.csv"
    path.write_bytes(HEAD.encode() + GOOD.encode() + b"\xff\xfe\n")
    with pytest.raises(InputError, match="no UTF-8 text, it has the byte: 0xff"):
        read_boxes(path, CLASSES, ImageIndex())
    with pytest.raises(InputError, match=r"absent\.csv: file is missing"):
        read_boxes(tmp_path / "absent.csv", CLASSES, ImageIndex())


LABELS = "ImageID,Source,LabelName,Confidence\n"


def test_image_labels(tmp_path: Path) -> None:
    path = write(tmp_path, LABELS + "i0,v,/m/a,1\ni1,v,/m/a,0\ni0,v,/m/b,0.0\n")
    images = ImageIndex(["i1"])
    found = read_image_labels(path, CLASSES, images)
    assert images.ids == ("i1", "i0")
    assert found.image_V.tolist() == [1, 0, 1]
    assert found.label_V.tolist() == [1, 1, 2]
    assert found.present_V.tolist() == [True, False, False]
    assert len(read_image_labels(write(tmp_path, LABELS), CLASSES, images).label_V) == 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("i0,machine,/m/a,0.7", "3: Confidence is neither 0 nor 1.*: 0.7"),
        ("i0,v,/m/x,1", "3: class is not in the list.*: /m/x"),
        ("i0,v,/m/b,0", "3: image label is there twice"),
        ("i0,v,/m/b,", "3: Confidence is no finite number: ''"),
    ],
)
def test_bad_image_labels_are_named(tmp_path: Path, row: str, message: str) -> None:
    path = write(tmp_path, f"{LABELS}i0,v,/m/b,1\n{row}\n", "labels.csv")
    with pytest.raises(InputError, match=f"labels.csv:{message}"):
        read_image_labels(path, CLASSES, ImageIndex())


def test_lists_of_classes(tmp_path: Path) -> None:
    found = read_classes(write(tmp_path, '/m/a,"Apple, red"\n/m/b,Bear\n'))
    assert (tuple(found), found.names) == (("/m/a", "/m/b"), ("Apple, red", "Bear"))
    assert found.label_of == {b"/m/a": 1, b"/m/b": 2}
    found = read_classes(write(tmp_path, "/m/a,Apple,2\n/m/b,Bear,1\n"))
    assert (tuple(found), found.names) == (("/m/b", "/m/a"), ("Bear", "Apple"))
    found = read_classes(write(tmp_path, "LabelName,DisplayName\n/m/a,Apple\n"))
    assert tuple(found) == ("/m/a",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "file is empty"),
        ("/m/a\n", ":1: line is not identifier,name"),
        ("/m/a,A\n,B\n", ":2: line is not identifier,name"),
        ("/m/a,A\n/m/a,B\n", ":2: class is there twice: /m/a"),
        ("/m/a,A,1\n/m/b,B,3\n", "labels are not 1..2"),
        ("/m/a,A,0\n/m/b,B,1\n", "labels are not 1..2"),
        ("/m/a,A,x\n", ":1: label is no whole number: x"),
    ],
)
def test_bad_lists_of_classes(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_classes(write(tmp_path, text, "classes.csv"))


def test_repeated_rows_equal_a_loop() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 6, 300), rng.integers(-5, 6, 300) / 4
    seen: set[Any] = set()
    wanted = []
    for row, key in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        wanted += [row] if key in seen else []
        seen.add(key)
    assert repeated_rows([first, second]).tolist() == wanted
    assert repeated_rows([np.array([0.0, -0.0])]).tolist() == [1]
    assert repeated_rows([np.zeros(0)]).size == 0


def test_the_index_of_images_follows_changes() -> None:
    names = np.array([b"b", b"b", b"a", b"b", b"c", b"c"])
    images = ImageIndex()
    assert images.rows(names).tolist() == [0, 0, 1, 0, 2, 2]
    fixed = ImageIndex(["c", "a"], grow=False)
    assert fixed.rows(names).tolist() == [-1, -1, 1, -1, 0, 0]
    assert fixed.rows(names[:0]).size == 0


def test_the_set_is_a_detection_set(tmp_path: Path) -> None:
    data = load_openimages(small_set(tmp_path, BOXES))
    assert isinstance(data, DetectionData)
    assert (len(data), len(data.images), len(data.objects), data.num_classes) == (2, 2, 2, 2)
