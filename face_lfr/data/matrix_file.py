"""Feature matrices as the LFR challenge takes them: 16 bytes of header, then float32 row by row.

The header is four little-endian int32: rows, columns, bytes of a row, and 5, the number of float32
in OpenCV (insightface challenges/iccv19-lfr/gen_image_feature.py). Files are larger than memory may
be: writing goes block by block and reading maps the file.

Shapes: N rows, D columns.
"""

import os
import struct
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from common.log import InputError

HEADER = struct.Struct("<4i")
FLOAT32 = 5
LIMIT = 2**31 - 1
BLOCK = 65_536

Floats = NDArray[np.float32]


class MatrixWriter:
    """Writes a matrix of known size block by block; the file appears when it is complete.

    Use as a context manager; leaving it with an exception leaves no file.

    Args:
        path: of the file; an old one stays until the new one is complete.
        rows: N, as many as the list has lines.
        columns: D.

    Raises:
        ValueError: sizes the header cannot hold.
    """

    def __init__(self, path: Path | str, rows: int, columns: int):
        if not (0 <= rows <= LIMIT and 1 <= columns <= LIMIT // 4):
            raise ValueError(f"rows={rows}, columns={columns} do not fit the header's int32")
        self.path, self.rows, self.columns, self.written = Path(path), rows, columns, 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._partial = self.path.with_name(f"{self.path.name}.tmp")
        self._file = self._partial.open("wb")
        self._file.write(HEADER.pack(rows, columns, 4 * columns, FLOAT32))

    def write(self, block_ND: np.ndarray) -> None:
        """Append rows.

        Raises:
            ValueError: another number of columns, or more rows than announced.
            InputError: a value that is not finite in float32; names the row.
        """
        if block_ND.ndim != 2 or block_ND.shape[1] != self.columns:
            raise ValueError(f"block_ND of shape {block_ND.shape} has not {self.columns} columns")
        if self.written + len(block_ND) > self.rows:
            count = self.written + len(block_ND)
            raise ValueError(f"block_ND makes {count} rows, and rows={self.rows} were announced")
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes inf and is reported
            block_ND = np.ascontiguousarray(block_ND, dtype="<f4")
        bad = np.flatnonzero(~np.isfinite(block_ND).all(axis=1))
        if bad.size:
            row = self.written + int(bad[0])
            raise InputError(self.path, "a feature is not finite, first row", row)
        self._file.write(block_ND.data)
        self.written += len(block_ND)

    def close(self) -> None:
        """Put the file in its place.

        Raises:
            InputError: not all rows were written; there is no file then.
        """
        if self.written != self.rows:
            self._discard()
            what = f"needs {self.rows} rows, one for each line of the list"
            raise InputError(self.path, what, self.written)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._partial, self.path)

    def _discard(self) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._discard()


def write_matrix(path: Path | str, feature_ND: np.ndarray, rows: int | None = None) -> None:
    """Write features (also a memory map) as a submission.

    Args:
        path: of the file.
        feature_ND: one row for each line of the list.
        rows: lines of the list, when they are known.

    Raises:
        InputError: another number of rows, or a value that is not finite; there is no file then.
        ValueError: not two-dimensional, or too large for the format.
    """
    if feature_ND.ndim != 2:
        raise ValueError(f"feature_ND has {feature_ND.ndim} dimensions; accepted: 2")
    if rows is not None and len(feature_ND) != rows:
        what = f"needs {rows} rows, one for each line of the list"
        raise InputError(path, what, len(feature_ND))
    with MatrixWriter(path, *feature_ND.shape) as writer:
        for start in range(0, len(feature_ND), BLOCK):
            writer.write(feature_ND[start : start + BLOCK])


def read_matrix(path: Path | str) -> Floats:
    """Map a matrix file into memory, (N, D) float32, read-only.

    Raises:
        InputError: missing, not the format, or not of the size its header tells.
    """
    size = _size(Path(path))
    if size < HEADER.size:
        raise InputError(path, f"is shorter than the {HEADER.size} bytes of its header", size)
    with Path(path).open("rb") as file:
        rows, columns, stride, kind = HEADER.unpack(file.read(HEADER.size))
    if rows < 0 or columns < 1 or stride != 4 * columns or kind != FLOAT32:
        what = "header is not rows, columns, 4 x columns, 5"
        raise InputError(path, what, [rows, columns, stride, kind])
    if size != HEADER.size + 4 * rows * columns:
        what = f"needs {HEADER.size + 4 * rows * columns} bytes for {rows} x {columns} floats"
        raise InputError(path, what, size)
    return _mapped(Path(path), rows, columns, HEADER.size)


def read_floats(path: Path | str, columns: int) -> Floats:
    """Map float32 without a header, as trojans-face-recognizer writes features and qualities.

    Raises:
        InputError: missing, or not whole rows of `columns` float32.
    """
    if columns < 1:
        raise ValueError(f"columns={columns} must be at least 1")
    size = _size(Path(path))
    if size % (4 * columns):
        raise InputError(path, f"is not a whole number of rows of {columns} float32, bytes", size)
    return _mapped(Path(path), size // (4 * columns), columns, 0)


def _size(path: Path) -> int:
    if not path.is_file():
        raise InputError(path, "file is missing")
    return path.stat().st_size


def _mapped(path: Path, rows: int, columns: int, offset: int) -> Floats:
    if not rows:  # an empty range cannot be mapped
        return np.empty((0, columns), np.float32)
    return np.memmap(path, "<f4", "r", offset, (rows, columns))
