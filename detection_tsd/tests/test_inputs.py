"""What `predict` reads: films, proposal files, and the grid in their place."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.log import InputError
from detection_tsd.boxes import iou
from detection_tsd.inputs import Film, FilmWriter, find_sources
from detection_tsd.proposals import Grid, find_file, from_file, usual_sides
from detection_tsd.tests.pictures import film, noise, save
from detection_tsd.tests.small_detectors import small


def test_a_film_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"

    def stop() -> None:
        with FilmWriter(path, None) as writer:
            writer.write(noise(33, 41))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert not list(tmp_path.iterdir())
    with FilmWriter(path, None) as writer:
        writer.write(noise(33, 41))
    with Film(path) as found:
        assert found.rate == 25.0
        assert [frame.shape for frame in found] == [(34, 42, 3)]


@pytest.mark.parametrize(
    ("height", "width", "limit"), [(96, 96, 5000), (700, 900, 600), (1, 1, 60), (3, 500, 400)]
)
def test_the_grid_covers_the_picture(height: int, width: int, limit: int) -> None:
    grid = Grid((18.0, 25.0, 36.0, 51.0, 72.0), limit=limit)
    box_M4 = grid.boxes(height, width)
    assert box_M4.dtype == np.float32
    assert 1 <= len(box_M4) <= limit
    assert len(np.unique(box_M4, axis=0)) == len(box_M4)
    assert (box_M4[:, :2] >= 0).all()
    assert (box_M4[:, 2:] <= (width, height)).all()
    assert (box_M4[:, 2:] > box_M4[:, :2]).all()
    np.testing.assert_array_equal(box_M4[:, :2].min(axis=0), [0, 0])
    np.testing.assert_allclose(box_M4[:, 2:].max(axis=0), [width, height], rtol=1e-6)


def test_a_dense_grid_meets_every_object() -> None:
    rng = np.random.default_rng(0)
    size_G2 = rng.uniform(22, 56, (300, 2))
    corner_G2 = rng.uniform(0, 1, (300, 2)) * (96 - size_G2)
    box_G4 = torch.tensor(np.concatenate([corner_G2, corner_G2 + size_G2], axis=1)).float()
    grid_M4 = torch.from_numpy(Grid(usual_sides(small())).boxes(96, 96))
    best_G = iou(box_G4, grid_M4).amax(dim=1)
    assert best_G.min() > 0.55
    assert best_G.mean() > 0.7


def test_sides_are_those_of_the_levels() -> None:
    assert usual_sides(small()) == pytest.approx([18, 25.456, 36, 50.912, 72], abs=1e-3)
    assert usual_sides(small(stages=2)) == usual_sides(small())


@pytest.mark.parametrize(
    "options",
    [
        {"sides": ()}, {"sides": (0.0,)}, {"sides": (8.0,), "ratios": ()},
        {"sides": (8.0,), "step": 0}, {"sides": (8.0,), "limit": 11},
    ],
)  # fmt: skip
def test_a_grid_of_nothing_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="need"):
        Grid(**options)


def test_arrays_of_a_proposal_file_are_found(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for name in ("000000000139.png", "b.png", "below/c.png", "d.png"):
        save(folder / name, noise(8, 8))
    arrays = {name: np.full((2, 4), 1 + k, float) for k, name in enumerate(
        ("139", "b", "below/c.png", "d.png"))}  # fmt: skip
    sources = find_sources(folder)
    assert find_file(folder) is None
    np.savez(tmp_path / "proposals_in.npz", **arrays)
    assert find_file(folder) == tmp_path / "proposals_in.npz"
    assert find_file(folder / "b.png") == tmp_path / "proposals_in.npz"
    np.savez(folder / "proposals.npz", **arrays)
    assert find_file(folder) == folder / "proposals.npz"
    found = from_file(folder / "proposals.npz", sources)
    wanted = {"000000000139.png": 1, "b.png": 2, "below/c.png": 3, "d.png": 4}
    assert [int(box_M4[0, 0]) for box_M4 in found] == [wanted[source.id] for source in sources]
    save(folder / "e.png", noise(8, 8))
    with pytest.raises(InputError, match=r"proposals\.npz: has no proposals of image: e\.png"):
        from_file(folder / "proposals.npz", find_sources(folder))


def test_a_video_that_is_cut_off_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = film(tmp_path / "a.avi", 12)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with Film(path) as found:
        frames = len(list(found))
    assert 0 < frames < 12
    if found.stated is not None and found.stated > frames:
        assert "frames could be decoded" in caplog.text
