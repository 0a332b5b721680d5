"""Alignment: known transforms, an SVD of the same problem, mirrors, and what has no answer."""

import cv2
import numpy as np
import pytest

from face_lfr.data.align import align, five_points, similarity, template
from face_lfr.data.replicas import face


def transform(scale: float, turn: float, shift: tuple[float, float]) -> np.ndarray:
    c, s = scale * np.cos(turn), scale * np.sin(turn)
    return np.array([[c, -s, shift[0]], [s, c, shift[1]]])


def apply(matrix: np.ndarray, point: np.ndarray) -> np.ndarray:
    return point @ matrix[:, :2].T + matrix[:, 2]


def umeyama(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Equations 34 to 43 of Umeyama (1991), point by point."""
    count = len(source)
    centre, aim = sum(source) / count, sum(target) / count
    spread = sum(float((point - centre) @ (point - centre)) for point in source) / count
    cross = np.zeros((2, 2))
    for s, t in zip(source, target, strict=True):
        cross += np.outer(t - aim, s - centre) / count
    left, values, right = np.linalg.svd(cross)
    sign = np.array([1.0, 1.0 if np.linalg.det(left) * np.linalg.det(right) > 0 else -1.0])
    turn = left @ np.diag(sign) @ right
    scale = float(values @ sign) / spread
    return np.column_stack([scale * turn, aim - scale * turn @ centre])


@pytest.mark.parametrize("seed", range(20))
def test_check_13_a_known_similarity_is_recovered(seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrix = transform(
        rng.uniform(0.1, 8), rng.uniform(-np.pi, np.pi), tuple(rng.normal(0, 300, 2))
    )
    source = apply(cv2.invertAffineTransform(matrix), template())
    found = similarity(source, template())
    np.testing.assert_allclose(found, matrix, atol=1e-9, rtol=1e-9)
    assert np.abs(apply(found, source) - template()).max() < 1e-6
    rounded = similarity(five_points(source.astype(np.float32)), template())
    assert np.abs(apply(rounded, source) - template()).max() < 1e-3


@pytest.mark.parametrize("seed", range(20))
def test_check_13_equals_umeyama(seed: int) -> None:
    rng = np.random.default_rng(seed)
    source, target = rng.normal(0, 30, (2, 5, 2))
    np.testing.assert_allclose(similarity(source, target), umeyama(source, target), atol=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_check_13_mirrored_landmarks_are_not_reflected(seed: int) -> None:
    rng = np.random.default_rng(seed)
    source = template() + rng.normal(0, 4, (5, 2))
    source[:, 0] *= -1  # left and right exchanged
    found = similarity(source, template())
    assert np.linalg.det(found[:, :2]) > 0
    np.testing.assert_allclose(found, umeyama(source, template()), atol=1e-9)
    turn = found[:, :2]
    np.testing.assert_allclose(turn @ turn.T, np.linalg.det(turn) * np.eye(2), atol=1e-12)


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        (np.zeros((5, 2)), "on one line or in one place"),
        (np.full((5, 2), 31.7), "on one line or in one place"),
        (np.outer(np.arange(5.0), [3.0, -1.0]) + 1000, "on one line or in one place"),
        (np.float32(np.outer([0, 1, 2, 3, 5], [1 / 3, 1 / 7]) + 50), "on one line or in one place"),
        (np.full((5, 2), np.nan), "not finite"),
        (np.zeros((4, 2)), r"shape \(4, 2\); accepted: \(5, 2\) or \(68, 2\)"),
        (np.zeros(9), r"shape \(9,\)"),
    ],
)
def test_check_13_degenerate_points_raise(source: np.ndarray, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        align(face(0, 0), source)


def test_check_13_a_pure_mirror_image_has_no_answer() -> None:
    square = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    with pytest.raises(ValueError, match="no similarity to the template that is no reflection"):
        similarity(square * np.array([-1, 1]), square)
    with pytest.raises(ValueError, match=r"shapes \(4, 2\) and \(3, 2\)"):
        similarity(square, square[:3])


def test_a_profile_with_narrow_points_is_accepted() -> None:
    narrow = template() * np.array([0.02, 1])
    assert np.isfinite(similarity(narrow, template())).all()


def test_templates_of_other_sizes() -> None:
    base = template(112)
    assert base[0].tolist() == [38.2946, 51.6963]
    assert base[4].tolist() == [70.7299, 92.2041]
    np.testing.assert_allclose(template(224), 2 * base)
    np.testing.assert_allclose(template(100), base * 100 / 112)
    np.testing.assert_allclose(template(128), base + np.array([8, 0]))
    np.testing.assert_allclose(template(256), 2 * base + np.array([16, 0]))
    np.testing.assert_allclose(template(896), 8 * base)  # a multiple of both
    with pytest.raises(ValueError, match="size=0"):
        template(0)


def test_68_points_become_five() -> None:
    point = np.random.default_rng(0).uniform(0, 100, (68, 2))
    want = [
        (point[36] + point[39]) / 2, (point[42] + point[45]) / 2, point[30], point[48], point[54],
    ]  # fmt: skip
    np.testing.assert_allclose(five_points(point), want)
    np.testing.assert_allclose(five_points(point.ravel()), want)
    np.testing.assert_allclose(five_points(template().ravel()), template())


@pytest.mark.parametrize("size", [112, 56, 128, 224])
def test_an_image_comes_back_aligned(size: int) -> None:
    matrix = transform(1.4, 0.3, (60, 20))
    large = cv2.warpAffine(face(1, 0), matrix, (260, 240))
    found = align(large, apply(matrix, template()), size)
    assert found.shape == (size, size, 3)
    assert found.dtype == np.uint8
    want = cv2.warpAffine(face(1, 0), similarity(template(), template(size)), (size, size))
    inside = slice(size // 8, size - size // 8)
    gap = np.abs(found.astype(float) - want)[inside, inside]
    assert gap.mean() < 6  # noise of 6 grey levels was resampled twice
    wrong = align(large, apply(matrix, template()) + 6, size).astype(float)
    assert np.abs(wrong - want)[inside, inside].mean() > 1.3 * gap.mean()


def test_outside_the_image_is_black() -> None:
    found = align(np.full((112, 112, 3), 200, np.uint8), template() + np.array([40, 0]))
    assert not found[:, -30:].any()
    assert (found[:, :70] == 200).all()
