"""The benchmark of readers compares equal things, and refuses others."""

from pathlib import Path

import numpy as np
import pytest
import torch

from face_lfr.benchmarks import bench_loader, peer_recordio
from face_lfr.benchmarks.bench_loader import (
    BATCH,
    Feed,
    Sets,
    byte_rows,
    decode_rows,
    head_rows,
    loader_rows,
    read_rows,
    write_sets,
)
from face_lfr.data.draws import FaceDraws
from face_lfr.data.recordio import RecordFile, RecordWriter, frame, pack
from face_lfr.data.transforms import FaceTransform

COUNT = 45


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Sets:
    return write_sets(tmp_path_factory.mktemp("sets"), COUNT, 3)


def test_both_sets_hold_the_same(sets: Sets) -> None:
    assert sets.rec.labels_N.tolist() == sets.folder.labels_N.tolist()
    assert sets.rec.num_classes == 3
    assert sorted(sets.order) == [*range(COUNT)]
    for row in range(COUNT):
        assert sets.folder.images.name(row) == sets.paths[row]
        np.testing.assert_array_equal(sets.rec.images.read(row), sets.folder.images.read(row))
    size = np.mean([Path(path).stat().st_size for path in sets.paths])
    assert 5000 < size < 12_000  # a face of MS1MV3 has about 8 KiB
    assert sets.shape == f"45 JPEG of 112x112, {size / 1024:.1f} KiB, random order"


def test_rows(sets: Sets) -> None:
    rows = [*byte_rows(sets, 1), *decode_rows(sets, 1), *head_rows(sets, 1)]
    mxnet, files = "MXNet's reader, in Python", "opening files"
    assert [(entry["name"], entry["peer"]) for entry in rows] == [
        ("read records, pread", files),
        ("read records, pread", mxnet),
        ("read records, mmap", files),
        ("read records, mmap", mxnet),
        ("decode JPEG", "blue first, then turned"),
        ("read and decode records", files),
        ("read and decode records", mxnet),
        ("labels of all records", mxnet),
        ("index", mxnet),
    ]
    for entry in rows:
        assert entry["max_abs_diff"] == 0
        assert entry["ratio"] == pytest.approx(entry["peer_ms"] / entry["ours_ms"])
        count = int(entry["shape"].split()[0])
        assert entry["note"].startswith(f"{1e3 * count / entry['ours_ms']:.3g} against ")
    assert rows[4]["shape"].startswith("9 JPEG")


@pytest.mark.parametrize(
    ("patched", "rows", "message"),
    [
        ("_bytes", byte_rows, "records read by pread and by opening files differ"),
        ("decode", decode_rows, "decode JPEG: pictures differ"),
        ("unpack", head_rows, "labels differ"),
    ],
)
def test_sides_that_differ_are_refused(
    sets: Sets, monkeypatch: pytest.MonkeyPatch, patched: str, rows: object, message: str
) -> None:
    wrong = {
        "_bytes": lambda path: b"other",
        "decode": lambda image: np.zeros((112, 112, 3), np.uint8),
        "unpack": lambda payload: (99.0, b""),
    }[patched]
    place = bench_loader if patched == "_bytes" else peer_recordio
    monkeypatch.setattr(place, patched, wrong)
    with pytest.raises(RuntimeError, match=message):
        list(rows(sets, 1))  # type: ignore[operator]


@pytest.mark.slow
def test_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_loader, "QUICK_IMAGES", 40)
    assert len(list(read_rows(1, quick=True))) == 9
    rows = list(loader_rows(1, quick=True))
    assert [entry["peer"] for entry in rows] == ["files", "decoded images in shared memory"]
    assert all(entry["max_abs_diff"] == 0 for entry in rows)
    assert rows[0]["shape"].startswith(f"3 x {BATCH} of 40 JPEG")


def test_loaders_that_differ_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_loader, "QUICK_IMAGES", 20)
    real, seeds = FaceDraws, iter(range(9))
    monkeypatch.setattr(
        bench_loader, "FaceDraws", lambda data, t, seed, cache: real(data, t, next(seeds))
    )
    with pytest.raises(RuntimeError, match="loaders of records and of files differ"):
        list(loader_rows(1, quick=True))


def test_a_loader_starts_anew_for_every_call(sets: Sets) -> None:
    feed = Feed(FaceDraws(sets.rec, FaceTransform()), 2, 0)
    first, again = list(feed), list(feed)
    assert [item.image.shape for item in first] == [(BATCH, 3, 112, 112)] * 2
    assert all(torch.equal(a.image, b.image) for a, b in zip(first, again, strict=True))
    assert feed.load() == 2 * BATCH


def test_the_peer_reads_what_it_should(tmp_path: Path) -> None:
    """Cut records, arrays of labels; a bad magic stops it."""
    magic = frame(b"")[:4]
    payloads = [pack(3, b"a" + magic * 2 + b"bc"), pack([4, 5], b"xy"), magic * 3]
    with RecordWriter(tmp_path / "a") as writer:
        for key, payload in enumerate(payloads):
            writer.write(key, payload)
    peer = peer_recordio.IndexedReader(tmp_path / "a.idx", tmp_path / "a.rec")
    ours = RecordFile(tmp_path / "a.rec")
    assert [peer.read_idx(key) for key in (2, 0, 1)] == [payloads[key] for key in (2, 0, 1)]
    assert [bytes(ours.read(key)) for key in range(3)] == payloads
    assert peer_recordio.unpack(payloads[0]) == (3.0, b"a" + magic * 2 + b"bc")
    assert peer_recordio.unpack(payloads[1]) == (4.0, b"xy")
    peer.idx[9] = 4
    with pytest.raises(RuntimeError, match="Invalid RecordIO File"):
        peer.read_idx(9)
    peer.close()
