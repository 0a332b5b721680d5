"""Faces out of folders and photos, and the landmarks that photos are aligned by."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

import face_lfr
from common.log import InputError
from face_lfr.data.align import align
from face_lfr.data.transforms import read_rgb
from face_lfr.pictures import find_pictures
from face_lfr.tests.prediction import draw_album, features, go, save
from face_lfr.tests.releases import write

HOPPER = "221.7 189.3 305 187.3 270 238 232.7 280 306.7 278"  # in matplotlib's grace_hopper.jpg
NUMBERS = [float(word) for word in HOPPER.split()]


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("net") / "net.safetensors")


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_album(tmp_path_factory.mktemp("album") / "album")


@pytest.fixture(scope="module")
def hopper() -> Path:
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    if not path.is_file():
        pytest.skip("this matplotlib comes without its sample pictures")
    return path


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
    with pytest.raises(InputError, match=r"in: has more pictures than limit=3: 5"):  # and out
        go(net, tmp_path / "never", folder, limit=3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: has no picture"):
        go(net, tmp_path / "never", tmp_path / "empty")
    assert not (tmp_path / "never").exists()


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


def test_the_frames_of_a_video_are_its_pictures(net: Path, tmp_path: Path) -> None:
    path, noise = tmp_path / "faces.avi", np.random.default_rng(0)
    frames = noise.integers(0, 256, (5, 32, 32, 3), np.uint8)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"FFV1"), 5, (32, 32))  # lossless
    for frame in frames:
        writer.write(frame)
    writer.release()
    seen = go(net, tmp_path / "out", path, threshold=0.0)
    assert len(seen["pictures"]) == 5
    for number in range(5):
        found = cv2.imread(str(tmp_path / "out" / "frames" / f"{number:06d}.png")).astype(int)
        near = [np.abs(found - other).mean() for other in frames.astype(int)]
        assert int(np.argmin(near)) == number  # colours are rounded on the way into a video
        assert near[number] < 25 < np.median(near)
    with pytest.raises(InputError, match=r"faces\.avi: has more frames than limit: 3"):
        go(net, tmp_path / "few", path, limit=3)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match=r"faces\.avi: is no video that can be decoded"):
        go(net, tmp_path / "cut", path)
