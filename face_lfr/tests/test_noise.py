"""Label noise: how much, which images, and of what distribution."""

from pathlib import Path

import numpy as np
import pytest

from face_lfr.data.face_data import FaceData, check_labels, count_gaps
from face_lfr.data.folder import FileImages
from face_lfr.data.noise import noisy_labels, with_label_noise

LABELS = np.repeat(np.arange(20), 500)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.6, 1.0])
def test_amount(fraction: float) -> None:
    """Of the drawn classes one in C is the old one."""
    kept = LABELS.copy()
    noisy = noisy_labels(LABELS, 20, fraction, seed=1)
    np.testing.assert_array_equal(LABELS, kept)
    expected = fraction * (1 - 1 / 20)
    assert abs((noisy != LABELS).mean() - expected) <= 4 * np.sqrt(0.05 * 0.95 / len(LABELS))
    assert noisy.dtype == np.int64


def test_the_number_of_drawn_images_is_exact() -> None:
    """With classes that nobody had, every drawn image is seen."""
    never = np.full(1001, 10**9)
    for fraction, count in ((0.3, 300), (0.0004, 0), (0.0006, 1), (1.0, 1001)):
        assert (noisy_labels(never, 5, fraction) != never).sum() == count


def test_drawn_classes_are_uniform() -> None:
    counts = np.bincount(noisy_labels(np.full(40_000, 3), 8, 1.0, seed=2), minlength=8)
    assert ((counts - 5000) ** 2 / 5000).sum() < 24.3  # chi square, 7 degrees, p = 0.001


def test_seed() -> None:
    first = noisy_labels(LABELS, 20, 0.3, seed=4)
    np.testing.assert_array_equal(first, noisy_labels(LABELS, 20, 0.3, seed=4))
    assert (first != noisy_labels(LABELS, 20, 0.3, seed=5)).mean() > 0.3


def test_a_set_keeps_its_images() -> None:
    images = FileImages(Path("x"), ["a"] * len(LABELS), LABELS)
    data = FaceData("set", Path("x"), 20, images, LABELS, {"other": 3})
    noisy = with_label_noise(data, 0.5, 1)
    np.testing.assert_array_equal(noisy.labels_N, noisy_labels(LABELS, 20, 0.5, 1))
    assert (noisy.images, noisy.num_classes, noisy.skipped) == (images, 20, {"other": 3})
    assert data.labels_N is LABELS
    assert with_label_noise(data, 0.0) is data


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_fractions_are_checked(fraction: float) -> None:
    with pytest.raises(ValueError, match="of noisy labels must be in"):
        noisy_labels(LABELS, 20, fraction)


def test_seeds_are_checked() -> None:
    with pytest.raises(ValueError, match="seed=-1"):
        noisy_labels(LABELS, 20, 0.5, -1)


def test_labels_and_gaps() -> None:
    labels = np.array([0, 1, 3])
    check_labels(labels, 4, "four", str)
    assert count_gaps(labels, 4, "here", allow_gaps=True) == {"classes without an image": 1}
    assert count_gaps(np.array([1, 0]), 2, "here", allow_gaps=False) == {}
    with pytest.raises(ValueError, match=r"row 2: label is not in \[0, 3\), .* three: 3"):
        check_labels(labels, 3, "three", lambda row: f"row {row}")
    with pytest.raises(ValueError, match=r"here: class without an image .*: 2"):
        count_gaps(labels, 4, "here", allow_gaps=False)
