"""Some classes of a training set: for short trainings, and to test on the persons left out.

Letters: N images of the part, C classes of the whole set.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from common.log import InputError
from face_lfr.data.face_data import FaceData, Images
from face_lfr.data.noise import with_label_noise
from face_lfr.data.rec import load_rec


@dataclass(frozen=True)
class PartImages:
    """Some rows of other images, under new labels; see `face_lfr.data.face_data.Images`."""

    images: Images
    row_N: np.ndarray
    labels_N: np.ndarray

    def __len__(self) -> int:
        return len(self.row_N)

    def read(self, row: int) -> np.ndarray:
        """Image uint8 (H, W, 3) RGB; `InputError` names its place in the whole set."""
        return self.images.read(int(self.row_N[row]))

    def label(self, row: int) -> int:
        """Class within the part."""
        return int(self.labels_N[row])

    def name(self, row: int) -> str:
        """Place in the whole set."""
        return self.images.name(int(self.row_N[row]))


def load_rec_part(
    root: Path | str,
    part: Sequence[int],
    part_seed: int = 0,
    noise: float = 0.0,
    noise_seed: int = 0,
    **of_load_rec: Any,
) -> FaceData:
    """Classes `part[0]` to `part[1]` (left out) of a RecordIO set in an order of `part_seed`.

    Two parts of one order that do not overlap share no person. Their classes are numbered anew.

    Args:
        root: folder of the files.
        part: first class in that order, and the first that is left out again.
        part_seed: of the order of the classes.
        noise: fraction of the part's images that get a random class of the part.
        noise_seed: of their choice.
        of_load_rec: further arguments of `face_lfr.data.rec.load_rec`, about the whole set.

    Raises:
        InputError: the set has no such classes; as for `load_rec`.
        ValueError: as for `load_rec`.
    """
    data = load_rec(root, **of_load_rec)
    span = [int(end) for end in part]
    if len(span) != 2 or not 0 <= span[0] < span[1] <= data.num_classes:
        what = f"needs two rising numbers from 0 to the {data.num_classes} classes of {root}"
        raise InputError("part", what, list(part))
    found = class_part(data, span[0], span[1], part_seed)
    return with_label_noise(found, noise, noise_seed)


def class_part(data: FaceData, first: int, end: int, seed: int) -> FaceData:
    """Classes `first` to `end` (left out) of a set, in an order of the seed."""
    kept_C = np.random.default_rng(seed).permutation(data.num_classes)[first:end]
    number_C = np.full(data.num_classes, -1)
    number_C[kept_C] = np.arange(len(kept_C))
    label_N = number_C[data.labels_N]
    row_N = np.flatnonzero(label_N >= 0)
    labels_N = label_N[row_N].astype(np.int64)
    return replace(
        data,
        name=f"{data.name} classes {first} to {end}",
        num_classes=len(kept_C),
        images=PartImages(data.images, row_N, labels_N),
        labels_N=labels_N,
    )
