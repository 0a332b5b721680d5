"""Videos that the benchmarks make for themselves, of the size of Multi-Moments': 3 s, 340x256.

A camera pans over a grained texture and a disc moves, which takes 0.5 to 2 Mbit/s depending on the
coding. Real videos have other motion and other noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.log import InputError
from video_mmit.benchmarks.networks import CLASSES
from video_mmit.data.sampling import Uniform
from video_mmit.data.video_data import Reader, Video, VideoData
from video_mmit.tools.reencode import encode

FRAMES, HEIGHT, WIDTH, RATE = 90, 256, 340, 30
MARGIN = 60  # pixels the camera moves to each side
COMMON = {"sc_threshold": "0", "crf": "20", "preset": "veryfast"}


class Coding(NamedTuple):
    """How a video is coded: text for the table, and x264's options (None: OpenCV's mp4v)."""

    label: str
    options: dict[str, str] | None = None


# Videos from the web look like "long"; "short" is what video_mmit.tools.reencode writes.
CODINGS = {
    "mp4v": Coding("mp4v, key frame every 12"),
    "long": Coding(
        "H.264, one key frame", COMMON | {"g": "250", "keyint_min": "250", "bf": "3"}
    ),
    "short": Coding("H.264, key frame every 8", COMMON | {"g": "8", "keyint_min": "8", "bf": "0"}),
}  # fmt: skip


def missing(coding: Coding) -> str | None:
    """Why a coding cannot be written here; None when it can."""
    if coding.options is None:
        return None
    if find_spec("av") is None:
        return "PyAV is not installed"
    import av

    try:
        av.codec.Codec("libx264", "w")
    except ValueError:  # of which PyAV's errors are
        return "PyAV was built without libx264"
    return None


def write_videos(
    folder: Path, coding: Coding, count: int, seed: int = 0, frames: int = FRAMES
) -> list[Video]:
    """`count` different videos in `folder`.

    Raises:
        InputError: the encoder is not there or refuses the frames.
    """
    folder.mkdir(parents=True, exist_ok=True)
    videos = []
    for number in range(count):
        path = folder / f"{number}.mp4"
        pictures = draw(frames, np.random.default_rng([seed, number]))
        if coding.options is None:
            _write_mp4v(path, pictures)
        else:
            encode(path, pictures, Fraction(RATE), HEIGHT, coding.options)
        videos.append(Video(path.name, path, frames, (number % 2,)))
    return videos


def as_data(videos: list[Video], reader: Reader, count: int = 8) -> VideoData:
    """A data set that trains and tests on `videos`, `count` frames a clip."""
    classes = tuple(f"class {number}" for number in range(CLASSES))
    folder = videos[0].path.parent
    return VideoData("made", folder, classes, True, videos, videos, reader, Uniform(count))


def draw(frames: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """`frames` pictures (HEIGHT, WIDTH, 3) uint8, RGB."""
    import cv2

    shape = (HEIGHT + 2 * MARGIN, WIDTH + 2 * MARGIN)
    coarse = rng.integers(0, 256, (shape[0] // 8, shape[1] // 8, 3), dtype=np.uint8)
    grain = rng.integers(-12, 13, (*shape, 3))
    texture = cv2.resize(coarse, shape[::-1], interpolation=cv2.INTER_CUBIC) + grain
    texture = texture.clip(0, 255).astype(np.uint8)
    phase = rng.random(4) * 2 * np.pi
    for angle in np.linspace(0, 2 * np.pi, frames, endpoint=False):
        top, left = (int(MARGIN * (1 + 0.8 * np.sin(angle + x))) for x in phase[:2])
        picture = texture[top : top + HEIGHT, left : left + WIDTH].copy()
        x, y = (0.5 + 0.4 * np.sin(2 * angle + start) for start in phase[2:])
        cv2.circle(picture, (int(WIDTH * x), int(HEIGHT * y)), 30, (220, 40, 30), -1)
        yield picture


def _write_mp4v(path: Path, pictures: Iterator[np.ndarray]) -> None:
    import cv2

    code = cv2.VideoWriter.fourcc(*"mp4v")
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, code, float(RATE), (WIDTH, HEIGHT))
    if not writer.isOpened():
        raise InputError(path, "cannot be encoded by OpenCV", "mp4v")
    for picture in pictures:
        writer.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    writer.release()
