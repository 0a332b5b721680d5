"""Label noise of a known amount, for training sets that are too clean to show what noise does.

Letters: N images.
"""

from dataclasses import replace

import numpy as np

from face_lfr.data.face_data import FaceData


def with_label_noise(data: FaceData, fraction: float, seed: int = 0) -> FaceData:
    """The same set, some of whose images carry a random class.

    Args:
        data: whose `labels_N` are the truth; the images and their file stay as they are.
        fraction: as `noisy_labels`.
        seed: as `noisy_labels`.

    Raises:
        ValueError: as `noisy_labels`.
    """
    labels_N = noisy_labels(data.labels_N, data.num_classes, fraction, seed)
    return replace(data, labels_N=labels_N) if fraction else data


def noisy_labels(
    labels_N: np.ndarray, num_classes: int, fraction: float, seed: int = 0
) -> np.ndarray:
    """Labels of which round(fraction * N), chosen without order, are drawn anew.

    A drawn class is uniform over all classes, so that one in `num_classes` of them is the old one.
    A larger fraction with the same seed changes other images, too.

    Args:
        labels_N: int64 (N,), in [0, num_classes); it is not changed.
        num_classes: classes to draw from.
        fraction: in [0, 1]; 0 returns a copy.
        seed: of the choice and of the classes; not negative.

    Raises:
        ValueError: fraction or seed is out of its range.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction={fraction} of noisy labels must be in [0, 1]")
    if seed < 0:
        raise ValueError(f"seed={seed} of the label noise must not be negative")
    rng = np.random.default_rng(seed)
    count = round(fraction * len(labels_N))
    row = rng.choice(len(labels_N), count, replace=False)
    noisy_N = labels_N.copy()
    noisy_N[row] = rng.integers(num_classes, size=count)
    return noisy_N
