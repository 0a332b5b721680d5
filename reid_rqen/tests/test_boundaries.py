"""Per-frame region boundaries: both file formats, and every refusal."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from common.log import InputError
from reid_rqen.data.boundaries import load_boundaries
from reid_rqen.data.lpw import load_lpw
from reid_rqen.data.replicas import write_lpw
from reid_rqen.data.sets import TrackletFrames, TrackletSequences, TripletDraws
from reid_rqen.data.transforms import FrameTransform


def rows_of(root: Path) -> dict[str, list[float]]:
    """A different pair of boundaries for every frame of the tree."""
    names = sorted(str(path.relative_to(root)) for path in root.glob("scen*/*/*/*.jpg"))
    return {name: [0.3 + 0.001 * i, 0.6 + 0.001 * i] for i, name in enumerate(names)}


def write_npz(path: Path, rows: dict[str, list[float]]) -> None:
    np.savez(path, paths=np.array(list(rows)), boundaries=np.array(list(rows.values())))


@pytest.mark.parametrize("suffix", ["npz", "json"])
def test_boundaries_reach_the_items(tmp_path: Path, suffix: str) -> None:
    data = load_lpw(write_lpw(tmp_path))
    rows, file = rows_of(tmp_path), tmp_path / f"boundaries.{suffix}"
    if suffix == "npz":
        write_npz(file, rows)
    else:
        file.write_text(json.dumps(rows))
    table, transform = load_boundaries(file, tmp_path), FrameTransform(size=(14, 7))
    draws = TripletDraws(data.train, transform, frames=2, boundaries=table)
    draw, item = draws.draw(3), draws[3]
    assert item.boundaries.shape == (3, 2, 2)
    path = data.train[draw.tracklet[2]].frames[draw.frames[2, 1]]
    wanted = torch.tensor(rows[str(path.relative_to(tmp_path))])
    torch.testing.assert_close(item.boundaries[2, 1], wanted)
    frames = TrackletFrames(data.query, transform, boundaries=table)
    sequence = TrackletSequences(data.query, transform, boundaries=table)[1]
    torch.testing.assert_close(sequence.boundaries[0], frames[3].boundaries)
    with pytest.raises(ValueError, match="crop must be 0"):
        TripletDraws(data.train, FrameTransform(crop=0.1), boundaries=table)


def test_frame_without_boundaries(tmp_path: Path) -> None:
    data = load_lpw(write_lpw(tmp_path))
    rows = rows_of(tmp_path)
    del rows["scen2/view1/3/2.jpg"]
    write_npz(tmp_path / "b.npz", rows)
    table = load_boundaries(tmp_path / "b.npz", tmp_path)
    with pytest.raises(InputError, match=r"scen2/view1/3/2\.jpg: boundary file has no row"):
        TripletDraws(data.train, FrameTransform(), boundaries=table)


@pytest.mark.parametrize(
    "row", [[0.6, 0.3], [0.0, 0.5], [0.5, 1.0], [0.5, 0.5], [float("nan"), 0.5]]
)
def test_row_that_does_not_increase_is_named(tmp_path: Path, row: list[float]) -> None:
    write_npz(tmp_path / "b.npz", {"a/1.jpg": [0.3, 0.6], "a/2.jpg": row})
    with pytest.raises(InputError, match=r"b\.npz: boundaries of a/2\.jpg do not increase"):
        load_boundaries(tmp_path / "b.npz", tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"[1, 2]", b'{"a": [0.1, 0.2], "b": [0.3]}', b'{"a": "x"}']
)
@pytest.mark.parametrize("name", ["b.json", "b.npz"])
def test_damaged_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    with pytest.raises(InputError, match=f"{name}: boundary file is missing"):
        load_boundaries(tmp_path / name, tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        load_boundaries(tmp_path / name, tmp_path)


def test_shapes_that_do_not_fit(tmp_path: Path) -> None:
    np.savez(tmp_path / "b.npz", paths=np.array(["a", "b"]), boundaries=np.array([[0.1, 0.2]]))
    with pytest.raises(InputError, match="boundaries of 2 paths"):
        load_boundaries(tmp_path / "b.npz", tmp_path)
