"""Lists of images: three formats, read, written and refused by line."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from hydra.utils import instantiate

from common.log import InputError
from face_lfr.data.image_list import Entry, load_list, read_list, write_list
from face_lfr.data.noise import noisy_labels
from face_lfr.tests.launch import config

ENTRIES = [Entry("b/1 one.png", 1), Entry("a/2.png", 0), Entry("/abs/3.png", 1)]


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize(
    ("name", "format", "text"),
    [
        ("a.txt", None, "b/1 one.png 1\na/2.png 0\n/abs/3.png 1\n"),
        ("a.txt", None, "b/1 one.png\t1\r\na/2.png\t0\r\n/abs/3.png\t1"),
        ("a.txt", None, "\ufeffb/1 one.png 1.0\na/2.png 0.000\n/abs/3.png 1e0\n"),
        ("a.lst", None, "7\t1.000000\tb/1 one.png\n9\t0\ta/2.png\n0\t1\t/abs/3.png\n"),
        ("a.lst", None, "7\t1\t5.5\tb/1 one.png\n9\t0\t2\t3\ta/2.png\n0\t1\t0\t/abs/3.png\n"),
        ("a.txt", "lst", "7\t1\tb/1 one.png\n9\t0\ta/2.png\n0\t1\t/abs/3.png\n"),
        ("a.lst", "insightface", "1\tb/1 one.png\t1\n1\ta/2.png\t0\n0\t/abs/3.png\t1\t5\t6\n"),
        ("a.lst", "plain", "b/1 one.png 1\na/2.png 0\n/abs/3.png 1\n"),
    ],
)
def test_formats(tmp_path: Path, name: str, format: str | None, text: str) -> None:
    assert read_list(write(tmp_path / name, text), format) == ENTRIES


@pytest.mark.parametrize(
    ("format", "text"),
    [
        ("plain", "b/1 one.png 1\na/2.png 0\n/abs/3.png 1\n"),
        ("lst", "0\t1.000000\tb/1 one.png\n1\t0.000000\ta/2.png\n2\t1.000000\t/abs/3.png\n"),
        ("insightface", "1\tb/1 one.png\t1\n1\ta/2.png\t0\n1\t/abs/3.png\t1\n"),
    ],
)
def test_what_is_written_is_read(tmp_path: Path, format: str, text: str) -> None:
    path = tmp_path / "new" / "a.txt"
    write_list(path, ENTRIES, format)
    assert path.read_text() == text
    assert read_list(path, format) == ENTRIES
    assert [entry.name for entry in path.parent.iterdir()] == ["a.txt"]
    write_list(tmp_path / "b.lst", [("x.png", 3)])
    assert (tmp_path / "b.lst").read_text() == "0\t3.000000\tx.png\n"


@pytest.mark.parametrize(
    ("format", "line", "message"),
    [
        ("plain", "only", r"a.txt line 2: is not of the format plain: 'only'"),
        ("plain", "", r"a.txt line 2: is not of the format plain: ''"),
        ("plain", " 3", r"a.txt line 2: is not of the format plain: ' 3'"),
        ("plain", "x.png one", r"a.txt line 2: label is no class number: 'one'"),
        ("plain", "x.png 1.5", r"a.txt line 2: label is no class number: '1.5'"),
        ("plain", "x.png -1", r"a.txt line 2: label is no class number: '-1'"),
        ("plain", "x.png inf", r"a.txt line 2: label is no class number: 'inf'"),
        ("plain", "x.png nan", r"a.txt line 2: label is no class number: 'nan'"),
        ("lst", "0 1 x.png", r"a.txt line 2: is not of the format lst"),
        ("lst", "0\t1", r"a.txt line 2: is not of the format lst"),
        ("lst", "0\t1\t", r"a.txt line 2: is not of the format lst"),
        ("lst", "1\tx.png\t1", r"a.txt line 2: label is no class number: 'x.png'"),
        ("insightface", "1\tx.png", r"a.txt line 2: is not of the format insightface"),
        ("insightface", "0\t1\tx.png", r"a.txt line 2: label is no class number: 'x.png'"),
    ],
)
def test_wrong_lines_are_named(tmp_path: Path, format: str, line: str, message: str) -> None:
    good = {"plain": "a.png 0", "lst": "0\t0\ta.png", "insightface": "1\ta.png\t0"}[format]
    with pytest.raises(InputError, match=message):
        read_list(write(tmp_path / "a.txt", f"{good}\n{line}\n{good}\n"), format)


def test_files_that_are_no_list(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no.txt: list cannot be read: No such file"):
        read_list(tmp_path / "no.txt")
    with pytest.raises(InputError, match=r"a.txt: list is empty"):
        read_list(write(tmp_path / "a.txt", ""))
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"a.txt: list is no UTF-8 text"):
        read_list(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="format='csv'; accepted: plain, lst, insightface"):
        read_list(tmp_path / "a.txt", "csv")


@pytest.mark.parametrize("path", ["", " a", "a ", "a\tb", "a\nb", "\n"])
def test_the_writer_refuses_paths(tmp_path: Path, path: str) -> None:
    with pytest.raises(ValueError, match="cannot stand in a list"):
        write_list(tmp_path / "a.txt", [("a", 0), (path, 0)])
    assert not list(tmp_path.iterdir())


def test_the_writer_refuses_other_entries(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="label=-1 of 'a'"):
        write_list(tmp_path / "a.txt", [("a", -1)])
    with pytest.raises(ValueError, match="entries is empty"):
        write_list(tmp_path / "a.txt", [])
    with pytest.raises(ValueError, match="format='csv'"):
        write_list(tmp_path / "a.txt", ENTRIES, "csv")


def test_a_training_set(tmp_path: Path) -> None:
    for name, level in (("one x.png", 1), ("two.png", 2)):
        cv2.imwrite(str(tmp_path / name), np.full((4, 4, 3), (0, 0, level), np.uint8))
    path = tmp_path / "train.txt"
    write_list(path, [("two.png", 1), ("one x.png", 0), (str(tmp_path / "two.png"), 1)])
    data = instantiate(
        config("train", "data=list", f"data.path={path}", f"data.root={tmp_path}").data
    )
    assert (data.name, data.root, data.num_classes) == ("list", tmp_path, 2)
    assert data.labels_N.tolist() == [1, 0, 1]
    assert [data.images.label(row) for row in range(3)] == [1, 0, 1]
    assert [data.images.read(row)[0, 0, 0] for row in range(3)] == [2, 1, 2]
    assert data.images.name(1) == str(tmp_path / "one x.png")
    noisy = load_list(path, tmp_path, noise=1.0, noise_seed=1)
    assert noisy.labels_N.tolist() == noisy_labels(data.labels_N, 2, 1.0, 1).tolist() != [1, 0, 1]


def test_classes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "a.png 0\nb.png 2\n")
    with pytest.raises(InputError, match=r"a.txt: class without an image .*: 1"):
        load_list(path, tmp_path)
    data = load_list(path, tmp_path, classes=5, allow_gaps=True)
    assert (data.num_classes, data.skipped) == (5, {"classes without an image": 3})
    with pytest.raises(InputError, match=r"a.txt line 2: label is not in \[0, 2\), .*: 2"):
        load_list(path, tmp_path, classes=2)
    with pytest.raises(InputError, match=r"b.png: image cannot be read"):
        data.images.read(1)
