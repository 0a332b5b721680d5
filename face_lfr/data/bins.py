"""Verification sets of insightface: `lfw.bin`, `cfp_fp.bin`, `agedb_30.bin` and their like.

A file is the pickle of (images, same): 2 P encoded images, pair k being images 2 k and 2 k + 1, and
P truth values. A pickle can run any code, so only plain containers and numpy arrays are rebuilt
here; files of Python 2 are read as well. Format: insightface
recognition/arcface_torch/eval/verification.py.

Shapes: P pairs, H rows, W columns.
"""

import io
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.log import InputError
from face_lfr.data.transforms import decode_rgb

SIDE = 112
PROTOCOL = 4  # of what is written; read by Python 3.4 and later
_BUILTINS = {kind.__name__: kind for kind in (bytes, bytearray, list, tuple, bool, int)}
_MODULES = ("numpy.core", "numpy._core")
_BROKEN = (
    pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, KeyError, IndexError,
    ImportError, OverflowError, MemoryError, RuntimeError,
)  # fmt: skip


@dataclass(frozen=True)
class EncodedImages:
    """Encoded images by row, decoded when they are read.

    Attributes:
        path: file they come from, for messages.
        encoded: picture files as bytes.
    """

    path: Path
    encoded: Sequence[bytes]

    def __len__(self) -> int:
        return len(self.encoded)

    def read(self, row: int) -> np.ndarray:
        """Image uint8 (H, W, 3), RGB; one that is not 112 wide is resized to a short side of 112.

        Raises:
            InputError: it cannot be decoded, or had to be resized and is no square.
        """
        image = decode_rgb(self.encoded[row], self.name(row))
        return image if image.shape[1] == SIDE else self._resized(image, row)

    def _resized(self, image: np.ndarray, row: int) -> np.ndarray:
        import cv2

        height, width = image.shape[:2]
        if height != width:
            raise InputError(self.name(row), f"is neither {SIDE} wide nor square", image.shape)
        return np.asarray(cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC))

    def label(self, row: int) -> int:
        """Number of the pair; the file knows no identities."""
        return row // 2

    def name(self, row: int) -> str:
        """File and number of the image in it."""
        return f"{self.path} image {row}"


@dataclass(frozen=True)
class VerificationSet:
    """P pairs of images.

    Attributes:
        name: of the set, "lfw".
        images: 2 P images; pair k is rows 2 k and 2 k + 1.
        same_P: bool, whether a pair shows one person.
    """

    name: str
    images: EncodedImages
    same_P: NDArray[np.bool_]


def load_bin(path: Path | str) -> VerificationSet:
    """Read a verification set; images stay encoded.

    Raises:
        InputError: missing, no such pickle, one that names a foreign class, an odd number of
            images, or another number of pairs than truth values.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(path, "file is missing")
    content = _unpickle(path)
    if not isinstance(content, list | tuple) or len(content) != 2:
        raise InputError(path, "is not a pair of images and truth values", type(content).__name__)
    images, same = content
    if not isinstance(images, list | tuple) or not isinstance(same, list | tuple | np.ndarray):
        kinds = f"{type(images).__name__}, {type(same).__name__}"
        raise InputError(path, "is not a pair of two lists", kinds)
    if len(images) % 2:
        raise InputError(path, "holds an odd number of images, which are no pairs", len(images))
    if len(images) != 2 * len(same):
        raise InputError(path, f"holds {len(images)} images, and truth values", len(same))
    encoded = [_encoded(image, f"{path} image {row}") for row, image in enumerate(images)]
    same_P = [_truth(value, f"{path} pair {pair}") for pair, value in enumerate(same)]
    return VerificationSet(path.stem, EncodedImages(path, encoded), np.array(same_P, bool))


def write_bin(path: Path | str, jpegs: Sequence[bytes], issame: Sequence[bool]) -> None:
    """Write a verification set; the file is complete or as it was before.

    Args:
        path: of the file.
        jpegs: 2 P encoded images.
        issame: P truth values.

    Raises:
        ValueError: the lengths do not fit, or an image is no bytes.
    """
    if len(jpegs) != 2 * len(issame):
        raise ValueError(f"jpegs has {len(jpegs)} entries; issame of {len(issame)} needs twice it")
    if not all(isinstance(jpeg, bytes) for jpeg in jpegs):
        raise ValueError("jpegs holds something that is no bytes")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.tmp")
    content = pickle.dumps((list(jpegs), [bool(value) for value in issame]), PROTOCOL)
    partial.write_bytes(content)
    os.replace(partial, path)


class _Unpickler(pickle.Unpickler):
    """Rebuilds nothing but plain values and numpy arrays."""

    def __init__(self, content: bytes, path: Path):
        # Python 2 had no bytes: its strings are taken as such, and older names are mapped.
        super().__init__(io.BytesIO(content), encoding="bytes")
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        known = _known(module, name)
        if known is None:
            what = "names something that a verification set does not hold"
            raise InputError(self.path, what, f"{module}.{name}")
        return known


def _known(module: str, name: str) -> Any:
    if module in ("builtins", "__builtin__"):  # the second is Python 2's
        return _BUILTINS.get(name)
    if (module, name) == ("_codecs", "encode"):  # bytes in a pickle of protocol 2 and below
        return _latin1
    if module == "numpy":
        return {"ndarray": np.ndarray, "dtype": np.dtype}.get(name)
    package, _, part = module.rpartition(".")
    if package in _MODULES and (part, name) in (
        ("multiarray", "_reconstruct"),
        ("multiarray", "scalar"),
        ("numeric", "_frombuffer"),
    ):
        return getattr(import_module(f"numpy._core.{part}"), name)
    return None


def _latin1(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"encoding={encoding}; accepted: latin1")
    return text.encode("latin1")


def _unpickle(path: Path) -> Any:
    try:
        return _Unpickler(path.read_bytes(), path).load()
    except InputError:
        raise
    except _BROKEN as error:
        raise InputError(path, "is no readable pickle", error or type(error).__name__) from error


def _encoded(image: Any, where: str) -> bytes:
    if isinstance(image, bytes | bytearray):
        return bytes(image)
    if not isinstance(image, np.ndarray):
        raise InputError(where, "is neither bytes nor a row of uint8", type(image).__name__)
    if image.dtype != np.uint8 or image.shape not in ((image.size,), (image.size, 1)):
        kind = f"{image.dtype} {image.shape}"
        raise InputError(where, "is neither bytes nor a row of uint8", kind)
    return image.tobytes()  # what cv2.imencode returned, with one dimension or two


def _truth(value: Any, where: str) -> bool:
    if isinstance(value, bool | np.bool_ | int | np.integer) and value in (0, 1):
        return bool(value)
    raise InputError(where, "truth value is neither true nor false", value)
