"""`predict`: scores of crops from pictures, folders and videos."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import reid_rqen.train  # noqa: F401  (the schema of configs/train.yaml)
from common import rundir
from common.checkpoint import Checkpointer
from common.log import InputError
from reid_rqen import build
from reid_rqen.crops import Sample, find_crops
from reid_rqen.data.transforms import FrameTransform
from reid_rqen.predict import PredictConfig, Scored, fit, open_trained, predict, run, strip
from reid_rqen.rows import CONFIGS
from reid_rqen.weights import Trained, save_release

SIZE = (56, 28)


def make_run(folder: Path) -> Path:
    """A run folder as training leaves it, with quality scores that differ between frames."""
    torch.manual_seed(0)
    model = build("rqen_322", 5, trunk="tiny", quality="tiny")
    torch.nn.init.normal_(model.quality.fc.weight, std=0.5)
    with initialize_config_dir(str(CONFIGS), version_base=None):
        config = compose("train", ["experiment=debug/tiny"])
    rundir.prepare(folder, OmegaConf.to_container(config, resolve=True), main=True)
    Checkpointer(folder / "checkpoints", model).save(3)
    return folder


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def sequence_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("release") / "rnn.safetensors"
    model = {"_target_": "reid_rqen.models.cnn_rnn.CNNRNN", "_partial_": True}
    transform = {"_target_": "reid_rqen.data.transforms.FlowTransform"}
    config = {"model": model, "transform": transform}
    save_release(Trained(build("cnn_rnn"), None, config, 1, path), path)
    return path


def make_folder(folder: Path, frames: int = 3, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    image_THW3 = np.random.default_rng(seed).integers(0, 256, (frames, *SIZE, 3), dtype=np.uint8)
    for number, image in enumerate(image_THW3, start=1):
        cv2.imwrite(str(folder / f"{number}.png"), image)
    return folder


def go(run_dir: Path, out: Path, source: Path, **options: object) -> dict:
    config = PredictConfig(
        input=str(source), out=str(out), run_dir=str(run_dir), device="cpu", **options
    )
    result = run(config)
    assert json.loads((out / "predict.json").read_text()) == result
    return result


def scores(found: dict) -> np.ndarray:
    return np.array([[frame["score"] for frame in crops["frames"]] for crops in found["input"]])


def test_two_folders_equal_the_model_itself(run_dir: Path, tmp_path: Path) -> None:
    a, b = (make_folder(tmp_path / name, 11, seed) for seed, name in enumerate("ab"))
    found = go(run_dir, tmp_path / "out", a, other=str(b), batch=4)
    trained = open_trained(run_dir)
    images = [trained.transform.load([f / f"{n}.png" for n in range(1, 12)]) for f in (a, b)]
    with torch.no_grad():
        wanted = trained.model(trained.transform.normalize(torch.stack(images)))
    np.testing.assert_allclose(scores(found)[0], wanted.score_STR[0], atol=1e-6)
    frames = found["input"][0]["frames"]
    assert [Path(frame["path"]).name for frame in frames] == [f"{n}.png" for n in range(1, 12)]
    weight_TR = np.array([frame["weight"] for frame in frames])
    np.testing.assert_allclose(weight_TR, scores(found)[0] / scores(found)[0].sum(0), rtol=1e-5)
    (pair,) = found["pairs"]
    cosine = float(wanted.vector_SD[0] @ wanted.vector_SD[1])
    assert pair["cosine"] == pytest.approx(cosine, abs=1e-6)
    assert pair["squared_distance"] == pytest.approx(2 - 2 * cosine, abs=1e-5)
    assert pair["frames"] == [11, 11]
    assert cv2.imread(str(tmp_path / "out" / "scores.png")).shape[1] == 2 * 16 + 11 * 112 + 10 * 8


def test_a_single_picture_has_weight_one(run_dir: Path, tmp_path: Path) -> None:
    source = make_folder(tmp_path / "a", 1) / "1.png"
    found = go(run_dir, tmp_path / "out", source)
    assert found["input"][0]["frames"][0]["weight"] == [1.0, 1.0, 1.0]
    assert found["pairs"] == []
    assert all(0 < value < 1 for value in found["input"][0]["frames"][0]["score"])


def test_a_folder_of_folders_is_compared_set_by_set(run_dir: Path, tmp_path: Path) -> None:
    for name, seed in (("2", 0), ("10", 1)):
        make_folder(tmp_path / "many" / name, 2, seed)
    other = make_folder(tmp_path / "other", 2, seed=1)
    found = go(run_dir, tmp_path / "out", tmp_path / "many", other=str(other), strips=2)
    assert [Path(crops["path"]).name for crops in found["input"]] == ["2", "10"]
    far, same = found["pairs"]
    assert same["squared_distance"] == pytest.approx(0, abs=1e-10)
    assert far["squared_distance"] > 1e-6


def write_video(path: Path, image_THW3: Sequence[np.ndarray]) -> None:
    height, width = image_THW3[0].shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (width, height))
    for image in image_THW3:
        writer.write(image)
    writer.release()


def test_a_video_equals_its_frames(run_dir: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (9, 64, 32, 3), dtype=np.uint8)
    write_video(tmp_path / "a.avi", noise)
    capture = cv2.VideoCapture(str(tmp_path / "a.avi"))
    (tmp_path / "frames").mkdir()
    for number in range(9):
        cv2.imwrite(str(tmp_path / "frames" / f"{number}.png"), capture.read()[1])
    found = go(run_dir, tmp_path / "out", tmp_path / "a.avi", batch=4)
    again = go(run_dir, tmp_path / "again", tmp_path / "frames")
    np.testing.assert_allclose(scores(found), scores(again), atol=1e-6)
    assert found["input"][0]["frames"][8]["path"].endswith("a.avi#8")


@pytest.mark.parametrize("order", ["bgr", "rgb"])
def test_fit_is_what_the_transform_loads(tmp_path: Path, order: str) -> None:
    path = make_folder(tmp_path / "a", 1) / "1.png"
    transform = FrameTransform(size=(40, 31), order=order)
    image = cv2.imread(str(path))
    assert torch.equal(fit(image, transform), transform.load([path])[0])


@pytest.mark.parametrize("frames", [1, 12, 13, 1000])
def test_sample_is_even_and_bounded(frames: int) -> None:
    sample, largest = Sample(12), 0
    for position in range(frames):
        sample.offer(position, np.full((300, 2, 3), position % 256, np.uint8))
        largest = max(largest, len(sample.kept))
    positions = [position for position, _ in sample.chosen()]
    assert len(positions) == min(frames, 12)
    assert largest <= 97
    gaps = np.diff(positions)
    assert positions[0] == 0
    assert positions[-1] > 0.98 * (frames - 1) - 1
    assert gaps.size == 0 or gaps.max() - gaps.min() <= max(1, sample.step)
    assert all(image.shape[0] == 256 for _, image in sample.chosen())


def test_regions_out_of_use_are_drawn_without_score(run_dir: Path, tmp_path: Path) -> None:
    trained = open_trained(run_dir)
    trained.model.use_regions = [0, 2]
    found = predict(trained.model, [np.zeros((*SIZE, 3), np.uint8)] * 2, trained.transform)
    assert found.score_TR.shape == (2, 2)
    (crops,) = find_crops(make_folder(tmp_path / "a", 2))
    shown = [(1, np.zeros((*SIZE, 3), np.uint8))]
    drawn = strip(trained.model, Scored(crops, ["a", "b"], found, shown))
    np.testing.assert_array_equal(np.isnan(drawn.score_TR), [[False, True, False]])
    np.testing.assert_array_equal(drawn.score_TR[0, [0, 2]], found.score_TR[1])


def bad_folder(tmp_path: Path, kind: str) -> Path:
    folder = tmp_path / kind
    if kind == "missing":
        return folder
    folder.mkdir()
    (folder / "notes.txt").write_text("no picture")
    if kind == "broken":
        make_folder(folder / "1", 2)
        (folder / "1" / "3.png").write_bytes(b"\x89PNG broken")
    if kind == "both":
        make_folder(folder / "1", 1)
        (folder / "1.png").write_bytes(b"")
    if kind == "empty_inside":
        make_folder(folder / "1", 1)
        (folder / "2").mkdir()
    return folder


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"missing: no such file or folder"),
        ("empty", r"empty: holds no picture and no folder"),
        ("broken", r"3\.png: image cannot be decoded"),
        ("both", r"both: holds pictures and folders"),
        ("empty_inside", r"empty_inside/2: holds no picture"),
    ],
)
def test_bad_folders_are_named(run_dir: Path, tmp_path: Path, kind: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        go(run_dir, tmp_path / "out", bad_folder(tmp_path, kind))
    assert not (tmp_path / "out").exists()


def test_sequence_models_have_no_scores(sequence_release: Path, tmp_path: Path) -> None:
    source = make_folder(tmp_path / "a")
    config = PredictConfig(input=str(source), out=str(tmp_path), checkpoint=str(sequence_release))
    with pytest.raises(InputError, match=r"rnn\.safetensors: gives no scores .*CNNRNN"):
        run(config)


def command(*words: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "reid_rqen.predict", "device=cpu", *words]
    return subprocess.run(line, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.slow
def test_bad_input_is_one_line_and_exit_code_2(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    done = command(f"run_dir={run_dir}", f"input={tmp_path}/broken.mp4", f"out={tmp_path}/out")
    wanted = f"error: {tmp_path}/broken.mp4: video cannot be decoded, or holds no frame\n"
    assert (done.returncode, done.stderr) == (2, wanted)
    done = command(f"checkpoint={tmp_path}/broken.mp4", f"input={tmp_path}", f"out={tmp_path}/out")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}/broken.mp4: is not a safetensors file")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_command_writes_both_files(run_dir: Path, tmp_path: Path) -> None:
    source = make_folder(tmp_path / "a")
    done = command(f"run_dir={run_dir}", f"input={source}", f"out={tmp_path}/out")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"predict.json", "scores.png"}
