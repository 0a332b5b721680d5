"""The index of a RecordIO file: one `key<tab>byte offset` a line, as MXNet writes it.

Letters: N lines, S separators of a piece of text.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common.log import InputError

PIECE = 1 << 25  # bytes parsed at once: bounds the memory beside the result
DIGITS = 18  # so many fit 64 bits


def read_index(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Keys and byte offsets of an index, int64 (N,) each, sorted by key.

    Raises:
        InputError: it cannot be read, has no line, a line is not `key<tab>offset`, or a key occurs
            twice. Names the line or the key.
    """
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise InputError(path, "index cannot be read", error.strerror or "") from error
    if not text:
        raise InputError(path, "index is empty")
    text = text.replace(b"\r\n", b"\n")
    if not text.endswith(b"\n"):
        text += b"\n"
    pairs = [_parse(path, text, start, end) for start, end in _pieces(text)]
    key_N, offset_N = (np.concatenate([pair_N2[:, k] for pair_N2 in pairs]) for k in (0, 1))
    if (np.diff(key_N) > 0).all():
        return key_N, offset_N
    order_N = np.argsort(key_N, kind="stable")
    key_N, offset_N = key_N[order_N], offset_N[order_N]
    twice = np.flatnonzero(np.diff(key_N) == 0)
    if len(twice):
        raise InputError(path, "index has a key twice", key_N[twice[0]])
    return key_N, offset_N


def _pieces(text: bytes) -> Iterator[tuple[int, int]]:
    """Start and end of pieces of whole lines."""
    start = 0
    while start < len(text):
        end = text.rfind(b"\n", start, start + PIECE) + 1
        end = end or text.index(b"\n", start) + 1  # a line longer than a piece
        yield start, end
        start = end


def _parse(path: Path, text: bytes, start: int, end: int) -> np.ndarray:
    """Pairs (N, 2) of some lines."""
    byte = np.frombuffer(text, np.uint8, end - start, start)
    at_S = np.flatnonzero((byte < ord("0")) | (byte > ord("9")))  # tab, newline, tab, ...
    length_S = np.diff(at_S, prepend=-1) - 1
    wrong_S = (length_S < 1) | (length_S > DIGITS)
    for first, separator in enumerate(b"\t\n"):
        wrong_S[first::2] |= byte[at_S[first::2]] != separator
    if wrong_S.any():
        at = start + int(at_S[wrong_S.argmax()])
        line = text[:at].count(b"\n") + 1
        found = text[text.rfind(b"\n", 0, at) + 1 :].partition(b"\n")[0]
        shown = repr(found[:80].decode(errors="replace"))
        raise InputError(f"{path} line {line}", "is not <key><tab><offset>", shown)
    return np.fromstring(text[start:end].decode(), np.int64, sep=" ").reshape(-1, 2)
