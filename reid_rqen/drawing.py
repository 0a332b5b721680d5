"""Strips of frames with the score of each region drawn into them.

Letters: T frames, R regions, H W size of a frame. Lengths of the page are in pixels.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.log import InputError

MAP = "cividis"  # made to look the same to colour-blind readers
TINT = 0.3  # opacity of a band's colour over the picture
CELL = 224  # height of a small frame on the page, by a whole factor: 56 rows x 4
TALLEST = 320  # frames up to this height are shown pixel by pixel
MARGIN, GAP, LINE, NARROWEST = 16, 8, 22, 640
LETTER = 7.5  # widest usual letter of the labels
DPI = 100


class ScoreRow(NamedTuple):
    """One strip: the frames of a set and what a model thinks of their regions.

    frames: (H, W, 3) uint8, red first; sizes may differ.
    score_TR: in [0, 1]; NaN leaves a region without tint and number.
    edges: region borders as ascending fractions of the height, with 0 and 1: (0, 3/7, 5/7, 1).
    label: written above the strip.
    clean_TR: True where a region truly shows the person, or None when nobody knows.
    """

    frames: Sequence[np.ndarray]
    score_TR: np.ndarray
    edges: Sequence[float]
    label: str
    clean_TR: np.ndarray | None = None


class _Box(NamedTuple):
    left: float
    top: float
    width: float
    height: float


def draw_scores(rows: Sequence[ScoreRow], path: Path, title: str = "") -> None:
    """Write one picture: a strip per row, each band outlined and tinted by its score.

    The number is the score. Where `clean_TR` is given, a clean region has a solid border and a
    tick, a covered one a dashed border and a cross.

    Raises:
        ValueError: no row, a row without frames, or shapes that do not fit each other.
        InputError: matplotlib is not installed.
    """
    if not rows:
        raise ValueError("rows is empty; need at least one strip")
    for row in rows:
        _check(row)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("matplotlib", "not installed: pip install 'vision-tasks[rqen]'") from error
    sizes = [[_size(frame) for frame in row.frames] for row in rows]
    strips = [sum(width + GAP for _, width in size) - GAP for size in sizes]
    width = max(NARROWEST, 2 * MARGIN + max(strips))
    title = textwrap.fill(title, int((width - 2 * MARGIN) / LETTER / 1.2))
    top = MARGIN + (LINE * len(title.splitlines()) + GAP if title else 0)
    tall = [LINE + max(height for height, _ in size) + 2 * GAP for size in sizes]
    height = top + sum(tall) + 2 * LINE + MARGIN
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    axes.text(MARGIN, MARGIN, title, va="top", size=11, weight="bold", linespacing=1.3)
    for row, size, step in zip(rows, sizes, tall, strict=True):
        _strip(axes, row, size, top, width)
        top += step
    _legend(figure, axes, width, height, any(row.clean_TR is not None for row in rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


def _check(row: ScoreRow) -> None:
    shape = (len(row.frames), len(row.edges) - 1)
    if not row.frames or row.score_TR.shape != shape:
        raise ValueError(f"score_TR of {row.label!r} is {row.score_TR.shape}, need {shape}, T >= 1")
    if row.clean_TR is not None and row.clean_TR.shape != shape:
        raise ValueError(f"clean_TR of {row.label!r} is {row.clean_TR.shape}, need {shape}")
    for frame in row.frames:
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise ValueError(
                f"a frame of {row.label!r} is {frame.dtype} {frame.shape}, need uint8 (H, W, 3)"
            )


def _size(frame: np.ndarray) -> tuple[int, int]:
    """Height and width of a frame on the page."""
    rows, columns = frame.shape[:2]
    factor = max(1, round(CELL / rows)) if rows <= TALLEST else CELL / rows
    return round(rows * factor), max(1, round(columns * factor))


def _strip(axes: Any, row: ScoreRow, sizes: list[tuple[int, int]], top: float, page: float) -> None:
    room = int((page - 2 * MARGIN) / LETTER)
    label = row.label if len(row.label) <= room else "..." + row.label[3 - room :]
    axes.text(MARGIN, top + LINE / 2, label, va="center", size=9)
    top, left = top + LINE, float(MARGIN)
    for t, (frame, (height, width)) in enumerate(zip(row.frames, sizes, strict=True)):
        smooth = "hanning" if height < frame.shape[0] else "nearest"
        extent = (left, left + width, top + height, top)
        axes.imshow(frame, extent=extent, interpolation=smooth, aspect="auto")
        for r, (start, end) in enumerate(zip(row.edges, row.edges[1:], strict=False)):
            box = _Box(left, top + start * height, width, (end - start) * height)
            clean = None if row.clean_TR is None else bool(row.clean_TR[t, r])
            _band(axes, box, float(row.score_TR[t, r]), clean)
        left += width + GAP
    # imshow moves the limits to the last picture.
    axes.set(xlim=(0, page), ylim=(axes.figure.bbox.height, 0))


def _band(axes: Any, box: _Box, score: float, clean: bool | None) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    known = not np.isnan(score)
    colour = colormaps[MAP](score) if known else (0.5, 0.5, 0.5, 1.0)
    corner, size = (box.left + 1.5, box.top + 1.5), (box.width - 3, box.height - 3)
    if known:
        axes.add_patch(Rectangle(corner, *size, facecolor=colour, alpha=TINT, linewidth=0))
    # A white line below keeps a dark border visible on a dark picture, and dashes apart.
    axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor="white", linewidth=2.6))
    dashes = (0, (3, 2)) if clean is False else "solid"
    axes.add_patch(
        Rectangle(corner, *size, fill=False, edgecolor=colour, linewidth=1.9, linestyle=dashes)
    )
    ink = "black" if not known or _luminance(colour) > 0.5 else "white"
    plate = {"boxstyle": "square,pad=0.2", "facecolor": colour, "edgecolor": "white", "lw": 0.6}
    if known:
        middle = box.top + box.height / 2
        axes.text(box.left + 8, middle, f"{score:.2f}", va="center", size=8, color=ink, bbox=plate)
    if clean is not None:
        _mark(axes, box, clean)


def _mark(axes: Any, box: _Box, clean: bool) -> None:
    plate = {"boxstyle": "circle,pad=0.12", "facecolor": "white", "edgecolor": "black", "lw": 0.6}
    sign = "\N{CHECK MARK}" if clean else "\N{BALLOT X}"
    place = (box.left + box.width - 14, box.top + box.height / 2)
    axes.text(*place, sign, ha="center", va="center", size=8, color="black", bbox=plate)


def _luminance(colour: Sequence[float]) -> float:
    return float(np.dot(colour[:3], (0.2126, 0.7152, 0.0722)))


def _legend(figure: Any, axes: Any, width: float, height: float, marked: bool) -> None:
    from matplotlib.cm import ScalarMappable

    bar = figure.add_axes((MARGIN / width, (MARGIN + LINE) / height, 200 / width, 12 / height))
    colours = ScalarMappable(cmap=MAP)
    colours.set_clim(0, 1)
    figure.colorbar(colours, cax=bar, orientation="horizontal", ticks=(0, 0.5, 1))
    bar.tick_params(labelsize=8, length=3)
    middle = height - MARGIN - LINE - 6
    axes.text(MARGIN + 212, middle, "score of a region", va="center", size=9)
    if marked:
        for left, clean in ((MARGIN + 340, True), (MARGIN + 452, False)):
            _band(axes, _Box(left, middle - 11, 30, 22), float("nan"), clean)
            axes.text(left + 36, middle, "clean" if clean else "covered", va="center", size=9)
