"""Speed of reading training sets.

The group `read` of `python -m face_lfr.benchmarks`: records against JPEG files of a folder, and
against a port of MXNet's reader (`peer_recordio.py`), reading and decoding apart; labels and index
of a whole file. The group `loader`: training batches through a DataLoader, records against files,
and decoded images in shared memory. All reads are in random order and from the page cache, so the
rows say what a processor does, not what a disk does.

Bytes, images and labels are compared before they are timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from common.seed import worker_init
from face_lfr.benchmarks import peer_recordio
from face_lfr.benchmarks.results import Row, measure, row
from face_lfr.data.draws import FaceDraws
from face_lfr.data.face_data import FaceData
from face_lfr.data.folder import load_folder
from face_lfr.data.rec import load_rec, scan_labels, write_rec
from face_lfr.data.record_index import read_index
from face_lfr.data.recordio import RecordFile, image_of
from face_lfr.data.transforms import FaceTransform, decode_rgb, read_rgb

IMAGES, QUICK_IMAGES = 10_000, 500
PER_CLASS = 20
SIZE = 112  # pixels, as in all published sets
DIFFERENT = 250  # pictures drawn; the files repeat them
QUALITY = 95  # of the JPEGs, as in insightface's files
BATCH = 128

Read = Callable[[int], bytes | memoryview]


class Sets(NamedTuple):
    """The same images as records and as files; `paths` in the order of the records."""

    rec: FaceData
    folder: FaceData
    paths: list[str]
    order: list[int]

    @property
    def shape(self) -> str:
        """Text for the result row."""
        size = sum(Path(path).stat().st_size for path in self.paths) / len(self.paths)
        return f"{len(self.paths)} JPEG of {SIZE}x{SIZE}, {size / 1024:.1f} KiB, random order"


def write_sets(root: Path, count: int, seed: int = 0) -> Sets:
    """Write `count` images of `count` / 20 classes both ways."""
    rng = np.random.default_rng(seed)
    pictures = [_picture(rng) for _ in range(min(count, DIFFERENT))]
    labels = [number // PER_CLASS for number in range(count)]
    items = [(pictures[k % len(pictures)], label) for k, label in enumerate(labels)]
    write_rec(root / "rec", items, labels[-1] + 1)
    paths = []
    for number, (picture, label) in enumerate(items):
        path = root / "folder" / f"{label:05d}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture)
        paths.append(str(path))
    order = rng.permutation(count).tolist()
    return Sets(load_rec(root / "rec"), load_folder(root / "folder"), paths, order)


def _picture(rng: np.random.Generator) -> bytes:
    """A JPEG with about the bytes of a photograph: smooth, with a little noise."""
    import cv2

    coarse = rng.integers(0, 256, (14, 14, 3), dtype=np.uint8)
    image = cv2.resize(coarse, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)
    noisy = image + rng.normal(0, 6, image.shape)
    pixels = noisy.clip(0, 255).astype(np.uint8)
    return bytes(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1])


def read_rows(repeats: int, quick: bool = False, seed: int = 0) -> Iterator[Row]:
    """Reading, decoding, labels and index, on one thread.

    Args:
        repeats: timed calls of each side.
        quick: fewer images.
        seed: of images and order.

    Raises:
        RuntimeError: two sides differ.
    """
    with TemporaryDirectory() as folder:
        sets = write_sets(Path(folder), QUICK_IMAGES if quick else IMAGES, seed)
        yield from byte_rows(sets, repeats)
        yield from decode_rows(sets, repeats)
        yield from head_rows(sets, repeats)


def byte_rows(sets: Sets, repeats: int) -> Iterator[Row]:
    """Encoded images: our two ways of access against opening files and against MXNet's reader.

    Every image is copied once to the same place, because a view of a mapped file reads nothing.
    """
    rec, idx = sets.rec.root / "train.rec", sets.rec.root / "train.idx"
    peer = peer_recordio.IndexedReader(idx, rec)
    peers: dict[str, Read] = {
        "opening files": lambda k: _bytes(sets.paths[k]),
        "MXNet's reader, in Python": lambda k: peer_recordio.unpack(peer.read_idx(k + 1))[1],
    }
    place = memoryview(bytearray(1 << 20))

    def all_of(read: Read) -> None:
        for k in sets.order:
            image = read(k)
            place[: len(image)] = image

    for access in ("pread", "mmap"):
        records = RecordFile(rec, access=access)
        ours = partial(_image, records)
        for name, theirs in peers.items():
            if any(bytes(ours(k)) != theirs(k) for k in sets.order):
                raise RuntimeError(f"records read by {access} and by {name} differ")
            call, other = partial(all_of, ours), partial(all_of, theirs)
            yield _timed(f"read records, {access}", sets.shape, name, call, other, repeats)
        records.close()
    peer.close()


def _image(records: RecordFile, number: int) -> memoryview:
    return image_of(records.read(number + 1))


def _bytes(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()


def decode_rows(sets: Sets, repeats: int) -> Iterator[Row]:
    """Decoding alone, then reading and decoding."""
    order = sets.order[: max(1, len(sets.order) // 5)]
    encoded = [_bytes(sets.paths[k]) for k in order]
    rec, idx = sets.rec.root / "train.rec", sets.rec.root / "train.idx"
    peer = peer_recordio.IndexedReader(idx, rec)
    images = sets.rec.images

    def theirs() -> list[np.ndarray]:
        read = (peer_recordio.unpack(peer.read_idx(k + 1)) for k in order)
        return [peer_recordio.decode(image) for _, image in read]

    calls: list[tuple[str, str, Callable[[], Any], Callable[[], Any]]] = [
        (
            "decode JPEG",
            "blue first, then turned",
            lambda: [decode_rgb(data, "") for data in encoded],
            lambda: [peer_recordio.decode(data) for data in encoded],
        ),
        (
            "read and decode records",
            "opening files",
            lambda: [images.read(k) for k in order],
            lambda: [read_rgb(sets.paths[k]) for k in order],
        ),
        (
            "read and decode records",
            "MXNet's reader, in Python",
            lambda: [images.read(k) for k in order],
            theirs,
        ),
    ]
    shape = sets.shape.replace(str(len(sets.paths)), str(len(order)), 1)
    for name, against, call, other in calls:
        if any((a != b).any() for a, b in zip(call(), other(), strict=True)):
            raise RuntimeError(f"{name}: pictures differ from {against}")
        yield _timed(name, shape, against, call, other, repeats, len(order))
    peer.close()


def head_rows(sets: Sets, repeats: int) -> Iterator[Row]:
    """Labels of all records, and the index, without the labels' cache."""
    rec, idx = sets.rec.root / "train.rec", sets.rec.root / "train.idx"
    count, peer = len(sets.paths), peer_recordio.IndexedReader(idx, rec)
    records, name = RecordFile(rec), "MXNet's reader, in Python"
    shape = f"{count} records"

    def labels() -> np.ndarray:
        return scan_labels(records, 1, count)

    def their_labels() -> list[float]:
        return [peer_recordio.unpack(peer.read_idx(k + 1))[0] for k in range(count)]

    def their_index() -> None:
        peer_recordio.IndexedReader(idx, rec).close()

    if labels().tolist() != their_labels():
        raise RuntimeError("labels differ")
    yield _timed("labels of all records", shape, name, labels, their_labels, repeats, count)
    if dict(zip(*(column.tolist() for column in read_index(idx)), strict=True)) != peer.idx:
        raise RuntimeError("indices differ")
    yield _timed("index", shape, name, lambda: read_index(idx), their_index, repeats, count)
    peer.close()


class Feed:
    """A loader of training faces that starts anew, workers included, for every call."""

    def __init__(self, dataset: FaceDraws, batches: int, workers: int) -> None:
        self.dataset, self.batches, self.workers = dataset, batches, workers

    def __iter__(self) -> Iterator[Any]:
        return iter(
            DataLoader(
                self.dataset,
                batch_size=BATCH,
                sampler=range(BATCH * self.batches),
                num_workers=self.workers,
                worker_init_fn=worker_init,
                generator=torch.Generator(),
            )
        )

    def load(self) -> int:
        """Read everything; returns the number of images."""
        return sum(len(item.image) for item in self)


def loader_rows(repeats: int, quick: bool = False, seed: int = 0) -> Iterator[Row]:
    """Training batches; workers are as many as threads, or none for a single thread.

    Args:
        repeats: timed calls of each side.
        quick: fewer images and batches.
        seed: of images and draws.

    Raises:
        RuntimeError: the loaders' images differ.
    """
    threads = torch.get_num_threads()
    workers = min(threads, 16) if threads > 1 else 0
    batches = 3 if quick else 40
    with TemporaryDirectory() as folder:
        sets = write_sets(Path(folder), QUICK_IMAGES if quick else IMAGES, seed)
        feeds = {
            name: Feed(FaceDraws(data, FaceTransform(), seed, cache=cache), batches, workers)
            for name, data, cache in (
                ("records", sets.rec, False),
                ("files", sets.folder, False),
                ("decoded images in shared memory", sets.rec, True),
            )
        }
        shape = f"{batches} x {BATCH} of {sets.shape}, {workers} workers"
        ours = feeds.pop("records")
        for peer, other in feeds.items():
            for a, b in zip(ours, other, strict=True):
                if not all(torch.equal(x, y) for x, y in zip(a, b, strict=True)):
                    raise RuntimeError(f"loaders of records and of {peer} differ")
            count = batches * BATCH
            yield _timed("load records", shape, peer, ours.load, other.load, repeats, count)


def _timed(
    name: str,
    shape: str,
    peer: str,
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    repeats: int,
    count: int | None = None,
) -> Row:
    """A row of equal results, with the rates of both sides."""
    timed: Mapping[str, Any] = measure(ours, theirs, repeats)
    number = int(shape.split()[0]) if count is None else count
    rates = (f"{1e3 * number / timed[f'{side}_ms']:.3g}" for side in ("ours", "peer"))
    note = f"{' against '.join(rates)} images/s"
    note += f"; {timed['note']}" if "note" in timed else ""
    return row(name, shape, peer) | dict(timed) | {"max_abs_diff": 0.0, "note": note}
