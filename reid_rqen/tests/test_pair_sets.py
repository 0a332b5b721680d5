"""PRID 2011 and iLIDS-VID: who is used, which half is which, and bad split files."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from common.log import InputError
from reid_rqen.data.ilidsvid import load_ilidsvid
from reid_rqen.data.prid2011 import load_prid2011
from reid_rqen.data.replicas import write_ilidsvid, write_ls_set, write_prid2011
from reid_rqen.data.tracklet import Tracklet
from reid_rqen.tools.prepare_splits import prepare

MAT = "train-test people splits/train_test_splits_ilidsvid.mat"


@pytest.fixture
def prid(tmp_path: Path) -> Path:
    """Persons 1-3 have 26, 27, 28 frames in camera a, person 4 has 26 in camera b, 5-6 have 27."""
    lengths = {("a", 1): 26, ("a", 2): 27, ("a", 3): 28, ("b", 4): 26}
    return write_prid2011(tmp_path, frames=lambda camera, person: lengths.get((camera, person), 27))


@pytest.fixture
def ilids(tmp_path: Path) -> Path:
    return write_ilidsvid(tmp_path)


def people(tracklets: list[Tracklet]) -> list[int]:
    return [tracklet.pid for tracklet in tracklets]


def test_check_12_prid_keeps_27_frames_in_both_cameras(prid: Path) -> None:
    write_ls_set(prid / "train_test_splits_prid.mat", 4)
    data = load_prid2011(prid, split=3)
    train = {int(t.frames[0].parent.name[-4:]) for t in data.train}
    assert train | set(people(data.query)) == {2, 3, 5, 6}
    assert data.skipped == {"short_persons": 2}
    assert {len(t.frames) for t in data.query + data.train} == {27, 28}


def test_prid_ignores_the_numbers_its_cameras_do_not_share(tmp_path: Path) -> None:
    """Number 201 is a different person in each camera."""
    write_prid2011(tmp_path, persons=2, frames=1)
    home = tmp_path / "multi_shot/cam_a/person_0201"
    home.mkdir()
    (tmp_path / "multi_shot/cam_b/person_0201/0001.png").rename(home / "0001.png")
    (tmp_path / "multi_shot/cam_b/person_0201/0001.png").touch()
    data = load_prid2011(tmp_path, min_frames=1)
    assert len(data.query) + data.num_classes == 2


@pytest.mark.parametrize("level", ["", "prid_2011", "prid_2011/multi_shot"])
def test_prid_root_levels(tmp_path: Path, level: str) -> None:
    write_prid2011(tmp_path / "prid_2011", persons=4, frames=1)
    data = load_prid2011(tmp_path / level, min_frames=1)
    assert len(data.train) == 4
    assert data.protocol == "closed_pair"


def test_check_12_first_half_of_ls_set_is_the_test_half(ilids: Path) -> None:
    rows = loadmat(ilids / MAT)["ls_set"].astype(int)
    for split in range(10):
        data = load_ilidsvid(ilids, split)
        # Persons are numbered 1, 3, 5, ...: index i of the sorted list is person 2i - 1.
        assert sorted(people(data.query)) == sorted(2 * rows[split, :3] - 1)
        assert people(data.gallery) == people(data.query)
        train = {int(t.frames[0].parent.name[-3:]) for t in data.train}
        assert train == set(2 * rows[split, 3:] - 1)
        assert {t.pid for t in data.train} == {0, 1, 2}
    assert {t.camid for t in data.query} == {0}
    assert {t.camid for t in data.gallery} == {1}


@pytest.mark.parametrize("level", [".", "i-LIDS-VID", "i-LIDS-VID/sequences"])
def test_ilids_root_levels_and_shipped_splits(ilids: Path, level: str) -> None:
    assert people(load_ilidsvid(ilids / level, 4).query) == people(load_ilidsvid(ilids, 4).query)
    assert load_ilidsvid(ilids).skipped == {}


def test_generated_splits_are_seeded_halves_and_stated(
    ilids: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (ilids / MAT).unlink()
    halves = [load_ilidsvid(ilids, split) for split in range(10)]
    assert all(data.skipped == {"generated_split": 1} for data in halves)
    assert "generated from seed 0" in caplog.text
    assert all(len(data.query) == data.num_classes == 3 for data in halves)
    assert len({tuple(people(data.query)) for data in halves}) > 3
    assert people(load_ilidsvid(ilids, 5).query) == people(halves[5].query)


def test_prepared_json_gives_the_generated_splits(ilids: Path, tmp_path: Path) -> None:
    prepare("ilidsvid", ilids, tmp_path / "own.json")
    prepare("ilidsvid", ilids, tmp_path / "other.json", seed=1)
    (ilids / MAT).unlink()
    wanted = [people(load_ilidsvid(ilids, split).query) for split in range(10)]
    own = [people(load_ilidsvid(ilids, s, tmp_path / "own.json").query) for s in range(10)]
    other = [people(load_ilidsvid(ilids, s, tmp_path / "other.json").query) for s in range(10)]
    assert own == wanted
    assert other != wanted
    with pytest.raises(InputError, match="accepted: prid2011, ilidsvid"):
        prepare("mars", ilids, tmp_path / "x.json")


@pytest.mark.parametrize("split", [-1, 10])
def test_check_12_split_number_outside(ilids: Path, split: int) -> None:
    with pytest.raises(InputError, match=rf"split: must be in 0\.\.9: {split}"):
        load_ilidsvid(ilids, split)


def overlapping(rows: np.ndarray) -> np.ndarray:
    return np.concatenate([rows[:, :3], rows[:, :3]], axis=1)


def outside(rows: np.ndarray) -> np.ndarray:
    return np.where(rows == 6, 7, rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (overlapping, "split 0: 3 persons are in train and test"),
        (outside, r"index is not in 1\.\.6: 7"),
        (lambda rows: rows - 1, r"index is not in 1\.\.6: 0"),
        (lambda rows: rows[:, :5], "one column for each of the 6 persons"),
        (lambda rows: rows[:9], "must hold 10 splits: 9"),
    ],
)
def test_check_12_bad_mat(ilids: Path, change, message: str) -> None:
    savemat(ilids / MAT, {"ls_set": change(loadmat(ilids / MAT)["ls_set"].astype(int))})
    with pytest.raises(InputError, match=message) as error:
        load_ilidsvid(ilids)
    assert "train_test_splits_ilidsvid.mat" in str(error.value)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"train": ["person001"], "test": ["person001"]}, "in train and test: person001"),
        ({"train": ["person001"], "test": ["person002"]}, "data set lacks: person002"),
        ({"train": ["person001"], "test": []}, "test is empty"),
        ({"train": ["person001"]}, "not a list of"),
    ],
)
def test_check_12_bad_json(ilids: Path, entry: dict[str, list[str]], message: str) -> None:
    path = ilids / "splits.json"
    path.write_text(json.dumps([entry] * 10))
    with pytest.raises(InputError, match=message) as error:
        load_ilidsvid(ilids, split_file=path)
    assert "splits.json" in str(error.value)


@pytest.mark.parametrize("name", ["splits.json", "splits.mat"])
def test_damaged_or_missing_split_file(ilids: Path, name: str) -> None:
    with pytest.raises(InputError, match=name):
        load_ilidsvid(ilids, split_file=ilids / name)
    (ilids / name).write_bytes(b"\x80 no such format")
    with pytest.raises(InputError, match=name):
        load_ilidsvid(ilids, split_file=ilids / name)


def test_mat_without_the_variable(ilids: Path) -> None:
    savemat(ilids / "splits.mat", {"other": np.ones((10, 6))})
    with pytest.raises(InputError, match="variable is missing: ls_set"):
        load_ilidsvid(ilids, split_file=ilids / "splits.mat")


def test_empty_tracklet_and_missing_root(ilids: Path, tmp_path: Path) -> None:
    for frame in (ilids / "i-LIDS-VID/sequences/cam2/person003").iterdir():
        frame.unlink()
    with pytest.raises(InputError, match="cam2/person003: tracklet holds no image"):
        load_ilidsvid(ilids)
    with pytest.raises(InputError, match="data set not found"):
        load_prid2011(tmp_path)


def test_person_of_one_camera_is_left_out_and_counted(ilids: Path) -> None:
    home = ilids / "i-LIDS-VID/sequences/cam2/person003"
    home.rename(ilids / "elsewhere")
    write_ls_set(ilids / MAT, 5)
    assert load_ilidsvid(ilids).skipped == {"persons_of_one_camera": 1}
