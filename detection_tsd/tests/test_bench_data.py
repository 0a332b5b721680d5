"""The rows of reading annotations and of scoring detections, and the sets they are measured on."""

import json
from pathlib import Path

import numpy as np
import pytest

from detection_tsd.benchmarks import bench_data, pictures
from detection_tsd.benchmarks.peer_openimages import average_precisions
from detection_tsd.metrics.openimages import evaluate

FIELDS = {"name", "shape", "ours_ms", "peer", "peer_ms", "ratio", "max_abs_diff"}


def test_rows_of_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_data, "QUICK_IMAGES", 12)
    monkeypatch.setattr(bench_data, "DETECTIONS", 20)
    found = list(bench_data.data_rows(1, quick=True))
    assert [entry["peer"] for entry in found] == [
        "pycocotools COCO", "pycocotools", "faster-coco-eval", "loop over images and classes",
        bench_data.TF,
    ]  # fmt: skip
    assert all(FIELDS <= set(entry) for entry in found)
    assert found[0]["max_abs_diff"] <= 1e-4
    assert max(found[1]["max_abs_diff"], found[3]["max_abs_diff"]) <= 1e-12
    assert found[4]["note"].startswith("not measured: ")


def test_a_measure_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, found = bench_data.openimages_problem(12, 0)
    values_K = average_precisions(truth, found)
    scores = evaluate(truth, found)
    np.testing.assert_allclose(scores.ap_K, values_K, rtol=0, atol=1e-12)
    assert 0.02 < scores.mean_ap < 0.98
    assert scores.counts["groups found"] > 0
    assert scores.counts["detections of unverified classes"] > 0
    monkeypatch.setattr(bench_data, "average_precisions", lambda *_: values_K + 1e-6)
    with pytest.raises(RuntimeError, match="Open Images mAP: results differ by"):
        list(bench_data.openimages_rows(12, 0, 1))


def test_generated_sets_are_those_of_the_seed(tmp_path: Path) -> None:
    roots = [
        pictures.write_set(tmp_path / str(k), 101, seed, pictures=1)
        for k, seed in enumerate((0, 0, 1))
    ]
    texts = [(root / "annotations" / "instances_train2017.json").read_text() for root in roots]
    assert texts[0] == texts[1] != texts[2]
    content = json.loads(texts[0])
    assert len(content["images"]) == 101
    assert 5 < len(content["annotations"]) / 101 < 9
    assert sum(entry["iscrowd"] for entry in content["annotations"]) >= 1
    (file,) = (roots[0] / "train2017").iterdir()
    assert 40_000 < file.stat().st_size < 250_000
