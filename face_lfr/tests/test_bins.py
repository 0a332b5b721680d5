"""Verification sets: both kinds of images, both Pythons, and pickles that are not ours."""

import pickle
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest

from common.log import InputError
from face_lfr.data.bins import load_bin, write_bin
from face_lfr.data.replicas import encode, face, write_replica

JPEGS = [encode(face(person, number)) for person in (0, 1) for number in (0, 1)]
SAME = [True, False]


class Foreign:
    """Not something a verification set may hold."""


def dump(path: Path, content: object, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def refused(path: Path, complaint: str) -> None:
    with pytest.raises(InputError) as error:
        load_bin(path)
    assert str(error.value) == f"{path}{complaint}"


def python2(same: list[bool], images: list[bytes]) -> bytes:
    """What Python 2 writes for ([str, ...], [bool, ...]) at protocol 2."""
    code = (
        b"\x80\x02"
        + b"]("
        + b"".join(b"T" + struct.pack("<i", len(image)) + image for image in images)
    )
    return code + b"e](" + b"".join(b"\x88" if s else b"\x89" for s in same) + b"e\x86."


def python2_array(image: bytes) -> bytes:
    """What Python 2 writes for a uint8 array at protocol 2; its strings have one byte a letter."""
    none = b"J\xff\xff\xff\xff"
    kind = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNN" + 2 * none + b"K\x00tb"
    head = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    size = struct.pack("<i", len(image))
    return head + b"(K\x01(J" + size + b"t" + kind + b"\x89T" + size + image + b"tb"


def test_check_09_images_as_bytes(tmp_path: Path) -> None:
    write_bin(tmp_path / "sub" / "lfw.bin", JPEGS, SAME)
    found = load_bin(tmp_path / "sub" / "lfw.bin")
    assert found.name == "lfw"
    assert found.same_P.tolist() == SAME
    assert found.same_P.dtype == bool
    assert len(found.images) == 4
    for row, jpeg in enumerate(JPEGS):
        want = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        np.testing.assert_array_equal(found.images.read(row), want)
    assert [found.images.label(row) for row in range(4)] == [0, 0, 1, 1]
    assert found.images.name(3) == f"{tmp_path}/sub/lfw.bin image 3"
    # the reference evaluator opens it with nothing but pickle
    assert pickle.loads((tmp_path / "sub" / "lfw.bin").read_bytes()) == (JPEGS, SAME)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_check_09_images_as_arrays(protocol: int, tmp_path: Path) -> None:
    flat = [np.frombuffer(jpeg, np.uint8) for jpeg in JPEGS]
    images = [flat[0], flat[1].reshape(-1, 1), JPEGS[2], bytearray(JPEGS[3])]
    found = load_bin(dump(tmp_path / "a.bin", (images, np.array(SAME)), protocol))
    assert list(found.images.encoded) == JPEGS
    assert found.same_P.tolist() == SAME
    again = load_bin(dump(tmp_path / "a.bin", [tuple(images), list(np.array(SAME))], protocol))
    assert list(again.images.encoded) == JPEGS
    assert again.same_P.tolist() == SAME


def test_check_09_older_and_newer_names_of_numpy(tmp_path: Path) -> None:
    code = pickle.dumps(([np.frombuffer(jpeg, np.uint8) for jpeg in JPEGS], SAME), 2)
    assert b"numpy._core.multiarray" in code
    for name in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
        (tmp_path / "a.bin").write_bytes(code.replace(b"numpy._core.multiarray", name))
        assert list(load_bin(tmp_path / "a.bin").images.encoded) == JPEGS


def test_check_09_pickles_of_python_2(tmp_path: Path) -> None:
    path = tmp_path / "agedb_30.bin"
    path.write_bytes(python2(SAME, JPEGS))
    with pytest.raises(UnicodeDecodeError):
        pickle.loads(path.read_bytes())
    found = load_bin(path)
    assert list(found.images.encoded) == JPEGS
    assert found.same_P.tolist() == SAME
    arrays = b"".join(python2_array(jpeg) for jpeg in JPEGS)
    path.write_bytes(b"\x80\x02](" + arrays + b"e](\x88\x89e\x86.")
    assert list(load_bin(path).images.encoded) == JPEGS


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_check_09_a_foreign_class_is_refused(protocol: int, tmp_path: Path) -> None:
    what = ": names something that a verification set does not hold: "
    path = dump(tmp_path / "a.bin", ([*JPEGS, Foreign(), Foreign()], SAME), protocol)
    named = "copy_reg._reconstructor" if protocol == 0 else f"{Foreign.__module__}.Foreign"
    refused(path, what + named)


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (b"cos\nsystem\n(S'echo'\ntR.", "os.system"),
        (b"cbuiltins\neval\n(S'1'\ntR.", "builtins.eval"),
        (b"c__builtin__\ngetattr\n(S'1'\ntR.", "__builtin__.getattr"),
        (b"cnumpy\nload\n(S'1'\ntR.", "numpy.load"),
        (b"cnumpy.core.multiarray\nfromfile\n(S'1'\ntR.", "numpy.core.multiarray.fromfile"),
        (b"\x80\x04\x8c\x05numpy\x8c\x0brandom.rand\x93.", "numpy.random.rand"),
    ],
)
def test_check_09_foreign_calls_are_refused(code: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(code)
    refused(tmp_path / "a.bin", f": names something that a verification set does not hold: {name}")


def test_check_09_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    odd = ": holds an odd number of images, which are no pairs: 3"
    refused(dump(path, (JPEGS[:3], SAME)), odd)
    refused(dump(path, (JPEGS, [True])), ": holds 4 images, and truth values: 1")
    refused(dump(path, (JPEGS, [True, 2])), " pair 1: truth value is neither true nor false: 2")
    refused(dump(path, (JPEGS, SAME, 1)), ": is not a pair of images and truth values: tuple")
    refused(dump(path, ("ab", SAME)), ": is not a pair of two lists: str, list")
    text = " image 2: is neither bytes nor a row of uint8: "
    refused(dump(path, ([*JPEGS[:2], "text", b""], SAME)), text + "str")
    wide = np.zeros((2, 3), np.uint8)
    refused(dump(path, ([*JPEGS[:2], wide, b""], SAME)), text + "uint8 (2, 3)")
    refused(dump(path, ([*JPEGS[:2], np.uint8(3), b""], SAME)), text + "uint8")
    refused(dump(path, ([*JPEGS[:2], np.zeros(3), b""], SAME)), text + "float64 (3,)")


def test_files_that_are_no_pickle(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    refused(path, ": file is missing")
    for content in (b"", b"no pickle", pickle.dumps((JPEGS, SAME))[:-9], b"\x80\x04K\x01"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"{path}: is no readable pickle"):
            load_bin(path)


def test_images_that_cannot_be_decoded(tmp_path: Path) -> None:
    write_bin(tmp_path / "a.bin", [*JPEGS[:2], b"", b"no image"], SAME)
    images = load_bin(tmp_path / "a.bin").images
    for row in (2, 3):
        with pytest.raises(InputError, match=rf"a.bin image {row}: image cannot be decoded"):
            images.read(row)


def test_images_of_another_size(tmp_path: Path) -> None:
    large = cv2.resize(face(0, 0), (224, 224))
    flat = cv2.resize(face(0, 0), (200, 224))
    encoded = [encode(large, ".png"), encode(flat, ".png"), *JPEGS[:2]]
    write_bin(tmp_path / "a.bin", encoded, SAME)
    images = load_bin(tmp_path / "a.bin").images
    assert images.read(0).shape == (112, 112, 3)
    assert np.abs(images.read(0).astype(int) - face(0, 0)).mean() < 6
    what = r"image 1: is neither 112 wide nor square: \(224, 200, 3\)"
    with pytest.raises(InputError, match=what):
        images.read(1)


def test_bad_arguments_of_the_writer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="jpegs has 3 entries; issame of 2 needs twice"):
        write_bin(tmp_path / "a.bin", JPEGS[:3], SAME)
    with pytest.raises(ValueError, match="no bytes"):
        write_bin(tmp_path / "a.bin", [*JPEGS[:3], "a"], SAME)  # type: ignore[list-item]
    assert not list(tmp_path.iterdir())


def test_a_set_survives_pickling(tmp_path: Path) -> None:
    found = load_bin(write_replica("bin", tmp_path))
    again = pickle.loads(pickle.dumps(found))
    np.testing.assert_array_equal(again.images.read(5), found.images.read(5))
