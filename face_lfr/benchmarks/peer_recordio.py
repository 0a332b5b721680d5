"""The usual way of reading RecordIO, for comparison.

A port to Python of MXNet's indexed reader (apache/mxnet, python/mxnet/recordio.py) on top of
dmlc-core's stream reader (src/recordio.cc), which is C++ there: a dictionary of the index, a seek,
a read of the frame, a read of the padded payload into a growing buffer; `unpack` slices copies.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

MAGIC = 0xCED7230A


class IndexedReader:
    """Records of a file by key."""

    def __init__(self, idx: Path, rec: Path):
        self.idx: dict[int, int] = {}
        with open(idx) as lines:
            for line in iter(lines.readline, ""):
                words = line.strip().split("\t")
                self.idx[int(words[0])] = int(words[1])
        self.stream = open(rec, "rb")

    def close(self) -> None:
        """Close the records."""
        self.stream.close()

    def read_idx(self, key: int) -> bytes:
        """Payload of a key."""
        self.stream.seek(self.idx[key])
        return self.read()

    def read(self) -> bytes:
        """Payload of the record at the position of the stream."""
        record = bytearray()
        while True:
            magic, word = struct.unpack("<II", self.stream.read(8))
            if magic != MAGIC:
                raise RuntimeError("Invalid RecordIO File")
            kind, length = word >> 29 & 7, word & (1 << 29) - 1
            record += self.stream.read((length + 3) // 4 * 4)
            del record[len(record) - -length % 4 :]
            if kind in (0, 3):
                return bytes(record)
            record += struct.pack("<I", MAGIC)


def unpack(payload: bytes) -> tuple[float, bytes]:
    """Label (the first of several) and encoded image."""
    flag, label, _, _ = struct.unpack("IfQQ", payload[:24])
    rest = payload[24:]
    if flag > 0:
        label = float(np.frombuffer(rest, np.float32, flag)[0])
        rest = rest[flag * 4 :]
    return label, rest


def decode(image: bytes) -> np.ndarray:
    """Image (H, W, 3), red first: decoded blue first, then turned around."""
    import cv2

    blue_first = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR)
    assert blue_first is not None
    return np.asarray(cv2.cvtColor(blue_first, cv2.COLOR_BGR2RGB))
