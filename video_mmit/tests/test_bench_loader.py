"""Made videos are what they say, and every way of reading them gives the same frames."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from video_mmit.benchmarks import bench_loader, videos
from video_mmit.benchmarks.bench_loader import (
    Feed,
    Sample,
    coding_row,
    greatest_difference,
    loader_rows,
    read_rows,
    reader_rows,
    training_rows,
)
from video_mmit.benchmarks.networks import Variant
from video_mmit.benchmarks.peer_read import FrameByFrame
from video_mmit.benchmarks.videos import CODINGS, as_data, draw, missing, write_videos
from video_mmit.data.clips import TrainClips
from video_mmit.data.transforms import GroupTransform
from video_mmit.data.video import FileReader
from video_mmit.data.video_data import Video

CPU = torch.device("cpu")
needs_av = pytest.mark.skipif(find_spec("av") is None, reason="needs PyAV")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pictures; the sizes of the benchmark take seconds to encode."""
    monkeypatch.setattr(videos, "HEIGHT", 48)
    monkeypatch.setattr(videos, "WIDTH", 64)


@pytest.fixture
def made(tmp_path: Path) -> list[Video]:
    return write_videos(tmp_path / "made", CODINGS["mp4v"], 2, frames=20)


def test_drawn_frames_move_and_depend_on_the_generator() -> None:
    first, again = (np.stack([*draw(6, np.random.default_rng([0, 1]))]) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert first.shape == (6, 48, 64, 3)
    assert first.dtype == np.uint8
    steps = np.abs(np.diff(first.astype(int), axis=0)).mean(axis=(1, 2, 3))
    assert (steps > 2).all()
    other = np.stack([*draw(6, np.random.default_rng([0, 2]))])
    assert np.abs(first.astype(int) - other).mean() > 10


@needs_av
@pytest.mark.parametrize(
    ("name", "keys"), [("mp4v", [0, 12]), ("long", [0]), ("short", [0, 8, 16])]
)
def test_a_coding_has_the_key_frames_of_its_label(
    name: str, keys: list[int], tmp_path: Path
) -> None:
    import av

    video = write_videos(tmp_path, CODINGS[name], 1, frames=20)[0]
    with av.open(str(video.path)) as container:
        stream = container.streams.video[0]
        found = [frame.key_frame for frame in container.decode(stream)]
        assert stream.codec_context.name == ("mpeg4" if name == "mp4v" else "h264")
    assert [number for number, key in enumerate(found) if key] == keys
    assert len(found) == video.frames == 20
    many = {8: "every 8", 12: "every 12"}.get(keys[1] if len(keys) > 1 else 0, "one key frame")
    assert many in CODINGS[name].label


@needs_av
@pytest.mark.parametrize("name", CODINGS)
@pytest.mark.parametrize("clips", [1, 3])
def test_readers_agree(name: str, clips: int, tmp_path: Path) -> None:
    found = write_videos(tmp_path, CODINGS[name], 2, frames=20)
    sample = Sample(found, clips, "label")
    ours = sample.read(FileReader())
    assert [clip.shape for clip in ours] == [(clips * 8, 48, 64, 3)] * 2
    peer = sample.read(FrameByFrame())
    for mine, theirs in zip(ours, peer, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert greatest_difference(ours, peer, 0.0) == 0
    for backend in ("opencv", "pyav"):
        greatest_difference(ours, sample.read(FileReader(backend)), 3.0)


def test_the_peer_asks_decord_for_one_frame_after_another(
    made: list[Video], monkeypatch: pytest.MonkeyPatch
) -> None:
    import decord

    asked: list[int] = []
    real = decord.VideoReader.__getitem__

    def spy(self: object, index: int) -> object:
        asked.append(index)
        return real(self, index)

    monkeypatch.setattr(decord.VideoReader, "__getitem__", spy)
    with FrameByFrame().open(made[0]) as clip:
        assert clip.frames == 20
        assert clip.read(np.array([5, 3, 5])).shape == (3, 48, 64, 3)
    assert asked == [5, 3, 5]


def test_frames_that_differ_are_refused() -> None:
    zero, ten = np.zeros((1, 2, 2, 3), np.uint8), np.full((1, 2, 2, 3), 10, np.uint8)
    assert greatest_difference([zero, ten], [zero, ten], 0.0) == 0
    assert greatest_difference([zero], [ten], 10.0) == 10
    with pytest.raises(RuntimeError, match=r"frames differ by 10\.0 grey levels"):
        greatest_difference([zero, ten], [zero, zero], 3.0)


def test_reader_rows(made: list[Video]) -> None:
    rows = list(reader_rows(Sample(made, 1, "mp4v"), 1))
    peers = ["decord, frame by frame", "OpenCV"] + (["PyAV"] if find_spec("av") else [])
    assert [entry["peer"] for entry in rows] == peers
    assert rows[0]["max_abs_diff"] == 0
    assert rows[0]["shape"].startswith("2 videos, 1 x 8 of 20 frames")
    rate = 2e3 / rows[0]["ours_ms"]
    assert rows[0]["note"].startswith(f"{rate:.3g} against ")


def test_a_reader_that_differs_is_not_timed(
    made: list[Video], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_loader, "FrameByFrame", lambda: FileReader("opencv"))
    good = next(reader_rows(Sample(made, 1, "mp4v"), 1))
    assert good["peer"] == "decord, frame by frame"
    monkeypatch.setattr(bench_loader, "greatest_difference", _refuse)
    with pytest.raises(RuntimeError, match="refused"):
        next(reader_rows(Sample(made, 1, "mp4v"), 1))


def _refuse(*_: object) -> float:
    raise RuntimeError("refused")


@needs_av
def test_two_codings_of_the_same_videos(tmp_path: Path) -> None:
    found = coding_row(tmp_path, 20, 1, 1, 0)
    assert found["name"] == "read, decord, key frame every 8"
    assert found["peer"] == "one key frame"
    assert found["max_abs_diff"] is None
    assert "coded twice" in found["note"]
    assert found["ratio"] == pytest.approx(found["peer_ms"] / found["ours_ms"])


def test_without_pyav_its_rows_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    real = find_spec

    def absent(name: str) -> object:
        return None if name == "av" else real(name)

    monkeypatch.setattr(videos, "find_spec", absent)
    monkeypatch.setattr(bench_loader, "find_spec", absent)
    monkeypatch.setattr(bench_loader, "measure", _no_clock)
    assert missing(CODINGS["mp4v"]) is None
    rows = list(read_rows(1, quick=True))
    notes = [entry["note"] for entry in rows if entry["ours_ms"] is None]
    assert notes == ["not measured: PyAV is not installed"] * 4
    assert len(rows) == 8


def _no_clock(ours: Callable[[], object], peer: Callable[[], object], repeats: int) -> dict:
    return {"ours_ms": 1.0, "peer_ms": 1.0, "ratio": 1.0}


def test_a_loader_starts_anew_for_every_call(made: list[Video]) -> None:
    feed = Feed(TrainClips(as_data(made, FileReader()), GroupTransform(32, 32)), 2, 3, 0)
    first, again = list(feed), list(feed)
    assert len(first) == 3
    assert all(torch.equal(a.image, b.image) for a, b in zip(first, again, strict=True))
    assert first[0].image.shape == (2, 8, 3, 32, 32)
    assert first[0].target.shape == (2, 313)
    assert feed.load() == 6


def test_a_loader_trains_on_every_batch(made: list[Video]) -> None:
    feed = Feed(TrainClips(as_data(made, FileReader()), GroupTransform(32, 32)), 1, 3, 0)
    seen: list[torch.Tensor] = []
    feed.train(lambda item: seen.append(item.image))  # type: ignore[arg-type]
    assert [image.shape[0] for image in seen] == [1, 1, 1]


@pytest.fixture
def quick_step(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps that only count clips."""
    seen: list[int] = []

    class Count:
        def __init__(self, net: object, item: object, variant: Variant, device: object) -> None:
            self.item = item

        def __call__(self, item: object = None) -> None:
            seen.append(len((item or self.item).image))  # type: ignore[union-attr, attr-defined]

    monkeypatch.setattr(bench_loader, "Step", Count)
    return seen


def test_training_rows(made: list[Video], quick_step: list[int]) -> None:
    rows = list(training_rows(made, "mp4v", 1, CPU, quick=True, seed=0))
    assert [(entry["name"], entry["peer"]) for entry in rows] == [
        ("load", "decord, frame by frame"),
        ("load and train TSN-R18", "decord, frame by frame"),
        ("load and train TSN-R18", "clips in memory"),
    ]
    assert all(entry["max_abs_diff"] == 0 for entry in rows)
    assert quick_step == [4] * (1 + 4 + 4)
    assert rows[0]["shape"].startswith("2 x 4 clips of 8 frames, 112x112, mp4v")


def test_loaders_that_differ_are_refused(
    made: list[Video], quick_step: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Black(FrameByFrame):
        def open(self, video: Video) -> object:  # type: ignore[override]
            return super().open(made[0])

    monkeypatch.setattr(bench_loader, "FrameByFrame", Black)
    with pytest.raises(RuntimeError, match="the loaders differ"):
        next(training_rows(made, "mp4v", 1, CPU, quick=True, seed=0))
    assert not quick_step


@pytest.mark.slow
def test_a_network_trains_from_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_loader, "GroupTransform", lambda *_: GroupTransform(32, 32))
    rows = list(loader_rows(1, CPU, quick=True))
    assert len(rows) == 3
    assert all(entry["ours_ms"] > 0 for entry in rows)
    assert "0 workers" in rows[0]["shape"] or torch.get_num_threads() > 1
