"""Draws scenes in which the class of an object and its extent are told by different places.

The class of an object is carried only by a small glyph at a random place inside of it, its extent
only by soft edges, and the proposals are badly centred. Classification then wants to look at the
glyph, regression at the edges all around; a head that pools once from the bad box must serve both.
That is the conflict which arXiv 2003.07540 (section 2.1) describes.

A scene is a function of (seed, split, number) and of the options. The options do not disturb one
another: with `centred` every glyph moves to the middle of its object and nothing else changes.

Letters: H W rows and columns, 3 red, green, blue in [0, 1]; G objects, M proposals, S side of a
mark. Boxes are xyxy in pixels, (0, 0) is the upper left corner of the image.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from common.log import InputError

GLYPHS = ("plus", "cross", "T", "L", "ring", "bars")
GLYPH_IDS = (1, 2, 3, 5, 8, 13)  # with gaps, as the category ids of COCO have
TRAIN, VAL = 0, 1

KNOTS = 6  # colours of the background per side
COLOURS = (0.2, 0.8)
NOISE = 0.03
MOST_OBJECTS = 3
OBJECT = (22.0, 56.0)  # width and height of an object
TINT = (0.16, 0.32)  # of the strongest of the three colours; less would hide some objects
SLOPE = 1.5  # of the sigmoid across an edge, per pixel
MARK = (9, 11)  # side of a glyph
INNER = 0.6  # share of the box in which the centre of the glyph lies
CONTRAST = 0.45
MOST_DISTRACTORS = 3
PER_OBJECT, ELSEWHERE = 12, 24  # proposals
TRIES = 64

_PLACES, _PAINT, _PROPOSALS = range(3)  # what a stream of random numbers decides


class Marks(NamedTuple):
    """The classes of a task and the marks that tell them.

    Attributes:
        classes: names; label k is classes[k - 1].
        class_ids: what the annotation file calls them.
        draw: (generator, label, side) -> strength (S, S) in [0, 1] of one mark of that class.
    """

    classes: tuple[str, ...]
    class_ids: tuple[int, ...]
    draw: Callable[[np.random.Generator, int, int], np.ndarray]


class Scene(NamedTuple):
    """One image.

    Attributes:
        image_HW3: uint8, RGB.
        box_G4: float32, where the edge of the body is half as strong as its middle.
        label_G: int64, 1..classes.
        ellipse_G: bool, whether the body is an ellipse; a rectangle otherwise.
        mark_G2: float32, centre (x, y) of the glyph.
        proposal_M4: float32, inside the image; those of the objects first, then random ones.
    """

    image_HW3: np.ndarray
    box_G4: np.ndarray
    label_G: np.ndarray
    ellipse_G: np.ndarray
    mark_G2: np.ndarray
    proposal_M4: np.ndarray


@dataclass(frozen=True)
class Law:
    """How the scenes of a set are drawn.

    Args:
        side: of the square images, pixels.
        centred: puts the glyph at the middle of its object: a control, in which one pooling from a
            good box sees class and extent alike.
        jitter: largest shift of each side of a proposal, in widths or heights of its object; 0
            repeats the box of the object.

    Raises:
        InputError: the side leaves no room for an object, or a jittered box could be empty.
    """

    side: int = 96
    centred: bool = False
    jitter: float = 0.3

    def __post_init__(self) -> None:
        if self.side < 64:
            raise InputError("side", "must be at least 64 pixels", self.side)
        if not 0 <= self.jitter < 0.5:
            raise InputError("jitter", "must be in [0, 0.5)", self.jitter)


def glyph_marks() -> Marks:
    """The six glyphs."""
    return Marks(GLYPHS, GLYPH_IDS, lambda rng, label, side: glyph(label, side))


@lru_cache(maxsize=256)
def glyph(label: int, side: int) -> np.ndarray:
    """Strength (S, S) in [0, 1] of a glyph, anti-aliased; strokes are about 2 pixels wide.

    Raises:
        ValueError: `label` is not one of 1..6.
    """
    if not 1 <= label <= len(GLYPHS):
        raise ValueError(f"label={label} is not in 1..{len(GLYPHS)}")
    fine = 8
    line = (np.arange(fine * side) + 0.5) / (fine * side) * 2 - 1
    y, x = np.meshgrid(line, line, indexing="ij")
    half = 2.1 / side  # of a stroke, in units of half a glyph
    shapes: tuple[Callable[[], np.ndarray], ...] = (
        lambda: (abs(x) < half) | (abs(y) < half),
        lambda: (abs(x - y) < 2**0.5 * half) | (abs(x + y) < 2**0.5 * half),
        lambda: (y < 2 * half - 1) | (abs(x) < half),
        lambda: (x < 2 * half - 1) | (y > 1 - 2 * half),
        lambda: abs(np.hypot(x, y) - (1 - half)) < half,
        lambda: abs(abs(x) - 0.6) < half,
    )
    inside = shapes[label - 1]().reshape(side, fine, side, fine)
    return inside.mean(axis=(1, 3))


@lru_cache(maxsize=16)
def cubic_weights(size: int, knots: int) -> np.ndarray:
    """Matrix (size, knots) that resamples a line with Keys' cubic kernel (a = -0.75).

    Ends are continued by their last value. In float64, so that images are the same everywhere.
    """
    place = (np.arange(size) + 0.5) * knots / size - 0.5
    first = np.floor(place).astype(int) - 1
    weight_TN = np.zeros((size, knots))
    for tap in range(4):
        gap = abs(place - (first + tap))
        near = (1.25 * gap - 2.25) * gap * gap + 1
        far = -0.75 * (((gap - 5) * gap + 8) * gap - 4)
        column = np.clip(first + tap, 0, knots - 1)
        np.add.at(weight_TN, (np.arange(size), column), np.where(gap <= 1, near, far))
    return weight_TN


def draw_scene(marks: Marks, law: Law, seed: int, split: int, number: int) -> Scene:
    """The `number`-th scene of a split.

    Args:
        marks: classes and their glyphs.
        law: options of the set.
        seed: of the set, at least 0.
        split: `TRAIN` or `VAL`; every split has random numbers of its own.
        number: of the scene, at least 0. Scenes do not depend on how many there are.
    """
    places = np.random.default_rng([seed, split, number, _PLACES])
    paint = np.random.default_rng([seed, split, number, _PAINT])
    wish = int(places.integers(1, MOST_OBJECTS + 1))
    box_G4 = place_boxes(places, wish, OBJECT, law.side, np.zeros((0, 4)))
    label_G = places.integers(1, len(marks.classes) + 1, len(box_G4))
    ellipse_G = places.random(len(box_G4)) < 0.5
    image_HW3 = background(paint, law.side)
    for box, ellipse in zip(box_G4, ellipse_G, strict=True):
        paint_body(image_HW3, box, bool(ellipse), body_tint(paint))
    mark_G2 = _paint_marks(image_HW3, box_G4, label_G, marks, law, places, paint)
    count = int(places.integers(0, MOST_DISTRACTORS + 1))
    for x1, y1, x2, _ in place_marks(places, count, law.side, box_G4):
        label = int(places.integers(1, len(marks.classes) + 1))
        paint_mark(image_HW3, (int(x1), int(y1)), marks.draw(paint, label, int(x2 - x1)), paint)
    proposals = np.random.default_rng([seed, split, number, _PROPOSALS])
    return Scene(
        finish(image_HW3, paint),
        box_G4.astype(np.float32),
        label_G.astype(np.int64),
        ellipse_G,
        mark_G2,
        propose(proposals, box_G4, law),
    )


def background(rng: np.random.Generator, side: int) -> np.ndarray:
    """Smooth random colours (H, W, 3), float64."""
    knot_663 = rng.uniform(*COLOURS, (KNOTS, KNOTS, 3))
    weight = cubic_weights(side, KNOTS)
    return np.einsum("hk,klc,wl->hwc", weight, knot_663, weight, optimize=True)


def place_boxes(
    rng: np.random.Generator,
    wish: int,
    sizes: tuple[float, float],
    side: int | np.ndarray,
    taken_B4: np.ndarray,
) -> np.ndarray:
    """Up to `wish` boxes (G, 4) that meet neither one another nor those taken.

    Fewer when no place was found for one after some tries. `side` is that of the image, or its
    width and height (2,).
    """
    found: list[np.ndarray] = []
    for _ in range(wish):
        size_T2 = rng.uniform(*sizes, (TRIES, 2))
        corner_T2 = rng.random((TRIES, 2)) * (side - size_T2)
        box_T4 = np.concatenate([corner_T2, corner_T2 + size_T2], axis=1)
        box = first_free(box_T4, np.concatenate([taken_B4, *found]) if found else taken_B4)
        if box is not None:
            found.append(box[None])
    return np.concatenate(found) if found else np.zeros((0, 4))


def place_marks(
    rng: np.random.Generator, wish: int, side: int, taken_B4: np.ndarray
) -> list[np.ndarray]:
    """Up to `wish` square boxes on whole pixels, away from those taken, for distractors."""
    found: list[np.ndarray] = []
    for _ in range(wish):
        size_T1 = rng.integers(MARK[0], MARK[1] + 1, (TRIES, 1))
        corner_T2 = np.floor(rng.random((TRIES, 2)) * (side - size_T1 + 1))
        box_T4 = np.concatenate([corner_T2, corner_T2 + size_T1], axis=1)
        box = first_free(box_T4, np.concatenate([taken_B4, *(b[None] for b in found)]))
        if box is not None:
            found.append(box)
    return found


def first_free(box_T4: np.ndarray, taken_B4: np.ndarray) -> np.ndarray | None:
    """The first of some boxes that meets none of those taken."""
    apart_TB2 = (box_T4[:, None, :2] >= taken_B4[None, :, 2:]) | (
        box_T4[:, None, 2:] <= taken_B4[None, :, :2]
    )
    free_T = np.flatnonzero(np.all(np.any(apart_TB2, axis=2), axis=1))
    return np.asarray(box_T4[free_T[0]]) if len(free_T) else None


def body_tint(rng: np.random.Generator) -> np.ndarray:
    """Change of colour (3,) of a body, which has nothing to do with its class."""
    tint = rng.uniform(-1, 1, 3)
    return tint / abs(tint).max() * rng.uniform(*TINT)


def paint_body(image_HW3: np.ndarray, box: np.ndarray, ellipse: bool, tint: np.ndarray) -> None:
    """Tint a rectangle or ellipse in place."""
    image_HW3 += body_strength(image_HW3.shape[0], box, ellipse)[..., None] * tint


def body_strength(side: int, box: np.ndarray, ellipse: bool) -> np.ndarray:
    """Strength (H, W) in [0, 1] of a body: a sigmoid across its edge, 1/2 on the edge itself."""
    half_w, half_h = (box[2] - box[0]) / 2, (box[3] - box[1]) / 2
    line = np.arange(side) + 0.5
    x_W, y_H = line - (box[0] + box[2]) / 2, line - (box[1] + box[3]) / 2
    if ellipse:  # distance to first order: f / |grad f| with f = 1 - radius
        radius_HW = np.hypot(x_W[None] / half_w, y_H[:, None] / half_h)
        slope_HW = np.hypot(x_W[None] / half_w**2, y_H[:, None] / half_h**2)
        inward_HW = (1 - radius_HW) * radius_HW / np.maximum(slope_HW, 1e-9)
        inward_HW = np.where(radius_HW < 0.2, min(half_w, half_h), inward_HW)
    else:
        inward_HW = np.minimum(half_w - abs(x_W)[None], half_h - abs(y_H)[:, None])
    return 1 / (1 + np.exp(-SLOPE * np.clip(inward_HW, -20, 20)))


def paint_mark(
    image_HW3: np.ndarray,
    corner: tuple[int, int],
    strength_SS: np.ndarray,
    rng: np.random.Generator,
) -> None:
    """Add a mark in place, lighter or darker than what is there, where there is room for it."""
    x, y = corner
    side = len(strength_SS)
    patch = image_HW3[y : y + side, x : x + side]
    sign = 1.0 if rng.random() < 0.5 else -1.0
    if not 0 <= patch.mean() + sign * CONTRAST <= 1:  # it would be cut off by white or black
        sign = -sign
    patch += sign * CONTRAST * strength_SS[..., None]


def finish(image_HW3: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """With noise, as uint8."""
    noisy = image_HW3 + NOISE * rng.standard_normal(image_HW3.shape)
    return np.round(255 * np.clip(noisy, 0, 1)).astype(np.uint8)


def _paint_marks(
    image_HW3: np.ndarray,
    box_G4: np.ndarray,
    label_G: np.ndarray,
    marks: Marks,
    law: Law,
    places: np.random.Generator,
    paint: np.random.Generator,
) -> np.ndarray:
    """Paint the glyph of each object in place; returns their centres, float32 (G, 2)."""
    centre_G2 = np.zeros((len(box_G4), 2), np.float32)
    for row, (box, label) in enumerate(zip(box_G4, label_G, strict=True)):
        size = int(places.integers(MARK[0], MARK[1] + 1))
        corner = mark_corner(places, box, size, law.side, law.centred)
        strength_SS = marks.draw(paint, int(label), size)
        paint_mark(image_HW3, corner, strength_SS, paint)
        centre_G2[row] = np.add(corner, size / 2)
    return centre_G2


def mark_corner(
    rng: np.random.Generator, box: np.ndarray, size: int, side: int, centred: bool = False
) -> tuple[int, int]:
    """Whole pixel (x, y) at which the glyph of an object begins; it lies inside of the box."""
    extent = box[2:] - box[:2]
    room = np.minimum(INNER * extent, extent - size)
    shift = (rng.random(2) - 0.5) * room  # drawn in any case, so that all else stays the same
    centre = (box[:2] + box[2:]) / 2 + (0 if centred else shift)
    x, y = np.clip(np.round(centre - size / 2), 0, side - size)
    return int(x), int(y)


def propose(rng: np.random.Generator, box_G4: np.ndarray, law: Law) -> np.ndarray:
    """Proposals float32 (M, 4): `PER_OBJECT` for each object, each side shifted, then random ones.

    As those of a proposal network they end at the border of the image.
    """
    shift_GN4 = rng.uniform(-law.jitter, law.jitter, (len(box_G4), PER_OBJECT, 4))
    extent_G4 = np.tile(box_G4[:, 2:] - box_G4[:, :2], 2)
    near_M4 = (box_G4[:, None] + shift_GN4 * extent_G4[:, None]).reshape(-1, 4)
    size_M2 = rng.uniform(*OBJECT, (ELSEWHERE, 2))
    corner_M2 = rng.random((ELSEWHERE, 2)) * (law.side - size_M2)
    far_M4 = np.concatenate([corner_M2, corner_M2 + size_M2], axis=1)
    return np.clip(np.concatenate([near_M4, far_M4]), 0, law.side).astype(np.float32)
