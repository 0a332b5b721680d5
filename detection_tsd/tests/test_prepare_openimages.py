"""Checking a copy of Open Images."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from common.log import InputError
from detection_tsd.data.oid_replica import CLASS_IDS, NAMES, draw_scene, make_oid_replica
from detection_tsd.tests.launch import command, config
from detection_tsd.tools.prepare_openimages import prepare

TRAIN, VAL = 6, 5


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_oid_replica(tmp_path / "set", TRAIN, seed=2, val=VAL)


def run(root: Path, *words: str) -> dict[str, Any]:
    out = f"out={root.parent / 'out'}"
    return prepare(config("prepare_openimages", f"data.root={root}", out, *words))  # type: ignore[arg-type]


def objects(split: int, count: int) -> list[int]:
    """Objects of each class, from the scenes themselves."""
    found = [0] * len(NAMES)
    for number in range(count):
        for label in draw_scene(2, split, number).label_G:
            found[int(label) - 1] += 1
    return found


@pytest.mark.parametrize("kind", ["openimages", "openimages_text"])
def test_counts_classes_and_sizes(root: Path, kind: str) -> None:
    result = run(root, f"data={kind}")
    rows = list(csv.reader((root.parent / "out" / "classes.csv").open()))
    assert rows[0] == ["label", "identifier", "name", "kind of", "train", "val"]
    assert [(int(row[0]), row[1], row[2]) for row in rows[1:]] == [
        (label, *names) for label, names in enumerate(zip(CLASS_IDS, NAMES, strict=True), 1)
    ]
    assert [int(row[4]) for row in rows[1:]] == objects(0, TRAIN)
    assert [int(row[5]) for row in rows[1:]] == objects(1, VAL)
    kinds = {row[2]: set(filter(None, row[3].split("; "))) for row in rows[1:]}
    if kind == "openimages":
        assert kinds["Tomato"] == {"Food", "Fruit", "Vegetable"}
    assert kinds["Food"] == set()
    summary = json.loads((root.parent / "out" / "summary.json").read_text())
    assert summary["train"]["objects"] == sum(objects(0, TRAIN)) == result["train"]["objects"]
    # images that no file but the text names are not in the CSV files
    assert summary["train"]["images"] == (TRAIN if kind == "openimages_text" else TRAIN - 2)
    assert summary["train"]["classes without objects"] == objects(0, TRAIN).count(0)
    assert min(summary["val"]["smallest picture (height, width)"]) >= 112
    suffix = "-text" if kind == "openimages_text" else ""
    for split in ("train", "validation"):
        assert (root / f"sizes-{split}{suffix}.npz").is_file()


def test_the_hierarchy_of_the_text_format(root: Path) -> None:
    tree = "data.train.label_tree=challenge2019/class_label_tree.np"
    rows = run(root, "data=openimages_text", tree)["rows"]
    assert set(rows[NAMES.index("Tomato")][3].split("; ")) == {"Food", "Fruit", "Vegetable"}


def test_lists_of_both_formats_are_compared(root: Path) -> None:
    other = root / "challenge2019" / "cls-label-description.csv"
    run(root, f"compare={other}")
    lines = other.read_text().splitlines()
    first, second = (line.rsplit(",", 1) for line in lines[:2])
    swapped = [f"{first[0]},{second[1]}", f"{second[0]},{first[1]}", *lines[2:]]
    other.write_text("\n".join(swapped) + "\n")
    with pytest.raises(InputError, match=f"label 1 is {CLASS_IDS[0]} Food elsewhere, here: "):
        run(root, f"compare={other}")
    other.write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(InputError, match="another number of classes than 8: 7"):
        run(root, f"compare={other}")


def test_a_missing_picture_and_bad_settings(root: Path) -> None:
    with pytest.raises(InputError, match="names no split"):
        run(root, "splits=[]")
    with pytest.raises(InputError, match="data has no set of this name"):
        run(root, "splits=[test]")
    with pytest.raises(InputError, match="show: must not be below 0"):
        run(root, "show=-1")
    picture = sorted((root / "OpenImages" / "validation").glob("*.jpg"))[-1]
    for path in (root / "OpenImages" / "validation").glob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"\.jpg"):
        run(root)
    assert picture.exists()


def test_the_command_prints_the_mapping(root: Path) -> None:
    out = root.parent / "out"
    words = (f"data.root={root}", f"out={out}", "show=3")
    ended = command("detection_tsd.tools.prepare_openimages", *words)
    assert ended.code == 0, ended.err
    assert "Food" in ended.out
    assert "5 more classes in classes.csv" in ended.out
    ended = command("detection_tsd.tools.prepare_openimages", "data.root=nowhere", f"out={out}")
    assert ended.code == 2
    assert "nowhere" in ended.err
