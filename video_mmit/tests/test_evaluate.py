"""Evaluation from runs, releases, score files and ensembles."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import label_ranking_average_precision_score

from common.log import InputError
from video_mmit.score_file import ScoreFile
from video_mmit.tests.launch import evaluate
from video_mmit.weights import load_trained, save_release

VIDEOS, CLASSES = 40, 6


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A list of videos, and the scores of three models that know something different."""
    folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    target = rng.random((VIDEOS, CLASSES)) < 0.3
    target[np.arange(VIDEOS), rng.integers(CLASSES, size=VIDEOS)] = True
    ids = [f"a+b/{row}.mp4" for row in range(VIDEOS)]
    lines = [
        f"{name} 90 {','.join(str(k) for k in np.flatnonzero(row))}"
        for name, row in zip(ids, target, strict=True)
    ]
    (folder / "list.txt").write_text("\n".join(lines) + "\n")
    found: dict[str, Any] = {"list": folder / "list.txt", "target": target, "ids": ids}
    for name, noise in (("a", 0.8), ("b", 1.0), ("c", 4.0)):
        scores = target + noise * rng.normal(size=target.shape)
        order = rng.permutation(VIDEOS)  # a file need not be in the order of the list
        found[name] = folder / f"{name}.npz"
        np.savez(found[name], ids=np.array(ids)[order], scores=scores[order])
        found[f"scores_{name}"] = scores
    return found


def test_a_score_file_as_the_contract_has_it(files: dict[str, Any], tmp_path: Path) -> None:
    words = (f"predictions={files['a']}", f"annotations={files['list']}", f"out={tmp_path}")
    result = evaluate(*words)
    expected = label_ranking_average_precision_score(files["target"], files["scores_a"])
    assert result["mmit_mAP"] == pytest.approx(expected, abs=1e-12)
    assert result["videos"] == VIDEOS
    stored = json.loads((tmp_path / "metrics.json").read_text())
    assert stored["mmit_mAP"] == result["mmit_mAP"]


def test_class_frequency_comes_from_the_training_list(
    files: dict[str, Any], tmp_path: Path
) -> None:
    words = [f"predictions={files['a']}", f"annotations={files['list']}", f"out={tmp_path}"]
    assert "tail_mAP" not in evaluate(*words)
    assert "tail_mAP" in evaluate(*words, f"train_annotations={files['list']}")


def test_an_ensemble_names_its_members_and_crosses_its_halves(
    files: dict[str, Any], tmp_path: Path
) -> None:
    members = f"ensemble.members=[{files['a']},{files['b']},{files['c']}]"
    words = (members, f"annotations={files['list']}", f"out={tmp_path}")
    uniform = evaluate(*words)
    mean = np.mean([files[f"scores_{name}"] for name in "abc"], axis=0)
    expected = label_ranking_average_precision_score(files["target"], mean)
    assert uniform["mmit_mAP"] == pytest.approx(expected, abs=1e-9)
    assert "cross_fitted" not in uniform
    assert list(uniform["members"]) == [str(files[name]) for name in "abc"]
    tuned = evaluate(*words, "ensemble.tune=true")
    assert tuned["mmit_mAP"] >= max(*uniform["members"].values(), uniform["mmit_mAP"]) - 1e-9
    assert 0 < tuned["cross_fitted"] <= 1
    given = evaluate(*words, "ensemble.weights=[1,0,0]")
    assert given["mmit_mAP"] == pytest.approx(uniform["members"][str(files["a"])], abs=1e-9)
    for domain in ("prob", "rank"):
        assert 0 < evaluate(*words, f"ensemble.domain={domain}")["mmit_mAP"] <= 1


def test_a_run_and_its_release_score_alike(run: Path, synth: Path, tmp_path: Path) -> None:
    first = evaluate(f"run_dir={run}", f"out={tmp_path / 'run'}")
    save_release(load_trained(run), tmp_path / "model.safetensors")
    words = [
        f"checkpoint={tmp_path / 'model.safetensors'}", "data=mmit", f"data.root={synth}",
        f"out={tmp_path / 'release'}",
    ]  # fmt: skip
    again = evaluate(*words)
    for name in ("mmit_mAP", "macro_mAP", "hit@1", "videos"):
        assert again[name] == first[name]
    one = ScoreFile.load(tmp_path / "run" / "scores.npz")
    two = ScoreFile.load(tmp_path / "release" / "scores.npz")
    np.testing.assert_array_equal(one.scores, two.scores)
    # The written scores are themselves a score file of the contract.
    listed = evaluate(
        f"predictions={tmp_path / 'run' / 'scores.npz'}", f"annotations={synth / 'val.txt'}",
        f"out={tmp_path / 'file'}",
    )  # fmt: skip
    assert listed["mmit_mAP"] == pytest.approx(first["mmit_mAP"], abs=1e-12)


def test_a_release_needs_a_data_set(run: Path, tmp_path: Path) -> None:
    save_release(load_trained(run), tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="does not know where its data is"):
        evaluate(f"checkpoint={tmp_path / 'model.safetensors'}", f"out={tmp_path}")


def test_other_classes_than_the_models_are_refused(run: Path, synth: Path, tmp_path: Path) -> None:
    root = shutil.copytree(synth, tmp_path / "set")
    path = root / "moments_categories.txt"
    lines = path.read_text().splitlines()
    names = [line.rsplit(",", 1)[0] for line in lines]
    names[2], names[3] = names[3], names[2]
    path.write_text("".join(f"{name},{index}\n" for index, name in enumerate(names)))
    with pytest.raises(InputError, match="first difference at label: 2"):
        evaluate(f"run_dir={run}", "data=mmit", f"data.root={root}", f"out={tmp_path}")


def test_exactly_one_source(files: dict[str, Any], run: Path) -> None:
    for words in ((), (f"run_dir={run}", f"predictions={files['a']}")):
        with pytest.raises(InputError, match="give exactly one of them"):
            evaluate(*words)
    with pytest.raises(InputError, match="annotations: score files need"):
        evaluate(f"predictions={files['a']}")
