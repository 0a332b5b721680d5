"""Quality heads: one positive score per frame and region (arXiv 1711.08766).

Each takes the frames and the trunk's pool2 map and returns scores (B, outputs) in (0, 1).
Letters: B frames, C channels, H W size, Q outputs (regions, or 1 for one score per frame).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS = {"none": nn.Identity, "relu": nn.ReLU}


def _activation(name: str) -> nn.Module:
    if name not in ACTIVATIONS:
        raise ValueError(f"act={name!r}: need one of {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


def _gaussian(layer: nn.Conv2d | nn.Linear, std: float) -> nn.Conv2d | nn.Linear:
    nn.init.normal_(layer.weight, std=std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _grid(map_BCHW: Tensor, grid: tuple[int, int]) -> Tensor:
    if tuple(map_BCHW.shape[2:]) != grid:
        raise ValueError(
            f"the quality head pools this frame size to {tuple(map_BCHW.shape[2:])}, "
            f"but was built with grid={list(grid)}"
        )
    return map_BCHW.flatten(1)


class Quality(nn.Module):
    """Base: the sigmoid of a head's logits, taken in float32 (float64 stays)."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        if outputs < 1:
            raise ValueError(f"outputs={outputs}: need 1 (per frame) or the number of regions")
        self.outputs = outputs

    def logits(self, image_BCHW: Tensor, pool2_BCHW: Tensor) -> Tensor:
        """Scores before the sigmoid, (B, Q)."""
        raise NotImplementedError

    def forward(self, image_BCHW: Tensor, pool2_BCHW: Tensor) -> Tensor:
        """Scores (B, Q) in (0, 1) for frames (B, C, H, W) and their pool2 maps."""
        logit_BQ = self.logits(image_BCHW, pool2_BCHW)
        return logit_BQ.to(torch.promote_types(logit_BQ.dtype, torch.float32)).sigmoid()


class ConstantQuality(Quality):
    """Score 1 for every frame: the set feature is the plain mean. Has no parameters."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__(outputs)

    def forward(self, image_BCHW: Tensor, pool2_BCHW: Tensor) -> Tensor:
        """Ones (B, Q)."""
        return image_BCHW.new_ones(len(image_BCHW), self.outputs, dtype=torch.float32)


class ImageQuality(Quality):
    """The head of the released training files: from the frame itself, trained with the trunk.

    No batch norm and, by default, no ReLU: the max-pool is the only nonlinearity. Gaussian
    init (std 0.01) starts all scores near 0.5, that is from mean pooling.

    Args:
        outputs: regions, or 1.
        act: "none" (reference) or "relu" after each convolution (ours).
        grid: rows and columns after the last pooling; (8, 8) for 224x224, (10, 5) for 256x128.
        in_channels: channels of the frames.
    """

    def __init__(
        self,
        outputs: int = 3,
        act: str = "none",
        grid: Sequence[int] = (8, 8),
        in_channels: int = 3,
    ) -> None:
        super().__init__(outputs)
        self.grid = (grid[0], grid[1])
        self.conv1 = _gaussian(nn.Conv2d(in_channels, 64, 7, stride=2, padding=3), 0.01)
        self.conv2 = _gaussian(nn.Conv2d(64, 64, 3, padding=1), 0.01)
        self.conv3 = _gaussian(nn.Conv2d(64, 64, 3, padding=1), 0.01)
        self.fc = _gaussian(nn.Linear(64 * self.grid[0] * self.grid[1], outputs), 0.01)
        self.act = _activation(act)

    def logits(self, image_BCHW: Tensor, pool2_BCHW: Tensor) -> Tensor:
        """Scores before the sigmoid, (B, Q), from the frames."""
        x = F.max_pool2d(self.act(self.conv1(image_BCHW)), 3, stride=2, ceil_mode=True)
        x = self.act(self.conv3(self.act(self.conv2(x))))
        x = F.avg_pool2d(x, 7, stride=7, ceil_mode=True)
        return self.fc(_grid(x, self.grid))


class Pool2FC(Quality):
    """The other released file: one linear layer on the flattened pool2 map, no pooling.

    Gradients reach the trunk through pool2, as they do in the released file.

    Args:
        outputs: regions, or 1.
        channels: of pool2.
        grid: rows and columns of pool2; (28, 28) for 224x224 frames.
    """

    def __init__(
        self, outputs: int = 3, channels: int = 192, grid: Sequence[int] = (28, 28)
    ) -> None:
        super().__init__(outputs)
        self.grid = (grid[0], grid[1])
        self.fc = _gaussian(nn.Linear(channels * self.grid[0] * self.grid[1], outputs), 0.01)

    def logits(self, image_BCHW: Tensor, pool2_BCHW: Tensor) -> Tensor:
        """Scores before the sigmoid, (B, Q), from pool2."""
        return self.fc(_grid(pool2_BCHW, self.grid))


class Pool2Conv(Quality):
    """Two 3x3 convolutions on pool2, average 7x7, linear.

    The released file defines these convolutions but leaves them unconnected; this is the wiring
    that their shapes suggest.

    Args:
        outputs: regions, or 1.
        channels: of pool2.
        act: "none" or "relu" after each convolution.
        grid: rows and columns after the pooling; (4, 4) for 224x224 frames.
    """

    def __init__(
        self,
        outputs: int = 3,
        channels: int = 192,
        act: str = "none",
        grid: Sequence[int] = (4, 4),
    ) -> None:
        super().__init__(outputs)
        self.grid = (grid[0], grid[1])
        self.conv1 = _gaussian(nn.Conv2d(channels, 32, 3, padding=1), 0.1)
        self.conv2 = _gaussian(nn.Conv2d(32, 32, 3, padding=1), 0.01)
        self.fc = _gaussian(nn.Linear(32 * self.grid[0] * self.grid[1], outputs), 0.01)
        self.act = _activation(act)

    def logits(self, image_BCHW: Tensor, pool2_BCHW: Tensor) -> Tensor:
        """Scores before the sigmoid, (B, Q), from pool2."""
        x = self.act(self.conv2(self.act(self.conv1(pool2_BCHW))))
        return self.fc(_grid(F.avg_pool2d(x, 7, stride=7, ceil_mode=True), self.grid))


class TinyQuality(Quality):
    """Small image head for the synthetic task, any frame size.

    The last map is averaged to 7 rows x 2 columns: regions are bands of rows, so the linear layer
    needs the rows (they are the rows that 3/2/2 counts) and hardly the columns. Convolutions keep
    PyTorch's default init: with std 0.01 on 16 channels the scores do not move in a few hundred
    steps. Only the last layer starts small, so that all scores start near 0.5.

    Args:
        outputs: regions, or 1.
        act: "relu" or "none" after each convolution; with "none" the max-pool is the only
            nonlinearity, as in `ImageQuality`.
        grid: rows and columns of the average.
        width: channels of both convolutions.
        in_channels: channels of the frames.
    """

    def __init__(
        self,
        outputs: int = 3,
        act: str = "relu",
        grid: Sequence[int] = (7, 2),
        width: int = 16,
        in_channels: int = 3,
    ) -> None:
        super().__init__(outputs)
        self.grid = (grid[0], grid[1])
        self.conv1 = nn.Conv2d(in_channels, width, 5, stride=2, padding=2)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.fc = _gaussian(nn.Linear(width * self.grid[0] * self.grid[1], outputs), 0.01)
        self.act = _activation(act)

    def logits(self, image_BCHW: Tensor, pool2_BCHW: Tensor) -> Tensor:
        """Scores before the sigmoid, (B, Q), from the frames."""
        x = F.max_pool2d(self.act(self.conv1(image_BCHW)), 2)
        x = F.adaptive_avg_pool2d(self.act(self.conv2(x)), self.grid)
        return self.fc(x.flatten(1))
