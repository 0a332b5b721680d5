"""Pictures of reports: what is drawn, where, and that it can be read."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from face_lfr.drawing import (
    Bar,
    Curve,
    FrameRow,
    draw_bars,
    draw_frames,
    draw_roc,
    draw_training,
)


def picture(path: Path) -> np.ndarray:
    found = cv2.imread(str(path))
    assert found is not None
    assert found.std() > 5  # not an empty page
    return found


def curve(name: str, count: int = 20) -> Curve:
    fpr = np.logspace(-5, 0, count)
    tpr = np.linspace(0.2, 1, count)
    return Curve(name, fpr, tpr, tpr - 0.05, tpr + 0.05)


def test_every_group_is_a_panel(tmp_path: Path) -> None:
    widths = []
    for groups in (1, 3):
        path = tmp_path / f"{groups}.png"
        draw_roc({f"group {i}": [curve("a"), curve("b")] for i in range(groups)}, path, "rates")
        widths.append(picture(path).shape[1])
    assert widths[1] == pytest.approx(3 * widths[0], rel=0.05)
    bars = [Bar("a", [0.5, 0.6]), Bar("b", [1.0])]
    draw_bars({"x": bars, "y": bars}, tmp_path / "bars.png", "bars")
    picture(tmp_path / "bars.png")


def test_frames_are_shown_as_they_are(tmp_path: Path) -> None:
    red = np.zeros((112, 112, 3), np.uint8)
    red[..., 0] = 255  # RGB
    rows = [
        FrameRow("a", [red] * 3, np.array([1.0, 0.5, -2]), np.array([0.75, 0.25, 0.0])),
        FrameRow("b", [red], np.array([1.0]), np.array([1.0]), ["note"]),  # a shorter video
    ]
    draw_frames(rows, tmp_path / "frames.png", "frames")
    seen = picture(tmp_path / "frames.png")
    assert ((seen == (0, 0, 255)).all(axis=2)).sum() > 4 * 50 * 50  # OpenCV reads BGR


def test_training_curves(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        "".join(f'{{"step": {i}, "loss": {5 - i}, "grad_norm": 1.0}}\n' for i in range(4))
    )
    draw_training({"a": tmp_path}, tmp_path / "training.png")
    picture(tmp_path / "training.png")
