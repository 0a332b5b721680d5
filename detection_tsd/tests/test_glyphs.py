"""The glyph scenes: each clause of the law that they are drawn by, and that options stay apart."""

import hashlib

import cv2
import numpy as np
import pytest

from common.log import InputError
from detection_tsd.data.glyphs import (
    ELSEWHERE,
    GLYPHS,
    PER_OBJECT,
    TRAIN,
    VAL,
    Law,
    Marks,
    Scene,
    background,
    body_strength,
    cubic_weights,
    draw_scene,
    first_free,
    glyph,
    glyph_marks,
    paint_mark,
    place_boxes,
)

GOLDEN = "1904888425f128dc50f49e8e79a87ef2b596606d35df6be2f21cae05387e96f0"
MARKS = glyph_marks()
BLANK = Marks(MARKS.classes, MARKS.class_ids, lambda rng, label, side: np.zeros((side, side)))


def scenes(count: int, law: Law | None = None, split: int = TRAIN) -> list[Scene]:
    return [draw_scene(MARKS, law or Law(), 0, split, number) for number in range(count)]


@pytest.fixture(scope="module")
def many() -> list[Scene]:
    return scenes(300)


def test_the_arrays_are_what_they_were() -> None:
    digest = hashlib.sha256()
    for split in (TRAIN, VAL):
        for scene in scenes(6, split=split):
            for array in scene:
                digest.update(np.ascontiguousarray(array).tobytes())
    assert digest.hexdigest() == GOLDEN


def test_objects_have_the_sizes_of_the_law_and_do_not_meet(many: list[Scene]) -> None:
    counts = np.bincount([len(scene.box_G4) for scene in many], minlength=4)
    assert counts[0] == 0
    assert len(counts) == 4
    assert counts[1:].min() > 40
    box_G4 = np.concatenate([scene.box_G4 for scene in many])
    size_G2 = box_G4[:, 2:] - box_G4[:, :2]
    assert 22 <= size_G2.min() < 23
    assert 55 < size_G2.max() <= 56.001
    assert box_G4.min() >= 0
    assert box_G4.max() <= 96
    for scene in many:
        for row, box in enumerate(scene.box_G4):
            assert first_free(box[None], np.delete(scene.box_G4, row, axis=0)) is not None
    labels = np.bincount(np.concatenate([scene.label_G for scene in many]), minlength=7)
    assert labels[0] == 0
    assert labels[1:].min() > 60
    assert 0.4 < np.concatenate([scene.ellipse_G for scene in many]).mean() < 0.6


def test_the_glyph_lies_in_the_inner_part_of_its_object(many: list[Scene]) -> None:
    for scene in many:
        size_G2 = scene.box_G4[:, 2:] - scene.box_G4[:, :2]
        centre_G2 = (scene.box_G4[:, :2] + scene.box_G4[:, 2:]) / 2
        assert (np.abs(scene.mark_G2 - centre_G2) <= 0.3 * size_G2 + 0.51).all()
    away = [
        (scene.mark_G2 - (scene.box_G4[:, :2] + scene.box_G4[:, 2:]) / 2)
        / (scene.box_G4[:, 2:] - scene.box_G4[:, :2])
        for scene in many
    ]
    assert np.abs(np.concatenate(away)).mean() == pytest.approx(0.15, abs=0.02)  # uniform in 0.3


def test_the_class_is_in_the_glyph_and_nowhere_else() -> None:
    elsewhere = 0
    for number in range(40):
        scene, blank = (draw_scene(marks, Law(), 0, TRAIN, number) for marks in (MARKS, BLANK))
        assert np.array_equal(scene.box_G4, blank.box_G4)
        changed_HW = (scene.image_HW3 != blank.image_HW3).any(axis=2)
        for box, mark in zip(scene.box_G4, scene.mark_G2, strict=True):
            x1, y1 = np.floor(mark - 5.5).astype(int)
            assert changed_HW[max(y1, 0) : y1 + 12, max(x1, 0) : x1 + 12].any()
            changed_HW[max(y1, 0) : y1 + 12, max(x1, 0) : x1 + 12] = False
            left, top = np.ceil(box[:2]).astype(int)
            right, bottom = np.floor(box[2:]).astype(int)
            assert not changed_HW[top:bottom, left:right].any()
        elsewhere += changed_HW.any()
    assert 15 < elsewhere < 40  # three of four images have distractors


def test_a_mark_is_added_with_the_contrast_of_the_law() -> None:
    signs = set()
    for level in (0.05, 0.5, 0.95):
        for seed in range(8):
            image = np.full((20, 20, 3), level)
            paint_mark(image, (4, 5), glyph(5, 10), np.random.default_rng(seed))
            change = image - level
            assert np.allclose(np.abs(change).max(), 0.45)
            assert not change[:5].any()
            assert not change[:, 14:].any()
            assert image.min() >= 0
            assert image.max() <= 1
            signs.add((level, float(np.sign(change.sum()))))
    assert signs == {(0.05, 1.0), (0.5, 1.0), (0.5, -1.0), (0.95, -1.0)}


@pytest.mark.parametrize("ellipse", [False, True])
def test_edges_are_sigmoids_of_the_distance(ellipse: bool) -> None:
    box = np.array([20.5, 30.5, 60.5, 54.5])
    strength_HW = body_strength(96, box, ellipse)
    for pixel in range(60):  # along the row and the column through the centre
        for place, low, value in (
            (pixel + 0.5, box[0], strength_HW[42, pixel]),
            (pixel + 0.5, box[1], strength_HW[pixel, 40]),
        ):
            if abs(place - low) < 6:
                expected = 1 / (1 + np.exp(-1.5 * (place - low)))
                assert value == pytest.approx(expected, abs=0.02)
    inside = strength_HW.sum()
    area = 40 * 24 * (np.pi / 4 if ellipse else 1)
    assert inside == pytest.approx(area, rel=0.03)


def test_the_background_is_smooth_and_in_the_range_of_its_colours() -> None:
    image = background(np.random.default_rng(0), 96)
    assert image.shape == (96, 96, 3)
    assert np.abs(np.diff(image, axis=0)).max() < 0.06
    assert -0.1 < image.min() < 0.25
    assert 0.75 < image.max() < 1.1


@pytest.mark.parametrize(("size", "knots"), [(96, 6), (10, 8), (9, 8), (131, 6)])
def test_the_resampling_is_opencvs_bicubic(size: int, knots: int) -> None:
    grid = np.random.default_rng(size).random((knots, knots))
    weight = cubic_weights(size, knots)
    expected = cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC)
    assert np.allclose(weight @ grid @ weight.T, expected, atol=1e-5)
    assert np.allclose(weight.sum(axis=1), 1)


def test_proposals_follow_their_law(many: list[Scene]) -> None:
    shifts, errors = [], []
    for scene in many:
        objects = len(scene.box_G4)
        assert scene.proposal_M4.shape == (PER_OBJECT * objects + ELSEWHERE, 4)
        assert scene.proposal_M4.dtype == np.float32
        assert scene.proposal_M4.min() >= 0
        assert scene.proposal_M4.max() <= 96
        near_M4, far_M4 = np.split(scene.proposal_M4, [PER_OBJECT * objects])
        size_M2 = far_M4[:, 2:] - far_M4[:, :2]
        assert 21.9 < size_M2.min()
        assert size_M2.max() < 56.1
        truth_M4 = scene.box_G4.repeat(PER_OBJECT, axis=0)
        extent_M2 = truth_M4[:, 2:] - truth_M4[:, :2]
        shift_M4 = (near_M4 - truth_M4) / np.tile(extent_M2, 2)
        cut_M4 = (near_M4 == 0) | (near_M4 == 96)
        shifts.append(shift_M4[~cut_M4])
        positive_M = overlap(near_M4, truth_M4) >= 0.5
        way_M2 = (truth_M4[:, :2] + truth_M4[:, 2:] - near_M4[:, :2] - near_M4[:, 2:]) / 2
        errors.append(np.abs(way_M2 / (near_M4[:, 2:] - near_M4[:, :2]))[positive_M])
    shift = np.concatenate(shifts)
    assert np.abs(shift).max() <= 0.3001
    assert shift.std() == pytest.approx(0.3 / 3**0.5, rel=0.05)  # uniform
    assert abs(shift.mean()) < 0.01
    # What is left for the shift of TSD to repair.
    assert np.concatenate(errors).mean() == pytest.approx(0.094, abs=0.004)


def overlap(a_M4: np.ndarray, b_M4: np.ndarray) -> np.ndarray:
    low, high = np.maximum(a_M4[:, :2], b_M4[:, :2]), np.minimum(a_M4[:, 2:], b_M4[:, 2:])
    common_M = np.clip(high - low, 0, None).prod(axis=1)
    areas = [(box[:, 2:] - box[:, :2]).prod(axis=1) for box in (a_M4, b_M4)]
    return common_M / (areas[0] + areas[1] - common_M)


def test_centring_moves_the_glyphs_and_nothing_else() -> None:
    for number in range(30):
        usual, centred = (
            draw_scene(MARKS, Law(centred=c), 0, TRAIN, number) for c in (False, True)
        )
        for name in ("box_G4", "label_G", "ellipse_G", "proposal_M4"):
            assert np.array_equal(getattr(usual, name), getattr(centred, name)), name
        middle_G2 = (centred.box_G4[:, :2] + centred.box_G4[:, 2:]) / 2
        assert np.abs(centred.mark_G2 - middle_G2).max() <= 0.501
        outside_HW = np.ones((96, 96), bool)
        for x1, y1, x2, y2 in centred.box_G4:
            outside_HW[int(y1) : int(y2) + 2, int(x1) : int(x2) + 2] = False
        assert np.array_equal(usual.image_HW3[outside_HW], centred.image_HW3[outside_HW])


def test_without_jitter_proposals_are_the_boxes() -> None:
    for number in range(10):
        usual, exact = (draw_scene(MARKS, Law(jitter=j), 0, TRAIN, number) for j in (0.3, 0.0))
        assert np.array_equal(usual.image_HW3, exact.image_HW3)
        repeated_M4 = exact.box_G4.repeat(PER_OBJECT, axis=0)
        assert np.array_equal(exact.proposal_M4[: len(repeated_M4)], repeated_M4)
        assert np.array_equal(exact.proposal_M4[-ELSEWHERE:], usual.proposal_M4[-ELSEWHERE:])


def test_splits_and_seeds_share_no_scene() -> None:
    images = [
        draw_scene(MARKS, Law(), seed, split, number).image_HW3.tobytes()
        for seed in (0, 1) for split in (TRAIN, VAL) for number in (0, 1)
    ]  # fmt: skip
    assert len(set(images)) == 8


@pytest.mark.parametrize("side", [9, 10, 11])
def test_glyphs_are_distinct_at_every_size(side: int) -> None:
    shapes = [glyph(label, side) for label in range(1, 1 + len(GLYPHS))]
    for row, shape in enumerate(shapes):
        assert shape.shape == (side, side)
        assert shape.min() >= 0
        assert shape.max() == 1
        assert 0.2 < shape.mean() < 0.6
        for other in shapes[:row]:
            assert np.abs(shape - other).mean() > 0.1
    assert np.array_equal(shapes[0], shapes[0].T)  # plus
    assert np.array_equal(shapes[1], shapes[1][::-1])  # cross
    assert shapes[2][0].min() == 1  # bar of the T
    assert shapes[3][:, 0].min() == 1  # stem of the L
    assert shapes[4][side // 2, side // 2] == 0  # hole of the ring
    assert shapes[5][:, side // 2].max() == 0  # between the bars


def test_no_room_gives_fewer_boxes() -> None:
    rng = np.random.default_rng(0)
    full = np.array([[0.0, 0, 96, 96]])
    assert place_boxes(rng, 3, (22.0, 56.0), 96, full).shape == (0, 4)
    assert len(place_boxes(rng, 50, (40.0, 56.0), 96, np.zeros((0, 4)))) <= 4


def test_other_sides_are_drawn() -> None:
    scene = draw_scene(MARKS, Law(side=64), 0, TRAIN, 0)
    assert scene.image_HW3.shape == (64, 64, 3)
    assert scene.box_G4.max() <= 64
    assert draw_scene(MARKS, Law(side=160), 0, TRAIN, 0).image_HW3.shape == (160, 160, 3)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(InputError, match="side"):
        Law(side=40)
    for jitter in (-0.1, 0.5):
        with pytest.raises(InputError, match="jitter"):
            Law(jitter=jitter)
    for label in (0, 7):
        with pytest.raises(ValueError, match=f"label={label}"):
            glyph(label, 9)
