"""Pickles of arrays and plain containers are read; anything else is refused and never run."""

import collections
import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.log import InputError
from detection_tsd.data.unpickle import load_pickle


def write(folder: Path, content: bytes) -> Path:
    path = folder / "content.pkl"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "array",
    [
        np.arange(12, dtype=np.int64).reshape(3, 4),
        np.asfortranarray(np.arange(12, dtype=">f4").reshape(3, 4)),
        np.zeros((0, 4), np.uint8),
        np.array([True, False]),
        np.array(3.5),
    ],
)
def test_arrays_come_back(tmp_path: Path, array: np.ndarray, protocol: int) -> None:
    found = load_pickle(write(tmp_path, pickle.dumps(array, protocol=protocol)))
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)
    found[...] = 1  # a copy, to be changed


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_containers_come_back(tmp_path: Path, protocol: int) -> None:
    value = {1: [0, 5, 7], 2: [], "three": (1.5, "text", b"\x00\xff", None, True)}
    assert load_pickle(write(tmp_path, pickle.dumps(value, protocol=protocol))) == value
    shared = [1, 2]
    value = {1: shared, 2: shared}
    assert load_pickle(write(tmp_path, pickle.dumps(value, protocol=protocol))) == value


def test_arrays_inside_of_containers_and_numbers_of_numpy(tmp_path: Path) -> None:
    value = {1: np.arange(3), 2: [np.int64(7), np.float32(0.5)]}
    found = load_pickle(write(tmp_path, pickle.dumps(value)))
    assert found[1].tolist() == [0, 1, 2]
    assert found[2] == [7, 0.5]
    assert type(found[2][0]) is int


def test_files_of_numpy(tmp_path: Path) -> None:
    content = io.BytesIO()
    np.save(content, np.arange(4))
    assert load_pickle(write(tmp_path, content.getvalue())).tolist() == [0, 1, 2, 3]
    content = io.BytesIO()
    np.save(content, np.array([{}], dtype=object))  # a pickle in disguise
    with pytest.raises(InputError, match="is no sound pickle"):
        load_pickle(write(tmp_path, content.getvalue()))


class Runs:
    """Makes a file when it is unpickled in the ordinary way."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("function", [os.system, exec, eval, os.mkdir, getattr])
def test_a_malicious_pickle_is_refused_and_not_run(
    tmp_path: Path, function: Any, protocol: int
) -> None:
    mark = tmp_path / "ran"
    argument = {
        os.system: f"touch {mark}", os.mkdir: str(mark), getattr: "x",
    }.get(function, f"open({str(mark)!r}, 'w')")  # fmt: skip
    value = {1: [np.arange(3), Runs(function, argument)]}
    content = pickle.dumps(value, protocol=protocol)
    with pytest.raises(InputError, match="more than arrays of numbers") as caught:
        load_pickle(write(tmp_path, content))
    assert function.__name__ in str(caught.value)
    assert not mark.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cos\nsystem\n(S'true'\ntR.",  # GLOBAL, REDUCE
        b"(S'true'\nios\nsystem\n.",  # INST
        b"cnumpy\nload\n(S'x'\ntR.",  # of NumPy, but no array
        b"cnumpy.core.multiarray\nfrombuffer\n(S'x'\ntR.",
        b"c_codecs\nencode\n(S'x'\nS'zip'\ntR.",  # another codec
        b"cbuiltins\nobject\n.",
        b"P1\n.",  # a persistent object
        pickle.dumps(collections.defaultdict(list)),
        pickle.dumps({1, 2}),
        pickle.dumps(np.array([{}, 1], dtype=object)),
        pickle.dumps(np.zeros(2, [("a", "i4")])),
        pickle.dumps(np.dtype("i4")),
        pickle.dumps(1 + 2j),
        pickle.dumps(Path("x")),
    ],
)
def test_anything_else_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(InputError, match="more than arrays of numbers"):
        load_pickle(write(tmp_path, content))


def test_a_container_in_itself_is_refused(tmp_path: Path) -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(InputError, match="holds itself"):
        load_pickle(write(tmp_path, pickle.dumps(value)))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    whole = pickle.dumps({1: np.arange(100)})
    for content in (b"", b"text\n", whole[:-20], whole[:40]):
        with pytest.raises(InputError, match=r"content\.pkl"):
            load_pickle(write(tmp_path, content))
    with pytest.raises(InputError, match="file is missing"):
        load_pickle(tmp_path / "absent.pkl")


def test_a_shape_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    content = pickle.dumps(np.arange(4, dtype=np.int8), protocol=2)
    forged = content.replace(b"K\x04\x85", b"K\x09\x85")
    assert forged != content
    with pytest.raises(InputError, match="4 numbers for the shape"):
        load_pickle(write(tmp_path, forged))
