"""Pictures of numbers are written, with every row in them."""

import json
from pathlib import Path

import numpy as np
import pytest

from detection_tsd.curves import Bar, draw_bars, draw_thresholds, draw_training


def size(path: Path) -> tuple[int, int]:
    from PIL import Image

    with Image.open(path) as picture:
        return picture.size


@pytest.mark.parametrize("panels", [1, 2, 3, 4])
def test_thresholds_and_bars(panels: int, tmp_path: Path) -> None:
    curve = np.linspace(0.9, 0.1, 10)
    groups = {
        f"set {n}": {"a": np.stack([curve, curve / 2]), "b": curve[None]} for n in range(panels)
    }
    draw_thresholds(groups, tmp_path / "t.png", "title")
    bars = {name: [Bar("a", [0.5, 0.6]), Bar("b", [0.1])] for name in groups}
    draw_bars(bars, tmp_path / "b.png", "title")
    assert size(tmp_path / "t.png")[0] > 300 * panels
    assert size(tmp_path / "b.png")[0] > 300


def test_training_follows_the_tested_branch(tmp_path: Path) -> None:
    for name, keys in (("sibling", ("",)), ("tsd", ("", "_tsd"))):
        (tmp_path / name).mkdir()
        rows = [
            {"step": step, "grad_norm": 1.0}
            | {f"loss_{kind}{key}": 1.0 / step for kind in ("cls", "box") for key in keys}
            for step in (1, 2, 3)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / "metrics.jsonl").write_text(text)
    draw_training({name: tmp_path / name for name in ("sibling", "tsd")}, tmp_path / "l.png")
    assert size(tmp_path / "l.png")[0] > 900
