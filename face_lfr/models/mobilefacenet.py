"""MobileFaceNet (Chen et al., arXiv 1804.07573): depthwise bottlenecks, global depthwise head.

Two published forms: `mbf` of insightface arcface_torch (backbones/mobilefacenet.py, scale 2), and
the deeper `y2` of insightface arcface_mxnet (933 MFLOPs by the organisers' counter), which is
scale 1 with blocks (2, 8, 16, 4), 64 channels inside its first bottlenecks and an embedding of 256
with a bias.

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
    halved,
)

LAST = 512  # channels in front of and inside the head


class Bottleneck(nn.Module):
    """1x1, depthwise 3x3 with stride, 1x1 without activation; added to the input if `residual`."""

    def __init__(self, inputs: int, outputs: int, inside: int, stride: int, residual: bool):
        super().__init__()
        self.residual = residual
        self.layers = nn.Sequential(
            _conv(inputs, inside, 1),
            _conv(inside, inside, 3, stride, groups=inside),
            _conv(inside, outputs, 1, act=False),
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Activations (B, outputs, H', W')."""
        y_BCHW: Tensor = self.layers(x_BCHW)
        return x_BCHW + y_BCHW if self.residual else y_BCHW


class MobileFaceNet(nn.Module):
    """Faces (B, 3, H, W) -> features (B, D); the body divides the side of the map by 16.

    Args:
        blocks: residual bottlenecks of the four stages; a first stage of one block is a single
            depthwise convolution.
        scale: multiple of the channels 64, 64, 128, 128 outside the bottlenecks.
        inside: channels inside the bottlenecks: first stage, then for each of the other three its
            halving and its residual bottlenecks.
        features: D.
        input_size: H = W in pixels.
        head_bias: whether the linear layer of the head has a bias.

    Raises:
        ValueError: an argument that is not accepted.
    """

    folds: ClassVar[tuple[tuple[str, str], ...]] = (("fc", "last_norm"),)

    def __init__(
        self,
        blocks: Sequence[int] = (1, 4, 6, 2),
        scale: int = 2,
        inside: Sequence[int] = (128, 128, 128, 256, 256, 512, 256),
        features: int = 512,
        input_size: int = 112,
        head_bias: bool = False,
    ):
        super().__init__()
        blocks = check_counts("blocks", blocks, 4)
        inside = check_counts("inside", inside, 7)
        check_counts("scale, features, input_size", (scale, features, input_size), 3)
        self.features, self.input_size = features, input_size
        narrow, wide = 64 * scale, 128 * scale
        first: nn.Module = _conv(narrow, narrow, 3, groups=64)
        if blocks[0] > 1:
            first = _residuals(narrow, blocks[0], inside[0])
        self.body = nn.Sequential(
            _conv(3, narrow, 3, stride=2),
            first,
            Bottleneck(narrow, narrow, inside[1], 2, residual=False),
            _residuals(narrow, blocks[1], inside[2]),
            Bottleneck(narrow, wide, inside[3], 2, residual=False),
            _residuals(wide, blocks[2], inside[4]),
            Bottleneck(wide, wide, inside[5], 2, residual=False),
            _residuals(wide, blocks[3], inside[6]),
            _conv(wide, LAST, 1),
        )
        self.head = _global(LAST, halved(input_size, 4))
        self.fc = FeatureLinear(LAST, features, bias=head_bias)
        self.last_norm = nn.BatchNorm1d(features)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if head_bias:
            nn.init.zeros_(self.fc.bias)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Features (B, D), not of unit length.

        Raises:
            ValueError: images of another size or number of channels.
        """
        check_input(x_BCHW, self.input_size)
        x = self.head(self.body(x_BCHW)).flatten(1)
        feature_BD: Tensor = self.last_norm(self.fc(x))
        return feature_BD

    def embed(self, x_BCHW: Tensor) -> Tensor:
        """Features (B, D) for comparisons: those of `forward`."""
        return self(x_BCHW)


def _conv(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True
) -> ConvNorm:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return ConvNorm(conv, nn.BatchNorm2d(outputs), nn.PReLU(outputs) if act else None)


def _global(channels: int, side: int) -> ConvNorm:
    conv = nn.Conv2d(channels, channels, side, groups=channels, bias=False)
    return ConvNorm(conv, nn.BatchNorm2d(channels))


def _residuals(channels: int, count: int, inside: int) -> nn.Sequential:
    blocks = (Bottleneck(channels, channels, inside, 1, residual=True) for _ in range(count))
    return nn.Sequential(*blocks)
