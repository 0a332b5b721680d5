"""Decoding, resizing and mirroring, and what a network sees.

Pictures stay uint8 until they are on the device, where `DetectionTransform.normalize` scales whole
batches. Everything random is drawn from the generator that the caller passes.

Letters: B images of a batch, G ground-truth boxes, M proposals, H rows, W columns, D boxes of
either kind.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from common.log import InputError
from detection_tsd.data.detection_data import Annotation, Target
from detection_tsd.data.segments import rasterise

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of ImageNet, RGB in 0..255


class View(NamedTuple):
    """An image and its boxes as a network gets them.

    Attributes:
        image: uint8 (3, H, W), RGB, channels-last in memory.
        target: the objects in its pixels; empty in a test.
        proposals: float32 (M, 4) in its pixels, or None.
        scale: its pixels per pixel of the file, (x, y).
    """

    image: Tensor
    target: Target
    proposals: Tensor | None
    scale: tuple[float, float]


def _opencv() -> Any:
    """OpenCV; in a data worker with one thread, since the workers are as many as the cores."""
    import cv2

    if get_worker_info() is not None and cv2.getNumThreads() > 1:
        cv2.setNumThreads(0)
    return cv2


def decode_rgb(data: bytes | memoryview, where: object) -> np.ndarray:
    """Decode a picture to uint8 (H, W, 3), red first.

    Grey pictures get three equal channels, 16 bits become 8, transparency is dropped. The rows
    stay as they are stored: annotations do not know of the orientation in EXIF.

    Args:
        data: the encoded picture.
        where: name of its place, for messages.

    Raises:
        InputError: it is empty, cut off (also by one byte) or no picture.
    """
    cv2 = _opencv()
    image_HWC, flags = None, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    if len(data):
        try:
            image_HWC = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        except cv2.error:  # a header with an absurd size
            image_HWC = None
    if image_HWC is None:
        raise InputError(where, "picture cannot be decoded", f"{len(data)} bytes")
    return np.asarray(image_HWC)


def read_rgb(path: Path | str) -> np.ndarray:
    """Decode a picture file as `decode_rgb`; `InputError` names the file."""
    try:
        with open(path, "rb", buffering=0) as file:
            data = file.read()
    except OSError as error:
        raise InputError(path, "picture cannot be read", error.strerror or "") from error
    return decode_rgb(data, path)


class DetectionTransform:
    """Pictures of any size to network input.

    A picture is resized bilinearly, keeping its ratio, until its short side is `short` or its long
    side is `long`, whichever comes first; sides are rounded to whole pixels, boxes follow the
    exact ratio of each side. Sequences make the short side random in training.

    Args:
        short: short side, or several to choose from in training.
        long: most that the long side may be.
        short_range: (least, most): training draws the short side from these integers, both
            included, instead of `short` (Sense-X/TSD, ResNeXt-101: 400 to 1400).
        keep_size: leave every picture as large as it is.
        flip: probability of a mirror in training.
        divisor: of height and width of a batch, see `batch.collate`.
        mean: subtracted from R, G, B.
        std: divides them afterwards.
        test_short: short side in a test; None takes `short`, the greatest of several.
        test_long: of a test; None takes `long`.

    Raises:
        ValueError: an argument is not accepted.
    """

    def __init__(
        self,
        short: int | Sequence[int] = 800,
        long: int = 1333,
        short_range: Sequence[int] | None = None,
        keep_size: bool = False,
        flip: float = 0.5,
        divisor: int = 32,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        test_short: int | None = None,
        test_long: int | None = None,
    ):
        sides = [short] if isinstance(short, int) else list(short)
        self.short_choices = tuple(int(side) for side in sides)
        self.long, self.keep_size = int(long), bool(keep_size)
        self.short_range = None
        if short_range is not None:
            self.short_range = _checked_range(short_range)
        self.flip, self.divisor = float(flip), int(divisor)
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        self.test_short = int(test_short or max(self.short_choices, default=0))
        self.test_long = int(test_long or long)
        self._check()

    def _check(self) -> None:
        numbers = (*self.short_choices, self.long, self.divisor, self.test_short, self.test_long)
        if not self.short_choices or min(numbers) < 1:
            raise ValueError(
                f"short={self.short_choices}, long={self.long}, divisor={self.divisor}, "
                f"test_short={self.test_short}, test_long={self.test_long} must be at least 1"
            )
        if self.short_range is not None and (self.keep_size or len(self.short_choices) > 1):
            raise ValueError(
                f"short_range={self.short_range} excludes keep_size and several short sides"
            )
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip={self.flip} must be in [0, 1]")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean={self.mean}, std={self.std} need three numbers, std above 0")

    def contract(self) -> dict[str, object]:
        """What a network of this transform expects of its pictures; for checkpoints."""
        return {
            "short": self.test_short, "long": self.test_long, "keep_size": self.keep_size,
            "divisor": self.divisor, "mean": list(self.mean), "std": list(self.std),
        }  # fmt: skip

    def train(
        self,
        image_HWC: np.ndarray,
        annotation: Annotation,
        proposals: np.ndarray | None,
        rng: np.random.Generator,
    ) -> View:
        """A random view of a picture and its objects; the arguments are not changed.

        Args:
            image_HWC: uint8 (H, W, 3) RGB.
            annotation: its objects.
            proposals: float32 (M, 4), or None.
            rng: source of all randomness.

        Raises:
            ValueError: the picture has another shape or type, or a mask another size.
        """
        short = self.short_choices[0]
        if self.short_range is not None:
            short = int(rng.integers(self.short_range[0], self.short_range[1] + 1))
        elif len(self.short_choices) > 1:
            short = self.short_choices[int(rng.integers(len(self.short_choices)))]
        mirrored = self.flip > 0 and bool(rng.random() < self.flip)
        return self._view(image_HWC, annotation, proposals, short, self.long, mirrored)

    def test(
        self,
        image_HWC: np.ndarray,
        proposals: np.ndarray | None = None,
        short: int | None = None,
        long: int | None = None,
        flip: bool = False,
    ) -> View:
        """The picture of a test; its target is empty.

        Args:
            image_HWC: uint8 (H, W, 3) RGB; it is not changed.
            proposals: float32 (M, 4), or None.
            short: another short side than `test_short`, for tests of several scales.
            long: another long side than `test_long`.
            flip: mirror it.

        Raises:
            ValueError: the picture has another shape or type.
        """
        none_04 = np.empty((0, 4), np.float32)
        nothing = Annotation(none_04, np.empty(0, np.int64), none_04)
        sides = short or self.test_short, long or self.test_long
        return self._view(image_HWC, nothing, proposals, *sides, flip)

    def _view(
        self,
        image_HWC: np.ndarray,
        annotation: Annotation,
        proposals: np.ndarray | None,
        short: int,
        long: int,
        mirrored: bool,
    ) -> View:
        if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[2] != 3:
            shape = f"{image_HWC.dtype} {image_HWC.shape}"
            raise ValueError(f"image is {shape}, need uint8 (H, W, 3)")
        old = image_HWC.shape[0], image_HWC.shape[1]
        new = old if self.keep_size else resized(old, short, long)
        scale = new[1] / old[1], new[0] / old[0]
        mask_GHW = None
        if annotation.segments is not None:
            mask_GHW = torch.from_numpy(_masks(annotation.segments, old, new, mirrored))
        target = Target(
            box_G4=_boxes(annotation.box_G4, scale, new, mirrored, clip=True),
            label_G=torch.from_numpy(annotation.label_G.astype(np.int64)),
            crowd_I4=_boxes(annotation.crowd_I4, scale, new, mirrored, clip=True),
            mask_GHW=mask_GHW,
        )
        box_M4 = None if proposals is None else _boxes(proposals, scale, new, mirrored, clip=False)
        return View(_picture(image_HWC, new, mirrored), target, box_M4, scale)

    def normalize(self, image_B3HW: Tensor, size_B2: Tensor) -> Tensor:
        """Network input, float32 (B, 3, H, W) channels-last, on the device of the images.

        Args:
            image_B3HW: uint8, as in a `Batch`.
            size_B2: height and width of the valid part; the rest becomes exactly 0.

        Raises:
            ValueError: another type or shape.
        """
        shape = tuple(image_B3HW.shape)
        if image_B3HW.dtype != torch.uint8 or len(shape) != 4 or shape[1] != 3:
            found = f"{image_B3HW.dtype} {shape}"
            raise ValueError(f"image_B3HW is {found}, need torch.uint8 (B, 3, H, W)")
        if tuple(size_B2.shape) != (shape[0], 2):
            raise ValueError(f"size_B2 is {tuple(size_B2.shape)}, need ({shape[0]}, 2)")
        x_B3HW = image_B3HW.to(torch.float32, memory_format=torch.channels_last)
        mean_311, std_311 = (
            torch.tensor(values, device=x_B3HW.device)[:, None, None]
            for values in (self.mean, self.std)
        )
        x_B3HW = x_B3HW.sub_(mean_311).div_(std_311)
        height_B1, width_B1 = size_B2.to(x_B3HW.device).split(1, dim=1)
        below_BH = torch.arange(shape[2], device=x_B3HW.device) >= height_B1
        right_BW = torch.arange(shape[3], device=x_B3HW.device) >= width_B1
        padding_B1HW = (below_BH[:, :, None] | right_BW[:, None, :])[:, None]
        return x_B3HW.masked_fill_(padding_B1HW, 0)


def _checked_range(short_range: Sequence[int]) -> tuple[int, int]:
    if len(short_range) != 2 or not 1 <= short_range[0] <= short_range[1]:
        raise ValueError(f"short_range={tuple(short_range)}; need 1 <= least <= most")
    return int(short_range[0]), int(short_range[1])


def resized(size: tuple[int, int], short: int, long: int) -> tuple[int, int]:
    """Height and width after resizing: short side `short` unless the long one would pass `long`.

    Sides are rounded half up, as mmcv does, and at least 1.
    """
    scale = min(short / min(size), long / max(size))
    height, width = (max(1, int(side * scale + 0.5)) for side in size)
    return height, width


def _picture(image_HWC: np.ndarray, size: tuple[int, int], mirrored: bool) -> Tensor:
    """Resized and mirrored; its memory is not that of the argument."""
    cv2, image = _opencv(), np.ascontiguousarray(image_HWC)
    if image.shape[:2] != size:
        image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
    if mirrored:
        image = cv2.flip(image, 1)
    if np.may_share_memory(image, image_HWC):
        image = image.copy()
    return torch.from_numpy(image).permute(2, 0, 1)


def _boxes(
    box_D4: np.ndarray,
    scale: tuple[float, float],
    size: tuple[int, int],
    mirrored: bool,
    clip: bool,
) -> Tensor:
    """Scaled and mirrored; `clip` only removes what rounding adds at the border."""
    new_D4 = box_D4 * np.array(scale * 2, np.float32)
    if mirrored:
        new_D4[:, [0, 2]] = size[1] - new_D4[:, [2, 0]]
    if clip:
        new_D4 = new_D4.clip(0, np.array(size[::-1] * 2, np.float32))
    return torch.from_numpy(new_D4.astype(np.float32, copy=False))


def _masks(
    outlines: list[Any], old: tuple[int, int], new: tuple[int, int], mirrored: bool
) -> np.ndarray:
    """Filled at the size of the file, then resized to the nearest pixel centre and mirrored."""
    cv2 = _opencv()
    mask_GHW = rasterise(outlines, *old)
    if old != new:
        how = cv2.INTER_NEAREST_EXACT
        masks = [cv2.resize(mask_HW, new[::-1], interpolation=how) for mask_HW in mask_GHW]
        mask_GHW = np.stack(masks) if masks else np.empty((0, *new), np.uint8)
    return np.ascontiguousarray(mask_GHW[:, :, ::-1]) if mirrored else mask_GHW
