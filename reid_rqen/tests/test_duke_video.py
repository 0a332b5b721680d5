"""DukeMTMC-VideoReID: layout, order, refusals."""

from pathlib import Path

import pytest

from common.log import InputError
from reid_rqen.data.duke_video import load_duke_video
from reid_rqen.data.replicas import write_duke_video


@pytest.fixture
def duke(tmp_path: Path) -> Path:
    return write_duke_video(tmp_path / "DukeMTMC-VideoReID", frames=11)


def test_parts_and_order(duke: Path) -> None:
    data = load_duke_video(duke)
    assert (len(data.train), len(data.query), len(data.gallery)) == (6, 3, 6)
    assert {t.pid for t in data.train} == {0, 1, 2}
    assert {t.pid for t in data.query} == {4, 5, 6}
    assert [frame.name[9:13] for frame in data.query[0].frames] == [
        f"{n:04d}" for n in range(1, 12)
    ]
    assert load_duke_video(duke.parent).skipped == data.skipped == {}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("0001_C2_F0002_X00018.jpg", "tracklet of camera 1 holds camera: 2"),
        ("0002_C1_F0002_X00018.jpg", "tracklet of person 1 holds person: 2"),
        ("12.jpg", "frame name is not"),
    ],
)
def test_check_12_mixed_tracklet(duke: Path, name: str, message: str) -> None:
    home = duke / "train/0001/0011"
    (home / "0001_C1_F0002_X00018.jpg").rename(home / name)
    with pytest.raises(InputError, match=message) as error:
        load_duke_video(duke)
    assert name in str(error.value)


def test_check_12_folders(duke: Path) -> None:
    (duke / "gallery/0005").rename(duke / "gallery/0002")
    with pytest.raises(InputError, match="holds person: 5"):
        load_duke_video(duke)
    (duke / "gallery/0002").rename(duke / "gallery/x")
    with pytest.raises(InputError, match="person folder is not a number: x"):
        load_duke_video(duke)
    with pytest.raises(InputError, match="data set not found"):
        load_duke_video(duke / "train")


def test_check_12_person_in_train_and_test(duke: Path) -> None:
    write_duke_video(duke, persons=4, frames=1)
    with pytest.raises(InputError, match="in train and test"):
        load_duke_video(duke)
