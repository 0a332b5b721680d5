"""Submissions: header and bytes, atomic writing, files that are not what they say."""

import struct
from pathlib import Path

import numpy as np
import pytest

from common.log import InputError
from face_lfr.data.matrix_file import MatrixWriter, read_floats, read_matrix, write_matrix

FEATURE = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32)


def refused(path: Path, complaint: str) -> None:
    with pytest.raises(InputError) as error:
        read_matrix(path)
    assert str(error.value) == f"{path}{complaint}"


def test_check_12_header_size_and_content(tmp_path: Path) -> None:
    path = tmp_path / "new" / "submission.bin"
    write_matrix(path, FEATURE, rows=7)
    content = path.read_bytes()
    assert struct.unpack("<4i", content[:16]) == (7, 5, 20, 5)
    assert len(content) == 16 + 4 * 7 * 5
    assert content[16:] == FEATURE.tobytes()
    got = read_matrix(path)
    assert isinstance(got, np.memmap)
    assert not got.flags.writeable
    np.testing.assert_array_equal(got, FEATURE)
    assert [file.name for file in path.parent.iterdir()] == ["submission.bin"]


def test_check_12_a_wrong_number_of_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.bin"
    what = "needs 8 rows, one for each line of the list: 7"
    with pytest.raises(InputError, match=what):
        write_matrix(path, FEATURE, rows=8)
    with pytest.raises(InputError, match=what), MatrixWriter(path, 8, 5) as writer:
        writer.write(FEATURE)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="makes 7 rows, and rows=6"), MatrixWriter(path, 6, 5) as w:
        w.write(FEATURE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [np.float64, np.float16, ">f4"])
def test_other_numbers_and_layouts_become_float32(kind: object, tmp_path: Path) -> None:
    feature = FEATURE.astype(kind)[:, ::-1]  # type: ignore[call-overload]
    write_matrix(tmp_path / "s.bin", feature)
    np.testing.assert_array_equal(read_matrix(tmp_path / "s.bin"), feature.astype(np.float32))


def test_blocks_and_a_mapped_source(tmp_path: Path) -> None:
    feature = np.random.default_rng(1).random((70_000, 2), np.float32)
    np.save(tmp_path / "f.npy", feature)
    write_matrix(tmp_path / "s.bin", np.load(tmp_path / "f.npy", mmap_mode="r"))
    with MatrixWriter(tmp_path / "t.bin", 70_000, 2) as writer:
        for part in np.array_split(feature, 13):
            writer.write(part)
    assert (tmp_path / "s.bin").read_bytes() == (tmp_path / "t.bin").read_bytes()
    np.testing.assert_array_equal(read_matrix(tmp_path / "t.bin"), feature)


def test_an_old_file_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "s.bin"
    write_matrix(path, FEATURE)
    broken = FEATURE.astype(np.float64)
    broken[4, 1] = 1e39  # finite, and not in float32
    with pytest.raises(InputError, match="a feature is not finite, first row: 4"):
        write_matrix(path, broken)
    np.testing.assert_array_equal(read_matrix(path), FEATURE)
    assert len(list(tmp_path.iterdir())) == 1


def test_no_rows(tmp_path: Path) -> None:
    write_matrix(tmp_path / "s.bin", np.empty((0, 5)), rows=0)
    assert read_matrix(tmp_path / "s.bin").shape == (0, 5)


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="feature_ND has 1 dimensions"):
        write_matrix(tmp_path / "s.bin", FEATURE[0])
    with pytest.raises(ValueError, match=r"rows=2147483648, columns=5 do not fit"):
        MatrixWriter(tmp_path / "s.bin", 2**31, 5)
    with MatrixWriter(tmp_path / "s.bin", 7, 5) as writer:
        with pytest.raises(ValueError, match=r"shape \(7, 4\) has not 5 columns"):
            writer.write(FEATURE[:, :4])
        writer.write(FEATURE)


def test_files_that_are_no_matrix(tmp_path: Path) -> None:
    path = tmp_path / "s.bin"
    refused(path, ": file is missing")
    path.write_bytes(b"1234")
    refused(path, ": is shorter than the 16 bytes of its header: 4")
    path.write_bytes(struct.pack("<4i", 7, 5, 20, 6) + FEATURE.tobytes())
    refused(path, ": header is not rows, columns, 4 x columns, 5: [7, 5, 20, 6]")
    path.write_bytes(struct.pack("<4i", 7, 5, 20, 5) + FEATURE.tobytes()[:-4])
    refused(path, ": needs 156 bytes for 7 x 5 floats: 152")


def test_floats_without_a_header(tmp_path: Path) -> None:
    path = tmp_path / "feature.bin"
    path.write_bytes(FEATURE.tobytes())
    np.testing.assert_array_equal(read_floats(path, 5), FEATURE)
    with pytest.raises(InputError, match="not a whole number of rows of 4 float32, bytes: 140"):
        read_floats(path, 4)
    with pytest.raises(ValueError, match="columns=0"):
        read_floats(path, 0)
