"""A tiny training set and a fixed recogniser, for the tests of the proxy set.

Letters: B images of a batch, C channels, H rows, W columns.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import dist
from common.log import InputError
from face_lfr.data.face_data import FaceData
from face_lfr.data.transforms import FaceTransform

SIDE, CLASSES, WIDTH, COPIES, SEED = 24, 5, 6, 3, 11
ALONE = dist.World(0, 1, torch.device("cpu"))


@dataclass
class Faces:
    """Identity-coloured pictures; the rows of `bad` cannot be read."""

    labels: tuple[int, ...]
    bad: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, row: int) -> np.ndarray:
        if row in self.bad:
            raise InputError(self.name(row), "cannot be decoded")
        pattern = np.random.default_rng([1, self.labels[row]]).integers(0, 256, (6, 6, 3))
        image = np.kron(pattern, np.ones((4, 4, 1)))
        image += np.random.default_rng([2, row]).normal(0, 6, image.shape)
        return np.clip(image, 0, 255).astype(np.uint8)

    def label(self, row: int) -> int:
        return self.labels[row]

    def name(self, row: int) -> str:
        return f"faces row {row}"


class Recogniser(nn.Module):
    """A fixed random projection of the picture; `embed` differs from `forward` on purpose."""

    def __init__(self, seed: int = 0):
        super().__init__()
        self.features, self.input_size = WIDTH, SIDE - 1
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(WIDTH, 3 * self.input_size**2, generator=generator)
        self.project = nn.Parameter(weight / 40)

    def embed(self, x_BCHW: Tensor) -> Tensor:
        return F.linear(x_BCHW.flatten(1), self.project)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.embed(x_BCHW) + 100


def faces(labels: tuple[int, ...] = (0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 4), bad: tuple = ()) -> FaceData:
    images = Faces(labels, bad)
    return FaceData("faces", Path("faces"), CLASSES, images, np.array(labels, np.int64))


def a_transform() -> FaceTransform:
    return FaceTransform(size=SIDE, crop_first=True, colour="bgr", scale=79.6875)


def some_centres() -> Tensor:
    """Centres of no particular length."""
    return 7 * torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(5))
