"""A score file survives the round trip, and a broken one is refused by file, id and key."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.log import InputError
from video_mmit import score_file
from video_mmit.score_file import ScoreFile

IDS = np.array(["cooking/a.mp4", "b+c/ü.mp4", "d.mp4"])


def arrays(**changes: Any) -> dict[str, Any]:
    scores = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    entries = {"scores": scores, "ids": IDS} | changes
    return {name: value for name, value in entries.items() if value is not None}


@pytest.mark.parametrize("kind", ["logit", "prob", "rank"])
def test_round_trip(tmp_path: Path, kind: str) -> None:
    scores = np.random.default_rng(0).random((3, 4))
    path = tmp_path / "s.npz"
    ScoreFile(IDS, scores, kind).save(path)
    again = score_file.load(str(path))
    np.testing.assert_array_equal(again.scores, scores)
    assert again.scores.dtype == np.float64
    assert (again.ids.tolist(), again.kind, again.source) == (IDS.tolist(), kind, str(path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["s.npz"]
    with np.load(path) as archive:
        assert sorted(archive.files) == ["ids", "kind", "scores"]


def test_a_file_of_the_two_named_keys_holds_logits(tmp_path: Path) -> None:
    path = tmp_path / "s.npz"
    np.savez(path, **arrays(other=np.ones(7)))
    found = ScoreFile.load(path)
    assert found.kind == "logit"
    assert found.scores.dtype == np.float32
    half = ScoreFile(IDS, np.ones((3, 4), np.float16))
    assert half.scores.dtype == np.float32


def test_an_interrupted_save_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.npz"
    ScoreFile(**arrays()).save(path)
    before = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        with pytest.raises(OSError, match="No space"):
            ScoreFile(**arrays()).save(path)
    assert path.read_bytes() == before
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        ScoreFile(**arrays()).save(path)
    assert path.read_bytes() == before


def test_rows_come_in_the_order_of_the_list() -> None:
    found = ScoreFile(**arrays())
    np.testing.assert_array_equal(found.rows(IDS[[2, 0, 1]].tolist()), found.scores[[2, 0, 1]])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([*IDS, "new.mp4", "x"], r"has no scores for 2 of 5 videos of the list, first: new\.mp4"),
        (IDS[[0, 2]], r"has scores for 1 videos that are not in the list, first: b\+c/ü\.mp4"),
        ([*IDS, IDS[0]], r"^ids: the list holds an id twice: cooking/a\.mp4"),
        ([], r"has scores for 3 videos that are not in the list, first: cooking/a\.mp4"),
    ],
)
def test_rows_need_exactly_the_videos_of_the_list(
    tmp_path: Path, ids: list[str], message: str
) -> None:
    path = tmp_path / "s.npz"
    ScoreFile(**arrays()).save(path)
    with pytest.raises(InputError, match=message) as caught:
        ScoreFile.load(path).rows(ids)
    assert str(caught.value).startswith((str(path), "ids"))


NAN, INFINITE = (np.array([[0, 1.0], [0, 2.0], [value, 0]]) for value in (np.nan, -np.inf))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": None}, "misses the key ids; it holds.*scores"),
        ({"scores": None}, "misses the key scores"),
        ({"ids": np.array(["a", "b", "a"])}, "1 ids occur more than once, first: a"),
        ({"ids": np.array(["a", "b"])}, "needs one row of scores for each of 2 ids; here: 3"),
        ({"ids": np.array([["a", "b", "c"]])}, r"ids must be strings, one a video.*\(1, 3\)"),
        ({"ids": np.array([b"a", b"b", b"c"])}, "ids must be strings.*S1"),
        ({"ids": np.arange(3)}, "ids must be strings.*int64"),
        ({"ids": np.array("a")}, "ids must be strings"),
        ({"scores": np.ones((3, 4), int)}, "scores must be floats, not: int64"),
        ({"scores": np.ones((3, 4), complex)}, "scores must be floats, not: complex128"),
        ({"scores": np.ones(3)}, r"scores must be \(videos, classes\).*: \(3,\)"),
        ({"scores": np.ones((3, 0))}, r"scores must be.*: \(3, 0\)"),
        ({"scores": np.ones((3, 4, 1))}, r"scores must be.*: \(3, 4, 1\)"),
        ({"scores": NAN}, r"scores of 1 videos are NaN or infinite, first: d\.mp4"),
        ({"scores": INFINITE}, r"scores of 1 videos are NaN or infinite, first: d\.mp4"),
        ({"kind": np.array("softmax")}, "kind must be one of logit, prob, rank: softmax"),
        ({"kind": np.array(["prob"])}, "kind must be a single string"),
        ({"kind": np.array(1)}, "kind must be a single string"),
        ({"kind": np.array("prob")}, r"probabilities of . videos are outside \[0, 1\], first"),
    ],
)
def test_a_wrong_array_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    path = tmp_path / "s.npz"
    np.savez(path, **arrays(**changes))
    with pytest.raises(InputError, match=message) as caught:
        ScoreFile.load(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_set_without_videos_is_refused() -> None:
    with pytest.raises(InputError, match="ids must be strings"):
        ScoreFile(np.array([], dtype=str), np.ones((0, 4)))
    with pytest.raises(InputError, match="kind must be one of"):
        ScoreFile(IDS, np.ones((3, 4)), "cosine")


@pytest.mark.parametrize("key", ["scores", "ids", "kind"])
def test_pickled_content_is_refused(tmp_path: Path, key: str) -> None:
    """An object array would run code of its author on loading."""

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    path = tmp_path / "s.npz"
    content = arrays(kind=np.array("logit")) | {key: np.array([Bomb()] * 3, dtype=object)}
    np.savez(path, allow_pickle=True, **content)
    with pytest.raises(InputError, match=r"s\.npz: cannot be read as an \.npz file of plain"):
        ScoreFile.load(path)
    assert not (tmp_path / "ran").exists()


def test_a_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.npz"
    with pytest.raises(InputError, match=r"s\.npz: no such file"):
        ScoreFile.load(path)
    with pytest.raises(InputError, match="no such file"):
        ScoreFile.load(tmp_path)
    for content in (b"", b"not an archive", b"PK\x03\x04 not an archive either", b"\x80\x04K\x01."):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"s\.npz: cannot be read"):
            ScoreFile.load(path)
    np.save(path.with_suffix(".npy"), np.ones(3))
    with pytest.raises(InputError, match="cannot be read"):
        ScoreFile.load(path.with_suffix(".npy"))


def test_a_truncated_or_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.npz"
    for save in (np.savez, np.savez_compressed):
        save(path, **arrays())
        whole = path.read_bytes()
        for length in range(0, len(whole), 7):
            path.write_bytes(whole[:length])
            with pytest.raises(InputError, match=r"cannot be read|misses the key"):
                ScoreFile.load(path)
        spot = whole.index(b"scores.npy") + 60  # inside the array
        path.write_bytes(whole[:spot] + bytes([whole[spot] ^ 255]) + whole[spot + 1 :])
        with pytest.raises(InputError, match="cannot be read"):
            ScoreFile.load(path)


def test_a_header_that_claims_too_much_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.npz"
    np.savez(path, **arrays(scores=np.ones((3, 4))))
    content = path.read_bytes()
    assert content.count(b"(3, 4), }" + b" " * 12) == 1
    path.write_bytes(content.replace(b"(3, 4), }" + b" " * 12, b"(3, 4000000000000), }"))
    with pytest.raises(InputError, match="cannot be read"):
        ScoreFile.load(path)
