"""Training draws and test views: reproducible, independent of workers, strict about bad videos."""

import logging
import multiprocessing
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from common.log import InputError
from common.samplers import EvalSampler, ResumableSampler
from common.seed import worker_init
from video_mmit.data.clips import TestViews, TrainClips
from video_mmit.data.sampling import Dense, Uniform
from video_mmit.data.transforms import GroupTransform
from video_mmit.data.video import FileReader, FlowReader
from video_mmit.data.video_data import Clip, Video, VideoData
from video_mmit.tests.clip_files import draw, numbers, write_flow, write_opencv

T, VIDEOS, FRAMES = 3, 7, 12
TRANSFORM = GroupTransform(24, 32)
OPENCV = FileReader("opencv")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> VideoData:
    """Seven videos of 12 frames; the colours differ, so that clips tell their video."""
    root = tmp_path_factory.mktemp("set")
    videos = []
    for row in range(VIDEOS):
        images = draw(FRAMES)
        images[:, 32:] = 30 * row + 20
        path = write_opencv(root / f"{row}.mp4", images)
        videos.append(Video(path.name, path, FRAMES, (row % 4, 4)))
    classes = tuple("abcde")
    return VideoData("drawn", root, classes, True, videos, videos[:5], OPENCV, Uniform(T))


def with_bad(data: VideoData, tmp_path: Path, rows: list[int]) -> VideoData:
    """The same data with text instead of some of the training videos."""
    train = list(data.train)
    for row in rows:
        path = tmp_path / f"bad{row}.mp4"
        path.write_text("no video\n" * 50)
        train[row] = train[row]._replace(path=path)
    return replace(data, train=train)


def test_items(data: VideoData) -> None:
    clips = TrainClips(data, TRANSFORM, seed=1)
    item = clips[5]
    assert item.image.shape == (T, 3, 24, 24)
    assert item.image.dtype == torch.uint8
    video = data.train[clips.row(5)]
    assert item.target.dtype == torch.float32
    assert item.target.nonzero().ravel().tolist() == sorted(video.labels)
    assert len(clips) == 2**62
    assert clips.epoch_length == VIDEOS
    with pytest.raises(IndexError):
        clips[-1]


def test_an_epoch_takes_every_video_once(data: VideoData) -> None:
    """In a new order each epoch that depends on the seed; asked for in any order."""
    clips = TrainClips(data, TRANSFORM, seed=1)
    epochs = [[clips.row(VIDEOS * e + i) for i in range(VIDEOS)] for e in range(20)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(VIDEOS))
    assert len({tuple(epoch) for epoch in epochs}) > 15
    assert [clips.row(n) for n in (80, 3, 79)] == [epochs[11][3], epochs[0][3], epochs[11][2]]
    assert [TrainClips(data, TRANSFORM, seed=2).row(n) for n in range(VIDEOS)] != epochs[0]


def test_a_draw_is_the_sampler_the_transform_and_one_generator(data: VideoData) -> None:
    """Against the frames of the file: the sampler draws first, then the transform."""
    clips = TrainClips(data, TRANSFORM, seed=3)
    for number in (0, 11, 2**33):
        video, rng = data.train[clips.row(number)], np.random.default_rng([3, number])
        with OPENCV.open(video) as clip:
            whole = clip.read(np.arange(FRAMES))
        index = Uniform(T).train(FRAMES, rng)
        assert numbers(whole[index]) == index.tolist()
        assert torch.equal(clips[number].image, TRANSFORM.train(whole[index], rng))


def test_draws_depend_on_seed_and_number_only(data: VideoData) -> None:
    first = [TrainClips(data, TRANSFORM, seed=4)[n].image for n in range(20)]
    again = TrainClips(data, TRANSFORM, seed=4)
    for number in reversed(range(20)):
        assert torch.equal(again[number].image, first[number])
    other = [TrainClips(data, TRANSFORM, seed=5)[n].image for n in range(20)]
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def loaded(clips: TrainClips, workers: int, draws: int = 20) -> list[torch.Tensor]:
    sampler = ResumableSampler(len(clips), shuffle=False)
    loader = DataLoader(
        clips, 4, sampler=sampler, num_workers=workers, worker_init_fn=worker_init,
        generator=torch.Generator(),
    )  # fmt: skip
    batches = list(islice(loader, draws // 4))
    assert batches[0].image.shape == (4, T, 3, 24, 24)
    return [*torch.cat([batch.image for batch in batches])]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["opencv", "decord"])
def test_check_09_workers_do_not_matter(data: VideoData, tmp_path: Path, backend: str) -> None:
    """0, 1 and 2 forked workers give the same clips, bad videos included; all are counted."""
    if backend == "decord":
        pytest.importorskip("decord")
    data = with_bad(replace(data, reader=FileReader(backend)), tmp_path, [2])
    sets = {n: TrainClips(data, TRANSFORM, seed=1, max_bad_items=30) for n in (0, 1, 2)}
    first = loaded(sets[0], 0)  # the parent has used the decoder before it forks
    assert sets[0].bad_items >= 2
    for workers in (1, 2):
        for a, b in zip(first, loaded(sets[workers], workers), strict=True):
            assert torch.equal(a, b)
        # Workers are up to two batches ahead.
        assert sets[workers].bad_items >= sets[0].bad_items


def test_bad_video_is_replaced(
    data: VideoData, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Counted, logged with its path; the replacement is a function of seed and number."""
    bad = with_bad(data, tmp_path, [2])
    clips = TrainClips(bad, TRANSFORM, seed=1, max_bad_items=2)
    number = next(n for n in range(VIDEOS) if clips.row(n) == 2)
    rng = np.random.default_rng([1, number, 1])
    row = int(rng.integers(VIDEOS))
    assert row != 2, "choose another seed"
    with caplog.at_level(logging.WARNING):
        item = clips[number]
    assert clips.bad_items == 1
    assert "bad2.mp4" in caplog.text
    assert item.target.nonzero().ravel().tolist() == sorted(data.train[row].labels)
    with OPENCV.open(data.train[row]) as clip:
        frames = clip.read(Uniform(T).train(FRAMES, rng))
    assert torch.equal(item.image, TRANSFORM.train(frames, rng))
    assert torch.equal(clips[number].image, item.image)
    assert clips.bad_items == 2
    with pytest.raises(InputError, match=r"bad2.mp4: is text"):
        clips[number]


def test_no_bad_video_is_accepted_by_default(data: VideoData, tmp_path: Path) -> None:
    clips = TrainClips(with_bad(data, tmp_path, [0]), TRANSFORM)
    with pytest.raises(InputError, match=r"bad0\.mp4"):
        [clips[n] for n in range(VIDEOS)]


def test_ten_tries_for_a_draw(data: VideoData, tmp_path: Path) -> None:
    clips = TrainClips(with_bad(data, tmp_path, [*range(VIDEOS)]), TRANSFORM, max_bad_items=99)
    with pytest.raises(InputError, match=r"draw 4: met 10 unreadable videos.*bad\d.mp4"):
        clips[4]
    assert clips.bad_items == 10


def test_frame_counts_are_compared(data: VideoData) -> None:
    """A video counts once, however often it is drawn; one without a stated number does not."""
    train = list(data.train)
    train[1] = train[1]._replace(frames=FRAMES + 5)
    train[3] = train[3]._replace(frames=1)
    train[4] = train[4]._replace(frames=None)
    changed = replace(data, train=train)
    clips, truth = TrainClips(changed, TRANSFORM), TrainClips(data, TRANSFORM)
    for number in range(3 * VIDEOS):
        assert torch.equal(clips[number].image, truth[number].image)  # the decoder is trusted
    assert (clips.mismatched, truth.mismatched) == (2, 0)
    views = TestViews(train, changed, TRANSFORM)
    assert [views[row].row for row in range(5)] == [*range(5)]
    assert views.mismatched == 2


def _visit(clips: TrainClips, first: int) -> None:
    for number in range(first, first + VIDEOS):
        clips[number]


def test_counts_are_shared_with_workers(data: VideoData, tmp_path: Path) -> None:
    train = [video._replace(frames=99) for video in data.train]
    bad = with_bad(replace(data, train=train), tmp_path, [6])
    clips = TrainClips(bad, TRANSFORM, max_bad_items=50)
    worker = multiprocessing.get_context("fork").Process(target=_visit, args=(clips, 0))
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0
    assert clips.bad_items >= 1
    assert clips.mismatched >= 5


def test_cache(data: VideoData) -> None:
    """Cached videos give the same clips and are read once."""
    opened: list[str] = []

    class Counting:
        @contextmanager
        def open(self, video: Video) -> Iterator[Clip]:
            opened.append(video.id)
            with OPENCV.open(video) as clip:
                yield clip

    cached = TrainClips(replace(data, reader=Counting()), TRANSFORM, seed=1, cache=True)
    plain = TrainClips(data, TRANSFORM, seed=1)
    for number in range(3 * VIDEOS):
        assert torch.equal(cached[number].image, plain[number].image)
    assert sorted(opened) == sorted(video.id for video in data.train)


def test_views_are_ordered_by_crop_then_clip(data: VideoData) -> None:
    """30 views: each equals the crop of its own clip."""
    crops, clips = 3, 10
    item = TestViews(data.test, data, TRANSFORM, crops, clips)[2]
    assert item.image.shape == (30, T, 3, 24, 24)
    assert item.row == 2
    with OPENCV.open(data.test[2]) as clip:
        whole = clip.read(np.arange(FRAMES))
    index = Uniform(T).test(FRAMES, clips)
    for crop in range(crops):
        for number in range(clips):
            expected = TRANSFORM.test(whole[index[number]], crops)[crop]
            assert torch.equal(item.image[crop * clips + number], expected)


def test_the_single_view_is_the_centre(data: VideoData) -> None:
    one = TestViews(data.test, data, TRANSFORM)[0].image
    assert one.shape == (1, T, 3, 24, 24)
    assert torch.equal(one, TestViews(data.test, data, TRANSFORM, 3, 1)[0].image[2:])


def all_views(data: VideoData, workers: int) -> torch.Tensor:
    views = TestViews(data.test, data, TRANSFORM, crops=3, clips=2)
    loader = DataLoader(
        views, 2, sampler=EvalSampler(len(views)), num_workers=workers, worker_init_fn=worker_init,
    )  # fmt: skip
    batches = list(loader)
    assert torch.cat([batch.row for batch in batches]).tolist() == [*range(len(views))]
    return torch.cat([batch.image for batch in batches])


@pytest.mark.slow
def test_check_09_evaluation_is_repeatable(data: VideoData) -> None:
    first = all_views(data, 0)
    assert torch.equal(first, all_views(data, 0))
    assert torch.equal(first, all_views(data, 2))


def test_evaluation_stops_at_a_bad_video(data: VideoData, tmp_path: Path) -> None:
    bad = with_bad(data, tmp_path, [1])
    views = TestViews(bad.train, bad, TRANSFORM)
    assert views[0].row == 0
    with pytest.raises(InputError, match=r"bad1.mp4: is text"):
        views[1]


@pytest.mark.slow
def test_a_worker_names_the_bad_video(data: VideoData, tmp_path: Path) -> None:
    """The error arrives from a data worker as one line."""
    bad = with_bad(data, tmp_path, [1])
    views = TestViews(bad.train, bad, TRANSFORM)
    with pytest.raises(InputError, match=r"bad1.mp4: is text") as caught:
        list(DataLoader(views, 2, num_workers=1))
    assert "\n" not in str(caught.value)


def test_dense_and_short_videos(data: VideoData) -> None:
    """A window of 16 frames in videos of 12."""
    dense = replace(data, sampler=Dense(8, 2))
    assert TrainClips(dense, TRANSFORM)[0].image.shape == (8, 3, 24, 24)
    assert TestViews(data.test, dense, TRANSFORM, 3, 2)[0].image.shape == (6, 8, 3, 24, 24)


def test_flow_clips(tmp_path: Path) -> None:
    flow = np.random.default_rng(0).integers(0, 256, (9, 40, 40, 2), dtype=np.uint8)
    path = write_flow(tmp_path / "clip", flow)
    video = Video("clip", path, 9, (0,))
    reader, sampler = FlowReader("flow_{}_{:05d}.png"), Uniform(2, length=5)
    data = VideoData("flow", tmp_path, ("a",), False, [video], [video], reader, sampler)
    transform = GroupTransform(40, 40, modality="flow", length=5, scales=[1], flip=False)
    image = TrainClips(data, transform)[0].image
    assert image.shape == (2, 10, 40, 40)
    index = Uniform(2, length=5).test(9)[0]
    view = TestViews([video], data, transform)[0].image
    expected = flow[index].transpose(0, 3, 1, 2).reshape(1, 2, 10, 40, 40)
    np.testing.assert_array_equal(view.numpy(), expected)


def test_pickles(data: VideoData) -> None:
    """As a worker that is spawned gets it."""
    clips = pickle.loads(pickle.dumps(TrainClips(data, TRANSFORM, seed=1)))
    assert torch.equal(clips[3].image, TrainClips(data, TRANSFORM, seed=1)[3].image)


def test_arguments_are_checked(data: VideoData) -> None:
    with pytest.raises(ValueError, match="seed=-1"):
        TrainClips(data, TRANSFORM, seed=-1)
    with pytest.raises(ValueError, match=r"sampler.length=1, transform.length=5"):
        TrainClips(data, GroupTransform(24, 32, length=5))
    with pytest.raises(InputError, match=r"data.train: has no video"):
        TrainClips(replace(data, train=[]), TRANSFORM)
    with pytest.raises(InputError, match=r"data.test: has no video"):
        TestViews([], data, TRANSFORM)
    with pytest.raises(ValueError, match="clips=0"):
        TestViews(data.test, data, TRANSFORM, 1, 0)
    with pytest.raises(ValueError, match="crops=4"):
        TestViews(data.test, data, TRANSFORM, 4)


def test_class_counts_and_targets(data: VideoData) -> None:
    counts = data.class_counts()
    assert counts.tolist() == [2, 2, 2, 1, VIDEOS]
    assert counts.dtype == torch.int64
    total = torch.stack([data.target(video) for video in data.train]).sum(dim=0)
    assert total.tolist() == counts.tolist()
    assert data.target(Video("x", Path("x"), None, ())).sum() == 0
    assert data.num_classes == 5
    assert replace(data, train=[]).class_counts().tolist() == [0] * 5
