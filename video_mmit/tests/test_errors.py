"""Bad input ends with code 2 and one line `error: <where>: <what>: <value>`, no traceback."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from video_mmit.tests.launch import Ended, command, finish, start

TRAIN, EVALUATE = "video_mmit.train", "video_mmit.evaluate"
LOG_LINE = re.compile(r"\d\d:\d\d:\d\d [IW] |.*it/s, ")


def complaint(done: Ended) -> str:
    """The one error line; fails when anything but log lines comes with it."""
    assert done.code == 2, done
    *others, last = done.err.splitlines()
    assert last.startswith("error: ")
    assert len(last.removeprefix("error: ").split(": ")) >= 2
    assert all(LOG_LINE.match(line) for line in others), others
    return last


def trained_on(root: Path, run_dir: Path, *words: str) -> Ended:
    return command(
        TRAIN, "experiment=debug/tiny", "data=mmit", f"data.root={root}", f"run_dir={run_dir}",
        "~data.part", "~data.train", "~data.val",
        "device=cpu", "steps=1", *words,
    )  # fmt: skip


def listed(root: Path) -> tuple[Path, list[str]]:
    path = root / "trainingSet.txt"
    return path, path.read_text().splitlines()


def no_root(root: Path) -> str:
    shutil.rmtree(root)
    return f"error: {root}: "


def label_out_of_range(root: Path) -> str:
    path, lines = listed(root)
    lines[4] = lines[4].split(",")[0] + ",18"
    path.write_text("\n".join(lines))
    return f"error: {path}:5: label is not in 0..17: 18"


def negative_label(root: Path) -> str:
    path, lines = listed(root)
    lines[1] += ",-1"
    path.write_text("\n".join(lines))
    return f"error: {path}:2: label is no whole number from 0 on: -1"


def duplicated_label(root: Path) -> str:
    path, lines = listed(root)
    lines[0] += "," + lines[0].split(",")[-1]
    path.write_text("\n".join(lines))
    return f"error: {path}:1: label occurs twice: "


def the_same_video_twice(root: Path) -> str:
    path, lines = listed(root)
    path.write_text("\n".join([*lines, lines[0]]))
    return f"error: {path}:{len(lines) + 1}: video occurs twice"


def truncated_videos(root: Path) -> str:
    for path in root.rglob("*.mp4"):
        path.write_bytes(path.read_bytes()[:300])
    return f"error: {root}/videos/"


def empty_videos(root: Path) -> str:
    for path in root.rglob("*.mp4"):
        path.write_bytes(b"")
    return f"error: {root}/videos/"


@pytest.mark.parametrize(
    "harm",
    [no_root, label_out_of_range, negative_label, duplicated_label, the_same_video_twice,
     truncated_videos, empty_videos],
)  # fmt: skip
def test_a_damaged_data_set(harm: Callable[[Path], str], synth: Path, tmp_path: Path) -> None:
    root = shutil.copytree(synth, tmp_path / "set")
    expected = harm(root)
    assert complaint(trained_on(root, tmp_path / "run")).startswith(expected)


def test_an_unreadable_video_stops_an_evaluation(run: Path, synth: Path, tmp_path: Path) -> None:
    root = shutil.copytree(synth, tmp_path / "set")
    name = (root / "validationSet.txt").read_text().splitlines()[3].split(",")[0]
    (root / "videos" / name).write_bytes(b"")
    words = [f"run_dir={run}", "data=mmit", f"data.root={root}", f"out={tmp_path / 'out'}"]
    for workers in (0, 1):
        line = complaint(command(EVALUATE, *words, "device=cpu", f"workers={workers}"))
        assert line.startswith(f"error: {root / 'videos' / name}: ")


def scores(path: Path, **changes: np.ndarray) -> Path:
    content = {"ids": np.array(["a.mp4", "b.mp4"]), "scores": np.eye(2)}
    np.savez(path, **(content | changes))
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ids": np.array(["a.mp4", "a.mp4"])}, "a.mp4"),
        ({"ids": np.array(["a.mp4", "c.mp4"])}, "mp4"),
        ({"scores": np.array([[0.0, np.nan], [1.0, 0.0]])}, "b?a?.mp4|nan|NaN"),
        ({"scores": np.zeros((3, 2))}, "3"),
        ({"ids": np.array(["a.mp4", None], dtype=object)}, "bject arrays"),
        ({"scores": np.array([["a", "b"], ["c", "d"]])}, "scores"),
    ],
)
def test_a_bad_score_file(tmp_path: Path, changes: dict[str, np.ndarray], words: str) -> None:
    (tmp_path / "list.txt").write_text("a.mp4 9 0\nb.mp4 9 1\n")
    path = scores(tmp_path / "scores.npz", **changes)
    call = (f"predictions={path}", f"annotations={tmp_path / 'list.txt'}", f"out={tmp_path}")
    line = complaint(command(EVALUATE, *call, "device=cpu"))
    assert re.search(words, line)
    assert str(path) in line


def test_a_list_row_without_labels_is_named(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a.mp4 9 0\nb.mp4 9\n")
    path = scores(tmp_path / "scores.npz")
    call = (f"predictions={path}", f"annotations={tmp_path / 'list.txt'}", f"out={tmp_path}")
    assert f"error: {tmp_path / 'list.txt'}:2: " in complaint(command(EVALUATE, *call))


def test_channels_and_frames_that_do_not_fit(synth: Path, tmp_path: Path) -> None:
    words = ("model.backbone.widths=[12,24,32]",)  # 12 is no multiple of 16
    line = complaint(trained_on(synth, tmp_path / "a", *words))
    assert line.startswith("error: model: ")
    assert "12" in line
    line = complaint(trained_on(synth, tmp_path / "b", "data.sampler.count=4"))
    assert line == "error: data.sampler.count: the model takes 8 frames, not: 4"
    line = complaint(trained_on(synth, tmp_path / "c", "model.backbone.in_channels=10"))
    assert line == "error: transform: the model takes 10 channels, the transform gives: 3"


def test_a_misspelt_key(tmp_path: Path) -> None:
    line = complaint(command(TRAIN, "experiment=debug/tiny", "stepz=1", f"run_dir={tmp_path}"))
    assert "stepz" in line


@pytest.mark.slow
def test_bad_input_under_torchrun_ends_every_rank(synth: Path, tmp_path: Path) -> None:
    root = shutil.copytree(synth, tmp_path / "set")
    label_out_of_range(root)
    words = (
        "experiment=debug/tiny", "data=mmit", f"data.root={root}", f"run_dir={tmp_path / 'run'}",
        "~data.part", "~data.train", "~data.val", "device=cpu",
    )  # fmt: skip
    done = finish(start(TRAIN, *words, ranks=2))
    assert done.code != 0
    assert "label is not in 0..17: 18" in done.err
    assert not (tmp_path / "run" / "checkpoints").exists()
