"""What a training set is to the rest of the package: images by row, and their classes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np


class Images(Protocol):
    """Images by row; opened lazily, so that every data worker has its own handle."""

    def __len__(self) -> int: ...

    def read(self, row: int) -> np.ndarray:
        """Image uint8 (H, W, 3), RGB.

        Raises:
            InputError: it cannot be read or decoded; names the file and the place in it.
        """
        ...

    def label(self, row: int) -> int:
        """Class of the row, as the file says."""
        ...

    def name(self, row: int) -> str:
        """Where the row comes from, for messages."""
        ...


@dataclass(frozen=True)
class FaceData:
    """A training set of N images of `num_classes` identities.

    Attributes:
        name: of the set, for reports.
        root: folder it was read from.
        num_classes: C; every class of `labels_N` is in [0, C).
        images: the N images.
        labels_N: int64, what training uses; may carry label noise that the file has not.
        skipped: reason -> how many entries the loader left out.
    """

    name: str
    root: Path
    num_classes: int
    images: Images
    labels_N: np.ndarray
    skipped: dict[str, int] = field(default_factory=dict)

    @property
    def epoch_length(self) -> int:
        """Images of an epoch."""
        return len(self.labels_N)
