"""Training draws: statistics of the reference's rule, reproducibility, unreadable files."""

import math
import pickle
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from common.log import InputError
from common.samplers import ResumableSampler
from reid_rqen.data.lpw import load_lpw
from reid_rqen.data.replicas import write_lpw
from reid_rqen.data.sets import (
    Draw,
    FrameDraws,
    PKDraws,
    SetDraws,
    TrackletFrames,
    TrackletSequences,
    TripletDraws,
)
from reid_rqen.data.tracklet import ReidData, Tracklet
from reid_rqen.data.transforms import FrameTransform

DRAWS = 100_000
TRANSFORM = FrameTransform(size=(14, 7))


def tracklet(pid: int, camid: int, frames: int = 10, view: int | None = None) -> Tracklet:
    paths = tuple(Path(f"{pid}/{camid}/{n}.jpg") for n in range(frames))
    return Tracklet(paths, pid, camid, view=view)


TWO_CAMERAS = [tracklet(pid, camid) for pid in range(6) for camid in (0, 1)]

# Two scenes with cameras 0-2 and 3-5 that share view numbers 1-3; nobody but 0 and 4 is everywhere.
SEEN = {0: (1, 2, 3), 1: (1, 2), 2: (2, 3), 3: (3,), 4: (1, 2, 3), 5: (1,), 6: (2,)}
POOLED = [
    tracklet(pid, view - 1 + (3 if pid > 3 else 0), view=view)
    for pid, views in SEEN.items()
    for view in views
]


def assert_share(count: int, probability: float, draws: int = DRAWS) -> None:
    """Within 5 standard deviations of the binomial law."""
    spread = math.sqrt(draws * probability * (1 - probability))
    assert abs(count - draws * probability) <= 5 * spread + 1e-9, (count / draws, probability)


@pytest.fixture(scope="module")
def prid_draws() -> list[Draw]:
    data = TripletDraws(TWO_CAMERAS, TRANSFORM, frames=4, seed=1)
    return [data.draw(number) for number in range(DRAWS)]


def identities(draws: Sequence[Draw], tracklets: Sequence[Tracklet]) -> np.ndarray:
    """(N, 3) identity of anchor, positive, negative."""
    return np.array([[tracklets[row].pid for row in draw.tracklet] for draw in draws])


def test_check_07_two_cameras_identities(prid_draws: list[Draw]) -> None:
    pid_N3 = identities(prid_draws, TWO_CAMERAS)
    assert (pid_N3[:, 0] == pid_N3[:, 1]).all()
    assert (pid_N3[:, 0] != pid_N3[:, 2]).all()
    pairs = Counter(map(tuple, pid_N3[:, [0, 2]].tolist()))
    assert len(pairs) == 30  # ordered pairs of different identities, uniform
    for count in pairs.values():
        assert_share(count, 1 / 30)


def test_check_07_two_cameras_views(prid_draws: list[Draw]) -> None:
    """The three cameras are independent: every second positive is the anchor's own tracklet."""
    cameras = [tuple(TWO_CAMERAS[row].camid for row in draw.tracklet) for draw in prid_draws]
    counts = Counter(cameras)
    assert len(counts) == 8
    for count in counts.values():
        assert_share(count, 1 / 8)
    assert_share(sum(d.tracklet[0] == d.tracklet[1] for d in prid_draws), 1 / 2)


def test_check_07_frames(prid_draws: list[Draw]) -> None:
    """Four different frames of ten, uniform; the two sets of one tracklet are independent."""
    frames = np.stack([draw.frames for draw in prid_draws])
    assert (np.diff(frames, axis=-1) > 0).all()
    for which in range(3):
        for count in np.bincount(frames[:, which].ravel(), minlength=10):
            assert_share(int(count), 0.4)
    same = np.array([d.tracklet[0] == d.tracklet[1] for d in prid_draws])
    shared = (frames[same, 0, :, None] == frames[same, 1, None, :]).sum(axis=(1, 2))
    assert shared.mean() == pytest.approx(4 * 4 / 10, abs=0.02)


def expected_pooled(*, cross: bool) -> dict[tuple[int, int, int, int, int], float]:
    """P(anchor view, positive view, identity, negative view, negative) of the LPW script."""
    views = (1, 2, 3)
    here = {view: [pid for pid in SEEN if view in SEEN[pid]] for view in views}
    pairs = [(u, v) for u in views for v in views if not cross or u != v]
    law = {}
    for u, v in pairs:
        both = [pid for pid in here[u] if pid in here[v]]
        for pid in both:
            for w in views:
                others = [other for other in here[w] if other != pid]
                for other in others:
                    law[u, v, pid, w, other] = 1 / (len(pairs) * len(both) * 3 * len(others))
    return law


@pytest.mark.parametrize("positive", ["any_view", "cross_view"])
def test_check_07_views_pooled_over_scenes(positive: str) -> None:
    law = expected_pooled(cross=positive == "cross_view")
    assert sum(law.values()) == pytest.approx(1)
    data = TripletDraws(POOLED, TRANSFORM, frames=1, seed=2, positive=positive)
    counts: Counter[tuple[int, ...]] = Counter()
    for number in range(DRAWS):
        a, p, n = (POOLED[row] for row in data.draw(number).tracklet)
        assert a.pid == p.pid
        counts[a.group, p.group, a.pid, n.group, n.pid] += 1
    assert set(counts) <= set(law)
    for key, probability in law.items():
        assert_share(counts[key], probability)
    assert any(POOLED[0].camid < 3 <= t.camid for t in POOLED)


def test_check_07_cross_view_never_repeats_the_tracklet() -> None:
    data = TripletDraws(TWO_CAMERAS, TRANSFORM, frames=2, positive="cross_view")
    draws = [data.draw(number) for number in range(5000)]
    cameras = np.array([[TWO_CAMERAS[row].camid for row in d.tracklet] for d in draws])
    assert (cameras[:, 0] != cameras[:, 1]).all()
    assert_share(int(cameras[:, 0].sum()), 1 / 2, 5000)


def same(one: Draw, other: Draw) -> bool:
    return one.tracklet == other.tracklet and np.array_equal(one.frames, other.frames)


def test_check_07_seeds_and_ranks() -> None:
    """A draw depends on (seed, number) alone; ranks read disjoint numbers of one stream."""
    first, second = (TripletDraws(TWO_CAMERAS, TRANSFORM, frames=4, seed=5) for _ in range(2))
    other = TripletDraws(TWO_CAMERAS, TRANSFORM, frames=4, seed=6)
    second.draw(0)
    assert all(same(first.draw(n), second.draw(n)) for n in (0, 3, 99, 10**12))
    assert not all(same(first.draw(n), other.draw(n)) for n in range(5))
    streams = [
        list(islice(ResumableSampler(len(first), shuffle=False, rank=rank, world=2), 50))
        for rank in (0, 1)
    ]
    assert sorted(streams[0] + streams[1]) == list(range(100))
    matches = sum(same(first.draw(a), first.draw(b)) for a, b in zip(*streams, strict=True))
    assert matches == 0


def test_short_tracklets() -> None:
    few = [tracklet(pid, camid, frames=3) for pid in range(2) for camid in (0, 1)]
    data = TripletDraws(few, TRANSFORM, frames=8)
    frames = np.concatenate([data.draw(n).frames for n in range(50)])
    assert frames.min() == 0
    assert frames.max() == 2
    with pytest.raises(InputError, match="0/0: tracklet has fewer than 8 frames: 3"):
        TripletDraws(few, TRANSFORM, frames=8, short="error")


def test_window_draws_neighbours() -> None:
    data = TripletDraws(TWO_CAMERAS, TRANSFORM, frames=4, sample="window")
    frames = np.concatenate([data.draw(n).frames for n in range(300)])
    assert (np.diff(frames, axis=1) == 1).all()
    assert set(frames[:, 0].tolist()) == set(range(7))
    short = TripletDraws(TWO_CAMERAS, TRANSFORM, frames=12, sample="window")
    assert short.draw(0).frames[0].tolist() == [*range(10), 9, 9]


def test_pk_draws() -> None:
    more = [*TWO_CAMERAS, tracklet(0, 2), tracklet(0, 3)]
    data = PKDraws(more, TRANSFORM, identities=3, sets=2, frames=2)
    rows = np.array([data.draw(n).tracklet for n in range(500)]).reshape(500, 3, 2)
    pid = np.array([t.pid for t in more])[rows]
    assert (pid[:, :, 0] == pid[:, :, 1]).all()
    assert all(len(set(people)) == 3 for people in pid[:, :, 0].tolist())
    assert (rows[:, :, 0] != rows[:, :, 1]).all()  # two tracklets at least: never the same twice
    for count in np.bincount(pid[:, :, 0].ravel()):
        assert_share(int(count), 1 / 2, 500)
    single = PKDraws(TWO_CAMERAS, TRANSFORM, identities=1, sets=4, frames=2)
    assert sorted(Counter(single.draw(0).tracklet).values()) == [2, 2]
    with pytest.raises(ValueError, match="identities=7"):
        PKDraws(TWO_CAMERAS, TRANSFORM, identities=7)


def test_frame_draws_are_uniform_over_frames() -> None:
    uneven = [tracklet(0, 0, frames=1), tracklet(1, 0, frames=3), tracklet(2, 0, frames=6)]
    data = FrameDraws(uneven, TRANSFORM)
    draws = [data.draw(n) for n in range(5000)]
    counts = Counter((d.tracklet[0], int(d.frames[0, 0])) for d in draws)
    assert len(counts) == 10
    for count in counts.values():
        assert_share(count, 1 / 10, 5000)


@pytest.fixture
def lpw(tmp_path: Path) -> ReidData:
    return load_lpw(write_lpw(tmp_path))


def all_draws(data: ReidData, **more: object) -> list[SetDraws]:
    return [
        TripletDraws(data.train, TRANSFORM, frames=2, **more),  # type: ignore[arg-type]
        PKDraws(data.train, TRANSFORM, identities=2, sets=3, frames=2, **more),  # type: ignore[arg-type]
        FrameDraws(data.train, TRANSFORM, **more),  # type: ignore[arg-type]
    ]


def test_items_and_workers(lpw: ReidData) -> None:
    """Shapes, and the same batch from this process, from a pickle and from workers."""
    for data, sets, frames in zip(all_draws(lpw), (3, 6, 1), (2, 2, 1), strict=True):
        item = data[7]
        assert item.image.shape == (sets, frames, 3, 14, 7)
        assert (item.image.dtype, item.pid.dtype, item.camid.dtype) == (
            torch.uint8, torch.int64, torch.int64,
        )  # fmt: skip
        assert item.boundaries.shape == (sets, frames, 0)
        rows = data.draw(7).tracklet
        assert item.pid.tolist() == [lpw.train[row].pid for row in rows]
        assert item.camid.tolist() == [lpw.train[row].camid for row in rows]
        again = pickle.loads(pickle.dumps(data))[7]
        torch.testing.assert_close(again.image, item.image)
        loader = DataLoader(data, batch_size=2, sampler=range(6, 10), num_workers=2)
        torch.testing.assert_close(next(iter(loader)).image[1], item.image)


def test_augmentation_belongs_to_the_draw(lpw: ReidData) -> None:
    data = TripletDraws(lpw.train, FrameTransform(size=(14, 7), flip=0.5), frames=2, cache=True)
    items = [data[number].image for number in range(6)]
    for number, item in enumerate(items):
        torch.testing.assert_close(data[number].image, item)


def test_check_12_unreadable_files_in_training(
    lpw: ReidData, caplog: pytest.LogCaptureFixture
) -> None:
    """Counted, logged with the path and replaced, up to the limit; then training stops."""
    lost = lpw.train[0].frames
    for path in lost:
        path.write_bytes(b"broken")
    data = FrameDraws(lpw.train, TRANSFORM, max_bad_items=3)
    bad = [n for n in range(400) if data.draw(n).tracklet[0] == 0]
    assert len(bad) >= 5
    first = data[bad[0]]
    assert str(lost[0].parent) in caplog.text
    assert data.bad_items >= 1
    again = FrameDraws(lpw.train, TRANSFORM, max_bad_items=3)[bad[0]]
    torch.testing.assert_close(again.image, first.image)  # the replacement is reproducible
    with pytest.raises(InputError, match=str(lost[0].parent)):
        [data[number] for number in bad]
    with pytest.raises(InputError, match="cannot be decoded"):
        FrameDraws(lpw.train, TRANSFORM)[bad[0]]


def test_unreadable_files_are_counted_over_workers(lpw: ReidData) -> None:
    for path in lpw.train[0].frames:
        path.write_bytes(b"broken")
    data = FrameDraws(lpw.train, TRANSFORM, max_bad_items=100)
    bad = sum(data.draw(n).tracklet[0] == 0 for n in range(100))
    for _ in DataLoader(data, batch_size=4, sampler=range(100), num_workers=2):
        pass
    assert data.bad_items >= bad > 0


def test_evaluation_frames_cover_everything_once(lpw: ReidData) -> None:
    data = TrackletFrames(lpw.query, TRANSFORM)
    assert data.offsets.tolist() == [0, 3, 6, 9, 12]
    assert len(data) == 12
    assert [data[i].tracklet for i in range(12)] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    batch = next(iter(DataLoader(data, batch_size=5)))
    assert batch.image.shape == (5, 3, 14, 7)
    whole = TrackletSequences(lpw.query, TRANSFORM)
    assert len(whole) == 4
    torch.testing.assert_close(whole[1].image[0], torch.stack([data[i].image for i in (3, 4, 5)]))
    with pytest.raises(IndexError):
        data[12]


def test_check_12_unreadable_file_stops_an_evaluation(lpw: ReidData) -> None:
    lpw.query[1].frames[0].unlink()
    loader = DataLoader(TrackletFrames(lpw.query, TRANSFORM), batch_size=4, num_workers=1)
    with pytest.raises(InputError, match=str(lpw.query[1].frames[0])):
        list(loader)


@pytest.mark.parametrize(
    "setting",
    [{"positive": "other"}, {"sample": "all"}, {"short": "skip"}, {"frames": 0}, {"seed": -1}],
)
def test_bad_arguments(setting: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        TripletDraws(TWO_CAMERAS, TRANSFORM, **setting)  # type: ignore[arg-type]


def test_impossible_draws() -> None:
    with pytest.raises(InputError, match="there are none"):
        TripletDraws([], TRANSFORM)
    with pytest.raises(InputError, match="two identities"):
        TripletDraws(TWO_CAMERAS[:2], TRANSFORM)
    alone = [tracklet(0, 0), tracklet(1, 1)]
    with pytest.raises(InputError, match="no identity is seen in two views"):
        TripletDraws(alone, TRANSFORM, positive="cross_view")
    with pytest.raises(InputError, match="has no frame"):
        FrameDraws([tracklet(0, 0, frames=0)], TRANSFORM)
