"""`ensemble`: result files of several systems fused, scored, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.log import InputError
from detection_tsd.data.detection_data import Detections
from detection_tsd.ensemble import EnsembleConfig, ensemble
from detection_tsd.metrics.coco import evaluate_files
from detection_tsd.tests.launch import command
from detection_tsd.voting import box_voting

CATEGORIES = {1: "plus", 3: "T", 8: "ring"}
IDS = [7, 12, 40, 41]


def dataset(path: Path) -> Path:
    """Four images; the third has no object."""
    rng, annotations = np.random.default_rng(0), []
    for image in IDS[:2] + IDS[3:]:
        for category in CATEGORIES:
            x, y, width, height = (float(v) for v in rng.uniform(20, 60, 4))
            annotations.append({
                "id": len(annotations) + 1, "image_id": image, "category_id": category,
                "bbox": [x, y, width, height], "area": width * height, "iscrowd": 0,
            })  # fmt: skip
    content = {
        "images": [{"id": image, "width": 160, "height": 160} for image in IDS],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in CATEGORIES.items()],
    }
    path.write_text(json.dumps(content))
    return path


def results(path: Path, truth: Path, seed: int, spread: float = 6.0) -> Path:
    """Every object, badly placed, and as many boxes elsewhere."""
    rng = np.random.default_rng([seed, 5])
    entries = []
    for entry in json.loads(truth.read_text())["annotations"]:
        near = np.array(entry["bbox"]) + rng.normal(0, spread, 4)
        far = rng.uniform(10, 80, 4)
        for box, score in ((near, rng.uniform(0.4, 1)), (far, rng.uniform(0, 0.6))):
            entries.append({
                "image_id": entry["image_id"], "category_id": entry["category_id"],
                "bbox": box.clip(1).tolist(), "score": float(score),
            })  # fmt: skip
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The annotation file and three result files."""
    folder = tmp_path_factory.mktemp("files")
    truth = dataset(folder / "instances.json")
    return [truth, *(results(folder / f"{seed}.json", truth, seed) for seed in range(3))]


def go(members: list[Path], out: Path, **options: Any) -> tuple[dict[str, Any], list[Any]]:
    config = EnsembleConfig(out=str(out), predictions=[str(path) for path in members], **options)
    result = ensemble(config)
    assert json.loads((out / "ensemble.json").read_text()) == result
    fused: list[Any] = json.loads((out / "fused.json").read_text())
    assert len(fused) == result["detections"]["fused"]
    return result, fused


def found_of(path: Path, image: int) -> Detections:
    """Detections of one image as `voting` takes them."""
    entries = [e for e in json.loads(path.read_text()) if e["image_id"] == image]
    box_D4 = torch.tensor([e["bbox"] for e in entries], dtype=torch.float64).reshape(-1, 4)
    box_D4[:, 2:] += box_D4[:, :2]
    labels = [list(CATEGORIES).index(e["category_id"]) + 1 for e in entries]
    score_D = torch.tensor([e["score"] for e in entries], dtype=torch.float64)
    return Detections(box_D4, score_D, torch.tensor(labels, dtype=torch.int64))


@pytest.mark.parametrize("weights", [None, [2.0, 1.0, 0.5]])
def test_voting_is_that_of_the_function(
    weights: list[float] | None, files: list[Path], tmp_path: Path
) -> None:
    members = files[1:]
    result, fused = go(members, tmp_path, weights=weights, vote_iou=0.6, per_image=9)
    assert result["weights"] == (weights or [1.0] * 3)
    assert {entry["image_id"] for entry in fused} == {7, 12, 41}
    for image in (7, 12, 41):
        mine = [entry for entry in fused if entry["image_id"] == image]
        wanted = box_voting(
            [found_of(path, image) for path in members], weights, vote_iou=0.6, per_image=9
        )
        assert len(mine) == len(wanted.score_D) == 9
        box_D4 = np.array([entry["bbox"] for entry in mine])
        box_D4[:, 2:] += box_D4[:, :2]
        np.testing.assert_allclose(box_D4, wanted.box_D4, atol=1e-9)
        np.testing.assert_allclose([entry["score"] for entry in mine], wanted.score_D, atol=1e-12)
        labels = [list(CATEGORIES).index(entry["category_id"]) + 1 for entry in mine]
        assert labels == wanted.label_D.tolist()


def overlap(a: list[float], b: list[float]) -> float:
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    inter = max(width, 0) * max(height, 0)
    return inter / (a[2] * a[3] + b[2] * b[3] - inter)


def test_pooled_suppression_equals_a_loop(files: list[Path], tmp_path: Path) -> None:
    members, weights = files[1:3], [1.0, 4.0]
    _, fused = go(members, tmp_path, method="hard", weights=weights, iou=0.4)
    pool = [
        {**entry, "score": entry["score"] * weight / 4}
        for path, weight in zip(members, weights, strict=True)
        for entry in json.loads(path.read_text())
    ]
    left: list[dict[str, Any]] = []
    for entry in sorted(pool, key=lambda e: -e["score"]):
        rivals = [
            other
            for other in left
            if other["image_id"] == entry["image_id"]
            and other["category_id"] == entry["category_id"]
        ]
        if all(overlap(other["bbox"], entry["bbox"]) <= 0.4 for other in rivals):
            left.append(entry)
    assert len(fused) == len(left) < len(pool)

    def key(entry: dict[str, Any]) -> tuple[Any, ...]:
        return entry["image_id"], entry["category_id"], *entry["bbox"]

    for one, other in zip(sorted(fused, key=key), sorted(left, key=key), strict=True):
        assert key(one) == key(other)
        assert one["score"] == pytest.approx(other["score"], abs=1e-6)


@pytest.mark.parametrize("method", ["soft_linear", "soft_gaussian", "adjusted"])
def test_soft_suppressions_only_lower_scores(
    method: str, files: list[Path], tmp_path: Path
) -> None:
    result, fused = go(files[1:], tmp_path, method=method)
    assert result["settings"] == {"iou": 0.5, "sigma": 0.5, "min_score": 1e-3, "per_image": 100}
    before = {
        tuple(entry["bbox"]): entry["score"]
        for path in files[1:]
        for entry in json.loads(path.read_text())
    }
    lowered = [before[tuple(entry["bbox"])] - entry["score"] for entry in fused]
    assert min(lowered) > -1e-6
    assert max(lowered) > 0.01


def test_what_a_member_says_of_a_kept_box_stays(tmp_path: Path) -> None:
    entry = {
        "image_id": "a", "category_id": 4, "bbox": [0, 0, 5, 5], "score": 0.5,
        "segmentation": {"size": [9, 9], "counts": "abc"},
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps([entry]))
    _, fused = go([tmp_path / "a.json"], tmp_path / "out", method="hard")
    assert fused == [entry]
    _, fused = go([tmp_path / "a.json"], tmp_path / "out")
    assert [sorted(one) for one in fused] == [["bbox", "category_id", "image_id", "score"]]


def test_scores_stand_beside_those_of_the_members(files: list[Path], tmp_path: Path) -> None:
    result, _ = go(files[1:], tmp_path, annotations=str(files[0]))
    for path, scores in zip(files[1:], result["scores"]["members"], strict=True):
        wanted = evaluate_files(path, files[0])
        for name, value in wanted.summary.items():
            assert scores[name] == (None if np.isnan(value) else pytest.approx(value))
    fused = evaluate_files(tmp_path / "fused.json", files[0])
    assert result["scores"]["fused"]["AP"] == pytest.approx(fused.summary["AP"], abs=1e-9)
    # Three independent errors of a box: their mean is closer.
    assert (
        result["scores"]["fused"]["AP"] > max(s["AP"] for s in result["scores"]["members"]) + 0.02
    )
    assert result["scores"]["counts"]["images"] == 4
    alone, fused_alone = go(files[1:], tmp_path / "alone")
    assert alone["scores"] is None
    assert fused_alone == json.loads((tmp_path / "fused.json").read_text())


def test_members_may_be_empty_and_classes_texts(files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "none.json").write_text("[]")
    result, fused = go([files[1], tmp_path / "none.json"], tmp_path / "out", score="max")
    one, same = go([files[1]], tmp_path / "one", score="max")
    assert fused == same
    assert result["detections"]["members"] == [*one["detections"]["members"], 0]
    nothing, fused = go([tmp_path / "none.json"], tmp_path / "none", annotations=str(files[0]))
    assert fused == []
    assert nothing["scores"]["fused"]["AP"] == 0
    entry = {"image_id": "a/b.jpg", "bbox": [0, 0, 5, 5], "score": 0.5}
    entries = [{**entry, "category_id": category} for category in ("/m/01", 3)]
    (tmp_path / "text.json").write_text(json.dumps(entries))
    _, fused = go([tmp_path / "text.json"], tmp_path / "text")
    assert {e["category_id"] for e in fused} == {"/m/01", 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "mean"}, "method: must be one of voting, hard, .*adjusted: mean"),
        ({"score": "min"}, "score: must be one of mean, max: min"),
        ({"iou": 1.5}, r"iou: must be in \[0, 1\]: 1.5"),
        ({"vote_iou": float("nan")}, "vote_iou: must be in"),
        ({"sigma": 0.0}, "sigma: must be above 0: 0"),
        ({"per_image": 0}, "per_image: must be at least 1: 0"),
        ({"weights": [1.0]}, "weights: needs one number above 0 for each of 2 files"),
        ({"weights": [1.0, 0.0]}, "weights: needs one number above 0"),
        ({"weights": [1.0, float("inf")]}, "weights: needs one number above 0"),
        ({"annotations": "gone.json"}, r"gone\.json: cannot be read"),
    ],
)
def test_bad_options_are_named(
    options: dict[str, Any], message: str, files: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        go(files[1:3], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("", "is not JSON"),
        ("{}", "is no list of detections, but: dict"),
        ('["a"]', r"\[0\]: is no object: a"),
        ('[{"category_id": 1, "bbox": [0, 0, 1, 1], "score": 1}]', r"\[0\]: image_id is not"),
        ('[{"image_id": 7, "bbox": [0, 0, 1, 1], "score": 1}]', r"\[0\]: category_id is not"),
        ('[{"image_id": 7, "category_id": 1, "bbox": [0, 0, -1, 1], "score": 1}]', "negative side"),
        ('[{"image_id": 7, "category_id": 1, "bbox": [0, 0, 1, NaN], "score": 1}]', "four finite"),
        ('[{"image_id": 7, "category_id": 1, "bbox": [0, 0, 1, 1]}]', "score is no finite number"),
        (
            '[{"image_id": 7, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 83}]',
            r"\[0\]: score is not in \[0, 1\]: 83",
        ),
    ],
)
@pytest.mark.parametrize("with_annotations", [False, True])
def test_bad_members_are_named(
    text: str | None, message: str, with_annotations: bool, files: list[Path], tmp_path: Path
) -> None:
    path = tmp_path / "bad.json"
    if text is not None:
        path.write_text(text)
    options = {"annotations": str(files[0])} if with_annotations else {}
    with pytest.raises(InputError, match=message) as raised:
        go([files[1], path], tmp_path / "out", **options)
    assert str(path) in str(raised.value)


def test_an_image_that_the_annotations_do_not_know(files: list[Path], tmp_path: Path) -> None:
    entry = {"image_id": 99, "category_id": 1, "bbox": [0, 0, 5, 5], "score": 0.5}
    (tmp_path / "a.json").write_text(json.dumps([entry]))
    with pytest.raises(InputError, match="image_id is not in the annotation file: 99"):
        go([files[1], tmp_path / "a.json"], tmp_path / "out", annotations=str(files[0]))
    _, fused = go([files[1], tmp_path / "a.json"], tmp_path / "out")
    assert fused[-1]["image_id"] == 99


def test_the_command(files: list[Path], tmp_path: Path) -> None:
    words = (f"predictions=[{files[1]},{files[2]}]", f"out={tmp_path / 'out'}", "weights=[1,2]")
    done = command("detection_tsd.ensemble", *words, f"annotations={files[0]}")
    assert done.code == 0, done.err
    for name in ("AP75", "ensemble", "voting"):
        assert name in done.out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"fused.json", "ensemble.json"}
    done = command("detection_tsd.ensemble", f"out={tmp_path}")
    line = done.err.strip().splitlines()[-1]
    assert (done.code, line) == (2, "error: predictions: name at least one result file: []")
    done = command("detection_tsd.ensemble", *words, "per_picture=3")
    assert done.code == 2
    assert "per_picture" in done.err
