"""LPW: published counts, labels, cameras, and every refusal."""

import os
from pathlib import Path

import pytest

from common.log import InputError
from reid_rqen.data.lpw import load_lpw
from reid_rqen.data.replicas import write_lpw

# Persons per view, as published; the largest view of a scene holds everyone.
PERSONS = {1: (662, 756, 410), 2: (874, 1501, 1751, 996), 3: (166, 203, 224, 151)}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree with the published numbers of persons and one (empty) frame per tracklet."""
    root = tmp_path_factory.mktemp("lpw")
    (root / "frame").touch()
    for scene, counts in PERSONS.items():
        for view, count in enumerate(counts, start=1):
            # Views 1, 2 and 4 show the last ones: labels built from a smaller one would be wrong.
            start = 0 if view == 3 else max(counts) - count
            for pid in range(start, start + count):
                home = root / "pep_256x128" / f"scen{scene}" / f"view{view}" / str(7 * pid + 5)
                home.mkdir(parents=True)
                os.link(root / "frame", home / "12.jpg")
    return root


def test_check_09_lpw_counts(published: Path) -> None:
    data = load_lpw(published)
    assert (len(data.train), len(data.query), len(data.gallery)) == (5866, 756, 1072)
    assert len(data.train) + len(data.query) + len(data.gallery) == 7694
    assert data.num_classes == 1975
    assert {t.pid for t in data.train} == set(range(1975))
    everyone = [*data.train, *data.query, *data.gallery]
    assert {t.camid for t in everyone} == set(range(11))
    assert len({(t.scene, t.view, t.camid) for t in everyone}) == 11
    assert {t.camid for t in data.train} == set(range(3, 11))
    assert data.skipped == {}  # every query has a positive in view 1 or 3
    positives = {t.pid: 0 for t in data.query}
    for tracklet in data.gallery:
        positives[tracklet.pid] += 1
    assert set(positives.values()) == {1, 2}


def test_labels_count_scene_2_first_in_numeric_order(published: Path) -> None:
    data = load_lpw(published)
    label = {(t.scene, int(t.frames[0].parent.name)): t.pid for t in data.train}
    assert label[2, 5] == 0  # "5" sorts after "12" as text
    assert label[2, 12] == 1
    assert label[2, 7 * 1750 + 5] == 1750
    assert label[3, 5] == 1751
    assert label[3, 7 * 223 + 5] == 1974


@pytest.mark.parametrize("level", [".", "pep_256x128", "pep_256x128/data_slim"])
def test_root_may_be_any_level(tmp_path: Path, level: str) -> None:
    write_lpw(tmp_path / level, frames=1)
    for start in {tmp_path, tmp_path / level}:
        assert len(load_lpw(start).query) == 4


def test_frames_sort_by_number(tmp_path: Path) -> None:
    write_lpw(tmp_path, {s: {v: 2 for v in (1, 2, 3)} for s in (1, 2, 3)}, frames=11)
    frames = load_lpw(tmp_path).query[0].frames
    assert [int(frame.stem) for frame in frames] == list(range(1, 12))


def test_split_is_configurable(tmp_path: Path) -> None:
    write_lpw(tmp_path, frames=1)
    data = load_lpw(tmp_path, train_scenes=[1], query=(2, 3), gallery_views=[1, 2, 4])
    assert len(data.train) == 11
    assert data.num_classes == 4
    assert len(data.query) == 5
    assert {t.scene for t in data.gallery} == {2}


def test_queries_without_a_positive_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_lpw(tmp_path, {1: {1: 1, 2: 3, 3: 2}, 2: {1: 2}, 3: {1: 2}}, frames=1)
    assert load_lpw(tmp_path).skipped == {"query_without_positive": 1}
    assert "1 queries have no positive" in caplog.text


def test_check_12_folder_that_is_no_number(tmp_path: Path) -> None:
    write_lpw(tmp_path, frames=1)
    (tmp_path / "scen2/view1/copy of 3").mkdir()
    with pytest.raises(InputError, match="scen2/view1/copy of 3"):
        load_lpw(tmp_path)


def test_check_12_empty_tracklet(tmp_path: Path) -> None:
    write_lpw(tmp_path, frames=1)
    (tmp_path / "scen1/view3/3/1.jpg").unlink()
    with pytest.raises(InputError, match=r"scen1/view3/3: tracklet holds no image"):
        load_lpw(tmp_path)


def test_check_12_frame_without_number(tmp_path: Path) -> None:
    write_lpw(tmp_path, frames=1)
    (tmp_path / "scen1/view3/3/first.jpg").touch()
    with pytest.raises(InputError, match=r"first\.jpg"):
        load_lpw(tmp_path)


def test_check_12_missing_parts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="data set not found"):
        load_lpw(tmp_path)
    write_lpw(tmp_path, {1: {1: 2, 2: 2, 3: 2}, 2: {1: 2}}, frames=1)
    with pytest.raises(InputError, match="scen3"):
        load_lpw(tmp_path)
    with pytest.raises(InputError, match="view4"):
        load_lpw(tmp_path, train_scenes=[2], gallery_views=[4])


def test_check_12_overlapping_train_and_test(tmp_path: Path) -> None:
    write_lpw(tmp_path, frames=1)
    with pytest.raises(InputError, match="scene 1"):
        load_lpw(tmp_path, train_scenes=(1, 2))
    with pytest.raises(InputError, match="gallery_views"):
        load_lpw(tmp_path, gallery_views=(1, 2))
