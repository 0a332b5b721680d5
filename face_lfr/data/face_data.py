"""What a training set is to the rest of the package: images by row, and their classes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from common.log import InputError


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


def check_labels(
    labels_N: np.ndarray, num_classes: int, what: object, name: Callable[[int], str]
) -> None:
    """Refuse labels outside of [0, num_classes).

    Args:
        labels_N: of the images.
        num_classes: C.
        what: where C comes from, for the message.
        name: of a row, for the message.

    Raises:
        InputError: names the first row with such a label.
    """
    wrong_N = (labels_N < 0) | (labels_N >= num_classes)
    if wrong_N.any():
        row = int(wrong_N.argmax())
        message = f"label is not in [0, {num_classes}), the classes of {what}"
        raise InputError(name(row), message, labels_N[row])


def count_gaps(
    labels_N: np.ndarray, num_classes: int, where: object, allow_gaps: bool
) -> dict[str, int]:
    """Classes without an image, as an entry of `FaceData.skipped`; empty when there is none.

    Raises:
        InputError: there are some and `allow_gaps` is False; names the first.
    """
    gap_G = np.flatnonzero(np.bincount(labels_N, minlength=num_classes) == 0)
    if not len(gap_G):
        return {}
    if not allow_gaps:
        more = f" and {len(gap_G) - 1} more" if len(gap_G) > 1 else ""
        what = "class without an image (allow_gaps=true accepts it)"
        raise InputError(where, what, f"{gap_G[0]}{more}")
    return {"classes without an image": len(gap_G)}
