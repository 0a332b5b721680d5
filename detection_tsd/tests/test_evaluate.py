"""Evaluation of runs and of files through the entry point."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from common import dist
from detection_tsd.data.detection_data import Detections
from detection_tsd.data.draws import ImageRows
from detection_tsd.data.synthetic import load_synthetic
from detection_tsd.engine import Detecting, detect, in_file_pixels
from detection_tsd.result_files import coco_results
from detection_tsd.tests.conftest import SIZES
from detection_tsd.tests.launch import command, evaluate
from detection_tsd.weights import load_trained


def test_a_run_and_its_own_files_score_alike(run: Path, glyphs: Path, tmp_path: Path) -> None:
    result = evaluate(f"run_dir={run}", f"out={tmp_path}")
    assert json.loads((tmp_path / "metrics.json").read_text())["bbox"] == result["bbox"]
    truth = glyphs / "annotations" / "instances_val.json"
    again = evaluate(
        f"predictions={tmp_path / 'detections_bbox.json'}", f"annotations={truth}",
        f"out={tmp_path / 'again'}",
    )  # fmt: skip
    assert again["bbox"] == result["bbox"]
    assert again["counts"] == result["counts"]
    assert result["detected_images"] == SIZES["val"]
    assert {"AP", "AP50", "AP95", "ARl"} <= result["bbox"].keys()


def test_the_size_of_a_batch_changes_nothing(run: Path, tmp_path: Path) -> None:
    one, many = (
        evaluate(f"run_dir={run}", f"batch={size}", f"out={tmp_path / str(size)}")["bbox"]
        for size in (1, 8)
    )
    assert one == pytest.approx(many, abs=1e-6)


def test_one_view_is_the_plain_evaluation_and_flips_differ(run: Path, tmp_path: Path) -> None:
    plain = evaluate(f"run_dir={run}", f"out={tmp_path / 'plain'}")["bbox"]
    view = evaluate(f"run_dir={run}", "views=[[96,96]]", f"out={tmp_path / 'view'}")["bbox"]
    both = evaluate(f"run_dir={run}", "flip=true", f"out={tmp_path / 'flip'}")["bbox"]
    assert view == pytest.approx(plain, abs=1e-5)
    assert both != plain


def test_options_of_the_suppression_reach_the_model(run: Path, tmp_path: Path) -> None:
    words = (f"run_dir={run}", "+post.per_image=3", "+post.score_threshold=0.05")
    result = evaluate(*words, f"out={tmp_path}")
    assert 0 < result["counts"]["detections"] <= 3 * SIZES["val"]


def test_the_command_prints_a_table(run: Path, tmp_path: Path) -> None:
    done = command(
        "detection_tsd.evaluate", f"run_dir={run}", f"out={tmp_path}", "workers=0", "device=cpu"
    )
    assert done.code == 0, done.err
    for name in ("AP50", "AP95", "ARl", "objects", "detections"):
        assert name in done.out


def test_detections_go_back_to_the_pixels_of_the_file() -> None:
    box = torch.tensor([[10.0, 20.0, 30.0, 60.0], [-4.0, 0.0, 900.0, 80.0]])
    detected = Detections(box, torch.tensor([0.5, 0.25]), torch.tensor([1, 2]))
    found = in_file_pixels(detected, 7, torch.tensor([2.0, 4.0]), torch.tensor([18, 100]))
    np.testing.assert_allclose(found.box_D4, [[5, 5, 15, 15], [0, 0, 100, 18]])
    assert found.row == 7
    assert found.size == (18, 100)
    assert found.masks is None


def test_masks_become_run_lengths_of_the_picture() -> None:
    from pycocotools import mask as coder

    detected = Detections(
        torch.tensor([[2.0, 2.0, 10.0, 8.0]]), torch.tensor([0.9]), torch.tensor([1]),
        torch.ones(1, 28, 28),
    )  # fmt: skip
    found = in_file_pixels(detected, 0, torch.tensor([1.0, 1.0]), torch.tensor([12, 16]))
    assert found.masks is not None
    mask_HW = coder.decode(found.masks[0])
    assert mask_HW.shape == (12, 16)
    assert mask_HW[3:7, 3:9].all()
    assert not mask_HW[9:].any()
    json.dumps(found.masks)


def test_coco_results_name_the_files_ids(run: Path, glyphs: Path) -> None:
    trained = load_trained(run)
    data = load_synthetic(glyphs, "val", **SIZES)
    how = Detecting(trained.transform, dist.init("cpu"), batch=4)
    found = detect(trained.model, ImageRows(data, trained.transform), how)
    assert [item.row for item in found] == list(range(SIZES["val"]))
    entries = coco_results(found, data, "bbox")
    assert {entry["category_id"] for entry in entries} <= {1, 2, 3, 5, 8, 13}
    assert len(entries) == sum(len(item.score_D) for item in found)
    box = found[0].box_D4[0]
    first = entries[0]["bbox"]
    np.testing.assert_allclose(first, [box[0], box[1], box[2] - box[0], box[3] - box[1]], rtol=1e-5)
