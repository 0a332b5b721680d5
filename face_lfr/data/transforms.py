"""Decoding, augmentation, and what a network sees.

Pictures stay uint8 until they are on the device: data workers augment at the stored size,
`FaceTransform.normalize` crops, resizes and scales whole batches. Everything random is drawn from
the generator that the caller passes.

Letters: B images of a batch, C channels, H rows, W columns.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.log import InputError

COLOURS, RESIZE_MODES = ("rgb", "bgr"), ("torch", "cv2_uint8")
GREY = (0.299, 0.587, 0.114)  # of red, green, blue: BT.601, as JPEG
BLUR = (0.2, 2.0)  # sigma of the blur, in pixels of 112
ERASED, ERASED_ASPECT = (0.02, 0.2), 0.3  # share of the area, least aspect (arXiv 1708.04896)
CUTOUT = 0.3  # side of the square, share of the image side (arXiv 1708.04552)


def decode_rgb(data: bytes | memoryview, where: object) -> np.ndarray:
    """Decode a JPEG or PNG to uint8 (H, W, 3), red first.

    Args:
        data: the encoded image.
        where: name of its place, for messages.

    Raises:
        InputError: it is empty, cut off or no image.
    """
    import cv2

    image_HWC = None
    if len(data):
        try:
            image_HWC = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        except cv2.error:  # a header with an absurd size
            image_HWC = None
    if image_HWC is None:
        raise InputError(where, "image cannot be decoded", f"{len(data)} bytes")
    return np.asarray(image_HWC)


def read_rgb(path: Path | str) -> np.ndarray:
    """Decode an image file as `decode_rgb`; `InputError` names the file."""
    try:
        with open(path, "rb", buffering=0) as file:
            data = file.read()
    except OSError as error:
        raise InputError(path, "image cannot be read", error.strerror or "") from error
    return decode_rgb(data, path)


class FaceTransform:
    """Stored faces to network input; what is random is off by default, except mirrors.

    `normalize` does the deterministic part: order of the channels, crop, resize, scale. It makes
    the contract between a network and its pictures, `contract` states it. For the features of a
    mirrored test image mirror the result of `normalize`, as trojans-face-recognizer does: its crop
    is not symmetric. A training mirror acts in the same order.

    Strong augmentation costs small face networks accuracy (cavaface, model zoo).

    Args:
        size: side of the stored faces; others are resized to it (OpenCV, bilinear).
        colour: order of the channels that the network sees, "rgb" or "bgr".
        crop_first: drop the first row and the first column (trojans-face-recognizer).
        resize: side after the crop; None leaves it.
        resize_mode: "torch" resizes the batch on its device in float32; "cv2_uint8" each picture
            by OpenCV in whole grey levels, bit for bit what trojans-face-recognizer does.
        centre: subtracted from the grey levels.
        scale: divides them afterwards. 127.5 and 127.5 map to [-1, 1], 127.5 and 79.6875 to
            [-1.6, 1.6], which is v * 3.2 / 255 - 1.6.
        flip: probability of a mirror.
        jitter: j: brightness, contrast and saturation each change by a factor in [1 - j, 1 + j].
        erase: probability of a rectangle of random grey levels (arXiv 1708.04896).
        grey: probability of losing the colours.
        blur: probability of a Gaussian blur.
        cutout: probability of a square of middle grey, 0.3 of the side (arXiv 1708.04552).

    Attributes:
        input_size: side of what the network sees.

    Raises:
        ValueError: an argument is not accepted.
    """

    def __init__(
        self,
        size: int = 112,
        colour: str = "rgb",
        crop_first: bool = False,
        resize: int | None = None,
        resize_mode: str = "torch",
        centre: float = 127.5,
        scale: float = 127.5,
        flip: float = 0.5,
        jitter: float = 0.0,
        erase: float = 0.0,
        grey: float = 0.0,
        blur: float = 0.0,
        cutout: float = 0.0,
    ):
        for name, value, accepted in (
            ("colour", colour, COLOURS),
            ("resize_mode", resize_mode, RESIZE_MODES),
        ):
            if value not in accepted:
                raise ValueError(f"{name}={value!r}; accepted: {', '.join(accepted)}")
        if size < 1 + crop_first or (resize is not None and resize < 1) or scale == 0:
            raise ValueError(f"size={size}, resize={resize}, scale={scale} must be positive")
        self.random = {
            "flip": flip, "jitter": jitter, "erase": erase, "grey": grey, "blur": blur,
            "cutout": cutout,
        }  # fmt: skip
        for name, chance in self.random.items():
            if not 0 <= chance <= 1:
                raise ValueError(f"{name}={chance} must be in [0, 1]")
        self.size, self.colour, self.crop_first = int(size), colour, bool(crop_first)
        self.resize, self.resize_mode = None if resize is None else int(resize), resize_mode
        self.centre, self.scale = float(centre), float(scale)
        self.input_size = self.resize or self.size - self.crop_first

    def contract(self) -> dict[str, object]:
        """What a network of this transform expects of its pictures; for checkpoints."""
        names = ("size", "colour", "crop_first", "resize", "resize_mode", "centre", "scale")
        return {name: getattr(self, name) for name in names}

    def fit(self, image_HWC: np.ndarray) -> np.ndarray:
        """The image at the stored size: uint8 (size, size, 3); itself when it has it.

        Raises:
            ValueError: it is no uint8 (H, W, 3).
        """
        if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[2] != 3:
            shape = f"{image_HWC.dtype} {image_HWC.shape}"
            raise ValueError(f"image is {shape}, need uint8 (H, W, 3)")
        return _resize(image_HWC, self.size)

    def train(self, image_HWC: np.ndarray, rng: np.random.Generator) -> Tensor:
        """A random view, uint8 (3, size, size), channels in network order.

        Args:
            image_HWC: uint8 (H, W, 3) RGB; it is not changed.
            rng: source of all randomness.

        Raises:
            ValueError: as `fit`.
        """
        image_HWC, chance = self.fit(image_HWC), self.random
        if chance["jitter"]:
            image_HWC = _jitter(image_HWC, chance["jitter"], rng)
        if _happens(chance["grey"], rng):
            image_HWC = np.repeat(_grey(image_HWC)[..., None].round().astype(np.uint8), 3, axis=2)
        if _happens(chance["blur"], rng):
            image_HWC = _blur(image_HWC, rng.uniform(*BLUR) * self.size / 112)
        if _happens(chance["flip"], rng):
            image_HWC = self._mirror(image_HWC)
        if _happens(chance["erase"], rng):
            image_HWC = _erase(image_HWC, rng)
        if _happens(chance["cutout"], rng):
            image_HWC = _cutout(image_HWC, round(self.centre), rng)
        return self._planes(image_HWC)

    def test(self, image_HWC: np.ndarray) -> Tensor:
        """The image as it is, uint8 (3, size, size), channels in network order.

        Raises:
            ValueError: as `fit`.
        """
        return self._planes(self.fit(image_HWC))

    def normalize(self, x_BCHW: Tensor) -> Tensor:
        """Network input, float32 (B, 3, input_size, input_size), on the device of `x_BCHW`.

        Args:
            x_BCHW: uint8 (B, 3, size, size) of `train` or `test`.

        Raises:
            ValueError: another type or shape.
        """
        wanted = (3, self.size, self.size)
        if x_BCHW.dtype != torch.uint8 or x_BCHW.ndim != 4 or x_BCHW.shape[1:] != wanted:
            found = f"{x_BCHW.dtype} {tuple(x_BCHW.shape)}"
            raise ValueError(f"x is {found}, need torch.uint8 (B, {', '.join(map(str, wanted))})")
        if self.crop_first:
            x_BCHW = x_BCHW[..., 1:, 1:]
        if x_BCHW.shape[-1] != self.input_size:
            x_BCHW = self._resized(x_BCHW)
        return (x_BCHW.float() - self.centre) / self.scale

    def _resized(self, x_BCHW: Tensor) -> Tensor:
        side = (self.input_size, self.input_size)
        if self.resize_mode == "torch":
            return F.interpolate(x_BCHW.float(), side, mode="bilinear", align_corners=False)
        images = [_resize(x_HWC, self.input_size) for x_HWC in x_BCHW.permute(0, 2, 3, 1).cpu()]
        x_BHWC = torch.from_numpy(np.stack(images)) if images else x_BCHW.new_empty(0, *side, 3)
        return x_BHWC.permute(0, 3, 1, 2).to(x_BCHW.device)

    def _mirror(self, image_HWC: np.ndarray) -> np.ndarray:
        """Mirrors what `normalize` leaves: the columns that it drops keep their place."""
        import cv2

        if not self.crop_first:
            return np.asarray(cv2.flip(image_HWC, 1))
        return np.concatenate([image_HWC[:, :1], cv2.flip(image_HWC[:, 1:], 1)], axis=1)

    def _planes(self, image_HWC: np.ndarray) -> Tensor:
        """(3, H, W) in network order; OpenCV copies planes faster than a transposition."""
        import cv2

        plane_CHW = np.empty((3, self.size, self.size), np.uint8)
        order = plane_CHW if self.colour == "rgb" else plane_CHW[::-1]
        cv2.split(np.ascontiguousarray(image_HWC), list(order))
        return torch.from_numpy(plane_CHW)


def _happens(chance: float, rng: np.random.Generator) -> bool:
    """A draw, unless the outcome is certain to be no."""
    return chance > 0 and rng.random() < chance


def _resize(image_HWC: np.ndarray | Tensor, size: int) -> np.ndarray:
    import cv2

    image_HWC = np.ascontiguousarray(image_HWC)
    if image_HWC.shape[:2] == (size, size):
        return image_HWC
    return np.asarray(cv2.resize(image_HWC, (size, size), interpolation=cv2.INTER_LINEAR))


def _grey(image_HWC: np.ndarray) -> np.ndarray:
    grey_HW: np.ndarray = image_HWC.astype(np.float32) @ np.array(GREY, np.float32)
    return grey_HW


def _jitter(image_HWC: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Brightness, then contrast around the mean grey, then saturation around the grey image."""
    bright, contrast, colour = rng.uniform(1 - strength, 1 + strength, 3).astype(np.float32)
    x_HWC = image_HWC.astype(np.float32) * bright
    mean = _grey(x_HWC).mean()
    x_HWC = mean + (x_HWC - mean) * contrast
    grey_HW1 = _grey(x_HWC)[..., None]
    x_HWC = grey_HW1 + (x_HWC - grey_HW1) * colour
    return x_HWC.round().clip(0, 255).astype(np.uint8)


def _blur(image_HWC: np.ndarray, sigma: float) -> np.ndarray:
    import cv2

    return np.asarray(cv2.GaussianBlur(image_HWC, (0, 0), sigma))


def _erase(image_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    side = image_HWC.shape[0]
    area = rng.uniform(*ERASED) * side * side
    aspect = np.exp(rng.uniform(np.log(ERASED_ASPECT), -np.log(ERASED_ASPECT)))
    height, width = (
        min(side, max(1, round(float(length))))
        for length in (np.sqrt(area * aspect), np.sqrt(area / aspect))
    )
    top, left = (int(rng.integers(side - length + 1)) for length in (height, width))
    image_HWC = image_HWC.copy()
    image_HWC[top : top + height, left : left + width] = rng.integers(
        256, size=(height, width, 3), dtype=np.uint8
    )
    return image_HWC


def _cutout(image_HWC: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """The centre of the square is anywhere, so that it may reach over the border."""
    side, half = image_HWC.shape[0], max(1, round(CUTOUT * image_HWC.shape[0] / 2))
    row, column = (int(place) for place in rng.integers(side, size=2))
    image_HWC = image_HWC.copy()
    image_HWC[max(0, row - half) : row + half, max(0, column - half) : column + half] = level
    return image_HWC
