"""Sizes of pictures from their headers, for sets whose annotations do not state them.

Reading 1.7 million headers takes minutes to hours, depending on the disk: the result is kept.

Letters: N pictures, B of them not read yet.
"""

import contextlib
import hashlib
import os
import struct
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np

from common.log import InputError, get_logger

THREADS = 16  # they wait for the disk most of the time
CHUNK = 512
SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # start of frame, ITU T.81 table B.1
PNG = b"\x89PNG\r\n\x1a\n"


def size_index(
    paths: Sequence[Path | str], cache: Path | str | None = None, allow_missing: bool = False
) -> np.ndarray:
    """Height and width of each picture, int64 (N, 2), as they are stored: EXIF turns nothing.

    Args:
        paths: of the pictures.
        cache: npz file that keeps the result; it is read when it belongs to the same names (below
            their common folder, so that a set may move) and rewritten otherwise. It does not
            notice that a picture was replaced by one of another size. Where it cannot be written,
            a warning says so.
        allow_missing: give a picture that cannot be read the size (0, 0) instead of raising.

    Raises:
        InputError: a picture cannot be read; names the file.
    """
    names = [os.fspath(path) for path in paths]
    key = _key(names)
    known_N2 = _load(Path(cache), key, len(names)) if cache is not None else None
    old_N2 = np.zeros((len(names), 2), np.int64) if known_N2 is None else known_N2
    # Pictures that could not be read before may have arrived since.
    bad_B = np.flatnonzero(old_N2[:, 0] == 0)
    if len(bad_B) > 10_000:
        get_logger(__name__).info("reading the sizes of %d pictures", len(bad_B))
    size_N2 = old_N2.copy()
    size_N2[bad_B] = _read_all([names[row] for row in bad_B])
    if cache is not None and (known_N2 is None or not np.array_equal(size_N2, known_N2)):
        _store(Path(cache), key, size_N2)
    if not allow_missing and (size_N2[:, 0] == 0).any():
        name = names[int((size_N2[:, 0] == 0).argmax())]
        picture_size(name)  # raises, with the reason
        raise InputError(name, "picture could not be read a moment ago")
    return size_N2


def picture_size(path: Path | str) -> tuple[int, int]:
    """Height and width of a picture as stored, from its header.

    JPEG and PNG are understood here; other formats are decoded.

    Raises:
        InputError: it cannot be read, or is no picture; names the file.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(24)
            if head[:2] == b"\xff\xd8":
                size = _jpeg_size(file)
            elif head[:8] == PNG and len(head) == 24:
                size = struct.unpack(">II", head[16:])[::-1]
            else:
                size = None
    except OSError as error:
        raise InputError(path, "picture cannot be read", error.strerror or "") from error
    if size is None:
        from detection_tsd.data.transforms import read_rgb

        size = read_rgb(path).shape[:2]
    if min(size) < 1:
        raise InputError(path, "picture has no size", f"{size[1]} x {size[0]}")
    return int(size[0]), int(size[1])


def _jpeg_size(file: BinaryIO) -> tuple[int, int] | None:
    """From the frame header; None when there is none before the first scan."""
    file.seek(2)
    while True:
        byte = file.read(1)
        while byte and byte != b"\xff":  # stray bytes between segments are tolerated by decoders
            byte = file.read(1)
        while byte == b"\xff":  # any number of fill bytes
            byte = file.read(1)
        if not byte or byte in (b"\xd9", b"\xda"):
            return None
        if byte == b"\x01" or 0xD0 <= byte[0] <= 0xD7:  # markers without a segment
            continue
        length = file.read(2)
        if len(length) < 2:
            return None
        if byte[0] in SOF:
            frame = file.read(5)
            return struct.unpack(">HH", frame[1:]) if len(frame) == 5 else None
        file.seek(max(struct.unpack(">H", length)[0] - 2, 0), os.SEEK_CUR)


def _read_all(names: Sequence[str]) -> np.ndarray:
    starts = range(0, len(names), CHUNK)
    with ThreadPoolExecutor(THREADS) as pool:
        parts = pool.map(lambda start: _read_chunk(names[start : start + CHUNK]), starts)
        return np.concatenate([np.empty((0, 2), np.int64), *parts])


def _read_chunk(names: Iterable[str]) -> np.ndarray:
    sizes = []
    for name in names:
        try:
            sizes.append(picture_size(name))
        except InputError:
            sizes.append((0, 0))
    return np.array(sizes, np.int64).reshape(-1, 2)


def _key(names: Sequence[str]) -> str:
    """Of the names below their common folder, in order."""
    ends = [min(names), max(names)] if names else [""]
    # Characters are meant: what lies before the last separator of the shared text is a folder.
    start = os.path.commonprefix(ends).rfind(os.sep) + 1  # noqa: RUF071
    digest = hashlib.sha256(f"{len(names)}".encode())
    for name in names:
        digest.update(b"\0" + os.fsencode(name[start:]))
    return digest.hexdigest()


def _load(cache: Path, key: str, count: int) -> np.ndarray | None:
    """The kept sizes; None when the file is absent, damaged or of other pictures."""
    try:
        with np.load(cache, allow_pickle=False) as file:
            size_N2 = file["size"].astype(np.int64)
            same = str(file["key"]) == key and size_N2.shape == (count, 2)
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever numpy and zipfile say about a damaged file
        get_logger(__name__).warning("%s is damaged and made anew: %s", cache, error)
        return None
    return size_N2 if same else None


def _store(cache: Path, key: str, size_N2: np.ndarray) -> None:
    """Several processes may store at once: each writes a file of its own and renames it."""
    temporary = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez(file, key=np.array(key), size=size_N2.astype(np.int32))
        os.replace(temporary, cache)
    except OSError as error:  # a folder that is only for reading: slower next time, but no harm
        get_logger(__name__).warning("sizes are not kept: %s", error)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
