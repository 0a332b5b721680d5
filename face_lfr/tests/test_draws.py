"""Training draws: reproducible, independent of workers, strict about bad images."""

import logging
import multiprocessing
import pickle
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from common.log import InputError
from common.samplers import EvalSampler, ResumableSampler
from common.seed import worker_init
from face_lfr.data import draws as module
from face_lfr.data.draws import ENDLESS, Balanced, Blocks, FaceDraws, ImageRows, Order, Shuffled
from face_lfr.data.face_data import FaceData
from face_lfr.data.rec import load_rec, write_rec
from face_lfr.data.recordio import RecordFile, RecordWriter, pack
from face_lfr.data.transforms import FaceTransform

LABELS = [0, 0, 0, 0, 1, 2, 2]
N = len(LABELS)
TRANSFORM = FaceTransform(24, jitter=0.2)
ORDERS = [{}, {"balanced": True}, {"block": 2}]


def jpeg(number: int) -> bytes:
    image = np.full((32, 32, 3), 30 * number + 20, np.uint8)
    return bytes(cv2.imencode(".jpg", image)[1])


@pytest.fixture
def data(tmp_path: Path) -> FaceData:
    """Seven images of three classes; the grey level tells the row."""
    write_rec(tmp_path, ((jpeg(k), label) for k, label in enumerate(LABELS)), 3)
    return load_rec(tmp_path)


def with_bad(data: FaceData, rows: list[int]) -> FaceData:
    """The same data with text instead of some of the images."""
    file = RecordFile(data.root / "train.rec")
    payloads = {key: bytes(file.read(key)) for key in file.keys}
    for row in rows:
        payloads[row + 1] = pack(LABELS[row], b"no image")
    with RecordWriter(data.root / "train") as writer:
        for key, payload in payloads.items():
            writer.write(key, payload)
    return load_rec(data.root)


@pytest.mark.parametrize("options", ORDERS)
def test_items(data: FaceData, options: dict[str, Any]) -> None:
    draws = FaceDraws(data, TRANSFORM, seed=1, **options)
    for number in (0, 5, 2**40):
        item = draws[number]
        assert item.image.shape == (3, 24, 24)
        assert item.image.dtype == torch.uint8
        assert item.label == LABELS[draws.row(number)]
    assert len(draws) == ENDLESS == 2**62
    assert draws.epoch_length == N
    with pytest.raises(IndexError):
        draws[-1]


def test_labels_are_those_of_training(data: FaceData) -> None:
    """Noisy ones, not those of the file."""
    noisy = replace(data, labels_N=(data.labels_N + 1) % 3)
    draws = FaceDraws(noisy, TRANSFORM, seed=1)
    for number in range(N):
        assert draws[number].label == (LABELS[draws.row(number)] + 1) % 3


@pytest.mark.parametrize("block", [0, 1, 2, 3, 7, 100])
def test_an_epoch_takes_every_image_once(data: FaceData, block: int) -> None:
    """In a new order each epoch that depends on the seed; asked for in any order."""
    draws = FaceDraws(data, TRANSFORM, seed=1, block=block)
    epochs = [[draws.row(N * e + i) for i in range(N)] for e in range(20)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(N))
    assert len({tuple(epoch) for epoch in epochs}) > 15
    assert [draws.row(n) for n in (80, 3, 79)] == [epochs[11][3], epochs[0][3], epochs[11][2]]
    other = FaceDraws(data, TRANSFORM, seed=2, block=block)
    assert [[other.row(N * e + i) for i in range(N)] for e in range(3)] != epochs[:3]


@pytest.mark.parametrize(("length", "block"), [(1000, 10), (1003, 10), (1003, 64), (15, 1)])
def test_blocks_are_read_together(length: int, block: int) -> None:
    """At most 16 blocks at a time, each of neighbours, all their rows; then mixed."""
    order, rows = Blocks(length, 3, block), []
    rows = [order.row(number) for number in range(length)]
    assert sorted(rows) == list(range(length))
    start = 0
    while start < length:
        pool, sizes = [], Counter(row // block for row in range(length))
        for row in rows[start:]:
            if row // block not in pool and len(pool) == module.POOL:
                break
            pool += [row // block] if row // block not in pool else []
        end = start + sum(sizes[entry] for entry in pool)
        assert sorted(rows[start:end]) == sorted(
            row for entry in pool for row in range(length) if row // block == entry
        )
        start = end
    if length > 500:
        neighbours = np.mean(np.abs(np.diff(rows)) == 1)
        assert neighbours < 0.1  # mixed, not sequential


def test_balanced_draws() -> None:
    """Each class once a round; images of a class alike often; empty classes never."""
    labels = np.array([5] * 90 + [0] * 9 + [2])
    order, rounds = Balanced(labels, 4), 3000
    rows = np.array([order.row(number) for number in range(3 * rounds)])
    by_round = labels[rows].reshape(rounds, 3)
    assert (np.sort(by_round, axis=1) == [0, 2, 5]).all()
    assert len({tuple(entry) for entry in by_round.tolist()}) == 6
    counts = np.bincount(rows, minlength=100)
    for part in (slice(0, 90), slice(90, 99)):
        expected = counts[part].mean()
        square = ((counts[part] - expected) ** 2 / expected).sum()
        assert square < counts[part].size + 4 * np.sqrt(2 * counts[part].size)


@pytest.mark.parametrize(
    "order",
    [Shuffled(50, 1), Blocks(50, 1, 2), Balanced(np.arange(50) // 3, 1)],
    ids=["shuffled", "blocks", "balanced"],
)
def test_orders_are_functions_of_the_number(order: Order) -> None:
    first = [order.row(number) for number in range(200)]
    fresh = pickle.loads(pickle.dumps(order))
    for number in np.random.default_rng(0).permutation(200).tolist():
        assert fresh.row(number) == first[number]


def test_a_draw_is_the_image_the_transform_and_one_generator(data: FaceData) -> None:
    draws = FaceDraws(data, TRANSFORM, seed=3)
    for number in (0, 11, 2**33):
        expected = TRANSFORM.train(
            data.images.read(draws.row(number)), np.random.default_rng([3, number])
        )
        assert torch.equal(draws[number].image, expected)


@pytest.mark.parametrize("options", ORDERS)
def test_draws_depend_on_seed_and_number_only(data: FaceData, options: dict[str, Any]) -> None:
    first = [FaceDraws(data, TRANSFORM, seed=4, **options)[n].image for n in range(20)]
    again = FaceDraws(data, TRANSFORM, seed=4, **options)
    for number in reversed(range(20)):
        assert torch.equal(again[number].image, first[number])
    other = [FaceDraws(data, TRANSFORM, seed=5, **options)[n].image for n in range(20)]
    assert sum(torch.equal(a, b) for a, b in zip(first, other, strict=True)) < 5


def loaded(draws: FaceDraws, workers: int, count: int = 20) -> list[tuple[int, bytes]]:
    loader = DataLoader(
        draws, 4, sampler=ResumableSampler(len(draws), shuffle=False), num_workers=workers,
        worker_init_fn=worker_init, generator=torch.Generator(),
    )  # fmt: skip
    batches = list(islice(loader, count // 4))
    assert batches[0].image.shape == (4, 3, 24, 24)
    assert batches[0].label.dtype == torch.int64
    return [
        (int(label), image.numpy().tobytes())
        for batch in batches
        for image, label in zip(batch.image, batch.label, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("options", [*ORDERS, {"cache": True}])
def test_workers_do_not_matter(data: FaceData, options: dict[str, Any]) -> None:
    """0, 1 and 2 workers give the same images, bad ones included; all are counted."""
    bad = with_bad(data, [2])
    sets = [FaceDraws(bad, TRANSFORM, 1, max_bad_items=30, **options) for _ in range(3)]
    first = loaded(sets[0], 0)
    assert sets[0].bad_items >= 1
    for workers in (1, 2):
        assert loaded(sets[workers], workers) == first
        assert sets[workers].bad_items >= sets[0].bad_items  # they run ahead


def test_a_bad_image_is_replaced(data: FaceData, caplog: pytest.LogCaptureFixture) -> None:
    """Counted, logged with its place; the replacement is a function of seed and number."""
    bad = with_bad(data, [2])
    draws = FaceDraws(bad, TRANSFORM, seed=1, max_bad_items=2)
    number = next(n for n in range(N) if draws.row(n) == 2)
    rng = np.random.default_rng([1, number, 1])
    row = int(rng.integers(N))
    assert row != 2, "choose another seed"
    with caplog.at_level(logging.WARNING):
        item = draws[number]
    assert draws.bad_items == 1
    assert "train.rec key 3: image cannot be decoded" in caplog.text
    assert item.label == LABELS[row]
    assert torch.equal(item.image, TRANSFORM.train(data.images.read(row), rng))
    assert torch.equal(draws[number].image, item.image)
    with pytest.raises(InputError, match=r"train.rec key 3: image cannot be decoded: 8 bytes"):
        draws[number]
    assert draws.bad_items == 3


def test_no_bad_image_is_accepted_by_default(data: FaceData) -> None:
    draws = FaceDraws(with_bad(data, [0]), TRANSFORM)
    with pytest.raises(InputError, match=r"train.rec key 1"):
        [draws[n] for n in range(N)]


def test_ten_tries_for_a_draw(data: FaceData) -> None:
    draws = FaceDraws(with_bad(data, [*range(N)]), TRANSFORM, max_bad_items=99)
    with pytest.raises(InputError, match=r"draw 4: met 10 unreadable images.*train.rec key \d"):
        draws[4]
    assert draws.bad_items == 10


def _visit(draws: FaceDraws, first: int) -> None:
    for number in range(first, first + N):
        draws[number]


def test_counts_and_cache_are_shared_with_workers(data: FaceData) -> None:
    bad = with_bad(data, [6])
    draws = FaceDraws(bad, TRANSFORM, max_bad_items=50, cache=True)
    worker = multiprocessing.get_context("fork").Process(target=_visit, args=(draws, 0))
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0
    assert draws.bad_items >= 1
    assert draws._cache is not None
    assert draws._cache.filled_N.tolist() == [True] * 6 + [False]


def test_cache(data: FaceData) -> None:
    """Cached images give the same views, are read once and are not changed by a view."""
    reads: list[int] = []

    class Counting:
        def __len__(self) -> int:
            return N

        def read(self, row: int) -> np.ndarray:
            reads.append(row)
            return data.images.read(row)

        def label(self, row: int) -> int:
            return data.images.label(row)

        def name(self, row: int) -> str:
            return data.images.name(row)

    transform = FaceTransform(24, erase=1, cutout=1, jitter=0.2)
    cached = FaceDraws(replace(data, images=Counting()), transform, seed=1, cache=True)
    plain = FaceDraws(data, transform, seed=1)
    for number in range(5 * N):
        assert torch.equal(cached[number].image, plain[number].image)
    assert sorted(reads) == [*range(N)]


def test_too_little_shared_memory_is_refused(
    data: FaceData, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    needed = N * (3 * 24 * 24 + 1)
    monkeypatch.setattr(module, "SHARED_MEMORY", tmp_path)
    for free in (needed, needed - 1):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(module.shutil, "disk_usage", lambda _, usage=usage: usage)
        if free == needed:
            assert FaceDraws(data, TRANSFORM, cache=True)[0].image.shape == (3, 24, 24)
    with pytest.raises(InputError, match=r"draws.cache: 7 images need more shared memory than"):
        FaceDraws(data, TRANSFORM, cache=True)


def test_every_image_once_for_features(data: FaceData, tmp_path: Path) -> None:
    """Of a training set, or from paths; not augmented."""
    paths = []
    for row in range(N):
        paths.append(tmp_path / f"{row}.jpg")
        paths[-1].write_bytes(jpeg(row))
    for images in (data.images, paths, [str(path) for path in paths]):
        rows = ImageRows(images, TRANSFORM)
        assert len(rows) == N
        for row in range(N):
            item = rows[row]
            assert item.row == row
            assert torch.equal(item.image, TRANSFORM.test(data.images.read(row)))
        for row in (-1, N):
            with pytest.raises(IndexError):
                rows[row]
    loader = DataLoader(ImageRows(paths, TRANSFORM), 3, sampler=EvalSampler(N))
    assert torch.cat([batch.row for batch in loader]).tolist() == [*range(N)]


def test_features_stop_at_a_bad_image(data: FaceData, tmp_path: Path) -> None:
    rows = ImageRows(with_bad(data, [1]).images, TRANSFORM)
    assert rows[0].row == 0
    with pytest.raises(InputError, match=r"train.rec key 2"):
        rows[1]
    with pytest.raises(InputError, match=r"no.jpg: image cannot be read"):
        ImageRows([tmp_path / "no.jpg"], TRANSFORM)[0]


def test_pickles(data: FaceData) -> None:
    """As a worker that is spawned gets it."""
    draws = pickle.loads(pickle.dumps(FaceDraws(data, TRANSFORM, seed=1)))
    assert torch.equal(draws[3].image, FaceDraws(data, TRANSFORM, seed=1)[3].image)


def test_arguments_are_checked(data: FaceData) -> None:
    for name in ("seed", "max_bad_items", "block"):
        with pytest.raises(ValueError, match=f"{name}=-1"):
            FaceDraws(data, TRANSFORM, **{name: -1})
    with pytest.raises(ValueError, match="block=4 does not"):
        FaceDraws(data, TRANSFORM, balanced=True, block=4)
    empty = replace(data, labels_N=np.empty(0, np.int64))
    with pytest.raises(InputError, match="has no image"):
        FaceDraws(empty, TRANSFORM)
