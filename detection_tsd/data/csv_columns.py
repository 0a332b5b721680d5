"""Columns of a large CSV file by their names, in blocks.

A file is UTF-8 with a header row; the order of its columns is free and unknown columns are passed
over. No line may be empty, so row r of the file (from 0) stands in line r + 2.

Letters: R rows of a block.
"""

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.log import InputError

Kind = Literal["text", "number"]
BLOCK_ROWS = 250_000
TEXT_BYTES = 64  # longest identifier; an identifier of Open Images has 16


class Block(NamedTuple):
    """Consecutive rows.

    Attributes:
        path: of the file.
        lines: of the rows, as an editor counts.
        columns: by name; text is bytes (R,), a number float64 (R,) and finite.
    """

    path: Path
    lines: Sequence[int] | NDArray[np.int64]
    columns: dict[str, NDArray[Any]]

    def where(self, row: int) -> str:
        """File and line of a row of the block, for messages."""
        return f"{self.path}:{self.lines[row]}"


class _Layout(NamedTuple):
    """Names of all columns, what is read of them, and what separates them (None: white space)."""

    names: Sequence[str]
    kinds: Mapping[str, Kind]
    separator: str | None

    def split(self, line: str) -> list[str]:
        return line.split() if self.separator is None else next(csv.reader([line]))

    def fit(self, lines: Sequence[str]) -> bool:
        """Whether each line has as many fields as there are columns, but for commas in quotes."""
        if self.separator is None:
            return {len(line.split()) for line in lines} == {len(self.names)}
        return {line.count(self.separator) for line in lines} == {len(self.names) - 1}


def read_blocks(
    path: Path | str,
    kinds: Mapping[str, Kind],
    rows: int = BLOCK_ROWS,
    names: Sequence[str] | None = None,
) -> Iterator[Block]:
    """Columns of a CSV file, some rows at a time; a file without rows gives no block.

    Args:
        path: of the file.
        kinds: column -> "text" or "number".
        rows: of a block at most.
        names: of the columns, for a file without a header whose fields white space separates.

    Raises:
        InputError: the file is missing, empty or no UTF-8; a column is missing or there twice; a
            line is empty, has another number of fields than the header, or a field that is not
            what `kinds` says. Names the line and the value.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(path, "file is missing")
    if path.stat().st_size == 0:
        raise InputError(path, "file is empty")
    try:
        with path.open(encoding="utf-8-sig") as file:
            first = 1
            if names is None:
                names, first = _read_header(path, file.readline(), kinds), 2
            layout = _Layout(names, kinds, None if first == 1 else ",")
            while lines := list(islice(file, rows)):
                if not lines[-1].strip():
                    lines = _without_empty_end(lines, at_end=next(file, None) is None)
                if lines:
                    yield _parse(path, first, lines, layout)
                first += len(lines)
    except UnicodeDecodeError as error:
        bad = f"0x{error.object[error.start]:02x}"
        raise InputError(path, "is no UTF-8 text, it has the byte", bad) from error


def _read_header(path: Path, line: str, kinds: Mapping[str, Kind]) -> list[str]:
    if not line.strip():
        raise InputError(f"{path}:1", "line is empty in the place of a header")
    header = [name.strip() for name in next(csv.reader([line]))]
    missing = [name for name in kinds if name not in header]
    if missing:
        raise InputError(f"{path}:1", f"column {missing[0]} is missing, the header is", line)
    twice = [name for name in kinds if header.count(name) > 1]
    if twice:
        raise InputError(f"{path}:1", "column is there twice", twice[0])
    return header


def _without_empty_end(lines: list[str], at_end: bool) -> list[str]:
    """Lines of the last block without empty ones at its end; those in a text are found later."""
    while at_end and lines and not lines[-1].strip():
        lines.pop()
    return lines


def _parse(path: Path, first: int, lines: Sequence[str], layout: _Layout) -> Block:
    types = {"text": f"S{TEXT_BYTES + 1}", "number": "f8"}
    fields = np.dtype([(name, types[kind]) for name, kind in layout.kinds.items()])
    places = [layout.names.index(name) for name in layout.kinds]
    if not layout.fit(lines):
        _check_lines(path, first, lines, layout)
    try:
        table_R = np.loadtxt(
            lines, fields, None, layout.separator, usecols=places, ndmin=1, quotechar='"'
        )
    except (ValueError, UnicodeError) as error:
        _check_lines(path, first, lines, layout)
        where = f"{path}:{first}"
        raise InputError(where, "from here on a row cannot be read", error) from error
    if len(table_R) != len(lines):
        _check_lines(path, first, lines, layout)
        raise InputError(f"{path}:{first}", "from here on a row spans more than one line")
    columns = {name: np.ascontiguousarray(table_R[name]) for name in layout.kinds}
    block = Block(path, range(first, first + len(lines)), columns)
    _check_values(block, layout.kinds)
    return block


def _check_values(block: Block, kinds: Mapping[str, Kind]) -> None:
    for name, kind in kinds.items():
        column_R = block.columns[name]
        if kind == "number":
            bad_R = ~np.isfinite(column_R)
            what = f"{name} is not finite"
        else:
            length_R = np.char.str_len(column_R) if len(column_R) else np.zeros(0, int)
            foreign_R = (column_R.view(np.uint8).reshape(len(column_R), -1) > 127).any(axis=1)
            bad_R = (length_R == 0) | (length_R > TEXT_BYTES) | foreign_R
            what = f"{name} is empty, longer than {TEXT_BYTES} characters or not ASCII"
        if bad_R.any():
            row = int(bad_R.argmax())
            value = column_R[row]
            raise InputError(
                block.where(row), what, value.decode("latin1") if kind == "text" else value
            )


def _check_lines(path: Path, first: int, lines: Sequence[str], layout: _Layout) -> None:
    """Name the first line that does not fit the layout; slow, field by field."""
    for number, line in enumerate(lines, start=first):
        where = f"{path}:{number}"
        if not line.strip():
            raise InputError(where, "line is empty")
        row = layout.split(line)
        if len(row) != len(layout.names):
            what = f"line has {len(row)} fields in the place of {len(layout.names)}"
            raise InputError(where, what, line)
        for name, kind in layout.kinds.items():
            word = row[layout.names.index(name)]
            if kind == "number" and not _is_number(word):
                raise InputError(where, f"{name} is no finite number", word or "''")
            if kind == "text" and not word.isascii():
                raise InputError(where, f"{name} is not ASCII", word)


def _is_number(word: str) -> bool:
    try:
        return math.isfinite(float(word)) and "_" not in word
    except ValueError:
        return False
