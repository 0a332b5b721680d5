"""Degradation: what level means, and that nothing but (image, level, generator) matters."""

from itertools import pairwise

import numpy as np
import pytest

from face_lfr.data import degrade as module
from face_lfr.data.degrade import degrade


@pytest.fixture
def face() -> np.ndarray:
    """Smooth blobs with edges, so that every effect has something to destroy."""
    y, x = np.mgrid[0:96, 0:80].astype(np.float32)
    bands = 110 + 70 * np.sin(x / 4) * np.cos(y / 5) + 50 * (x > y)
    shift = [0, 15, -15]
    return np.stack([np.clip(bands + s, 0, 255) for s in shift], axis=-1).astype(np.uint8)


def error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.mean((a.astype(np.float64) - b) ** 2))


def test_level_zero_is_a_copy(face: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    got = degrade(face, 0.0, rng)
    assert np.array_equal(got, face)
    assert not np.shares_memory(got, face)
    assert rng.random() == np.random.default_rng(0).random()


@pytest.mark.parametrize("level", [1e-6, 0.3, 1.0])
def test_shape_type_and_input_stay(face: np.ndarray, level: float) -> None:
    before = face.copy()
    got = degrade(face, level, np.random.default_rng(1))
    assert got.dtype == np.uint8
    assert got.shape == face.shape
    assert np.array_equal(face, before)


def test_same_generator_same_image_other_generator_another(face: np.ndarray) -> None:
    first, again, other = (degrade(face, 0.5, np.random.default_rng(s)) for s in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_error_grows_with_the_level(face: np.ndarray) -> None:
    levels = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
    mean = [
        np.mean([error(degrade(face, q, np.random.default_rng(s)), face) for s in range(8)])
        for q in levels
    ]
    assert all(a < b for a, b in pairwise(mean)), mean


def test_generator_advances_by_the_same_amount_at_every_level(face: np.ndarray) -> None:
    after = []
    for level in (0.01, 0.5, 1.0):
        rng = np.random.default_rng(5)
        degrade(face, level, rng)
        after.append(rng.random())
    assert len(set(after)) == 1


@pytest.mark.parametrize("name", ["_hide", "_blur", "_shrink", "_noise", "_encode"])
def test_every_effect_alone_grows_with_its_strength(face: np.ndarray, name: str) -> None:
    effect = getattr(module, name)

    def run(strength: float) -> float:
        more = [np.random.default_rng(2)] if name in ("_hide", "_noise") else []
        return error(effect(face, strength, *more), face)

    values = [run(s) for s in (0.05, 0.5, 1.0)]
    assert values[0] < values[1] < values[2]


def test_noise_has_its_standard_deviation() -> None:
    grey_HWC = np.full((128, 128, 3), 127, np.uint8)
    got = module._noise(grey_HWC, 0.5, np.random.default_rng(0)).astype(np.float64)
    assert got.std() == pytest.approx(module.NOISE / 2, rel=0.02)
    assert got.mean() == pytest.approx(127, abs=0.3)


def test_hidden_square_has_its_side_and_lies_inside() -> None:
    black_HWC = np.zeros((50, 70, 3), np.uint8)
    for seed in range(20):
        got = module._hide(black_HWC, 1.0, np.random.default_rng(seed))
        assert (got.any(axis=-1)).sum() == round(module.HIDDEN * 50) ** 2


def test_small_and_flat_images_work() -> None:
    for shape in ((1, 1, 3), (2, 9, 3)):
        flat = np.full(shape, 200, np.uint8)
        assert degrade(flat, 1.0, np.random.default_rng(0)).shape == shape


@pytest.mark.parametrize("level", [-0.1, 1.1, float("nan")])
def test_level_out_of_range_is_refused(face: np.ndarray, level: float) -> None:
    with pytest.raises(ValueError, match=r"level=.* must be in \[0, 1\]"):
        degrade(face, level, np.random.default_rng(0))


@pytest.mark.parametrize("wrong", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)])
def test_image_of_another_kind_is_refused(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match="image is"):
        degrade(wrong, 0.5, np.random.default_rng(0))
