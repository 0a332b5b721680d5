"""A feature file survives the round trip, and a broken one is refused by key and row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.log import InputError
from reid_rqen.feature_file import Features, from_arrays, load, save


def arrays(**changes: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    entries = {
        "query_feat": rng.standard_normal((2, 4)).astype(np.float32),
        "query_pid": np.array([1, 2]),
        "query_cam": np.array([0, 1]),
        "gallery_feat": rng.standard_normal((3, 4)).astype(np.float32),
        "gallery_pid": np.array([1, 2, -1]),
        "gallery_cam": np.array([0, 1, 1]),
    }
    entries |= changes
    return {name: value for name, value in entries.items() if value is not None}


def test_round_trip(tmp_path: Path) -> None:
    train = {"train_feat": np.ones((2, 4), np.float32), "train_pid": np.array([5, 6])}
    train["train_cam"] = np.array([1, 2])
    features = from_arrays(arrays(query_index=np.array([0, 1]), **train))
    path = tmp_path / "f.npz"
    save(features, path)
    for left, right in zip(load(path), features, strict=True):
        np.testing.assert_array_equal(left, right)
    assert [entry.name for entry in tmp_path.iterdir()] == ["f.npz"]


def test_absent_optional_keys_are_none(tmp_path: Path) -> None:
    path = tmp_path / "f.npz"
    save(from_arrays(arrays()), path)
    assert load(path)[6:] == (None,) * 4


def test_types_are_widened_before_anything_is_subtracted() -> None:
    features = from_arrays(
        arrays(
            query_feat=np.ones((2, 4), np.float16),
            query_index=np.array([0, 1], np.uint16),
            query_pid=np.array([1, 2], np.uint8),
        )
    )
    assert features.query_feat.dtype == np.float32
    assert features.query_index is not None
    assert {features.query_index.dtype, features.query_pid.dtype} == {np.dtype(np.int64)}
    assert (features.query_index - 1).min() == -1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gallery_pid": None}, "misses the key gallery_pid"),
        ({"train_feat": np.ones((2, 4), np.float32)}, "misses the key train_pid"),
        ({"query_pid": np.array([1, 2, 3])}, "query_pid needs one entry per row.*: 3"),
        ({"query_pid": np.array([1.0, 2.0])}, "query_pid must hold integers, not: float64"),
        ({"query_pid": np.array([[1, 2]])}, "query_pid must be one-dimensional"),
        ({"query_feat": np.ones((2, 4), np.int64)}, "query_feat must hold floats, not: int64"),
        ({"query_feat": np.ones((2, 4, 1))}, "query_feat must be"),
        ({"query_feat": np.ones((2, 5))}, "dimensions differ"),
        ({"query_feat": np.ones((0, 4)), "query_pid": np.array([], int)}, "query_feat must be"),
        ({"query_feat": np.array([[0.0] * 4, [0, 0, np.nan, 0]])}, "query_feat is not.*: 1"),
        ({"query_feat": np.array([[1e300] * 4, [0.0] * 4])}, "query_feat is not finite.*: 0"),
        ({"query_index": np.array([0])}, "query_index needs one entry per query"),
        ({"query_index": np.array([0, 3])}, "query_index must be 0-based.*: 3"),
        ({"query_index": np.array([1, 1])}, "query_index points at another pid"),
        ({"query_cam": np.array([0, 0]), "query_index": np.array([0, 1])}, "another cam"),
    ],
)
def test_a_wrong_array_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    path = tmp_path / "f.npz"
    np.savez(path, **arrays(**changes))
    with pytest.raises(InputError, match=message) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.npz"
    with pytest.raises(InputError, match="no such file"):
        load(path)
    path.write_bytes(b"not an archive")
    with pytest.raises(InputError, match="cannot be read"):
        load(path)
    np.savez(path, **arrays())
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(InputError, match="cannot be read"):
        load(path)
    np.save(path.with_suffix(".npy"), np.ones(3))
    with pytest.raises(InputError, match="cannot be read"):
        load(path.with_suffix(".npy"))


def test_pickled_content_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.npz"
    np.savez(path, allow_pickle=True, **arrays(query_pid=np.array([{}, {}], dtype=object)))
    with pytest.raises(InputError, match="cannot be read"):
        load(path)


def test_save_writes_every_present_array(tmp_path: Path) -> None:
    Features(**arrays()).save(tmp_path / "f.npz")
    with np.load(tmp_path / "f.npz") as archive:
        assert set(archive.files) == set(arrays())
