"""`predict`: similarities, verdicts and groups equal to the model's; what it refuses."""

import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

import face_lfr
from common.log import InputError
from face_lfr.clusters import average_linkage, connected, similarity_to_mean
from face_lfr.data.transforms import read_rgb
from face_lfr.pair_drawing import draw_groups
from face_lfr.tests.launch import command
from face_lfr.tests.prediction import cosine, draw_album, features, go, save
from face_lfr.tests.releases import IR, QUALITY, transform_node, write
from face_lfr.weights import open_trained


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("net") / "net.safetensors")


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_album(tmp_path_factory.mktemp("album") / "album")


@pytest.fixture(scope="module")
def rater(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sees other images than `net`: larger, blue first, cropped and resized."""
    node = transform_node(size=31, colour="bgr", crop_first=True, resize=24)
    return write(tmp_path_factory.mktemp("rater") / "rater.safetensors", QUALITY, node)


@pytest.mark.parametrize("flip", [True, False])
def test_two_pictures_equal_the_model_itself(
    net: Path, album: Path, tmp_path: Path, flip: bool
) -> None:
    a, b = album / "0" / "0.png", album / "1" / "3.png"
    result = go(net, tmp_path, a, other=str(b), flip=flip)
    left, right = features(net, [read_rgb(a), read_rgb(b)], flip)
    assert result["similarity"] == pytest.approx(cosine(left, right), abs=1e-6)
    assert result["similarities"][0][1] == result["similarities"][1][0] == result["similarity"]
    assert [entry["path"] for entry in result["pictures"]] == [str(a), str(b)]
    norms = [entry["norm"] for entry in result["pictures"]]
    assert norms == pytest.approx([np.linalg.norm(left), np.linalg.norm(right)], rel=1e-5)
    assert (result["mode"], result["colour"], result["flip"]) == ("pair", "rgb", flip)


def test_the_verdict_follows_the_threshold(net: Path, album: Path, tmp_path: Path) -> None:
    a, b = album / "0" / "0.png", str(album / "1" / "3.png")
    undecided = go(net, tmp_path, a, other=b)
    assert undecided["verdict"] == "no threshold: nothing is decided"
    assert (undecided["threshold"], undecided["fpr"]) == (None, None)
    assert undecided["threshold_source"].startswith("none was given")
    similarity = undecided["similarity"]
    at = go(net, tmp_path, a, other=b, threshold=similarity)
    assert at["verdict"] == "different persons"
    assert (at["threshold"], at["threshold_source"]) == (similarity, f"threshold={similarity:g}")
    below = float(np.nextafter(similarity, -1))
    assert go(net, tmp_path, a, other=b, threshold=below)["verdict"] == "same person"


def test_a_single_picture_gives_its_feature(net: Path, album: Path, tmp_path: Path) -> None:
    path = album / "1" / "0.png"
    result = go(net, tmp_path, path)
    (feature_D,) = features(net, [read_rgb(path)])
    unit_D = feature_D / np.linalg.norm(feature_D)
    found = result["embedding"]
    np.testing.assert_allclose(found["vector"], unit_D, atol=1e-6)
    plain, mirror = features(net, [read_rgb(path), read_rgb(path)[:, ::-1]], flip=False)
    assert found["mirror_cosine"] == pytest.approx(cosine(plain, mirror), abs=1e-3)
    wanted = (16, unit_D.mean(), unit_D.std(), unit_D.min(), unit_D.max())
    names = ("width", "mean", "std", "min", "max")
    assert [found[name] for name in names] == pytest.approx(list(wanted), abs=1e-6)
    assert result["verdict"] is None
    assert result["pictures"][0]["nearest"] is None


@pytest.mark.parametrize("linkage", ["average", "connected"])
def test_a_folder_is_grouped(net: Path, album: Path, tmp_path: Path, linkage: str) -> None:
    paths = [album / "0" / "0.png", *(album / "1" / f"{n}.png" for n in range(11))]
    paths.append(album / "2" / "0.png")
    feature_ND = features(net, [read_rgb(path) for path in paths])
    vector_ND = feature_ND / np.linalg.norm(feature_ND, axis=1, keepdims=True)
    similarity_NN = vector_ND @ vector_ND.T
    similarity_NN = (similarity_NN + similarity_NN.T) / 2
    rule = {"average": average_linkage, "connected": connected}[linkage]
    cuts = np.linspace(similarity_NN.min(), 1, 50)
    cut = next(float(c) for c in cuts if len(set(rule(similarity_NN, c).tolist())) >= 4)
    label_N = rule(similarity_NN, cut)
    result = go(net, tmp_path / "out", album, threshold=cut, linkage=linkage)
    entries = result["pictures"]
    assert [entry["path"] for entry in entries] == [str(path) for path in paths]
    np.testing.assert_allclose(result["similarities"], similarity_NN, atol=1e-6)
    assert [entry["cluster"] for entry in entries] == label_N.tolist()
    for label, names in enumerate(result["clusters"]):
        assert names == [str(p) for p, k in zip(paths, label_N, strict=True) if k == label]
    wanted_N = similarity_to_mean(vector_ND, label_N)
    found = [entry["similarity_to_mean"] for entry in entries]
    np.testing.assert_allclose(found, wanted_N, atol=1e-6)
    np.fill_diagonal(similarity_NN, -2)
    near = [str(paths[row]) for row in similarity_NN.argmax(axis=1)]
    assert [entry["nearest"] for entry in entries] == near
    assert result["verdict"].startswith(f"{label_N.max() + 1} persons in 13 pictures")


def test_a_folder_without_a_threshold_is_not_grouped(
    net: Path, album: Path, tmp_path: Path
) -> None:
    result = go(net, tmp_path, album)
    assert result["clusters"] is None
    assert result["verdict"] == "no threshold: not grouped"
    assert {entry["cluster"] for entry in result["pictures"]} == {None}
    assert len(result["similarities"]) == 13


def test_many_pictures_have_their_similarities_in_a_file(net: Path, tmp_path: Path) -> None:
    noise, folder = np.random.default_rng(0), tmp_path / "in"
    for number in range(101):
        save(folder / f"{number}.png", noise.integers(0, 256, (24, 24, 3), np.uint8))
    result = go(net, tmp_path / "out", folder, threshold=0.99, batch=40, rows=2, columns=3)
    assert result["similarities"] is None
    similarity_NN = np.load(tmp_path / "out" / result["similarities_file"])
    assert similarity_NN.shape == (101, 101)
    np.testing.assert_array_equal(similarity_NN, similarity_NN.T)
    nearest = np.sort(similarity_NN, axis=1)[:, -2]
    found = [entry["nearest_similarity"] for entry in result["pictures"]]
    np.testing.assert_array_equal(found, nearest)
    alone = [names for names in result["clusters"] if len(names) == 1]
    assert result["verdict"].endswith(f", {len(alone)} in a single one")


def test_quality_of_each_picture(net: Path, rater: Path, album: Path, tmp_path: Path) -> None:
    result = go(net, tmp_path, album, quality=str(rater), threshold=0.2)
    model, wanted = open_trained(rater).model, []
    for entry in result["pictures"]:
        image = cv2.resize(read_rgb(entry["path"]), (31, 31), interpolation=cv2.INTER_LINEAR)
        plane_3HW = torch.from_numpy(image[1:, 1:, ::-1].transpose(2, 0, 1).astype(np.float32))
        x_13HW = torch.nn.functional.interpolate(plane_3HW[None], (24, 24), mode="bilinear")
        with torch.no_grad():
            wanted.append(float(model((x_13HW - 127.5) / 127.5)))
    found = [entry["quality"] for entry in result["pictures"]]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert np.std(wanted) > 1e-3
    pair = go(net, tmp_path, album / "0" / "0.png", other=str(album / "1" / "0.png"))
    assert pair["pictures"][0]["quality"] is None


def zero(model: Any) -> None:
    for tensor in (model.fc.weight, model.fc.bias, model.last_norm.running_mean):
        tensor.data.zero_()
    model.last_norm.bias.data.zero_()


def spoil(model: Any) -> None:
    model.fc.bias.data[3] = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [(zero, r"0\.png: feature is 0, it has no direction"), (spoil, "feature is no number")],
)
def test_useless_features_are_named(change: Any, message: str, album: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "net.safetensors", change=change)
    with pytest.raises(InputError, match=message):
        go(path, tmp_path / "out", album)
    with pytest.raises(InputError, match=message):
        face_lfr.predict(path, [album / "0" / "0.png"])
    assert not (tmp_path / "out").exists()


def test_a_useless_quality_is_named(net: Path, album: Path, tmp_path: Path) -> None:
    def infinite(model: Any) -> None:
        model.score.weight.data[:] = float("inf")

    path = write(tmp_path / "rater.safetensors", QUALITY, change=infinite)
    with pytest.raises(InputError, match=r"0\.png: quality is no number"):
        go(net, tmp_path / "out", album, quality=str(path))


def test_networks_in_each_others_place(net: Path, rater: Path, album: Path, tmp_path: Path) -> None:
    path = album / "0" / "0.png"
    with pytest.raises(InputError, match=r"quality: .* is no quality network.*: embedding"):
        go(net, tmp_path, path, quality=str(net))
    with pytest.raises(InputError, match=r"checkpoint: .* is no recogniser.*: quality"):
        go(rater, tmp_path, path)
    with pytest.raises(InputError, match="is no recogniser"):
        face_lfr.predict(rater, [path])
    other = write(tmp_path / "a.safetensors", IR, transform_node(size=32))
    with pytest.raises(InputError, match=r"transform: the model takes 24 px, .*: 32"):
        go(other, tmp_path, path)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"batch": 0}, "batch: must be at least 1: 0"),
        ({"columns": -1}, "columns: must be at least 1"),
        ({"linkage": "ward"}, "linkage: must be one of average, connected: ward"),
        ({"precision": "int8"}, "precision: must be one of .*: int8"),
        ({"threshold": 1.5}, "threshold: a threshold must be a cosine, from -1 to 1: 1.5"),
        ({"threshold": float("nan")}, "threshold: a threshold must be a cosine"),
        ({"fpr": 1e-4}, "fpr: .*calibration= must name"),
        ({"calibration_set": "lfw"}, "calibration_set: .*calibration= must name"),
        ({"calibration": "here", "threshold": 0.2}, "threshold, calibration: give one of them"),
        ({"calibration": "here"}, r"here/metrics\.json: cannot be read"),
        ({"run_dir": "runs"}, "run_dir, checkpoint: give exactly one"),
        ({"other": "nothing.png"}, r"nothing\.png: no such file or folder"),
    ],
)
def test_bad_options_are_named(net: Path, album: Path, option: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        go(net, album.parent / "never", album / "0" / "0.png", **option)
    assert not (album.parent / "never").exists()


def test_only_pictures_are_compared(net: Path, album: Path, tmp_path: Path) -> None:
    path = album / "0" / "0.png"
    with pytest.raises(InputError, match="input: two pictures are compared"):
        go(net, tmp_path, album, other=str(path))
    with pytest.raises(InputError, match="other: two pictures are compared"):
        go(net, tmp_path, path, other=str(album))
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(InputError, match=r"text\.png: image cannot be decoded"):
        go(net, tmp_path / "out", tmp_path / "text.png")


def test_groups_to_draw_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        draw_groups([], tmp_path / "a.png", "nothing")


def test_a_missing_matplotlib_is_named(
    net: Path, album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"matplotlib: not installed: .*vision-tasks\[lfr\]"):
        go(net, tmp_path, album / "0" / "0.png")


def test_the_command(net: Path, album: Path, tmp_path: Path) -> None:
    words = (f"checkpoint={net}", f"out={tmp_path / 'out'}", "device=cpu")
    a, b = album / "0" / "0.png", album / "1" / "0.png"
    done = command("face_lfr.predict", *words, f"input={a}", f"other={b}", "threshold=-1")
    assert done.code == 0, done.err
    assert "cosine similarity" in done.out
    assert "same person" in done.out
    assert "threshold=-1" in done.out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"predict.json", "predict.png"}
    done = command("face_lfr.predict", *words, f"input={album}", "threshold=0.5")
    assert "persons in 13 pictures" in done.out.replace("\n", " ")
    done = command("face_lfr.predict", *words, f"input={a}")
    assert "mirror_cosine" in done.out
    (tmp_path / "a.png").write_text("no picture")
    done = command("face_lfr.predict", *words, f"input={tmp_path / 'a.png'}")
    line = done.err.strip().splitlines()[-1]
    assert (done.code, line) == (2, f"error: {tmp_path}/a.png: image cannot be decoded: 10 bytes")
    done = command("face_lfr.predict", *words, f"input={a}", "treshold=1")
    assert done.code == 2
    assert "treshold" in done.err
