"""Which classes of Open Images are kinds of which others.

The official file is a nested `{"LabelName": ..., "Subcategory": [...], "Part": [...]}`. Only
Subcategory says "is a"; what lies below Part is passed over, as the TF Object Detection API and
mmdetection do. A class may occur in several places: its parents are those of all of them. The root
is a virtual node unless it is in the list of classes. Sense-X/TSD keeps the same relation as a
matrix of labels (`class_label_tree.np`).

Letters: K classes, R rows, E rows after expansion. Labels are 1..K; row and column 0 are unused.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.log import InputError, get_logger
from detection_tsd.data.unpickle import load_pickle

Expanded = tuple[NDArray[np.int64], NDArray[np.int16]]


@dataclass(frozen=True, eq=False)
class Hierarchy:
    """The relation "is a" of K classes, closed under transitivity.

    Attributes:
        above_KK: bool (K + 1, K + 1); [c, a] is true when a is c itself or an ancestor of c.
    """

    above_KK: NDArray[np.bool_]

    @classmethod
    def flat(cls, num_classes: int) -> "Hierarchy":
        """Classes without any relation."""
        above_KK = np.eye(num_classes + 1, dtype=bool)
        above_KK[0, 0] = False
        return cls(above_KK)

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.above_KK) - 1

    def ancestors(self, label: int) -> tuple[int, ...]:
        """Labels of what a class is a kind of, ascending, without itself."""
        return tuple(int(other) for other in np.flatnonzero(self.above_KK[label]) if other != label)

    def descendants(self, label: int) -> tuple[int, ...]:
        """Labels of the kinds of a class, ascending, without itself."""
        found = np.flatnonzero(self.above_KK[:, label])
        return tuple(int(other) for other in found if other != label)

    def up(self, label_R: NDArray[Any]) -> Expanded:
        """Every row once for its class and once for each ancestor.

        Args:
            label_R: (R,), 1..K.

        Returns:
            The row each of the E came from, int64 ascending, and its label, int16.
        """
        return _expand(self.above_KK, label_R)

    def down(self, label_R: NDArray[Any]) -> Expanded:
        """Every row once for its class and once for each descendant; returns what `up` does."""
        return _expand(self.above_KK.T, label_R)


def _expand(to_KK: NDArray[np.bool_], label_R: NDArray[Any]) -> Expanded:
    source, target = np.nonzero(to_KK)
    first_K = np.searchsorted(source, np.arange(len(to_KK) + 1))
    count_R = np.diff(first_K)[label_R]
    row_E = np.repeat(np.arange(len(label_R)), count_R)
    # Position in the list of targets: where the list of the class begins, and how far in a row is.
    begin_E = np.repeat(first_K[label_R] - (np.cumsum(count_R) - count_R), count_R)
    return row_E, target[begin_E + np.arange(len(row_E))].astype(np.int16)


def read_hierarchy(path: Path | str, class_ids: Sequence[str]) -> Hierarchy:
    """The relation in an official JSON file.

    Nodes that are not in the list only pass their ancestors on; classes of the list that the file
    does not have are related to nothing. Both are logged with their number.

    Raises:
        InputError: the file is missing, no JSON or no such tree; a class is its own ancestor; no
            class of the list is in it.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(path, "file is missing")
    try:
        tree = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}", "is no JSON", error.msg) from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise InputError(path, "is no JSON", error) from error
    parents, root = _parents(path, tree)
    if root not in class_ids:
        parents.pop(root)
    known = set(class_ids)
    if len(parents) > 0 and not known & parents.keys():
        raise InputError(path, "has none of the classes of the list, but for example", min(parents))
    missing, extra = known - parents.keys(), parents.keys() - known
    if missing or extra:
        message = "%s: %d classes of the list are missing, %d nodes are not in the list"
        get_logger(__name__).warning(message, path, len(missing), len(extra))
    return Hierarchy(_close(path, parents, class_ids))


def _parents(path: Path, tree: Any) -> tuple[dict[str, set[str]], str]:
    """Parents of every node by name, and the name of the root."""
    parents: dict[str, set[str]] = {}
    waiting: list[tuple[Any, str | None, bool]] = [(tree, None, True)]
    while waiting:
        node, parent, related = waiting.pop()
        if not isinstance(node, dict) or not isinstance(node.get("LabelName"), str):
            raise InputError(path, f"a node below {parent or 'the top'} has no LabelName", node)
        name = node["LabelName"]
        above = parents.setdefault(name, set())
        if parent is not None and related:
            above.add(parent)
        for key in ("Subcategory", "Part"):
            below = node.get(key, [])
            if not isinstance(below, list):
                raise InputError(path, f"{key} of {name} is no list", below)
            below_is_kind = related and key == "Subcategory"
            waiting.extend((child, name, below_is_kind) for child in below)
    return parents, tree["LabelName"]


def _close(
    path: Path, parents: Mapping[str, set[str]], class_ids: Sequence[str]
) -> NDArray[np.bool_]:
    """Ancestors through any number of steps, (K + 1, K + 1)."""
    label_of = {identifier: label for label, identifier in enumerate(class_ids, start=1)}
    above_KK = Hierarchy.flat(len(class_ids)).above_KK
    reach: dict[str, set[str]] = {}
    for name in parents:
        _reach(path, name, parents, reach)
    for name, label in label_of.items():
        for other in reach.get(name, ()):
            if other in label_of:
                above_KK[label, label_of[other]] = True
    return above_KK


def _reach(
    path: Path, name: str, parents: Mapping[str, set[str]], reach: dict[str, set[str]]
) -> None:
    """Fill in the ancestors of a node and of all nodes above it, without recursion."""
    trail = [name]
    while trail:
        node = trail[-1]
        open_parents = [parent for parent in sorted(parents.get(node, ())) if parent not in reach]
        if not open_parents:
            above = parents.get(node, set())
            reach[node] = above.union(*(reach[parent] for parent in above))
            trail.pop()
        elif open_parents[0] in trail:
            circle = [*trail[trail.index(open_parents[0]) :], open_parents[0]]
            raise InputError(path, "a class is its own ancestor", " is a ".join(circle))
        else:
            trail.append(open_parents[0])


def read_label_tree(path: Path | str, num_classes: int) -> Hierarchy:
    """The relation in `class_label_tree.np` of Sense-X/TSD, a matrix saved or pickled.

    Raises:
        InputError: the file is missing or holds something else; its matrix is not square of side
            K + 1, does not relate each class to itself, is not transitive or has a cycle.
    """
    path = Path(path)
    table = load_pickle(path)
    side = num_classes + 1
    if not isinstance(table, np.ndarray) or table.shape != (side, side):
        found = getattr(table, "shape", type(table).__name__)
        raise InputError(
            path, f"holds no matrix of {side} x {side}, for {num_classes} classes", found
        )
    above_KK = table != 0
    above_KK[0, :] = above_KK[:, 0] = False
    alone = np.flatnonzero(~above_KK.diagonal()[1:])
    if alone.size:
        raise InputError(path, "a class is not related to itself, label", int(alone[0]) + 1)
    both = above_KK & above_KK.T & ~np.eye(side, dtype=bool)
    if both.any():
        first = int(np.flatnonzero(both.any(axis=1))[0])
        raise InputError(path, "a class is its own ancestor, label", first)
    steps = above_KK.astype(np.float32)
    if ((steps @ steps > 0) & ~above_KK).any():
        raise InputError(path, "an ancestor of an ancestor is none in the matrix")
    return Hierarchy(above_KK)
