"""Filmstrips and learned offsets: what is drawn, where, in which colour, and that it is legible."""

from itertools import combinations
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from video_mmit.drawing import (
    CROSS,
    MORE,
    PAGE,
    RIGHT,
    TICK,
    UNKNOWN,
    WRONG,
    FilmRow,
    OffsetTrack,
    draw_filmstrip,
    draw_offsets,
    film_figure,
    offsets_figure,
)

LONG = "pretending to put something onto something so that it falls down again, or so it seems, $5"
PREDICTED = [("right", 0.75), ("up", 0.5), (LONG, 0.25), ("playing+music", 0.0)]


def clip(count: int, height: int = 64, width: int = 64) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 200, (count, height, width, 3), np.uint8))


def row(count: int = 8, height: int = 64, width: int = 64, **change: Any) -> FilmRow:
    numbers = [1000 * i for i in range(count)]
    seconds = [111.11 * i for i in range(count)]
    given = {"predicted": PREDICTED, "numbers": numbers, "seconds": seconds} | change
    return FilmRow(clip(count, height, width), "videos/right/a.mp4 " + "x" * 200, **given)


def tracks(blocks: int = 3, groups: int = 2, videos: int = 9) -> list[OffsetTrack]:
    offset_LNG = np.random.default_rng(0).uniform(-2, 2, (blocks, videos, groups))
    return [OffsetTrack(f"backbone.layer3.{i}.conv1.temporal", x) for i, x in enumerate(offset_LNG)]


def texts(figure: Any) -> list[Text]:
    """Everything that is written, without the tick labels of axes that are switched off."""
    hidden = [axes for axes in figure.axes if not axes.axison]
    off = {t for axes in hidden for t in (*axes.xaxis.findobj(Text), *axes.yaxis.findobj(Text))}
    return [t for t in figure.findobj(Text) if t.get_text() and t.get_visible() and t not in off]


def check_legible(figure: Any) -> None:
    """No text touches another or a frame, or leaves the page."""
    figure.draw_without_rendering()
    width, height = figure.bbox.size
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts(figure)]
    assert len(boxes) > 3
    for said, box in boxes:
        assert box.x0 >= 0, said
        assert box.y0 >= 0, said
        assert box.x1 <= width, said
        assert box.y1 <= height, said
    images = [image.get_window_extent() for axes in figure.axes for image in axes.images]
    boxes += [("a frame", box) for box in images]
    for (a, first), (b, second) in combinations(boxes, 2):
        apart = (
            first.x1 <= second.x0 or second.x1 <= first.x0
            or first.y1 <= second.y0 or second.y1 <= first.y0
        )  # fmt: skip
        assert apart, (a, b)


@pytest.mark.parametrize(
    "rows",
    [
        [row(8), row(8, truth=["right", LONG])],
        [row(32, 427, 240, tracks=tracks(33))],
        [row(1, 480, 640, numbers=[0], seconds=None)],
        [row(2, 5, 4000), row(5, 3000, 7)],
        [row(3, 1, 1, tracks=tracks(1, groups=4), truth=[])],
    ],
    ids=["two_rows", "portrait", "one_frame", "extreme_shapes", "one_pixel"],
)
def test_filmstrips_are_legible(rows: list[FilmRow]) -> None:
    check_legible(film_figure(rows, "a title of many words " * 9))


@pytest.mark.parametrize(("blocks", "groups"), [(1, 1), (3, 2), (33, 2), (16, 5)])
def test_offsets_are_legible(blocks: int, groups: int) -> None:
    check_legible(offsets_figure(tracks(blocks, groups), 0.5, 2.0, "a title of many words " * 5))


def drawn(path: Path, *rows: FilmRow, title: str = "") -> np.ndarray:
    draw_filmstrip(rows, path / "new" / "x.png", title)
    return cv2.imread(str(path / "new" / "x.png"))[..., ::-1].astype(float)


def pixels(picture_HW3: np.ndarray, colour: str) -> np.ndarray:
    """Where the picture has this colour, (H, W) bool."""
    return np.abs(picture_HW3 - 255 * np.array(to_rgb(colour))).max(axis=-1) < 4


def test_every_frame_is_shown_in_order_by_a_whole_factor(tmp_path: Path) -> None:
    frames = clip(8)
    picture = drawn(tmp_path, row(8)._replace(frames=frames))
    assert picture.shape[1] == PAGE
    area = np.repeat(np.repeat(frames[0], 2, axis=0), 2, axis=1)
    spots = np.argwhere((picture[:, :60] == area[0, 0]).all(axis=-1))
    top, left = next(
        spot for spot in spots
        if (picture[spot[0] : spot[0] + 128, spot[1] : spot[1] + 128] == area).all()
    )  # fmt: skip
    for number, frame in enumerate(frames):
        area = np.repeat(np.repeat(frame, 2, axis=0), 2, axis=1)
        start = left + number * (128 + 6)
        np.testing.assert_array_equal(picture[top : top + 128, start : start + 128], area)


def test_frames_wrap_into_lines(tmp_path: Path) -> None:
    heights = [drawn(tmp_path, row(count)).shape[0] for count in (8, 9, 17)]
    assert heights[1] == heights[0]  # a ninth fits into the page
    assert heights[2] > heights[1] + 128


def test_bars_have_the_length_of_the_probability(tmp_path: Path) -> None:
    dark = [np.zeros((64, 64, 3), np.uint8)]
    picture = drawn(tmp_path, FilmRow(dark, "a", PREDICTED))
    lengths = pixels(picture, UNKNOWN).sum(axis=1)
    found = sorted(set(lengths[lengths > 10]))
    np.testing.assert_allclose(found, [330 / 4, 330 / 2, 330 * 3 / 4], atol=2)


def test_truth_has_colours_and_signs(tmp_path: Path) -> None:
    plain = FilmRow([np.zeros((64, 64, 3), np.uint8)], "a", PREDICTED)
    for truth, right, wrong in ((["right"], 0.75, 0.5), (["up", LONG], 0.5, 0.75)):
        known = plain._replace(truth=truth)
        picture = drawn(tmp_path, known)
        assert pixels(picture, RIGHT).sum(axis=1).max() == pytest.approx(330 * right, abs=6)
        assert pixels(picture, WRONG).sum(axis=1).max() == pytest.approx(330 * wrong, abs=6)
        assert not pixels(picture, UNKNOWN).any()
        said = [text.get_text() for text in texts(film_figure([known]))]
        assert said.count(TICK) == len(truth)
        assert said.count(CROSS) == 4 - len(truth)
        assert any(text.startswith("true: " + truth[0]) for text in said)
    unknown = drawn(tmp_path, plain)
    assert not (pixels(unknown, RIGHT) | pixels(unknown, WRONG)).any()
    assert {TICK, CROSS}.isdisjoint(text.get_text() for text in texts(film_figure([plain])))


def test_numbers_and_times_stand_below_their_frames() -> None:
    figure = film_figure([row(9)])
    where = {text.get_text(): text.get_position() for text in texts(figure)}
    lefts = sorted(image.get_extent()[0] for image in figure.axes[0].images)
    assert [where[f"frame {1000 * i}"][0] for i in range(9)] == pytest.approx(lefts)
    assert [where[f"{111.11 * i:.2f} s"][0] for i in range(9)] == pytest.approx(lefts)
    assert any(text.startswith(MORE) and text.endswith("x") for text in where)  # a cut caption


def lines(axes: Any) -> list[tuple[list[float], list[float], Any]]:
    return [(list(x.get_xdata()), list(x.get_ydata()), x) for x in axes.lines if len(x.get_xdata())]


@pytest.mark.parametrize("videos", [1, 9])
def test_offsets_have_mean_range_start_and_limits(tmp_path: Path, videos: int) -> None:
    given = tracks(3, 2, videos)
    (axes,) = offsets_figure(given, 0.7, 2.5).axes
    found = lines(axes)
    levels = {(y[0], line.get_linestyle()) for _, y, line in found if y[0] == y[-1] and len(y) == 2}
    assert {(0.7, "--"), (2.5, ":"), (-2.5, ":")} <= levels
    for x, track in enumerate(given):
        near = [(a, b) for a, b, _ in found if abs(a[0] - x) < 0.3 and a[0] == a[-1]]
        means = sorted(b[0] for a, b in near if len(b) == 1)
        assert means == pytest.approx(sorted(track.offset_NG.mean(axis=0)))
        spread = [sorted(b) for a, b in near if len(b) == 2]
        for value_N in track.offset_NG.T:
            assert [value_N.min(), value_N.max()] in spread
            assert np.quantile(value_N, [0.25, 0.75]).tolist() in spread
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "layer3.0", "layer3.1", "layer3.2",
    ]  # fmt: skip
    draw_offsets(given, tmp_path / "new" / "offsets.png")
    assert cv2.imread(str(tmp_path / "new" / "offsets.png")) is not None


def test_the_panel_shows_mean_offsets() -> None:
    given = tracks(3)
    _, axes = film_figure([row(8, tracks=given, start=0.6, limit=2.5)]).axes
    assert axes.get_xlim() == (-2.5, 2.5)
    inside = [(x[0], y[0]) for x, y, line in lines(axes) if line.get_transform() == axes.transData]
    for y, track in enumerate(given):
        for mean in track.offset_NG.mean(axis=0):
            assert any(b == y and a == pytest.approx(mean) for a, b in inside)
    assert any(x == [0.6, 0.6] for x, _, _ in lines(axes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": []}, "frames of .* is empty"),
        ({"frames": [np.zeros((4, 4, 3), np.float32)]}, r"float32 \(4, 4, 3\), need uint8"),
        ({"frames": [np.zeros((4, 0, 3), np.uint8)]}, r"need uint8 \(H, W, 3\)"),
        ({"numbers": [1]}, "numbers of .* has 1 values for 8 frames"),
        ({"seconds": [0.5] * 9}, "seconds of .* has 9 values for 8 frames"),
        ({"tracks": [OffsetTrack("a", np.zeros((0, 2)))]}, r"offset_NG of 'a' is \(0, 2\)"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_filmstrip([row()._replace(**change)], tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_empty_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rows is empty"):
        draw_filmstrip([], tmp_path / "x.png")
    with pytest.raises(ValueError, match="tracks is empty"):
        draw_offsets([], tmp_path / "x.png")
    for shape in ((3,), (3, 0)):
        with pytest.raises(ValueError, match="offset_NG of 'a'"):
            draw_offsets([OffsetTrack("a", np.zeros(shape))], tmp_path / "x.png")
