"""Training sets as folders: `<class>/<image>`; and images that are files.

Letters: N images, C classes.
"""

import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from common.log import InputError
from face_lfr.data.face_data import FaceData, count_gaps
from face_lfr.data.noise import with_label_noise
from face_lfr.data.transforms import read_rgb

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


class Names(Sequence[str]):
    """Many strings in two arrays: a list of them would be copied by every forked data worker."""

    def __init__(self, names: Iterable[str]):
        text, end_N = bytearray(), array("q")
        for name in names:
            text += os.fsencode(name)
            end_N.append(len(text))
        self._text, self._end_N = bytes(text), np.array(end_N, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._end_N)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> "Sequence[str]": ...
    def __getitem__(self, row: int | slice) -> str | Sequence[str]:
        if isinstance(row, slice):
            return Names(self[k] for k in range(*row.indices(len(self))))
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        row %= len(self)
        start = int(self._end_N[row - 1]) if row else 0
        return os.fsdecode(self._text[start : int(self._end_N[row])])

    def __iter__(self) -> Iterator[str]:
        return (self[row] for row in range(len(self)))


class FileImages:
    """Images that are files below a folder; see `face_lfr.data.face_data.Images`."""

    def __init__(self, root: Path, names: Sequence[str], labels_N: np.ndarray):
        self.root, self.names, self.labels_N = Path(root), names, labels_N

    def __len__(self) -> int:
        return len(self.labels_N)

    def read(self, row: int) -> np.ndarray:
        """Image uint8 (H, W, 3) RGB; `InputError` names the file."""
        return read_rgb(self.name(row))

    def label(self, row: int) -> int:
        """Class that folder or list states."""
        return int(self.labels_N[row])

    def name(self, row: int) -> str:
        """Path of the file."""
        return os.path.join(self.root, self.names[row])  # absolute names stay as they are


def load_folder(
    root: Path | str,
    name: str = "folder",
    noise: float = 0.0,
    noise_seed: int = 0,
    allow_gaps: bool = False,
    suffixes: Sequence[str] = SUFFIXES,
) -> FaceData:
    """Load a training set `root/<class>/<image>`; classes are numbered in the order of names.

    Folders whose names are all numbers are ordered as numbers, others as texts.

    Args:
        root: folder of the classes.
        name: of the set.
        noise: fraction of the images that get a random class.
        noise_seed: of their choice.
        allow_gaps: accept classes without an image; they keep their number and are counted.
        suffixes: of images, in lower case; other files are counted in `skipped`.

    Raises:
        InputError: a folder cannot be read, there is no image, or a class has none.
        ValueError: noise is not accepted.
    """
    root = Path(root)
    classes, stray = _list(root, folders=True)
    if not classes:
        raise InputError(root, "has no folder of a class")
    if all(entry.isascii() and entry.isdigit() for entry in classes):
        classes.sort(key=lambda entry: (int(entry), entry))
    names: list[str] = []
    counts, other = [], len(stray)
    for entry in classes:
        files, folders = _list(root / entry, folders=False)
        found = [file for file in files if file.lower().endswith(tuple(suffixes))]
        names += [f"{entry}/{file}" for file in found]
        counts.append(len(found))
        other += len(files) - len(found) + len(folders)
    if not names:
        raise InputError(root, f"has no image ({', '.join(suffixes)}) in its folders", len(classes))
    if 0 in counts and not allow_gaps:
        what = "class without an image (allow_gaps=true accepts it)"
        raise InputError(root / classes[counts.index(0)], what, f"{counts.count(0)} such folders")
    labels_N = np.repeat(np.arange(len(classes)), counts)
    skipped = count_gaps(labels_N, len(classes), root, allow_gaps)
    skipped |= {"other files and folders": other} if other else {}
    images = FileImages(root, Names(names), labels_N)
    data = FaceData(name, root, len(classes), images, labels_N, skipped)
    return with_label_noise(data, noise, noise_seed)


def _list(folder: Path, folders: bool) -> tuple[list[str], list[str]]:
    """Names in a folder, sorted: the folders and the others, or the files and the others."""
    try:
        with os.scandir(folder) as entries:
            found = sorted((entry.name, entry.is_dir()) for entry in entries)
    except OSError as error:
        raise InputError(folder, "folder cannot be read", error.strerror or "") from error
    wanted = [name for name, is_folder in found if is_folder == folders]
    return wanted, [name for name, is_folder in found if is_folder != folders]
