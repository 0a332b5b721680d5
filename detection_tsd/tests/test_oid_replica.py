"""The small copy of Open Images: both formats say the same, and the oddities are there."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from common.log import InputError
from detection_tsd.data.hierarchy import read_hierarchy, read_label_tree
from detection_tsd.data.oid_replica import CLASS_IDS, NAMES, make_oid_replica
from detection_tsd.data.openimages import load_openimages
from detection_tsd.data.openimages_text import load_text
from detection_tsd.metrics.oid_truth import read_ground_truth
from detection_tsd.metrics.openimages import evaluate_files


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_oid_replica(tmp_path_factory.mktemp("oid") / "set", 12, seed=1, val=10)


@pytest.mark.parametrize("split", ["train", "val"])
def test_both_formats_hold_the_same_objects(replica: Path, split: str) -> None:
    official, text = load_openimages(replica, split), load_text(replica, split)
    assert official.classes == text.classes == NAMES
    assert official.class_ids == text.class_ids == CLASS_IDS
    assert len(text) == len(official) + 2  # two have no box; only the text lists them
    place = {identifier: row for row, identifier in enumerate(text.image_ids)}
    for row, identifier in enumerate(official.image_ids):
        one, other = official.objects.read(row), text.objects.read(place[identifier])
        np.testing.assert_array_equal(one.box_G4, other.box_G4)
        np.testing.assert_array_equal(one.label_G, other.label_G)
        height, width = official.images.size(row)
        assert (one.box_G4[:, 2:] <= [width, height]).all()
    assert official.images.read(0).shape[:2] == official.images.size(0)


def test_the_layouts_of_the_folders(replica: Path) -> None:
    train = load_openimages(replica)
    assert f"train_{train.image_ids[0][0]}/{train.image_ids[0]}.jpg" in train.images.name(0)
    assert "validation/" in load_openimages(replica, "validation").images.name(0)


def test_the_oddities_are_there(replica: Path) -> None:
    folder = replica / "challenge2019"
    stem = folder / "challenge-2019-validation-detection"
    truth = read_ground_truth(
        f"{stem}-bbox.csv",
        folder / "challenge-2019-classes-description-500.csv",
        f"{stem}-human-imagelabels.csv",
        folder / "challenge-2019-label500-hierarchy.json",
    )
    assert len(truth.image_ids) == 9  # the tenth is in no file
    assert truth.boxes.group_G.sum() == 1
    boxed, verified = set(truth.boxes.image_G.tolist()), set(truth.image_labels.image_V.tolist())
    assert len(boxed - verified) == 1
    assert len(verified - boxed) == 1
    assert not truth.image_labels.present_V.all()


def test_the_hierarchy_has_three_levels_and_two_parents(replica: Path) -> None:
    folder = replica / "challenge2019"
    found = read_hierarchy(folder / "challenge-2019-label500-hierarchy.json", CLASS_IDS)
    tomato = NAMES.index("Tomato") + 1
    assert [NAMES[label - 1] for label in found.ancestors(tomato)] == ["Food", "Fruit", "Vegetable"]
    matrix = read_label_tree(folder / "class_label_tree.np", len(NAMES))
    assert np.array_equal(matrix.above_KK, found.above_KK)


def test_its_detections_can_be_scored_in_both_formats(replica: Path) -> None:
    folder = replica / "challenge2019"
    stem = f"{folder}/challenge-2019-validation-detection"
    detections, labels = folder / "detections-validation.csv", f"{stem}-human-imagelabels.csv"
    official = evaluate_files(
        detections, f"{stem}-bbox.csv", folder / "challenge-2019-classes-description-500.csv",
        labels, folder / "challenge-2019-label500-hierarchy.json", expand_predictions=True,
    )  # fmt: skip
    text = evaluate_files(
        detections, f"{stem}-bbox.txt", folder / "cls-label-description.csv", labels,
        folder / "class_label_tree.np", expand_predictions=True,
    )  # fmt: skip
    assert official["scores"] == text["scores"]
    assert official["scores_by_class"] == text["scores_by_class"]
    assert 0.2 < official["scores"]["mAP"] < 1
    assert text["counts"]["images"] == official["counts"]["images"] + 1


def digest(root: Path) -> str:
    content = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.is_file() and not path.name.startswith("sizes-"):
            content.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return content.hexdigest()


def test_the_same_seed_gives_the_same_files(tmp_path: Path) -> None:
    once = digest(make_oid_replica(tmp_path / "a", 4, seed=5))
    assert digest(make_oid_replica(tmp_path / "b", 4, seed=5)) == once
    assert digest(make_oid_replica(tmp_path / "c", 4, seed=6)) != once


def test_a_split_that_is_too_small_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="train: must be at least 4 images: 3"):
        make_oid_replica(tmp_path, 3)
