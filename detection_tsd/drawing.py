"""Pictures: detections beside the truth, and where the two branches of TSD look.

All functions return or take images uint8 (H, W, 3), red first; small images are enlarged by a whole
factor first, so that names can be read.

Letters: H W rows and columns, G objects, D detections, R proposals, S bins of a pooling, 4 box
(xyxy in pixels of the image).
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.log import InputError
from detection_tsd.data.detection_data import Annotation, Detections
from detection_tsd.engine import Found
from detection_tsd.probe import Shifts

SHOWN = 384  # pixels, of the long side of a small image on the page
GAP = 10
DASH = 6
MARGIN = 8.0  # pixels of the image around a proposal that is shown by itself
BLACK, GREY, OUTSIDE = (0, 0, 0), (150, 150, 150), (225, 225, 225)

# Okabe and Ito's colours, which colour-blind readers can tell apart; dashes say the same.
FOUND, TRUTH, MOVED, LOOKED = (240, 228, 66), (255, 255, 255), (213, 94, 0), (86, 180, 233)


class Sign(NamedTuple):
    """An entry of a legend: line, dashed line or dot."""

    text: str
    colour: tuple[int, int, int]
    kind: str = "line"


DETECTION_SIGNS = (Sign("detection: class and score", FOUND), Sign("truth", TRUTH, "dashed"))
SHIFT_SIGNS = (
    Sign("truth", TRUTH, "dashed"),
    Sign("proposal P", FOUND),
    Sign("P_r, for the box", MOVED),
    Sign("bins of P_c, for the class", LOOKED, "dot"),
)


def draw_detections(
    image_HW3: np.ndarray,
    found: Detections | Found,
    classes: Sequence[str],
    truth: Annotation | None = None,
    least_score: float = 0.3,
    most: int = 50,
) -> np.ndarray:
    """A copy of an image with its best detections, their class and score; the truth is dashed.

    Args:
        image_HW3: the image.
        found: detections in its pixels, best first; masks as run-length codes are tinted.
        classes: names; label k is classes[k - 1].
        truth: objects and, fainter, crowds.
        least_score: of the detections that are drawn.
        most: detections that are drawn.

    Raises:
        ValueError: the image has another type or shape, or a label has no name.
        InputError: OpenCV is not installed.
    """
    _check_image(image_HW3)
    given = (found.box_D4, found.score_D, found.label_D)
    box_D4, score_D, label_D = (np.asarray(value) for value in given)
    shown_D = np.flatnonzero(score_D >= least_score)[:most]
    image_HW3 = _tinted(image_HW3, found, shown_D)
    canvas, factor = enlarged(image_HW3)
    for row in shown_D[::-1]:  # the best ends on top
        _box(canvas, box_D4[row] * factor, FOUND)
    if truth is not None:  # above the detections, which show between its dashes
        for box in truth.crowd_I4:
            _box(canvas, box * factor, GREY, dashed=True)
        for box in truth.box_G4:
            _box(canvas, box * factor, TRUTH, dashed=True)
    taken: list[tuple[int, int, int, int]] = []
    for row in shown_D:
        name = f"{_name(classes, int(label_D[row]))} {score_D[row]:.2f}"
        _tag(canvas, box_D4[row] * factor, name, FOUND, taken)
    if truth is not None:
        for box, label in zip(truth.box_G4, truth.label_G, strict=True):
            _tag(canvas, box * factor, _name(classes, int(label)), TRUTH, taken, below=True)
    return canvas


def draw_shifts(image_HW3: np.ndarray, shifts: Shifts, row: int) -> np.ndarray:
    """One proposal of an image, enlarged: its P_r, the bins of its P_c and the true box.

    Args:
        image_HW3: the image.
        shifts: see `detection_tsd.probe.find_shifts`.
        row: which of its proposals.

    Raises:
        ValueError: the image has another type or shape, or there is no such proposal.
        InputError: OpenCV is not installed.
    """
    import cv2

    _check_image(image_HW3)
    if not 0 <= row < len(shifts.roi_R4):
        raise ValueError(f"row={row}, but there are {len(shifts.roi_R4)} proposals")
    roi, moved, truth = (part[row] for part in (shifts.roi_R4, shifts.shifted_R4, shifts.truth_R4))
    point_S2 = shifts.point_RS2[row]
    canvas, factor, corner = _window(image_HW3, np.stack([roi, moved, truth]))
    place = np.tile(corner, 2)
    _box(canvas, (roi - place) * factor, FOUND)
    _box(canvas, (moved - place) * factor, MOVED)
    _box(canvas, (truth - place) * factor, TRUTH, dashed=True)
    for point in (point_S2 - corner) * factor:
        _dot(canvas, point, LOOKED)
    tail, head = (((box[:2] + box[2:]) / 2 - corner) * factor for box in (roi, moved))
    if np.hypot(*(head - tail)) >= 3:
        for colour, width in ((BLACK, 4), (MOVED, 2)):
            cv2.arrowedLine(canvas, _whole(tail), _whole(head), colour, width, cv2.LINE_AA, 0, 0.3)
    return canvas


def gallery(
    pictures: Sequence[np.ndarray],
    path: Path,
    captions: Sequence[str] = (),
    signs: Sequence[Sign] = (),
    title: str = "",
    columns: int = 4,
) -> None:
    """Write pictures side by side as one PNG.

    Args:
        pictures: of any sizes.
        path: of the PNG; folders are made.
        captions: one for each picture, written above it; shortened where they do not fit.
        signs: legend, at the foot.
        title: at the head.
        columns: pictures in a row.

    Raises:
        ValueError: no pictures, or another number of captions.
        InputError: OpenCV is not installed, or the file cannot be written.
    """
    cv2 = _opencv()
    if not pictures or columns < 1:
        raise ValueError(f"{len(pictures)} pictures in {columns} columns: need at least 1 of each")
    if captions and len(captions) != len(pictures):
        raise ValueError(f"{len(captions)} captions for {len(pictures)} pictures")
    for picture in pictures:
        _check_image(picture)
    cells = _cells(pictures, captions)
    lines = [cells[first : first + columns] for first in range(0, len(cells), columns)]
    page = _stacked([_beside(line) for line in lines])
    wide = max(page.shape[1], _legend_width(signs), _text_size(title, 0.6)[0] + 2 * GAP)
    parts = [part for part in (_head(title, wide), page, _legend(signs, wide)) if part is not None]
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), _stacked(parts)[..., ::-1]):
        raise InputError(path, "cannot be written")


def enlarged(image_HW3: np.ndarray) -> tuple[np.ndarray, int]:
    """A copy of an image, larger by a whole factor when it is small, and that factor."""
    factor = max(1, round(SHOWN / max(image_HW3.shape[:2])))
    return image_HW3.repeat(factor, axis=0).repeat(factor, axis=1).copy(), factor


def _opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise InputError("opencv", "not installed: pip install 'vision-tasks[tsd]'") from error
    return cv2


def _check_image(image_HW3: np.ndarray) -> None:
    _opencv()
    good = image_HW3.dtype == np.uint8 and image_HW3.ndim == 3 and image_HW3.shape[2] == 3
    if not good or not image_HW3.size:
        raise ValueError(f"image is {image_HW3.dtype} {image_HW3.shape}, need uint8 (H, W, 3)")


def _name(classes: Sequence[str], label: int) -> str:
    if not 1 <= label <= len(classes):
        raise ValueError(f"label={label} is not in 1..{len(classes)}")
    return classes[label - 1]


def _tinted(image_HW3: np.ndarray, found: Detections | Found, shown_D: np.ndarray) -> np.ndarray:
    """With the masks of the detections that are shown, where there are run-length codes."""
    if not isinstance(found, Found) or found.masks is None:
        return image_HW3
    from pycocotools import mask

    image = image_HW3.astype(np.float32)
    for row in shown_D:
        inside_HW = mask.decode(found.masks[row]).astype(bool)
        image[inside_HW] = 0.55 * image[inside_HW] + 0.45 * np.array(FOUND)
    return np.round(image).astype(np.uint8)


def _window(image_HW3: np.ndarray, box_R4: np.ndarray) -> tuple[np.ndarray, int, np.ndarray]:
    """The square around some boxes, enlarged; the factor, and its corner (x, y) in the image.

    Where it reaches beyond the image it is light grey.
    """
    low, high = box_R4[:, :2].min(axis=0), box_R4[:, 2:].max(axis=0)
    side = int(np.ceil((high - low).max() + 2 * MARGIN))
    corner = np.round((low + high - side) / 2).astype(int)
    window = np.full((side, side, 3), OUTSIDE, np.uint8)
    height, width = image_HW3.shape[:2]
    x1, y1 = np.clip(corner, 0, (width, height))
    x2, y2 = np.clip(corner + side, 0, (width, height))
    left, top = x1 - corner[0], y1 - corner[1]
    window[top : top + y2 - y1, left : left + x2 - x1] = image_HW3[y1:y2, x1:x2]
    canvas, factor = enlarged(window)
    return canvas, factor, corner


def _whole(point: np.ndarray) -> tuple[int, int]:
    return round(float(point[0])), round(float(point[1]))


def _box(
    canvas: np.ndarray, box: np.ndarray, colour: tuple[int, int, int], dashed: bool = False
) -> None:
    """A rectangle with a dark edge, in place, so that it shows on any ground."""
    x1, y1, x2, y2 = (float(value) for value in np.clip(box, -(2**15), 2**15))
    corners = [(x1, y1), (x2, y1), (x2, y2), (x1, y2), (x1, y1)]
    for ink, width in ((BLACK, 4), (colour, 2)):
        for start, end in pairwise(corners):
            _line(canvas, np.array(start), np.array(end), ink, width, dashed)


def _line(
    canvas: np.ndarray,
    start: np.ndarray,
    end: np.ndarray,
    colour: tuple[int, int, int],
    width: int,
    dashed: bool = False,
) -> None:
    import cv2

    # A dash every two lengths; the last one is cut off at the end.
    length = max(float(np.hypot(*(end - start))), 1e-6)
    pieces = np.arange(0, length, 2 * DASH) if dashed else np.zeros(1)
    step = DASH if dashed else length
    for first in pieces:
        places = [start + (end - start) * min(at / length, 1) for at in (first, first + step)]
        cv2.line(canvas, _whole(places[0]), _whole(places[1]), colour, width)


def _dot(canvas: np.ndarray, point: np.ndarray, colour: tuple[int, int, int]) -> None:
    import cv2

    if np.all(np.abs(point) < 2**15):
        cv2.circle(canvas, _whole(point), 4, BLACK, -1, cv2.LINE_AA)
        cv2.circle(canvas, _whole(point), 3, colour, -1, cv2.LINE_AA)


def _text_size(text: str, scale: float = 0.45) -> tuple[int, int]:
    import cv2

    (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
    return width, height


def _write(
    canvas: np.ndarray, x: int, base: int, text: str, colour: tuple[int, int, int], scale: float
) -> None:
    import cv2

    cv2.putText(canvas, text, (x, base), cv2.FONT_HERSHEY_SIMPLEX, scale, colour, 1, cv2.LINE_AA)


def _tag(
    canvas: np.ndarray,
    box: np.ndarray,
    text: str,
    colour: tuple[int, int, int],
    taken: list[tuple[int, int, int, int]],
    below: bool = False,
) -> None:
    """Text on a dark ground above the box, or below it; moved until it hides no other tag."""
    width, height = _text_size(text)
    tall, wide = height + 6, width + 6
    rows, columns = canvas.shape[:2]
    x = int(np.clip(box[0], 0, max(columns - wide, 0)))
    first = box[3] + 2 if below else box[1] - tall - 2
    step = tall if below or box[1] < tall + 2 else -tall
    y = int(np.clip(first, 0, max(rows - tall, 0)))
    for _ in range(8):
        if not any(x < c and a < x + wide and y < d and b < y + tall for a, b, c, d in taken):
            break
        y = int(np.clip(y + step, 0, max(rows - tall, 0)))
        step = -2 * step if y in (0, max(rows - tall, 0)) else step
    taken.append((x, y, x + wide, y + tall))
    ground = canvas[y : y + tall, x : x + wide]
    ground[:] = ground // 5
    _write(canvas, x + 3, y + tall - 4, text, colour, 0.45)


def _cells(pictures: Sequence[np.ndarray], captions: Sequence[str]) -> list[np.ndarray]:
    """Each picture with its caption above it."""
    cells = []
    for number, picture in enumerate(pictures):
        strip = np.full((24 if captions else 0, picture.shape[1], 3), 255, np.uint8)
        if captions:
            _write(strip, 2, 17, _shortened(captions[number], picture.shape[1] - 4), BLACK, 0.45)
        cells.append(np.concatenate([strip, picture]))
    return cells


def _shortened(text: str, room: int) -> str:
    if _text_size(text)[0] <= room:
        return text
    while text and _text_size(f"{text}...")[0] > room:
        text = text[:-1]
    return f"{text}..."


def _beside(cells: Sequence[np.ndarray]) -> np.ndarray:
    tall = max(cell.shape[0] for cell in cells)
    parts: list[np.ndarray] = []
    for cell in cells:
        below = ((0, tall - cell.shape[0]), (0, GAP), (0, 0))
        parts.append(np.pad(cell, below, constant_values=255))
    return np.pad(np.concatenate(parts, axis=1), ((GAP, 0), (GAP, 0), (0, 0)), constant_values=255)


def _stacked(parts: Sequence[np.ndarray]) -> np.ndarray:
    wide = max(part.shape[1] for part in parts)
    pads = [((0, 0), (0, wide - part.shape[1]), (0, 0)) for part in parts]
    rows = [np.pad(part, pad, constant_values=255) for part, pad in zip(parts, pads, strict=True)]
    return np.concatenate(rows)


def _head(title: str, wide: int) -> np.ndarray | None:
    if not title:
        return None
    strip = np.full((32, wide, 3), 255, np.uint8)
    _write(strip, GAP, 24, title, BLACK, 0.6)
    return strip


def _legend_width(signs: Sequence[Sign]) -> int:
    return GAP + sum(44 + _text_size(sign.text, 0.5)[0] + 2 * GAP for sign in signs)


def _legend(signs: Sequence[Sign], wide: int) -> np.ndarray | None:
    """A strip that says what the lines mean, on the grey of a picture."""
    if not signs:
        return None
    strip = np.full((36, wide, 3), 255, np.uint8)
    x = GAP
    for sign in signs:
        strip[8:30, x : x + 36] = 120
        if sign.kind == "dot":
            _dot(strip, np.array([x + 18, 19]), sign.colour)
        else:
            for ink, width in ((BLACK, 4), (sign.colour, 2)):
                ends = np.array([x + 4, 19]), np.array([x + 32, 19])
                _line(strip, *ends, ink, width, sign.kind == "dashed")
        _write(strip, x + 44, 24, sign.text, BLACK, 0.5)
        x += 44 + _text_size(sign.text, 0.5)[0] + 2 * GAP
    return strip
