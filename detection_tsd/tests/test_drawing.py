"""Pictures of detections and shifts: what is drawn, where, and in which colour."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from detection_tsd.data.detection_data import Annotation, Detections
from detection_tsd.drawing import (
    DETECTION_SIGNS,
    FOUND,
    LOOKED,
    MOVED,
    SHIFT_SIGNS,
    TRUTH,
    draw_detections,
    draw_shifts,
    enlarged,
    gallery,
)
from detection_tsd.engine import Found
from detection_tsd.probe import Shifts

CLASSES = ("plus", "cross")
GROUND = (90, 60, 120)


def plain(height: int = 96, width: int = 96) -> np.ndarray:
    return np.full((height, width, 3), GROUND, np.uint8)


def detections(*rows: tuple[list[float], float, int]) -> Detections:
    box, score, label = zip(*rows, strict=True) if rows else ((), (), ())
    return Detections(
        torch.tensor(box).reshape(-1, 4), torch.tensor(score), torch.tensor(label).long()
    )


def truth(*boxes: list[float]) -> Annotation:
    return Annotation(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.ones(len(boxes), np.int64),
        np.array([[60, 60, 80, 80]], np.float32),
    )


def places(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """(N, 2) rows and columns of a colour."""
    return np.argwhere((picture == colour).all(axis=2))


def test_a_detection_is_framed_where_it_is() -> None:
    image = plain()
    found = detections(([20, 40, 60, 80], 0.9, 1), ([0, 0, 10, 10], 0.1, 2))
    picture = draw_detections(image, found, CLASSES)
    assert picture.shape == (384, 384, 3)
    assert np.array_equal(image, plain())  # a copy
    frame = places(picture[161:], FOUND)  # below the tag
    assert frame[:, 1].min() == pytest.approx(80, abs=2)
    assert frame[:, 1].max() == pytest.approx(240, abs=2)
    assert frame[:, 0].max() + 161 == pytest.approx(320, abs=2)
    assert not len(places(picture[:60, :60], FOUND))  # score too low
    middle = picture[200:300, 120:200].reshape(-1, 3)
    assert (middle == GROUND).all()


def test_the_truth_has_another_colour_and_dashes() -> None:
    alone = draw_detections(plain(), detections(), CLASSES, truth([20, 40, 60, 80]))
    edge = (alone[170:310, 79:82] == TRUTH).all(axis=2).any(axis=1)
    assert 0.3 < edge.mean() < 0.95  # with gaps
    assert not len(places(alone, FOUND))
    both = draw_detections(
        plain(), detections(([10, 10, 30, 30], 0.8, 2)), CLASSES, truth([40, 50, 80, 90])
    )
    assert len(places(both, FOUND)) > 200
    assert len(places(both, TRUTH)) > 200


def test_tags_do_not_cover_one_another() -> None:
    one = draw_detections(plain(), detections(([20, 40, 60, 80], 0.9, 1)), CLASSES)
    rows = [([20, 40, 60, 80], 0.9 - 0.1 * row, 1 + row % 2) for row in range(3)]
    three = draw_detections(plain(), detections(*rows), CLASSES)
    dark = [(picture.max(axis=2) < 40).sum() for picture in (one, three)]
    assert dark[1] - dark[0] > 2 * 700  # two more grounds of 18 x 50 pixels, less the letters


@pytest.mark.parametrize(("height", "width", "factor"), [(96, 96, 4), (40, 20, 10), (600, 500, 1)])
def test_small_images_grow_by_a_whole_factor(height: int, width: int, factor: int) -> None:
    canvas, found = enlarged(plain(height, width))
    assert found == factor
    assert canvas.shape == (height * factor, width * factor, 3)


def test_masks_are_tinted() -> None:
    from pycocotools import mask

    inside = np.zeros((96, 96), np.uint8, order="F")
    inside[50:70, 30:50] = 1
    one = np.array([[30, 50, 50, 70]], np.float32), np.array([0.9]), np.array([1])
    found = Found(0, (96, 96), *one, masks=[mask.encode(inside)])
    picture = draw_detections(plain(), found, CLASSES)
    assert picture[240, 160].tolist() != list(GROUND)
    assert picture[340, 340].tolist() == list(GROUND)


def test_odd_detections_are_drawn() -> None:
    """Nothing, a box outside of the image, one without width, one wider than the image."""
    assert np.array_equal(draw_detections(plain(), detections(), CLASSES), enlarged(plain())[0])
    odd = detections(
        ([-50, -50, -10, -10], 0.9, 1), ([5, 5, 5, 5], 0.9, 1), ([-1e9, 5, 1e9, 50], 0.9, 2)
    )
    assert draw_detections(plain(), odd, CLASSES).shape == (384, 384, 3)
    assert draw_detections(plain(3, 3), odd, CLASSES).shape == (384, 384, 3)


def shift_of(way: tuple[float, float]) -> Shifts:
    roi = np.array([[30, 40, 60, 70]], np.float32)
    shifted = roi + np.tile(way, 2).astype(np.float32)
    grid = np.stack(np.meshgrid(np.linspace(32, 58, 7), np.linspace(42, 68, 7)), axis=-1)
    return Shifts(
        roi, shifted, grid.reshape(1, 49, 2), np.array([[36, 46, 66, 76]], np.float32), np.ones(1)
    )


def test_a_shift_shows_both_boxes_the_truth_and_the_bins() -> None:
    picture = draw_shifts(plain(), shift_of((6, 6)), 0)
    for colour in (FOUND, MOVED, TRUTH, LOOKED):
        assert len(places(picture, colour)) > 100, colour
    away = places(picture, MOVED).min(axis=0) - places(picture, FOUND).min(axis=0)
    factor = round(384 / 52)  # 36 pixels of boxes and a margin of 8 on both sides
    assert away == pytest.approx([6 * factor] * 2, abs=4)


def test_an_arrow_leads_from_centre_to_centre() -> None:
    still, gone = (draw_shifts(plain(), shift_of(way), 0) for way in ((0, 0), (12, 0)))
    # Factor 7; the corners of the windows are (22, 32) and (22, 29), the centre of P is (45, 55).
    assert not len(places(still[141:181, 141:181], MOVED))
    shaft = places(gone[181:184, 165:240], MOVED)[:, 1]
    assert len(set(shaft)) > 60


def test_shifts_at_the_border_are_drawn() -> None:
    at_edge = shift_of((50, 40))
    picture = draw_shifts(plain(), at_edge, 0)
    assert (picture[-20:, -20:] > 200).any()  # beyond the image
    assert len(places(picture, MOVED)) > 100


@pytest.mark.parametrize("count", [1, 5])
def test_a_gallery_holds_all_pictures(count: int, tmp_path: Path) -> None:
    path = tmp_path / "made" / "gallery.png"
    red = np.zeros((60, 80, 3), np.uint8)
    red[..., 0] = 255
    captions = [f"picture {row} with a very long name" for row in range(count)]
    gallery([red] * count, path, captions, SHIFT_SIGNS, "title", columns=2)
    page = cv2.imread(str(path))[..., ::-1]
    assert len(places(page, (255, 0, 0))) == count * 60 * 80
    assert len(places(page[-36:], LOOKED)) > 10  # the legend
    gallery([red, plain(30, 200)], path, signs=DETECTION_SIGNS)
    page = cv2.imread(str(path))[..., ::-1]
    assert len(places(page, (255, 0, 0))) == 60 * 80
    assert len(places(page, GROUND)) == 30 * 200


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"image is float32 \(4, 4, 3\)"):
        draw_detections(np.zeros((4, 4, 3), np.float32), detections(), CLASSES)
    with pytest.raises(ValueError, match=r"image is uint8 \(4, 4\)"):
        draw_shifts(np.zeros((4, 4), np.uint8), shift_of((0, 0)), 0)
    for label in (0, 3):
        with pytest.raises(ValueError, match=f"label={label} is not in 1..2"):
            draw_detections(plain(), detections(([1, 1, 9, 9], 0.9, label)), CLASSES)
    with pytest.raises(ValueError, match="row=1, but there are 1"):
        draw_shifts(plain(), shift_of((0, 0)), 1)
    with pytest.raises(ValueError, match="0 pictures"):
        gallery([], tmp_path / "none.png")
    with pytest.raises(ValueError, match="1 captions for 2 pictures"):
        gallery([plain(), plain()], tmp_path / "none.png", ["one"])
    assert list(tmp_path.iterdir()) == []
