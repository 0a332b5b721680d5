"""Evaluation from runs, releases and feature files; across data sets; what the report states."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from common.log import InputError
from reid_rqen.data.lpw import load_lpw
from reid_rqen.tests.launch import command, evaluate, train
from reid_rqen.tests.test_metrics import PROBLEMS, matlab_mars, problem
from reid_rqen.weights import load_trained, save_release

# queries, gallery, training identities of the replicas
SIZES = {
    "lpw": (3, 5, 5),
    "prid2011": (2, 2, 2),
    "ilidsvid": (3, 3, 3),
    "mars": (6, 11, 3),
    "duke_video": (3, 6, 3),
}


@pytest.fixture(scope="module")
def trained(replica: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One short training on every replica."""
    runs = {name: tmp_path_factory.mktemp("cross") / name for name in replica}
    for name, folder in runs.items():
        train(
            "experiment=debug/tiny", f"data={name}", f"data.root={replica[name]}",
            "~data.identities", f"run_dir={folder}", "steps=1", "global_batch=1",
            "draws.frames=2", "draws.positive=any_view",
        )  # fmt: skip
    return runs


@pytest.mark.parametrize("target", SIZES)
@pytest.mark.parametrize("source", SIZES)
def test_check_15_any_set_is_tested_with_weights_of_any_other(
    source: str, target: str, trained: dict[str, Path], replica: dict[str, Path], tmp_path: Path
) -> None:
    model = load_trained(trained[source])
    assert model.config["num_classes"] == SIZES[source][2]
    assert model.model.classifier is None
    result = evaluate(
        f"run_dir={trained[source]}", f"train={source}", f"eval={target}",
        f"eval.root={replica[target]}", "max_frames=2", f"out={tmp_path}",
    )  # fmt: skip
    assert (result["trained_on"], result["evaluated_on"]) == (source, target)
    assert (result["queries"], result["gallery"]) == SIZES[target][:2]
    assert 0 <= result["cmc@1"] <= 1
    assert result["protocol"] == {
        "lpw": "lpw", "mars": "mars_official", "duke_video": "mars_9330"
    }.get(target, "closed_pair")  # fmt: skip


def test_check_15_weights_of_another_set_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train: .* was trained on synth, not on: mars"):
        evaluate(f"run_dir={run}", "train=mars", f"out={tmp_path}")


def test_another_split_of_the_training_set_is_refused(
    trained: dict[str, Path], replica: dict[str, Path], tmp_path: Path
) -> None:
    words = [f"run_dir={trained['prid2011']}", "eval=prid2011", f"out={tmp_path}", "max_frames=1"]
    words.append(f"eval.root={replica['prid2011']}")
    assert evaluate(*words)["split"] == 0
    with pytest.raises(InputError, match=r"eval\.split: .* split 0 of the same data, not on: 3"):
        evaluate(*words, "eval.split=3")


def test_check_16_the_report_says_what_was_measured(run: Path, tmp_path: Path) -> None:
    result = evaluate(f"run_dir={run}", f"out={tmp_path / 'new' / 'out'}")
    written = json.loads((tmp_path / "new" / "out" / "metrics.json").read_text())
    assert written == json.loads(json.dumps(result))
    expected = {
        "protocol": "lpw", "metric": "cosine", "rerank": False, "queries": 6, "valid": 6,
        "skipped": 0, "gallery": 12, "frames": 216, "splits_averaged": 1, "seed": 0,
        "device": "cpu", "step": 40, "trained_on": "synth", "evaluated_on": "synth",
        "max_frames": None, "fixed_scores": False, "data_skipped": {}, "split": None,
    }  # fmt: skip
    assert {key: written[key] for key in expected} == expected
    assert written["commit"] is None or len(written["commit"]) == 40
    assert written["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert written["seconds"] > 0
    assert len(written["cmc_curve"]) == 50
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_release_and_a_feature_file_score_like_the_run(
    run: Path, synth: Path, tmp_path: Path
) -> None:
    first = evaluate(f"run_dir={run}", f"out={tmp_path}", "save_features=true", "batch=7")
    save_release(load_trained(run), tmp_path / "release.safetensors")
    words = [f"out={tmp_path}", f"eval.root={synth}", "eval=synth", "+eval.identities=6"]
    second = evaluate(f"checkpoint={tmp_path / 'release.safetensors'}", *words)
    third = evaluate(f"features={tmp_path / 'features.npz'}", "protocol=lpw", f"out={tmp_path}")
    fourth = evaluate(f"checkpoint={run / 'checkpoints' / 'step_00000040'}", f"out={tmp_path}")
    for other in (second, third, fourth):
        assert other["cmc_curve"] == first["cmc_curve"]
        assert other["mAP"] == pytest.approx(first["mAP"], abs=1e-12)
    assert "seed" not in third  # a file says nothing about it
    with pytest.raises(InputError, match="eval: a release file does not know"):
        evaluate(f"checkpoint={tmp_path / 'release.safetensors'}", f"out={tmp_path}")


def test_switches_of_the_reference_change_the_vectors(run: Path, synth: Path) -> None:
    query = load_lpw(synth).query[0]
    plain, fixed, upper = (
        load_trained(run, **options)
        for options in ({}, {"fixed_scores": True}, {"use_regions": [0]})
    )
    image_1TCHW = plain.transform.normalize(plain.transform.load(query.frames))[None]
    with torch.inference_mode():
        vectors = [each.model(image_1TCHW).vector_SD for each in (plain, fixed, upper)]
    assert [vector.shape[1] for vector in vectors] == [192, 192, 64]
    assert not torch.allclose(vectors[0], vectors[1], atol=1e-4)
    direct = vectors[0][:, :64] / vectors[0][:, :64].norm()
    torch.testing.assert_close(direct, vectors[2])


def test_the_vectors_are_those_of_whole_tracklets(run: Path, synth: Path, tmp_path: Path) -> None:
    """Batches that mix tracklets give what the model gives for one tracklet at a time."""
    evaluate(f"run_dir={run}", f"out={tmp_path}", "save_features=true", "batch=7")
    with np.load(tmp_path / "features.npz") as file:
        stored_QD, pid = file["query_feat"], file["query_pid"]
    trained, data = load_trained(run), load_lpw(synth)
    assert pid.tolist() == [tracklet.pid for tracklet in data.query]
    for row, tracklet in enumerate(data.query):
        image_TCHW = trained.transform.normalize(trained.transform.load(tracklet.frames))
        with torch.inference_mode():
            vector_D = trained.model(image_TCHW[None]).vector_SD[0].numpy()
        np.testing.assert_allclose(stored_QD[row], vector_D, atol=1e-6)


def test_a_query_without_a_positive_is_counted(
    replica: dict[str, Path], trained: dict[str, Path], tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    root = shutil.copytree(replica["lpw"], tmp_path / "lpw")
    for view in (1, 3):
        shutil.rmtree(root / "scen1" / f"view{view}" / "3")
    words = [f"run_dir={trained['lpw']}", "eval=lpw", f"eval.root={root}", f"out={tmp_path}"]
    result = evaluate(*words)
    assert (result["queries"], result["valid"], result["skipped"]) == (3, 2, 1)
    assert result["data_skipped"] == {"query_without_positive": 1}
    assert any("1 queries have no positive" in record.message for record in caplog.records)


def test_the_command_prints_a_table(run: Path, tmp_path: Path) -> None:
    done = command(
        "reid_rqen.evaluate", f"run_dir={run}", f"out={tmp_path}", "device=cpu", "workers=0"
    )
    assert done.code == 0
    assert "protocol lpw" in done.out
    result = json.loads((tmp_path / "metrics.json").read_text())
    assert f"{100 * result['cmc@1']:.2f} %" in done.out
    for name in ("queries", "valid", "skipped", "gallery", "frames"):
        assert name in done.out
    assert "error" not in done.err


def test_pair_models_refuse_another_distance(replica: dict[str, Path], tmp_path: Path) -> None:
    train(
        "experiment=prid2011/astpn", f"data.root={replica['prid2011']}", f"run_dir={tmp_path}",
        "steps=1", "draws.frames=2", "workers=0", "tensorboard=false",
    )  # fmt: skip
    for word in ("metric=euclid", "rerank=true"):
        with pytest.raises(InputError, match="a distance of its own"):
            evaluate(f"run_dir={tmp_path}", f"out={tmp_path}", word)


def test_each_model_has_its_own_distance(replica: dict[str, Path], tmp_path: Path) -> None:
    train(
        "experiment=prid2011/cnn_rnn", f"data.root={replica['prid2011']}", f"run_dir={tmp_path}",
        "steps=1", "draws.frames=2", "workers=0", "tensorboard=false",
    )  # fmt: skip
    words = (f"run_dir={tmp_path}", f"out={tmp_path}", "max_frames=2")
    assert evaluate(*words)["metric"] == "euclid"
    assert evaluate(*words, "metric=cosine")["metric"] == "cosine"


@pytest.mark.parametrize(
    "target", ["os.system", "reid_rqen.data.synthetic.generate", "reid_rqen.data.mars.np.load"]
)
def test_a_run_may_not_name_a_foreign_loader(run: Path, tmp_path: Path, target: str) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config = OmegaConf.load(copy / "config.yaml")
    config.data = {"_target_": target, "root": str(tmp_path / "never")}
    OmegaConf.save(config, copy / "config.yaml")
    with pytest.raises(InputError, match=rf"may not call: {target}"):
        evaluate(f"run_dir={copy}", f"out={tmp_path}")
    assert not (tmp_path / "never").exists()


def test_check_08_feature_files_score_as_the_matlab_rule(tmp_path: Path) -> None:
    """`evaluate protocol=mars_official features=FILE` on 200 random files."""
    file = tmp_path / "f.npz"
    for seed in range(PROBLEMS):
        case = problem(seed, junk=True)
        rng = np.random.default_rng([seed, 1])
        query, gallery = (rng.normal(size=(size, 16)).astype(np.float32) for size in
                          case.distance.shape)  # fmt: skip
        unit_QD, unit_GD = (
            x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
            for x in (query, gallery)
        )
        labels = {name: value for name, value in case._asdict().items() if name != "distance"}
        np.savez(file, query_feat=query, gallery_feat=gallery, **labels)
        scores = evaluate(f"features={file}", "protocol=mars_official", f"out={tmp_path}")
        average, first, valid = matlab_mars(case._replace(distance=-unit_QD @ unit_GD.T))
        assert scores["mAP"] == pytest.approx(average, abs=1e-12)
        assert scores["cmc@1"] == pytest.approx(first, abs=1e-12)
        assert scores["valid"] == valid
