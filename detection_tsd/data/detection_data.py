"""What a detection set is to the rest of the package, and what travels from it to the network.

Letters: N images of a set, B images of a batch, G ground-truth boxes, I ignored boxes, M proposals,
D detections, H W rows and columns. Boxes are xyxy in absolute pixels, width = x2 - x1; a label is
in 1..classes, 0 is the background.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor


class Annotation(NamedTuple):
    """Objects of one image in the pixels of the file; the arrays are the caller's to change.

    Attributes:
        box_G4: float32.
        label_G: int64, 1..classes.
        crowd_I4: float32, regions that count neither for nor against a detection.
        segments: of the G boxes, polygons or run-length codes as the file has them; None when the
            set was read without masks.
    """

    box_G4: np.ndarray
    label_G: np.ndarray
    crowd_I4: np.ndarray
    segments: list[Any] | None = None


class Images(Protocol):
    """Images by row; opened lazily, so that every data worker has its own handles."""

    def __len__(self) -> int: ...

    def read(self, row: int) -> np.ndarray:
        """Image uint8 (H, W, 3), RGB.

        Raises:
            InputError: it cannot be read or decoded; names the file.
        """
        ...

    def size(self, row: int) -> tuple[int, int]:
        """Height and width, without decoding."""
        ...

    def name(self, row: int) -> str:
        """Where the image comes from, for messages."""
        ...


class Objects(Protocol):
    """Annotations by row."""

    def __len__(self) -> int: ...

    def read(self, row: int) -> Annotation:
        """Fresh arrays each time: scaling them in place must not reach the set."""
        ...

    def labels(self, row: int) -> np.ndarray:
        """Label of each object of the row, int64 (G,), without building the rest."""
        ...


@dataclass(frozen=True)
class DetectionData:
    """A set of N images with boxes.

    Attributes:
        name: of the set, for reports.
        root: folder it was read from.
        classes: names; label k is classes[k - 1].
        class_ids: what the files call the classes (COCO category ids, Open Images MIDs).
        image_ids: what the files call the images; N of them.
        images: the N images.
        objects: their annotations.
        proposals: row -> float32 (M, 4) in the pixels of the file, when fixed proposals are used.
        skipped: reason -> how many entries the loader left out.
        source: the annotation file, which an evaluator reads again.
    """

    name: str
    root: Path
    classes: tuple[str, ...]
    class_ids: tuple[Any, ...]
    image_ids: tuple[Any, ...]
    images: Images
    objects: Objects
    proposals: list[np.ndarray] | None = None
    skipped: dict[str, int] = field(default_factory=dict)
    source: Path | None = None

    @property
    def num_classes(self) -> int:
        """Foreground classes."""
        return len(self.classes)

    def __len__(self) -> int:
        return len(self.image_ids)


class Target(NamedTuple):
    """Objects of one image in network-input pixels.

    Attributes:
        box_G4: float32.
        label_G: int64, 1..classes.
        crowd_I4: float32.
        mask_GHW: uint8 in {0, 1} on the valid part of the input; None without masks.
    """

    box_G4: Tensor
    label_G: Tensor
    crowd_I4: Tensor
    mask_GHW: Tensor | None = None


class Item(NamedTuple):
    """One image as a data worker hands it over.

    Attributes:
        image: uint8 (3, H, W), RGB, already resized and flipped.
        target: its objects; empty in a test.
        proposals: float32 (M, 4) in network-input pixels, or None.
        row: of the set.
        draw: number of the draw, which every random choice about this image depends on.
        scale: network-input pixels per pixel of the file, (x, y).
        original: height and width in the file.
    """

    image: Tensor
    target: Target
    proposals: Tensor | None
    row: int
    draw: int
    scale: tuple[float, float]
    original: tuple[int, int]


class Batch(NamedTuple):
    """B items padded at the right and the bottom to one size.

    Attributes:
        image_B3HW: uint8; H and W are multiples of the stride of the network.
        size_B2: int64, height and width of the valid part.
        targets: B of them.
        proposals: B of them, or None.
        row_B: int64. draw_B: int64.
        scale_B2: float32 (x, y), see `Item`. original_B2: int64 (height, width).
    """

    image_B3HW: Tensor
    size_B2: Tensor
    targets: list[Target]
    proposals: list[Tensor] | None
    row_B: Tensor
    draw_B: Tensor
    scale_B2: Tensor
    original_B2: Tensor


class Detections(NamedTuple):
    """Detections of one image, best first.

    Attributes:
        box_D4: float32. score_D: float32 in [0, 1]. label_D: int64, 1..classes.
        mask_DSS: float32 probabilities on a grid over each box, or None without masks.
    """

    box_D4: Tensor
    score_D: Tensor
    label_D: Tensor
    mask_DSS: Tensor | None = None
