"""Improved ResNet for faces (IResNet): every block normalises before its first convolution.

Deng et al. (ArcFace, arXiv 1801.07698), section 3.1; layers and starting values as in insightface
arcface_torch, backbones/iresnet.py. Sizes are arguments, so that the same class is also the small
network for synthetic faces.

Letters: B images, C channels, H W size, D embedding width.
"""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from face_lfr.models.layers import (
    ConvNorm,
    FeatureLinear,
    check_counts,
    check_input,
    check_share,
    halved,
)


class Block(nn.Module):
    """BN, 3x3, BN, PReLU, strided 3x3, BN; added to the input or its strided 1x1 convolution."""

    folds: ClassVar[tuple[tuple[str, str], ...]] = (("conv1", "bn2"), ("conv2", "bn3"))

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.prelu = nn.PReLU(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = ConvNorm(conv, nn.BatchNorm2d(outputs))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Activations (B, outputs, H', W')."""
        y = self.prelu(self.bn2(self.conv1(self.bn1(x_BCHW))))
        y = self.bn3(self.conv2(y))
        total: Tensor = y + self.shortcut(x_BCHW)
        return total


class IResNet(nn.Module):
    """Faces (B, 3, H, W) -> features (B, D); every stage halves the map.

    Published depths: 18 is layers (2, 2, 2, 2), 34 (3, 4, 6, 3), 50 (3, 4, 14, 3),
    100 (3, 13, 30, 3). The scale of the last norm is fixed at 1.

    Args:
        layers: blocks of the four stages.
        widths: channels of the four stages; the first convolution has those of the first.
        features: D.
        input_size: H = W in pixels.
        dropout: share of the last map that is dropped in training.
        stem_stride: stride of the first convolution, 1 as published; 2 for larger images.

    Raises:
        ValueError: an argument that is not accepted.
    """

    folds: ClassVar[tuple[tuple[str, str], ...]] = (("conv1", "bn1"), ("fc", "last_norm"))
    folds_ahead: ClassVar[tuple[tuple[str, str], ...]] = (("bn2", "fc"),)

    def __init__(
        self,
        layers: Sequence[int] = (3, 4, 14, 3),
        widths: Sequence[int] = (64, 128, 256, 512),
        features: int = 512,
        input_size: int = 112,
        dropout: float = 0.0,
        stem_stride: int = 1,
    ):
        super().__init__()
        layers, widths = check_counts("layers", layers, 4), check_counts("widths", widths, 4)
        check_counts("features, input_size", (features, input_size), 2)
        if stem_stride not in (1, 2):
            raise ValueError(f"stem_stride={stem_stride}: need 1 or 2")
        self.features, self.input_size = features, input_size
        self.conv1 = nn.Conv2d(3, widths[0], 3, stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.prelu = nn.PReLU(widths[0])
        self.layer1 = _stage(widths[0], widths[0], layers[0])
        self.layer2 = _stage(widths[0], widths[1], layers[1])
        self.layer3 = _stage(widths[1], widths[2], layers[2])
        self.layer4 = _stage(widths[2], widths[3], layers[3])
        self.bn2 = nn.BatchNorm2d(widths[3])
        self.dropout = nn.Dropout(check_share("dropout", dropout))
        side = halved(input_size, 4 + (stem_stride == 2))
        self.fc = FeatureLinear(widths[3] * side * side, features)
        self.last_norm = nn.BatchNorm1d(features)
        self.last_norm.weight.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Features (B, D), not of unit length.

        Raises:
            ValueError: images of another size or number of channels.
        """
        check_input(x_BCHW, self.input_size)
        x = self.prelu(self.bn1(self.conv1(x_BCHW)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        feature_BD: Tensor = self.last_norm(self.fc(self.dropout(self.bn2(x).flatten(1))))
        return feature_BD

    def embed(self, x_BCHW: Tensor) -> Tensor:
        """Features (B, D) for comparisons: those of `forward`."""
        return self(x_BCHW)


def _stage(inputs: int, outputs: int, blocks: int) -> nn.Sequential:
    first = Block(inputs, outputs, stride=2)
    return nn.Sequential(first, *(Block(outputs, outputs, stride=1) for _ in range(1, blocks)))
