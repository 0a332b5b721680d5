"""Glyph scenes whose glyphs are handwritten: the digits that come with scikit-learn.

1797 digits of 8 x 8 pixels with 17 grey levels, by many writers. The first three quarters of the
samples of each class serve training, the others validation: no stroke is seen in both.

Letters: N samples, S side of a mark.
"""

from functools import lru_cache

import numpy as np

from common.log import InputError
from detection_tsd.data.glyphs import TRAIN, VAL, Marks, cubic_weights

NAMES = tuple(str(digit) for digit in range(10))
IDS = tuple(range(1, 11))  # an id of 0 would be mistaken for the background
SHARE = 0.75  # of the samples of a class, for training
GREYS = 16.0


def digit_marks(split: int) -> Marks:
    """Digits as the marks of `glyphs.draw_scene`; each is a random sample of its class.

    Args:
        split: `TRAIN` or `VAL`, which draw from disjoint samples.

    Raises:
        InputError: scikit-learn is not installed.
        ValueError: another split.
    """
    pools = digit_pools(split)

    def draw(rng: np.random.Generator, label: int, side: int) -> np.ndarray:
        pool_N88 = pools[label - 1]
        return enlarge(pool_N88[int(rng.integers(len(pool_N88)))], side)

    return Marks(NAMES, IDS, draw)


@lru_cache(maxsize=2)
def digit_pools(split: int) -> tuple[np.ndarray, ...]:
    """For each digit the samples of a split, float64 (N, 8, 8) in [0, 1]; errors as above."""
    if split not in (TRAIN, VAL):
        raise ValueError(f"split={split} is neither {TRAIN} nor {VAL}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError("scikit-learn", "not installed: pip install scikit-learn") from error
    digits = load_digits()
    pools = []
    for digit in range(len(NAMES)):
        sample_N88 = digits.images[digits.target == digit] / GREYS
        border = int(SHARE * len(sample_N88))
        pools.append(sample_N88[:border] if split == TRAIN else sample_N88[border:])
    return tuple(pools)


def enlarge(sample_88: np.ndarray, side: int) -> np.ndarray:
    """Strength (S, S) in [0, 1] of a sample at the size of a glyph, resampled bicubically."""
    weight_S8 = cubic_weights(side, sample_88.shape[0])
    return np.clip(weight_S8 @ sample_88 @ weight_S8.T, 0, 1)
