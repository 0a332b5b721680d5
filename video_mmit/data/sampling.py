"""Which frames of a video make a clip.

All positions are 0-based. `frames` is what the decoder counts. A clip has `count` positions of
`length` consecutive frames each (1 for RGB, 5 for flow, 6 for RGB differences), position-major.
What a test takes depends on the video alone; what a training takes, on the generator as well.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Uniform:
    """One position in each of `count` equal segments of the video (TSN, TSM, TIN, TRN).

    Training draws a position in each segment, as X-Temporal. A video too short for `count`
    segments gets frame 0 `count` times (rule "xtemporal") or evenly spaced frames with repeats
    (rule "mmaction"; where the rounding of mmaction2 passes the end it starts anew with frame 0,
    here the last frame is taken). If it still has more than `count` frames, which needs a length
    above 1, it gets sorted random positions.

    The test takes clip j of J at the fraction (2j + 1) / (2J) of every segment: one clip is the
    usual centre of the segments. X-Temporal draws further clips at random; these are repeatable.

    Args:
        count: positions of a clip.
        length: consecutive frames of one position; past the end the last frame is repeated.
        rule: "xtemporal" or "mmaction".

    Raises:
        ValueError: an argument is not accepted.
    """

    count: int = 8
    length: int = 1
    rule: str = "xtemporal"

    def __post_init__(self) -> None:
        _check_positive(count=self.count, length=self.length)
        _check_rule(self.rule, "xtemporal", "mmaction")

    def train(self, frames: int, rng: np.random.Generator) -> np.ndarray:
        """Positions of a random clip, (count * length,) int64, sorted for length 1."""
        _check_positive(frames=frames)
        room = frames - self.length + 1  # positions with all their frames inside
        segment = room // self.count
        start: np.ndarray
        if segment > 0:
            start = np.arange(self.count) * segment + rng.integers(segment, size=self.count)
        elif room > 0 and frames > self._short():
            start = np.sort(rng.integers(room, size=self.count))
        elif room > 0 and self.rule == "mmaction":
            start = np.around(np.arange(self.count) * (room / self.count))
        else:
            start = np.zeros(self.count)
        return self._expand(start, frames)

    def test(self, frames: int, clips: int = 1) -> np.ndarray:
        """Positions of `clips` clips, (clips, count * length) int64."""
        _check_positive(frames=frames, clips=clips)
        room = max(frames - self.length + 1, 1)
        # In integers, so that no rounding error decides between two frames.
        step = 2 * clips * np.arange(self.count) + (2 * np.arange(clips) + 1)[:, None]
        return self._expand(room * step // (2 * clips * self.count), frames)

    def _short(self) -> int:
        """Videos of at most so many frames are not sampled at random."""
        return max(self.count, self.length) if self.rule == "mmaction" else self.count

    def _expand(self, start: np.ndarray, frames: int) -> np.ndarray:
        index = start.astype(np.int64)[..., None] + np.arange(self.length)
        return np.minimum(index, frames - 1).reshape(*start.shape[:-1], -1)


@dataclass(frozen=True)
class Dense:
    """`count` positions `stride` frames apart in a window of count * stride frames, for 3D nets.

    The rules say where the window starts and what a video gets that is shorter than the window:

    - "xtemporal": the training draws any start, the last one included. One test clip starts in
      the middle, several start at equal distances from the first to the last start, rounded down.
      A short video starts anew after its end.
    - "mmaction" (mmaction2): the same, but the starts of several clips are rounded to the nearest
      and the middle of an even number of starts is the earlier one.
    - "pyslowfast" (PySlowFast): the start is a real number, at test j / J of the way to the last
      start, so that the last J-th of the way is left out and one clip starts at frame 0; the
      positions are equally spaced from the first to the last frame of the window, and a short
      video repeats its last frame.

    Args:
        count: positions of a clip.
        stride: frames from one position to the next.
        length: consecutive frames of one position.
        rule: "xtemporal", "mmaction" or "pyslowfast".

    Raises:
        ValueError: an argument is not accepted.
    """

    count: int = 32
    stride: int = 2
    length: int = 1
    rule: str = "xtemporal"

    def __post_init__(self) -> None:
        _check_positive(count=self.count, stride=self.stride, length=self.length)
        _check_rule(self.rule, "xtemporal", "mmaction", "pyslowfast")

    def train(self, frames: int, rng: np.random.Generator) -> np.ndarray:
        """Positions of a random clip, (count * length,) int64."""
        _check_positive(frames=frames)
        last = self._last(frames)
        drawn = rng.random() * last if self.rule == "pyslowfast" else rng.integers(last + 1)
        return self._expand(np.array([drawn]), frames)[0]

    def test(self, frames: int, clips: int = 1) -> np.ndarray:
        """Positions of `clips` clips, (clips, count * length) int64."""
        _check_positive(frames=frames, clips=clips)
        last = self._last(frames)
        number = np.arange(clips)
        start: np.ndarray
        if self.rule == "pyslowfast":
            start = last * number / clips
        elif clips == 1:
            start = np.array([(last + 1) // 2 if self.rule == "xtemporal" else last // 2])
        elif self.rule == "xtemporal":
            start = last * number // (clips - 1)
        else:
            start = np.around(last * number / (clips - 1)).astype(np.int64)
        return self._expand(start, frames)

    def _last(self, frames: int) -> int:
        """The last start with the whole window inside the video; 0 for short videos."""
        return max(frames - self.count * self.stride, 0)

    def _expand(self, start: np.ndarray, frames: int) -> np.ndarray:
        """(clips, count * length) from (clips,) starts."""
        follow = np.arange(self.length)
        if self.rule == "pyslowfast":
            inside = np.linspace(0, self.count * self.stride - 1, self.count)
            index = (start[:, None] + inside).astype(np.int64)[..., None] + follow
            return np.minimum(index, frames - 1).reshape(len(start), -1)
        position = start[:, None] + np.arange(self.count) * self.stride
        return ((position[..., None] + follow) % frames).reshape(len(start), -1)


def _check_positive(**arguments: int) -> None:
    for name, value in arguments.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")


def _check_rule(rule: str, *accepted: str) -> None:
    if rule not in accepted:
        raise ValueError(f"rule={rule!r}; accepted: {', '.join(accepted)}")
