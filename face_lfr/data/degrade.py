"""Degraded copies of a face: what makes frames of a video worse than a photograph.

Five effects, in the order in which a camera adds them: a square hides a part of the face, the lens
blurs, the sensor samples fewer pixels, the electronics add noise, the encoder throws detail away.
All strengths grow with one number, the level; each effect takes a random share of it, so that
images of one level differ in what is wrong with them.

Letters: H rows, W columns, C channels.
"""

import numpy as np

HIDDEN = 0.45  # side of the square, share of the shorter image side, at full strength
BLUR = 0.025  # sigma of the blur, share of the shorter image side
SHRINK = 8.0  # factor between the sides before and after the down-sampling
NOISE = 40.0  # standard deviation, grey levels
QUALITY = (95, 10)  # of the JPEG encoder at strength 0 and 1
LEAST_SHARE = 0.5  # every effect takes between this share of the level and all of it


def degrade(image_HWC: np.ndarray, level: float, rng: np.random.Generator) -> np.ndarray:
    """The image with hidden square, blur, lost resolution, noise and JPEG blocks; same shape.

    A generator in the same state places the same square and the same noise at every level, so
    that with growing level only the strengths grow.

    Args:
        image_HWC: uint8, (H, W, 3) RGB; it is not changed.
        level: in [0, 1]; 0 returns a plain copy.
        rng: source of all randomness; it advances by the same amount at every level above 0.

    Raises:
        ValueError: the image is no uint8 (H, W, 3), or the level is not in [0, 1].
    """
    if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[2] != 3:
        shape = f"{image_HWC.dtype} {image_HWC.shape}"
        raise ValueError(f"image is {shape}, need uint8 (H, W, 3)")
    if not 0 <= level <= 1:
        raise ValueError(f"level={level} must be in [0, 1]")
    if level == 0:
        return image_HWC.copy()
    hide, blur, shrink, noise, encode = (level * rng.uniform(LEAST_SHARE, 1, 5)).tolist()
    image_HWC = _hide(image_HWC, hide, rng)
    image_HWC = _blur(image_HWC, blur)
    image_HWC = _shrink(image_HWC, shrink)
    image_HWC = _noise(image_HWC, noise, rng)
    return _encode(image_HWC, encode)


def _hide(image_HWC: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    height, width = image_HWC.shape[:2]
    place, colour = rng.random(2), rng.integers(0, 256, 3, dtype=np.uint8)
    side = round(HIDDEN * strength * min(height, width))
    top, left = (round(p * (full - side)) for p, full in zip(place, (height, width), strict=True))
    image_HWC = image_HWC.copy()
    image_HWC[top : top + side, left : left + side] = colour
    return image_HWC


def _blur(image_HWC: np.ndarray, strength: float) -> np.ndarray:
    import cv2

    sigma = BLUR * strength * min(image_HWC.shape[:2])
    return np.asarray(cv2.GaussianBlur(image_HWC, (0, 0), max(sigma, 1e-3)))


def _shrink(image_HWC: np.ndarray, strength: float) -> np.ndarray:
    import cv2

    height, width = image_HWC.shape[:2]
    factor = 1 + (SHRINK - 1) * strength
    small = (max(1, round(width / factor)), max(1, round(height / factor)))
    small_HWC = cv2.resize(image_HWC, small, interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(small_HWC, (width, height), interpolation=cv2.INTER_LINEAR))


def _noise(image_HWC: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    noise_HWC = rng.standard_normal(image_HWC.shape, dtype=np.float32)
    noisy_HWC = image_HWC + NOISE * strength * noise_HWC
    return np.clip(np.rint(noisy_HWC), 0, 255).astype(np.uint8)


def _encode(image_HWC: np.ndarray, strength: float) -> np.ndarray:
    import cv2

    best, worst = QUALITY
    quality = round(best + (worst - best) * strength)
    bgr_HWC = cv2.cvtColor(image_HWC, cv2.COLOR_RGB2BGR)
    _, code = cv2.imencode(".jpg", bgr_HWC, [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded_HWC = cv2.imdecode(code, cv2.IMREAD_COLOR)
    assert decoded_HWC is not None
    return np.asarray(cv2.cvtColor(decoded_HWC, cv2.COLOR_BGR2RGB))
