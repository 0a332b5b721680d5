"""Handwritten glyphs: real strokes, disjoint between the splits, legible at the size of a glyph."""

import sys

import numpy as np
import pytest

from common.log import InputError
from detection_tsd.data.digits import digit_marks, digit_pools, enlarge
from detection_tsd.data.glyphs import TRAIN, VAL, Law, draw_scene

sklearn_datasets = pytest.importorskip("sklearn.datasets")


def test_every_sample_is_in_exactly_one_split() -> None:
    digits = sklearn_datasets.load_digits()
    for digit in range(10):
        expected = (digits.images[digits.target == digit] / 16).reshape(-1, 64)
        pools = [digit_pools(split)[digit].reshape(-1, 64) for split in (TRAIN, VAL)]
        assert np.array_equal(np.concatenate(pools), expected)
        assert len(pools[0]) == pytest.approx(3 * len(pools[1]), abs=4)
        keys = [{row.tobytes() for row in pool} for pool in pools]
        assert not keys[0] & keys[1]


@pytest.mark.parametrize("side", [9, 11])
def test_strokes_stay_legible(side: int) -> None:
    """The nearest training stroke at the size of a glyph names the validation stroke."""
    rows = [
        (np.stack([enlarge(sample, side).ravel() for sample in pool[:60]]), digit)
        for digit, pool in enumerate(digit_pools(TRAIN))
    ]
    known_NF = np.concatenate([row for row, _ in rows])
    digit_N = np.concatenate([np.full(len(row), digit) for row, digit in rows])
    right = []
    for digit, pool in enumerate(digit_pools(VAL)):
        for sample in pool[:20]:
            away_N = ((known_NF - enlarge(sample, side).ravel()) ** 2).sum(axis=1)
            right.append(digit_N[away_N.argmin()] == digit)
    assert np.mean(right) > 0.9


def test_marks_are_samples_of_their_class() -> None:
    marks = digit_marks(VAL)
    rng = np.random.default_rng(0)
    drawn = [marks.draw(rng, 4, 10) for _ in range(12)]
    assert len({mark.tobytes() for mark in drawn}) > 6
    pool = [enlarge(sample, 10) for sample in digit_pools(VAL)[3]]
    for mark in drawn:
        assert mark.shape == (10, 10)
        assert mark.min() >= 0
        assert mark.max() <= 1
        assert any(np.array_equal(mark, sample) for sample in pool)


def test_scenes_are_those_of_the_glyphs_with_other_marks() -> None:
    marks = digit_marks(TRAIN)
    labels = set()
    for number in range(60):
        scene = draw_scene(marks, Law(), 0, TRAIN, number)
        again = draw_scene(marks, Law(), 0, TRAIN, number)
        assert np.array_equal(scene.image_HW3, again.image_HW3)
        labels |= set(scene.label_G.tolist())
    assert labels == set(range(1, 11))
    assert marks.classes[labels.pop() - 1] in "0123456789"
    assert marks.class_ids == tuple(range(1, 11))


def test_bad_arguments_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="split=2"):
        digit_marks(2)
    digit_pools.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match="scikit-learn: not installed"):
        digit_marks(TRAIN)
