"""Which videos a path holds, and that pictures of any usual name are read in order."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from common.log import InputError
from video_mmit.inputs import Source, find_videos, frame_rate
from video_mmit.tests.clip_files import draw, numbers, write_opencv


def write_pictures(folder: Path, image_FHW3: np.ndarray, name: str, first: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, image_HW3 in enumerate(image_FHW3, start=first):
        cv2.imwrite(str(folder / name.format(number)), image_HW3[..., ::-1])
    return folder


def read(source: Source) -> np.ndarray:
    with source.reader.open(source.video) as clip:
        return clip.read(np.arange(clip.frames))


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("{:05d}.png", 1), ("{:d}.png", 1), ("image_{:06d}.png", 0), ("a{{1}}-{:03d}.png", 9),
        ("v2_clip7_frame{:d}.png", 98), ("{:02d}.png", 95),
    ],
)  # fmt: skip
def test_pictures_of_any_name(name: str, first: int, tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "clip", draw(13), name, first)
    (folder / "notes.txt").write_text("no picture")
    (folder / ".0.png").write_bytes(b"")
    (source,) = find_videos(folder)
    np.testing.assert_array_equal(read(source), draw(13))
    assert (source.video.id, source.rate()) == ("clip", None)


def test_jpegs_are_read_in_the_order_of_red_and_blue(tmp_path: Path) -> None:
    (source,) = find_videos(write_pictures(tmp_path / "clip", draw(5), "img_{:05d}.JPG"))
    assert numbers(read(source)) == [0, 1, 2, 3, 4]
    assert np.abs(read(source).astype(int) - draw(5)).mean() < 5


def test_one_picture_has_one_frame(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "clip", draw(5), "{:05d}.png")
    (source,) = find_videos(folder / "00003.png")
    np.testing.assert_array_equal(read(source), draw(5)[2:3])
    assert source.video.id == "00003.png"
    (folder / "00003.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"00003\.png: picture cannot be decoded: 10 bytes"):
        read(source)


def test_a_folder_is_searched_in_order(tmp_path: Path) -> None:
    for name in ("b/10.mp4", "b/9.MP4", "a.mp4", "b/.hidden.mp4", "out/c.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    write_pictures(tmp_path / "b" / "frames", draw(1), "{:d}.png")
    (tmp_path / "b" / "notes.txt").touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    found = find_videos(tmp_path, leave_out=tmp_path / "b" / ".." / "out")
    ids = [source.video.id for source in found]
    assert ids == ["a.mp4", "b/9.MP4", "b/10.mp4", "b/frames"]
    assert [source.video.path for source in found] == [tmp_path / name for name in ids]


def test_the_folder_one_stands_in_has_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write_pictures(tmp_path / "clip", draw(2), "{:d}.png"))
    (source,) = find_videos(Path("."))
    assert source.video.id == "clip"


def test_flow_stands_beside_pictures(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "clip", draw(4), "img_{:05d}.png")
    flow = np.random.default_rng(0).integers(0, 256, (4, 20, 30, 2), np.uint8)
    for axis, name in enumerate(("flow_x_{:05d}.png", "flow_y_{:05d}.png")):
        for number, image_HW2 in enumerate(flow, start=1):
            cv2.imwrite(str(folder / name.format(number)), image_HW2[..., axis])
    (pictures,), (found,) = find_videos(folder), find_videos(folder, flow=True)
    np.testing.assert_array_equal(read(pictures), draw(4))
    np.testing.assert_array_equal(read(found), flow)
    (folder / "flow_y_00003.png").unlink()
    with pytest.raises(InputError, match=r"frame is missing"):
        read(find_videos(folder, flow=True)[0])


def test_what_only_looks_like_flow_is_a_picture(tmp_path: Path) -> None:
    (source,) = find_videos(write_pictures(tmp_path / "clip", draw(3), "max_{:05d}.png"))
    np.testing.assert_array_equal(read(source), draw(3))
    with pytest.raises(InputError, match="need one series of optical-flow pictures, found 0"):
        read(find_videos(tmp_path / "clip", flow=True)[0])
    write_opencv(tmp_path / "a.mp4", draw(2))
    with pytest.raises(InputError, match=r"a\.mp4: the model needs a folder of optical-flow"):
        find_videos(tmp_path / "a.mp4", flow=True)


def prepare_bad(folder: Path, kind: str) -> Path:
    if kind == "missing":
        return folder
    folder.mkdir()
    if kind == "both":
        write_opencv(folder / "a.mp4", draw(2))
        cv2.imwrite(str(folder / "a.png"), draw(1)[0])
    if kind in ("hole", "unnumbered", "two", "sizes"):
        write_pictures(folder, draw(3), "a{:d}.png")
    if kind == "hole":
        (folder / "a2.png").unlink()
    if kind == "unnumbered":
        cv2.imwrite(str(folder / "cover.png"), draw(1)[0])
    if kind == "two":
        cv2.imwrite(str(folder / "b1.png"), draw(1)[0])
    if kind == "sizes":
        cv2.imwrite(str(folder / "a4.png"), draw(1, 32, 32)[0])
    return folder


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"missing: no such file or folder"),
        ("empty", r"empty: holds no video and no picture"),
        ("both", r"both: holds videos and pictures, give one kind: a\.mp4, a\.png"),
        ("hole", r"hole: frame is missing, .*: a2\.png"),
        ("unnumbered", r"unnumbered: has a picture without a number .*: cover\.png"),
        ("two", r"two: need one series of pictures, found 2: aNUMBER\.png, bNUMBER\.png"),
        ("sizes", r"a4\.png: frame differs in size"),
    ],
)
def test_bad_content_is_named(tmp_path: Path, kind: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(find_videos(prepare_bad(tmp_path / kind, kind))[0])


def test_backends_are_checked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"backend: is not known: .*decord, opencv, pyav"):
        find_videos(tmp_path, backend="ffmpeg")


def test_the_rate_is_what_the_file_states(tmp_path: Path) -> None:
    film = write_opencv(tmp_path / "film.mp4", draw(5))
    assert frame_rate(film) == pytest.approx(8)
    assert find_videos(film)[0].rate() == pytest.approx(8)
    (tmp_path / "a.mp4").write_bytes(b"\0no film")
    assert frame_rate(tmp_path / "a.mp4") is None
