"""Bad input ends with code 2 and one line `error: <where>: <what>: <value>`, no traceback."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from reid_rqen.tests.launch import Ended, command, finish, start

TRAIN, EVALUATE = "reid_rqen.train", "reid_rqen.evaluate"
LOG_LINE = re.compile(r"\d\d:\d\d:\d\d [IW] |.*it/s, ")


def complaint(done: Ended) -> str:
    """The one error line; fails when anything but log lines comes with it."""
    assert done.code == 2, done
    *others, last = done.err.splitlines()
    assert last.startswith("error: ")
    assert len(last.removeprefix("error: ").split(": ")) >= 2
    assert all(LOG_LINE.match(line) for line in others), others
    return last


def trained_on(kind: str, root: Path, run_dir: Path, *words: str) -> Ended:
    more = [] if kind == "synth" else ["~data.identities"]
    return command(
        TRAIN, "experiment=debug/tiny", f"data={kind}", f"data.root={root}", f"run_dir={run_dir}",
        "device=cpu", "steps=1", *more, *words,
    )  # fmt: skip


def no_root(root: Path) -> str:
    shutil.rmtree(root)
    return f"error: {root}: data set not found"


def empty_tracklet(root: Path) -> str:
    home = root / "scen2" / "view1" / "3"
    for path in home.iterdir():
        path.unlink()
    return f"error: {home}: tracklet holds no image"


def folder_without_number(root: Path) -> str:
    home = root / "scen2" / "view1"
    (home / "3").rename(home / "anna")
    return f"error: {home / 'anna'}: folder name is not a number<n>: anna"


def unreadable_picture(root: Path) -> str:
    for path in root.rglob("scen[23]/*/*/*.jpg"):
        path.write_bytes(b"none")
    return f"error: {root}/scen"  # which one depends on the draw


@pytest.mark.parametrize(
    "harm", [no_root, empty_tracklet, folder_without_number, unreadable_picture]
)
def test_a_damaged_lpw(harm, replica: dict[str, Path], tmp_path: Path) -> None:
    root = shutil.copytree(replica["lpw"], tmp_path / "set")
    expected = harm(root)
    line = complaint(trained_on("lpw", root, tmp_path / "run"))
    assert line.startswith(expected)
    if harm is unreadable_picture:
        assert re.search(r"/\d+\.jpg: image cannot be decoded: 4 bytes$", line)


def mixed_identities(root: Path) -> str:
    path = root / "info" / "train_name.txt"
    names = path.read_text().split()
    names[1] = names[-1]
    path.write_text("\n".join(names))
    return f"error: {path}: tracklet 1 is of person 1, camera 1, but holds the frame: {names[-1]}"


def overlapping_halves(root: Path) -> str:
    """Rename the test's person 2 to person 1, who is trained on."""
    for path in (root / "bbox_test" / "0002").iterdir():
        (root / "bbox_test" / "0001").mkdir(exist_ok=True)
        path.rename(root / "bbox_test" / "0001" / path.name.replace("0002C", "0001C"))
    (root / "bbox_test" / "0002").rmdir()
    listing = root / "info" / "test_name.txt"
    listing.write_text(listing.read_text().replace("0002C", "0001C"))
    table = loadmat(root / "info" / "tracks_test_info.mat")["track_test_info"]
    table[table[:, 2] == 2, 2] = 1
    savemat(root / "info" / "tracks_test_info.mat", {"track_test_info": table})
    return f"error: {root}: 1 identities are in train and test: [1]"


@pytest.mark.parametrize("harm", [mixed_identities, overlapping_halves])
def test_a_damaged_mars(harm, replica: dict[str, Path], tmp_path: Path) -> None:
    root = shutil.copytree(replica["mars"], tmp_path / "set")
    expected = harm(root)
    assert complaint(trained_on("mars", root, tmp_path / "run")) == expected


def test_a_split_that_is_not_there(replica: dict[str, Path], tmp_path: Path) -> None:
    done = trained_on("prid2011", replica["prid2011"], tmp_path, "data.split=10")
    assert complaint(done) == "error: split: must be in 0..9: 10"


def test_overlapping_halves_of_a_split_file(replica: dict[str, Path], tmp_path: Path) -> None:
    names = sorted(p.name for p in (replica["prid2011"] / "multi_shot" / "cam_a").iterdir())
    file = tmp_path / "splits.json"
    file.write_text(json.dumps([{"train": names[:3], "test": names[2:]}] * 10))
    done = trained_on("prid2011", replica["prid2011"], tmp_path, f"data.split_file={file}")
    line = complaint(done)
    assert line == f"error: {file} split 0: 1 persons are in train and test: {names[2]}"


def test_an_unreadable_picture_stops_an_evaluation(run: Path, synth: Path, tmp_path: Path) -> None:
    root = shutil.copytree(synth, tmp_path / "set")
    bad = sorted(root.glob("scen1/view2/*/5.jpg"))[3]
    bad.write_bytes(b"")
    words = [f"run_dir={run}", "eval=synth", f"eval.root={root}", "+eval.identities=6"]
    for workers in (0, 1):
        done = command(EVALUATE, *words, f"out={tmp_path / 'out'}", f"workers={workers}")
        assert complaint(done) == f"error: {bad}: image cannot be decoded: 0 bytes"
    assert not (tmp_path / "out" / "metrics.json").exists()


@pytest.fixture
def features(tmp_path: Path) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {"query_feat": rng.random((3, 4)), "gallery_feat": rng.random((5, 4))}
    arrays |= {"query_pid": np.arange(3), "gallery_pid": np.array([0, 1, 2, 3, 4])}
    return arrays | {"query_cam": np.zeros(3, int), "gallery_cam": np.ones(5, int)}


def test_a_feature_file_with_nan(features: dict[str, np.ndarray], tmp_path: Path) -> None:
    features["gallery_feat"][2, 1] = np.nan
    path = tmp_path / "f.npz"
    np.savez(path, **features)
    words = (f"features={path}", f"out={tmp_path / 'out'}")
    line = complaint(command(EVALUATE, *words, "protocol=lpw"))
    assert line == f"error: {path}: gallery_feat is not finite in 1 rows, first row: 2"
    assert complaint(command(EVALUATE, *words)) == "error: protocol: a feature file needs it"
    for name in ("f.npz", "none.npz"):
        path.unlink(missing_ok=True)
        done = command(EVALUATE, f"features={tmp_path / name}", "protocol=lpw")
        assert complaint(done) == f"error: {tmp_path / name}: no such file"


def test_an_unknown_protocol_or_metric(features: dict[str, np.ndarray], tmp_path: Path) -> None:
    np.savez(tmp_path / "f.npz", **features)
    words = (f"features={tmp_path / 'f.npz'}", f"out={tmp_path / 'out'}")
    names = "closed_pair, lpw, mars_11310, mars_9330, mars_official"
    done = command(EVALUATE, *words, "protocol=mars")
    assert complaint(done) == f"error: protocol: is none of {names}: mars"
    done = command(EVALUATE, *words, "protocol=lpw", "metric=l1")
    assert complaint(done) == "error: metric: is none of cosine, euclid, xqda, kissme: l1"
    done = command(EVALUATE, *words, "protocol=lpw", "metric=xqda")
    assert complaint(done).startswith("error: train_feat: a learned metric needs")
    done = command(EVALUATE, *words, "protocol=lpw", "+metric_options.ridge=1")
    line = "error: metric_options: only xqda and kissme have any, not: cosine"
    assert complaint(done) == line
    done = command(EVALUATE, *words, "protocol=lpw", "metric=xqda", "+metric_options.rigde=1")
    assert complaint(done).startswith("error: metric_options.rigde: is none of solver, ridge")


def test_nothing_to_evaluate(run: Path, tmp_path: Path) -> None:
    where = "error: run_dir, checkpoint, features: give exactly one of them: "
    assert complaint(command(EVALUATE)) == f"{where}[]"
    done = command(EVALUATE, f"run_dir={run}", "features=f.npz")
    assert complaint(done) == f"{where}['run_dir', 'features']"
    done = command(EVALUATE, f"run_dir={tmp_path}")
    assert complaint(done) == f"error: {tmp_path}: holds no complete checkpoint"
    done = command(EVALUATE, f"checkpoint={tmp_path / 'a.safetensors'}")
    assert complaint(done).startswith(f"error: {tmp_path / 'a.safetensors'}")


def test_a_region_the_model_lacks(run: Path) -> None:
    line = complaint(command(EVALUATE, f"run_dir={run}", "use_regions=[3]"))
    assert line.startswith(f"error: {run / 'config.yaml'}: its model cannot be built: use_regions")


def test_a_checkpoint_of_another_number_of_identities(
    run: Path, replica: dict[str, Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    line = complaint(trained_on("lpw", replica["lpw"], copy, "steps=41"))
    folder = copy / "checkpoints" / "step_00000040"
    assert line == f"error: {folder}: classifier.bias is (6,) here, and in the model: (5,)"


def test_a_batch_that_does_not_divide(
    replica: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from common import dist

    monkeypatch.setattr(dist, "size", lambda: 3)
    done = trained_on("lpw", replica["lpw"], tmp_path)
    assert complaint(done) == "error: global_batch: does not divide over 3 ranks: 4"


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("stepz=3", "error: stepz: Key 'stepz' not in 'TrainConfig': 3"),
        ("steps=0", "error: steps: must be at least 1: 0"),
        ("steps=many", "error: steps: Value 'many' of type 'str' could not be converted"),
        ("batch_norm=none", "error: batch_norm: must be one of local, sync, frozen: none"),
        ("precision=int8", "error: precision: must be one of float32, bfloat16, float16: int8"),
        ("device=cuda:77", "error: device: only "),
        ("experiment=nothing", "error: experiment/nothing: is not there"),
        ("model.regions=[3,2,2,1]", "error: model: "),
        ("draws.positive=other", "error: draws: "),
        ("init=none.safetensors", "error: none.safetensors: no such file"),
        ("boundaries=none.npz", "error: none.npz: boundary file is missing"),
        ("+draws.framez=3", "error: draws: "),
        ("draws._target_=reid_rqen.data.sets.Nothing", "error: draws: "),
    ],
)
def test_a_setting_that_is_not_accepted(word: str, line: str, synth: Path, tmp_path: Path) -> None:
    done = command(
        TRAIN, "experiment=debug/tiny", f"data.root={synth}", "data.identities=6",
        f"run_dir={tmp_path}", *([] if word.startswith("device") else ["device=cpu"]), word,
    )  # fmt: skip
    assert complaint(done).startswith(line)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_real_processes_say_one_line(replica: dict[str, Path], tmp_path: Path) -> None:
    root = shutil.copytree(replica["lpw"], tmp_path / "set")
    expected = unreadable_picture(root)
    words = ("data=lpw", f"run_dir={tmp_path}", "steps=1")
    no_data = start(TRAIN, *words, f"data.root={tmp_path / 'none'}")
    misspelt = start(EVALUATE, "rernk=true")
    # The error comes from a worker, and the workers must not keep the process alive.
    unreadable = start(TRAIN, *words, f"data.root={root}", "workers=2", "transform=tiny")
    done = finish(no_data)
    line = f"error: {tmp_path / 'none'}: data set not found, none of these folders exists: "
    assert done.err.startswith(line)
    assert done.err.count("\n") == 1
    assert done.out == ""
    assert finish(misspelt) == (2, "", "error: rernk: Key 'rernk' not in 'EvalConfig': true\n")
    assert complaint(finish(unreadable)).startswith(expected)


def test_the_traceback_is_there_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    done = command(EVALUATE, f"run_dir={tmp_path}", "device=cpu")
    assert done.code == 2
    assert "Traceback (most recent call last)" in done.err
    assert "load_trained" in done.err
    assert done.err.splitlines()[-1] == f"error: {tmp_path}: holds no complete checkpoint"
