"""Drawing of anti-aliased shapes, textures and blocks into a stack of frames.

Shapes: F frames, H rows, W columns (H = W), 3 = blue, green, red in 0..255, float32.
"""

from typing import NamedTuple

import numpy as np

SHAPES = ("disc", "square", "triangle", "cross")
COLOURS = {
    "red": (50, 50, 220),
    "green": (50, 190, 50),
    "blue": (220, 80, 50),
    "yellow": (40, 210, 220),
}


class Track(NamedTuple):
    """Where an object is and how large: centre `x`, `y` and `radius`, (F,) each, in pixels."""

    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray


def cover(shape: str, track: Track, size: int) -> np.ndarray:
    """Share (F, H, W) of every pixel that the shape covers; its edge is one pixel soft.

    All shapes have roughly the area of a disc of the same radius.
    """
    grid = np.arange(size, dtype=np.float32)
    x_F11, y_F11, r_F11 = (row_F.astype(np.float32)[:, None, None] for row_F in track)
    x_F1W, y_FH1 = grid - x_F11, grid[:, None] - y_F11
    a_F1W, b_FH1 = np.abs(x_F1W), np.abs(y_FH1)
    if shape == "disc":
        outside = np.hypot(x_F1W, y_FH1) - r_F11
    elif shape == "square":
        outside = np.maximum(a_F1W, b_FH1) - 0.9 * r_F11
    elif shape == "triangle":
        outside = np.maximum(y_FH1 - 0.8 * r_F11, a_F1W - 0.5 * y_FH1 - 0.62 * r_F11)
    elif shape == "cross":
        wide = np.maximum(a_F1W - 1.15 * r_F11, b_FH1 - 0.4 * r_F11)
        high = np.maximum(b_FH1 - 1.15 * r_F11, a_F1W - 0.4 * r_F11)
        outside = np.minimum(wide, high)
    else:
        raise ValueError(f"shape={shape!r}, accepted: {', '.join(SHAPES)}")
    return (0.5 - outside).clip(0, 1)


def paint(image_FHW3: np.ndarray, cover_FHW: np.ndarray, colour: tuple[int, int, int]) -> None:
    """Blend a colour over the frames in place."""
    share_FHW1 = cover_FHW[..., None]
    image_FHW3 += share_FHW1 * (np.array(colour, dtype=np.float32) - image_FHW3)


def texture(rng: np.random.Generator, size: int, spread: float) -> np.ndarray:
    """Smooth random pattern (H, W) of mean 0 and the given standard deviation in grey levels."""
    import cv2

    noise_HW = rng.standard_normal((size, size), dtype=np.float32)
    smooth_HW = cv2.GaussianBlur(noise_HW, (0, 0), size / 16)
    return (smooth_HW - smooth_HW.mean()) * (spread / smooth_HW.std())


def stripes(direction: str, period: float, phase: float, size: int) -> np.ndarray:
    """Sine (H, W) in -1..1 with a period in pixels and a phase in turns.

    Args:
        direction: of the lines, "level", "upright" or "slanted".
        period: distance of the lines.
        phase: in 0..1.
        size: H and W.
    """
    across = {"level": (0.0, 1.0), "upright": (1.0, 0.0), "slanted": (0.5**0.5, 0.5**0.5)}
    x, y = across[direction]
    grid = np.arange(size, dtype=np.float32)
    place_HW = x * grid + y * grid[:, None]
    return np.sin(2 * np.pi * (place_HW / period + phase))


def corner(number: int, block: int, size: int) -> tuple[slice, slice]:
    """Rows and columns of a square block in a corner: 0, 1 = top left, right; 2, 3 = bottom."""
    row, column = divmod(number, 2)
    top, left = row * (size - block), column * (size - block)
    return slice(top, top + block), slice(left, left + block)


def to_frames(rng: np.random.Generator, image_FHW3: np.ndarray, noise: float) -> np.ndarray:
    """uint8 frames with grey noise; coloured noise would not survive the coder's half chroma."""
    noise_FHW1 = rng.standard_normal((*image_FHW3.shape[:3], 1), dtype=np.float32)
    return (image_FHW3 + noise * noise_FHW1).clip(0, 255).round().astype(np.uint8)
