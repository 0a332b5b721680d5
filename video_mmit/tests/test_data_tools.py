"""Frames and re-encoded files of whole trees; stopped runs go on where they were."""

import shutil
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest

from common.log import InputError
from video_mmit.data.video import FileReader, FolderReader
from video_mmit.data.video_data import Video
from video_mmit.tests.clip_files import draw, numbers, write_opencv
from video_mmit.tests.launch import command
from video_mmit.tests.loader_checks import error_line
from video_mmit.tools import reencode
from video_mmit.tools.frames import fitted_size
from video_mmit.tools.jobs import Job

EXTRACT, REENCODE = "video_mmit.tools.extract_frames", "video_mmit.tools.reencode"


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Two readable videos, one of them wide, in different folders."""
    write_opencv(tmp_path / "in" / "a" / "x.y.mp4", draw(20))
    write_opencv(tmp_path / "in" / "b" / "c" / "z.avi", draw(5, 64, 128), "MJPG")
    (tmp_path / "in" / "readme.txt").write_text("no video")
    return tmp_path / "in"


def shape_of(path: Path) -> tuple[int, ...]:
    return tuple(cv2.imread(str(path)).shape[:2])


def test_frames_of_a_tree(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = (f"input={videos}", f"out={out}", "short_side=32")
    done = command(EXTRACT, *words, "workers=2")
    assert done.code == 0, done
    assert "2 done, 0 before, 0 failed" in done.err
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*.jpg")) == [
        *(f"a/x.y/img_{number:05d}.jpg" for number in range(1, 21)),
        *(f"b/c/z/img_{number:05d}.jpg" for number in range(1, 6)),
    ]
    assert shape_of(out / "a" / "x.y" / "img_00001.jpg") == (32, 32)
    assert shape_of(out / "b" / "c" / "z" / "img_00001.jpg") == (32, 64)
    with FolderReader().open(Video("v", out / "a" / "x.y", None, ())) as clip:
        assert numbers(clip.read(np.arange(20))) == list(range(20))
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.jpg")}
    assert "0 done, 2 before, 0 failed" in command(EXTRACT, *words).err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.jpg")} == stamps


def test_a_stopped_extraction_goes_on(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = (f"input={videos}", f"out={out}", "workers=0", "template='{:06d}.jpg'", "quality=50")
    assert command(EXTRACT, *words).code == 0
    # As if the first video had been finished, and the run killed within the second.
    partial = out / "b" / "c" / ".z.tmp"
    (out / "b" / "c" / "z").rename(partial)
    (partial / "000003.jpg").write_bytes(b"torn")
    (partial / "000009.jpg").write_bytes(b"of a longer video")
    first = (out / "a" / "x.y" / "000001.jpg").stat().st_mtime_ns
    assert "1 done, 1 before, 0 failed" in command(EXTRACT, *words).err
    assert not partial.exists()
    names = sorted(path.name for path in (out / "b" / "c" / "z").iterdir())
    assert names == [f"{number:06d}.jpg" for number in range(1, 6)]
    assert shape_of(out / "b" / "c" / "z" / "000003.jpg") == (64, 128)
    assert (out / "a" / "x.y" / "000001.jpg").stat().st_mtime_ns == first
    line = error_line(command(EXTRACT, *words[:-1], "quality=90"))
    what = "the folder was begun with other settings; quality is 90 here and: 50"
    assert line == f"error: {out / 'settings.json'}: {what}"


@pytest.mark.parametrize("tool", [EXTRACT, REENCODE])
def test_unreadable_videos_of_a_tree(videos: Path, tmp_path: Path, tool: str) -> None:
    out, bad = tmp_path / "out", videos / "a" / "bad.mp4"
    bad.write_bytes((videos / "a" / "x.y.mp4").read_bytes()[:500])
    words = (f"input={videos}", f"out={out}", "workers=2")
    assert error_line(command(tool, *words)).startswith(f"error: {out / 'failed.txt'}: lists ")
    (line,) = (out / "failed.txt").read_text().splitlines()
    assert line.startswith(f"{bad}: ")
    done = command(tool, *words, "allow_failed=true")
    assert done.code == 0
    assert "0 done, 2 before, 1 failed" in done.err
    assert not list(out.rglob("*bad*"))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["input={}/none"], "error: {}/none: folder of videos is missing"),
        (["input={}/in", "out={}/in/out"], "error: out: must not lie inside the input folder"),
        (["input={}/in", "quality=0"], "error: quality: must be in 1..100: 0"),
        (["input={}/in", "short_side=-1"], "error: short_side: must be at least 0: -1"),
        (["input={}/in", "template=a.jpg"], "error: template: is not accepted: template='a.jpg'"),
        (["input={}/in", "template='a/{:d}.jpg'"], "error: template: must be the name of a .jpg"),
        (["input={}/in", "backend=x"], "error: backend: is not accepted: backend='x'"),
        (["input={}/empty"], "error: {}/empty: holds no video; known suffixes: .3gp .avi"),
        (["input={}/in", "workerz=3"], "error: workerz: Key 'workerz' not in 'ExtractFramesCo"),
    ],
)
def test_bad_words_to_extract_frames(
    videos: Path, tmp_path: Path, words: list[str], line: str
) -> None:
    (tmp_path / "empty").mkdir()
    words = [f"out={tmp_path}/out", *(word.replace("{}", str(tmp_path), 1) for word in words)]
    got = error_line(command(EXTRACT, *words))
    assert got.startswith(line.replace("{}", str(tmp_path), 1))


def test_two_videos_of_one_folder(videos: Path, tmp_path: Path) -> None:
    shutil.copy(videos / "b" / "c" / "z.avi", videos / "b" / "c" / "z.mkv")
    line = error_line(command(EXTRACT, f"input={videos}", f"out={tmp_path / 'out'}"))
    what = f"would be written to the same place as {videos}/b/c/z.avi: {tmp_path}/out/b/c/z"
    assert line == f"error: {videos}/b/c/z.mkv: {what}"


@pytest.mark.parametrize(
    ("size", "short", "even", "expected"),
    [
        ((480, 640), 256, False, (256, 341)),
        ((480, 640), 256, True, (256, 340)),
        ((640, 480), 256, False, (341, 256)),
        ((100, 132), 256, False, (100, 132)),
        ((101, 133), 256, True, (100, 132)),
        ((480, 640), 0, False, (480, 640)),
        ((1, 9), 4, True, (2, 8)),
    ],
)
def test_fitted_size(
    size: tuple[int, int], short: int, even: bool, expected: tuple[int, int]
) -> None:
    assert fitted_size((*size, 3), short, even) == expected


# Re-encoding


def packets(path: Path) -> Iterator[bool]:
    """Whether each packet of a file is a key frame."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        yield from (packet.is_keyframe for packet in container.demux(stream) if packet.size)


def test_reencoded_files(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = (f"input={videos}", f"out={out}", "keyframe=4", "short_side=32", "workers=2", "crf=5")
    done = command(REENCODE, *words)
    assert done.code == 0, done
    assert [number for number, key in enumerate(packets(out / "a" / "x.y.mp4")) if key] == [
        0, 4, 8, 12, 16,
    ]  # fmt: skip
    assert len(list(packets(out / "b" / "c" / "z.avi"))) == 5
    for backend in ("decord", "opencv", "pyav"):
        reader = FileReader(backend)
        for name, shape in (("a/x.y.mp4", (20, 32, 32, 3)), ("b/c/z.avi", (5, 32, 64, 3))):
            with reader.open(Video(name, out / name, None, ())) as clip:
                frames = clip.read(np.arange(clip.frames))
            assert frames.shape == shape
            assert numbers(frames) == list(range(shape[0]))
            red, blue = frames[:, 24, 8].mean(axis=0), frames[:, 24, shape[2] - 8].mean(axis=0)
            assert red == pytest.approx([220, 40, 30], abs=25)
            assert blue == pytest.approx([30, 60, 220], abs=25)
    assert "0 done, 2 before, 0 failed" in command(REENCODE, *words).err


def test_a_stopped_reencoding_goes_on(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "a").mkdir(parents=True)
    (out / "a" / ".x.y.mp4.tmp").write_bytes(b"left by a killed run")
    words = (f"input={videos}", f"out={out}", "workers=0", "preset=ultrafast")
    assert "2 done, 0 before" in command(REENCODE, *words).err
    (out / "b" / "c" / "z.avi").unlink()
    assert "1 done, 1 before" in command(REENCODE, *words).err
    assert sorted(path.name for path in out.rglob("*") if path.is_file()) == [
        ".lock", "settings.json", "x.y.mp4", "z.avi",
    ]  # fmt: skip


def test_a_reencoding_that_loses_frames_is_refused(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = reencode.encode
    monkeypatch.setattr(reencode, "encode", lambda *arguments: 1 + real(*arguments))
    job = Job(videos / "a" / "x.y.mp4", tmp_path / "out" / "x.mp4")
    with pytest.raises(InputError, match=r"x\.y\.mp4: has 21 frames, but after re-encoding: 20$"):
        reencode.reencode_video(job, FileReader(), 0, 8, 20, "ultrafast")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_no_fault_of_the_video() -> None:
    frames = np.random.default_rng(0).integers(0, 255, (200, 32, 32, 3), np.uint8)
    with pytest.raises(OSError, match="No space left") as error:
        reencode.encode(Path("/dev/full"), iter(frames), Fraction(25), 0, {"crf": "1"})
    assert (type(error.value), error.value.filename) == (OSError, "/dev/full")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["crf=52"], "error: crf: must be in 0..51: 52"),
        (["keyframe=0"], "error: keyframe: must be at least 1: 0"),
        (["preset=quick"], "error: preset: accepted: ultrafast, "),
        (["backend=x"], "error: backend: is not accepted: backend='x'"),
    ],
)
def test_bad_words_to_reencode(videos: Path, tmp_path: Path, words: list[str], line: str) -> None:
    done = command(REENCODE, f"input={videos}", f"out={tmp_path / 'out'}", *words)
    assert error_line(done).startswith(line)


def test_reencoding_without_its_package(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    done = command(REENCODE, f"input={videos}", f"out={tmp_path / 'out'}")
    what = "is not installed, re-encoding needs it: pip install: 'vision-tasks[video-av]'"
    assert error_line(done) == f"error: av: {what}"
