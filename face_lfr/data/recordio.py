"""MXNet RecordIO files without MXNet: framing, index, image headers; a reader and a writer.

Framing (dmlc-core, src/recordio.cc), little-endian: magic, length word, payload, zero bytes up to
a multiple of 4. The length word is kind << 29 | length. A payload that holds the magic at a
multiple of 4 is cut there: the magic itself is left out and the parts have the kinds 1 (first),
2 (middle) and 3 (last) instead of 0 (whole). The payload (apache/mxnet, python/mxnet/recordio.py)
starts with `IfQQ`: flag, label, id, id2; with a flag above 0 that many float32 labels follow, then
the bytes of an image.

Letters: N records in the order of their keys, L labels of a record.
"""

import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple, Self

import numpy as np

from common.log import InputError
from face_lfr.data.record_index import read_index

MAGIC = 0xCED7230A
LIMIT = 1 << 29  # a length has 29 bits
WHOLE, FIRST, MIDDLE, LAST = range(4)
FIRST_READ = 1 << 16  # bytes; faces of 112 pixels need less, so that one read gets all of them
SCAN = 1 << 20  # records scanned at once
ACCESS = ("pread", "mmap")
_MAGIC = struct.pack("<I", MAGIC)
_FRAME = struct.Struct("<II")
_FLAG = struct.Struct("<I")
_HEADER = struct.Struct("<IfQQ")


class Record(NamedTuple):
    """A payload taken apart: `label_L` float32 (one number when `flag` is 0), `image` encoded."""

    flag: int
    label_L: np.ndarray
    id: int
    id2: int
    image: memoryview


class Heads(NamedTuple):
    """What the headers of N records say: flag, first label, bytes of the image."""

    flag_N: np.ndarray
    label_N: np.ndarray
    image_N: np.ndarray


def pack(
    label: float | Sequence[float] | np.ndarray, image: bytes = b"", id: int = 0, id2: int = 0
) -> bytes:
    """Payload of a label, or of an array of them, and an encoded image."""
    if np.ndim(label) == 0:
        return _HEADER.pack(0, label, id, id2) + image
    label_L = np.asarray(label, dtype="<f4")
    return _HEADER.pack(label_L.size, 0.0, id, id2) + label_L.tobytes() + image


def unpack(payload: bytes | memoryview, where: object = "record") -> Record:
    """Take a payload apart; nothing is copied.

    Args:
        payload: as `RecordFile.read` returns it.
        where: name of the record, for messages.

    Raises:
        InputError: it is too short for what its header says.
    """
    image = image_of(payload, where)
    flag, label, id, id2 = _HEADER.unpack_from(payload)
    if not flag:
        return Record(0, np.array([label], dtype=np.float32), id, id2, image)
    label_L = np.frombuffer(payload, "<f4", flag, _HEADER.size)
    return Record(flag, label_L, id, id2, image)


def image_of(payload: bytes | memoryview, where: object = "record") -> memoryview:
    """The encoded image of a payload, possibly empty; `InputError` as `unpack`."""
    size = len(payload)
    if size < _HEADER.size:
        raise InputError(where, f"is shorter than an image header of {_HEADER.size} bytes", size)
    start = _HEADER.size + 4 * _FLAG.unpack_from(payload)[0]
    if size < start:
        raise InputError(where, f"needs {start} bytes for header and labels and has", size)
    return memoryview(payload)[start:]


def frame(payload: bytes) -> bytes:
    """The bytes that dmlc-core's writer produces for one record.

    Raises:
        ValueError: the payload has 2**29 bytes or more.
    """
    if len(payload) >= LIMIT:
        raise ValueError(f"payload of {len(payload)} bytes; a record holds less than {LIMIT}")
    starts = [0, *(cut + 4 for cut in _cuts(payload))]
    ends = [*(start - 4 for start in starts[1:]), len(payload)]
    kinds = [FIRST, *[MIDDLE] * (len(starts) - 2), LAST] if len(starts) > 1 else [WHOLE]
    parts = []
    for kind, start, end in zip(kinds, starts, ends, strict=True):
        parts += [_FRAME.pack(MAGIC, kind << 29 | end - start), payload[start:end]]
    return b"".join(parts) + bytes(-len(payload) % 4)


def _cuts(payload: bytes) -> Iterator[int]:
    """Where the magic stands at a multiple of 4."""
    at = payload.find(_MAGIC)
    while at >= 0:
        if at % 4 == 0:
            yield at
        at = payload.find(_MAGIC, at + (4 if at % 4 == 0 else 1))


class RecordFile:
    """Random access to a RecordIO file by key.

    Nothing is open before the first read. Reads do not move a file position, so that forked
    workers may share one; a pickle holds the index and no handle. With "pread" a record is one
    system call of its exact size, which suits disks and network file systems, and a file that
    shrinks while it is read is an error; with "mmap" records are views of the page cache and
    nothing is copied, but a file that shrinks ends the process.

    Args:
        rec: the records.
        idx: their index; by default beside them, with the suffix .idx.
        access: "pread" or "mmap".

    Attributes:
        keys: of the N records, ascending; a `range` when they have no hole.

    Raises:
        ValueError: another access.
        InputError: as `read_index`; the records cannot be read; an offset is not that of a record
            within the file, or occurs twice.
    """

    def __init__(self, rec: Path | str, idx: Path | str | None = None, access: str = "pread"):
        if access not in ACCESS:
            raise ValueError(f"access={access!r}; accepted: {', '.join(ACCESS)}")
        self.rec = Path(rec)
        self.idx = self.rec.with_suffix(".idx") if idx is None else Path(idx)
        self.access = access
        self._file: IO[bytes] | None = None
        self._map: memoryview | None = None
        try:
            self.size = self.rec.stat().st_size
        except OSError as error:
            raise InputError(self.rec, "records cannot be read", error.strerror or "") from error
        key_N, self._offset_N = read_index(self.idx)
        dense = key_N[-1] - key_N[0] + 1 == len(key_N)
        self.keys = range(key_N[0], key_N[-1] + 1) if dense else key_N
        self._end_N = self._ends()

    def _ends(self) -> np.ndarray:
        """Where the record behind each one begins; the last ends with the file."""
        offset_N = self._offset_N
        wrong = (offset_N > self.size - _FRAME.size) | (offset_N % 4 != 0)
        if wrong.any():
            row = int(wrong.argmax())
            what = f"offset is no record of a file of {self.size} bytes"
            raise InputError(f"{self.idx} key {self.keys[row]}", what, offset_N[row])
        order_N = np.argsort(offset_N, kind="stable")
        next_N = np.append(offset_N[order_N][1:], self.size)
        same = np.flatnonzero(next_N == offset_N[order_N])
        if len(same):
            row = order_N[same[0] + 1]
            what = "has the offset of another key"
            raise InputError(f"{self.idx} key {self.keys[row]}", what, offset_N[row])
        end_N = np.empty_like(offset_N)
        end_N[order_N] = next_N
        return end_N

    def __len__(self) -> int:
        return len(self._offset_N)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_file": None, "_map": None}

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            self.close()

    def close(self) -> None:
        """Close the file; the next read opens it again. Views of a mapped file stay valid."""
        if self._file is not None:
            self._file.close()
        self._file, self._map = None, None

    def name(self, position: int) -> str:
        """The record at a position of `keys`, for messages."""
        return f"{self.rec} key {self.keys[position]}"

    def position(self, key: int) -> int:
        """Position of a key in `keys`.

        Raises:
            InputError: the index has no such key.
        """
        if isinstance(self.keys, range):
            if key in self.keys:
                return key - self.keys.start
        else:
            found = int(np.searchsorted(self.keys, key))
            if found < len(self.keys) and self.keys[found] == key:
                return found
        raise InputError(self.idx, "index has no key", key)

    def read(self, key: int) -> memoryview:
        """Payload of a key; `InputError` as `position` and `read_at`."""
        return self.read_at(self.position(key))

    def read_at(self, position: int) -> memoryview:
        """Payload of the record at a position of `keys`.

        Raises:
            InputError: no magic there, the record goes past the end of the file, or its parts are
                in no valid order. Names file and key.
        """
        offset = int(self._offset_N[position])
        data = self._bytes(offset, min(int(self._end_N[position]) - offset, FIRST_READ))
        if len(data) >= _FRAME.size:
            magic, word = _FRAME.unpack_from(data)
            # A word below 2**29 is the length of a record in one piece.
            if magic == MAGIC and word <= len(data) - _FRAME.size:
                return data[_FRAME.size : _FRAME.size + word]
        return self._join(offset, self.name(position))

    def _bytes(self, offset: int, size: int) -> memoryview:
        if self._file is None:
            self._open()
        if self._map is not None:
            return self._map[offset : offset + size]
        assert self._file is not None
        return memoryview(os.pread(self._file.fileno(), size, offset))

    def _open(self) -> None:
        try:
            self._file = self.rec.open("rb", buffering=0)
            if self.access == "mmap":
                whole = mmap.mmap(self._file.fileno(), 0, prot=mmap.PROT_READ)
                self._map = memoryview(whole)
        except OSError as error:
            raise InputError(self.rec, "records cannot be read", error.strerror or "") from error

    def _join(self, offset: int, where: str) -> memoryview:
        """A record of any size and number of parts, with every check."""
        parts: list[memoryview] = []
        while True:
            kind, part = self._part(offset, where)
            if kind not in ((MIDDLE, LAST) if parts else (WHOLE, FIRST)):
                before = "after a first or middle part" if parts else "at its start"
                raise InputError(where, f"has {before} a part of kind", kind)
            parts.append(part)
            if kind in (WHOLE, LAST):
                return parts[0] if kind == WHOLE else memoryview(_MAGIC.join(parts))
            offset += _FRAME.size + len(part) + -len(part) % 4

    def _part(self, offset: int, where: str) -> tuple[int, memoryview]:
        head = self._bytes(offset, _FRAME.size)
        if len(head) < _FRAME.size:
            raise InputError(where, "the file ends inside the record, at byte", offset + len(head))
        magic, word = _FRAME.unpack(head)
        if magic != MAGIC:
            raise InputError(where, f"bad magic at byte {offset}, not {MAGIC:#x}", f"{magic:#x}")
        kind, length = word >> 29, word & (LIMIT - 1)
        part = self._bytes(offset + _FRAME.size, length)
        if len(part) < length:
            what = f"the file ends inside the record; {length} bytes from byte {offset}, there are"
            raise InputError(where, what, len(part))
        return kind, part

    def scan(self, first: int = 0, last: int | None = None) -> Heads:
        """Headers of the records at the positions [first, last), without decoding any image.

        Whole arrays are gathered from the mapped file; only a record that is cut or damaged is
        looked at by itself.

        Raises:
            InputError: as `read_at` and `unpack`.
        """
        last = len(self) if last is None else last
        starts = range(first, last, SCAN)
        chunks = [self._scan(start, min(start + SCAN, last)) for start in starts]
        columns = zip(*chunks, strict=True) if chunks else ((np.empty(0),) for _ in range(3))
        return Heads(*(np.concatenate(column) for column in columns))

    def _scan(self, first: int, last: int) -> Heads:
        byte = np.asarray(np.memmap(self.rec, np.uint8, "r"))
        word = byte[: len(byte) // 4 * 4].view("<u4")
        at_N = self._offset_N[first:last] // 4
        length_N, flag_N = (self._word(word, at_N + k) for k in (1, 2))
        one_N, many_N = (self._word(word, at_N + k).view("<f4") for k in (3, 8))
        label_N = np.where(flag_N == 0, one_N, many_N)
        image_N = length_N.astype(np.int64) - _HEADER.size - 4 * flag_N.astype(np.int64)
        end_N = self._offset_N[first:last] + _FRAME.size + length_N
        odd_N = (word[at_N] != MAGIC) | (length_N >= LIMIT) | (image_N < 0) | (end_N > self.size)
        for row in np.flatnonzero(odd_N):  # raises for all that is not just cut in parts
            record = unpack(self.read_at(first + int(row)), self.name(first + int(row)))
            flag_N[row], label_N[row] = record.flag, record.label_L[0]
            image_N[row] = len(record.image)
        return Heads(flag_N, label_N, image_N)

    @staticmethod
    def _word(word: np.ndarray, at_N: np.ndarray) -> np.ndarray:
        """Words at any place; behind the end the last one, which no whole record needs."""
        return word[np.minimum(at_N, len(word) - 1)]


class RecordWriter:
    """Writes `<prefix>.rec` and `<prefix>.idx`; both appear, complete, when the block ends.

    Until then there are only files ending in .tmp, which an exception removes. Keys are not
    compared with one another; a reader refuses a repeated one.

        with RecordWriter(root / "train") as writer:
            writer.write(1, pack(7, jpeg))
    """

    def __init__(self, prefix: Path | str):
        self.rec, self.idx = Path(f"{prefix}.rec"), Path(f"{prefix}.idx")
        self._files: list[IO[bytes]] = []
        self._at = 0

    def __enter__(self) -> Self:
        self.rec.parent.mkdir(parents=True, exist_ok=True)
        self._files = [Path(f"{path}.tmp").open("wb") for path in (self.rec, self.idx)]
        return self

    def write(self, key: int, payload: bytes) -> None:
        """Append a record; `ValueError` as `frame`, and for a negative key."""
        if key < 0:
            raise ValueError(f"key={key} must not be negative")
        framed = frame(payload)
        self._files[0].write(framed)
        self._files[1].write(b"%d\t%d\n" % (key, self._at))
        self._at += len(framed)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files:
            file.close()
        if kind is not None:
            for file in self._files:
                Path(file.name).unlink(missing_ok=True)
            return
        self.idx.unlink(missing_ok=True)  # never an old index beside new records
        for file, path in zip(self._files, (self.rec, self.idx), strict=True):
            os.replace(file.name, path)
