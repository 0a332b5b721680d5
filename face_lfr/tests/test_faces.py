"""The renderer of faces: a function of its arguments in which every number matters."""

from dataclasses import fields, replace

import cv2
import numpy as np
import pytest

from face_lfr.data.faces import CENTRE, SIDE, Identity, Pose, blend, contact_sheet, ellipse, render


def neutral(**changes: object) -> Pose:
    """A frontal face in even light before a grey ground."""
    pose = Pose.draw(np.random.default_rng(0), strength=0.0)
    ground = np.full((3, 3, 3), 128, np.uint8)
    return replace(pose, ground_33=ground, clothes=np.full(3, 90.0), **changes)


def average(**changes: float) -> Identity:
    return Identity(**{field.name: 0.45 for field in fields(Identity)} | changes)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(float) - b.astype(float)).mean())


def test_an_image_is_a_function_of_its_arguments() -> None:
    face, pose = (c.draw(np.random.default_rng(5)) for c in (Identity, Pose))
    image = render(face, pose)
    assert image.shape == (SIDE, SIDE, 3)
    assert image.dtype == np.uint8
    assert np.array_equal(image, render(face, pose))
    assert not np.array_equal(image, render(Identity.draw(np.random.default_rng(6)), pose))


@pytest.mark.parametrize("name", [field.name for field in fields(Identity)])
def test_every_field_of_a_person_shows(name: str) -> None:
    low, high = (render(average(**{name: value}), neutral()) for value in (0.05, 0.95))
    changed = np.abs(low.astype(int) - high).max(axis=2) > 8
    assert changed.sum() >= 8, f"{name} changes {changed.sum()} pixels"


def test_without_strength_only_ground_and_clothes_change() -> None:
    poses = [Pose.draw(np.random.default_rng(seed), strength=0.0) for seed in (1, 2)]
    first, second = (render(average(), pose) for pose in poses)
    assert np.array_equal(first[40:80, 30:82], second[40:80, 30:82])
    assert not np.array_equal(first[:8, :8], second[:8, :8])


def test_rotation_and_scale_are_a_similarity_about_the_origin() -> None:
    pose = neutral(angle=0.2, scale=1.06, shift=(3.0, -2.0))
    matrix = cv2.getRotationMatrix2D(CENTRE, -np.rad2deg(0.2), 1.06)
    matrix[:, 2] += (3.0, -2.0)
    wanted = cv2.warpAffine(
        render(average(), neutral()), matrix, (SIDE, SIDE), borderMode=cv2.BORDER_REPLICATE
    )
    got = render(average(), pose)
    face = np.s_[30:95, 25:90]
    # Edges are sharp in one and interpolated in the other.
    assert difference(got[face], wanted[face]) < 4
    assert difference(render(average(), neutral())[face], wanted[face]) > 10


def test_the_light_is_a_gain_a_gradient_and_an_offset() -> None:
    base = render(average(), neutral()).astype(float)
    got = render(average(), neutral(gain=0.8, offset=-10.0, gradient=0.3))
    column_W1 = 1 + 0.3 * np.linspace(-1, 1, SIDE)[:, None]
    wanted = np.clip(0.8 * column_W1 * base - 10, 0, 255)
    assert np.abs(got - wanted).max() <= 1.01


def test_a_turn_moves_the_nose_and_not_the_ears() -> None:
    straight, turned = (render(average(), neutral(turn=turn)).astype(int) for turn in (0, 8))
    shifted = difference(straight[60:78, 48:64], turned[60:78, 56:72])
    assert shifted < 0.7 * difference(straight[60:78, 48:64], turned[60:78, 48:64])


def test_a_blink_hides_the_white_of_the_eyes() -> None:
    wide, shut = (render(average(skin=0.3), neutral(blink=b)) for b in (0.0, 0.9))
    white = [(image[40:62, 30:82].min(axis=2) > 200).sum() for image in (wide, shut)]
    assert white[0] > 20
    assert white[1] < 0.3 * white[0]


def test_people_can_be_told_apart() -> None:
    """Nearest mean image of 12 people, 8 images each for the mean and 4 to recognise."""
    rng = np.random.default_rng(3)
    faces = [Identity.draw(rng) for _ in range(12)]
    rows = [[render(f, Pose.draw(rng, strength=0.5)) for _ in range(12)] for f in faces]
    area = cv2.INTER_AREA
    small = [[cv2.resize(image, (28, 28), interpolation=area) for image in row] for row in rows]
    flat = np.array(small).reshape(12, 12, -1).astype(float)
    flat -= flat.mean(axis=2, keepdims=True)
    means = flat[:, :8].mean(axis=1)
    distance = ((flat[:, 8:, None] - means) ** 2).sum(axis=3)
    hits = distance.argmin(axis=2) == np.arange(12)[:, None]
    assert hits.mean() > 0.6  # chance is 1/12


def test_helpers() -> None:
    assert np.allclose(blend(np.array([[0.0] * 3, [10.0] * 3, [40.0] * 3]), 0.75), 25)
    assert np.allclose(blend(np.array([[0.0] * 3, [10.0] * 3]), 1.0), 10)
    points = ellipse(3, 4, 5, 2, np.pi / 2)
    assert np.allclose(points.max(axis=0), (5, 9))
    assert np.allclose(points.min(axis=0), (1, -1))
    assert contact_sheet([[np.zeros((2, 3, 3))] * 4] * 5).shape == (10, 12, 3)
