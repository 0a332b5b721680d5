"""Pickles without their danger: arrays of numbers, dict, list, tuple, int, float, str, bytes.

An ordinary unpickler calls whatever the file names. Here the file can name nothing but the few
things that NumPy writes for an array, and even those are stand-ins: an array is rebuilt from its
type, shape and bytes once the whole file is read.
"""

import io
import math
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np

from common.log import InputError

_NPY = b"\x93NUMPY"
_NUMBERS = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")
_PLAIN = (bool, int, float, str, bytes, type(None))
_NUMPY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
_BUFFER_MODULES = ("numpy.core.numeric", "numpy._core.numeric")


class _RefusedError(Exception):
    """Something in the file that is not on the list."""


class _Type:
    """Stands for a NumPy dtype; only the name and the byte order are kept."""

    __slots__ = ("name",)

    def __init__(self, name: Any, *_: Any):
        self.name = name

    def __setstate__(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if isinstance(self.name, str) and isinstance(order, str) and len(order) == 1:
            self.name = order + self.name


class _Array:
    """Stands for an array until the file is read."""

    __slots__ = ("content", "dtype", "fortran", "shape")

    def __init__(self, *_: Any):
        self.shape, self.dtype, self.fortran, self.content = (0,), None, False, b""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise _RefusedError("an array in an unknown layout")
        _, self.shape, self.dtype, self.fortran, self.content = state


class _Scalar:
    """Stands for a single NumPy number."""

    __slots__ = ("array",)

    def __init__(self, dtype: Any, content: Any):
        self.array = _Array()
        self.array.__setstate__((1, (), dtype, False, content))


def _from_buffer(content: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", content))
    return array


def _encode(text: Any, encoding: Any) -> bytes:
    # Protocol 2 writes bytes as text in this encoding; any other codec would be a way out.
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise _RefusedError(f"a call of codecs.encode with {encoding}")
    return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in _NUMPY_MODULES and name == "_reconstruct":
            return lambda *_: _Array()
        if module in _NUMPY_MODULES and name == "scalar":
            return lambda dtype, content=b"": _Scalar(dtype, content)
        if module in _BUFFER_MODULES and name == "_frombuffer":
            return lambda *parts: _from_buffer(*parts)
        if (module, name) == ("numpy", "ndarray"):
            return lambda *_: _Array()
        if (module, name) == ("numpy", "dtype"):
            return lambda *parts: _Type(*parts)
        if (module, name) == ("_codecs", "encode"):
            return lambda *parts: _encode(*parts)
        if (module, name) == ("__builtin__", "bytes"):  # how protocol 2 writes no bytes at all
            return lambda: b""
        raise _RefusedError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise _RefusedError(f"a persistent object {pid!r}")


def load_pickle(path: Path | str) -> Any:
    """Content of a pickle, or of a `.npy` file.

    Returns:
        Arrays of numbers, dict, list, tuple, int, float, str, bytes and None, nested.

    Raises:
        InputError: the file is missing or damaged, or holds anything else, which is never built.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(path, "file is missing")
    content = path.read_bytes()
    try:
        if content.startswith(_NPY):
            return np.load(io.BytesIO(content), allow_pickle=False)
        return _rebuild(_Unpickler(io.BytesIO(content)).load(), ())
    except _RefusedError as error:
        what = "pickle holds more than arrays of numbers, dict, list, int and str"
        raise InputError(path, what, error) from None
    except (MemoryError, RecursionError):
        raise InputError(path, "is no sound pickle, it is nested or sized beyond reason") from None
    except Exception as error:  # a damaged pickle fails in any way whatever
        raise InputError(path, "is no sound pickle", f"{type(error).__name__} {error}") from error


def _rebuild(value: Any, inside: tuple[int, ...]) -> Any:
    """The value with arrays in the place of stand-ins."""
    if id(value) in inside:
        raise _RefusedError("a container that holds itself")
    inside = (*inside, id(value))
    if isinstance(value, _Array):
        return _array(value)
    if isinstance(value, _Scalar):
        return _array(value.array)[()].item()
    if type(value) is dict:
        pairs = value.items()
        return {_rebuild(key, inside): _rebuild(item, inside) for key, item in pairs}
    if type(value) in (list, tuple):
        return type(value)(_rebuild(item, inside) for item in value)
    if type(value) not in _PLAIN:
        raise _RefusedError(f"a {type(value).__name__.strip('_').lower()}")
    return value


def _array(found: _Array) -> np.ndarray:
    name = found.dtype.name if isinstance(found.dtype, _Type) else None
    if not isinstance(name, str) or not _NUMBERS.fullmatch(name):
        raise _RefusedError(f"an array of {name}")
    shape = found.shape if isinstance(found.shape, tuple) else None
    if shape is None or not all(type(side) is int and side >= 0 for side in shape):
        raise _RefusedError(f"an array of shape {found.shape}")
    if not isinstance(found.content, bytes | bytearray):
        raise _RefusedError("an array whose numbers are not bytes")
    flat = np.frombuffer(found.content, np.dtype(name))
    if flat.size != math.prod(shape):
        raise ValueError(f"{flat.size} numbers for the shape {shape}")
    # A copy: the array must be the caller's to change.
    return flat.reshape(shape, order="F" if found.fortran else "C").copy()
