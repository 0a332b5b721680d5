"""The Open Images metric as a loop over images, classes and boxes, from the rules in words.

Rows are (image, box, label, group) of objects, (image, label, present) of verified labels and
(image, box, label, score) of detections; there are six classes.
"""

from collections.abc import Sequence
from typing import Any

Rows = Sequence[tuple[Any, ...]]
PARENTS = {4: (2, 3), 2: (1,), 3: (1,), 5: (2,), 6: ()}  # a diamond above class 4


def lineage(label: int) -> set[int]:
    found = {label}
    for parent in PARENTS.get(label, ()):
        found |= lineage(parent)
    return found


def offspring(label: int) -> set[int]:
    return {other for other in range(1, 7) if label in lineage(other)}


def area(box: Any) -> float:
    return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)


def common(one: Any, other: Any) -> float:
    corner = [max(one[0], other[0]), max(one[1], other[1])]
    return area([*corner, min(one[2], other[2]), min(one[3], other[3])])


def iou(one: Any, other: Any) -> float:
    both = common(one, other)
    return both / (area(one) + area(other) - both)


def image_entries(found: Rows, boxes: Rows, weight: float) -> list[tuple[float, float]]:
    """Score and weight of what one image and class ranks; rows (box, score) and (box, group)."""
    found = sorted(found, key=lambda row: -row[1])
    single = [box for box, group in boxes if not group]
    groups = [box for box, group in boxes if group]
    taken, best, entries = set(), [0.0] * len(groups), []
    for box, score in found:
        overlaps = [iou(box, other) for other in single]
        place = overlaps.index(max(overlaps)) if single else -1
        if single and overlaps[place] >= 0.5 and place not in taken:
            taken.add(place)
            entries.append((score, 1.0))
            continue
        inside = [common(box, other) / area(box) for other in groups]
        if groups and max(inside) >= 0.5:
            number = inside.index(max(inside))
            best[number] = max(best[number], score)
        else:
            entries.append((score, 0.0))
    return entries + [(score, weight) for score in best if score > 0 and weight > 0]


def area_under(entries: list[tuple[float, float]], objects: float) -> float:
    points, right, wrong = [], 0.0, 0
    for _, weight in sorted(entries, key=lambda entry: -entry[0]):
        right, wrong = right + weight, wrong + (weight == 0)
        points.append((right / objects, right / (right + wrong)))
    total, before = 0.0, 0.0
    for number, (recall, _) in enumerate(points):
        total += (recall - before) * max(precision for _, precision in points[number:])
        before = recall
    return total


def hard_suppression(found: Rows) -> Rows:
    kept: list[tuple[Any, ...]] = []
    for box, score in sorted(found, key=lambda row: -row[1]):
        if all(iou(box, other) <= 0.5 for other, _ in kept):
            kept.append((box, score))
    return kept


def reference(
    objects: Rows, verified: Rows, found: Rows, images: int, weight: float, expand: Any, compat: Any
) -> tuple[list[float], int]:
    """AP of the six classes, NaN without objects; and how many detections do not count."""
    boxes = [
        (image, box, above, group)
        for image, box, label, group in objects
        for above in sorted(lineage(label))
    ]
    scored = {(image, label) for image, _, label, _ in boxes}
    for image, label, present in verified:
        related = lineage(label) if present else offspring(label)
        scored |= set() if compat else {(image, other) for other in related}
    scored |= {(image, 1) for image in range(images)} if compat else set()
    solid = [row for row in found if row[1][0] < row[1][2] and row[1][1] < row[1][3]]
    dropped = sum((row[0], row[2]) not in scored for row in solid)
    rows = [
        (image, box, above, score)
        for image, box, label, score in solid
        for above in (sorted(lineage(label)) if expand else [label])
        if (image, above) in scored
    ]
    result = []
    for label in range(1, 7):
        count = sum(
            (1.0 if compat or not group else weight)
            for _, _, other, group in boxes
            if other == label
        )
        entries = []
        for image in range(images):
            mine = [(row[1], row[3]) for row in rows if row[0] == image and row[2] == label]
            mine = list(hard_suppression(mine)) if expand == "nms" else mine
            there = [(row[1], row[3]) for row in boxes if row[0] == image and row[2] == label]
            entries += image_entries(mine, there, weight)
        result.append(area_under(entries, count) if count else float("nan"))
    return result, dropped
