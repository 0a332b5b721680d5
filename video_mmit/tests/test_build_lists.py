"""Lists of known data sets with frame counts; stopped runs go on where they were."""

import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest

from common.log import InputError
from video_mmit.data import replicas
from video_mmit.data.from_lists import load_lists
from video_mmit.data.lists import read_classes, read_list
from video_mmit.data.mmit import load_mmit
from video_mmit.data.sampling import Uniform
from video_mmit.data.something import load_something_v1
from video_mmit.data.video import FileReader, FolderReader
from video_mmit.data.video_data import Clip, Video, VideoData
from video_mmit.tests.launch import command
from video_mmit.tests.loader_checks import error_line
from video_mmit.tools import jobs
from video_mmit.tools.build_lists import PARTIAL, build
from video_mmit.tools.jobs import Tally

LISTS = "video_mmit.tools.build_lists"


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return replicas.write_mmit(tmp_path_factory.mktemp("mmit"))


@pytest.fixture
def root(replica: Path, tmp_path: Path) -> Path:
    return shutil.copytree(replica, tmp_path / "mmit")


@dataclass(frozen=True)
class NotingReader:
    """Writes the name of every video it opens to a file, and takes its time over it."""

    note: Path
    seconds: float = 0.0

    def open(self, video: Video) -> AbstractContextManager[Clip]:
        with self.note.open("a") as file:
            file.write(f"{os.getpid()} {video.id}\n")
        time.sleep(self.seconds)
        return FileReader().open(video)

    def opened(self) -> list[str]:
        """Ids so far; opening the note forgets them."""
        lines = self.note.read_text().splitlines() if self.note.exists() else []
        self.note.unlink(missing_ok=True)
        return [line.partition(" ")[2] for line in lines]


def noting(root: Path, seconds: float = 0.0) -> tuple[VideoData, NotingReader]:
    reader = NotingReader(root / "note", seconds)
    return load_mmit(root, reader, Uniform()), reader


def until(happened: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_lists_of_a_known_set(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "lists"
    done = command(LISTS, "data=mmit", f"data.root={root}", f"out={out}", "workers=2")
    assert done.code == 0, done
    assert f"use them as data=lists data.root={root / 'videos'}" in done.err
    assert "count frames 6/6" in done.err
    assert (out / "train.txt").read_text().splitlines() == [
        "cooking/yt-a_1.mp4 8 3,0",
        "adult+female+singing/0-3_5.mp4 8 2",
        "crafting/flickr-2.mp4 8 0",
        "paddling/3.mp4 8 1,3,2",
    ]
    known = load_mmit(root, FileReader(), Uniform())
    files = {"train_list": out / "train.txt", "test_list": out / "val.txt"}
    data = load_lists(
        root / "videos", FileReader(), Uniform(), classes=out / "classes.txt", **files
    )
    assert data.classes == known.classes
    listed = [video._replace(frames=8) for video in known.train + known.test]
    assert data.train + data.test == listed
    assert sorted(path.name for path in out.iterdir()) == [
        ".lock", "classes.txt", "train.txt", "val.txt",
    ]  # fmt: skip


def test_lists_of_frame_folders(tmp_path: Path) -> None:
    root = replicas.write_something_v1(tmp_path / "set")
    data = load_something_v1(root, FolderReader("{:05d}.jpg"), Uniform())
    build(data, tmp_path / "a", format="mmaction_frames", workers=0)
    assert (tmp_path / "a" / "val.txt").read_text() == "74225 8 3\n116154 8 2\n"
    build(data, tmp_path / "b", base=root, workers=0, decode=True)
    assert (tmp_path / "b" / "val.txt").read_text().startswith("20bn-something-something-v1/74225 ")
    assert read_classes(tmp_path / "b" / "classes.txt") == data.classes
    with pytest.raises(InputError, match="base: does not hold the video /"):
        build(data, tmp_path / "c", base=tmp_path / "other")


def test_a_second_run_counts_nothing(root: Path, tmp_path: Path) -> None:
    data, reader = noting(root)
    assert build(data, tmp_path / "out", workers=0) == Tally(6, 0, 0)
    assert sorted(reader.opened()) == sorted(video.id for video in data.train + data.test)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert build(data, tmp_path / "out", workers=0) == Tally(0, 6, 0)
    assert reader.opened() == []
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_stopped_count_goes_on(root: Path, tmp_path: Path) -> None:
    data, reader = noting(root)
    out = tmp_path / "out"
    out.mkdir()
    # Two videos are finished, and the writer was killed within the line of a third.
    (out / PARTIAL).write_text("8 cooking/4.mp4\n8 paddling/3.mp4\n8 crafting/fli")
    assert build(data, out, workers=0) == Tally(4, 2, 0)
    opened = reader.opened()
    assert len(opened) == 4
    assert {"cooking/4.mp4", "paddling/3.mp4"}.isdisjoint(opened)
    assert not (out / PARTIAL).exists()
    assert [entry.frames for entry in read_list(out / "train.txt")] == [8] * 4
    (out / PARTIAL).write_text("8 cooking/4.mp4\nmany paddling/3.mp4\n")
    with pytest.raises(InputError, match=r"counts\.partial:2: number of frames is no .*: many"):
        build(data, out, workers=0)


@pytest.mark.slow
def test_a_killed_count_goes_on(root: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle: the workers end too, and what was counted is not counted again."""
    data, reader = noting(root, seconds=0.2)
    out = tmp_path / "out"
    process = multiprocessing.get_context("fork").Process(target=build, args=(data, out))
    process.start()
    until(lambda: (out / PARTIAL).exists() and len((out / PARTIAL).read_bytes().split(b"\n")) > 2)
    process.kill()
    process.join()
    workers = {int(line.split()[0]) for line in reader.note.read_text().splitlines()}
    assert len(workers) == 2
    until(lambda: not any(_alive(pid) for pid in workers))
    reader.opened()
    finished = [line.split()[1] for line in (out / PARTIAL).read_text().splitlines()]
    assert len(finished) >= 2
    tally = build(data, out, workers=2)
    assert tally == Tally(6 - len(finished), len(finished), 0)
    assert set(finished).isdisjoint(reader.opened())
    assert len(read_list(out / "train.txt") + read_list(out / "val.txt")) == 6


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_unreadable_videos_of_a_list(root: Path, tmp_path: Path) -> None:
    out, bad = tmp_path / "out", root / "videos" / "paddling" / "3.mp4"
    saved = bad.read_bytes()
    bad.write_bytes(b"")
    (root / "videos" / "cooking" / "4.mp4").unlink()
    words = ("data=mmit", f"data.root={root}", f"out={out}", "workers=0")
    what = "lists videos that cannot be read, allow_failed=true goes on without them"
    assert error_line(command(LISTS, *words)) == f"error: {out / 'failed.txt'}: {what}: 2"
    failed = (out / "failed.txt").read_text().splitlines()
    assert [line.partition(": ")[0] for line in failed] == [
        str(root / "videos" / "cooking" / "4.mp4"), str(bad),
    ]  # fmt: skip
    assert not (out / "train.txt").exists()
    done = command(LISTS, *words, "allow_failed=true")
    assert done.code == 0
    assert "0 counted, 4 known before, 2 failed" in done.err
    assert [len(read_list(out / name)) for name in ("train.txt", "val.txt")] == [3, 1]
    bad.write_bytes(saved)
    (root / "videos" / "cooking" / "4.mp4").write_bytes(saved)
    assert command(LISTS, *words).code == 0
    assert len(read_list(out / "train.txt")) == 4
    assert not (out / "failed.txt").exists()


def test_decoding_finds_what_counting_does_not(root: Path, tmp_path: Path) -> None:
    path = root / "videos" / "cooking" / "4.mp4"
    content = bytearray(path.read_bytes())
    at = content.index(b"mdat") + 4
    content[at : at + 300] = bytes(300)
    path.write_bytes(content)
    data = load_mmit(root, FileReader(), Uniform())
    assert build(data, tmp_path / "a", workers=0).failed == 0
    with pytest.raises(InputError, match=r"failed\.txt: "):
        build(data, tmp_path / "b", workers=0, decode=True)


def test_a_folder_in_use(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "PATIENCE_S", 0.0)
    data, _ = noting(root)
    with (
        jobs.locked(tmp_path / "out"),
        pytest.raises(InputError, match="out: another run is writing there"),
    ):
        build(data, tmp_path / "out", workers=0)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["data=mmit"], "error: data.root: Missing mandatory value"),
        (["data=mmit", "data.root={}/none"], "error: {}/none: data set not found"),
        (["data=other", "data.root={}"], "error: data/other: is not there, only hmdb51, jester"),
        (["data=mmit", "data.root={}", "workers=-1"], "error: workers: must be at least 0: -1"),
        (["data=mmit", "data.root={}", "format=csv"], "error: format: accepted: xtemporal"),
        (["data=mmit", "data.root={}", "data/reader=frames"], "error: {}/rawframes: folder of"),
        (["data=ucf101", "data.root={}", "data.split=4"], "error: split: accepted: 1, 2, 3: 4"),
        (["data=mmit", "data.root={}", "data.reader.backend=x"], "error: data.reader"),
    ],
)
def test_bad_words_to_build_lists(
    replica: Path, tmp_path: Path, words: list[str], line: str
) -> None:
    filled = [word.replace("{}", str(replica)) for word in words]
    got = error_line(command(LISTS, *filled, f"out={tmp_path / 'out'}"))
    assert got.startswith(line.replace("{}", str(replica)))
