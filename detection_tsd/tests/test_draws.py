"""Training draws: reproducible, independent of workers and ranks, strict about bad images."""

import logging
import pickle
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader

from common.log import InputError
from common.samplers import EvalSampler, ResumableSampler
from common.seed import worker_init
from detection_tsd.data import draws as module
from detection_tsd.data.batch import collate
from detection_tsd.data.coco import BoxObjects, FolderImages
from detection_tsd.data.detection_data import Annotation, Batch, DetectionData, Item
from detection_tsd.data.draws import ENDLESS, DetectionDraws, Grouped, ImageRows, Shuffled
from detection_tsd.data.transforms import DetectionTransform

# Height and width; the grey level of an image tells its row. Row 3 has no object.
SIZES = [(20, 30), (30, 20), (24, 24), (20, 40), (40, 20), (22, 33), (20, 31)]
LABELS = [[1, 2], [1], [1, 1], [], [1], [3], [1]]
TRANSFORM = DetectionTransform(short_range=(20, 40), long=60)
PLAIN = DetectionTransform(keep_size=True, flip=0)
ORDERS: list[dict[str, Any]] = [{}, {"group": 2}, {"class_aware": True}, {"cache": True}]


@pytest.fixture
def data(tmp_path: Path) -> DetectionData:
    names = [f"{k}.png" for k in range(len(SIZES))]
    for k, (name, size) in enumerate(zip(names, SIZES, strict=True)):
        cv2.imwrite(str(tmp_path / name), np.full((*size, 3), 30 * k + 20, np.uint8))
    row_O = np.repeat(np.arange(len(SIZES)), [len(label) for label in LABELS])
    label_O = np.array([label for row in LABELS for label in row])
    corner_O = np.arange(len(row_O), dtype=np.float32)
    box_O4 = np.stack([corner_O, corner_O / 2, corner_O + 9, corner_O / 2 + 8], axis=1)
    objects = BoxObjects(row_O, box_O4, label_O, np.array([3]), np.ones((1, 4)), len(SIZES))
    return DetectionData(
        name="greys",
        root=tmp_path,
        classes=("a", "b", "c"),
        class_ids=(1, 2, 3),
        image_ids=tuple(range(len(SIZES))),
        images=FolderImages(tmp_path, names, np.array(SIZES)),
        objects=objects,
        proposals=[np.full((k, 4), float(k), np.float32) for k in range(len(SIZES))],
    )


def damage(data: DetectionData, rows: list[int]) -> None:
    for row in rows:
        Path(data.images.name(row)).write_bytes(b"no picture")


def same(one: Item, two: Item) -> bool:
    tensors = [(one.image, two.image), *zip(one.target[:3], two.target[:3], strict=True)]
    return one[3:] == two[3:] and all(torch.equal(a, b) for a, b in tensors)


@pytest.mark.parametrize("options", ORDERS)
def test_items(data: DetectionData, options: dict[str, Any]) -> None:
    draws = DetectionDraws(data, TRANSFORM, seed=1, **options)
    for number in (0, 5, 2**40):
        item = draws[number]
        assert item.row == draws.row(number)
        assert item.draw == number
        assert item.original == SIZES[item.row]
        assert item.image.float().mean() == pytest.approx(30 * item.row + 20)
        assert item.target.label_G.tolist() == LABELS[item.row]
        assert item.proposals is not None
        assert len(item.proposals) == item.row
        height, width = item.image.shape[1:]
        assert item.scale == (width / item.original[1], height / item.original[0])
    assert len(draws) == ENDLESS == 2**62
    with pytest.raises(IndexError):
        draws[-1]


@pytest.mark.parametrize("options", ORDERS)
def test_a_draw_is_a_function_of_seed_and_number(
    data: DetectionData, options: dict[str, Any]
) -> None:
    one, two = (DetectionDraws(data, TRANSFORM, seed=3, **options) for _ in range(2))
    forward = [one[number] for number in range(20)]
    np.random.seed(1)  # noqa: NPY002 - the global generators must not matter
    torch.manual_seed(1)
    backward = [two[number] for number in reversed(range(20))][::-1]
    assert all(map(same, forward, backward))
    other = DetectionDraws(data, TRANSFORM, seed=4, **options)
    assert not all(map(same, forward, [other[number] for number in range(20)]))


def test_a_repeated_image_gets_another_view(data: DetectionData) -> None:
    """Chance depends on the draw, not on the image."""
    draws = DetectionDraws(data, TRANSFORM)
    views = {draws[number].image.shape for number in range(60) if draws.row(number) == 0}
    assert len(views) > 5


def test_an_epoch_has_every_image_with_objects_once(data: DetectionData) -> None:
    draws = DetectionDraws(data, TRANSFORM)
    assert draws.epoch_length == 6
    epochs = [[draws.row(6 * epoch + place) for place in range(6)] for epoch in range(4)]
    assert all(sorted(rows) == [0, 1, 2, 4, 5, 6] for rows in epochs)
    assert len({tuple(rows) for rows in epochs}) > 1  # trap: the same order every epoch
    whole = DetectionDraws(data, TRANSFORM, filter_empty=False)
    assert sorted(whole.row(place) for place in range(7)) == list(range(7))
    empty = next(whole[place] for place in range(7) if whole.row(place) == 3)
    assert empty.target.box_G4.shape == (0, 4)
    assert empty.target.crowd_I4.shape == (1, 4)


def test_runs_are_of_one_orientation(data: DetectionData) -> None:
    draws = DetectionDraws(data, TRANSFORM, group=4)
    assert draws.epoch_length == 8  # wide: 0, 5, 6 and one again; others: 1, 2, 4 and one again
    orders = set()
    for epoch in range(6):
        rows = [draws.row(8 * epoch + place) for place in range(8)]
        kinds = [{SIZES[row][1] > SIZES[row][0] for row in run} for run in (rows[:4], rows[4:])]
        assert sorted(kinds, key=str) == [{False}, {True}]
        assert set(rows) == {0, 1, 2, 4, 5, 6}
        orders.add(tuple(rows))
    assert len(orders) > 3


@pytest.mark.parametrize("group", [2, 3, 16])
def test_groups_fill_up_with_their_head(group: int) -> None:
    wide_N = np.arange(23) % 3 == 0
    order = Grouped(wide_N, 0, group)
    rows = np.array([order.row(place) for place in range(order.length)])
    runs_RG = wide_N[rows].reshape(-1, group)
    assert (runs_RG == runs_RG[:, :1]).all()
    assert order.length - 23 <= 2 * (group - 1)
    counts = np.bincount(rows)
    assert counts.min() >= 1
    for kind in (False, True):
        assert counts[wide_N == kind].max() - counts[wide_N == kind].min() <= 1


def test_one_orientation_only() -> None:
    order = Grouped(np.ones(5, bool), 0, 2)
    assert order.length == 6
    assert {order.row(place) for place in range(6)} == set(range(5))


def test_the_share_of_every_rank_is_of_one_orientation(data: DetectionData) -> None:
    """With the group as large as the global batch, for any number of ranks."""
    for world in (1, 2, 4):
        draws = DetectionDraws(data, TRANSFORM, group=4)
        for rank in range(world):
            sampler = ResumableSampler(len(draws), rank=rank, world=world, shuffle=False)
            rows = [draws.row(number) for number in islice(sampler, 16 // world)]
            for run in np.reshape(rows, (-1, 4 // world)):
                assert len({SIZES[row][1] > SIZES[row][0] for row in run}) == 1


def batches(
    draws: DetectionDraws, workers: int, rank: int = 0, world: int = 1, consumed: int = 0
) -> list[Batch]:
    sampler = ResumableSampler(len(draws), rank=rank, world=world, shuffle=False)
    sampler.consumed = consumed
    loader: DataLoader[Batch] = DataLoader(
        draws, batch_size=4 // world, sampler=sampler, num_workers=workers,
        collate_fn=partial(collate, divisor=8), worker_init_fn=worker_init,
    )  # type: ignore[arg-type]  # fmt: skip
    return list(islice(iter(loader), 3))


@pytest.mark.parametrize("options", [{}, {"class_aware": True}])
def test_draws_are_the_same_for_any_workers_ranks_and_restart(
    data: DetectionData, options: dict[str, Any]
) -> None:
    draws = DetectionDraws(data, TRANSFORM, seed=2, **options)
    expected = {item.draw: item for item in (draws[number] for number in range(12))}
    settings = [(0, 1), (2, 1), (0, 2), (0, 4), (1, 2)]
    for workers, world in settings:
        for consumed in (0, 4):
            seen = []
            for rank in range(world):
                fresh = DetectionDraws(data, TRANSFORM, seed=2, **options)
                for batch in batches(fresh, workers, rank, world, consumed):
                    for b, draw in enumerate(batch.draw_B.tolist()):
                        seen.append(draw)
                        item = expected.get(draw)
                        if item is not None:
                            height, width = item.image.shape[1:]
                            image = batch.image_B3HW[b, :, :height, :width]
                            assert torch.equal(image, item.image)
                            assert torch.equal(batch.targets[b].box_G4, item.target.box_G4)
                            assert batch.row_B[b] == item.row
            assert sorted(seen) == list(range(consumed, consumed + 12))


class Remembered:
    """Objects that hand out the same arrays every time, as an annotation cache would."""

    def __init__(self, data: DetectionData):
        self.kept = [data.objects.read(row) for row in range(len(data))]

    def __len__(self) -> int:
        return len(self.kept)

    def read(self, row: int) -> Annotation:
        return self.kept[row]

    def labels(self, row: int) -> np.ndarray:
        return self.kept[row].label_G


@pytest.mark.parametrize("cached", [False, True])
def test_check_11_an_image_drawn_twice_has_the_same_boxes(
    data: DetectionData, cached: bool
) -> None:
    """Scaling cached annotations in place doubles the scale of every repeated image."""
    if cached:
        data = replace(data, objects=Remembered(data))
    transform = DetectionTransform(60, 200, flip=0)  # by factors from 1.5 to 3
    draws = DetectionDraws(data, transform, class_aware=True, cache=True)
    seen: Counter[int] = Counter()
    for number in range(60):
        item = draws[number]
        seen[item.row] += 1
        label_O = [label for row in LABELS[: item.row] for label in row]
        first = np.arange(len(label_O), len(label_O) + len(LABELS[item.row]), dtype=np.float32)
        box_G4 = np.stack([first, first / 2, first + 9, first / 2 + 8], axis=1)
        scaled_G4 = box_G4 * np.array([*item.scale, *item.scale], np.float32)
        torch.testing.assert_close(item.target.box_G4, torch.from_numpy(scaled_G4))
        assert item.proposals is not None
        assert item.proposals.numel() == 0 or item.proposals[0, 0] == item.row * item.scale[0]
    assert seen[5] >= 15  # the only image of a class


def test_objects_are_copies(data: DetectionData) -> None:
    before = data.objects.read(0)
    before.box_G4[:] *= 7
    before.label_G[:] = 9
    data.objects.labels(0)[:] = 9
    after = data.objects.read(0)
    assert after.box_G4[0].tolist() == [0, 0, 9, 8]
    assert after.label_G.tolist() == [1, 2]


def test_bad_images_are_replaced_and_counted(
    data: DetectionData, caplog: pytest.LogCaptureFixture
) -> None:
    damage(data, [0, 5])
    draws = DetectionDraws(data, TRANSFORM, seed=1, max_bad_items=100)
    again = DetectionDraws(data, TRANSFORM, seed=1, max_bad_items=100)
    with caplog.at_level(logging.WARNING):
        items = [draws[number] for number in range(12)]
    assert {item.row for item in items} <= {1, 2, 4, 6}
    assert draws.bad_items >= 4
    assert "0.png: picture cannot be decoded" in caplog.text
    assert all(same(item, again[item.draw]) for item in reversed(items))
    assert again.bad_items == draws.bad_items


def test_too_many_bad_images_stop(data: DetectionData) -> None:
    Path(data.images.name(5)).unlink()
    draws = DetectionDraws(data, TRANSFORM, max_bad_items=1)
    numbers = [number for number in range(20) if draws.row(number) == 5]
    assert draws[numbers[0]].row != 5
    with pytest.raises(InputError, match=r"5\.png: picture cannot be read: No such file"):
        draws[numbers[1]]
    strict = DetectionDraws(data, TRANSFORM)
    with pytest.raises(InputError, match=r"5\.png: picture cannot be read"):
        strict[numbers[0]]


def test_bad_images_of_workers_are_counted_in_the_parent(data: DetectionData) -> None:
    damage(data, [0])
    draws = DetectionDraws(data, TRANSFORM, max_bad_items=100)
    batches(draws, workers=2)
    assert draws.bad_items >= 1


def test_the_message_of_a_worker_stays_one_line(data: DetectionData) -> None:
    """As a DataLoader carries an exception over."""
    damage(data, list(range(7)))
    with pytest.raises(InputError) as first:
        DetectionDraws(data, TRANSFORM)[0]
    info = (first.type, first.value, first.tb)
    carried = ExceptionWrapper(info, where="in DataLoader worker process 0")  # type: ignore[arg-type]
    with pytest.raises(
        InputError, match=r"/\d\.png: picture cannot be decoded: 10 bytes$"
    ) as error:
        carried.reraise()
    assert str(error.value).startswith(str(data.root))
    many = DetectionDraws(data, TRANSFORM, max_bad_items=1000)
    with pytest.raises(InputError, match="draw 0: met 10 unreadable images, at last"):
        many[0]


def test_replacements_keep_the_orientation(data: DetectionData) -> None:
    damage(data, [0])
    draws = DetectionDraws(data, PLAIN, group=2, max_bad_items=1000)
    for number in range(40):
        height, width = draws[number].image.shape[1:]
        wanted = SIZES[draws.row(number)]
        assert (width > height) == (wanted[1] > wanted[0])


def test_a_picture_of_another_size_is_bad(data: DetectionData) -> None:
    """Its boxes would be wrong; EXIF orientation and replaced files cause it."""
    cv2.imwrite(data.images.name(5), np.zeros((33, 22, 3), np.uint8))
    draws = DetectionDraws(data, TRANSFORM)
    number = next(number for number in range(20) if draws.row(number) == 5)
    with pytest.raises(InputError, match=r"5\.png: picture is 22 x 33, the set says: 33 x 22"):
        draws[number]
    with pytest.raises(InputError, match="the set says"):
        ImageRows(data, TRANSFORM)[5]


def test_the_cache_serves_all_workers(data: DetectionData) -> None:
    """Whoever decodes first fills it; afterwards the files are not needed."""
    draws = DetectionDraws(data, TRANSFORM, cache=True, filter_empty=False)
    plain = DetectionDraws(data, TRANSFORM, filter_empty=False)
    batches(draws, workers=2)
    expected = [plain[number] for number in range(20)]
    damage(data, list(range(7)))
    assert all(same(draws[number], item) for number, item in enumerate(expected))


def test_the_cache_is_not_written_through_items(data: DetectionData) -> None:
    draws = DetectionDraws(data, PLAIN, cache=True)
    for _ in range(2):
        item = draws[0]
        assert item.image.float().mean() == 30 * item.row + 20
        item.image.zero_()


def test_a_cache_that_does_not_fit(data: DetectionData, monkeypatch: pytest.MonkeyPatch) -> None:
    if not module.SHARED_MEMORY.is_dir():
        pytest.skip("no shared memory folder here")
    images = FolderImages(data.root, ["x"] * 7, np.full((7, 2), 2**21))
    with pytest.raises(InputError, match="need more shared memory than /dev/shm has, in MiB"):
        DetectionDraws(replace(data, images=images), TRANSFORM, cache=True)


def test_orders_build_once_an_epoch() -> None:
    order = Shuffled(1000, 0)
    first = [order.row(k) for k in range(1000)]
    assert sorted(first) == list(range(1000))
    assert [order.row(1000 + k) for k in range(5)] != first[:5]
    assert [order.row(k) for k in range(1000)] == first


def test_image_rows(data: DetectionData) -> None:
    rows = ImageRows(data, DetectionTransform(40, 100))
    items = [rows[row] for row in EvalSampler(len(rows))]
    assert [item.row for item in items] == list(range(7))
    for item in items:
        assert item.target.box_G4.shape == (0, 4)
        assert min(item.image.shape[1:]) == 40
        assert item.proposals is not None
        assert len(item.proposals) == item.row
        assert item.original == SIZES[item.row]
    for row in (-1, 7):
        with pytest.raises(IndexError):
            rows[row]
    assert ImageRows(replace(data, proposals=None), TRANSFORM)[0].proposals is None


def test_they_survive_pickling(data: DetectionData) -> None:
    """Spawned workers get a copy."""
    for options in ORDERS[:3]:
        draws = DetectionDraws(data, TRANSFORM, **options)
        assert same(pickle.loads(pickle.dumps(draws))[3], draws[3])


@pytest.mark.parametrize(
    "options",
    [{"seed": -1}, {"max_bad_items": -1}, {"group": 0}, {"group": 2, "class_aware": True}],
)
def test_bad_arguments(data: DetectionData, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        DetectionDraws(data, TRANSFORM, **options)


def test_nothing_to_draw(data: DetectionData) -> None:
    none = np.empty(0, np.int64)
    blank = BoxObjects(none, np.empty((0, 4)), none, none, np.empty((0, 4)), 7)
    with pytest.raises(InputError, match="has no image with an object"):
        DetectionDraws(replace(data, objects=blank), TRANSFORM)
    assert DetectionDraws(replace(data, objects=blank), TRANSFORM, filter_empty=False)[0]
    with pytest.raises(InputError, match="has no image"):
        DetectionDraws(replace(data, image_ids=()), TRANSFORM)
