"""The synthetic data set: format, the theorem about reversed time, seeds, what is left alone."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from common.log import InputError
from video_mmit.data import synthetic
from video_mmit.data.lists import read_list
from video_mmit.data.motion import (
    CATEGORIES,
    PAIRS,
    SEGMENT,
    Painter,
    Senses,
    backwards,
    draw_labels,
    opposite,
)
from video_mmit.data.sampling import Uniform
from video_mmit.data.synthetic import (
    Settings,
    generate,
    load_synthetic,
    pair_accuracy,
    write_mp4,
)
from video_mmit.data.video import FileReader

SMALL: dict[str, Any] = {"train": 12, "val": 5}
PARTS = tuple(CATEGORIES)
READER, SAMPLER = FileReader("opencv"), Uniform()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(tmp_path_factory.mktemp("synthetic") / "set", seed=3, **SMALL)


def decode(path: Path) -> np.ndarray:
    """Frames (F, H, W, 3), blue first."""
    capture, frames = cv2.VideoCapture(str(path)), []
    while (got := capture.read())[0]:
        frames.append(got[1])
    capture.release()
    return np.stack(frames)


def contents(root: Path) -> dict[str, bytes]:
    names = sorted(path for path in root.rglob("*") if path.is_file())
    return {
        str(p.relative_to(root)): decode(p).tobytes() if p.suffix == ".mp4" else p.read_bytes()
        for p in names
    }


def draw(part: str, number: int, **changes: Any) -> tuple[np.ndarray, tuple[int, ...]]:
    rng = np.random.default_rng([11, number])
    labels = draw_labels(part, rng)
    return Painter(part, **changes).video(rng, labels), labels


@pytest.mark.parametrize("part", ["order", "gap"])
@pytest.mark.parametrize("size", [32, 48])
def test_opposite_labels_are_the_same_video_backwards(part: str, size: int) -> None:
    """Frame by frame and bit by bit, so both members of a pair have the same set of frames."""
    painter, different = Painter(part, size=size), 0
    for number in range(40):
        labels = draw_labels(part, np.random.default_rng([1, number]))
        swapped = opposite(part, labels)
        one = painter.video(np.random.default_rng([2, number]), labels)
        other = painter.video(np.random.default_rng([2, number]), swapped)
        assert np.array_equal(one[::-1], other) == (labels != swapped)
        different += labels != swapped
        assert opposite(part, swapped) == labels
    assert different > 30


@pytest.mark.parametrize("part", ["order", "gap"])
def test_every_sense_is_a_fair_independent_coin(part: str) -> None:
    """The other half of the theorem: labels and their opposites are equally probable."""
    rng = np.random.default_rng(0)
    senses = np.array([Senses.of(part, draw_labels(part, rng)) for _ in range(3000)])
    used = senses[:, : len(PAIRS[part])]
    assert (used[:, : len(PAIRS[part])] != 0).any(axis=0).all()
    for column in range(used.shape[1]):
        present = used[used[:, column] != 0]
        assert present[:, column].mean() == pytest.approx(0, abs=0.09)
        for other in range(column):
            both = present[present[:, other] != 0]
            if len(both):
                assert (both[:, column] * both[:, other]).mean() == pytest.approx(0, abs=0.15)


def test_backwards_follows_the_first_motion() -> None:
    assert backwards("order", (0, 4, 9, 12))
    assert not backwards("order", (0, 4, 8, 13))
    assert not backwards("order", (0, 4))
    assert backwards("gap", (1, 2))
    assert not backwards("static", (0, 4, 8, 12, 17))
    assert opposite("order", (2, 7, 10, 13, 16)) == (2, 7, 11, 12, 17)
    assert opposite("static", (2, 7, 10)) == (2, 7, 10)


def test_label_shares_of_order() -> None:
    rng = np.random.default_rng(5)
    rows = [draw_labels("order", rng) for _ in range(2000)]
    share = np.bincount(np.concatenate([np.array(r) for r in rows]), minlength=18) / len(rows)
    zipf = np.array([12, 6, 4, 3]) / 25
    expected = np.concatenate([zipf, zipf, [0.2] * 4, [0.25] * 4, [0.3] * 2])
    assert share == pytest.approx(expected, abs=0.04)


def coloured(image_FHW3: np.ndarray) -> np.ndarray:
    """Mask (F, H, W) of the object; everything else is grey."""
    one_FHW, *others = np.moveaxis(image_FHW3.astype(np.int16), -1, 0)
    return sum(np.abs(one_FHW - other_FHW) for other_FHW in others) > 60


def centre(image_FHW3: np.ndarray) -> np.ndarray:
    """(F, 2) mean x, y of what is coloured."""
    mask_FHW = coloured(image_FHW3)
    place = np.arange(mask_FHW.shape[1])
    count_F = mask_FHW.sum(axis=(1, 2))
    x_F, y_F = (mask_FHW.sum(axis=axis) @ place / count_F for axis in (1, 2))
    return np.stack([x_F, y_F], axis=1)


def test_labels_of_order_say_what_is_seen() -> None:
    painter = Painter("order", noise=0.0)

    def watch(*motions: int) -> np.ndarray:
        return painter.video(np.random.default_rng(4), (0, 4, *motions)).astype(float)

    for label, axis, sign in ((8, 0, 1), (9, 0, -1), (10, 1, 1), (11, 1, -1)):
        way = centre(watch(label))
        moved = (way[-1] - way[0]) * sign
        assert moved[axis] > 6
        assert abs(moved[1 - axis]) < 2
    for label, sign in ((12, 1), (13, -1)):
        area_F = coloured(watch(label)).sum(axis=(1, 2))
        assert sign * (area_F[-1] - area_F[0]) > 30
    for label, sign in ((14, 1), (15, -1)):
        level_F = np.median(watch(label), axis=(1, 2, 3))
        assert (sign * np.diff(level_F[::6]) > 0).all()
        assert sign * (level_F[-1] - level_F[0]) > 25
    for label, light_first in ((16, True), (17, False)):
        shown = watch(label)
        light, dark = (np.flatnonzero((shown == v).all(-1).sum((1, 2)) > 80) for v in (235, 20))
        assert len(light) == len(dark) == 2 * SEGMENT
        assert light[0] % SEGMENT == dark[0] % SEGMENT == 0
        assert abs(light[0] - dark[0]) == 2 * SEGMENT
        assert (light[0] < dark[0]) == light_first


def test_blob_shows_in_every_gth_segment() -> None:
    gaps = []
    for number in range(80):
        grey_FHW = draw("gap", number, noise=0.0)[0][..., 0].astype(np.float32)
        lead_F = [cv2.blur(frame, (5, 5)).max() - np.median(frame) for frame in grey_FHW]
        shown = (np.array(lead_F) > 60).reshape(8, SEGMENT)
        assert (shown == shown[:, :1]).all()
        step = np.unique(np.diff(np.flatnonzero(shown[:, 0])))
        assert len(step) == 1
        gaps.append(int(step[0]))
    assert min(np.bincount(gaps, minlength=5)[1:]) > 10
    assert max(gaps) == 4


def test_max_gap_of_one_always_shows_the_blob() -> None:
    image, _ = draw("gap", 0, noise=0.0, max_gap=1)
    assert (image.max(axis=(1, 2, 3)) > 150).all()


def test_single_frames_of_static_show_every_label() -> None:
    """The ground's tone and the block's corner, read from each frame of each video."""
    for number in range(40):
        image, labels = draw("static", number, noise=0.0)
        grey_FHW = image.astype(float).mean(axis=-1)
        level_F = np.median(grey_FHW, axis=(1, 2))
        assert ((level_F > 112) == (labels[4] == 16)).mean() > 0.9
        blocks = np.stack(
            [grey_FHW[:, r : r + 6, c : c + 6].mean((1, 2)) for r in (0, 26) for c in (0, 26)]
        )
        assert len(labels) == 5
        if np.ptp(centre(image), axis=0).max() < 3:
            assert (blocks.argmax(axis=0) == labels[3] - 12).mean() > 0.5


def test_published_layout(small: Path) -> None:
    rows = (small / "moments_categories.txt").read_text().splitlines()
    assert rows[8] == "moving+right,8"
    assert len(rows) == 18
    mmit = [row.split(",") for row in (small / "trainingSet.txt").read_text().splitlines()]
    lists = read_list(small / "train.txt", num_classes=18)
    assert len(mmit) == len(lists) == 12
    for row, entry in zip(mmit, lists, strict=True):
        assert row[0] == entry.path
        assert tuple(map(int, row[1:])) == entry.labels
        assert row[0].split("/")[0] == CATEGORIES["order"][entry.labels[0]]
        assert entry.frames == 24
        assert decode(small / "videos" / row[0]).shape == (24, 32, 32, 3)
    assert len(read_list(small / "val.txt")) == 5
    first = {entry.labels[0] for entry in lists}
    assert len(first) > 4  # the folder is any of the labels, as in the real set


@pytest.mark.parametrize("part", PARTS)
def test_loader_round_trip(part: str, tmp_path: Path) -> None:
    """Ids, labels, class names and pixels as drawn; noise and coding cost some grey levels."""
    settings = SMALL | {"part": part}
    data = load_synthetic(tmp_path / "set", READER, SAMPLER, seed=1, **settings)
    assert (data.name, data.multi_label, data.skipped) == ("synthetic", True, {})
    assert data.classes == CATEGORIES[part]
    assert (len(data.train), len(data.test)) == (12, 5)
    for number, (split, videos) in enumerate((("train", data.train), ("val", data.test))):
        for index, video in enumerate(videos):
            rng = np.random.default_rng([1, number, index])
            labels = draw_labels(part, rng)
            drawn = Painter(part).video(rng, labels)
            assert sorted(video.labels) == list(labels)
            assert video.id.endswith(f"{split}_{index:05d}.mp4")
            with data.reader.open(video) as clip:
                frames = clip.read(np.arange(clip.frames))
            assert clip.frames == 24
            assert np.abs(frames[..., ::-1].astype(float) - drawn).mean() < 6


def test_check_11_decoders_agree(small: Path) -> None:
    data = load_synthetic(small, READER, SAMPLER, seed=3, **SMALL)
    index = SAMPLER.test(24)[0]
    for video in data.train:
        with FileReader("opencv").open(video) as one, FileReader("decord").open(video) as other:
            assert one.frames == other.frames == 24
            gap = np.abs(one.read(index).astype(int) - other.read(index))
        assert gap.mean() < 3


def test_coding_is_even_over_time(tmp_path: Path) -> None:
    """A frame must not give away its place in the video by the quality of its coding."""
    errors = []
    for number in range(20):
        image, _ = draw("order", number)
        write_mp4(tmp_path / "a.mp4", image)
        errors.append(np.abs(decode(tmp_path / "a.mp4").astype(float) - image).mean((1, 2, 3)))
    error_F = np.mean(errors, axis=0)
    assert error_F.max() < 1.35 * error_F.min()
    assert error_F[:12].mean() == pytest.approx(error_F[12:].mean(), rel=0.1)


def test_seed_and_number_decide_a_video(small: Path, tmp_path: Path) -> None:
    again = generate(tmp_path / "again", seed=3, **SMALL)
    assert contents(again) == contents(small)
    larger = contents(generate(tmp_path / "larger", seed=3, train=14, val=5))
    videos = {name: data for name, data in contents(small).items() if name.endswith(".mp4")}
    assert videos.items() <= larger.items()
    other = contents(generate(tmp_path / "other", seed=4, **SMALL))
    assert not {v for n, v in videos.items()} & {v for n, v in other.items() if n.endswith("mp4")}


def test_complete_set_is_left_alone(small: Path) -> None:
    before = (small / "synthetic.json").stat().st_mtime_ns
    assert generate(small, seed=3, **SMALL) == small
    assert (small / "synthetic.json").stat().st_mtime_ns == before
    assert not list(small.parent.glob("*.tmp"))


@pytest.mark.parametrize("lost", ["videos/*/*00003.mp4", "val.txt"])
def test_damaged_set_is_made_anew(small: Path, tmp_path: Path, lost: str) -> None:
    out = tmp_path / "set"
    shutil.copytree(small, out)
    next(out.glob(lost)).unlink()
    generate(out, seed=3, **SMALL)
    assert contents(out) == contents(small)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_other_parameters_are_refused_by_name(small: Path) -> None:
    with pytest.raises(InputError, match=r"noise=3\.0 not 1\.0, seed=3 not 4"):
        generate(small, seed=4, noise=1.0, **SMALL)


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
        patch.setattr(synthetic, "_write_lists", stop)
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
        shutil.copytree(small, out)  # another process was faster

    monkeypatch.setattr(synthetic, "_write", slow)
    assert generate(out, seed=3, **SMALL) == out
    assert contents(out) == contents(small)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_video_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere/a\.mp4: video could not be written"):
        write_mp4(tmp_path / "nowhere" / "a.mp4", draw("gap", 0)[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"part": "speed"}, {"size": 33}, {"size": 8}, {"train": 0}, {"val": 0}, {"segments": 3},
        {"max_gap": 0}, {"noise": -1.0}, {"jitter": float("nan")}, {"speed": float("inf")},
    ],
)  # fmt: skip
def test_bad_settings(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=next(iter(changes))):
        Settings(**changes)
    with pytest.raises(InputError, match=r"seed: must be at least 0: -1"):
        generate(tmp_path / "set", seed=-1)


def test_pair_accuracy_counts_ties_half() -> None:
    target = np.zeros((4, 4))
    target[[0, 1, 2, 3], [0, 0, 1, 0]] = 1
    target[[0, 1, 2], [2, 3, 3]] = 1
    score = np.array([[2, 1, 0, 5], [1, 2, 0, 5], [1, 2, 0, 5], [3, 3, 0, 0]])
    found = pair_accuracy(score, target, "gap")
    assert found["moving+right|moving+left"] == pytest.approx(2.5 / 4)
    assert found["moving+down|moving+up"] == pytest.approx(2 / 3)
    assert found["all"] == pytest.approx(4.5 / 7)
    assert np.isnan(pair_accuracy(score[:0], target[:0], "gap")["all"])


def test_sums_over_frames_do_not_tell_the_members_of_a_pair() -> None:
    """What a model of single frames can see of a whole video, area under the curve near 0.5."""
    rows = []
    for number in range(240):
        image, labels = draw("order", number)
        area_F = coloured(image).sum(axis=(1, 2))
        light_F = image[:, ::3, ::3].mean(axis=(1, 2, 3))
        x_F, y_F = centre(image).T
        seen = (x_F, y_F, area_F, light_F, x_F * area_F, y_F * light_F, area_F * light_F)
        rows.append(([float(feature_F.mean()) for feature_F in seen], labels))
    for first, second in PAIRS["order"]:
        one, other = (np.array([r for r, labels in rows if m in labels]) for m in (first, second))
        assert min(len(one), len(other)) > 15
        area = (one[:, None] > other[None]).mean(axis=(0, 1))
        assert area == pytest.approx(0.5, abs=0.22)


@pytest.mark.slow
def test_command(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "video_mmit.data.synthetic", f"out={tmp_path / 'set'}"]
    command += ["seed=1", "part=gap", "train=3", "val=2"]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        env = os.environ | {"PYTHONPATH": str(root)}
        return subprocess.run(
            [*command, *more], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
        )

    done = run()
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "set/synthetic.json").read_text())["seed"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    refused = run("max_gap=3")
    assert refused.returncode == 2
    assert "error: " in refused.stderr
    assert "max_gap=4 not 3" in refused.stderr
    assert "Traceback" not in refused.stderr
