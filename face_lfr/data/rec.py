"""Training sets in RecordIO files: `train.rec`, `train.idx`, `property`.

Two conventions (insightface, arcface_mxnet/common/rec_builder.py and arcface_torch/dataset.py):

- with identity records: record 0 has the labels [id0, id_end] and no image; keys 1 .. id0 - 1 are
  the images, keys id0 .. id_end - 1 the identities, each with [first image key, last + 1].
- without (MXNet's im2rec): every key is an image.

Letters: N images, C classes.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from common.log import InputError, get_logger
from face_lfr.data.face_data import FaceData, check_labels, count_gaps
from face_lfr.data.noise import with_label_noise
from face_lfr.data.recordio import RecordFile, RecordWriter, image_of, pack, unpack
from face_lfr.data.transforms import decode_rgb

CACHE_VERSION = 1


class RecImages:
    """The images of a RecordIO file; see `face_lfr.data.face_data.Images`."""

    def __init__(self, file: RecordFile, first: int, labels_N: np.ndarray):
        self.file, self.first, self.labels_N = file, first, labels_N

    def __len__(self) -> int:
        return len(self.labels_N)

    def encoded(self, row: int) -> memoryview:
        """The bytes of an image; `InputError` names file and key."""
        position = self._position(row)
        return image_of(self.file.read_at(position), self.file.name(position))

    def read(self, row: int) -> np.ndarray:
        """Image uint8 (H, W, 3) RGB; `InputError` names file and key."""
        return decode_rgb(self.encoded(row), self.name(row))

    def label(self, row: int) -> int:
        """Class that the file states."""
        return int(self.labels_N[row])

    def name(self, row: int) -> str:
        """File and key."""
        return self.file.name(self._position(row))

    def _position(self, row: int) -> int:
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self.first + row


def load_rec(
    root: Path | str,
    name: str = "rec",
    noise: float = 0.0,
    noise_seed: int = 0,
    file: str = "train",
    classes: int | None = None,
    images: int | None = None,
    allow_gaps: bool = False,
    access: str = "pread",
) -> FaceData:
    """Load a training set from RecordIO files.

    The labels come from one scan of all headers; it is kept in `<file>.labels.npy` beside the
    records, as long as these do not change and the folder can be written.

    Args:
        root: folder of the files. Without a file `property` the classes are those that occur.
        name: of the set.
        noise: fraction of the images that get a random class.
        noise_seed: of their choice.
        file: name of the files without suffix.
        classes: C that the set must have; None accepts any.
        images: N that the set must have; None accepts any.
        allow_gaps: accept classes without an image; they are counted in `skipped`.
        access: see `face_lfr.data.recordio.RecordFile`.

    Raises:
        InputError: a file is missing, damaged or does not fit the others; a label is no whole
            number or outside of the classes of `property`; a class has no image. Names file and
            key.
        ValueError: noise or access is not accepted.
    """
    root = Path(root)
    records = RecordFile(root / f"{file}.rec", access=access)
    first, count, skipped = image_keys(records)
    labels_N = _labels(records, first, count)
    stated = read_property(root / "property")
    num_classes = int(labels_N.max()) + 1 if stated is None else stated
    found = RecImages(records, first, labels_N)
    check_labels(labels_N, num_classes, root / "property", found.name)
    for what, number, wanted in (("classes", num_classes, classes), ("images", count, images)):
        if wanted is not None and number != wanted:
            message = f"{name} has {wanted} {what} (data.{what}=null accepts any); found"
            raise InputError(root, message, number)
    skipped |= count_gaps(labels_N, num_classes, records.rec, allow_gaps)
    data = FaceData(name, root, num_classes, found, labels_N, skipped)
    return with_label_noise(data, noise, noise_seed)


def read_property(path: Path) -> int | None:
    """Number of classes in a file `<classes>,<height>,<width>`; None without one.

    Raises:
        InputError: the first field is no positive number.
    """
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(path, "cannot be read", error.strerror or "") from error
    number = text.split(",")[0].strip()
    if not number.isascii() or not number.isdigit() or int(number) < 1:
        raise InputError(path, "is not <classes>,<height>,<width>", repr(text[:80]))
    return int(number)


def image_keys(file: RecordFile) -> tuple[int, int, dict[str, int]]:
    """Which positions of a file are images.

    Returns:
        Position of the first, number of them, and what else there is: {"identity records": n}.

    Raises:
        InputError: record 0 states keys that the index has not, or identities begin elsewhere.
    """
    if 0 not in file.keys:
        return 0, len(file), {}
    head = unpack(file.read(0), file.name(file.position(0)))
    if not head.flag or len(head.image):  # im2rec, with one label or with several
        return 0, len(file), {}
    where = file.name(file.position(0))
    if head.flag < 2 or not 2 <= head.label_L[0] < 2**62:
        what = "labels of record 0 are not [first identity key, last + 1]"
        raise InputError(where, what, head.label_L.tolist())
    identity = first_identity(file, float(head.label_L[0]))
    first, last = file.position(1), file.position(identity - 1)
    if last - first != identity - 2:
        missing = next(key for key in range(1, identity) if key not in file.keys)
        raise InputError(file.idx, "index has no key", missing)
    return first, identity - 1, {"identity records": len(file) - identity}


def first_identity(file: RecordFile, stated: float) -> int:
    """The first key that is no image; record 0 states it, rounded to a float32.

    From 2**24 images on (Glint360K has 17 million) not every number is a float32: then the records
    around it tell, as an identity has no image.

    Raises:
        InputError: there are images only around it.
    """
    step = round(float(np.spacing(np.float32(stated))))
    if stated < 2**24:
        return int(stated)
    for key in range(int(stated) - step, int(stated) + step + 1):
        if key not in file.keys or not len(image_of(file.read(key), file.rec)):
            return key
    raise InputError(file.rec, "no identity record near the key that record 0 states", int(stated))


def _labels(file: RecordFile, first: int, count: int) -> np.ndarray:
    """Labels of the images, int64 (N,), from the cache or from a scan that fills it."""
    path = file.rec.with_suffix(".labels.npy")
    key = np.array([CACHE_VERSION, first, count, *_stamp(file.rec), *_stamp(file.idx)])
    try:
        stored = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        stored = np.empty(0, np.int64)
    if stored.dtype == np.int64 and stored.shape == (len(key) + count,):
        if (stored[: len(key)] == key).all():
            return np.asarray(stored[len(key) :])
    labels_N = scan_labels(file, first, count)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # ranks may write together
    try:
        with temporary.open("wb") as out:
            np.save(out, np.concatenate([key, labels_N]))
        os.replace(temporary, path)
    except OSError as error:
        get_logger(__name__).info("labels are not kept: %s", error)
        temporary.unlink(missing_ok=True)
    return labels_N


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def scan_labels(file: RecordFile, first: int, count: int) -> np.ndarray:
    """Labels of the records at positions [first, first + count), int64 (N,).

    Raises:
        InputError: a record is damaged or has no image, or a label is no whole number from 0 on.
            Names file and key.
    """
    heads = file.scan(first, first + count)
    if (heads.image_N == 0).any():
        row = int((heads.image_N == 0).argmax())
        raise InputError(
            file.name(first + row), "record has no image; its label is", heads.label_N[row]
        )
    with np.errstate(invalid="ignore"):
        labels_N = heads.label_N.astype(np.int64)
    wrong_N = (labels_N != heads.label_N) | (labels_N < 0)
    if wrong_N.any():
        row = int(wrong_N.argmax())
        what = "label is no class number"
        raise InputError(file.name(first + row), what, heads.label_N[row])
    return labels_N


def write_rec(
    root: Path | str,
    items: Iterable[tuple[bytes, int]],
    num_classes: int,
    size: int = 112,
    identities: bool = True,
    file: str = "train",
) -> None:
    """Write a training set that `load_rec` and insightface read.

    Args:
        root: folder, made when absent.
        items: encoded image and class of each; with `identities` in the order of the classes.
        num_classes: written to `property`.
        size: side of the images, written to `property`.
        identities: with record 0 and identity records, else as im2rec, from key 0 on.
        file: name of the files without suffix.

    Raises:
        ValueError: a class is not in [0, num_classes), or they are not in order.
    """
    root = Path(root)
    spans: list[list[int]] = []  # first key and last + 1 of each class that occurs
    key, before = int(identities), -1
    with RecordWriter(root / file) as writer:
        for image, label in items:
            if not 0 <= label < num_classes or (identities and label < before):
                raise ValueError(f"label={label} after {before} of {num_classes} classes")
            if label != before:
                spans.append([key, key])
            writer.write(key, pack(label, image, key))
            key, before = key + 1, label
            spans[-1][1] = key
        if identities:
            for number, span in enumerate(spans, start=key):
                writer.write(number, pack(span, id=number))
            writer.write(0, pack([key, key + len(spans)], id2=1))
    temporary = root / "property.tmp"
    temporary.write_text(f"{num_classes},{size},{size}\n", encoding="utf-8")
    os.replace(temporary, root / "property")
