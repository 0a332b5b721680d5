"""COCO scores against a plain restatement of the matching rules, and bad files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.log import InputError
from detection_tsd.metrics.coco import SUMMARY, THRESHOLDS, evaluate, evaluate_files

AREAS = ((0, 1e10), (0, 32**2), (32**2, 96**2), (96**2, 1e10))


def overlap(found: list[float], truth: list[float], crowd: bool) -> float:
    width = min(found[0] + found[2], truth[0] + truth[2]) - max(found[0], truth[0])
    height = min(found[1] + found[3], truth[1] + truth[3]) - max(found[1], truth[1])
    if width <= 0 or height <= 0:
        return 0.0
    own, other = found[2] * found[3], truth[2] * truth[3]
    return width * height / (own if crowd else own + other - width * height)


def match(
    found: list[dict[str, Any]], truth: list[dict[str, Any]], threshold: float, area: Any
) -> tuple[list[bool], list[bool], int]:
    """Of one image and class: hit and ignored of each sorted detection; objects that count."""
    ignored = [t["iscrowd"] or not area[0] <= t["area"] <= area[1] for t in truth]
    order = sorted(range(len(truth)), key=lambda g: ignored[g])
    used: set[int] = set()
    hit, skip = [], []
    for detection in found:
        best, value = None, min(threshold, 1 - 1e-10)
        for g in order:
            if g in used and not truth[g]["iscrowd"]:
                continue
            if best is not None and not ignored[best] and ignored[g]:
                break
            shared = overlap(detection["bbox"], truth[g]["bbox"], truth[g]["iscrowd"])
            if shared >= value:
                best, value = g, shared
        own = detection["bbox"][2] * detection["bbox"][3]
        if best is None:
            hit.append(False)
            skip.append(not area[0] <= own <= area[1])
        else:
            used.add(best)
            hit.append(True)
            skip.append(bool(ignored[best]))
    return hit, skip, len(truth) - sum(map(bool, ignored))


def average_precision(
    parts: list[tuple[list[float], list[bool], list[bool], int]],
) -> tuple[float, float]:
    """AP over 101 recalls, and the recall reached, from the parts of all images."""
    objects = sum(part[3] for part in parts)
    if objects == 0:
        return np.nan, np.nan
    rows = [
        (score, hit)
        for scores, hits, skips, _ in parts
        for score, hit, skip in zip(scores, hits, skips, strict=True)
        if not skip
    ]
    rows.sort(key=lambda row: -row[0])  # stable: images in their order
    recall, precision, right = [], [], 0
    for number, (_, hit) in enumerate(rows, start=1):
        right += hit
        recall.append(right / objects)
        precision.append(right / (number + np.spacing(1)))
    total = 0.0
    for wanted in np.linspace(0, 1, 101):
        reached = [p for r, p in zip(recall, precision, strict=True) if r >= wanted]
        total += max(reached, default=0.0)
    return total / 101, recall[-1] if recall else 0.0


def reference(found: list[dict[str, Any]], dataset: dict[str, Any]) -> dict[str, float]:
    ap: dict[tuple[int, int, int], list[float]] = {}
    ar: dict[tuple[int, int, int], list[float]] = {}
    for t, threshold in enumerate(THRESHOLDS):
        for a, area in enumerate(AREAS):
            for limit in (1, 10, 100):
                for category in dataset["categories"]:
                    parts = []
                    for image in sorted(dataset["images"], key=lambda entry: entry["id"]):
                        key = (image["id"], category["id"])
                        here = [d for d in found if (d["image_id"], d["category_id"]) == key]
                        here = sorted(here, key=lambda d: -d["score"])[:limit]
                        truth = [
                            g for g in dataset["annotations"]
                            if (g["image_id"], g["category_id"]) == key
                        ]  # fmt: skip
                        parts.append(
                            ([d["score"] for d in here], *match(here, truth, threshold, area))
                        )
                    value, recall = average_precision(parts)
                    ap.setdefault((t, a, limit), []).append(value)
                    ar.setdefault((t, a, limit), []).append(recall)

    def mean(table: Any, a: int, limit: int, rows: Any = range(10)) -> float:
        values = np.concatenate([table[t, a, limit] for t in rows])
        values = values[~np.isnan(values)]
        return float(values.mean()) if len(values) else np.nan

    numbers = [mean(ap, 0, 100), mean(ap, 0, 100, [0]), mean(ap, 0, 100, [5])]
    numbers += [mean(ap, a, 100) for a in (1, 2, 3)]
    numbers += [mean(ar, 0, limit) for limit in (1, 10, 100)]
    numbers += [mean(ar, a, 100) for a in (1, 2, 3)]
    by_threshold = {f"AP{round(100 * t)}": mean(ap, 0, 100, [i]) for i, t in enumerate(THRESHOLDS)}
    return dict(zip(SUMMARY, numbers, strict=True)) | by_threshold


def problem(seed: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A few images with crowds, boxes of all sizes, equal scores and equal boxes."""
    rng = np.random.default_rng(seed)
    images = [{"id": int(i)} for i in rng.permutation(9)[: rng.integers(1, 4)] + 3]
    categories = [{"id": i, "name": f"class {i}"} for i in (1, 3, 90)[: rng.integers(1, 4)]]
    annotations, found = [], []
    for image in images:
        for _ in range(rng.integers(0, 5)):
            x, y, w, h = (float(v) for v in rng.choice([0, 8, 20, 50, 120], 4) + 4)
            annotations.append({
                "id": len(annotations) + 1, "image_id": image["id"], "bbox": [x, y, w, h],
                "category_id": int(rng.choice([c["id"] for c in categories])),
                "area": w * h * float(rng.choice([0.5, 1.0])), "iscrowd": int(rng.random() < 0.2),
            })  # fmt: skip
    for image in images:
        for _ in range(rng.integers(0, 12)):
            box = [float(v) for v in rng.choice([0, 8, 20, 50, 120], 4) + 4]
            if annotations and rng.random() < 0.7:
                near = annotations[rng.integers(len(annotations))]["bbox"]
                box = [v + float(rng.choice([0, 0, 1, 3])) for v in near]
            found.append({
                "image_id": image["id"], "bbox": box, "score": float(rng.choice([0.1, 0.5, 0.9])),
                "category_id": int(rng.choice([c["id"] for c in categories])),
            })  # fmt: skip
    return found, {"images": images, "annotations": annotations, "categories": categories}


@pytest.mark.parametrize("block", range(6))
def test_check_09_coco_numbers_on_300_random_problems(block: int, tmp_path: Path) -> None:
    checked = 0
    for seed in range(50 * block, 50 * block + 50):
        found, dataset = problem(seed)
        (tmp_path / "found.json").write_text(json.dumps(found))
        (tmp_path / "truth.json").write_text(json.dumps(dataset))
        scores = evaluate_files(tmp_path / "found.json", tmp_path / "truth.json")
        expected = reference(found, dataset)
        got = scores.summary | scores.by_threshold
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            assert got[name] == pytest.approx(value, abs=1e-9, nan_ok=True), (seed, name)
        checked += not np.isnan(expected["AP"])
        crowds = sum(bool(entry["iscrowd"]) for entry in dataset["annotations"])
        assert scores.counts["ignored"] == crowds
    assert checked > 30


def test_perfect_boxes_and_no_boxes() -> None:
    _, dataset = problem(4)
    counted = [entry for entry in dataset["annotations"] if not entry["iscrowd"]]
    assert counted
    keys = ("image_id", "category_id", "bbox")
    perfect = [{key: entry[key] for key in keys} | {"score": 1.0} for entry in counted]
    assert evaluate(perfect, dataset).summary["AP"] == pytest.approx(1.0)
    assert evaluate([], dataset).summary["AP"] == 0.0
    assert set(evaluate([], dataset).by_class) <= {"class 1", "class 3", "class 90"}


def test_what_was_given_is_not_written_into() -> None:
    found, dataset = problem(8)
    before = json.dumps([found, dataset])
    evaluate(found, dataset)
    assert json.dumps([found, dataset]) == before


GOOD = {"image_id": 1, "category_id": 2, "bbox": [0, 0, 5, 5], "score": 0.5}
TRUTH = {
    "images": [{"id": 1}], "categories": [{"id": 2, "name": "cat"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 2, "bbox": [0, 0, 5, 5], "area": 25, "iscrowd": 0}
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 7}, r"found.json \[1\]: image_id is not in the annotation file: 7"),
        ({"category_id": 1}, r"found.json \[1\]: category_id is not in the annotation file: 1"),
        ({"category_id": [2]}, r"category_id is not in the annotation file: \[2\]"),
        ({"score": float("nan")}, r"found.json \[1\]: score is no finite number: nan"),
        ({"score": None}, "score is no finite number: None"),
        ({"bbox": [0, 0, 5]}, r"bbox is not four finite numbers: \[0, 0, 5\]"),
        ({"bbox": [0, 0, float("inf"), 5]}, "bbox is not four finite numbers"),
        ({"bbox": [0, 0, -1, 5]}, "bbox has a negative side"),
    ],
)
def test_a_wrong_prediction_is_named(change: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "found.json").write_text(json.dumps([GOOD, GOOD | change]))
    (tmp_path / "truth.json").write_text(json.dumps(TRUTH))
    with pytest.raises(InputError, match=message):
        evaluate_files(tmp_path / "found.json", tmp_path / "truth.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "truth.json: is not JSON"),
        ("[]", "truth.json: is no COCO annotation file, but: list"),
        ('{"images": [], "annotations": []}', "truth.json: has no list: categories"),
        (json.dumps(TRUTH | {"images": [{"id": 1}, {"id": 1}]}), r"images\[1\]: id comes twice: 1"),
        (json.dumps(TRUTH | {"categories": [{"id": 2}]}), r"categories\[0\]: has no: name"),
        (
            json.dumps(TRUTH | {"annotations": [TRUTH["annotations"][0] | {"area": None}]}),  # type: ignore[operator]
            r"annotations\[0\]: area is no number: None",
        ),
    ],
)
def test_a_wrong_annotation_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "found.json").write_text("[]")
    (tmp_path / "truth.json").write_text(text)
    with pytest.raises(InputError, match=message):
        evaluate_files(tmp_path / "found.json", tmp_path / "truth.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone.json: cannot be read: No such file"):
        evaluate_files(tmp_path / "gone.json", tmp_path / "gone.json")
