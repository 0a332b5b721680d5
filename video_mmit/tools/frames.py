"""Whole videos, a few frames at a time and of limited size: what the offline tools need.

Shapes: n frames, H rows, W columns.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from common.log import InputError
from video_mmit.data.video import FileReader
from video_mmit.data.video_data import Clip

BUDGET = 128 * 2**20  # bytes of decoded frames in memory at a time


def file_reader(backend: str) -> FileReader:
    """Reader of video files; `InputError` for a backend that is not known or not installed."""
    try:
        return FileReader(backend)
    except InputError:
        raise
    except ValueError as error:
        raise InputError("backend", "is not accepted", error) from error


def check_least(cfg: object, **least: int) -> None:
    """Refuse a number of a configuration that is below its least value; `InputError`."""
    for name, bound in least.items():
        if getattr(cfg, name) < bound:
            raise InputError(name, f"must be at least {bound}", getattr(cfg, name))


def all_frames(clip: Clip) -> Iterator[np.ndarray]:
    """Every frame in order, (H, W, 3) uint8; few long reads, as some decoders start over."""
    size = max(1, clip.read(np.array([0])).nbytes)
    step = max(1, BUDGET // size)
    for start in range(0, clip.frames, step):
        yield from clip.read(np.arange(start, min(start + step, clip.frames)))


def fitted_size(shape: Sequence[int], short_side: int, even: bool = False) -> tuple[int, int]:
    """(rows, columns) of a frame of `shape` (H, W, ...) once its short side fits `short_side`.

    0 keeps the size; the aspect stays. Small videos are not enlarged: the transforms do that when
    they need to. `even` rounds both down to even numbers, at least 2, as H.264 with 4:2:0 colours
    demands.
    """
    height, width = shape[:2]
    short = min(height, width)
    if short_side and short > short_side:
        height, width = (round(side * short_side / short) for side in (height, width))
    return (max(2, height - height % 2), max(2, width - width % 2)) if even else (height, width)


def resize(frame_HW3: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The frame in (rows, columns) of `size`; averages over areas, so nothing aliases."""
    import cv2

    if frame_HW3.shape[:2] == size:
        return frame_HW3
    return np.asarray(cv2.resize(frame_HW3, size[::-1], interpolation=cv2.INTER_AREA))
