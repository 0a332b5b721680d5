"""Scenes with a hierarchy of classes and a long tail, in the format of Open Images.

Twelve classes in three levels: Warm and Cool; below them Red, Yellow, Green and Blue; below these
the six glyphs. The colour of a body tells its class of the second level, the glyph on it the leaf;
a body without glyph is annotated with its colour only. In the training split the commonest leaf is
50 times as frequent as the rarest; in the validation split all are equally frequent, so that the
AP of the rare ones can be measured. Clusters of small bodies are annotated by one box
(`IsGroupOf`). People would have said of some absent classes that they are absent (`Confidence` 0);
of one image in ten they said nothing but what is there.

`root` holds `train/*.jpg`, `validation/*.jpg`, the annotation files named in `FILES`,
`class-descriptions.csv`, `hierarchy.json`, and `proposals_{train,val}.npz` as the glyph scenes do.

Letters: H W rows and columns, G annotated boxes, M proposals. Boxes are xyxy in pixels.
"""

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.log import InputError
from detection_tsd.data.detection_data import DetectionData
from detection_tsd.data.glyphs import (
    MARK,
    MOST_DISTRACTORS,
    OBJECT,
    Law,
    background,
    body_strength,
    finish,
    glyph,
    mark_corner,
    paint_mark,
    place_boxes,
    place_marks,
    propose,
)

TREE: dict[str, dict[str, tuple[str, ...]]] = {
    "Warm": {"Red": ("Plus", "Cross"), "Yellow": ("T", "L")},
    "Cool": {"Green": ("Ring",), "Blue": ("Bars",)},
}
LEAVES = ("Plus", "Cross", "T", "L", "Ring", "Bars")  # in the order of the glyphs
RANK = (0, 4, 2, 5, 1, 3)  # of each leaf, the commonest first
RATIO = 50.0  # commonest to rarest
PARENT = {
    leaf: colour for colours in TREE.values() for colour in colours for leaf in colours[colour]
}
COLOURS = {
    "Red": (0.75, 0.2, 0.2),
    "Yellow": (0.8, 0.7, 0.2),
    "Green": (0.2, 0.65, 0.25),
    "Blue": (0.2, 0.3, 0.8),
}
NAMES = (*TREE, *COLOURS, *LEAVES)
MIDS = {name: f"/m/0{number:02d}s" for number, name in enumerate(NAMES, start=1)}
ROOT = "/m/0root"  # a virtual class, as the hierarchy of Open Images has

PLAIN, CLUSTER = 0.15, 0.2  # share of bodies without glyph; of images with a cluster
SILENT, SAID = 0.1, 0.4  # of images without verified negatives; of absent classes verified
CLUSTER_SIZE = (44.0, 52.0)
BODY, COVER = 13, 0.75  # side of a body in a cluster; how much a body hides what is behind it
JPEG_QUALITY = 95
FOLDERS = {"train": "train", "val": "validation"}
FILES = {"boxes": "annotations-bbox.csv", "labels": "annotations-human-imagelabels.csv"}
BOX_COLUMNS = (
    "ImageID", "Source", "LabelName", "Confidence", "XMin", "XMax", "YMin", "YMax",
    "IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction", "IsInside",
)  # fmt: skip
LABEL_COLUMNS = ("ImageID", "Source", "LabelName", "Confidence")


class HierarchyScene(NamedTuple):
    """One image.

    Attributes:
        image_HW3: uint8, RGB.
        box_G4: float32.
        name_G: class of each box.
        group_G: bool, whether the box holds a cluster.
        absent: classes verified to be absent.
        proposal_M4: float32.
    """

    image_HW3: np.ndarray
    box_G4: np.ndarray
    name_G: list[str]
    group_G: np.ndarray
    absent: list[str]
    proposal_M4: np.ndarray


def leaf_shares(long_tail: bool) -> np.ndarray:
    """Frequency of each of the six leaves; geometric from the commonest to the rarest."""
    rank = np.array(RANK) if long_tail else np.zeros(len(RANK))
    share = RATIO ** (-rank / (len(RANK) - 1))
    return share / share.sum()


def with_ancestors(names: Iterable[str]) -> set[str]:
    """The classes and everything above them."""
    found = set(names)
    found |= {PARENT[name] for name in found if name in PARENT}
    return found | {top for top, colours in TREE.items() if found & set(colours)}


def draw_hierarchy_scene(seed: int, split: int, number: int, side: int = 96) -> HierarchyScene:
    """The `number`-th scene of a split, of which 0 is the long-tailed one for training."""
    rng = np.random.default_rng([seed, split, number])
    image_HW3 = background(rng, side)
    share = leaf_shares(long_tail=split == 0)
    cluster_G4 = place_boxes(rng, int(rng.random() < CLUSTER), CLUSTER_SIZE, side, np.zeros((0, 4)))
    single_G4 = place_boxes(
        rng, int(rng.integers(1, 4 - len(cluster_G4))), OBJECT, side, cluster_G4
    )
    names: list[str] = []
    boxes: list[np.ndarray] = []
    for box in cluster_G4:
        leaf = int(rng.choice(len(LEAVES), p=share))
        boxes.append(_paint_cluster(image_HW3, box, leaf, rng))
        names.append(LEAVES[leaf])
    for box in single_G4:
        leaf = int(rng.choice(len(LEAVES), p=share))
        plain = bool(rng.random() < PLAIN)
        _paint_object(image_HW3, box, leaf, plain, rng)
        boxes.append(box)
        names.append(PARENT[LEAVES[leaf]] if plain else LEAVES[leaf])
    taken_B4 = np.concatenate([cluster_G4, single_G4])
    count = int(rng.integers(0, MOST_DISTRACTORS + 1))
    for x1, y1, x2, _ in place_marks(rng, count, side, taken_B4):
        leaf = int(rng.integers(len(LEAVES)))
        paint_mark(image_HW3, (int(x1), int(y1)), glyph(leaf + 1, int(x2 - x1)), rng)
    absent = [name for name in NAMES if name not in with_ancestors(names)]
    said = rng.random(len(absent)) < (0 if rng.random() < SILENT else SAID)
    box_G4 = np.array(boxes).reshape(-1, 4)
    return HierarchyScene(
        finish(image_HW3, rng),
        box_G4.astype(np.float32),
        names,
        np.arange(len(boxes)) < len(cluster_G4),
        [name for name, kept in zip(absent, said, strict=True) if kept],
        propose(rng, box_G4, Law(side)),
    )


def _paint_object(
    image_HW3: np.ndarray, box: np.ndarray, leaf: int, plain: bool, rng: np.random.Generator
) -> None:
    _paint_colour(image_HW3, box, leaf, bool(rng.random() < 0.5), rng)
    size = int(rng.integers(MARK[0], MARK[1] + 1))
    corner = mark_corner(rng, box, size, image_HW3.shape[0])
    if not plain:
        paint_mark(image_HW3, corner, glyph(leaf + 1, size), rng)


def _paint_cluster(
    image_HW3: np.ndarray, box: np.ndarray, leaf: int, rng: np.random.Generator
) -> np.ndarray:
    """Nine small bodies with glyphs, in place; returns the box (4,) around them."""
    step = (box[2:] - box[:2] - BODY) / 2
    corners = []
    for cell in range(9):
        corner = box[:2] + step * (cell % 3, cell // 3) + rng.uniform(-1, 1, 2)
        corner = np.clip(np.round(corner), 0, image_HW3.shape[0] - BODY)
        body = np.concatenate([corner, corner + BODY])
        _paint_colour(image_HW3, body, leaf, False, rng)
        inner = (int(corner[0]) + 2, int(corner[1]) + 2)
        paint_mark(image_HW3, inner, glyph(leaf + 1, MARK[0]), rng)
        corners.append(corner)
    return np.concatenate([np.min(corners, axis=0), np.max(corners, axis=0) + BODY])


def _paint_colour(
    image_HW3: np.ndarray, box: np.ndarray, leaf: int, ellipse: bool, rng: np.random.Generator
) -> None:
    colour = np.array(COLOURS[PARENT[LEAVES[leaf]]]) + rng.uniform(-0.08, 0.08, 3)
    strength_HW1 = body_strength(image_HW3.shape[0], box, ellipse)[..., None]
    image_HW3 += COVER * strength_HW1 * (colour - image_HW3)


def hierarchy_tree() -> dict[str, Any]:
    """The hierarchy as Open Images publishes its own."""
    tops = []
    for top, colours in TREE.items():
        middle = []
        for colour, leaves in colours.items():
            below = [{"LabelName": MIDS[leaf]} for leaf in leaves]
            middle.append({"LabelName": MIDS[colour], "Subcategory": below})
        tops.append({"LabelName": MIDS[top], "Subcategory": middle})
    return {"LabelName": ROOT, "Subcategory": tops}


def write_hierarchy(
    root: Path | str,
    counts: tuple[int, int] = (1200, 250),
    seeds: tuple[int, int] = (0, 0),
    side: int = 96,
) -> Path:
    """Write the set.

    Args:
        root: folder, made when it is not there.
        counts: images of the training and of the validation split.
        seeds: of the two splits, which never share images.
        side: of the square images, pixels.

    Returns:
        `root`.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    (root / "hierarchy.json").write_text(json.dumps(hierarchy_tree(), indent=1))
    _write_csv(root / "class-descriptions.csv", [(MIDS[name], name) for name in NAMES])
    for split, name in enumerate(FOLDERS):
        _write_split(root, name, split, counts[split], seeds[split], side)
    return root


def _write_split(root: Path, name: str, split: int, count: int, seed: int, side: int) -> None:
    boxes: list[tuple[Any, ...]] = []
    labels: list[tuple[Any, ...]] = []
    proposals: dict[str, np.ndarray] = {}
    (root / FOLDERS[name]).mkdir(exist_ok=True)
    for number in range(count):
        image_id = f"{split:x}{number:015x}"
        scene = draw_hierarchy_scene(seed, split, number, side)
        _save(root / FOLDERS[name] / f"{image_id}.jpg", scene.image_HW3)
        boxes += _box_rows(image_id, scene, side)
        there = sorted(set(scene.name_G))
        said = [(there_name, 1) for there_name in there] + [(gone, 0) for gone in scene.absent]
        labels += [(image_id, "verification", MIDS[title], sign) for title, sign in said]
        proposals[image_id] = scene.proposal_M4
    _write_csv(root / f"{FOLDERS[name]}-{FILES['boxes']}", [BOX_COLUMNS, *boxes])
    _write_csv(root / f"{FOLDERS[name]}-{FILES['labels']}", [LABEL_COLUMNS, *labels])
    np.savez(root / f"proposals_{name}.npz", allow_pickle=False, **proposals)


def _box_rows(image_id: str, scene: HierarchyScene, side: int) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    for box, title, group in zip(scene.box_G4, scene.name_G, scene.group_G, strict=True):
        x1, y1, x2, y2 = (f"{float(value) / side:.6f}" for value in box)
        rows.append((image_id, "xclick", MIDS[title], 1, x1, x2, y1, y2, 0, 0, int(group), 0, 0))
    return rows


def _write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def _save(path: Path, image_HW3: np.ndarray) -> None:
    import cv2

    quality = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    if not cv2.imwrite(str(path), image_HW3[..., ::-1], quality):
        raise InputError(path, "cannot be written")


def load_hierarchy(root: Path | str, split: str = "train") -> DetectionData:
    """Load a split of a set that `write_hierarchy` wrote, with its proposals.

    Raises:
        InputError: there is no such split, or a file is missing or malformed.
    """
    from detection_tsd.data.openimages import load_openimages

    if split not in FOLDERS:
        raise InputError("split", f"must be one of {', '.join(FOLDERS)}", split)
    root = Path(root)
    data = load_openimages(
        root,
        split=FOLDERS[split],
        boxes=f"{FOLDERS[split]}-{FILES['boxes']}",
        image_labels=f"{FOLDERS[split]}-{FILES['labels']}" if split == "val" else None,
        classes="class-descriptions.csv",
        hierarchy="hierarchy.json",
        images=FOLDERS[split],
    )
    with np.load(root / f"proposals_{split}.npz", allow_pickle=False) as file:
        proposals = [file[str(image_id)] for image_id in data.image_ids]
    return replace(data, proposals=proposals)
