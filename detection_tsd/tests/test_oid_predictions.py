"""Detections in files: what is read, what is refused, and what is mended and counted."""

from pathlib import Path

import numpy as np
import pytest

from common.log import InputError
from detection_tsd.data.oid_files import Classes
from detection_tsd.data.oid_predictions import Predictions, read_predictions, write_predictions

IDS = ("/m/a", "/m/b", "/m/c")
HEAD = "ImageID,LabelName,Score,XMin,XMax,YMin,YMax\n"
GOOD = "img0,/m/a,0.5,0.1,0.2,0.1,0.2\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "file is empty"),
        ("\n" + GOOD, "1: line is empty"),
        (HEAD.replace("Score,", "") + GOOD, "1: column Score is missing"),
        (HEAD.replace("YMax", "Score") + GOOD, "1: column YMax is missing"),
        (HEAD[:-1] + ",Score\n" + GOOD, "1: column is there twice: Score"),
        (HEAD + GOOD + "img0,/m/z,0.5,0.1,0.2,0.1,0.2\n", "3: class is not in the list.*: /m/z"),
        (HEAD + "img9,/m/a,0.5,0.1,0.2,0.1,0.2\n", "2: image has no annotation.*: img9"),
        (HEAD + "img0,/m/a,nan,0.1,0.2,0.1,0.2\n", "2: Score is not finite: nan"),
        (HEAD + "img0,/m/a,-0.5,0.1,0.2,0.1,0.2\n", "2: Score is below 0: -0.5"),
        (HEAD + "img0,/m/a,x,0.1,0.2,0.1,0.2\n", "2: Score is no finite number: x"),
        (HEAD + "img0,/m/a,,0.1,0.2,0.1,0.2\n", "2: Score is no finite number: ''"),
        (HEAD + "img0,/m/a,0.5,0.1,0.2,0.1,inf\n", "2: YMax is not finite: inf"),
        (HEAD + "img0,/m/a,0.5,0.1,20.2,0.1,0.2\n", "2: XMax is outside of .0, 1.: 20.2"),
        (HEAD + "img0,/m/a,0.5,0.3,0.2,0.1,0.2\n", "2: XMin is above XMax: 0.3"),
        (HEAD + GOOD + "img0,/m/a,0.5\n" + GOOD, "3: line has 3 fields in the place of 7"),
        (HEAD + GOOD + "img0,/m/a,0.5,0,1,0,1,7\n", "3: line has 8 fields in the place of 7"),
        (HEAD + GOOD + "\n" + GOOD, "3: line is empty"),
        (HEAD + GOOD + GOOD, "3: detection is there twice"),
        (HEAD + ",/m/a,0.5,0.1,0.2,0.1,0.2\n", "2: ImageID is empty"),
        (HEAD + "i" * 70 + ",/m/a,0.5,0.1,0.2,0.1,0.2\n", "2: ImageID is empty, longer than 64"),
        (HEAD + "img\u00e9,/m/a,0.5,0.1,0.2,0.1,0.2\n", "2: ImageID is.* not ASCII"),
        ("img0 0.1 0.1 0.2 0.2 0.5 4\n", "1: label is no whole number in 1..3: 4"),
        ("img0 0.1 0.1 0.2 0.2 0.5 1.5\n", "1: label is no whole number in 1..3: 1.5"),
        ("img0 0.1 0.1 0.2 0.2 0.5 1\nimg0 0.1 0.1\n", "2: line has 3 fields in the place of 7"),
        ("img0 0.1 0.1 0.2 0.2 0.5 1\n" * 2, "2: detection is there twice"),
    ],
)
def test_check_14_bad_detections_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "dets.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        read_predictions(path, Classes(IDS), ["img0", "img1"])
    assert str(caught.value).startswith(str(path))


def test_small_overshoot_is_clipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "dets.csv"
    path.write_text(HEAD + GOOD + "img1,/m/b,0.25,-0.001,0.5,0.5,1.000001\n\n")
    found = read_predictions(path, Classes(IDS), ["img0", "img1"])
    assert found.counts["coordinates clipped"] == 1
    assert found.box_D4[1].tolist() == [0, 0.5, 0.5, 1]
    assert (found.image_D.tolist(), found.label_D.tolist()) == ([0, 1], [1, 2])


def test_unknown_images_and_duplicates_can_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "dets.csv"
    path.write_text(
        HEAD + GOOD + GOOD.replace("img0", "img8") + GOOD.replace("img0", "img9") + GOOD
    )
    found = read_predictions(path, Classes(IDS), ["img0"], "drop", "drop")
    assert len(found.score_D) == 1
    assert found.counts["of unknown images"] == 2
    assert found.counts["detection repeated, dropped"] == 1
    assert len(read_predictions(path, Classes(IDS), ["img0"], "drop", "keep").score_D) == 2
    for options in (("some", "drop"), ("drop", "some")):
        with pytest.raises(InputError, match="accepted"):
            read_predictions(path, Classes(IDS), ["img0"], *options)  # type: ignore[arg-type]


def test_a_header_without_rows_is_no_detection(tmp_path: Path) -> None:
    path = tmp_path / "dets.csv"
    path.write_text(HEAD)
    assert len(read_predictions(path, Classes(IDS), ["img0"]).score_D) == 0


def test_written_detections_come_back_to_the_bit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    box_D4 = np.concatenate([rng.random((50, 2)) / 2, 0.5 + rng.random((50, 2)) / 2], axis=1)
    found = Predictions(
        rng.integers(0, 2, 50).astype(np.int32), rng.integers(1, 4, 50).astype(np.int16),
        rng.random(50), box_D4, {},
    )  # fmt: skip
    write_predictions(tmp_path / "out" / "dets.csv", found, IDS, ["img0", "img1"])
    again = read_predictions(tmp_path / "out" / "dets.csv", Classes(IDS), ["img0", "img1"])
    for wanted, got in zip(found[:4], again[:4], strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["dets.csv"]
