"""The Open Images metric against published values and a loop over images, classes and boxes."""

import csv
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.log import InputError
from detection_tsd.data.hierarchy import Hierarchy
from detection_tsd.data.oid_files import Boxes, Classes, ImageLabels
from detection_tsd.data.oid_predictions import Predictions
from detection_tsd.metrics import oid_matching
from detection_tsd.metrics.oid_matching import suppress
from detection_tsd.metrics.oid_truth import GroundTruth, read_ground_truth
from detection_tsd.metrics.openimages import OpenImagesScores, evaluate, evaluate_files
from detection_tsd.tests.openimages_loop import PARENTS, Rows, iou, lineage, reference

# Image, box xyxy, label, group: the fixture of OpenImagesChallengeEvaluatorTest in the TF Object
# Detection API, utils/object_detection_evaluation_test.py.
OBJECTS = [
    (0, (0, 0, 1, 1), 1, False),
    (0, (0, 0, 2, 2), 3, False),
    (0, (0, 0, 3, 3), 1, True),
    (1, (10, 10, 11, 11), 1, False),
    (1, (500, 500, 510, 510), 1, False),
    (1, (10, 10, 12, 12), 3, True),
    (2, (0, 0, 1, 1), 2, False),
]
VERIFIED = [(0, 1, True), (0, 2, False), (0, 3, True)]
FOUND = [
    (0, (10, 10, 11, 11), 2, 0.7),
    (0, (100, 100, 120, 120), 2, 0.8),
    (1, (10, 10, 11, 11), 1, 0.7),
    (1, (100, 100, 120, 120), 1, 0.8),
    (1, (100, 100, 220, 220), 2, 0.5),
    (1, (10, 10, 11, 11), 3, 0.9),
    (2, (0, 0, 1, 1), 2, 0.5),
]
IDS = ("/m/a", "/m/b", "/m/c")
SIDE = 1024  # a power of two: division changes no overlap
GOLDEN = [1 / 7, 1 / 3, 1 / 3]


def truth_of(
    objects: Rows,
    verified: Rows,
    images: int,
    classes: int = 3,
    hierarchy: Hierarchy | None = None,
) -> GroundTruth:
    boxes = Boxes(
        np.array([row[0] for row in objects], np.int32),
        np.array([row[2] for row in objects], np.int16),
        np.array([row[1] for row in objects], float).reshape(-1, 4),
        np.array([row[3] for row in objects], bool),
        {},
    )
    labels = ImageLabels(
        np.array([row[0] for row in verified], np.int32),
        np.array([row[1] for row in verified], np.int16),
        np.array([row[2] for row in verified], bool),
        {},
    )
    names = Classes(IDS if classes == 3 else [f"c{label}" for label in range(1, classes + 1)])
    return GroundTruth(tuple(f"img{row}" for row in range(images)), names, boxes, labels, hierarchy)


def predictions_of(found: Rows) -> Predictions:
    return Predictions(
        np.array([row[0] for row in found], np.int32),
        np.array([row[2] for row in found], np.int16),
        np.array([row[3] for row in found], float),
        np.array([row[1] for row in found], float).reshape(-1, 4),
        {},
    )


def golden(**options: Any) -> OpenImagesScores:
    truth = truth_of(OBJECTS, VERIFIED, 3)
    return evaluate(truth, predictions_of(FOUND), group_weight=0.5, **options)


def test_check_09_the_published_fixture_is_exact() -> None:
    scores = golden()
    np.testing.assert_allclose(scores.ap_K, GOLDEN, rtol=0, atol=1e-15)
    assert scores.mean_ap == pytest.approx(0.2698412698412698, abs=1e-15)
    np.testing.assert_allclose(scores.objects_K, [3.5, 1, 1.5])
    np.testing.assert_allclose(scores.recall_K, [1 / 3.5, 1, 0.5 / 1.5])
    assert scores.counts["detections of unverified classes"] == 1
    assert scores.counts["detections absorbed"] == scores.counts["groups found"] == 1


def test_check_09_the_evaluator_of_the_authors_is_repeated() -> None:
    scores = golden(compat="tsd_repo")
    np.testing.assert_allclose(scores.ap_K, [0.125, 1.0, 0.25], rtol=0, atol=1e-15)
    assert scores.mean_ap == pytest.approx(0.4583333333333333, abs=1e-15)


def test_the_second_fixture_of_the_authority() -> None:
    """OpenImagesV2EvaluationTest: groups of weight 0; here all classes are verified."""
    objects = [
        (0, (0, 0, 1, 1), 1, False),
        (0, (0, 0, 2, 2), 3, False),
        (0, (0, 0, 3, 3), 1, False),
        (1, (10, 10, 11, 11), 1, False),
        (1, (500, 500, 510, 510), 1, True),
        (1, (10, 10, 12, 12), 3, False),
        (2, (0, 0, 1, 1), 2, False),
    ]
    found = [
        (1, (10, 10, 11, 11), 1, 0.7),
        (1, (100, 100, 120, 120), 1, 0.8),
        (1, (100, 100, 220, 220), 3, 0.9),
    ]
    scores = evaluate(truth_of(objects, [], 3), predictions_of(found), group_weight=0.0)
    np.testing.assert_allclose(scores.ap_K, [1 / 6, 0, 0], atol=1e-15)


def write_rows(path: Path, rows: Rows) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def golden_files(folder: Path) -> dict[str, Path]:
    boxes: list[tuple[Any, ...]] = [
        ("YMax", "ImageID", "IsGroupOf", "XMax", "Extra", "LabelName", "XMin", "YMin")
    ]
    for image, box, label, group in OBJECTS:
        x1, y1, x2, y2 = (side / SIDE for side in box)
        boxes.append((y2, f"img{image}", int(group), x2, "any", IDS[label - 1], x1, y1))
    labels: list[tuple[Any, ...]] = [("Confidence", "LabelName", "Source", "ImageID")]
    labels += [
        (int(s), IDS[label - 1], "verification", f"img{image}") for image, label, s in VERIFIED
    ]
    found: list[tuple[Any, ...]] = [
        ("ImageID", "LabelName", "Score", "XMin", "XMax", "YMin", "YMax")
    ]
    for image, box, label, score in FOUND:
        x1, y1, x2, y2 = (side / SIDE for side in box)
        found.append((f"img{image}", IDS[label - 1], score, x1, x2, y1, y2))
    below = [{"LabelName": name} for name in IDS]
    (folder / "h.json").write_text(json.dumps({"LabelName": "/m/root", "Subcategory": below}))
    return {
        "annotations": write_rows(folder / "boxes.csv", boxes),
        "image_labels": write_rows(folder / "labels.csv", labels),
        "predictions": write_rows(folder / "dets.csv", found),
        "classes": write_rows(folder / "c.csv", list(zip(IDS, "abc", strict=True))),
        "hierarchy": folder / "h.json",
    }


def test_check_09_the_fixture_from_files(tmp_path: Path) -> None:
    report = evaluate_files(**golden_files(tmp_path), group_weight=0.5)
    assert report["scores"]["mAP"] == pytest.approx(0.2698412698412698, abs=1e-15)
    assert list(report["scores_by_class"]) == list(IDS)
    assert list(report["scores_by_class"].values()) == pytest.approx(GOLDEN, abs=1e-15)
    assert report["counts"]["detections of unverified classes"] == 1
    report = evaluate_files(**golden_files(tmp_path), group_weight=0.5, compat="tsd_repo")
    assert report["scores"]["mAP"] == pytest.approx(0.4583333333333333, abs=1e-15)


def test_the_fixture_in_the_formats_of_the_authors(tmp_path: Path) -> None:
    files = golden_files(tmp_path)
    lines = []
    for image in range(3):
        mine = [row for row in OBJECTS if row[0] == image]
        lines += [f"validation/img{image}.jpg", "0 0", str(len(mine))]
        for _, box, label, group in mine:
            lines.append(" ".join(map(str, (label, *(side / SIDE for side in box), int(group)))))
    files["annotations"] = tmp_path / "boxes.txt"
    files["annotations"].write_text("\n".join(lines) + "\n")
    files["predictions"] = tmp_path / "dets.txt"
    files["predictions"].write_text(
        "".join(
            f"img{image} {' '.join(str(side / SIDE) for side in box)} {score} {label}\n"
            for image, box, label, score in FOUND
        )
    )
    tree = tmp_path / "tree.npy"
    np.save(tree, np.diag([0, 1, 1, 1]))
    report = evaluate_files(**files | {"hierarchy": tree}, group_weight=0.5)
    assert report["scores"]["mAP"] == pytest.approx(0.2698412698412698, abs=1e-15)


def diamond() -> Hierarchy:
    above_KK = Hierarchy.flat(6).above_KK
    for label in PARENTS:
        for other in lineage(label):
            above_KK[label, other] = True
    return Hierarchy(above_KK)


def random_problem(seed: int) -> tuple[Rows, Rows, Rows, int]:
    """Boxes on a coarse grid and scores with one decimal: overlaps and scores with many ties."""
    rng = np.random.default_rng(seed)
    images = int(rng.integers(1, 8))

    def box(empty: float) -> tuple[float, ...]:
        x, y = np.sort(rng.integers(0, 7, (2, 2)), axis=1)
        if rng.random() > empty:
            x[1], y[1] = max(x[1], x[0] + 1), max(y[1], y[0] + 1)
        return tuple(float(side) / 8 for side in (x[0], y[0], x[1], y[1]))

    objects = [
        (int(rng.integers(images)), box(0.05), int(rng.integers(1, 7)), bool(rng.random() < 0.3))
        for _ in range(int(rng.integers(1, 30)))
    ]
    verified = [
        (int(rng.integers(images)), int(rng.integers(1, 7)), bool(rng.random() < 0.5))
        for _ in range(int(rng.integers(0, 8)))
    ]
    found = []
    for _ in range(int(rng.integers(0, 60))):
        image, place, label, _ = objects[int(rng.integers(len(objects)))]
        near = rng.random() < 0.5
        row = (image, place, label) if near else (
            int(rng.integers(images)), box(0.1), int(rng.integers(1, 7))
        )  # fmt: skip
        found.append((*row, float(rng.integers(0, 11)) / 10))
    return objects, verified, found, images


MODES = list(itertools.product([0.0, 0.5, 1.0], [False, True, "nms"], [None, "tsd_repo"]))


@pytest.mark.parametrize(("weight", "expand", "compat"), MODES)
def test_check_09_random_problems_equal_the_loop(weight: float, expand: Any, compat: Any) -> None:
    compared = 0
    for seed in range(25):
        objects, verified, found, images = random_problem(seed)
        truth = truth_of(objects, verified, images, 6, diamond())
        options = {"group_weight": weight, "expand_predictions": expand, "compat": compat}
        try:
            scores = evaluate(truth, predictions_of(found), **options)
        except InputError as error:  # by chance all copies for ancestors were there
            assert error.where == "annotations"  # noqa: PT017
            continue
        wanted, dropped = reference(objects, verified, found, images, weight, expand, compat)
        np.testing.assert_allclose(scores.ap_K, wanted, rtol=0, atol=1e-12)
        assert scores.counts["detections of unverified classes"] == dropped
        compared += 1
    assert compared >= 20


def test_pairs_in_small_parts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    objects, verified, found, images = random_problem(3)
    truth = truth_of(objects, verified, images, 6, diamond())
    whole = evaluate(truth, predictions_of(found), expand_predictions=True)
    monkeypatch.setattr(oid_matching, "PAIRS", 3)
    parts = evaluate(truth, predictions_of(found), expand_predictions=True)
    np.testing.assert_array_equal(whole.ap_K, parts.ap_K)


def test_boxes_go_up_and_absent_labels_go_down() -> None:
    """A false positive counts below a class that is verified absent, and not above it."""
    box = (0.0, 0.0, 0.5, 0.5)
    objects = [(0, box, 4, False), (1, box, 5, False)]
    truth = truth_of(objects, [(1, 3, False)], 2, 6, diamond())
    scores = evaluate(truth, predictions_of([(0, box, 4, 0.5), (1, box, 4, 0.9), (1, box, 3, 0.9)]))
    np.testing.assert_array_equal(scores.objects_K, [2, 2, 1, 1, 1, 0])
    np.testing.assert_allclose(scores.ap_K[3], 0.5)  # 4 lies below 3: a wrong one comes first
    assert scores.counts["detections of unverified classes"] == 0
    truth = truth_of(objects, [(1, 4, False)], 2, 6, diamond())
    scores = evaluate(truth, predictions_of([(0, box, 3, 0.5), (1, box, 3, 0.9)]))
    np.testing.assert_allclose(scores.ap_K[2], 1.0)
    assert scores.counts["detections of unverified classes"] == 1
    truth = truth_of(objects, [(0, 4, True)], 2, 6, diamond())
    up = evaluate(truth, predictions_of([(0, (0, 0, 0.1, 0.1), 3, 0.9), (0, box, 3, 0.5)]))
    np.testing.assert_allclose(up.ap_K[2], 0.5)  # present labels hold for the ancestors


def test_groups_are_matched_by_the_share_of_the_detection() -> None:
    group = (0.0, 0.0, 0.8, 0.8)
    truth = truth_of([(0, group, 1, True)], [], 1)
    inside = [(0, (0.1, 0.1, 0.2, 0.2), 1, 0.4), (0, (0.5, 0.5, 0.6, 0.6), 1, 0.6)]
    scores = evaluate(truth, predictions_of(inside))
    assert scores.ap_K[0] == 1.0  # two small ones, one entry: no false positive, no second find
    assert scores.counts["detections absorbed"] == 2
    outside = (0, (0.7, 0.7, 1.0, 1.0), 1, 0.5)  # a ninth of it lies in the group
    between = evaluate(truth, predictions_of([*inside, outside]))
    assert between.ap_K[0] == 1.0  # the group has the score 0.6, the best of those absorbed


def test_expanding_twice_is_refused() -> None:
    box = (0.0, 0.0, 0.5, 0.5)
    objects = [(0, box, label, False) for label in (1, 2, 5)]
    truth = truth_of(objects, [], 1, 6, diamond())
    found = predictions_of([(0, box, 2, 0.5)])
    with pytest.raises(InputError, match="expand_annotations=false"):
        evaluate(truth, found)
    scores = evaluate(truth, found, expand_annotations=False)
    np.testing.assert_array_equal(scores.objects_K, [1, 1, 0, 0, 1, 0])


def test_no_detection_at_all() -> None:
    scores = evaluate(truth_of(OBJECTS, VERIFIED, 3), predictions_of([]))
    assert scores.mean_ap == 0
    assert scores.report()["scores"] == {"mAP": 0.0, "mean_recall": 0.0}


def test_no_object_of_any_weight() -> None:
    scores = evaluate(truth_of([OBJECTS[2]], [], 1), predictions_of(FOUND[:1]), group_weight=0)
    assert np.isnan(scores.mean_ap)
    assert scores.report()["scores_by_class"] == {}


def test_equal_scores_rank_by_the_names_of_the_images(tmp_path: Path) -> None:
    """The order of the rows of the files must not matter for ties between images."""
    values = []
    for order in (1, -1):
        files = golden_files(tmp_path)
        rows = list(csv.reader(files["predictions"].open()))
        rows = [rows[0], *[[*row[:2], "0.5", *row[3:]] for row in rows[1:]][::order]]
        files["predictions"] = write_rows(tmp_path / "ties.csv", [tuple(row) for row in rows])
        boxes = list(csv.reader(files["annotations"].open()))
        files["annotations"] = write_rows(
            tmp_path / "turned.csv", [tuple(boxes[0]), *map(tuple, boxes[1:][::order])]
        )
        values.append(evaluate_files(**files)["scores_by_class"]["/m/b"])
    assert values[0] == values[1] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expand_predictions": "all"}, "accepted: true, false, nms"),
        ({"expand_predictions": True}, "needs a hierarchy"),
        ({"compat": "mmdet"}, "accepted: null, tsd_repo"),
        ({"iou": 0.0}, "iou"),
        ({"group_weight": -1.0}, "group_weight"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(truth_of(OBJECTS, VERIFIED, 3), predictions_of(FOUND), **options)


def test_bad_columns() -> None:
    truth, found = truth_of(OBJECTS, VERIFIED, 3), predictions_of(FOUND)
    bad = found.score_D.copy()
    bad[0] = np.nan
    for columns in (
        found._replace(score_D=bad),
        found._replace(label_D=found.label_D + 3),
        found._replace(image_D=found.image_D - 1),
        found._replace(score_D=found.score_D[:2]),
    ):
        with pytest.raises(ValueError, match="predictions"):
            evaluate(truth, columns)


def test_suppression_keeps_what_a_loop_keeps() -> None:
    rng = np.random.default_rng(1)
    key_D = np.sort(rng.integers(0, 5, 200))
    low_D2 = rng.integers(0, 6, (200, 2)) / 8
    box_D4 = np.concatenate([low_D2, low_D2 + rng.integers(1, 4, (200, 2)) / 8], axis=1)
    stays_D = suppress(key_D, box_D4, 0.5)
    for key in range(5):
        kept: list[np.ndarray] = []
        for row in np.flatnonzero(key_D == key):
            alone = all(iou(box_D4[row], other) <= 0.5 for other in kept)
            assert stays_D[row] == alone
            kept += [box_D4[row]] if alone else []


def test_ground_truth_without_image_labels(tmp_path: Path) -> None:
    files = golden_files(tmp_path)
    truth = read_ground_truth(files["annotations"], files["classes"])
    assert truth.image_ids == ("img0", "img1", "img2")
    found = predictions_of(FOUND)
    scores = evaluate(truth, found._replace(box_D4=found.box_D4 / SIDE), group_weight=0.5)
    assert scores.ap_K[1] == 1.0  # nothing says that class 2 is absent in the first image
