"""What the synthetic videos show, what is labelled, and how time reverses it.

A video is T segments of `SEGMENT` frames. Whatever must survive the random choice of one frame in
each segment (a marker, the visibility of a blob) is constant within a segment; positions, sizes
and brightness change from frame to frame. Three parts:

* "order": an object (shape and colour) that may move, grow or shrink, before a ground that may
  brighten or darken, with a light and a dark block in one order or the other. Every motion has an
  opposite, and a video whose motions are all replaced by their opposites is the same video
  backwards, frame by frame. The senses are fair coins, hence the set of frames of a video says
  nothing about any of them: a model that averages scores of single frames stays at chance inside
  a pair of opposites, however long it trains.
* "gap": a blob drifts diagonally and shows in every g-th segment only, g in 1..`max_gap`. Labels
  are left or right and up or down; the same argument holds.
* "static": the object with its motions unlabelled, and labels that every single frame shows.

Shapes: F frames, T segments, H rows, W columns, 3 = blue, green, red in 0..255. Pixel quantities
are stated for frames of 32 x 32 and scale with the size.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np

from video_mmit.data.shapes import (
    COLOURS,
    SHAPES,
    Track,
    corner,
    cover,
    paint,
    stripes,
    texture,
    to_frames,
)

SEGMENT = 3  # frames
DIRECTIONS = ("moving+right", "moving+left", "moving+down", "moving+up")
CHANGES = (
    "growing", "shrinking", "brightening", "darkening", "light+then+dark", "dark+then+light",
)  # fmt: skip
GROUNDS = ("plain+ground", "level+stripes", "upright+stripes", "slanted+stripes")
BLOCKS = ("block+top+left", "block+top+right", "block+bottom+left", "block+bottom+right")
TONES = ("pale+ground", "dim+ground")
CATEGORIES = {
    "order": (*SHAPES, *COLOURS, *DIRECTIONS, *CHANGES),
    "gap": DIRECTIONS,
    "static": (*SHAPES, *COLOURS, *GROUNDS, *BLOCKS, *TONES),
}
PAIRS: dict[str, tuple[tuple[int, int], ...]] = {  # labels that time reversal exchanges
    "order": ((8, 9), (10, 11), (12, 13), (14, 15), (16, 17)),
    "gap": ((0, 1), (2, 3)),
    "static": (),
}

MOVES, GROWS, BRIGHTENS, MARKED = 0.8, 0.5, 0.5, 0.6  # probability that a motion is present
RADIUS = (4.5, 5.5)
SPEED = (0.35, 0.55)  # pixels a frame, of the object
GROWTH = (0.25, 0.4)  # of the radius, between the middle and an end
LEVEL = (90.0, 130.0)  # grey of the ground
SLOPE = (1.5, 2.5)  # grey levels a frame
FLICKER = 1.0  # brightness of a frame
TEXTURE = 12.0
LIGHT, DARK, BLOCK = 235.0, 20.0, 10
BLOB_RADIUS, BLOB_CONTRAST, BLOB_LEVEL = 4.0, 100.0, (80.0, 110.0)
BLOB_SPEED = (0.7, 1.3)  # times `Look.speed`
STRIPE, STRIPE_PERIOD = 15.0, (5.0, 8.0)
PALE, DIM, TONE = 130.0, 95.0, 10.0
STATIC_BLOCK, STATIC_BLOCK_SIZE, STATIC_SLOPE = 40.0, 6, (0.2, 0.6)


def opposite(part: str, labels: Iterable[int]) -> tuple[int, ...]:
    """Labels of the same video played backwards."""
    swap = {a: b for pair in PAIRS[part] for a, b in (pair, pair[::-1])}
    return tuple(swap.get(label, label) for label in labels)


def backwards(part: str, labels: Iterable[int]) -> bool:
    """Whether the motion with the smallest label is the second one of its pair."""
    motions = {label: label == pair[1] for pair in PAIRS[part] for label in pair}
    present = sorted(motions.keys() & set(labels))
    return bool(present) and motions[present[0]]


class Senses(NamedTuple):
    """Of every motion 1, -1 for its opposite, or 0 when absent."""

    right: int
    down: int
    grow: int = 0
    brighten: int = 0
    light_first: int = 0

    @classmethod
    def of(cls, part: str, labels: Iterable[int]) -> Self:
        """Senses that the labels of a part stand for."""
        present = set(labels)
        return cls(*((a in present) - (b in present) for a, b in PAIRS[part]))


def _zipf(rng: np.random.Generator, first: int) -> int:
    """One of four labels from `first` on, with probabilities as 1 : 1/2 : 1/3 : 1/4."""
    return first + int(rng.choice(4, p=np.array([12, 6, 4, 3]) / 25))


def _motions(rng: np.random.Generator) -> list[int]:
    """Motion labels of part "order"; the sense of each is a fair coin of its own."""
    labels = [8 + int(rng.integers(4))] if rng.random() < MOVES else []
    for first, chance in ((12, GROWS), (14, BRIGHTENS), (16, MARKED)):
        if rng.random() < chance:
            labels.append(first + int(rng.integers(2)))
    return labels


def draw_labels(part: str, rng: np.random.Generator) -> tuple[int, ...]:
    """Labels of one video in ascending order."""
    if part == "gap":
        return int(rng.integers(2)), 2 + int(rng.integers(2))
    look = [_zipf(rng, 0), _zipf(rng, 4)]
    if part == "order":
        return (*look, *_motions(rng))
    return (*look, _zipf(rng, 8), _zipf(rng, 12), 16 + int(rng.integers(2)))


@dataclass(frozen=True)
class Painter:
    """Draws the videos of one part.

    Args:
        part: "order", "gap" or "static".
        size: H and W.
        segments: T.
        noise: standard deviation of the grey noise of a pixel.
        jitter: standard deviation, in pixels, of the position in a frame.
        speed: mean pixels a segment of the blob, along each axis; part "gap" only.
        max_gap: largest distance, in segments, of two views of the blob; part "gap" only.
    """

    part: str
    size: int = 32
    segments: int = 8
    noise: float = 3.0
    jitter: float = 0.3
    speed: float = 0.8
    max_gap: int = 4

    @property
    def frames(self) -> int:
        """F."""
        return self.segments * SEGMENT

    def video(self, rng: np.random.Generator, labels: Iterable[int]) -> np.ndarray:
        """Frames (F, H, W, 3) uint8 of a video with the given labels.

        With two generators of the same state, the video of `opposite(labels)` is exactly the
        video of `labels` backwards: of the two, only one is ever drawn.
        """
        labels = tuple(sorted(labels))
        if backwards(self.part, labels):
            return self.video(rng, opposite(self.part, labels))[::-1]
        draw = {"order": self._order, "gap": self._gap, "static": self._static}[self.part]
        return to_frames(rng, draw(rng, labels), self.noise)

    @property
    def _scale(self) -> float:
        return self.size / 32

    @property
    def _time(self) -> np.ndarray:
        """(F,) frames since the middle: symmetric, so that reversal is a change of sign."""
        return np.arange(self.frames) - (self.frames - 1) / 2

    def _line(self, rng: np.random.Generator, step: float, margin: float) -> np.ndarray:
        """Positions (F,) along one axis, `step` pixels a frame, inside the frame by `margin`.

        The middle of the way is uniform over what a step in either sense allows.
        """
        reach = min(abs(step) * self.frames / 2 + margin, (self.size - 1) / 2)
        middle = rng.uniform(reach, self.size - 1 - reach)
        shake_F = rng.normal(0, self.jitter * self._scale, self.frames)
        return middle + step * self._time + shake_F

    def _track(self, rng: np.random.Generator, senses: Senses) -> Track:
        radius = rng.uniform(*RADIUS) * self._scale
        step = rng.uniform(*SPEED) * self._scale
        growth = senses.grow * rng.uniform(*GROWTH)
        x_F = self._line(rng, senses.right * step, radius)
        y_F = self._line(rng, senses.down * step, radius)
        return Track(x_F, y_F, radius * (1 + growth * self._time / self._time[-1]))

    def _ground(
        self, rng: np.random.Generator, pattern_HW: np.ndarray, level: float, slope: float
    ) -> np.ndarray:
        """Grey frames (F, H, W, 3) of a still pattern whose brightness changes evenly."""
        level_F = level + slope * self._time + rng.normal(0, FLICKER, self.frames)
        ground_FHW = pattern_HW + level_F.astype(np.float32)[:, None, None]
        return np.repeat(ground_FHW[..., None], 3, axis=-1)

    def _order(self, rng: np.random.Generator, labels: tuple[int, ...]) -> np.ndarray:
        senses = Senses.of("order", labels)
        track = self._track(rng, senses)
        slope = senses.brighten * rng.uniform(*SLOPE)
        pattern_HW = texture(rng, self.size, TEXTURE)
        image_FHW3 = self._ground(rng, pattern_HW, rng.uniform(*LEVEL), slope)
        self._object(image_FHW3, labels, track)
        if senses.light_first:
            self._mark(rng, image_FHW3, senses.light_first)
        return image_FHW3

    def _object(self, image_FHW3: np.ndarray, labels: tuple[int, ...], track: Track) -> None:
        name, colour = SHAPES[labels[0]], tuple(COLOURS.values())[labels[1] - len(SHAPES)]
        paint(image_FHW3, cover(name, track, self.size), colour)

    def _mark(self, rng: np.random.Generator, image_FHW3: np.ndarray, sense: int) -> None:
        """A light and a dark block in one corner, two segments each, one right after the other."""
        length = 2 * SEGMENT
        start = SEGMENT * int(rng.integers(self.segments - 3))
        rows, columns = corner(int(rng.integers(4)), round(BLOCK * self._scale), self.size)
        for number, level in enumerate((LIGHT, DARK)[::sense]):
            begin = start + number * length
            image_FHW3[begin : begin + length, rows, columns] = level

    def _gap(self, rng: np.random.Generator, labels: tuple[int, ...]) -> np.ndarray:
        senses = Senses.of("gap", labels)
        radius = BLOB_RADIUS * self._scale
        step = self.speed / SEGMENT * rng.uniform(*BLOB_SPEED) * self._scale
        x_F = self._line(rng, senses.right * step, radius)
        y_F = self._line(rng, senses.down * step, radius)
        gap = int(rng.integers(1, self.max_gap + 1))
        shown_T = np.arange(self.segments) % gap == rng.integers(gap)
        shown_F11 = np.repeat(shown_T, SEGMENT)[:, None, None].astype(np.float32)
        pattern_HW = texture(rng, self.size, TEXTURE)
        image_FHW3 = self._ground(rng, pattern_HW, rng.uniform(*BLOB_LEVEL), 0.0)
        track = Track(x_F, y_F, np.full(self.frames, radius))
        blob_FHW = cover("disc", track, self.size) * shown_F11
        return image_FHW3 + BLOB_CONTRAST * blob_FHW[..., None]

    def _static(self, rng: np.random.Generator, labels: tuple[int, ...]) -> np.ndarray:
        senses = Senses.of("order", _motions(rng))
        track = self._track(rng, senses)
        pattern_HW = texture(rng, self.size, TEXTURE) + self._stripes(rng, labels[2])
        level = (PALE, DIM)[labels[4] - 16] + rng.uniform(-TONE, TONE)
        slope = senses.brighten * rng.uniform(*STATIC_SLOPE)
        image_FHW3 = self._ground(rng, pattern_HW, level, slope)
        block = round(STATIC_BLOCK_SIZE * self._scale)
        rows, columns = corner(labels[3] - 12, block, self.size)
        image_FHW3[:, rows, columns] += STATIC_BLOCK
        self._object(image_FHW3, labels, track)
        return image_FHW3

    def _stripes(self, rng: np.random.Generator, label: int) -> np.ndarray:
        period, phase = rng.uniform(*STRIPE_PERIOD) * self._scale, rng.random()
        name = GROUNDS[label - 8].partition("+")[0]
        if name == "plain":
            return np.zeros((self.size, self.size), dtype=np.float32)
        return STRIPE * stripes(name, period, phase, self.size)
