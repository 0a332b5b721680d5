"""Building blocks of Efficient PolyFace and PolyNet.

trojans-face-recognizer (the authors' code), EfficientPolyFace/EfficientPolyFace.py; the blocks are
those of PolyNet (arXiv 1611.05725). Every pooled map must have an odd side, otherwise the pooling
and the convolution beside it disagree; this leaves the sizes 43 + 32 f and 44 + 32 f, where f is
the side of the last map.

The 1x1 convolutions that a block applies to one input are computed as one convolution and split
again (`merge`): the same function with fewer kernels to launch.

Letters: B images, C channels, H W size.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from face_lfr.models.layers import ConvNorm

Norm = Callable[[int], nn.Module]


class Conv(NamedTuple):
    """A convolution: output channels, kernel, stride, padding."""

    channels: int
    kernel: tuple[int, int]
    stride: int = 1
    padding: tuple[int, int] = (0, 0)

    def side(self, side: int) -> int:
        """Side of the output map for an input map of `side`."""
        grown = side + 2 * max(self.padding)
        return (grown - max(self.kernel)) // self.stride + 1


def same(channels: int, height: int, width: int) -> Conv:
    """A convolution that keeps the map's size."""
    return Conv(channels, (height, width), 1, (height // 2, width // 2))


def valid(channels: int, stride: int = 1) -> Conv:
    """An unpadded 3x3 convolution."""
    return Conv(channels, (3, 3), stride)


class Branches(NamedTuple):
    """Parallel branches whose outputs are concatenated in this order.

    Args:
        entry: channels of the 1x1 convolutions at the start of the first branches.
        tails: what follows each of them.
        direct: branches that are a single convolution of the input.
    """

    entry: tuple[int, ...]
    tails: tuple[tuple[Conv, ...], ...]
    direct: tuple[Conv, ...] = ()

    def scaled(self, width: float) -> "Branches":
        """The same branches with `width` times the channels."""
        return Branches(
            tuple(scaled(channels, width) for channels in self.entry),
            tuple(tuple(_scale(conv, width) for conv in tail) for tail in self.tails),
            tuple(_scale(conv, width) for conv in self.direct),
        )

    @property
    def channels(self) -> int:
        """Channels of the concatenation."""
        ends = [
            tail[-1].channels if tail else entry
            for entry, tail in zip(self.entry, self.tails, strict=True)
        ]
        return sum(ends) + sum(conv.channels for conv in self.direct)


BLOCK_A = Branches((32, 32, 32), ((same(48, 3, 3), same(64, 3, 3)), (same(32, 3, 3),), ()))
BLOCK_B = Branches((128, 192), ((same(160, 1, 7), same(192, 7, 1)), ()))
BLOCK_C = Branches((192, 192), ((same(224, 1, 3), same(256, 3, 1)), ()))
A_TO_B = Branches((256,), ((same(256, 3, 3), valid(384, 2)),), (valid(384, 2),))
B_TO_C = Branches(
    (256, 256, 256),
    ((same(256, 3, 3), valid(256, 2)), (valid(256, 2),), (valid(384, 2),)),
)
# The stem: three convolutions, a halving, branches, a halving. A halving concatenates a pooled map
# and a convolution with stride 2.
STEM_START = (valid(32, 2), valid(32), same(64, 3, 3))
STEM_HALF = valid(96, 2)
STEM_MIDDLE = Branches((64, 64), ((valid(96),), (same(64, 7, 1), same(64, 1, 7), valid(96))))
STEM_END = valid(192, 2)


def scaled(channels: int, width: float) -> int:
    """`width` times the channels, rounded to a multiple of 4; the channels themselves at 1."""
    return channels if width == 1 else max(4, 4 * round(channels * width / 4))


def _scale(conv: Conv, width: float) -> Conv:
    return conv._replace(channels=scaled(conv.channels, width))


def last_side(input_size: int) -> int:
    """Side f of the last map.

    Raises:
        ValueError: a size that is neither 43 + 32 f nor 44 + 32 f with f of at least 1.
    """
    side, rest = divmod(input_size - 43, 32)
    if side < 1 or rest > 1:
        near = max(side, 1)
        sizes = [base + 32 * f for f in range(near, near + 2) for base in (43, 44)]
        listed = ", ".join(map(str, sizes))
        raise ValueError(
            f"input_size={input_size}: need 43 + 32 f or 44 + 32 f for a last map of side f "
            f"(75, 107, 139, 171, 203, 235, ...); the nearest are {listed}"
        )
    return side


def conv_norm_relu(inputs: int, conv: Conv, norm: Norm) -> ConvNorm:
    """The convolution, its norm and a ReLU."""
    layer = nn.Conv2d(inputs, conv.channels, conv.kernel, conv.stride, conv.padding, bias=False)
    return ConvNorm(layer, norm(conv.channels), nn.ReLU(inplace=True))


def chain(inputs: int, convs: Sequence[Conv], norm: Norm) -> nn.Sequential:
    """Convolutions one after another; nothing when there is none."""
    starts = (inputs, *(conv.channels for conv in convs))
    pairs = zip(starts, convs, strict=False)
    return nn.Sequential(*(conv_norm_relu(start, conv, norm) for start, conv in pairs))


class ParallelConvs(nn.Module):
    """The 1x1 convolutions of one input; one convolution in all when `merge`."""

    def __init__(self, inputs: int, outputs: Sequence[int], norm: Norm, merge: bool):
        super().__init__()
        self.outputs = tuple(outputs)
        counts = (sum(outputs),) if merge else outputs
        self.convs = nn.ModuleList(
            conv_norm_relu(inputs, Conv(count, (1, 1)), norm) for count in counts
        )

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        """One map per branch."""
        if len(self.convs) == 1:
            return list(self.convs[0](x_BCHW).split(self.outputs, dim=1))
        return [conv(x_BCHW) for conv in self.convs]


class Branched(nn.Module):
    """The outputs of `Branches` as a list of maps."""

    def __init__(self, inputs: int, branches: Branches, norm: Norm, merge: bool):
        super().__init__()
        self.entry = ParallelConvs(inputs, branches.entry, norm, merge)
        self.tails = nn.ModuleList(
            chain(entry, tail, norm)
            for entry, tail in zip(branches.entry, branches.tails, strict=True)
        )
        self.direct = nn.ModuleList(conv_norm_relu(inputs, conv, norm) for conv in branches.direct)

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        """Maps of the branches, then those of the direct convolutions."""
        entries = zip(self.tails, self.entry(x_BCHW), strict=True)
        return [tail(entry) for tail, entry in entries] + [conv(x_BCHW) for conv in self.direct]


class Inception(nn.Module):
    """The branch f of a residual block: branches and a closing 1x1 convolution with norm."""

    def __init__(self, inputs: int, branches: Branches, norm: Norm, merge: bool = True):
        super().__init__()
        self.branches = Branched(inputs, branches, norm, merge)
        closing = nn.Conv2d(branches.channels, inputs, 1, bias=False)
        self.closing = ConvNorm(closing, norm(inputs))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """f(x), of the shape of x."""
        y_BCHW: Tensor = self.closing(torch.cat(self.branches(x_BCHW), dim=1))
        return y_BCHW


class Reduction(nn.Module):
    """Branches with stride 2 beside a 3x3 max pool with stride 2."""

    def __init__(self, inputs: int, branches: Branches, norm: Norm, merge: bool = True):
        super().__init__()
        self.branches = Branched(inputs, branches, norm, merge)
        self.pool = nn.MaxPool2d(3, stride=2)
        self.channels = branches.channels + inputs

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Maps (B, channels, (H - 1) / 2, (W - 1) / 2)."""
        return torch.cat([*self.branches(x_BCHW), self.pool(x_BCHW)], dim=1)


class Halving(nn.Module):
    """A 3x3 max pool with stride 2 beside a convolution with stride 2."""

    def __init__(self, inputs: int, conv: Conv, norm: Norm):
        super().__init__()
        self.pool = nn.MaxPool2d(3, stride=2)
        self.conv = conv_norm_relu(inputs, conv, norm)
        self.channels = inputs + conv.channels

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Maps (B, channels, (H - 1) / 2, (W - 1) / 2)."""
        return torch.cat([self.pool(x_BCHW), self.conv(x_BCHW)], dim=1)


class Stem(nn.Module):
    """Images (B, 3, H, W) -> maps (B, channels, 4 f + 3, 4 f + 3)."""

    def __init__(self, width: float, norm: Norm, merge: bool = True):
        super().__init__()
        start = [_scale(conv, width) for conv in STEM_START]
        middle = STEM_MIDDLE.scaled(width)
        self.start = chain(3, start, norm)
        self.halve = Halving(start[-1].channels, _scale(STEM_HALF, width), norm)
        self.middle = Branched(self.halve.channels, middle, norm, merge)
        self.end = Halving(middle.channels, _scale(STEM_END, width), norm)
        self.channels = self.end.channels

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Maps after two of the four halvings of the stem and reductions."""
        x = self.halve(self.start(x_BCHW))
        y_BCHW: Tensor = self.end(torch.cat(self.middle(x), dim=1))
        return y_BCHW


def init_uniform(model: nn.Module) -> None:
    """Weights U(-a, a) with a = sqrt(3 / fan_in), so of variance 1 / fan_in; biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            bound = math.sqrt(3 / module.weight[0].numel())
            nn.init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
