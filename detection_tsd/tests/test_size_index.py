"""Sizes from headers."""

import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common.log import InputError
from detection_tsd.data import size_index as module
from detection_tsd.data.size_index import picture_size, size_index
from detection_tsd.data.transforms import read_rgb


def save(path: Path, height: int, width: int, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(image).save(path, **options)
    return path


def exif_with_thumbnail() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.zeros((9, 7, 3), np.uint8)).save(stream, "JPEG")
    return b"Exif\0\0" + stream.getvalue()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.jpg", {}),
        ("a.jpg", {"progressive": True}),
        ("a.jpg", {"exif": exif_with_thumbnail(), "comment": b"\xff\xc0\0\x11\x08\0\1\0\1"}),
        ("a.png", {}),
        ("a.bmp", {}),
        ("a.gif", {}),
        ("a.webp", {}),
    ],
)
def test_sizes_are_those_of_the_decoder(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    path = save(tmp_path / name, 37, 53, **options)
    assert picture_size(path) == read_rgb(path).shape[:2] == (37, 53)


def test_orientation_turns_nothing(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    assert picture_size(save(tmp_path / "a.jpg", 20, 30, exif=exif)) == (20, 30)


def test_fill_and_stray_bytes_between_segments(tmp_path: Path) -> None:
    data = save(tmp_path / "a.jpg", 20, 30).read_bytes()
    (tmp_path / "b.jpg").write_bytes(data[:2] + b"\0\0\xff\xff" + data[2:])
    assert picture_size(tmp_path / "b.jpg") == (20, 30)


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8", b"\xff\xd8\xff\xe0\0", b"\xff\xd8\xff\xc0\0\x11\x08\0"]
)
def test_a_file_without_a_header(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(InputError, match=r"a\.jpg: picture cannot be decoded: \d bytes"):
        picture_size(tmp_path / "a.jpg")


def test_order_and_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 3)
    paths = [save(tmp_path / "set" / f"{k}.png", 10 + k, 20) for k in range(10)][::-1]
    expected = [[19 - k, 20] for k in range(10)]
    cache = tmp_path / "index" / "sizes.npz"
    got = size_index(paths, cache)
    assert got.dtype == np.int64
    assert got.tolist() == size_index(paths).tolist() == expected
    assert [path.name for path in cache.parent.iterdir()] == ["sizes.npz"]
    for path in paths:
        path.unlink()
    assert size_index(paths, cache).tolist() == expected  # from the cache
    with pytest.raises(InputError, match=r"0\.png: picture cannot be read: No such file"):
        size_index(paths[::-1], cache)  # another order is another key


def test_a_moved_set_keeps_its_cache(tmp_path: Path) -> None:
    names = [f"train/{k}.png" for k in range(3)]
    paths = [save(tmp_path / "old" / name, 10 + k, 20) for k, name in enumerate(names)]
    size_index(paths, tmp_path / "sizes.npz")
    (tmp_path / "old").rename(tmp_path / "new")
    for path in (tmp_path / "new").rglob("*.png"):
        path.write_bytes(b"")
    moved = [tmp_path / "new" / name for name in names]
    assert size_index(moved, tmp_path / "sizes.npz").tolist() == [[10, 20], [11, 20], [12, 20]]


@pytest.mark.parametrize("damage", [b"", b"no archive", b"PK\3\4 cut off"])
def test_a_damaged_cache_is_made_anew(
    tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    paths, cache = [save(tmp_path / "a.png", 10, 20)], tmp_path / "sizes.npz"
    cache.write_bytes(damage)
    with caplog.at_level(logging.WARNING):
        assert size_index(paths, cache).tolist() == [[10, 20]]
    assert "is damaged" in caplog.text
    caplog.clear()
    assert size_index(paths, cache).tolist() == [[10, 20]]
    assert not caplog.records


def test_unreadable_pictures_are_tried_again(tmp_path: Path) -> None:
    paths, cache = [tmp_path / f"{k}.png" for k in range(3)], tmp_path / "sizes.npz"
    save(paths[0], 10, 20)
    paths[2].write_bytes(b"\x89PNG cut off")
    with pytest.raises(InputError, match=r"1\.png: picture cannot be read"):
        size_index(paths, cache)
    sizes = size_index(paths, cache, allow_missing=True)
    assert sizes.tolist() == [[10, 20], [0, 0], [0, 0]]
    save(paths[1], 30, 40)
    assert size_index(paths, cache, allow_missing=True).tolist() == [[10, 20], [30, 40], [0, 0]]
    save(paths[2], 5, 6)
    assert size_index(paths, cache).tolist() == [[10, 20], [30, 40], [5, 6]]


def test_a_cache_that_cannot_be_written_only_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way of a folder")
    paths = [save(tmp_path / "a.png", 10, 20)]
    with caplog.at_level(logging.WARNING):
        assert size_index(paths, tmp_path / "file" / "sizes.npz").tolist() == [[10, 20]]
    assert "sizes are not kept" in caplog.text


def test_no_pictures(tmp_path: Path) -> None:
    assert size_index([], tmp_path / "sizes.npz").shape == (0, 2)
    assert size_index([], tmp_path / "sizes.npz").shape == (0, 2)
