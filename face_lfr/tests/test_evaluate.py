"""Evaluation from runs, releases and features of any other system, by each protocol."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_curve

from common.log import InputError
from face_lfr.data.bins import load_bin
from face_lfr.data.challenge import load_deepglint
from face_lfr.data.ijb import load_ijb
from face_lfr.data.matrix_file import read_matrix
from face_lfr.data.replicas import write_replica
from face_lfr.tests.launch import evaluate
from face_lfr.verification import verify
from face_lfr.weights import load_trained, save_release


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Features of 60 images of 12 persons, and a distractor."""
    folder, rng = tmp_path_factory.mktemp("features"), np.random.default_rng(0)
    labels = np.repeat(np.arange(12), 5)
    found = rng.normal(size=(12, 16))[labels] + 1.5 * rng.normal(size=(60, 16))
    found = np.concatenate([found, rng.normal(size=(1, 16))]).astype(np.float32)
    labels = np.append(labels, -1)
    np.save(folder / "f.npy", found)
    np.save(folder / "l.npy", labels)
    (folder / "l.txt").write_text("".join(f"{label}\n" for label in labels))
    return {"folder": folder, "features": found, "labels": labels}


def test_all_pairs_as_the_contract_has_it(features: dict[str, Any], tmp_path: Path) -> None:
    folder = features["folder"]
    words = ("protocol=all_pairs", f"features={folder / 'f.npy'}", f"out={tmp_path}")
    result = evaluate(*words, f"labels={folder / 'l.npy'}", "fpr=[0.01,0.1]")
    unit = features["features"].astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    row, column = np.triu_indices(len(unit), 1)
    same = features["labels"][row] == features["labels"][column]
    fpr, tpr, _ = roc_curve(same, (unit @ unit.T)[row, column], drop_intermediate=False)
    for rate in (0.01, 0.1):
        assert result[f"tpr@{rate:g}"] == pytest.approx(tpr[fpr <= rate].max(), abs=1e-12)
    assert (result["positives"], result["negatives"]) == (same.sum(), (~same).sum())
    stored = json.loads((tmp_path / "metrics.json").read_text())
    assert stored["points"][0]["false_accepts"] == int(0.01 * (~same).sum())
    again = evaluate(*words, f"labels={folder / 'l.txt'}", "fpr=0.1")
    assert again["tpr@0.1"] == result["tpr@0.1"]
    assert evaluate(*words, f"labels={folder / 'l.txt'}", "fpr=1")["tpr@1"] == 1.0
    assert json.loads((tmp_path / "metrics.json").read_text())["points"][0]["threshold"] is None


def test_a_run_and_its_release_score_alike(run: Path, synth: Path, tmp_path: Path) -> None:
    first = evaluate(f"run_dir={run}", f"out={tmp_path / 'run'}")  # the .bin beside its data
    save_release(load_trained(run), tmp_path / "model.safetensors")
    words = (f"checkpoint={tmp_path / 'model.safetensors'}", f"annotations={synth / 'syn.bin'}")
    again = evaluate(*words, f"out={tmp_path / 'release'}")
    for name in ("accuracy", "val", "pairs", "threshold"):
        assert again[f"syn/{name}"] == first[f"syn/{name}"]
    # The features that were written are themselves an input.
    alone = evaluate(
        "protocol=verification", f"features={tmp_path / 'run' / 'syn.npy'}",
        f"annotations={synth / 'syn.bin'}", f"out={tmp_path / 'file'}",
    )  # fmt: skip
    assert alone["accuracy"] == first["syn/accuracy"]
    found = verify(np.load(tmp_path / "run" / "syn.npy"), load_bin(synth / "syn.bin").same_P)
    assert found.accuracy == first["syn/accuracy"]


def test_the_image_track_and_its_submission(run: Path, synth: Path, tmp_path: Path) -> None:
    words = ("protocol=all_pairs", f"images={synth / 'glint_syn'}", "fpr=[0.1]", f"out={tmp_path}")
    result = evaluate(f"run_dir={run}", *words, "submission=true")
    track = load_deepglint(synth / "glint_syn")
    feature_ND = np.load(tmp_path / "features.npy")
    assert feature_ND.shape == (len(track), 16)
    sent_ND = read_matrix(tmp_path / "submission.bin")
    unit_ND = feature_ND / np.linalg.norm(feature_ND, axis=1, keepdims=True)
    np.testing.assert_allclose(sent_ND, unit_ND, atol=1e-6)
    plain = evaluate(f"run_dir={run}", *words, "flip=false")
    assert not np.array_equal(np.load(tmp_path / "features.npy"), feature_ND)
    assert plain["negatives"] == result["negatives"]


def test_the_video_track_by_model_and_by_files(
    run: Path, scorer: Path, synth: Path, tmp_path: Path
) -> None:
    words = ("protocol=video", "fpr=[0.1]", "method=qanpp")
    model = evaluate(
        *words, f"run_dir={run}", f"quality={scorer}", f"images={synth / 'iqiyi_syn'}",
        f"out={tmp_path / 'model'}",
    )  # fmt: skip
    assert (model["videos"], model["frames"]) == (8, 24)
    frames = tmp_path / "model" / "frames"
    files = evaluate(
        *words, f"features={frames / 'features.npy'}", f"quality={frames / 'quality.npy'}",
        f"images={frames / 'images.txt'}", f"annotations={frames / 'videos.txt'}",
        f"labels={frames / 'labels.txt'}", f"out={tmp_path / 'files'}",
    )  # fmt: skip
    assert files["points"] == model["points"]
    mean = evaluate(
        "protocol=video", "fpr=[0.1]", f"run_dir={run}", f"images={synth / 'iqiyi_syn'}",
        f"out={tmp_path / 'mean'}",
    )  # fmt: skip
    assert mean["method"] == "mean_l2"
    assert mean["points"][0]["threshold"] != model["points"][0]["threshold"]


def test_ijb_by_model_and_by_features(run: Path, tmp_path: Path) -> None:
    root = write_replica("ijb", tmp_path / "ijb", 0)
    words = ("protocol=template", f"annotations={root}")
    model = evaluate(*words, f"run_dir={run}", f"out={tmp_path / 'model'}")
    assert model["mode"] == "N1D1F1"
    assert model["genuine"] + model["impostor"] == len(load_ijb(root).same_P)
    assert 0 <= model["rank@1"] <= 1
    path = tmp_path / "model" / "features.npy"
    files = evaluate(*words, f"features={path}", f"out={tmp_path / 'files'}")
    for name in ("tpr@0.01", "tpr_nearest@0.01", "rank@1"):
        assert files[name] == model[name]
    plain = evaluate(
        *words, f"features={path}", "keep_norm=false", "detector_score=false",
        f"out={tmp_path / 'plain'}",
    )  # fmt: skip
    assert plain["mode"] == "N0D0F1"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["protocol=faces"], "protocol: must be one of all_pairs, verification"),
        ([], "give exactly one of them"),
        (["features=a.npy", "checkpoint=b"], "give exactly one of them"),
        (["features=none.npy", "annotations=x.bin"], r"none\.npy: no such file"),
        (["features=none.npy"], "annotations: features need"),
        (["protocol=all_pairs", "features={f}", "labels={l}", "fpr=[1e-9]"], "the smallest that"),
        (["protocol=all_pairs", "features={f}", "labels={l}", "fpr=[a]"], "fpr: must be numbers"),
        (["protocol=all_pairs", "features={f}", "fpr=[0.1]"], "labels: features need"),
        (["protocol=all_pairs", "features={l}", "labels={l}"], "must be rows of floats"),
        (["protocol=video", "features={f}"], "images: features need"),
    ],
)
def test_what_cannot_be_evaluated_is_named(
    features: dict[str, Any], tmp_path: Path, words: list[str], message: str
) -> None:
    folder = features["folder"]
    paths = {"f": folder / "f.npy", "l": folder / "l.npy"}
    with pytest.raises(InputError, match=message):
        evaluate(*(word.format(**paths) for word in words), f"out={tmp_path}")


def test_kinds_are_not_mixed_up(run: Path, scorer: Path, synth: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be a recogniser, not: quality"):
        evaluate(f"run_dir={scorer}", f"out={tmp_path}")
    words = ("protocol=video", f"run_dir={run}", f"images={synth / 'iqiyi_syn'}")
    with pytest.raises(InputError, match="must be a quality network, not: embedding"):
        evaluate(*words, f"quality={run}", f"out={tmp_path}")
    with pytest.raises(InputError, match="needs the quality of every frame"):
        evaluate(*words, "method=qanpp", "fpr=[0.1]", f"out={tmp_path}")
