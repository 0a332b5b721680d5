"""Crops, mirrors and normalisation, alike for all frames of a clip.

Pictures stay uint8 until they are on the device: workers crop and resize, `normalize` does the
rest. Bilinear resizing is OpenCV's, without antialiasing (the references' PIL filters it).

Shapes: F frames of a clip, T frame positions, V views, C channels, H rows, W columns, h and w the
same of the result.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FLOW_MEAN, FLOW_STD = (0.5,), (sum(IMAGENET_STD) / 3,)
SNAP = 3  # pixels; a crop nearer to the input size takes the input size


class Box(NamedTuple):
    """A part of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int


class GroupTransform:
    """Clips as the two-dimensional recognisers see them; one geometry for all frames of a clip.

    Training (X-Temporal, temporal-shift-module): one of ten sizes (height and width are the short
    side times one of `scales`, at most one step apart), one of 13 fixed places, resized to
    `input_size`; then a mirror with probability 1/2. A pair as `train_scale` asks for PySlowFast's
    recipe instead: short side uniform between the two, then a crop of `input_size` anywhere.

    Test: short side resized to `scale_size`, then 1 (centre), 3 (along the longer side: the two
    ends and the middle), 5 (corners and centre) or 10 (these five, then their mirrors) crops.
    `scale_size = input_size` gives the full-resolution test.

    Args:
        input_size: height and width of the result, pixels.
        scale_size: short side for the test, pixels.
        flip: whether mirrors are allowed; not for sets whose labels tell left from right.
        train_scale: None crops from the stored size, a number resizes the short side to it
            before, a pair is the range of the short side.
        scales: fractions of the short side.
        modality: "rgb", "flow" (C = 2: mirrors invert the horizontal component) or "rgbdiff"
            (differences of consecutive normalised frames).
        length: consecutive frames of one position; they become channels.
        mean: of the channels in [0, 1]; ImageNet's by default, 0.5 for flow.
        std: of the channels in [0, 1]; ImageNet's by default, the mean of its three for flow.

    Raises:
        ValueError: an argument is not accepted.
    """

    def __init__(
        self,
        input_size: int = 224,
        scale_size: int = 256,
        flip: bool = True,
        train_scale: int | Sequence[int] | None = None,
        scales: Sequence[float] = (1, 0.875, 0.75, 0.66),
        modality: str = "rgb",
        length: int = 1,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        if modality not in ("rgb", "flow", "rgbdiff"):
            raise ValueError(f"modality={modality!r}; accepted: rgb, flow, rgbdiff")
        if length < 1 + (modality == "rgbdiff"):
            raise ValueError(f"length={length} is too short for modality={modality!r}")
        if not 1 <= input_size <= scale_size:
            raise ValueError(f"input_size={input_size} must be in [1, scale_size={scale_size}]")
        if not scales or not all(0 < scale <= 1 for scale in scales):
            raise ValueError(f"scales={scales} must be fractions in (0, 1]")
        self.input_size, self.scale_size, self.flip = int(input_size), int(scale_size), bool(flip)
        self.scales = tuple(float(scale) for scale in scales)
        self.modality, self.length = modality, int(length)
        self.planes = 2 if modality == "flow" else 3
        flow = modality == "flow"
        self.mean = self._per_channel("mean", mean, FLOW_MEAN if flow else IMAGENET_MEAN)
        self.std = self._per_channel("std", std, FLOW_STD if flow else IMAGENET_STD)
        self.resize_to, self.jitter = self._train_scale(train_scale)

    @property
    def channels(self) -> int:
        """C that the model sees."""
        frames = self.length - 1 if self.modality == "rgbdiff" else self.length
        return self.planes * frames

    def train(self, frames_FHWC: np.ndarray, rng: np.random.Generator) -> Tensor:
        """A random view, uint8 (T, C, h, w); F = T * length.

        Raises:
            ValueError: F or C does not fit length and modality.
        """
        self._check(frames_FHWC)
        size = self.resize_to
        if self.jitter is not None:
            size = int(rng.integers(self.jitter[0], self.jitter[1] + 1))
        if size is not None:
            frames_FHWC = resize_short_side(frames_FHWC, size)
        box = self.draw_box(frames_FHWC.shape[1], frames_FHWC.shape[2], rng)
        view_FhwC = _crop(frames_FHWC, box, self.input_size)
        if self.flip and rng.random() < 0.5:
            view_FhwC = self._mirror(view_FhwC)
        return self._fold(view_FhwC)

    def test(self, frames_FHWC: np.ndarray, crops: int = 1) -> Tensor:
        """The fixed views, uint8 (V, T, C, h, w) with V = crops; F = T * length.

        Raises:
            ValueError: F or C does not fit; crops is not 1, 3, 5 or 10; 10 without `flip`.
        """
        self._check(frames_FHWC)
        self.check_crops(crops)
        frames_FHWC = resize_short_side(frames_FHWC, self.scale_size)
        height, width = frames_FHWC.shape[1:3]
        places = crop_places(height, width, self.input_size, min(crops, 5))
        boxes = [Box(top, left, self.input_size, self.input_size) for top, left in places]
        views = [_crop(frames_FHWC, box, self.input_size) for box in boxes]
        if crops == 10:
            views += [self._mirror(view_FhwC) for view_FhwC in views]
        return torch.stack([self._fold(view_FhwC) for view_FhwC in views])

    def normalize(self, x: Tensor) -> Tensor:
        """Float32 network input (..., `channels`, H, W) from uint8 (..., C, H, W), on its device.

        Raises:
            ValueError: C is not that of `train` and `test`.
        """
        stored = self.planes * self.length
        if x.ndim < 3 or x.shape[-3] != stored:
            raise ValueError(f"x of shape {tuple(x.shape)} must be (..., {stored}, H, W)")
        mean_C11, std_C11 = (
            torch.tensor(values, device=x.device).mul(255).repeat(self.length).view(-1, 1, 1)
            for values in (self.mean, self.std)
        )
        x = (x.float() - mean_C11) / std_C11
        if self.modality != "rgbdiff":
            return x
        frames = x.unflatten(-3, (self.length, self.planes))
        return frames.diff(dim=-4).flatten(-4, -3)

    def check_crops(self, crops: int) -> None:
        """Raise ValueError unless `test` takes this number of crops."""
        if crops not in (1, 3, 5, 10):
            raise ValueError(f"crops={crops}; accepted: 1, 3, 5, 10")
        if crops == 10 and not self.flip:
            raise ValueError("crops=10 mirrors the clip, which flip=false forbids")

    def draw_box(self, height: int, width: int, rng: np.random.Generator) -> Box:
        """The part of a picture of this size that a training view shows."""
        if self.jitter is not None:
            size = self.input_size
            rooms = (height - size, width - size)
            top, left = (int(rng.integers(room + 1)) for room in rooms)
            return Box(top, left, size, size)
        shapes = crop_shapes(height, width, self.scales, self.input_size)
        rows, columns = shapes[rng.integers(len(shapes))]
        places = fixed_places(height, width, rows, columns)
        top, left = places[rng.integers(len(places))]
        return Box(top, left, rows, columns)

    def _train_scale(
        self, given: int | Sequence[int] | None
    ) -> tuple[int | None, tuple[int, int] | None]:
        if given is None:
            return None, None
        if isinstance(given, int):
            if given < 1:
                raise ValueError(f"train_scale={given} must be positive")
            return given, None
        if len(given) != 2 or not self.input_size <= given[0] <= given[1]:
            accepted = f"a number or a pair of at least input_size={self.input_size}"
            raise ValueError(f"train_scale={given}; accepted: {accepted}")
        return None, (int(given[0]), int(given[1]))

    def _per_channel(
        self, name: str, given: Sequence[float] | None, usual: Sequence[float]
    ) -> tuple[float, ...]:
        values = tuple(float(value) for value in (usual if given is None else given))
        values = values * self.planes if len(values) == 1 else values
        if len(values) != self.planes:
            raise ValueError(f"{name}={given} must have 1 or {self.planes} values")
        return values

    def _check(self, frames_FHWC: np.ndarray) -> None:
        shape = frames_FHWC.shape
        if len(shape) != 4 or shape[3] != self.planes or not shape[0] or shape[0] % self.length:
            accepted = f"(T * {self.length}, H, W, {self.planes}) for modality={self.modality!r}"
            raise ValueError(f"frames of shape {shape} must be {accepted}")

    def _mirror(self, view_FhwC: np.ndarray) -> np.ndarray:
        mirrored_FhwC = view_FhwC[:, :, ::-1].copy()
        if self.modality == "flow":  # what moved to the right now moves to the left
            mirrored_FhwC[..., 0] = 255 - mirrored_FhwC[..., 0]
        return mirrored_FhwC

    def _fold(self, view_FhwC: np.ndarray) -> Tensor:
        """(T, length * C, h, w) from (T * length, h, w, C)."""
        view_FChw = torch.from_numpy(np.ascontiguousarray(view_FhwC.transpose(0, 3, 1, 2)))
        return view_FChw.unflatten(0, (-1, self.length)).flatten(1, 2)


def crop_shapes(
    height: int, width: int, scales: Sequence[float], input_size: int
) -> list[tuple[int, int]]:
    """(height, width) of the crops: sides at most one step of `scales` apart, never empty."""
    sides = [max(1, int(min(height, width) * scale)) for scale in scales]
    sides = [input_size if abs(side - input_size) < SNAP else side for side in sides]
    # Snapping up must not leave the picture.
    sides = [min(side, height, width) for side in sides]
    steps = range(len(sides))
    return [(sides[i], sides[j]) for i in steps for j in steps if abs(i - j) <= 1]


def fixed_places(height: int, width: int, rows: int, columns: int) -> list[tuple[int, int]]:
    """(top, left) of 13 crops: corners, centre, middles of the edges, quarter points."""
    down, right = (height - rows) // 4, (width - columns) // 4
    grid = [(0, 0), (0, 4), (4, 0), (4, 4), (2, 2)]
    grid += [(2, 0), (2, 4), (4, 2), (0, 2), (1, 1), (1, 3), (3, 1), (3, 3)]
    return [(down * i, right * j) for i, j in grid]


def crop_places(height: int, width: int, size: int, crops: int) -> list[tuple[int, int]]:
    """(top, left) of the 1, 3 or 5 square test crops.

    Three crops lie along the longer side: left, right, centre, as X-Temporal orders them; in a
    portrait picture top, bottom, centre, as PySlowFast places them (X-Temporal: thrice the same).
    """
    if crops == 1:
        return [(round((height - size) / 2), round((width - size) / 2))]
    places = fixed_places(height, width, size, size)
    if crops == 5:
        return places[:5]
    centre, (left, right, bottom, top) = places[4], places[5:9]
    return [top, bottom, centre] if height > width else [left, right, centre]


def resize_short_side(frames_FHWC: np.ndarray, size: int) -> np.ndarray:
    """Frames whose short side has `size` pixels, bilinear; the aspect ratio is kept."""
    height, width = frames_FHWC.shape[1:3]
    if min(height, width) == size:
        return frames_FHWC
    if height < width:
        rows, columns = size, int(size * width / height)
    else:
        rows, columns = int(size * height / width), size
    return _resize(frames_FHWC, rows, columns)


def _crop(frames_FHWC: np.ndarray, box: Box, size: int) -> np.ndarray:
    top, left, height, width = box
    return _resize(frames_FHWC[:, top : top + height, left : left + width], size, size)


def _resize(frames_FHWC: np.ndarray, rows: int, columns: int) -> np.ndarray:
    import cv2

    if frames_FHWC.shape[1:3] == (rows, columns):
        return frames_FHWC
    resized_FhwC = np.empty((len(frames_FHWC), rows, columns, frames_FHWC.shape[3]), np.uint8)
    for frame_HWC, out_hwC in zip(frames_FHWC, resized_FhwC, strict=True):
        cv2.resize(frame_HWC, (columns, rows), dst=out_hwC, interpolation=cv2.INTER_LINEAR)
    return resized_FhwC
