"""RecordIO: the bytes of dmlc-core, every kind of damage by name, workers of both kinds."""

import multiprocessing
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.log import InputError
from face_lfr.benchmarks import peer_recordio
from face_lfr.data import record_index, recordio
from face_lfr.data.record_index import read_index
from face_lfr.data.recordio import RecordFile, RecordWriter, frame, image_of, pack, unpack

MAGIC = struct.pack("<I", 0xCED7230A)
ONE = "0a23d7ce 1b000000 00000000 0000e040 0100000000000000 0000000000000000 4a5047 00"
PAIR = "0a23d7ce 20000000 02000000 00000000 0000000000000000 0000000000000000 00008040 0000c040"
ACCESS = pytest.mark.parametrize("access", ["pread", "mmap"])


def reference_frame(payload: bytes) -> bytes:
    """The loop of dmlc-core's writer, four bytes at a time."""
    out, start, length = b"", 0, len(payload)
    for at in range(0, length >> 2 << 2, 4):
        if payload[at : at + 4] == MAGIC:
            kind = 1 if start == 0 else 2
            out += MAGIC + struct.pack("<I", kind << 29 | at - start) + payload[start:at]
            start = at + 4
    kind = 3 if start else 0
    out += MAGIC + struct.pack("<I", kind << 29 | length - start) + payload[start:]
    return out + b"\0" * ((length + 3 >> 2 << 2) - length)


def write(prefix: Path, payloads: list[bytes], keys: list[int] | None = None) -> RecordFile:
    with RecordWriter(prefix) as writer:
        for key, payload in zip(keys or range(len(payloads)), payloads, strict=True):
            writer.write(key, payload)
    return RecordFile(Path(f"{prefix}.rec"))


def damaged(tmp_path: Path, content: bytes, index: str = "0\t0\n", **options: str) -> RecordFile:
    (tmp_path / "a.rec").write_bytes(content)
    (tmp_path / "a.idx").write_text(index)
    return RecordFile(tmp_path / "a.rec", **options)


PIECES = st.sampled_from([MAGIC, b"", b"\0", b"ab", b"abc", MAGIC[:2], MAGIC[1:], b"x" * 8])
PAYLOADS = st.lists(PIECES, max_size=9).map(b"".join)


def test_check_08_golden_bytes() -> None:
    assert frame(pack(7.0, b"JPG", id=1)).hex() == ONE.replace(" ", "")
    assert frame(pack([4.0, 6.0])).hex() == PAIR.replace(" ", "")
    assert frame(b"") == MAGIC + bytes(4)
    assert frame(MAGIC + b"abcd") == (
        MAGIC + struct.pack("<I", 1 << 29) + MAGIC + struct.pack("<I", 3 << 29 | 4) + b"abcd"
    )


@given(PAYLOADS)
@settings(max_examples=200, deadline=None)
def test_check_08_frames_are_those_of_the_reference(payload: bytes) -> None:
    assert frame(payload) == reference_frame(payload)


@ACCESS
def test_check_08_payloads_with_the_magic_return(tmp_path: Path, access: str) -> None:
    """Split in up to ten parts, empty, long, of every length modulo 4; in random order."""
    rng = np.random.default_rng(0)
    pieces = [MAGIC, MAGIC * 2, b"a", b"ab", b"abc", MAGIC[:3], rng.bytes(40)]
    payloads = [
        b"".join(pieces[k] for k in rng.integers(len(pieces), size=rng.integers(10)))
        for _ in range(200)
    ]
    payloads += [b"", MAGIC, MAGIC * 5, rng.bytes(200_001) + MAGIC * 2 + rng.bytes(70_003)]
    write(tmp_path / "a", payloads)
    file = RecordFile(tmp_path / "a.rec", access=access)
    for key in rng.permutation(len(payloads)):
        assert bytes(file.read(key)) == payloads[key]
    peer = peer_recordio.IndexedReader(tmp_path / "a.idx", tmp_path / "a.rec")
    assert [peer.read_idx(key) for key in range(len(payloads))] == payloads
    peer.close()


def test_pack_and_unpack() -> None:
    record = unpack(pack(3, b"image", id=9, id2=2))
    assert (record.flag, record.label_L.tolist(), record.id, record.id2) == (0, [3.0], 9, 2)
    assert bytes(record.image) == b"image"
    record = unpack(pack(np.array([1.5, -2.0, 7.0]), b"xyz"))
    assert (record.flag, record.label_L.tolist(), record.id) == (3, [1.5, -2.0, 7.0], 0)
    assert bytes(record.image) == b"xyz"
    assert record.label_L.dtype == np.float32
    assert unpack(pack([])).flag == 0
    assert bytes(image_of(pack([1, 2], b"q"))) == b"q"


def test_payloads_that_are_too_short() -> None:
    with pytest.raises(InputError, match=r"a.rec key 3: is shorter than an image header.*: 23"):
        unpack(bytes(23), "a.rec key 3")
    with pytest.raises(InputError, match="needs 36 bytes for header and labels and has: 28"):
        unpack(pack([1, 2, 3])[:-8])


def test_keys_in_any_order_and_with_holes(tmp_path: Path) -> None:
    keys = [7, 0, 3, 1000, 2]
    file = write(tmp_path / "a", [b"%d" % key for key in keys], keys)
    assert list(file.keys) == sorted(keys)
    assert [bytes(file.read(key)) for key in keys] == [b"%d" % key for key in keys]
    assert [file.position(key) for key in sorted(keys)] == [0, 1, 2, 3, 4]
    for key in (-1, 1, 4, 1001):
        with pytest.raises(InputError, match=rf"a.idx: index has no key: {key}"):
            file.read(key)
    dense = write(tmp_path / "b", [b"x", b"y"], [4, 5])
    assert dense.keys == range(4, 6)
    with pytest.raises(InputError, match=r"b.idx: index has no key: 6"):
        dense.read(6)


def test_an_index_of_some_records(tmp_path: Path) -> None:
    """The span to the next known record is longer than the record."""
    write(tmp_path / "a", [b"one", bytes(100_000), b"three"])
    lines = (tmp_path / "a.idx").read_text().splitlines(keepends=True)
    (tmp_path / "b.idx").write_text(lines[0] + lines[2])
    file = RecordFile(tmp_path / "a.rec", tmp_path / "b.idx")
    assert [bytes(file.read(key)) for key in (0, 2)] == [b"one", b"three"]


@ACCESS
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b"\x0b" + b[1:], r"bad magic at byte 0, not 0xced7230a: 0xced7230b"),
        (lambda b: b[:20], r"the file ends inside the record; 27 .* there are: 12"),
        (lambda b: b[:8], r"the file ends inside the record; 27 .* there are: 0"),
        (lambda b: b[:4] + struct.pack("<I", 4000) + b[8:], r"4000 bytes .* there are: 28"),
        (lambda b: b[:4] + struct.pack("<I", 2 << 29 | 27) + b[8:], r"at its start a part .*: 2"),
        (lambda b: b[:4] + struct.pack("<I", 3 << 29 | 27) + b[8:], r"at its start a part .*: 3"),
        (lambda b: b[:4] + struct.pack("<I", 7 << 29 | 27) + b[8:], r"at its start a part .*: 7"),
        (lambda b: b[:4] + struct.pack("<I", 1 << 29 | 27) + b[8:], r"ends inside .* byte: 36"),
    ],
)
def test_check_08_damage_is_named(
    tmp_path: Path, damage: Callable[[bytes], bytes], message: str, access: str
) -> None:
    file = damaged(tmp_path, damage(frame(pack(7.0, b"JPG"))), access=access)
    for call in (lambda: file.read(0), file.scan):
        with pytest.raises(InputError, match=rf"a\.rec key 0: .*{message}"):
            call()


@pytest.mark.parametrize(("kind", "shown"), [(0, 0), (1, 1), (5, 5)])
def test_check_08_parts_in_a_wrong_order(tmp_path: Path, kind: int, shown: int) -> None:
    first = MAGIC + struct.pack("<I", 1 << 29 | 4) + b"abcd"
    second = MAGIC + struct.pack("<I", kind << 29 | 4) + b"efgh"
    file = damaged(tmp_path, first + second)
    with pytest.raises(InputError, match=rf"a.rec key 0: has after a first .* of kind: {shown}"):
        file.read(0)


def test_a_bad_magic_in_a_later_part(tmp_path: Path) -> None:
    content = bytearray(frame(b"abcd" + MAGIC + b"efgh"))
    content[12] = 0
    with pytest.raises(InputError, match=r"a.rec key 0: bad magic at byte 12"):
        damaged(tmp_path, bytes(content)).read(0)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("0\t36\n", r"a.idx key 0: offset is no record of a file of 36 bytes: 36"),
        ("0\t0\n1\t99999\n", r"a.idx key 1: offset is no record of a file of 36 bytes: 99999"),
        ("0\t2\n", r"a.idx key 0: offset is no record .*: 2"),
        ("0\t0\n1\t0\n", r"a.idx key 1: has the offset of another key: 0"),
        ("0\t0\n0\t8\n", r"a.idx: index has a key twice: 0"),
        ("", r"a.idx: index is empty"),
        ("0\t0\nx\t8\n", r"a.idx line 2: is not <key><tab><offset>: 'x\\t8'"),
        ("0 0\n", r"a.idx line 1: is not"),
        ("0\t0\n\n1\t8\n", r"a.idx line 2: is not .*: ''"),
        ("0\t0\n1\n", r"a.idx line 2: is not .*: '1'"),
        ("0\t0\t3\n", r"a.idx line 1: is not"),
        ("-1\t0\n", r"a.idx line 1: is not .*: '-1\\t0'"),
        ("0\t1234567890123456789\n", r"a.idx line 1: is not"),
    ],
)
def test_check_08_a_wrong_index_is_named(tmp_path: Path, index: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        damaged(tmp_path, frame(pack(7.0, b"JPG")), index)


def test_index_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unsorted lines, other line ends, no end of the last line; parsed in pieces of any size."""
    rng = np.random.default_rng(0)
    keys = rng.permutation(10**6)[:300]
    offsets = rng.integers(10**17, size=300) * 4
    lines = [f"{key}\t{offset}" for key, offset in zip(keys, offsets, strict=True)]
    path = tmp_path / "a.idx"
    order = np.argsort(keys)
    for end, piece in (("\n", 1), ("\r\n", 100), ("\n", 1 << 20)):
        monkeypatch.setattr(record_index, "PIECE", piece)
        path.write_bytes(end.join(lines).encode())
        found = read_index(path)
        assert [column.tolist() for column in found] == [
            keys[order].tolist(),
            offsets[order].tolist(),
        ]


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a.rec: records cannot be read: No such file"):
        RecordFile(tmp_path / "a.rec")
    (tmp_path / "a.rec").write_bytes(frame(b"abc"))
    with pytest.raises(InputError, match=r"a.idx: index cannot be read: No such file"):
        RecordFile(tmp_path / "a.rec")
    with pytest.raises(ValueError, match="access='disk'; accepted: pread, mmap"):
        RecordFile(tmp_path / "a.rec", access="disk")
    file = write(tmp_path / "b", [b"abc"])
    os.remove(tmp_path / "b.rec")
    with pytest.raises(InputError, match=r"b.rec: records cannot be read: No such file"):
        file.read(0)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    file = write(tmp_path / "a", [b"x" * 50, b"y" * 50])
    assert bytes(file.read(0)) == b"x" * 50
    os.truncate(tmp_path / "a.rec", 70)
    with pytest.raises(InputError, match=r"a.rec key 1: the file ends inside the record"):
        file.read(1)


def scanned(payloads: list[bytes], tmp_path: Path) -> None:
    heads = write(tmp_path / "s", payloads).scan()
    records = [unpack(payload) for payload in payloads]
    assert heads.flag_N.tolist() == [record.flag for record in records]
    assert heads.label_N.tolist() == [float(record.label_L[0]) for record in records]
    assert heads.image_N.tolist() == [len(record.image) for record in records]


def test_scan_is_unpack_of_every_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scalar and array labels, cut records (also inside the header), short ones at the end."""
    monkeypatch.setattr(recordio, "SCAN", 7)
    rng = np.random.default_rng(1)
    inside = int.from_bytes(MAGIC, "little")
    payloads = []
    for number in range(60):
        label = number if number % 3 else [number, 2.0, 3.0][: 1 + number % 2 * 2]
        image = rng.bytes(int(rng.integers(30))) + MAGIC * (number % 5 == 0) + rng.bytes(3)
        payloads.append(pack(label, image, id=inside if number % 7 == 0 else number))
    scanned([*payloads, pack(5.0)], tmp_path)
    scanned([*payloads, pack([5.0])], tmp_path)
    part = write(tmp_path / "p", payloads).scan(10, 30)
    assert part.label_N.tolist() == [float(unpack(p).label_L[0]) for p in payloads[10:30]]
    assert len(write(tmp_path / "p", payloads).scan(3, 3).label_N) == 0


def test_scan_refuses_payloads_without_room_for_their_header(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"s.rec key 1: is shorter than an image header"):
        scanned([pack(1.0), b"short", pack(2.0)], tmp_path)
    file = write(tmp_path / "s", [pack(1.0), pack([1.0, 2.0])[:28]])
    with pytest.raises(InputError, match=r"s.rec key 1: needs 32 bytes"):
        file.scan()


def _start(writer: RecordWriter, path: Path) -> None:
    writer.write(0, b"new")
    assert bytes(RecordFile(path).read(0)) == b"old"
    writer.write(-1, b"")


def test_the_writer_is_atomic(tmp_path: Path) -> None:
    write(tmp_path / "a", [b"old"])
    with pytest.raises(ValueError, match="key=-1"), RecordWriter(tmp_path / "a") as writer:
        _start(writer, tmp_path / "a.rec")
    assert sorted(os.listdir(tmp_path)) == ["a.idx", "a.rec"]
    assert bytes(RecordFile(tmp_path / "a.rec").read(0)) == b"old"
    assert bytes(write(tmp_path / "a", [b"new"]).read(0)) == b"new"
    assert (tmp_path / "a.idx").read_text() == "0\t0\n"


def test_the_writer_checks_its_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="key=-1"), RecordWriter(tmp_path / "a") as writer:
        writer.write(-1, b"")
    monkeypatch.setattr(recordio, "LIMIT", 100)
    assert frame(bytes(99))
    with pytest.raises(ValueError, match="payload of 100 bytes; a record holds less than 100"):
        frame(bytes(100))


@ACCESS
def test_a_pickle_holds_no_handle(tmp_path: Path, access: str) -> None:
    write(tmp_path / "a", [b"zero", b"one"])
    file = RecordFile(tmp_path / "a.rec", access=access)
    view = file.read(1)
    again = pickle.loads(pickle.dumps(file))
    assert bytes(again.read(1)) == b"one"
    file.close()
    assert bytes(view) == b"one"
    assert bytes(file.read(0)) == b"zero"


def _read_all(file: RecordFile, seed: int, out: "multiprocessing.Queue[bytes]") -> None:
    order = np.random.default_rng(seed).permutation(len(file))
    out.put(b"".join(bytes(file.read(key)) for key in order))


@ACCESS
def test_check_08_forked_workers_share_an_open_file(tmp_path: Path, access: str) -> None:
    """Three processes read at once, in different orders, through the parent's handle."""
    rng = np.random.default_rng(0)
    payloads = [rng.bytes(int(rng.integers(1, 2000))) for _ in range(300)]
    write(tmp_path / "a", payloads)
    file = RecordFile(tmp_path / "a.rec", access=access)
    file.read(5)
    context = multiprocessing.get_context("fork")
    queues = [context.Queue() for _ in range(3)]
    workers = [
        context.Process(target=_read_all, args=(file, seed, queue))
        for seed, queue in enumerate(queues)
    ]
    for worker in workers:
        worker.start()
    for seed, queue in enumerate(queues):
        order = np.random.default_rng(seed).permutation(300)
        assert queue.get(timeout=60) == b"".join(payloads[key] for key in order)
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
