"""Every class equally often."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from common.samplers import ResumableSampler
from detection_tsd.data.class_aware import ClassAware
from detection_tsd.data.coco import BoxObjects

# Class 1 is in every image but the last, class 2 in one, class 4 in two; class 3 in none.
LABELS = [[1], [1, 1, 1], [1], [2, 1], [1, 4], [1], [1], [4, 4], [], [1]]


def objects(labels: list[list[int]]) -> BoxObjects:
    row_O = np.repeat(np.arange(len(labels)), [len(label) for label in labels])
    label_O = np.array([label for row in labels for label in row])
    box_O4, none = np.ones((len(row_O), 4), np.float32), np.empty(0, np.int64)
    return BoxObjects(row_O, box_O4, label_O, none, np.empty((0, 4)), len(labels))


def order(seed: int = 0, labels: list[list[int]] = LABELS) -> ClassAware:
    return ClassAware(objects(labels), range(len(labels)), seed)


def epoch(sampler: ClassAware, number: int) -> list[int]:
    first = number * sampler.length
    return [sampler.row(draw) for draw in range(first, first + sampler.length)]


def test_check_11_every_class_is_drawn_once_a_round() -> None:
    """The three images of a round can be dealt to the three classes, one each."""
    sampler = order()
    assert sampler.classes.tolist() == [1, 2, 4]
    assert sampler.rounds == 3
    for number in range(20):
        rows = epoch(sampler, number)
        for first in range(0, 9, 3):
            assert any(
                all(kind in LABELS[row] for kind, row in zip((1, 2, 4), dealt, strict=True))
                for dealt in permutations(rows[first : first + 3])
            )
        assert rows[9] == rows[0]  # filled up with the head of the list


def test_check_11_counts_of_a_long_tail() -> None:
    """Disjoint classes, 1 to 400 images: each is drawn floor(total / classes) times, +- 1."""
    sizes = [400, 100, 30, 5, 1]
    labels = [[kind + 1] for kind, size in enumerate(sizes) for _ in range(size)]
    sampler, total = order(labels=labels), sum(sizes)
    for number in (0, 7):
        rows = epoch(sampler, number)[: sampler.rounds * len(sizes)]
        counts = Counter(labels[row][0] for row in rows)
        assert set(counts) == {1, 2, 3, 4, 5}
        assert max(abs(count - total // len(sizes)) for count in counts.values()) <= 1
        assert len(epoch(sampler, number)) == total


def test_images_of_a_class_are_uniform() -> None:
    labels = [[1]] * 4 + [[2]] * 2
    sampler = order(labels=labels)
    counts = Counter(row for number in range(600) for row in epoch(sampler, number))
    for rows, share in ((range(4), 450), (range(4, 6), 900)):
        assert all(abs(counts[row] - share) < 5 * share**0.5 for row in rows)


def test_several_boxes_of_a_class_count_once() -> None:
    """Otherwise crowded images would be preferred."""
    labels = [[1] * 50, [1], [1], [1]]
    sampler = order(labels=labels)
    counts = Counter(row for number in range(500) for row in epoch(sampler, number))
    assert counts[0] < 600


def test_images_without_objects_are_never_drawn() -> None:
    sampler = order()
    assert 8 not in {row for number in range(50) for row in epoch(sampler, number)}


def test_orders_are_functions_of_seed_and_epoch() -> None:
    one, two = order(seed=3), order(seed=3)
    later = [two.row(draw) for draw in reversed(range(50))][::-1]
    np.random.seed(5)  # noqa: NPY002 - the global generator must not matter
    assert [one.row(draw) for draw in range(50)] == later
    assert epoch(one, 0) != epoch(one, 1)
    assert epoch(one, 0) != epoch(order(seed=4), 0)


@pytest.mark.parametrize("world", [1, 2, 5])
def test_check_11_the_global_order_does_not_depend_on_the_ranks(world: int) -> None:
    """Each rank has a sampler and an order of its own, and a restart begins in the middle."""
    expected = [order().row(draw) for draw in range(40)]
    for consumed in (0, 20):
        shares = []
        for rank in range(world):
            sampler = ResumableSampler(2**62, rank=rank, world=world, shuffle=False)
            sampler.consumed = consumed
            draws, own = iter(sampler), order()
            shares.append([own.row(next(draws)) for _ in range(20 // world)])
        got = [row for step in zip(*shares, strict=True) for row in step]
        assert got == expected[consumed : consumed + 20]


def test_fewer_images_than_classes() -> None:
    labels = [[1, 2, 3, 4, 5], [6, 7]]
    sampler = order(labels=labels)
    assert sampler.rounds == 0
    counts = Counter(row for number in range(300) for row in epoch(sampler, number))
    assert 2 < counts[0] / counts[1] < 3.2  # five classes to two


def test_a_part_of_the_rows() -> None:
    sampler = ClassAware(objects(LABELS), [3, 7, 9], 0)
    assert sampler.length == 3
    assert {entry for number in range(30) for entry in epoch(sampler, number)} == {0, 1, 2}


def test_no_object() -> None:
    with pytest.raises(ValueError, match="none of rows=2 images has an object"):
        order(labels=[[], []])
