"""Proposals for detectors without an RPN, on pictures that no data set describes.

They come from a file (npz, an array (M, 4) for each picture), or are a dense grid of boxes.

Letters: M proposals, 4 box (xyxy in pixels).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from common.log import InputError
from detection_tsd.data.coco import read_proposals
from detection_tsd.inputs import Source


@dataclass(frozen=True)
class Grid:
    """Boxes of several sizes and shapes at regular places, the same for every picture of a size.

    Attributes:
        sides: square roots of the areas, pixels of the network's input.
        ratios: height over width.
        step: from a box to the next, in widths and heights of the box.
        limit: boxes of a picture at most; where there would be more, the step grows.
    """

    sides: tuple[float, ...]
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    step: float = 0.25
    limit: int = 5000

    def __post_init__(self) -> None:
        for name in ("sides", "ratios"):
            values = getattr(self, name)
            if not values or not all(0 < value < np.inf for value in values):
                raise ValueError(f"{name}={values}: need positive numbers")
        least = 4 * len(self.sides) * len(self.ratios)
        if not self.step > 0 or self.limit < least:
            what = f"step > 0 and limit >= {least}, the corners of every size"
            raise ValueError(f"step={self.step}, limit={self.limit}: need {what}")

    def boxes(self, height: int, width: int) -> np.ndarray:
        """The boxes of a picture, float32 (M, 4) with M >= 1, inside of it, each once.

        Sides longer than the picture are cut to it.
        """
        step = self.step
        while self._count(height, width, step) > self.limit:
            step *= 1.1
        parts = []
        for x_N, y_N, size in self._sizes(height, width, step):
            corner_N2 = np.stack(np.meshgrid(x_N, y_N), axis=-1).reshape(-1, 2)
            parts.append(np.concatenate([corner_N2, corner_N2 + size], axis=1))
        return np.unique(np.concatenate(parts).astype(np.float32), axis=0)

    def _count(self, height: int, width: int, step: float) -> int:
        return sum(len(x_N) * len(y_N) for x_N, y_N, _ in self._sizes(height, width, step))

    def _sizes(
        self, height: int, width: int, step: float
    ) -> Iterator[tuple[np.ndarray, np.ndarray, tuple[float, float]]]:
        """Where the boxes of each size begin along x and y, and that size."""
        for side in self.sides:
            for ratio in self.ratios:
                x_N, box_width = _places(width, side / ratio**0.5, step)
                y_N, box_height = _places(height, side * ratio**0.5, step)
                yield x_N, y_N, (box_width, box_height)


def _places(length: int, side: float, step: float) -> tuple[np.ndarray, float]:
    """Where boxes begin along an axis, and how long they are."""
    side = min(side, length)
    count = int(np.ceil((length - side) / (step * side))) + 1
    return np.linspace(0, length - side, count), side


def usual_sides(model: nn.Module) -> tuple[float, ...]:
    """Sides of the boxes that a detector's pyramid levels are for, a factor of 2**0.5 apart."""
    heads = getattr(model, "heads", None)
    head = model.head if heads is None else heads[0]
    levels: int = model.backbone.roi_levels  # type: ignore[union-attr,assignment]
    return tuple(float(head.level_base) * 2 ** (k / 2) for k in range(2 * levels + 1))  # type: ignore[union-attr,arg-type]


def find_file(path: Path) -> Path | None:
    """The proposal file that lies with a picture or folder, or None.

    `proposals.npz` in the folder, or `proposals_<folder>.npz` beside it.
    """
    folder = (path if path.is_dir() else path.parent).resolve()
    for found in (folder / "proposals.npz", folder.parent / f"proposals_{folder.name}.npz"):
        if found.is_file():
            return found
    return None


def from_file(path: Path, sources: Sequence[Source]) -> list[np.ndarray]:
    """Proposals of each picture, float32 (M, 4) in its pixels.

    An array is named by the path of the picture below the folder, by its name, with or without the
    suffix, or by the number that its name is: `139` for `000000000139.jpg`.

    Raises:
        InputError: the file cannot be read, has no array for a picture, or no boxes in it; or one
            of the sources is a video.
    """
    for source in sources:
        if source.is_video:
            raise InputError(path, "holds proposals of pictures, this is a video", source.path)
    try:
        with np.load(path, allow_pickle=False) as file:
            held = set(getattr(file, "files", ()))
    except (OSError, ValueError, AttributeError, TypeError):
        held = set()  # read_proposals says what is wrong
    return read_proposals(path, [_key(source, held) for source in sources])


def _key(source: Source, held: set[str]) -> str:
    stem = source.path.stem
    names = [source.id, source.path.name, stem]
    if stem.isascii() and stem.isdigit():
        names.append(str(int(stem)))
    return next((name for name in names if name in held), source.path.name)
