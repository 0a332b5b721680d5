"""`predict`: detections equal to the model's, of everything that can be looked at, and refusals."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as coder

import detection_tsd
from common import dist
from common.log import InputError
from detection_tsd.data.draws import ImageRows
from detection_tsd.data.synthetic import load_synthetic
from detection_tsd.data.transforms import read_rgb
from detection_tsd.engine import Detecting, Found, detect
from detection_tsd.inputs import Film
from detection_tsd.looking import above
from detection_tsd.predict import GridConfig, PredictConfig, detect_pictures
from detection_tsd.predict import run as predict
from detection_tsd.proposals import Grid, usual_sides
from detection_tsd.tests import releases
from detection_tsd.tests.conftest import SIZES
from detection_tsd.tests.launch import command
from detection_tsd.tests.pictures import film, noise, save
from detection_tsd.weights import load_trained, open_trained


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector without an RPN."""
    path = tmp_path_factory.mktemp("fixed") / "a.safetensors"
    return releases.write(path, "experiment=synth/tsd")


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector with an RPN and masks that resizes its pictures."""
    words = ("experiment=debug/rpn", "transform=small", releases.MASK, "post.per_image=20")
    return releases.write(tmp_path_factory.mktemp("masks") / "a.safetensors", *words)


def go(checkpoint: Path, source: Path, out: Path, **options: Any) -> dict[str, Any]:
    given = {"score_threshold": 0.0, "device": "cpu"} | options
    config = PredictConfig(input=str(source), out=str(out), checkpoint=str(checkpoint), **given)
    result = predict(config)
    assert json.loads((out / "predictions.json").read_text()) == result
    return result


def content(out: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / f"{name}.json").read_text())
    return found


def same(a: Found, b: Found) -> None:
    assert a.size == b.size
    for one, other in zip(a[2:5], b[2:5], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    assert a.masks == b.masks


@pytest.mark.slow
def test_a_folder_with_its_proposals_equals_the_evaluation(
    run: Path, glyphs: Path, tmp_path: Path
) -> None:
    trained, data = load_trained(run), load_synthetic(glyphs, "val", **SIZES)
    how = Detecting(trained.transform, dist.World(0, 1, torch.device("cpu")))
    wanted = detect(trained.model, ImageRows(data, trained.transform), how)
    config = PredictConfig(
        input=str(glyphs / "val"), out=str(tmp_path), run_dir=str(run), device="cpu",
        score_threshold=0.0, pictures=2,
    )  # fmt: skip
    result = predict(config)
    assert result["proposals"] == str(glyphs / "proposals_val.npz")
    assert (result["step"], result["trained_on"]) == (40, trained.config["train_set"])
    assert [entry["id"] for entry in result["inputs"]] == sorted(
        path.name for path in (glyphs / "val").iterdir()
    )
    for entry, found in zip(result["inputs"], wanted, strict=True):
        listed = content(tmp_path, entry["id"])["detections"]
        assert len(listed) == entry["detections"] == len(found.score_D) > 10
        np.testing.assert_allclose([one["box"] for one in listed], found.box_D4, atol=1e-4)
        np.testing.assert_allclose([one["score"] for one in listed], found.score_D, atol=1e-6)
        assert [one["label"] for one in listed] == found.label_D.tolist()
        for one in listed:
            assert one["class"] == trained.classes[one["label"] - 1]
            assert one["class_id"] == trained.class_ids[one["label"] - 1]
    drawn = [entry["picture"] for entry in result["inputs"]]
    assert drawn[:3] == ["000001.png.png", "000002.png.png", None]
    picture = cv2.imread(str(tmp_path / drawn[0]))
    assert picture.shape == (384, 384, 3)
    plain = read_rgb(glyphs / "val" / "000001.png").repeat(4, 0).repeat(4, 1)
    assert (picture[..., ::-1] != plain).any(), "boxes are drawn"


def test_the_grid_is_used_without_a_file(fixed: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "in" / "a.png", noise(96, 80))
    result = go(fixed, path, tmp_path / "out")
    assert result["proposals"]["sides"] == list(usual_sides(open_trained(fixed).model))
    (found,) = detect_pictures(fixed, [path])
    listed = content(tmp_path / "out", "a.png")
    np.testing.assert_allclose([e["box"] for e in listed["detections"]], found.box_D4, atol=1e-4)
    assert (listed["height"], listed["width"]) == (96, 80)
    box_M4 = Grid(usual_sides(open_trained(fixed).model)).boxes(96, 80)
    (again,) = detect_pictures(fixed, [path], proposals=[box_M4])
    same(found, again)
    (other,) = detect_pictures(fixed, [path], proposals=[box_M4[:50]])
    assert len(other.score_D) != len(found.score_D) or (other.score_D != found.score_D).any()
    fewer = go(fixed, path, tmp_path / "few", grid=GridConfig(sides=[40.0], limit=60))
    assert fewer["proposals"]["sides"] == [40.0]


def test_only_better_detections_are_written(fixed: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", noise(96, 96))
    everything = go(fixed, path, tmp_path / "all") and content(tmp_path / "all", "a.png")
    scores = [one["score"] for one in everything["detections"]]
    assert scores == sorted(scores, reverse=True)
    cut = float(np.median(scores))
    for number, post in enumerate(({}, {"nms": "soft_gaussian"})):
        out = tmp_path / str(number)
        go(fixed, path, out, score_threshold=cut, post=post)
        kept = [one["score"] for one in content(out, "a.png")["detections"]]
        assert kept
        assert min(kept) > cut
        if not post:  # what scores less never changes what scores more
            assert kept == [score for score in scores if score > cut]


def test_found_is_cut_with_its_masks() -> None:
    score_D = np.array([0.9, 0.5, 0.2], np.float32)
    given = Found(3, (4, 5), np.eye(3, 4), score_D, np.arange(1, 4), [{"n": 1}, {"n": 2}, {"n": 3}])
    found = above(given, 0.5)
    assert (found.row, found.size, found.masks) == (3, (4, 5), [{"n": 1}])
    assert found.label_D.tolist() == [1]


def test_masks_are_run_length_codes_of_the_picture(masks: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", noise(60, 100))
    result = go(masks, path, tmp_path / "out")
    assert result["proposals"] == "of the detector"
    detections = content(tmp_path / "out", "a.jpg")["detections"]
    assert len(detections) == 20
    (found,) = detection_tsd.predict(masks, [path])
    assert found.masks == [one["mask"] for one in detections]
    inked = [coder.decode(one["mask"]) for one in detections]
    assert {mask_HW.shape for mask_HW in inked} == {(60, 100)}
    assert sum(int(mask_HW.sum()) for mask_HW in inked) > 0
    for one, mask_HW in zip(detections, inked, strict=True):
        y, x = np.nonzero(mask_HW)
        x1, y1, x2, y2 = one["box"]
        if len(x):
            assert x.min() >= x1 - 3
            assert x.max() <= x2 + 3
            assert y.min() >= y1 - 3
            assert y.max() <= y2 + 3


@pytest.mark.parametrize("name", ["fixed", "masks"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 300), (211, 3), (97, 41)])
def test_any_shape(
    name: str, height: int, width: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = save(tmp_path / "a.png", noise(height, width))
    result = go(request.getfixturevalue(name), path, tmp_path / "out")
    detections = content(tmp_path / "out", "a.png")["detections"]
    assert result["inputs"][0]["detections"] == len(detections)
    for one in detections:
        x1, y1, x2, y2 = one["box"]
        assert 0 <= x1 <= x2 <= width
        assert 0 <= y1 <= y2 <= height
    assert (tmp_path / "out" / "a.png.png").is_file()


def test_grey_transparent_and_deep_pictures_are_the_picture(fixed: Path, tmp_path: Path) -> None:
    grey_HW = noise(64, 64)[..., 0]
    opaque_HW = np.full_like(grey_HW, 255)
    kinds = {
        "rgb.png": np.stack([grey_HW] * 3, axis=-1),
        "grey.png": grey_HW,
        "rgba.png": np.dstack([grey_HW, grey_HW, grey_HW, opaque_HW // 2]),
        "deep.png": grey_HW.astype(np.uint16) * 257,
    }
    for name, image in kinds.items():
        path = tmp_path / name
        assert cv2.imwrite(str(path), image)
    wanted, *others = detect_pictures(fixed, [tmp_path / name for name in kinds])
    assert len(wanted.score_D) > 10
    for found in others:
        same(found, wanted)


def make_tree(top: Path) -> Path:
    for name in ("10.png", "9.png", "below/b.bmp", ".hidden/c.png"):
        save(top / name, noise(40, 40))
    film(top / "below" / "film.avi", 3)
    (top / "notes.txt").write_text("no picture")
    (top / ".d.png").write_text("hidden")
    return top


def test_a_folder_is_searched_and_its_output_left_out(fixed: Path, tmp_path: Path) -> None:
    top = make_tree(tmp_path / "top")
    for _ in range(2):  # the second time its own pictures are there
        result = go(fixed, top, top / "out")
        names = [entry["id"] for entry in result["inputs"]]
        assert names == ["9.png", "10.png", "below/b.bmp", "below/film.avi"]
    assert [entry["kind"] for entry in result["inputs"]] == ["picture"] * 3 + ["video"]
    for entry in result["inputs"]:
        assert (top / "out" / entry["picture"]).is_file()
        assert content(top / "out", entry["id"])["id"] == entry["id"]


def test_unreadable_files_stop_or_are_listed(fixed: Path, tmp_path: Path) -> None:
    top = make_tree(tmp_path / "top")
    whole = cv2.imencode(".jpg", noise(40, 40))[1].tobytes()
    (top / "cut.jpg").write_bytes(whole[:-40])
    (top / "below" / "text.mp4").write_text("no film")
    (top / "empty.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"(cut\.jpg|text\.mp4|empty\.png): "):
        go(fixed, top, tmp_path / "out")
    assert not (tmp_path / "out" / "predictions.json").exists()
    result = go(fixed, top, tmp_path / "out", skip_bad=True)
    assert len(result["inputs"]) == 4
    skipped = {entry["id"]: entry["error"] for entry in result["skipped"]}
    assert set(skipped) == {"cut.jpg", "below/text.mp4", "empty.png"}
    assert "cut.jpg: " in skipped["cut.jpg"]
    assert "is no video" in skipped["below/text.mp4"]


@pytest.mark.parametrize("every", [1, 2])
def test_frames_of_a_video_equal_pictures(fixed: Path, tmp_path: Path, every: int) -> None:
    path = film(tmp_path / "a.avi", 5)
    result = go(fixed, path, tmp_path / "out", every=every, batch=2, score_threshold=0.2)
    found = content(tmp_path / "out", "a.avi")
    assert [frame["frame"] for frame in found["frames"]] == list(range(0, 5, every))
    assert [frame["time"] for frame in found["frames"]] == [n / 8 for n in range(0, 5, every)]
    assert (found["rate"], found["height"], found["width"]) == (8.0, 48, 64)
    with Film(path) as video:
        frames = list(video)
    counts = []
    for frame in found["frames"]:
        picture = save(tmp_path / "one.png", frames[frame["frame"]])
        (wanted,) = detect_pictures(fixed, [picture])
        wanted = above(wanted, 0.2)
        boxes = np.array([one["box"] for one in frame["detections"]]).reshape(-1, 4)
        np.testing.assert_allclose(boxes, wanted.box_D4, atol=1e-3)
        counts.append(len(boxes))
    assert sum(counts) == result["inputs"][0]["detections"] > 0
    with Film(tmp_path / "out" / "a.avi.mp4") as drawn:
        assert drawn.rate == pytest.approx(8 / every)
        shapes = [frame.shape for frame in drawn]
    assert shapes == [(48 * 6, 64 * 6, 3)] * len(found["frames"])
    assert not list((tmp_path / "out").glob(".*"))
    silent = go(fixed, path, tmp_path / "silent", pictures=0)
    assert silent["inputs"][0]["picture"] is None
    assert not list((tmp_path / "silent").glob("*.mp4"))


def test_proposals_that_cannot_be_used(fixed: Path, masks: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", noise(40, 40))
    (tmp_path / "text.npz").write_text("no arrays")
    with pytest.raises(InputError, match=r"text\.npz: "):
        go(fixed, path, tmp_path / "out", proposals=str(tmp_path / "text.npz"))
    with pytest.raises(InputError, match=r"gone\.npz: cannot be read"):
        go(fixed, path, tmp_path / "out", proposals=str(tmp_path / "gone.npz"))
    np.savez(tmp_path / "a.npz", a=np.zeros((1, 4)))
    with pytest.raises(InputError, match="proposals: this detector proposes itself"):
        go(masks, path, tmp_path / "out", proposals=str(tmp_path / "a.npz"))
    video = film(tmp_path / "b.avi", 2)
    with pytest.raises(InputError, match=r"holds proposals of pictures, this is a video: .*b\.avi"):
        go(fixed, video, tmp_path / "out", proposals=str(tmp_path / "a.npz"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="1 proposals for 2 images"):
        detect_pictures(fixed, [path, path], proposals=[np.zeros((1, 4))])
    with pytest.raises(ValueError, match="only for a detector without an RPN"):
        detect_pictures(masks, [path], proposals=[np.zeros((1, 4))])
    # A picture without any proposal is one without a detection.
    (found,) = detect_pictures(fixed, [path], proposals=[np.zeros((0, 4), np.float32)])
    assert len(found.score_D) == 0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"batch": 0}, "batch: must be at least 1: 0"),
        ({"every": -1}, "every: must be at least 1: -1"),
        ({"score_threshold": 1.0}, r"score_threshold: must be in \[0, 1\): 1.0"),
        ({"score_threshold": float("nan")}, "score_threshold: must be in"),
        ({"pictures": -1}, "pictures: must not be negative"),
        ({"precision": "int8"}, "precision: must be one of .*: int8"),
        ({"post": {"nms": "none"}}, "cannot be built"),
        ({"grid": GridConfig(sides=[])}, "grid: is not accepted: sides="),
        ({"grid": GridConfig(step=0)}, "grid: is not accepted: step=0"),
        ({"run_dir": "runs"}, "run_dir, checkpoint: give exactly one"),
    ],
)
def test_bad_options_are_named(fixed: Path, option: dict, message: str, tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", noise(20, 20))
    with pytest.raises(InputError, match=message):
        go(fixed, path, tmp_path / "never", **option)
    assert not (tmp_path / "never").exists()


def test_nothing_to_look_at(fixed: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: has no picture or video \(\.bmp"):
        go(fixed, tmp_path / "empty", tmp_path / "out")
    with pytest.raises(InputError, match="gone: no such file or folder"):
        go(fixed, tmp_path / "gone", tmp_path / "out")
    with pytest.raises(InputError, match="out: must not be the folder of the pictures"):
        go(fixed, tmp_path / "empty", tmp_path / "empty")
    with pytest.raises(ValueError, match="need a sequence of paths"):
        detect_pictures(fixed, "a.png")
    assert detect_pictures(fixed, []) == []


def test_a_missing_extra_is_named(
    fixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "cv2" else real(name)
    )
    with pytest.raises(InputError, match=r"cv2: not installed: .*vision-tasks\[tsd\]"):
        go(fixed, tmp_path, tmp_path / "out")


def test_the_public_function_stays_callable(fixed: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", noise(48, 48))
    loaded = open_trained(fixed)
    for model in (fixed, str(fixed), loaded):
        (found,) = detection_tsd.predict(model, [path])
        assert found.size == (48, 48)
    with pytest.raises(InputError, match="no such file or folder"):
        detection_tsd.predict(tmp_path / "gone", [path])


def test_the_command(fixed: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", noise(48, 48))
    words = (f"checkpoint={fixed}", f"out={tmp_path / 'out'}", "device=cpu")
    done = command("detection_tsd.predict", *words, f"input={path}", "score_threshold=0")
    assert done.code == 0, done.err
    assert "a.png" in done.out
    assert "48 x 48" in done.out
    assert "predict 1/1" in done.err
    names = {item.name for item in (tmp_path / "out").iterdir()}
    assert names == {"predictions.json", "a.png.json", "a.png.png"}
    (tmp_path / "b.png").write_text("no picture")
    done = command("detection_tsd.predict", *words, f"input={tmp_path / 'b.png'}")
    line = done.err.strip().splitlines()[-1]
    assert (done.code, line) == (2, f"error: {tmp_path}/b.png: picture cannot be decoded: 10 bytes")
    done = command("detection_tsd.predict", *words, f"input={path}", "treshold=1")
    assert done.code == 2
    assert "treshold" in done.err
