"""MARS: the published metadata through our reader, galleries by protocol, contradictions."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from common.log import InputError
from reid_rqen.data.mars import MarsInfo, load_mars, read_info, select
from reid_rqen.data.replicas import write_mars
from reid_rqen.data.tracklet import ReidData, Tracklet, count_unmatched
from reid_rqen.tools.prepare_mars import prepare

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def published() -> Path:
    """Folder of the three published .mat files."""
    shared = os.environ.get("VISION_TASKS_DATA", REPOSITORY.parent / "shared" / "data")
    folder = Path(shared) / "mars_info"
    if not folder.is_dir():
        pytest.skip(f"MARS metadata not found in {folder} (set VISION_TASKS_DATA)")
    return folder


@pytest.fixture(scope="module")
def info(published: Path) -> MarsInfo:
    return read_info(published)


@pytest.fixture(scope="module")
def whole(published: Path, info: MarsInfo, tmp_path_factory: pytest.TempPathFactory) -> ReidData:
    """The published tables with made-up name lists and person folders, without images."""
    root = tmp_path_factory.mktemp("mars")
    (root / "info").mkdir()
    for name in ("tracks_train_info.mat", "tracks_test_info.mat", "query_IDX.mat"):
        (root / "info" / name).symlink_to(published / name)
    for part, table in (("train", info.train), ("test", info.test)):
        lines = []
        for row, (start, end, pid, camera) in enumerate(table.tolist()):
            digits = "00-1" if pid < 0 else f"{pid:04d}"
            (root / f"bbox_{part}" / digits).mkdir(parents=True, exist_ok=True)
            stem = f"{digits}C{camera}T{row % 10_000:04d}F"
            lines += [f"{stem}{n:03d}.jpg\r\n" for n in range(1, end - start + 1)]
        (root / "info" / f"{part}_name.txt").write_bytes("".join(lines).encode())
    return load_mars(root)


@pytest.fixture
def replica(tmp_path: Path) -> Path:
    return write_mars(tmp_path)


def lengths(tracklets: list[Tracklet]) -> list[int]:
    return [len(tracklet.frames) for tracklet in tracklets]


def test_check_09_mars_train(whole: ReidData) -> None:
    size = lengths(whole.train)
    assert (len(size), sum(size), whole.num_classes) == (8298, 509_914, 625)
    assert (min(size), np.median(size), max(size)) == (5, 36, 900)
    assert np.mean(size) == pytest.approx(61.5, abs=0.05)
    assert sum(n < 8 for n in size) == 86
    cameras: dict[int, set[int]] = {}
    for tracklet in whole.train:
        cameras.setdefault(tracklet.pid, set()).add(tracklet.camid)
    assert sum(len(seen) == 1 for seen in cameras.values()) == 6
    assert set.union(*cameras.values()) == {1, 2, 3, 4, 5, 6}


def test_check_09_mars_test(whole: ReidData) -> None:
    size = lengths(whole.gallery)
    assert (len(size), sum(size)) == (12_180, 681_089)
    assert (min(size), np.median(size), max(size)) == (2, 30, 920)
    assert len({t.pid for t in whole.gallery}) == 636
    for pid, tracklets, frames in ((-1, 870, 23_380), (0, 3248, 147_743)):
        part = [t for t in whole.gallery if t.pid == pid]
        assert (len(part), sum(lengths(part))) == (tracklets, frames)


def test_check_09_mars_query(whole: ReidData) -> None:
    size = lengths(whole.query)
    assert (len(size), sum(size)) == (1980, 114_493)
    assert (min(size), np.median(size), max(size)) == (2, 35, 880)
    assert len({t.pid for t in whole.query}) == 626
    assert len({(t.pid, t.camid) for t in whole.query}) == 1980
    assert whole.query_index is not None
    assert [whole.gallery[row] for row in whole.query_index] == whole.query


@pytest.mark.parametrize(
    ("protocol", "gallery", "unmatched"),
    [("mars_official", 12_180, 0), ("mars_11310", 11_310, 0), ("mars_9330", 9330, 140)],
)
def test_check_09_mars_galleries(
    info: MarsInfo, protocol: str, gallery: int, unmatched: int
) -> None:
    chosen = select(info, protocol)
    assert (len(chosen.query), len(chosen.gallery)) == (1980, gallery)
    query, rest = (
        [Tracklet((), int(pid), int(camera)) for pid, camera in info.test[rows, 2:]]
        for rows in (chosen.query, chosen.gallery)
    )
    assert count_unmatched(query, rest) == unmatched
    if protocol == "mars_9330":
        assert chosen.query_index is None
        assert not set(chosen.gallery) & set(chosen.query)
    else:
        assert chosen.gallery[chosen.query_index].tolist() == chosen.query.tolist()


def test_check_09_mars_test_without_query(info: MarsInfo) -> None:
    rest = np.delete(info.test, info.query, axis=0)
    assert (len(rest), (rest[:, 1] - rest[:, 0]).sum()) == (10_200, 566_596)
    assert len(set(rest[:, 2].tolist()) - {-1, 0}) == 620


@pytest.mark.parametrize(
    ("protocol", "gallery", "index"),
    [
        ("mars_official", 14, [2, 4, 5, 7, 8, 10, 11, 13]),
        ("mars_11310", 13, [1, 3, 4, 6, 7, 9, 10, 12]),
        ("mars_9330", 5, None),
    ],
)
def test_replica_by_protocol(
    replica: Path, protocol: str, gallery: int, index: list[int] | None
) -> None:
    data = load_mars(replica, protocol)
    assert (len(data.query), len(data.gallery), data.protocol) == (8, gallery, protocol)
    assert data.query_index is None if index is None else data.query_index.tolist() == index
    assert all(frame.is_file() for t in data.train + data.gallery for frame in t.frames)
    assert data.skipped == ({"query_without_positive": 4} if index is None else {})


def test_uint16_query_index_does_not_wrap(replica: Path) -> None:
    """0 as a 1-based row is an error, not row 65535."""
    savemat(replica / "info/query_IDX.mat", {"query_IDX": np.array([[0]], dtype=np.uint16)})
    with pytest.raises(InputError, match=r"query_IDX.mat: index not in 1\.\.14: 0"):
        load_mars(replica)


def edit(path: Path, change: Callable[[list[str]], None]) -> None:
    lines = path.read_text().split()
    change(lines)
    path.write_bytes("".join(f"{line}\r\n" for line in lines).encode())


@pytest.mark.parametrize("strange", ["0001C2T0001F002.jpg", "0003C1T0001F002.jpg"])
def test_check_12_mixed_tracklet_names_tracklet_and_frame(replica: Path, strange: str) -> None:
    def change(lines: list[str]) -> None:
        lines[1] = strange

    edit(replica / "info/train_name.txt", change)
    with pytest.raises(InputError, match=f"tracklet 1 is of person 1, camera 1.*{strange}"):
        load_mars(replica)


def test_check_12_name_list_too_long(replica: Path) -> None:
    edit(replica / "info/test_name.txt", lambda lines: lines.append(lines[-1]))
    with pytest.raises(InputError, match=r"test_name\.txt: the track table covers 42 lines: 43"):
        load_mars(replica)


@pytest.mark.parametrize(("column", "value"), [(0, 5), (1, 2)])
def test_check_12_tracks_must_tile(replica: Path, column: int, value: int) -> None:
    path = replica / "info/tracks_test_info.mat"
    table = loadmat(path)["track_test_info"]
    table[1, column] += value
    savemat(path, {"track_test_info": table})
    with pytest.raises(InputError, match=r"tracks_test_info.mat: row [23] leaves a gap"):
        load_mars(replica)


def test_check_12_overlapping_identities(replica: Path) -> None:
    for name in ("tracks_test_info.mat", "test_name.txt"):
        other = name.replace("test", "train")
        data = (replica / "info" / name).read_bytes().replace(b"track_test", b"track_train")
        (replica / "info" / other).write_bytes(data)
    table = loadmat(replica / "info/tracks_test_info.mat")["track_test_info"]
    savemat(replica / "info/tracks_train_info.mat", {"track_train_info": table})
    (replica / "bbox_train").rename(replica / "old")
    (replica / "bbox_train").symlink_to(replica / "bbox_test")
    with pytest.raises(InputError, match="4 identities are in train and test"):
        load_mars(replica)


def test_check_12_missing_parts(replica: Path) -> None:
    with pytest.raises(InputError, match="accepted: mars_official, mars_11310, mars_9330: mars"):
        load_mars(replica, "mars")
    (replica / "bbox_test/0004").rename(replica / "moved")
    with pytest.raises(InputError, match="bbox_test/0004: person folder is missing"):
        load_mars(replica)
    (replica / "info/query_IDX.mat").unlink()
    with pytest.raises(InputError, match=r"query_IDX\.mat: file is missing"):
        load_mars(replica)


def test_name_lists_are_rebuilt_from_the_tree(replica: Path) -> None:
    lists = [replica / "info" / f"{part}_name.txt" for part in ("train", "test")]
    wanted = [path.read_bytes() for path in lists]
    for path in lists:
        path.unlink()
    with pytest.raises(InputError, match=r"train_name.txt.*prepare_mars"):
        load_mars(replica)
    prepare(replica)
    assert [path.read_bytes() for path in lists] == wanted


def test_a_tree_with_a_lost_image_is_refused(replica: Path) -> None:
    (replica / "info/test_name.txt").unlink()
    (replica / "bbox_test/0002/0002C1T0001F002.jpg").unlink()
    with pytest.raises(InputError, match="covers 42 lines: 41"):
        prepare(replica)
