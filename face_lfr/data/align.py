"""Alignment of a face by its landmarks to the template that recognisers are trained on.

The transform is the least-squares similarity of Umeyama (1991) with scale and without reflection.
In the plane it has a closed form: with centred points as complex numbers s and t, the map is
t = a s, a = sum(conj(s) t) / sum(|s|^2). A product with a complex number turns and scales, and
cannot mirror. Template: insightface python-package face_align.py.

Shapes: K landmarks, H rows, W columns; points are (x, y) in pixels.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Points = NDArray[np.float64]

# Left eye, right eye, nose, left and right corner of the mouth; left in the image.
TEMPLATE_52 = (
    (38.2946, 51.6963),
    (73.5318, 51.5014),
    (56.0252, 71.7366),
    (41.5493, 92.3655),
    (70.7299, 92.2041),
)
FLAT = 1e-4  # smaller spread over larger spread, below which points lie on a line


def template(size: int = 112) -> Points:
    """Where the five landmarks lie in an aligned image of `size` x `size`, (5, 2).

    Multiples of 128 that are none of 112 have the 112 template in a frame of 128, eight pixels
    further right, as insightface crops them; every other size is a scaled 112.

    Raises:
        ValueError: a size below 1.
    """
    if size < 1:
        raise ValueError(f"size={size} must be at least 1")
    point_52 = np.array(TEMPLATE_52)
    if size % 128 == 0 and size % 112:
        return (point_52 + np.array([8.0, 0.0])) * (size / 128)
    return point_52 * (size / 112)


def five_points(landmark: ArrayLike) -> Points:
    """Eyes, nose and corners of the mouth out of 5 or 68 landmarks, (5, 2) float64.

    Args:
        landmark: (5, 2) or (68, 2) in the order of iBUG 300-W, or the same numbers in one row.

    Raises:
        ValueError: another shape, or a coordinate that is not finite.
    """
    point_K2 = np.asarray(landmark, np.float64)
    if point_K2.shape in ((10,), (136,)):
        point_K2 = point_K2.reshape(-1, 2)
    if point_K2.shape not in ((5, 2), (68, 2)):
        raise ValueError(f"landmark has shape {point_K2.shape}; accepted: (5, 2) or (68, 2)")
    if not np.isfinite(point_K2).all():
        raise ValueError("landmark holds a coordinate that is not finite")
    if len(point_K2) == 5:
        return point_K2
    eyes = (point_K2[[36, 42]] + point_K2[[39, 45]]) / 2  # the middle of the corners
    return np.concatenate([eyes, point_K2[[30, 48, 54]]])


def similarity(source_K2: Points, target_K2: Points) -> Points:
    """Least-squares similarity that takes source points to target points, (2, 3).

    Args:
        source_K2: K >= 2 points that do not lie on one line.
        target_K2: as many.

    Returns:
        [[p, -q, x], [q, p, y]]: turn and scale by p + iq, then shift; the determinant is positive.

    Raises:
        ValueError: the points lie on a line or in one place, or the best scale is 0, as for a
            source that is the mirror image of a regular target.
    """
    if source_K2.shape != target_K2.shape or source_K2.shape[1:] != (2,):
        shapes = f"{source_K2.shape} and {target_K2.shape}"
        raise ValueError(f"source_K2 and target_K2 have shapes {shapes}; accepted: both (K, 2)")
    centre, aim = source_K2.mean(axis=0), target_K2.mean(axis=0)
    centred_K2 = source_K2 - centre
    wide, narrow = np.linalg.svd(centred_K2, compute_uv=False)
    if narrow <= FLAT * wide:
        raise ValueError("landmarks lie on one line or in one place")
    source_K, target_K = (part[:, 0] + 1j * part[:, 1] for part in (centred_K2, target_K2 - aim))
    factor = np.vdot(source_K, target_K) / np.vdot(source_K, source_K).real
    spread = np.linalg.norm(target_K) / np.linalg.norm(source_K)
    if abs(factor) <= FLAT * spread:
        raise ValueError("landmarks have no similarity to the template that is no reflection")
    p, q = factor.real, factor.imag
    turn = np.array([[p, -q], [q, p]])
    return np.column_stack([turn, aim - turn @ centre])


def align(image_HWC: np.ndarray, landmark: ArrayLike, size: int = 112) -> np.ndarray:
    """The aligned face, uint8 (size, size, C): bilinear, black where the image ends.

    Args:
        image_HWC: uint8, any order of the channels.
        landmark: as `five_points` takes it.
        size: side of the result.

    Raises:
        ValueError: landmarks that are malformed or degenerate.
    """
    import cv2

    matrix = similarity(five_points(landmark), template(size))
    return np.asarray(cv2.warpAffine(image_HWC, matrix, (size, size), borderValue=0.0))
