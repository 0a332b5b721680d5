"""The relation between classes: from the official JSON file and from the matrix of Sense-X/TSD."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.log import InputError
from detection_tsd.data.hierarchy import Hierarchy, read_hierarchy, read_label_tree

IDS = ("food", "fruit", "vegetable", "tomato", "apple", "car")  # labels 1..6


def node(name: str, *below: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"LabelName": name, "Subcategory": list(below), **more}


TREE = node(
    "root",
    node(
        "food",
        node("fruit", node("tomato"), {"LabelName": "apple"}),
        node("vegetable", node("tomato")),
    ),
    node("car", Part=[node("apple", node("food"))]),
)


def write(folder: Path, tree: Any) -> Path:
    path = folder / "h.json"
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return path


def test_ancestors_and_descendants(tmp_path: Path) -> None:
    found = read_hierarchy(write(tmp_path, TREE), IDS)
    assert found.num_classes == 6
    assert found.ancestors(4) == (1, 2, 3)  # both parents of a tomato
    assert found.ancestors(5) == (1, 2)  # being a part of a car makes nothing a car
    assert found.ancestors(6) == found.ancestors(1) == ()
    assert found.descendants(1) == (2, 3, 4, 5)
    assert found.descendants(3) == (4,)


def test_up_and_down_repeat_rows(tmp_path: Path) -> None:
    found = read_hierarchy(write(tmp_path, TREE), IDS)
    row_E, label_E = found.up(np.array([6, 4, 1, 5]))
    assert row_E.tolist() == [0, 1, 1, 1, 1, 2, 3, 3, 3]
    assert label_E.tolist() == [6, 1, 2, 3, 4, 1, 1, 2, 5]
    row_E, label_E = found.down(np.array([2, 6]))
    assert (row_E.tolist(), label_E.tolist()) == ([0, 0, 0, 1], [2, 4, 5, 6])
    row_E, label_E = found.up(np.zeros(0, np.int16))
    assert row_E.size == label_E.size == 0


def test_flat_relates_nothing() -> None:
    row_E, label_E = Hierarchy.flat(3).up(np.array([3, 1]))
    assert (row_E.tolist(), label_E.tolist()) == ([0, 1], [3, 1])


def test_a_subtree_that_is_written_out_once_holds_everywhere(tmp_path: Path) -> None:
    tree = node("root", node("a", node("b", node("c"))), node("d", node("b")))
    found = read_hierarchy(write(tmp_path, tree), ("a", "b", "c", "d"))
    assert found.ancestors(3) == (1, 2, 4)


def test_nodes_outside_of_the_list_pass_ancestors_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree = node("root", node("food", node("unlisted", node("apple"))))
    found = read_hierarchy(write(tmp_path, tree), ("food", "apple", "car"))
    assert found.ancestors(2) == (1,)
    assert "1 classes of the list are missing, 1 nodes" in caplog.text


def test_a_root_that_is_a_class_counts(tmp_path: Path) -> None:
    found = read_hierarchy(write(tmp_path, node("food", node("apple"))), ("food", "apple"))
    assert found.ancestors(2) == (1,)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (node("root", node("food", node("fruit", node("food")))), "its own ancestor"),
        (node("root", node("food", node("food"))), "food is a food"),
        (node("root", node("food", {"Subcategory": []})), "below food has no LabelName"),
        ({"LabelName": "root", "Subcategory": {"LabelName": "food"}}, "Subcategory of root"),
        ([], "no LabelName"),
        ('{"LabelName": "root",\n "Subcategory": [}', "h.json:2: is no JSON"),
        ("", "h.json:1: is no JSON"),
        ("[" * 100_000, "is no JSON"),
        (node("root", node("stone")), "none of the classes of the list"),
    ],
)
def test_check_14_bad_hierarchies_are_refused(tmp_path: Path, tree: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_hierarchy(write(tmp_path, tree), IDS)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.json: file is missing"):
        read_hierarchy(tmp_path / "absent.json", IDS)


def test_a_long_chain_needs_no_recursion(tmp_path: Path) -> None:
    ids = [f"c{number}" for number in range(300)]
    tree = node(ids[-1])
    for name in reversed(ids[:-1]):
        tree = node(name, tree)
    found = read_hierarchy(write(tmp_path, node("root", tree)), ids)
    assert len(found.ancestors(300)) == 299


@pytest.mark.parametrize("kind", ["pickle", "npy"])
def test_the_matrix_says_the_same(tmp_path: Path, kind: str) -> None:
    wanted = read_hierarchy(write(tmp_path, TREE), IDS)
    matrix = wanted.above_KK.astype(float)
    path = tmp_path / "class_label_tree.np"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(matrix, protocol=2))
    else:
        with path.open("wb") as file:
            np.save(file, matrix)
    assert np.array_equal(read_label_tree(path, 6).above_KK, wanted.above_KK)


def test_bad_matrices_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tree.np"

    def refused(table: Any, message: str) -> None:
        path.write_bytes(pickle.dumps(table))
        with pytest.raises(InputError, match=message):
            read_label_tree(path, 3)

    eye = np.eye(4, dtype=int)
    refused(eye[:3, :3], "no matrix of 4 x 4")
    refused({"a": 1}, "no matrix of 4 x 4.*dict")
    alone, both, gap = eye.copy(), eye.copy(), eye.copy()
    alone[2, 2] = 0
    refused(alone, "not related to itself, label: 2")
    both[1, 2] = both[2, 1] = 1
    refused(both, "its own ancestor, label: 1")
    gap[1, 2] = gap[2, 3] = 1
    refused(gap, "ancestor of an ancestor")
