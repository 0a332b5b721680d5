"""Pictures: filmstrips of clips with what a model thinks of them, and learned temporal offsets.

Letters: N videos, G learned offsets of a block, H W size of a frame. Lengths on a page are pixels.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.log import InputError

DPI = 110
PAGE = 1240  # width
MARGIN, GAP, LINE = 16, 6, 19
IN_LINE = 8  # frames of usual shape beside each other
TALLEST = 190  # frame on the page
BAR, NUMBER = 330, 58  # widths: a probability of 1, and the column of the numbers
PANEL = 400  # width of the offsets beside the bars
BLOCK = 13  # height of a block in that panel

# Colours of Okabe and Ito, which colour-blind readers can tell apart; a sign says the same.
RIGHT, WRONG, UNKNOWN = "#0072B2", "#D55E00", "#56768C"
OFFSETS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
MARKERS = ("o", "s", "^", "D")
TICK, CROSS, MORE = "\N{CHECK MARK}", "\N{BALLOT X}", "\N{HORIZONTAL ELLIPSIS}"


class OffsetTrack(NamedTuple):
    """What one TIN block learned.

    block: name of the block or of its temporal module.
    offset_NG: offsets in frame positions, a row for each video that was looked at.
    """

    block: str
    offset_NG: np.ndarray

    @property
    def name(self) -> str:
        """The name without what is the same for all blocks: "layer1.0"."""
        return self.block.removeprefix("backbone.").removesuffix(".conv1.temporal")


class FilmRow(NamedTuple):
    """One video of a picture.

    frames: (H, W, 3) uint8, red first, in time order; sizes may differ.
    caption: written above the strip.
    predicted: (class, probability) from the best on.
    truth: true classes, or None when nobody knows; then no guess is marked right or wrong.
    numbers: number of each frame in its video, written below it.
    seconds: time of each frame, or None when the rate is unknown.
    tracks: learned offsets, drawn beside the guesses as means over the rows of each track.
    start: the offset of a block that has learned nothing.
    limit: half the scale of the offsets, which they cannot reach.
    """

    frames: Sequence[np.ndarray]
    caption: str
    predicted: Sequence[tuple[str, float]] = ()
    truth: Sequence[str] | None = None
    numbers: Sequence[int] | None = None
    seconds: Sequence[float] | None = None
    tracks: Sequence[OffsetTrack] = ()
    start: float = 0.5
    limit: float = 2.0


def draw_filmstrip(rows: Sequence[FilmRow], path: Path, title: str = "") -> None:
    """Write one picture: for each video its frames, and below them its best guesses as bars.

    Where the truth is given a right guess has a tick, a wrong one a cross.

    Raises:
        ValueError: no row, a row without frames, or lists that do not fit the frames.
        InputError: matplotlib is not installed.
    """
    _save(film_figure(rows, title), path)


def draw_offsets(
    tracks: Sequence[OffsetTrack],
    path: Path,
    start: float = 0.5,
    limit: float = 2.0,
    title: str = "Learned temporal offsets",
) -> None:
    """Write one picture: for each block the spread of each learned offset over the videos.

    A thin line from the least to the largest value, a thick one over the middle half, a sign at
    the mean; the start as a dashed line, the limits as dotted ones.

    Args:
        tracks: one for each block, in the order of the network.
        path: of the PNG; folders are made.
        start: the offset of a block that has learned nothing.
        limit: half the scale of the offsets, which they cannot reach.
        title: above the picture.

    Raises:
        ValueError: no track, or one without videos or offsets.
        InputError: matplotlib is not installed.
    """
    _save(offsets_figure(tracks, start, limit, title), path)


def film_figure(rows: Sequence[FilmRow], title: str = "") -> Any:
    """The matplotlib figure that `draw_filmstrip` writes."""
    if not rows:
        raise ValueError("rows is empty; need at least one video")
    for row in rows:
        _check(row)
    head = _wrapped(title, PAGE - 2 * MARGIN, size=11)
    layouts = [_Layout(row) for row in rows]
    room = min(layout.most_name_width for layout in layouts)
    longest = max((_width(name) for row in rows for name, _ in row.predicted), default=0)
    name_width = min(room, max(longest + 3 * GAP, 120.0))
    top = float(MARGIN) + (1.35 * LINE * len(head.splitlines()) + GAP if head else 0)
    page, axes = _page(PAGE, top + sum(layout.height for layout in layouts) + MARGIN)
    _say(axes, MARGIN, MARGIN, head, va="top", size=11, weight="bold", linespacing=1.3)
    for row, layout in zip(rows, layouts, strict=True):
        _strip(axes, row, layout, top)
        below = top + layout.strip
        _guesses(axes, row, below, name_width)
        if row.tracks:
            _panel(page, row, below)
        top += layout.height
    axes.set(xlim=(0, PAGE), ylim=(top + MARGIN, 0))  # imshow moves them to the last frame
    return page


class _Layout:
    """Sizes of one row on the page."""

    def __init__(self, row: FilmRow) -> None:
        lines = (row.numbers is not None) + (row.seconds is not None)
        self.below = lines * 13 + (3 if lines else 0)
        count = max(min(len(row.frames), IN_LINE), 3)
        room = (PAGE - 2 * MARGIN - GAP * (count - 1)) / count
        self.cells = [_fit(frame, room) for frame in row.frames]
        words = [text for label in _labels(row) for text in label]
        narrowest = max((_width(word, size=7) + GAP for word in words), default=0.0)
        self.pitch = max(*(width for _, width in self.cells), narrowest, 1) + GAP
        self.columns = max(int((PAGE - 2 * MARGIN + GAP) // self.pitch), 1)
        self.tall = max(height for height, _ in self.cells) + self.below + GAP
        self.strip = 1.15 * LINE + self.tall * -(-len(self.cells) // self.columns)
        guesses = LINE * (len(row.predicted) + (row.truth is not None))
        panel = BLOCK * len(row.tracks) + 62 if row.tracks else 0
        self.height = self.strip + max(guesses, panel) + 2.5 * GAP
        beside = BAR + NUMBER + 24 + (PANEL + 4 * GAP if row.tracks else 0)
        self.most_name_width = PAGE - 2 * MARGIN - beside


def _check(row: FilmRow) -> None:
    if not len(row.frames):
        raise ValueError(f"frames of {row.caption!r} is empty; need at least one")
    for frame in row.frames:
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or not frame.size:
            raise ValueError(
                f"a frame of {row.caption!r} is {frame.dtype} {frame.shape}, need uint8 (H, W, 3)"
            )
    for name in ("numbers", "seconds"):
        given = getattr(row, name)
        if given is not None and len(given) != len(row.frames):
            raise ValueError(
                f"{name} of {row.caption!r} has {len(given)} values for {len(row.frames)} frames"
            )
    for track in row.tracks:
        _check_track(track)


def _check_track(track: OffsetTrack) -> None:
    shape = track.offset_NG.shape
    if len(shape) != 2 or not all(shape):
        raise ValueError(f"offset_NG of {track.block!r} is {shape}, need (N, G), neither 0")


def _page(width: float, height: float) -> tuple[Any, Any]:
    """A white figure of that many pixels, and axes over all of it with pixels as their unit."""
    figure = _new_figure(width, height)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    return figure, axes


def _new_figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("matplotlib", "not installed: pip install 'vision-tasks[mmit]'") from error
    return Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


def _say(axes: Any, x: float, y: float, text: str, **style: Any) -> None:
    """Text as it is: a dollar sign in the name of a class or file starts no formula."""
    axes.text(x, y, text, **{"parse_math": False, "va": "center", "size": 8, **style})


def _width(text: str, size: float = 8, bold: bool = False) -> float:
    """Pixels that a line of text takes; a little more than it is, for hinting."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=size, weight="bold" if bold else "normal")
    width, _, _ = text_to_path.get_text_width_height_descent(text, font, ismath=False)
    return 1.02 * float(width) * DPI / 72 + 1


def _short(
    text: str, room: float, size: float = 8, bold: bool = False, keep_end: bool = False
) -> str:
    """The text, or as much of it as `room` pixels hold."""
    kept, said = len(text), text
    while kept > 1 and (wide := _width(said, size, bold)) > room:
        kept = max(min(kept - 1, int(kept * room / wide)), 1)
        said = f"{MORE}{text[-kept:]}" if keep_end else f"{text[:kept]}{MORE}"
    return said


def _wrapped(text: str, room: float, size: float) -> str:
    """Bold text in lines of at most `room` pixels, as far as its words allow."""
    letters = int(0.93 * len(text) * room / _width(text, size, bold=True)) if text else 1
    return textwrap.fill(text, max(letters, 8))


def _fit(frame: np.ndarray, room: float) -> tuple[float, float]:
    """Height and width of a frame on the page; small frames grow by a whole factor."""
    rows, columns = frame.shape[:2]
    factor = min(room / columns, TALLEST / rows)
    factor = float(int(factor)) if factor > 1 else factor
    return max(rows * factor, 1.0), max(columns * factor, 1.0)


def _labels(row: FilmRow) -> list[list[str]]:
    """Lines below each frame."""
    return [
        ([f"frame {row.numbers[t]}"] if row.numbers is not None else [])
        + ([f"{row.seconds[t]:.2f} s"] if row.seconds is not None else [])
        for t in range(len(row.frames))
    ]


def _strip(axes: Any, row: FilmRow, layout: _Layout, top: float) -> None:
    caption = _short(row.caption, PAGE - 2 * MARGIN, size=9, bold=True, keep_end=True)
    _say(axes, MARGIN, top + LINE / 2, caption, size=9, weight="bold")
    labels = _labels(row)
    for t, (frame, (height, width)) in enumerate(zip(row.frames, layout.cells, strict=True)):
        line, column = divmod(t, layout.columns)
        left = MARGIN + column * layout.pitch
        upper = top + 1.15 * LINE + line * layout.tall
        smooth = "hanning" if height < frame.shape[0] else "nearest"
        extent = (left, left + width, upper + height, upper)
        axes.imshow(frame, extent=extent, interpolation=smooth, aspect="auto")
        for number, text in enumerate(labels[t]):
            _say(axes, left, upper + height + 9 + 13 * number, text, size=7, color="#444444")


def _guesses(axes: Any, row: FilmRow, top: float, name_width: float) -> None:
    from matplotlib.patches import Rectangle

    left = MARGIN + 24 + name_width
    middle = top + LINE / 2.0
    for name, probability in row.predicted:
        right = None if row.truth is None else name in row.truth
        colour = UNKNOWN if right is None else RIGHT if right else WRONG
        if right is not None:
            _say(axes, MARGIN + 8, middle, TICK if right else CROSS, color=colour, ha="center",
                 size=10, weight="bold")  # fmt: skip
        _say(axes, MARGIN + 24, middle, _short(name, name_width - 2 * GAP))
        axes.add_patch(Rectangle((left, middle - 6), BAR, 12, facecolor="#E9ECEE", linewidth=0))
        length = BAR * float(np.clip(probability, 0, 1))
        axes.add_patch(Rectangle((left, middle - 6), length, 12, facecolor=colour, linewidth=0))
        _say(axes, left + BAR + NUMBER, middle, f"{100 * probability:.1f} %", ha="right")
        middle += LINE
    if row.truth is not None:
        said = f"true: {', '.join(row.truth) or 'none of the classes'}"
        _say(axes, MARGIN + 24, middle, _short(said, left + BAR + NUMBER - MARGIN - 24))


def _panel(figure: Any, row: FilmRow, top: float) -> None:
    """Mean offsets of every block, the first block at the top."""
    width, height = figure.get_size_inches() * DPI
    names, tall = 90, BLOCK * len(row.tracks)
    left, long = PAGE - MARGIN - PANEL + names, PANEL - names - 8
    axes = figure.add_axes(
        (left / width, 1 - (top + 20 + tall) / height, long / width, tall / height)
    )
    axes.axvline(row.start, color="#888888", lw=1, ls="--")
    for y, track in enumerate(row.tracks):
        for g, value in enumerate(track.offset_NG.mean(axis=0)):
            axes.plot(value, y, markerfacecolor="none" if g else None, **_sign(g))
    reach = _reach(row.tracks, row.start, row.limit)
    axes.set(xlim=(-reach, reach), ylim=(len(row.tracks) - 0.5, -0.5))
    names_short = [_short(t.name, names - 10, size=7) for t in row.tracks]
    axes.set_yticks(range(len(row.tracks)), names_short)
    axes.tick_params(labelsize=7, length=2, pad=2)
    axes.set_xlabel("mean offset in frame positions; dashed: start", size=7, labelpad=2)
    axes.grid(axis="x", color="#DDDDDD", lw=0.6)
    axes.set_axisbelow(True)
    for g in range(_groups(row.tracks)):
        x, above = 0.16 * g + 0.02, 1 + 10 / tall
        axes.plot(x, above, clip_on=False, transform=axes.transAxes,
                  markerfacecolor="none" if g else None, **_sign(g))  # fmt: skip
        _say(axes, x + 0.03, above, f"o{g + 1}", size=7, transform=axes.transAxes)


def _sign(group: int) -> dict[str, Any]:
    """Colour and mark of an offset; they repeat after the fourth."""
    return {
        "marker": MARKERS[group % len(MARKERS)],
        "color": OFFSETS[group % len(OFFSETS)],
        "markersize": 4.5,
    }


def _reach(tracks: Sequence[OffsetTrack], start: float, limit: float) -> float:
    """Half the axis: fixed offsets may lie beyond the limits."""
    return max(limit, abs(start), *(float(np.abs(track.offset_NG).max()) for track in tracks))


def _groups(tracks: Sequence[OffsetTrack]) -> int:
    return max(track.offset_NG.shape[1] for track in tracks)


def offsets_figure(
    tracks: Sequence[OffsetTrack], start: float, limit: float, title: str = ""
) -> Any:
    """The matplotlib figure that `draw_offsets` writes."""
    if not tracks:
        raise ValueError("tracks is empty; need at least one block")
    for track in tracks:
        _check_track(track)
    width = max(640, 150 + 44 * len(tracks))
    names = [_short(track.name, 160) for track in tracks]
    longest = max(map(_width, names))
    upright = longest + 8 > (width - 88) / (len(tracks) + 0.2)
    head = _wrapped(title, width - 2 * MARGIN, size=10)
    above, tall, below = 44 + 18 * len(head.splitlines()), 330, 20 + (longest if upright else 14)
    height = above + tall + below
    figure = _new_figure(width, height)
    axes = figure.add_axes((70 / width, below / height, 1 - 88 / width, tall / height))
    axes.axhline(start, color="black", lw=1, ls="--", label="start")
    axes.axhline(limit, color="black", lw=1, ls=":", label="limits")
    axes.axhline(-limit, color="black", lw=1, ls=":")
    for x, track in enumerate(tracks):
        _spread(axes, x, track)
    reach = 1.08 * _reach(tracks, start, limit)
    axes.set(xlim=(-0.6, len(tracks) - 0.4), ylim=(-reach, reach))
    axes.set_xticks(range(len(tracks)), names, rotation=90 if upright else 0)
    axes.tick_params(labelsize=8)
    axes.set_ylabel("offset in frame positions", size=9)
    axes.grid(axis="y", color="#DDDDDD", lw=0.6)
    axes.set_axisbelow(True)
    for g in range(_groups(tracks)):
        axes.plot([], [], lw=1.2, label=f"o{g + 1}", **_sign(g))
    axes.plot([], [], lw=0, label="mean, middle half, range")
    handles, labels = axes.get_legend_handles_labels()
    place = (60 / width, 1 - (above - 32) / height)
    figure.legend(handles, labels, loc="upper left", ncols=len(handles), fontsize=8,
                  frameon=False, bbox_to_anchor=place)  # fmt: skip
    figure.text(MARGIN / width, 1 - 12 / height, head, va="top", size=10, weight="bold",
                parse_math=False)  # fmt: skip
    return figure


def _spread(axes: Any, x: float, track: OffsetTrack) -> None:
    groups = track.offset_NG.shape[1]
    for g, value_N in enumerate(track.offset_NG.T):
        at, sign = x + 0.36 * (g - (groups - 1) / 2) / max(groups - 1, 1), _sign(g)
        low, first, third, high = np.quantile(value_N, (0, 0.25, 0.75, 1))
        axes.plot((at, at), (low, high), color=sign["color"], lw=1.2)
        axes.plot((at, at), (first, third), color=sign["color"], lw=4, solid_capstyle="butt")
        axes.plot(at, value_N.mean(), mec="white", mew=0.8, **sign)
