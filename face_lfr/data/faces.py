"""Draws faces: an identity is a row of numbers, and so is what changes between its images.

`Identity` fixes shape and colour (head, hair, eyes, brows, nose, mouth, beard). `Pose` holds what
changes from image to image: rotation, scale, shift, a turn of the head, mouth, gaze, blink, light
and the background. Every shape is a polygon in face coordinates; all points of a face pass
through the pose in one step and are filled anti-aliased, hence an image costs about 40 fills.

Face coordinates: pixels of a `SIDE` x `SIDE` image, origin in the middle of the face, x to the
right, y down. The eyes lie about where aligned faces have them.

Shapes: P points of a polygon, H rows, W columns, 3 = red, green, blue in 0..255.
"""

from dataclasses import dataclass, fields
from typing import Self

import numpy as np

SIDE = 112
CENTRE = (55.5, 58.0)  # column and row of the origin; the column is that of the mirror axis
BITS = 4  # fractional bits of a coordinate given to the rasteriser
ANGLE_P = np.arange(32) * (2 * np.pi / 32)
COS_P, SIN_P = np.cos(ANGLE_P), np.sin(ANGLE_P)
SKIN = np.array([[88.0, 54, 38], [150, 98, 66], [206, 154, 118], [244, 208, 184]])
HAIR = np.array([[26.0, 20, 20], [70, 44, 28], [128, 74, 36], [206, 166, 100], [176, 172, 170]])
IRIS = np.array([[58.0, 36, 22], [122, 84, 40], [84, 122, 66], [70, 116, 168], [120, 130, 140]])

Shape = tuple[np.ndarray, np.ndarray]  # points (P, 2) and colour (3,)


@dataclass(frozen=True)
class Identity:
    """What the images of one person share; every field is uniform in [0, 1)."""

    skin: float
    skin_red: float
    head_width: float
    chin: float
    jaw: float
    ears: float
    hair: float
    hair_dark: float
    hair_width: float
    hair_top: float
    hair_length: float
    hairline: float
    parting: float
    fringe: float
    eye_distance: float
    eye_height: float
    eye_size: float
    eye_open: float
    eye_slant: float
    iris: float
    brow_angle: float
    brow_thick: float
    brow_height: float
    brow_length: float
    nose_length: float
    nose_width: float
    nose_bridge: float
    mouth_width: float
    mouth_height: float
    lip_top: float
    lip_low: float
    lip_red: float
    mouth_curve: float
    beard: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Self:
        """A new person."""
        return cls(*rng.random(len(fields(cls))).tolist())


@dataclass(frozen=True)
class Pose:
    """What changes between the images of one person.

    Attributes:
        angle: rotation in the image plane, radians, clockwise.
        scale: of the face.
        shift: (x, y) in pixels.
        turn: of the head to the side, in pixels by which the middle of the face moves.
        smile: opening of the mouth, in [0, 1].
        gaze: (x, y) of the pupils, in [-1, 1].
        blink: how far the lids are closed, in [0, 1].
        gain: of the light.
        offset: added grey levels.
        gradient: relative change of the light from the middle to the right border.
        ground_33: (3, 3, 3) colours of the background.
        clothes: (3,) colour.
    """

    angle: float
    scale: float
    shift: tuple[float, float]
    turn: float
    smile: float
    gaze: tuple[float, float]
    blink: float
    gain: float
    offset: float
    gradient: float
    ground_33: np.ndarray
    clothes: np.ndarray

    @classmethod
    def draw(cls, rng: np.random.Generator, strength: float = 1.0) -> Self:
        """A new image; `strength` scales every range of pose, expression and light."""
        a, b, c, d, e, f, g, h, i = (strength * rng.uniform(-1.0, 1.0, 9)).tolist()
        grey = rng.uniform(45.0, 210.0, (3, 3, 1)) + rng.uniform(-40.0, 40.0, (3, 3, 3))
        level = strength * rng.random()
        return cls(
            angle=np.deg2rad(12) * a,
            scale=1 + 0.08 * b,
            shift=(0.04 * SIDE * c, 0.04 * SIDE * d),
            turn=8.0 * e,
            smile=level * level,
            gaze=(f, 0.6 * g),
            blink=0.9 * strength * float(rng.random() ** 4),
            gain=1 + (0.35 if h > 0 else 0.4) * h,
            offset=25.0 * i,
            gradient=0.35 * strength * float(rng.uniform(-1.0, 1.0)),
            ground_33=np.clip(grey, 0, 255).astype(np.uint8),
            clothes=rng.integers(20, 220, 3).astype(float),
        )


def between(low: float, high: float, value: float) -> float:
    """`value` in [0, 1] mapped to [low, high]."""
    return low + (high - low) * value


def blend(palette_K3: np.ndarray, value: float) -> np.ndarray:
    """(3,) colour at `value` in [0, 1] along the K colours of a palette."""
    place = value * (len(palette_K3) - 1)
    first = min(int(place), len(palette_K3) - 2)
    return palette_K3[first] + (place - first) * (palette_K3[first + 1] - palette_K3[first])


def ellipse(x: float, y: float, width: float, height: float, angle: float = 0.0) -> np.ndarray:
    """(P, 2) points of an ellipse with half axes `width` and `height`, turned by `angle`."""
    u_P, v_P = width * COS_P, height * SIN_P
    if angle:
        cos, sin = np.cos(angle), np.sin(angle)
        u_P, v_P = cos * u_P - sin * v_P, sin * u_P + cos * v_P
    return np.stack([x + u_P, y + v_P], axis=1)


def render(face: Identity, pose: Pose) -> np.ndarray:
    """Image uint8 (SIDE, SIDE, 3), RGB; a function of the two arguments alone."""
    import cv2

    image_HW3 = cv2.resize(pose.ground_33, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    shapes = [*_behind(face, pose), *_head(face), *_middle(face), *_mouth(face, pose)]
    for side in (-1, 1):
        shapes += _eye(face, pose, side)
    shapes += _front_hair(face)
    point_M2 = _posed(np.concatenate([points for points, _ in shapes]), _width(face), pose)
    fixed_M2 = np.round(point_M2 * 2**BITS).astype(np.int32)
    start = 0
    for points, colour in shapes:
        stop = start + len(points)
        cv2.fillPoly(
            image_HW3, [fixed_M2[start:stop]], colour.tolist(), lineType=cv2.LINE_AA, shift=BITS
        )
        start = stop
    return _lit(image_HW3, pose)


def _posed(point_M2: np.ndarray, width: float, pose: Pose) -> np.ndarray:
    """Points (M, 2) in image coordinates: the turn moves the middle of the face the most."""
    x_M, y_M = point_M2[:, 0], point_M2[:, 1]
    depth_M = np.sqrt(np.clip(1 - (x_M / (1.25 * width)) ** 2 - (y_M / 75) ** 2, 0, 1))
    x_M = x_M + pose.turn * depth_M
    cos, sin = pose.scale * np.cos(pose.angle), pose.scale * np.sin(pose.angle)
    column_M = CENTRE[0] + pose.shift[0] + cos * x_M - sin * y_M
    row_M = CENTRE[1] + pose.shift[1] + sin * x_M + cos * y_M
    return np.stack([column_M, row_M], axis=1)


def _lit(image_HW3: np.ndarray, pose: Pose) -> np.ndarray:
    light_W1 = pose.gain * (1 + pose.gradient * np.linspace(-1, 1, SIDE, dtype=np.float32))[:, None]
    lit_HW3 = image_HW3 * light_W1.astype(np.float32) + np.float32(pose.offset)
    return np.clip(lit_HW3, 0, 255).astype(np.uint8)


def _width(face: Identity) -> float:
    return between(30, 39, face.head_width)


def _skin(face: Identity) -> np.ndarray:
    return blend(SKIN, face.skin) * (1 + np.array([0.08, -0.02, -0.05]) * (face.skin_red - 0.5))


def _hair(face: Identity) -> np.ndarray:
    return blend(HAIR, face.hair) * between(0.7, 1.1, face.hair_dark)


def _outline(face: Identity, grow: float = 1.0) -> np.ndarray:
    """(P, 2) border of the face: half an ellipse above, narrowing to the chin below."""
    width, chin = grow * _width(face), grow * between(40, 49, face.chin)
    jaw = between(0.05, 0.32, face.jaw)
    low_P = np.clip(SIN_P, 0, None)
    x_P = width * COS_P * (1 - jaw * low_P**2)
    return np.stack([x_P, np.where(SIN_P > 0, chin, grow * 44) * SIN_P], axis=1)


def _behind(face: Identity, pose: Pose) -> list[Shape]:
    """Shoulders, neck, the hair behind the head and the ears."""
    hair, skin, width = _hair(face), _skin(face), _width(face)
    reach = width + between(3, 12, face.hair_width)
    top = between(48, 58, face.hair_top)
    long = face.hair_length > 0.5
    low = between(20, 62, 2 * face.hair_length - 1) if long else between(-5, 5, face.hair_length)
    middle, half = (low - top) / 2, (low + top) / 2
    ear_y, ear = 3.0, between(6.0, 10.0, face.ears)
    shapes = [
        (ellipse(0, middle, reach, half), 0.8 * hair),
        (ellipse(0, 84, 58, 32), pose.clothes),
        (ellipse(0, 52, 0.5 * width, 26), 0.78 * skin),
    ]
    for side in (-1, 1):
        shapes.append((ellipse(side * (width + 0.5), ear_y, 0.55 * ear, ear), 0.86 * skin))
    return shapes


def _head(face: Identity) -> list[Shape]:
    """The face in three tones of skin, and the beard of those who have one."""
    skin = _skin(face)
    shapes = [(_outline(face), 0.93 * skin), (_outline(face, 0.92), 0.97 * skin)]
    if face.beard > 0.7:
        strength = between(0.15, 0.8, (face.beard - 0.7) / 0.3)
        beard = _outline(face, 0.97)
        beard[:, 1] = np.where(SIN_P > 0.35, beard[:, 1], 20 + 0.12 * np.abs(beard[:, 0]))
        shapes.append((beard, (1 - strength) * skin + strength * _hair(face)))
        shapes.append((ellipse(0, 22, 0.62 * _width(face), 14), skin))
    shapes.append((ellipse(0, -14, 0.72 * _width(face), 17), np.minimum(1.03 * skin, 255)))
    for size, red in ((8.0, 0.5), (5.0, 1.0)):
        flush = np.minimum(skin * (1 - red * np.array([-0.02, 0.06, 0.07])), 255)
        for side in (-1, 1):
            shapes.append((ellipse(side * 0.56 * _width(face), 15, size, 0.75 * size), flush))
    return shapes


def _middle(face: Identity) -> list[Shape]:
    """The nose: a ridge with a light side, the tip and two nostrils."""
    skin = _skin(face)
    tip = between(11, 19, face.nose_length)
    width = between(4.5, 9.5, face.nose_width)
    ridge = between(1.6, 3.6, face.nose_bridge)
    side = np.array([[-ridge, -8], [ridge, -8], [0.8 * width, tip], [-0.8 * width, tip]])
    shapes = [
        (side, 0.94 * skin),
        (ellipse(0, tip, width, 4.2), 0.89 * skin),
        (ellipse(0, tip / 2 - 3, ridge, tip / 2 + 4), np.minimum(1.04 * skin, 255)),
        (ellipse(0, tip - 1, 0.55 * width, 3.4), np.minimum(1.05 * skin, 255)),
    ]
    for sign in (-1, 1):
        shapes.append((ellipse(sign * 0.5 * width, tip + 2.2, 0.24 * width, 1.2), 0.45 * skin))
    return shapes


def _mouth(face: Identity, pose: Pose) -> list[Shape]:
    """Two lips, and teeth in the dark between them when the mouth is open."""
    y = between(25, 33, face.mouth_height)
    half = between(10, 17, face.mouth_width) * (1 + 0.12 * pose.smile)
    top, low = between(1.6, 4.2, face.lip_top), between(2.0, 5.2, face.lip_low)
    gap = 6.0 * pose.smile
    red = np.array([1.0, between(0.45, 0.85, face.lip_red), between(0.5, 0.85, face.lip_red)])
    lip = 0.9 * _skin(face) * red
    curve = between(-1.5, 4.0, face.mouth_curve) + 2.0 * pose.smile
    shapes = [
        (ellipse(0, y + gap / 2, half, low + gap / 2 + 0.6), lip),
        (ellipse(0, y - 0.5, 0.97 * half, top + 0.4), 0.9 * lip),
        (ellipse(0, y + gap / 2, 0.86 * half, gap / 2 + 0.7), 0.35 * lip),
    ]
    if gap > 1.5:
        shapes.append((ellipse(0, y + 0.28 * gap, 0.7 * half, 0.2 * gap), np.full(3, 232.0)))
    for points, _ in shapes:
        points[:, 1] -= curve * ((points[:, 0] / half) ** 2 - 0.4)
    return shapes


def _eye(face: Identity, pose: Pose, side: int) -> list[Shape]:
    """One eye and its brow; `side` is -1 for the left of the image, 1 for the right."""
    x = side * between(13.5, 20.0, face.eye_distance)
    y = between(-10, -3, face.eye_height)
    half = between(5.0, 8.2, face.eye_size)
    height = half * between(0.34, 0.66, face.eye_open) * (1 - pose.blink)
    slant = side * between(0.18, -0.22, face.eye_slant)
    skin, radius = _skin(face), 0.56 * half
    look = (x + 0.3 * half * pose.gaze[0], y + 0.25 * height * pose.gaze[1])
    shapes = [
        (ellipse(x, y - 1.0, half + 1.6, height + 2.2, slant), 0.84 * skin),
        (ellipse(x, y - 0.7, half + 0.7, height + 0.8, slant), 0.28 * skin),
        (ellipse(x, y, half, height, slant), np.array([238.0, 236, 232])),
    ]
    for size, colour in ((radius, blend(IRIS, face.iris)), (0.5 * radius, np.full(3, 14.0))):
        points = ellipse(*look, size, size)
        room_P = height * np.sqrt(np.clip(1 - ((points[:, 0] - x) / half) ** 2, 0, 1))
        line_P = y + np.tan(slant) * (points[:, 0] - x)
        points[:, 1] = np.clip(points[:, 1], line_P - room_P, line_P + room_P)
        shapes.append((points, colour))
    if height > 1.5:
        shapes.append((ellipse(look[0] + 1.1, look[1] - 1.0, 0.8, 0.8), np.full(3, 250.0)))
    return [*shapes, _brow(face, side, x, y)]


def _brow(face: Identity, side: int, x: float, y: float) -> Shape:
    length, thick = between(7.0, 11.5, face.brow_length), between(0.9, 2.9, face.brow_thick)
    points = ellipse(0, 0, length, thick)
    points[:, 1] += 2.0 * (points[:, 0] / length) ** 2
    angle = side * between(-0.25, 0.3, face.brow_angle)
    cos, sin = np.cos(angle), np.sin(angle)
    turned = np.stack(
        [cos * points[:, 0] - sin * points[:, 1], sin * points[:, 0] + cos * points[:, 1]], axis=1
    )
    lift = between(9.0, 14.5, face.brow_height)
    return turned + np.array([1.04 * x, y - lift]), 0.75 * _hair(face) + 0.1 * _skin(face)


def _front_hair(face: Identity) -> list[Shape]:
    """The hair above the forehead, between the top of the head and the hairline."""
    width = _width(face)
    reach, top = width + between(3, 12, face.hair_width), between(48, 58, face.hair_top)
    turn_P = np.linspace(np.pi, 2 * np.pi, 20)
    reach_P = width + (reach - width) * np.sqrt(-np.sin(turn_P).clip(-1, 0))
    top_P2 = np.stack([reach_P * np.cos(turn_P), -2 + (top - 2) * np.sin(turn_P)], axis=1)
    x_P = np.linspace(0.97 * width, -0.97 * width, 20)
    part = between(-0.6, 0.6, face.parting) * width
    line = between(-36, -22, face.hairline)
    drop_P = between(6, 26, face.fringe) * np.abs((x_P - part) / (1.6 * width)) ** 1.5
    side_P = np.clip(np.abs(x_P) / width - 0.75, 0, None) * 70
    low_P2 = np.stack([x_P, np.minimum(line + drop_P + side_P, -2)], axis=1)
    return [(np.concatenate([top_P2, low_P2]), _hair(face))]


def contact_sheet(rows: list[list[np.ndarray]]) -> np.ndarray:
    """One image of a grid of images of equal size, a row for each list."""
    return np.concatenate([np.concatenate(row, axis=1) for row in rows], axis=0)
