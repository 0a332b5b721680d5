"""Which frames make a clip: worked vectors, the authors' formulas as loops, short videos."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from video_mmit.data.sampling import Dense, Uniform

T = 8
SHORT = [1, 2, 3, T - 1, T, T + 1]
UNIFORM = ["xtemporal", "mmaction"]
DENSE = ["xtemporal", "mmaction", "pyslowfast"]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_check_09_uniform_vector() -> None:
    centres = [6, 17, 29, 40, 51, 62, 74, 85]  # counted from 1
    assert (Uniform(T).test(90) + 1).tolist() == [centres]


def test_check_09_dense_vector() -> None:
    sampler = Dense(32, 2)
    assert (sampler.test(90) + 1).tolist() == [list(range(14, 77, 2))]
    starts = sampler.test(90, clips=10)[:, 0]
    assert starts.tolist() == [0, 2, 5, 8, 11, 14, 17, 20, 23, 26]


@pytest.mark.parametrize("rule", UNIFORM)
@pytest.mark.parametrize("count", [3, 5, T, 16])
def test_check_09_one_in_each_segment(rule: str, count: int) -> None:
    """1,000 draws: sorted, in range, one in each equal segment; every frame of it occurs."""
    frames, generator = 90, rng()
    segment = frames // count
    draws = np.stack([Uniform(count, rule=rule).train(frames, generator) for _ in range(1000)])
    assert draws.shape == (1000, count)
    assert draws.dtype == np.int64
    assert (np.diff(draws) > 0).all()
    assert (draws // segment == np.arange(count)).all()
    seen = {tuple(np.unique(column % segment)) for column in draws.T}
    assert seen == {tuple(range(segment))}


@pytest.mark.parametrize("frames", SHORT)
@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("rule", UNIFORM)
def test_check_09_short_videos_uniform(rule: str, length: int, frames: int) -> None:
    sampler, generator = Uniform(T, length, rule), rng()
    for _ in range(100):
        index = sampler.train(frames, generator)
        assert index.shape == (T * length,)
        assert 0 <= index.min() <= index.max() < frames
        assert (np.diff(index[::length]) >= 0).all()
    for clips in (1, 2, 10):
        index = sampler.test(frames, clips)
        assert index.shape == (clips, T * length)
        assert 0 <= index.min() <= index.max() < frames


def test_short_videos_in_training() -> None:
    """Frame 0 eight times as X-Temporal, evenly spaced frames as mmaction2."""
    assert Uniform(T).train(T - 1, rng()).tolist() == [0] * T
    spread = [round(k * 3 / T) for k in range(T)]
    assert spread == [0, 0, 1, 1, 2, 2, 2, 3]
    assert Uniform(T, rule="mmaction").train(3, rng()).tolist() == [min(k, 2) for k in spread]
    assert Uniform(T).train(T, rng()).tolist() == list(range(T))


def test_few_frames_but_more_than_positions() -> None:
    """With five frames a position, ten frames leave six starts for eight: sorted, at random."""
    draws = np.stack([Uniform(T, 5).train(10, rng(seed))[::5] for seed in range(1000)])
    assert (np.diff(draws) >= 0).all()
    assert np.unique(draws).tolist() == list(range(6))
    assert len(np.unique(draws, axis=0)) > 100


def test_consecutive_frames_of_a_position() -> None:
    """Position-major; past the end the last frame is repeated."""
    index = Uniform(3, 5).train(90, rng()).reshape(3, 5)
    assert (np.diff(index, axis=1) == 1).all()
    starts = Uniform(3, 5).test(90)[0, ::5]
    assert starts.tolist() == [int(86 / 3 / 2 + 86 / 3 * k) for k in range(3)]
    assert Uniform(2, 5).test(3)[0].tolist() == [0, 1, 2, 2, 2] * 2


@pytest.mark.parametrize("count", [3, 5, T, 16, 32])
def test_uniform_centres_are_the_authors(count: int) -> None:
    """int(tick / 2 + tick * k), the formula of X-Temporal and of mmaction2's centres."""
    for frames in range(1, 200):
        tick = frames / count
        expected = [int(tick / 2 + tick * k) for k in range(count)]
        for rule in UNIFORM:
            assert Uniform(count, rule=rule).test(frames)[0].tolist() == expected


@pytest.mark.parametrize("clips", [2, 3, 10])
def test_uniform_clips_share_the_segments(clips: int) -> None:
    """Clip j takes the fraction (2j + 1) / (2J) of each segment, in exact numbers."""
    frames = 90
    index = Uniform(T).test(frames, clips)
    for j in range(clips):
        exact = [frames * (k * 2 * clips + 2 * j + 1) // (2 * clips * T) for k in range(T)]
        assert index[j].tolist() == exact
    assert len(np.unique(index, axis=0)) == clips
    assert (np.diff(index, axis=0) > 0).any(axis=1).all()


@given(
    frames=st.integers(1, 400),
    count=st.integers(1, 40),
    length=st.integers(1, 7),
    rule=st.sampled_from(UNIFORM),
    clips=st.integers(1, 12),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=300, deadline=None)
def test_uniform_stays_inside(
    frames: int, count: int, length: int, rule: str, clips: int, seed: int
) -> None:
    sampler = Uniform(count, length, rule)
    for index in (sampler.train(frames, rng(seed)), *sampler.test(frames, clips)):
        assert index.shape == (count * length,)
        assert 0 <= index.min() <= index.max() < frames
        assert (np.diff(index[::length]) >= 0).all()
        assert set(np.diff(index.reshape(count, length), axis=1).ravel()) <= {0, 1}


@given(
    frames=st.integers(1, 200),
    count=st.integers(1, 40),
    stride=st.integers(1, 8),
    length=st.integers(1, 5),
    rule=st.sampled_from(DENSE),
    clips=st.integers(1, 12),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=300, deadline=None)
def test_dense_stays_inside(
    frames: int, count: int, stride: int, length: int, rule: str, clips: int, seed: int
) -> None:
    sampler = Dense(count, stride, length, rule)
    for index in (sampler.train(frames, rng(seed)), *sampler.test(frames, clips)):
        assert index.shape == (count * length,)
        assert index.dtype == np.int64
        assert 0 <= index.min() <= index.max() < frames
        if frames >= count * stride + length:
            steps = np.diff(index[::length])
            gap = (count * stride - 1) / max(count - 1, 1) if rule == "pyslowfast" else stride
            assert (np.abs(steps - gap) <= (rule == "pyslowfast")).all()


def test_check_09_dense_reaches_the_last_start() -> None:
    """All 27 starts of 64 frames in 90, both ends included, equally often."""
    sampler, generator = Dense(32, 2), rng()
    starts = [int(sampler.train(90, generator)[0]) for _ in range(10_000)]
    counts = np.bincount(starts)
    assert len(counts) == 27
    assert counts.min() > 270  # 370 expected, standard deviation 19
    assert counts.max() < 470


def test_dense_wraps_around_short_videos() -> None:
    for frames in (1, 2, 3, 20, 63, 64):
        expected = [(k * 2) % frames for k in range(32)]
        assert Dense(32, 2).train(frames, rng()).tolist() == expected
        assert Dense(32, 2).test(frames, 3).tolist() == [expected] * 3
    assert Dense(32, 2, length=2).test(3)[0, :6].tolist() == [0, 1, 2, 0, 1, 2]


def test_dense_start_of_one_clip() -> None:
    """The middle of S starts: S // 2 as X-Temporal, (S - 1) // 2 as mmaction2."""
    for frames in (64, 65, 66, 90, 91):
        starts = 1 + frames - 64
        assert Dense(32, 2).test(frames)[0, 0] == (starts // 2 if starts > 1 else 0)
        assert Dense(32, 2, rule="mmaction").test(frames)[0, 0] == (starts - 1) // 2


def test_dense_starts_as_mmaction() -> None:
    """Rounded, both ends included."""
    starts = Dense(32, 2, rule="mmaction").test(90, 10)[:, 0]
    assert starts.tolist() == np.round(np.linspace(0, 26, 10)).tolist()
    assert starts.tolist() != Dense(32, 2).test(90, 10)[:, 0].tolist()


def test_dense_as_pyslowfast() -> None:
    """Start = room * j / J; linspace over the window; short videos repeat their last frame."""
    sampler = Dense(32, 2, rule="pyslowfast")
    index = sampler.test(90, 10)
    for j in range(10):
        exact = np.linspace(26 * j / 10, 26 * j / 10 + 63, 32)
        # PySlowFast truncates; a position that is a whole number up to rounding may go either way.
        whole = np.abs(exact - exact.round()) < 1e-9
        assert (index[j] == exact.astype(int))[~whole].all()
        assert (np.abs(index[j] - exact)[whole] < 1.01).all()
    assert sampler.test(90)[0, [0, -1]].tolist() == [0, 63]
    assert sampler.test(20)[0, -1] == 19
    ends = [sampler.train(90, rng(seed))[-1] for seed in range(2000)]
    assert (min(ends), max(ends)) == (63, 88)  # the start is uniform in [0, 26)


@pytest.mark.parametrize("sampler", [Uniform(T, 5), Dense(8, 3, rule="pyslowfast"), Dense(8, 3)])
def test_check_09_a_test_is_repeatable(sampler: Uniform | Dense) -> None:
    np.testing.assert_array_equal(sampler.test(77, 10), sampler.test(77, 10))
    np.testing.assert_array_equal(sampler.train(77, rng(3)), sampler.train(77, rng(3)))
    assert any((sampler.train(77, rng(3)) != sampler.train(77, rng(s))).any() for s in range(9))


def test_arguments_are_checked() -> None:
    for build in (lambda: Uniform(0), lambda: Uniform(8, 0), lambda: Dense(8, 0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            build()
    with pytest.raises(ValueError, match="accepted: xtemporal, mmaction"):
        Uniform(rule="pyslowfast")
    with pytest.raises(ValueError, match="accepted: xtemporal, mmaction, pyslowfast"):
        Dense(rule="tsn")
    with pytest.raises(ValueError, match="frames=0"):
        Uniform().test(0)
    with pytest.raises(ValueError, match="clips=0"):
        Dense().test(9, clips=0)
