"""`predict`: similarities, verdicts and groups equal to the model's; what it refuses."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

import face_lfr
from common.log import InputError
from face_lfr.clusters import average_linkage, connected, similarity_to_mean
from face_lfr.data.align import align
from face_lfr.data.faces import Identity, Pose, render
from face_lfr.data.transforms import read_rgb
from face_lfr.pair_drawing import draw_groups
from face_lfr.pictures import find_pictures
from face_lfr.predict import PredictConfig, run
from face_lfr.tests.launch import command, evaluate
from face_lfr.tests.releases import IR, QUALITY, transform_node, write
from face_lfr.weights import open_trained

HOPPER = "221.7 189.3 305 187.3 270 238 232.7 280 306.7 278"  # in matplotlib's grace_hopper.jpg
NUMBERS = [float(word) for word in HOPPER.split()]


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("net") / "net.safetensors")


@pytest.fixture(scope="module")
def rater(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sees other images than `net`: larger, blue first, cropped and resized."""
    node = transform_node(size=31, colour="bgr", crop_first=True, resize=24)
    return write(tmp_path_factory.mktemp("rater") / "rater.safetensors", QUALITY, node)


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures `<person>/<number>.png` of three persons, 112 x 112; two of them have one only."""
    root, rng = tmp_path_factory.mktemp("album") / "album", np.random.default_rng(0)
    for person, count in enumerate((1, 11, 1)):
        face = Identity.draw(rng)
        for number in range(count):
            save(root / str(person) / f"{number}.png", render(face, Pose.draw(rng)))
    return root


@pytest.fixture(scope="module")
def hopper() -> Path:
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    if not path.is_file():
        pytest.skip("this matplotlib comes without its sample pictures")
    return path


def save(path: Path, image_HWC: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image_HWC[..., ::-1])
    return path


def go(net: Path, out: Path, source: Path, **options: Any) -> dict[str, Any]:
    cfg = PredictConfig(
        input=str(source), out=str(out), checkpoint=str(net), device="cpu", **options
    )
    result = run(cfg)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    text = (out / "predict.json").read_text()
    assert json.loads(text, parse_constant=refuse) == result
    drawn = cv2.imread(str(out / "predict.png"))
    assert drawn.shape[1] >= 600
    assert drawn.std() > 20
    return result


def features(net: Path, faces: list[np.ndarray], flip: bool = True) -> np.ndarray:
    """Features (N, D) of aligned faces, step by step."""
    model, rows = open_trained(net).model, []
    for face in faces:
        small = cv2.resize(face, (24, 24), interpolation=cv2.INTER_LINEAR)
        x_3HW = (torch.from_numpy(small.transpose(2, 0, 1).astype(np.float32)) - 127.5) / 127.5
        with torch.no_grad():
            image, mirror = model(torch.stack([x_3HW, x_3HW.flip(-1)]))
        rows.append(((image + mirror) / 2 if flip else image).double().numpy())
    return np.stack(rows)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


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


def test_what_a_folder_is_searched_for(net: Path, tmp_path: Path) -> None:
    folder, noise = tmp_path / "in", np.random.default_rng(0)
    for name in ("10.png", "2.JPG", "b/1.bmp", ".hidden.png", ".git/1.png", "a$_$b[1].png"):
        save(folder / name, noise.integers(0, 256, (30, 30, 3), np.uint8))
    (folder / "notes.txt").write_text("no picture")
    found = [path.relative_to(folder).as_posix() for path in find_pictures(folder)]
    assert found == ["2.JPG", "10.png", "a$_$b[1].png", "b/1.bmp"]
    first = go(net, folder / "out", folder, threshold=0.0)
    again = go(net, folder / "out", folder, threshold=0.0)  # does not find its own picture
    assert first == again
    with pytest.raises(InputError, match="out: must not be the folder of the pictures"):
        go(net, folder, folder)
    with pytest.raises(InputError, match=r"in: has more pictures than limit=3: 4"):
        go(net, tmp_path / "never", folder, limit=3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: has no picture"):
        go(net, tmp_path / "never", tmp_path / "empty")
    assert not (tmp_path / "never").exists()


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


@pytest.mark.parametrize("kind", ["text", "json"])
def test_a_photo_is_aligned_by_its_landmarks(
    net: Path, hopper: Path, kind: str, tmp_path: Path
) -> None:
    file = tmp_path / ("points.json" if kind == "json" else "points.txt")
    pairs = np.reshape(NUMBERS, (5, 2)).tolist()
    json_text = json.dumps({"sample_data/grace_hopper.jpg": pairs, "other.jpg": NUMBERS})
    file.write_text(json_text if kind == "json" else f"grace_hopper.jpg {HOPPER}\nb.png {HOPPER}\n")
    result = go(net, tmp_path / "out", hopper, landmarks=str(file))
    face = align(read_rgb(hopper), np.array(pairs), 24)
    (feature_D,) = features(net, [face])
    assert result["pictures"][0]["norm"] == pytest.approx(np.linalg.norm(feature_D), rel=1e-5)
    unit_D = feature_D / np.linalg.norm(feature_D)
    np.testing.assert_allclose(result["embedding"]["vector"], unit_D, atol=1e-6)
    assert result["pictures"][0]["aligned_by"] == pairs


def test_a_turned_photo_is_still_the_same_person(
    net: Path, hopper: Path, album: Path, tmp_path: Path
) -> None:
    """The alignment takes turn, scale and shift away; without it the features differ."""
    photo, point_52 = read_rgb(hopper), np.reshape(NUMBERS, (5, 2))
    matrix = cv2.getRotationMatrix2D((260, 230), 25, 0.8)
    turned = save(tmp_path / "turned.png", cv2.warpAffine(photo, matrix, (500, 620)))
    moved = np.column_stack([point_52, np.ones(5)]) @ matrix.T
    lines = [f"grace_hopper.jpg {HOPPER}", " ".join(["turned.png", *map(str, moved.ravel())])]
    (tmp_path / "points.txt").write_text("\n".join(lines))
    options = {"landmarks": str(tmp_path / "points.txt"), "threshold": 0.9}
    result = go(net, tmp_path / "out", hopper, other=str(turned), **options)
    assert result["similarity"] > 0.98
    assert result["verdict"] == "same person"
    other = go(net, tmp_path / "out", hopper, other=str(album / "0" / "0.png"), **options)
    assert other["similarity"] < 0.9
    assert other["pictures"][1]["aligned_by"] is None


def test_a_photo_without_landmarks_is_refused(net: Path, hopper: Path, tmp_path: Path) -> None:
    message = r"grace_hopper\.jpg: is no aligned face: not square, and .* no landmarks.*: 512 x 600"
    with pytest.raises(InputError, match=message):
        go(net, tmp_path / "out", hopper)
    with pytest.raises(InputError, match=message):
        face_lfr.predict(net, [hopper])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "0.png 1 2 3\n", r"p\.txt:1: line is not a path and the coordinates"),
        ("p.txt", f"9.png {HOPPER}\n", "names none of the pictures"),
        ("p.txt", f"0.png {HOPPER}\n", "its landmarks lie outside of its 112 x 112 pixels"),
        ("p.txt", "1/0.png 9 9 9 9 9 9 9 9 9 9\n", r"0\.png: cannot be aligned: .*one line"),
        ("p.json", "[1, 2]", "is no JSON object of landmarks by name: list"),
        ("p.json", "{", "is no JSON"),
        ("p.json", '{"0.png": [1, 2, "x"]}', "landmarks of 0.png cannot be used"),
        ("p.json", '{"0.png": {"a": 1}}', "landmarks of 0.png cannot be used"),
    ],
)
def test_landmarks_that_cannot_be_used(
    net: Path, album: Path, tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        go(net, tmp_path, album / "1" / "0.png", landmarks=str(tmp_path / name))


def test_landmarks_name_one_picture_each(net: Path, album: Path, tmp_path: Path) -> None:
    a, b = album / "0" / "0.png", album / "1" / "0.png"
    points = "30 50 70 50 50 70 35 90 65 90"
    file = tmp_path / "points.txt"
    file.write_text(f"0.png {points}\n")
    with pytest.raises(InputError, match=r"points\.txt: 0\.png may be .*0/0\.png and: .*1/0\.png"):
        go(net, tmp_path, a, other=str(b), landmarks=str(file))
    file.write_text(f"1/0.png {points}\n")
    found = go(net, tmp_path, a, other=str(b), landmarks=str(file))["pictures"]
    assert found[0]["aligned_by"] is None
    assert np.ravel(found[1]["aligned_by"]).tolist() == [float(x) for x in points.split()]
    with pytest.raises(InputError, match=r"nothing\.json: cannot be read"):
        go(net, tmp_path, a, landmarks=str(tmp_path / "nothing.json"))


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
def test_useless_features_are_named(
    change: Any, message: str, album: Path, tmp_path: Path
) -> None:
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


def test_networks_in_each_others_place(
    net: Path, rater: Path, album: Path, tmp_path: Path
) -> None:
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


def test_the_threshold_of_an_evaluation(net: Path, synth: Path, tmp_path: Path) -> None:
    words = [f"checkpoint={net}", f"images={synth / 'glint_syn'}", f"out={tmp_path / 'pairs'}"]
    scored = evaluate("protocol=all_pairs", *words, "fpr=[0.1,0.02]")
    pictures = sorted((synth / "glint_syn").rglob("*.jpg"))
    a, b = pictures[0], str(pictures[1])
    options = {"other": b, "calibration": str(tmp_path / "pairs")}
    result = go(net, tmp_path / "out", a, **options, fpr=0.02)
    point = next(point for point in scored["points"] if point["fpr"] == 0.02)
    assert (result["threshold"], result["fpr"]) == (point["threshold"], 0.02)
    assert result["threshold_source"].endswith("pairs/metrics.json: all pairs at FPR 0.02")
    wanted = "same" if result["similarity"] > point["threshold"] else "different"
    assert result["verdict"].startswith(wanted)
    for fpr, message in (
        (None, r"fpr: choose one that .* measured: 0\.1, 0\.02"),
        (1e-8, r"fpr: was not measured in .*, which has 0\.1, 0\.02: 1e-08"),
    ):
        with pytest.raises(InputError, match=message):
            go(net, tmp_path / "out", a, **options, fpr=fpr)
    with pytest.raises(InputError, match=r"measured another model .*: flip is False here and: Tr"):
        go(net, tmp_path / "out", a, **options, fpr=0.1, flip=False)
    later = write(tmp_path / "later.safetensors", seed=1)
    with pytest.raises(InputError, match="measured another model .*: seed is 1 here and: 0"):
        go(later, tmp_path / "out", a, **options, fpr=0.1)


def test_the_threshold_of_a_verification(net: Path, synth: Path, tmp_path: Path) -> None:
    words = [f"checkpoint={net}", f"annotations={synth / 'syn.bin'}", f"out={tmp_path / 'ten'}"]
    scored = evaluate("protocol=verification", *words)
    a, b = sorted((synth / "glint_syn").rglob("*.jpg"))[:2]
    options = {"other": str(b), "calibration": str(tmp_path / "ten")}
    result = go(net, tmp_path / "out", a, **options)
    assert result["threshold"] == pytest.approx(1 - scored["syn/threshold"] / 2)
    said = "metrics.json: best accuracy, mean of the folds of syn"
    assert result["threshold_source"].endswith(said)
    assert go(net, tmp_path / "out", a, **options, calibration_set="syn") == result
    with pytest.raises(InputError, match="fpr: a verification has the threshold of best accuracy"):
        go(net, tmp_path / "out", a, **options, fpr=1e-3)
    with pytest.raises(InputError, match=r"calibration_set: choose a set .* \(syn\): lfw"):
        go(net, tmp_path / "out", a, **options, calibration_set="lfw")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "is not what an evaluation writes: list"),
        ('{"protocol": "video"}', "has no threshold for pictures, .*: video"),
        ('{"protocol": "all_pairs", "points": [{"fpr": 1}]}', "malformed operating points"),
        (
            '{"protocol": "all_pairs", "points": [{"fpr": 1, "threshold": -Infinity}]}',
            "must be a cosine, .*: -inf",
        ),
        ('{"protocol": "verification"}', "there is none"),
        ('{"protocol": "verification", "threshold": "x"}', "threshold is no number: x"),
        ('{"protocol": "verification", "threshold": 9}', "must be a cosine, .*: -3.5"),
    ],
)
def test_broken_evaluations_are_named(
    net: Path, album: Path, tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(InputError, match=message):
        go(net, tmp_path / "out", album / "0" / "0.png", calibration=str(tmp_path))


def test_features_of_unknown_origin_are_taken_with_a_warning(
    net: Path, album: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "metrics.json").write_text(
        '{"protocol": "verification", "features": "f.npy", "threshold": 1.2, "val_threshold": 9}'
    )
    other = str(album / "1" / "0.png")
    result = go(net, tmp_path, album / "0" / "0.png", other=other, calibration=str(tmp_path))
    assert result["threshold"] == pytest.approx(0.4)
    assert "measured on f.npy; whether these are features of this model is not known" in caplog.text


def test_groups_to_draw_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        draw_groups([], tmp_path / "a.png", "nothing")


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
