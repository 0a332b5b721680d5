"""Bad input ends with code 2 and one line `error: <where>: <what>: <value>`, no traceback."""

import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from face_lfr.tests.launch import Ended, command, finish, start

TRAIN, EVALUATE = "face_lfr.train", "face_lfr.evaluate"
LOG_LINE = re.compile(r"\d\d:\d\d:\d\d [IW] |.*it/s, ")


def complaint(done: Ended) -> str:
    """The one error line; fails when anything but log lines comes with it."""
    assert done.code == 2, done
    *others, last = done.err.splitlines()
    assert last.startswith("error: ")
    assert len(last.removeprefix("error: ").split(": ")) >= 2
    assert all(LOG_LINE.match(line) for line in others), others
    return last


def words(root: Path, run_dir: Path) -> tuple[str, ...]:
    """A training on the record file at `root`, as on a real set."""
    return (
        "experiment=ms1mv3/ir18_arcface", f"data.root={root}", "data.classes=null",
        "data.images=null", "model.widths=[4,8,8,8]", "model.layers=[1,1,1,1]", "model.features=8",
        "model.input_size=24", "transform.size=24", "epochs=null", "steps=2", "global_batch=8",
        "precision=float32", "workers=0", "device=cpu", f"run_dir={run_dir}",
    )  # fmt: skip


def no_root(root: Path) -> str:
    shutil.rmtree(root)
    return f"error: {root}"


def truncated(root: Path) -> str:
    path = root / "train.rec"
    path.write_bytes(path.read_bytes()[:-100])
    return f"error: {root / 'train.'}"


def bad_magic(root: Path) -> str:
    content = bytearray((root / "train.rec").read_bytes())
    content[0] ^= 1
    (root / "train.rec").write_bytes(content)
    return f"error: {root / 'train.rec'}"


def empty_index(root: Path) -> str:
    (root / "train.idx").write_text("")
    return f"error: {root / 'train.idx'}"


def offset_out_of_range(root: Path) -> str:
    lines = (root / "train.idx").read_text().splitlines()
    lines[3] = lines[3].split("\t")[0] + "\t999999999"
    (root / "train.idx").write_text("\n".join(lines) + "\n")
    return f"error: {root / 'train.'}"


def fewer_classes(root: Path) -> str:
    (root / "property").write_text("5,112,112\n")
    return f"error: {root / 'train.rec'}"


def a_class_without_images(root: Path) -> str:
    (root / "property").write_text("13,112,112\n")
    return f"error: {root / 'train.rec'}"


@pytest.mark.parametrize(
    "harm",
    [
        no_root, truncated, bad_magic, empty_index, offset_out_of_range, fewer_classes,
        a_class_without_images,
    ],
)  # fmt: skip
def test_a_damaged_training_set(harm: Callable[[Path], str], synth: Path, tmp_path: Path) -> None:
    root = shutil.copytree(synth, tmp_path / "set")
    for cache in root.glob("*.npy"):
        cache.unlink()
    expected = harm(root)
    line = complaint(command(TRAIN, *words(root, tmp_path / "run")))
    assert line.startswith(expected)


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, ("touch /tmp/should_not_be_there",)


def test_a_hostile_bin_is_refused(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.bin"
    path.write_bytes(pickle.dumps(Hostile()))
    line = complaint(command(EVALUATE, f"run_dir={run}", f"annotations={path}", "device=cpu"))
    assert line.startswith(f"error: {path}: ")
    assert "system" in line


def test_a_truncated_picture_stops_an_evaluation(run: Path, synth: Path, tmp_path: Path) -> None:
    root = shutil.copytree(synth / "glint_syn", tmp_path / "glint")
    path = root / (root / "filelist.txt").read_text().splitlines()[4]
    path.write_bytes(path.read_bytes()[:200])
    call = ("protocol=all_pairs", f"run_dir={run}", f"images={root}", f"out={tmp_path / 'out'}")
    for workers in (0, 1):
        line = complaint(command(EVALUATE, *call, "device=cpu", f"workers={workers}"))
        assert line.startswith(f"error: {path}: ")


def not_finite(feature: np.ndarray, label: np.ndarray) -> None:
    feature[3, 1] = np.nan


def zero_row(feature: np.ndarray, label: np.ndarray) -> None:
    feature[3] = 0


def one_identity(feature: np.ndarray, label: np.ndarray) -> None:
    label[:] = 4


def one_image_each(feature: np.ndarray, label: np.ndarray) -> None:
    label[:] = np.arange(len(label))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (not_finite, "3"), (zero_row, "3"), (one_identity, "different identities"),
        (one_image_each, "positive|two images|same"),
    ],
)  # fmt: skip
def test_bad_features(
    harm: Callable[[np.ndarray, np.ndarray], None], said: str, tmp_path: Path
) -> None:
    feature, label = np.random.default_rng(0).normal(size=(20, 4)), np.arange(20) // 2
    harm(feature, label)
    np.save(tmp_path / "f.npy", feature)
    np.save(tmp_path / "l.npy", label)
    call = (f"features={tmp_path / 'f.npy'}", f"labels={tmp_path / 'l.npy'}", "fpr=[0.1]")
    line = complaint(command(EVALUATE, "protocol=all_pairs", *call, f"out={tmp_path}"))
    assert re.search(said, line), line


def test_a_misspelt_key(tmp_path: Path) -> None:
    line = complaint(command(TRAIN, "experiment=debug/tiny", "stepz=1", f"run_dir={tmp_path}"))
    assert "stepz" in line


@pytest.mark.slow
def test_bad_input_under_torchrun_ends_every_rank(synth: Path, tmp_path: Path) -> None:
    root = shutil.copytree(synth, tmp_path / "set")
    fewer_classes(root)
    for cache in root.glob("*.npy"):
        cache.unlink()
    done = finish(start(TRAIN, *words(root, tmp_path / "run"), ranks=2))
    assert done.code != 0
    assert "error: " in done.err
    assert not (tmp_path / "run" / "checkpoints").exists()
