"""Decoding, resizing and normalising the frames of one set.

Shapes: T frames, C channels, H rows, W columns.
"""

from collections.abc import MutableMapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.log import InputError

Cache = MutableMapping[Path, Tensor]


def read_bgr(path: Path) -> np.ndarray:
    """Decode an image file to (H, W, 3) uint8, blue first; `InputError` names an unreadable one."""
    import cv2

    try:
        data = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise InputError(path, "image cannot be read", error.strerror or "") from error
    image = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    if image is None:
        raise InputError(path, "image cannot be decoded", f"{data.size} bytes")
    return image


def resize(image_CHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic (a = -0.5) resize of a uint8 image as by Matlab's imresize, which the reference uses.

    The filter widens when it shrinks (antialiasing), the axis with the smaller scale goes first
    and each pass rounds to uint8. Matlab mirrors the image at its border where this renormalises
    the filter: a few grey levels in the outermost pixels. OpenCV's INTER_CUBIC is another filter
    (a = -0.75, no antialiasing). The aspect ratio is not kept.
    """
    rows, columns = image_CHW.shape[-2:]
    if (rows, columns) == size:
        return image_CHW
    rows_first = size[0] / rows <= size[1] / columns
    between = (size[0], columns) if rows_first else (rows, size[1])
    image_1CHW = image_CHW[None]
    for step in (between, size):
        image_1CHW = F.interpolate(image_1CHW, size=step, mode="bicubic", antialias=True)
    return image_1CHW[0]


class FrameTransform:
    """Frames as the reference trains on them: resized, BGR, minus the channel means.

    All augmentation is off by default (the paper uses none). When it is on, one choice is made
    per set, so that all its frames keep the same geometry; it acts only when `load` gets a
    generator.

    Args:
        size: (H, W) in pixels of the result.
        mean: subtracted from the channels in their order, in grey levels.
        scale: factor after the subtraction.
        order: "bgr" or "rgb".
        flip: probability of a horizontal mirror.
        crop: enlargement before a random crop of `size`: 0.125 resizes to 1.125 x size.
        erase: probability of filling a random rectangle (2-20 % of the area) with the means.
    """

    def __init__(
        self,
        size: Sequence[int] = (224, 224),
        mean: Sequence[float] = (104.0, 117.0, 123.0),
        scale: float = 1.0,
        order: str = "bgr",
        flip: float = 0.0,
        crop: float = 0.0,
        erase: float = 0.0,
    ):
        if order not in ("bgr", "rgb"):
            raise ValueError(f"order={order!r}; accepted: bgr, rgb")
        if not (0 <= flip <= 1 and 0 <= erase <= 1 and crop >= 0):
            raise ValueError(f"flip={flip}, erase={erase} must be in [0, 1] and crop={crop} >= 0")
        self.size = (int(size[0]), int(size[1]))
        self.mean = tuple(float(value) for value in mean)
        self.scale, self.order = float(scale), order
        self.flip, self.crop, self.erase = float(flip), float(crop), float(erase)

    @property
    def channels(self) -> int:
        return 3

    def load(
        self,
        paths: Sequence[Path],
        rng: np.random.Generator | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Frames of one set as uint8 (T, 3, H, W); files may differ in size.

        Args:
            paths: T image files.
            rng: draws the augmentation; None turns it off.
            cache: keeps the resized frames by path.

        Raises:
            InputError: names the file that cannot be read.
        """
        grow = 1.0 + self.crop if rng is not None else 1.0
        size = (round(self.size[0] * grow), round(self.size[1] * grow))
        image_T3HW = torch.stack([self._frame(path, size, cache) for path in paths])
        return image_T3HW if rng is None else self._augment(image_T3HW, rng)

    def normalize(self, image: Tensor) -> Tensor:
        """Float32 network input from uint8 (..., 3, H, W), on the device of `image`."""
        mean_C11 = torch.tensor(self.mean, device=image.device).view(-1, 1, 1)
        return (image.float() - mean_C11) * self.scale

    def _frame(self, path: Path, size: tuple[int, int], cache: Cache | None) -> Tensor:
        if cache is not None and path in cache:
            return cache[path]
        image = read_bgr(path)
        if self.order == "rgb":
            image = image[..., ::-1]
        frame = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        frame = resize(frame, size)
        if cache is not None:
            cache[path] = frame
        return frame

    def _augment(self, image_T3HW: Tensor, rng: np.random.Generator) -> Tensor:
        height, width = self.size
        top = int(rng.integers(image_T3HW.shape[-2] - height + 1))
        left = int(rng.integers(image_T3HW.shape[-1] - width + 1))
        image_T3HW = image_T3HW[..., top : top + height, left : left + width]
        if rng.random() < self.flip:
            image_T3HW = image_T3HW.flip(-1)
        if rng.random() < self.erase:
            image_T3HW = self._erase(image_T3HW, rng)
        return image_T3HW.contiguous()

    def _erase(self, image_T3HW: Tensor, rng: np.random.Generator) -> Tensor:
        """Random erasing (arXiv 1708.04896), one rectangle for all frames of the set."""
        height, width = self.size
        area, ratio = rng.uniform(0.02, 0.2) * height * width, rng.uniform(0.3, 1 / 0.3)
        rows = min(height, max(1, round((area * ratio) ** 0.5)))
        columns = min(width, max(1, round((area / ratio) ** 0.5)))
        top = int(rng.integers(height - rows + 1))
        left = int(rng.integers(width - columns + 1))
        fill_C11 = torch.tensor(self.mean).round().to(torch.uint8).view(-1, 1, 1)
        image_T3HW = image_T3HW.clone()
        image_T3HW[..., top : top + rows, left : left + columns] = fill_C11
        return image_T3HW


# Rows: Y, U, V; columns: R, G, B in [0, 1] (BT.601, as Torch7's image.rgb2yuv).
YUV_33 = ((0.299, 0.587, 0.114), (-0.14713, -0.28886, 0.436), (0.615, -0.51499, -0.10001))


class FlowTransform:
    """Five-channel input of the recurrent network of McLaughlin et al. (CVPR 2016) and of ASTPN.

    Channels: Y, U, V of the colours in [0, 1], then vertical and horizontal optical flow divided
    by 255, each minus its mean over the frame and divided by the square root of its standard
    deviation, as in niallmcl/Recurrent-Convolutional-Video-ReID, which also subtracts the mean of
    each whole frame after cropping. People stand: `size` is 64 rows
    x 48 columns and the crop 56 x 40, which three times [pad 4, conv 5x5, max 2x2] take to
    56 -> 30 -> 17 -> 10 rows and 40 -> 22 -> 13 -> 8 columns, the 32*10*8 inputs of the network's
    linear layer.

    The flow is Farneback's between consecutive given frames (the reference stores Lucas-Kanade
    flow as 8-bit images); the first frame has none and gets zeros. Frames must therefore be
    neighbours in time: draw them with `sample="window"`. The mirror leaves the sign of the flow
    as the reference does. There is no frame cache, because the flow depends on the neighbour.
    """

    def __init__(self, size: Sequence[int] = (64, 48), crop: Sequence[int] = (56, 40)):
        self.size = (int(size[0]), int(size[1]))
        self.crop = (int(crop[0]), int(crop[1]))
        if self.crop[0] >= self.size[0] or self.crop[1] >= self.size[1]:
            raise ValueError(f"crop={self.crop} must be smaller than size={self.size}")

    @property
    def channels(self) -> int:
        return 5

    def load(
        self,
        paths: Sequence[Path],
        rng: np.random.Generator | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Float32 (T, 5, h, w): a random crop and mirror with `rng`, else the centre crop."""
        image_T5HW = self.sequence(paths)
        room = (self.size[0] - self.crop[0], self.size[1] - self.crop[1])
        if rng is None:
            return self._cut(image_T5HW, room[0] // 2, room[1] // 2, mirror=False)
        top, left = (int(rng.integers(space + 1)) for space in room)
        return self._cut(image_T5HW, top, left, mirror=rng.random() < 0.5)

    def views(self, paths: Sequence[Path]) -> Tensor:
        """(V, T, 5, h, w): the crops along the diagonal and their mirrors, to be averaged.

        The reference averages distances over 8 diagonal crops, each with and without a mirror.
        """
        image_T5HW = self.sequence(paths)
        room = min(self.size[0] - self.crop[0], self.size[1] - self.crop[1])
        shifts = range(1, room + 1)
        return torch.stack(
            [self._cut(image_T5HW, s, s, mirror=m) for s in shifts for m in (True, False)]
        )

    def normalize(self, image: Tensor) -> Tensor:
        """The input itself: `load` has normalised every frame."""
        return image.float()

    def sequence(self, paths: Sequence[Path]) -> Tensor:
        """All channels of all frames, uncropped: float32 (T, 5, H, W)."""
        frames = [read_bgr(path) for path in paths]
        flow = [np.zeros((*frames[0].shape[:2], 2), np.float32)]
        flow += [_flow(before, after) for before, after in pairwise(frames)]
        pairs = zip(frames, flow, strict=True)
        image_T5HW = torch.stack([self._channels(frame, motion) for frame, motion in pairs])
        std_T511 = image_T5HW.std(dim=(-2, -1), keepdim=True)
        centred_T5HW = image_T5HW - image_T5HW.mean(dim=(-2, -1), keepdim=True)
        return centred_T5HW / std_T511.sqrt().clamp_min(1e-3)  # a still frame has no flow

    def _channels(self, frame_HW3: np.ndarray, flow_HW2: np.ndarray) -> Tensor:
        rgb_HW3 = torch.from_numpy(frame_HW3[..., ::-1].astype(np.float32)) / 255
        yuv_HW3 = rgb_HW3 @ torch.tensor(YUV_33).T
        motion_HW2 = torch.from_numpy(flow_HW2[..., ::-1].copy()) / 255
        stack_5HW = torch.cat([yuv_HW3, motion_HW2], dim=-1).permute(2, 0, 1)
        return F.interpolate(stack_5HW[None], size=self.size, mode="bilinear", antialias=True)[0]

    def _cut(self, image_T5HW: Tensor, top: int, left: int, *, mirror: bool) -> Tensor:
        height, width = self.crop
        image_T5HW = image_T5HW.flip(-1) if mirror else image_T5HW
        cut_T5HW = image_T5HW[..., top : top + height, left : left + width]
        return cut_T5HW - cut_T5HW.mean(dim=(-3, -2, -1), keepdim=True)


def _flow(before_HW3: np.ndarray, after_HW3: np.ndarray) -> np.ndarray:
    """Dense optical flow (H, W, 2) in pixels per frame: x, y."""
    import cv2

    if before_HW3.shape != after_HW3.shape:
        before_HW3 = cv2.resize(before_HW3, after_HW3.shape[1::-1])
    before, after = (cv2.cvtColor(image, cv2.COLOR_BGR2GRAY) for image in (before_HW3, after_HW3))
    flow_HW2 = np.zeros((*after.shape, 2), np.float32)
    flow = cv2.calcOpticalFlowFarneback(before, after, flow_HW2, 0.5, 3, 15, 3, 5, 1.2, 0)
    return np.asarray(flow)
