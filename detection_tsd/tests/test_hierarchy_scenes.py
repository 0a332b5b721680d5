"""The long-tailed scenes: frequencies, a consistent hierarchy, clusters, and their evaluation."""

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from common.log import InputError
from detection_tsd.data.hierarchy import read_hierarchy
from detection_tsd.data.hierarchy_scenes import (
    COLOURS,
    LEAVES,
    MIDS,
    NAMES,
    PARENT,
    TREE,
    HierarchyScene,
    draw_hierarchy_scene,
    leaf_shares,
    load_hierarchy,
    with_ancestors,
    write_hierarchy,
)
from detection_tsd.metrics.openimages import evaluate_files

TOP = {colour: top for top, colours in TREE.items() for colour in colours}
GROUP_OVERLAP = 0.5


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hierarchy(tmp_path_factory.mktemp("hierarchy"), (12, 40), (1, 1))


@pytest.fixture(scope="module")
def many() -> list[HierarchyScene]:
    return [draw_hierarchy_scene(0, 0, number) for number in range(400)]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def ancestors(name: str) -> set[str]:
    """The class and all above it, from the two tables of this test's own."""
    colour = PARENT.get(name, name)
    return {name, colour, TOP.get(colour, colour)}


def test_the_commonest_leaf_is_fifty_times_the_rarest(many: list[HierarchyScene]) -> None:
    share = leaf_shares(long_tail=True)
    assert share.max() / share.min() == pytest.approx(50)
    assert np.allclose(np.diff(np.log(np.sort(share))), np.log(50) / 5)
    assert np.allclose(leaf_shares(long_tail=False), 1 / 6)
    count = Counter(name for scene in many for name in scene.name_G if name in LEAVES)
    total = sum(count.values())
    for leaf, expected in zip(LEAVES, share, strict=True):
        assert count[leaf] / total == pytest.approx(expected, abs=0.06)
    even = Counter(
        name for number in range(200) for name in draw_hierarchy_scene(0, 1, number).name_G
    )
    assert min(even[leaf] for leaf in LEAVES) > 25


def test_there_are_twelve_classes_in_three_levels(root: Path) -> None:
    assert len(NAMES) == len(set(MIDS.values())) == 12
    tree = read_hierarchy(root / "hierarchy.json", tuple(MIDS.values()))
    for label, name in enumerate(NAMES, start=1):
        above = {NAMES[other - 1] for other in tree.ancestors(label)}
        assert above | {name} == ancestors(name)
    assert with_ancestors(["Ring"]) == {"Ring", "Green", "Cool"}
    assert with_ancestors(["Red", "Plus"]) == {"Red", "Plus", "Warm"}
    assert with_ancestors([]) == set()


def test_labels_agree_with_what_is_there(many: list[HierarchyScene]) -> None:
    silent, plain = 0, 0
    for scene in many:
        there = set().union(*(ancestors(name) for name in scene.name_G))
        assert not there & set(scene.absent)
        silent += not scene.absent
        plain += any(name in COLOURS for name in scene.name_G)
    assert 0.05 < silent / len(many) < 0.2
    assert plain > 60


def test_clusters_hold_several_bodies_in_one_box(many: list[HierarchyScene]) -> None:
    grouped = [scene for scene in many if scene.group_G.any()]
    assert 0.12 < len(grouped) / len(many) < 0.28
    for scene in grouped:
        assert scene.group_G.sum() == 1
        assert scene.name_G[0] in LEAVES
        size = scene.box_G4[0, 2:] - scene.box_G4[0, :2]
        assert (size > 40).all()
        assert scene.box_G4.min() >= 0
        assert scene.box_G4.max() <= 96


def test_the_colour_of_a_body_tells_its_parent(many: list[HierarchyScene]) -> None:
    for scene in many[:80]:
        single = ~scene.group_G
        for box, name in zip(scene.box_G4[single], np.array(scene.name_G)[single], strict=True):
            x1, y1, x2, y2 = np.round(box).astype(int)
            pixel_N3 = scene.image_HW3[y1 + 5 : y2 - 5, x1 + 5 : x2 - 5].reshape(-1, 3) / 255
            middle = np.median(pixel_N3, axis=0)
            away = {c: np.abs(middle - value).sum() for c, value in COLOURS.items()}
            assert min(away, key=lambda c: away[c]) == PARENT.get(name, name)


def test_files_have_the_columns_of_open_images(root: Path) -> None:
    found = rows(root / "validation-annotations-bbox.csv")
    header = (root / "validation-annotations-bbox.csv").read_text().splitlines()[0]
    assert header.startswith("ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded")
    for number in range(40):
        scene = draw_hierarchy_scene(1, 1, number)
        mine = [row for row in found if row["ImageID"] == f"1{number:015x}"]
        box_G4 = np.array(
            [[row[k] for k in ("XMin", "YMin", "XMax", "YMax")] for row in mine], float
        )
        assert np.allclose(box_G4 * 96, scene.box_G4, atol=1e-3)
        assert [row["LabelName"] for row in mine] == [MIDS[name] for name in scene.name_G]
        assert [row["IsGroupOf"] == "1" for row in mine] == scene.group_G.tolist()
    said = rows(root / "validation-annotations-human-imagelabels.csv")
    assert {row["Confidence"] for row in said} == {"0", "1"}


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_splits_load_with_their_proposals(root: Path, split: str) -> None:
    data = load_hierarchy(root, split)
    assert data.classes == NAMES
    assert len(data) == {"train": 12, "val": 40}[split]
    assert data.proposals is not None
    number = ["train", "val"].index(split)
    for row, image_id in enumerate(data.image_ids):
        scene = draw_hierarchy_scene(1, number, int(image_id[1:], 16))
        assert np.array_equal(data.proposals[row], scene.proposal_M4)
        assert np.allclose(data.objects.read(row).box_G4, scene.box_G4, atol=1e-3)
        away = np.abs(data.images.read(row).astype(float) - scene.image_HW3).mean()
        assert away < 8  # JPEG
    with pytest.raises(InputError, match="split"):
        load_hierarchy(root, "test")


def test_check_09_the_evaluator_agrees_with_brute_force(root: Path, tmp_path: Path) -> None:
    """On noisy detections of the long-tailed scenes, with and without their ancestors."""
    rng = np.random.default_rng(0)
    detections = []
    for number in range(40):
        scene = draw_hierarchy_scene(1, 1, number)
        for box, name in zip(scene.box_G4, scene.name_G, strict=True):
            for _ in range(int(rng.integers(0, 4))):
                noisy = np.clip(box / 96 + rng.normal(0, 0.03, 4), 0, 1)
                said = name if rng.random() < 0.7 else str(rng.choice(NAMES))
                for title in ancestors(said) if rng.random() < 0.5 else {said}:
                    detections.append((f"1{number:015x}", title, round(rng.random(), 6), noisy))
    path = tmp_path / "found.csv"
    with path.open("w") as file:
        file.write("ImageID,LabelName,Score,XMin,XMax,YMin,YMax\n")
        for image, name, score, (x1, y1, x2, y2) in detections:
            file.write(f"{image},{MIDS[name]},{score},{x1},{x2},{y1},{y2}\n")
    found = evaluate_files(
        path,
        root / "validation-annotations-bbox.csv",
        root / "class-descriptions.csv",
        root / "validation-annotations-human-imagelabels.csv",
        root / "hierarchy.json",
    )
    expected = {name: brute_force(root, detections, name) for name in NAMES}
    ap = found["scores_by_class"]
    assert len(ap) == 12
    for name, value in expected.items():
        assert ap[MIDS[name]] == pytest.approx(value, abs=1e-9), name
    assert 0.1 < found["scores"]["mAP"] < 0.95
    assert found["scores"]["mAP"] == pytest.approx(np.mean(list(expected.values())), abs=1e-9)


def brute_force(
    root: Path, detections: list[tuple[str, str, float, np.ndarray]], name: str
) -> float:
    """AP of one class by the rules of the challenge, image after image."""
    boxes: dict[str, list[tuple[np.ndarray, bool]]] = {}
    known: dict[str, set[str]] = {}
    title = {mid: name for name, mid in MIDS.items()}
    for row in rows(root / "validation-annotations-bbox.csv"):
        box = np.array([float(row[k]) for k in ("XMin", "YMin", "XMax", "YMax")])
        above = ancestors(title[row["LabelName"]])
        known.setdefault(row["ImageID"], set()).update(above)
        if name in above:
            boxes.setdefault(row["ImageID"], []).append((box, row["IsGroupOf"] == "1"))
    for row in rows(root / "validation-annotations-human-imagelabels.csv"):
        said = title[row["LabelName"]]
        below = {n for n in NAMES if said in ancestors(n)}
        more = ancestors(said) if row["Confidence"] == "1" else below
        known.setdefault(row["ImageID"], set()).update(more)
    entries: list[tuple[float, bool]] = []
    for image in known:
        if name not in known[image]:
            continue
        mine = [(score, box) for i, n, score, box in detections if i == image and n == name]
        mine = [(s, b) for s, b in mine if b[0] < b[2] and b[1] < b[3]]
        entries += of_image(sorted(mine, key=lambda one: -one[0]), boxes.get(image, []))
    total = sum(len(found) for found in boxes.values())
    return average_precision(sorted(entries, key=lambda one: -one[0]), total)


def of_image(
    found: list[tuple[float, np.ndarray]], objects: list[tuple[np.ndarray, bool]]
) -> list[tuple[float, bool]]:
    single = [box for box, group in objects if not group]
    groups = [box for box, group in objects if group]
    taken: set[int] = set()
    absorbed: dict[int, float] = {}
    entries = []
    for score, box in found:
        best = max(range(len(single)), key=lambda g: common(box, single[g])[0], default=-1)
        if best >= 0 and common(box, single[best])[0] >= 0.5 and best not in taken:
            taken.add(best)
            entries.append((score, True))
            continue
        group = max(range(len(groups)), key=lambda g: common(box, groups[g])[1], default=-1)
        if group >= 0 and common(box, groups[group])[1] >= GROUP_OVERLAP:
            absorbed[group] = max(score, absorbed.get(group, 0.0))
        else:
            entries.append((score, False))
    return entries + [(score, True) for score in absorbed.values()]


def common(box: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Intersection over union, and over the first box."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    inside = max(width, 0.0) * max(height, 0.0)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)]
    return inside / (sum(areas) - inside), inside / areas[0]


def average_precision(entries: list[tuple[float, bool]], total: int) -> float:
    if not total:
        return float("nan")
    right = np.cumsum([hit for _, hit in entries])
    precision = right / np.arange(1, len(entries) + 1)
    area, before = 0.0, 0.0
    for row in range(len(entries)):
        recall = right[row] / total
        area += (recall - before) * precision[row:].max()
        before = recall
    return float(area)
