"""The synthetic data set: format, statistics of the covers, seeds, and what is left alone."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.log import InputError
from reid_rqen.data import synthetic
from reid_rqen.data.lpw import load_lpw
from reid_rqen.data.people import Painter, clean_frames
from reid_rqen.data.synthetic import Settings, generate, load_synthetic
from reid_rqen.data.transforms import read_bgr

SMALL = {"identities": 10, "frames": 4}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(tmp_path_factory.mktemp("synthetic") / "set", seed=3, **SMALL)


def pixels(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*.jpg"))}


def test_default_set_has_the_published_layout(tmp_path: Path) -> None:
    data = load_lpw(generate(tmp_path / "set"))
    assert (data.num_classes, len(data.train)) == (120, 360)
    assert (len(data.query), len(data.gallery)) == (120, 240)
    assert {len(t.frames) for t in data.train + data.query + data.gallery} == {12}
    assert data.skipped == {}
    numbers = {
        s: {int(t.frames[0].parent.name) for t in data.train if t.scene == s} for s in (2, 3)
    }
    assert {len(found) for found in numbers.values()} == {60}
    assert numbers[2] & numbers[3]  # the same number means another person in another scene
    assert numbers[2] != numbers[3]
    assert read_bgr(data.query[0].frames[0]).shape == (56, 28, 3)
    quality = np.load(tmp_path / "set" / "quality.npz")
    assert quality["paths"].shape == (8640,)
    assert quality["clean"].shape == (8640, 3)
    assert quality["clean"].dtype == bool
    assert set(quality["paths"].tolist()) == set(pixels(tmp_path / "set"))


def chains(frames: int, cover: float, *, together: bool, runs: int) -> np.ndarray:
    """(runs, frames, 3) masks of clean regions."""
    rng = np.random.default_rng(0)
    return np.stack([clean_frames(rng, frames, cover, 0.7, together=together) for _ in range(runs)])


def test_covers_follow_the_chain() -> None:
    """Long chains: stationary 0.6, kept with 0.7 or drawn anew, regions independent."""
    clean = chains(300, 0.6, together=False, runs=200)
    assert clean.shape == (200, 300, 3)
    assert clean.mean() == pytest.approx(0.4, abs=0.01)
    stays = (clean[:, 1:] == clean[:, :-1]).mean()
    assert stays == pytest.approx(0.7 + 0.3 * (0.6**2 + 0.4**2), abs=0.01)
    regions = clean.reshape(-1, 3)
    assert np.corrcoef(regions.T)[np.triu_indices(3, 1)] == pytest.approx(0, abs=0.03)
    assert regions.all(axis=1).mean() == pytest.approx(0.4**3, abs=0.01)


def test_every_region_of_a_tracklet_is_clean_once() -> None:
    """About every seventh chain of 12 frames would be covered throughout without help."""
    clean = chains(12, 0.6, together=False, runs=2000)
    assert clean.any(axis=1).all()
    alone = (clean.sum(axis=1) == 1).mean()
    assert alone > 0.6 * 0.88**11


def test_covers_of_whole_frames_and_none() -> None:
    together = chains(12, 0.6, together=True, runs=300)
    assert (together == together[..., :1]).all()
    assert together.any(axis=1).all()
    assert 0.35 < together.mean() < 0.5
    assert chains(12, 0.0, together=False, runs=5).all()


def test_seed_decides_everything(small: Path, tmp_path: Path) -> None:
    again = generate(tmp_path / "again", seed=3, **SMALL)
    assert pixels(again) == pixels(small)
    other = generate(tmp_path / "other", seed=4, **SMALL)
    names = {path.rsplit("/", 1)[0] for path in pixels(small)}
    assert names != {path.rsplit("/", 1)[0] for path in pixels(other)}
    masks = [np.load(root / "quality.npz")["clean"] for root in (small, other)]
    assert (masks[0] != masks[1]).any()


@pytest.mark.parametrize("changes", [{"mode": "frame"}, {"cover": 0.0}])
def test_modes(tmp_path: Path, changes: dict[str, object]) -> None:
    clean = np.load(generate(tmp_path / "set", **SMALL, **changes) / "quality.npz")["clean"]
    assert (clean == clean[:, :1]).all()
    assert clean.all() == ("cover" in changes)


def painter(**changes: float) -> tuple[Painter, np.random.Generator]:
    rng = np.random.default_rng(1)
    settings = {"contrast": 0.12, "nohatch": 0.3} | changes
    return Painter.draw(rng, 56, 28, 8, 3, **settings), rng


def region_means(image_THW3: np.ndarray) -> np.ndarray:
    """(3, T, 3) mean colour of the middle columns of every region."""
    cuts = ((2, 22), (26, 38), (42, 54))
    return np.stack([image_THW3[:, a:b, 8:20].mean(axis=(1, 2)) for a, b in cuts])


def test_only_the_covered_regions_change() -> None:
    clean = np.ones((40, 3), dtype=bool)
    clean[20:, 1] = False
    brush, rng = painter()
    mean = region_means(brush.tracklet(rng, (0, 1, 2), clean, view=0))
    tone = mean / mean.sum(axis=-1, keepdims=True)  # free of the brightness of a frame
    spread = tone.std(axis=1).max(axis=-1)
    assert spread[1] > 4 * max(spread[0], spread[2])
    assert tone[1, :20].std(axis=0).max() < 0.02


def test_cover_is_never_the_own_style() -> None:
    brush, rng = painter(contrast=0.0)
    covered = np.zeros((200, 3), dtype=bool)
    worn = brush.tracklet(rng, (0, 0, 0), ~covered, view=0)
    other = brush.tracklet(rng, (0, 0, 0), covered, view=0)
    tone, foreign = (region_means(image)[0] for image in (worn, other))
    tone, foreign = (m / m.sum(axis=-1, keepdims=True) for m in (tone, foreign))
    gap = np.abs(foreign[:, None] - tone[None]).max(axis=-1).min(axis=1)
    assert (gap > 0.005).mean() > 0.9


@pytest.mark.parametrize(("nohatch", "hatched"), [(0.0, 1.0), (0.3, 0.7), (1.0, 0.0)])
def test_share_of_hatched_covers(nohatch: float, hatched: float) -> None:
    """A hatch of period 6 on the diagonal is a peak of the spectrum on plain clothing."""
    brush, rng = painter(nohatch=nohatch, contrast=0.3)
    brush.stripes[:] = 0
    image = brush.tracklet(rng, (0, 1, 2), np.zeros((400, 3), dtype=bool), view=0)
    patch = image[:, :24, 5:23].mean(axis=-1)  # 24 x 18: whole periods
    patch = patch / patch.mean(axis=(1, 2), keepdims=True) - 1
    power = np.abs(np.fft.fft2(patch)[:, 4, 3]) / (24 * 18)
    assert (power > 0.02).mean() == pytest.approx(hatched, abs=0.07)


def test_out_of_family_covers_only_in_the_test_scene(small: Path, tmp_path: Path) -> None:
    other = generate(tmp_path / "other", seed=3, test_cover="blur_dark", **SMALL)
    quality = np.load(other / "quality.npz")
    level = {True: [], False: []}
    for path, clean in zip(quality["paths"].tolist(), quality["clean"], strict=True):
        if path.startswith("scen1"):
            level[bool(clean[0])].append(read_bgr(other / path)[4:20, 8:20].mean())
    assert np.mean(level[False]) < 0.75 * np.mean(level[True])
    train = {name for name in pixels(other) if not name.startswith("scen1")}
    assert train


def test_complete_set_is_left_alone(small: Path) -> None:
    before = (small / "synthetic.json").stat().st_mtime_ns
    assert generate(small, seed=3, **SMALL) == small
    assert (small / "synthetic.json").stat().st_mtime_ns == before
    assert len(load_synthetic(small, seed=3, **SMALL).query) == 10
    assert not list(small.parent.glob("*.tmp"))


def test_other_parameters_are_refused_by_name(small: Path) -> None:
    with pytest.raises(InputError, match=r"cover=0\.6 not 0\.3, seed=3 not 4"):
        generate(small, seed=4, cover=0.3, **SMALL)


def test_foreign_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(InputError, match="holds no complete synthetic data set"):
        generate(tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_interrupted_generation_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", stop)
        with pytest.raises(KeyboardInterrupt):
            generate(tmp_path / "set", **SMALL)
    assert not list(tmp_path.iterdir())
    assert generate(tmp_path / "set", **SMALL).is_dir()


def test_second_writer_keeps_the_first_result(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, write = tmp_path / "set", synthetic._write

    def slow(*arguments: Any) -> None:
        write(*arguments)
        shutil.copytree(small, out)  # another rank was faster

    monkeypatch.setattr(synthetic, "_write", slow)
    assert generate(out, seed=3, **SMALL) == out
    assert pixels(out) == pixels(small)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "pixel"},
        {"test_cover": "snow"},
        {"cover": 1.5},
        {"identities": 300},
        {"identities": 1},
        {"frames": 0},
    ],
)
def test_bad_settings(changes: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(changes))):
        Settings(**changes)  # type: ignore[arg-type]


@pytest.mark.slow
def test_command(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "reid_rqen.data.synthetic", f"out={tmp_path / 'set'}"]
    command += ["seed=1", "identities=2", "frames=2"]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        env = os.environ | {"PYTHONPATH": str(root)}
        return subprocess.run(
            [*command, *more], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
        )

    done = run()
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "set/synthetic.json").read_text())["seed"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    refused = run("frames=3")
    assert refused.returncode == 2
    assert "error: " in refused.stderr
    assert "frames=2 not 3" in refused.stderr
    assert "Traceback" not in refused.stderr
