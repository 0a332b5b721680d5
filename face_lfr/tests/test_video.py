"""The video protocol from files and from folders.

Letters: N frames of all videos, V videos, D embedding width.
"""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common import dist
from common.log import InputError
from face_lfr.data.challenge import load_iqiyi
from face_lfr.data.replicas import write_replica
from face_lfr.data.transforms import FaceTransform
from face_lfr.engine import Embedding
from face_lfr.video import (
    VideoFrames,
    embed_videos,
    load_video_files,
    read_label_file,
    score_videos,
)

ALONE = dist.World(0, 1, torch.device("cpu"))
FRAMES = (1, 2, 3, 5, 2, 4, 1, 3)
LABELS = (0, 0, 1, 1, 2, 2, -1, -1)
WIDTH = 4


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Eight videos whose frames lie mixed in the list, as `.npy` and as headerless dumps."""
    rng = np.random.default_rng(0)
    names = [f"clip{v}" for v in range(len(FRAMES))]
    entries = [(v, k) for v, count in enumerate(FRAMES) for k in range(count)]
    rng.shuffle(entries)
    centre = rng.standard_normal((9, WIDTH))
    feature = [centre[LABELS[v]] + 0.7 * rng.standard_normal(WIDTH) for v, _ in entries]
    paths = {
        name: tmp_path / name
        for name in ("features.npy", "features.bin", "quality.npy", "quality.bin", "images.txt",
                     "videos.txt", "labels.txt", "labels.npy")
    }  # fmt: skip
    feature_ND = np.array(feature, np.float32)
    quality_N = rng.standard_normal(len(entries)).astype(np.float32)
    np.save(paths["features.npy"], feature_ND)
    np.save(paths["quality.npy"], quality_N.reshape(-1, 1, 1, 1))
    paths["features.bin"].write_bytes(feature_ND.tobytes())
    paths["quality.bin"].write_bytes(quality_N.tobytes())
    paths["images.txt"].write_text("".join(f"set/{names[v]}/{k}.jpg\n" for v, k in entries))
    paths["videos.txt"].write_text("".join(f"{name} 3 rest\n" for name in names))
    paths["labels.txt"].write_text("".join(f"{label}\n" for label in LABELS))
    np.save(paths["labels.npy"], np.array(LABELS, np.int16))
    return paths


def load(files: dict[str, Path], suffix: str = "npy", **changes: Path | None) -> VideoFrames:
    named = {
        "features": files[f"features.{suffix}"], "images": files["images.txt"],
        "videos": files["videos.txt"], "labels": files["labels.txt"],
        "quality": files[f"quality.{suffix}"],
    }  # fmt: skip
    return load_video_files(**(named | changes))  # type: ignore[arg-type]


def loop_qanpp(frames: VideoFrames) -> np.ndarray:
    """QAN++ of the frames, video by video."""
    assert frames.quality_N is not None
    vectors = []
    for v in range(len(FRAMES)):
        rows = np.flatnonzero(frames.videos.video_N == v)
        q = frames.quality_N[rows].astype(np.float64)
        if len(q) > 2:
            q = (q - q.min()) / (q.max() - q.min())
        elif q.min() < 0 or q.sum() <= 1e-12:
            q = np.ones(len(q))
        vectors.append(q @ frames.feature_ND[rows].astype(np.float64) / q.sum())
    return np.array(vectors)


def loop_tpr(vectors: np.ndarray, fpr: float) -> float:
    """Every pair of videos, one after the other."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    positive, negative = [], []
    for i, j in itertools.combinations(range(len(LABELS)), 2):
        if LABELS[i] == LABELS[j] >= 0:
            positive.append(unit[i] @ unit[j])
        elif LABELS[i] >= 0 or LABELS[j] >= 0:
            negative.append(unit[i] @ unit[j])
    threshold = sorted(negative, reverse=True)[int(fpr * len(negative))]
    return float(np.mean(np.array(positive) > threshold))


@pytest.mark.parametrize("suffix", ["npy", "bin"])
def test_score_from_files_equals_a_loop(files: dict[str, Path], suffix: str) -> None:
    frames = load(files, suffix)
    assert frames.feature_ND.shape == (21, WIDTH)
    got = score_videos(frames, "qanpp", (0.1, 0.3))
    want = loop_qanpp(frames)
    np.testing.assert_allclose(got.vector_VD, want, atol=1e-6)
    assert got.weight_N.shape == (21,)
    assert [point.tpr for point in got.pairs.points] == [loop_tpr(want, f) for f in (0.1, 0.3)]
    assert (got.pairs.positives, got.pairs.negatives) == (3, 24)


def test_forms_of_the_files_are_the_same(files: dict[str, Path]) -> None:
    one, two = load(files, "npy"), load(files, "bin")
    three = load(files, labels=files["labels.npy"])
    for other in (two, three):
        assert np.array_equal(other.feature_ND, one.feature_ND)
        assert np.array_equal(other.quality_N, one.quality_N)
        assert np.array_equal(other.videos.labels_V, one.videos.labels_V)
        assert np.array_equal(other.videos.video_N, one.videos.video_N)
    half = files["features.npy"].with_name("half.npy")
    np.save(half, np.asarray(one.feature_ND, np.float16))
    got = score_videos(load(files, features=half), "mean_l2", (0.1,)).vector_VD
    want = score_videos(one, "mean_l2", (0.1,)).vector_VD
    np.testing.assert_allclose(got, want, atol=2e-3)


def test_methods_without_quality_need_none(files: dict[str, Path]) -> None:
    frames = load(files, quality=None)
    assert frames.quality_N is None
    got = score_videos(frames, "mean_l2", (0.1,))
    unit_ND = frames.feature_ND / np.linalg.norm(frames.feature_ND, axis=1, keepdims=True)
    want = [unit_ND[frames.videos.video_N == v].mean(axis=0) for v in range(len(FRAMES))]
    np.testing.assert_allclose(got.vector_VD, want, atol=1e-6)
    raw = score_videos(frames, "mean_l2", (0.1,), frame_norm="none")
    assert not np.allclose(raw.vector_VD, got.vector_VD)
    with pytest.raises(InputError, match="method: needs the quality of every frame: qanpp"):
        score_videos(frames, "qanpp", (0.1,))


def test_choices_are_checked(files: dict[str, Path]) -> None:
    frames = load(files)
    with pytest.raises(InputError, match=r"method: must be one of mean_l2, .*: median"):
        score_videos(frames, "median", (0.1,))
    with pytest.raises(InputError, match="frame_norm: must be none, l2 or null: l1"):
        score_videos(frames, "qanpp", (0.1,), frame_norm="l1")
    with pytest.raises(InputError, match="negative"):
        score_videos(frames, "qanpp", (1e-4,))
    videos = frames.videos
    bare = type(videos)(videos.videos, videos.frames, videos.video_N, None)
    with pytest.raises(InputError, match="has no labels to score the videos by"):
        score_videos(frames._replace(videos=bare), "qanpp", (0.1,))
    zero_ND = np.where((videos.video_N == 3)[:, None], 0, frames.feature_ND)
    with pytest.raises(InputError, match="clip3: the vector of this video is zero"):
        score_videos(frames._replace(feature_ND=zero_ND), "mean_raw", (0.1,))


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("images.txt", lambda t: t.replace("set/", "", 1), r"images.txt:1: path is not prefix/"),
        ("images.txt", lambda t: t.replace("clip5", "clip9"), r"images.txt:\d+: video is not in"),
        ("images.txt", lambda t: t.replace("\n", "\n\n", 1), r"images.txt:2: line is empty"),
        ("images.txt", lambda t: t + "set/clip0/x.jpg\n", r"features.npy: needs a row for each of"),
        ("videos.txt", lambda t: t + "clip8\n", r"videos.txt:9: video has no frame"),
        ("videos.txt", lambda t: t + "clip2\n", r"videos.txt:9: video occurs twice"),
        ("labels.txt", lambda t: t + "4\n", r"labels.txt: needs 8 labels.*: 9"),
        ("labels.txt", lambda t: t.replace("2\n", "two\n", 1), r"labels.txt:5: .*whole number"),
        ("labels.txt", lambda t: t.replace("-1", "-2", 1), r"labels.txt:7: label is below -1"),
    ],
)
def test_lists_that_do_not_fit_are_named(
    files: dict[str, Path], name: str, edit: object, message: str
) -> None:
    files[name].write_text(edit(files[name].read_text()))  # type: ignore[operator]
    with pytest.raises(InputError, match=message):
        load(files)


def test_numbers_that_do_not_fit_are_named(files: dict[str, Path], tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.npy"

    def refused(key: str, content: np.ndarray | bytes, message: str) -> None:
        if isinstance(content, bytes):
            wrong.write_bytes(content)
        else:
            np.save(wrong, content)
        with pytest.raises(InputError, match=message):
            load(files, **{key: wrong})

    feature_ND = np.load(files["features.npy"])
    refused("features", feature_ND[:20], r"wrong.npy: needs a row for each of the 21 lines.*\(20")
    refused("features", feature_ND.astype(np.int32), "must hold floating numbers, not: int32")
    refused("features", np.float32(1), r"needs a row for each of the 21 lines.*: \(\)")
    refused("features", feature_ND[:, :0], "needs a row for each of the 21 lines")
    refused("features", b"", "is no dump of float32 with a row for each of 21 frames; its bytes: 0")
    refused("features", bytes(4 * 21 * 4 - 4), "is no dump of float32")
    refused("features", files["features.npy"].read_bytes()[:90], "is not a whole .npy file")
    refused("quality", feature_ND, "needs one number a frame, it has: 4")
    bad = feature_ND.copy()
    bad[[6, 9], 2] = np.inf
    refused("features", bad, r"is not finite in the row of the frame at: .*images.txt:7$")
    refused("quality", np.r_[np.zeros(20), np.nan], r"is not finite .*images.txt:21$")
    with pytest.raises(InputError, match=r"absent\.npy: no such file"):
        load(files, features=tmp_path / "absent.npy")


def test_pickled_numbers_are_refused(files: dict[str, Path]) -> None:
    for name in ("features.npy", "labels.npy"):
        np.save(files[name], np.array([{}] * 21, dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"is not a whole \.npy file of numbers"):
        load(files)
    with pytest.raises(InputError, match=r"is not a whole \.npy file of numbers"):
        read_label_file(files["labels.npy"], 8)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(7, np.int64), r"needs 8 whole numbers, one a video; it holds int64: \(7,\)"),
        (np.zeros(8), "it holds float64"),
        (np.full(8, -3), "label is below -1, which stands for a distractor: -3"),
    ],
)
def test_label_arrays_that_do_not_fit(tmp_path: Path, labels: np.ndarray, message: str) -> None:
    np.save(tmp_path / "l.npy", labels)
    with pytest.raises(InputError, match=message):
        read_label_file(tmp_path / "l.npy", 8)
    with pytest.raises(InputError, match="no such file"):
        read_label_file(tmp_path / "absent.npy", 8)


class Colours(nn.Module):
    """Mean colour of the upper and the lower half; `embed` is the test feature."""

    features, input_size = 6, 111

    def embed(self, x_BCHW: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(x_BCHW, (2, 1)).flatten(1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.embed(x_BCHW) + 9


class LeftHalf(nn.Module):
    """A score that a mirrored image would change."""

    input_size = 112

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW[..., : x_BCHW.shape[-1] // 2].mean(dim=(1, 2, 3))


def test_embedded_folders_give_the_files_of_the_protocol(tmp_path: Path) -> None:
    videos = load_iqiyi(write_replica("iqiyi", tmp_path / "iqiyi_tiny"))
    how = Embedding(FaceTransform(crop_first=True), ALONE, batch=5)
    how_quality = Embedding(FaceTransform(colour="bgr"), ALONE, batch=7)
    out = tmp_path / "frames"
    frames = embed_videos(videos, Colours(), how, LeftHalf(), how_quality, out)
    assert frames.quality_N is not None
    count = len(videos.frames)
    assert frames.feature_ND.shape == (count, 6)
    for row in (0, count // 2, count - 1):
        image = videos.frames.read(row).astype(np.float64)
        seen = (image[1:, 1:] - 127.5) / 127.5
        halves = np.r_[seen[:56].mean(axis=(0, 1)), seen[55:].mean(axis=(0, 1))]
        np.testing.assert_allclose(
            frames.feature_ND[row].reshape(3, 2).T.ravel(), halves, atol=1e-5
        )
        score = ((image[:, :56] - 127.5) / 127.5).mean()
        assert frames.quality_N[row] == pytest.approx(score, abs=1e-5)
    again = load_video_files(
        out / "features.npy", out / "images.txt", out / "videos.txt", out / "labels.txt",
        out / "quality.npy",
    )  # fmt: skip
    assert list(again.videos.videos) == list(videos.videos)
    assert np.array_equal(again.videos.video_N, videos.video_N)
    first, second = (score_videos(part, "qanpp", (0.2,)) for part in (frames, again))
    assert np.array_equal(first.vector_VD, second.vector_VD)
    assert first.pairs.points == second.pairs.points


def test_folders_without_a_quality_network(tmp_path: Path) -> None:
    videos = load_iqiyi(write_replica("iqiyi", tmp_path / "tiny"))
    how = Embedding(FaceTransform(crop_first=True), ALONE)
    frames = embed_videos(videos, Colours(), how, None, None, tmp_path / "out")
    assert frames.quality_N is None
    assert not (tmp_path / "out" / "quality.npy").exists()
    with pytest.raises(ValueError, match="give both or none"):
        embed_videos(videos, Colours(), how, LeftHalf(), None, tmp_path / "out")


def test_unreadable_frame_stops_with_its_path(tmp_path: Path) -> None:
    videos = load_iqiyi(write_replica("iqiyi", tmp_path / "tiny"))
    path = videos.frames.root / videos.frames.names[3]
    path.write_bytes(b"no picture")
    how = Embedding(FaceTransform(crop_first=True), ALONE)
    with pytest.raises(InputError, match=path.name):
        embed_videos(videos, Colours(), how, None, None, tmp_path / "out")


def test_a_name_that_a_list_cannot_hold_is_refused(tmp_path: Path) -> None:
    root = write_replica("iqiyi", tmp_path / "tiny")
    first = load_iqiyi(root).frames.names[0]
    (root / first).rename((root / first).with_name("a frame.jpg"))
    how = Embedding(FaceTransform(crop_first=True), ALONE)
    with pytest.raises(InputError, match="frame cannot be listed as prefix/<video>/<frame>"):
        embed_videos(load_iqiyi(root), Colours(), how, None, None, tmp_path / "out")
