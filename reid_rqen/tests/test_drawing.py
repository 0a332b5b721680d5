"""The picture of scored frames: colours, marks, sizes."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib import colormaps

from reid_rqen.data.transforms import read_bgr
from reid_rqen.drawing import MAP, ScoreRow, draw_scores

EDGES = (0, 3 / 7, 5 / 7, 1)


def row(frames: int = 2, size: tuple[int, int] = (56, 28), score: float = 0.5) -> ScoreRow:
    image = np.full((*size, 3), 255, np.uint8)
    return ScoreRow([image] * frames, np.full((frames, 3), score), EDGES, "a")


def drawn(tmp_path: Path, *rows: ScoreRow, title: str = "") -> np.ndarray:
    draw_scores(rows, tmp_path / "new" / "x.png", title)
    return read_bgr(tmp_path / "new" / "x.png")[..., ::-1]


def near(image_HW3: np.ndarray, colour: np.ndarray, most: float = 3.0) -> int:
    """Pixels of nearly this colour."""
    return int((np.abs(image_HW3.astype(float) - colour).max(axis=-1) < most).sum())


def test_bands_are_outlined_and_tinted_by_their_score(tmp_path: Path) -> None:
    low, high = (np.array(colormaps[MAP](s)[:3]) * 255 for s in (0.0, 1.0))
    picture = drawn(tmp_path, row(score=1.0))
    tint = 0.3 * high + 0.7 * 255
    assert near(picture, tint) > 2 * 0.6 * 224 * 112  # most of both frames
    assert near(picture, high) > near(picture, low) + 1000
    swapped = drawn(tmp_path, row(score=0.0))
    assert near(swapped, low) > near(swapped, high) + 1000
    assert near(swapped, tint) == 0


def test_each_band_takes_its_own_score(tmp_path: Path) -> None:
    scores = np.array([[0.0, 1.0, np.nan]])
    picture = drawn(tmp_path, row(1)._replace(score_TR=scores)).astype(float)
    left, top = 16, 16 + 22  # margin and the label's line
    centres = [top + round(224 * fraction) for fraction in (1.5 / 7, 4 / 7, 6 / 7)]
    got = [picture[y, left + 80] for y in centres]
    for value, score in zip(got, (0.0, 1.0), strict=False):
        wanted = 0.3 * np.array(colormaps[MAP](score)[:3]) * 255 + 0.7 * 255
        np.testing.assert_allclose(value, wanted, atol=2)
    np.testing.assert_array_equal(got[2], 255)  # no score, no tint


def test_small_frames_grow_by_a_whole_factor_and_large_ones_stay(tmp_path: Path) -> None:
    small = drawn(tmp_path, row(12, (56, 28)))
    assert small.shape[1] == 2 * 16 + 12 * 112 + 11 * 8
    large = drawn(tmp_path, row(12, (256, 128)))
    assert large.shape[1] == 2 * 16 + 12 * 128 + 11 * 8
    assert drawn(tmp_path, row(1)).shape[1] == 640
    huge = drawn(tmp_path, row(12, (1024, 512)))
    assert huge.shape[1] == small.shape[1]


def test_truth_changes_the_marks(tmp_path: Path) -> None:
    plain = row(1)
    pictures = [
        drawn(tmp_path, plain._replace(clean_TR=np.full((1, 3), clean))) for clean in (True, False)
    ]
    strip = np.s_[38 : 38 + 224]  # without the legend, which shows both
    assert (pictures[0][strip] != pictures[1][strip]).any(axis=-1).sum() > 500
    assert (drawn(tmp_path, plain)[strip] != pictures[0][strip]).any()


def test_rows_and_titles_add_height(tmp_path: Path) -> None:
    one, two = drawn(tmp_path, row()), drawn(tmp_path, row(), row(1))
    assert two.shape[0] - one.shape[0] == 22 + 224 + 16
    assert drawn(tmp_path, row(), title="t").shape[0] - one.shape[0] == 30
    long = drawn(tmp_path, row()._replace(label="x/" * 500), title="word " * 60)
    assert long.shape[1] == one.shape[1]
    assert long.shape[0] > one.shape[0] + 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score_TR": np.zeros((2, 2))}, "score_TR"),
        ({"clean_TR": np.zeros((1, 3), bool)}, "clean_TR"),
        ({"frames": [], "score_TR": np.zeros((0, 3))}, "T >= 1"),
        ({"frames": [np.zeros((4, 4, 3), np.float32)] * 2}, "uint8"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_scores([row()._replace(**change)], tmp_path / "x.png")
    with pytest.raises(ValueError, match="empty"):
        draw_scores([], tmp_path / "x.png")
