"""GoogLeNet-BN trunk with the widths of "Inception-BN", as released with arXiv 1711.08766.

Ioffe & Szegedy, arXiv 1502.03167 (architecture); lim0606/caffe-googlenet-bn (the Caffe ImageNet
model that the released networks start from). Not torchvision's `googlenet`, whose widths differ.

Letters: B frames, C channels, H W map size.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reid_rqen.models.heads import fan_in_uniform_
from reid_rqen.models.output import Trunk, TrunkOutput
from reid_rqen.models.pretrained import load_trunk

BN_EPS = 1e-5


class Widths(NamedTuple):
    """Output channels of one inception block; 0 leaves a branch (or the projection) out."""

    one: int
    three: tuple[int, int]
    double: tuple[int, int, int]
    projection: int
    pool: str = "avg"
    stride: int = 1

    @property
    def own(self) -> int:
        """Channels besides those a pool without projection passes through."""
        return self.one + self.three[1] + self.double[2] + self.projection


BLOCKS = {
    "3a": Widths(64, (64, 64), (64, 96, 96), 32),
    "3b": Widths(64, (64, 96), (64, 96, 96), 64),
    "3c": Widths(0, (128, 160), (64, 96, 96), 0, "max", 2),
    "4a": Widths(224, (64, 96), (96, 128, 128), 128),
    "4b": Widths(192, (96, 128), (96, 128, 128), 128),
    "4c": Widths(160, (128, 160), (128, 160, 160), 96),
    "4d": Widths(96, (128, 192), (160, 192, 192), 96),
    "4e": Widths(0, (128, 192), (192, 256, 256), 0, "max", 2),
    "5a": Widths(352, (192, 320), (160, 224, 224), 128),
    "5b": Widths(352, (192, 320), (192, 224, 224), 128, "max"),
}
TAPS = ("3c", "4e")


class ConvBN(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, bn_momentum: float = 0.1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=BN_EPS, momentum=bn_momentum)
        fan_in_uniform_(self.conv.weight)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Non-negative map."""
        return F.relu(self.bn(self.conv(x_BCHW)), inplace=True)


class Inception(nn.Module):
    """Branches 1x1, 3x3, double 3x3 and pool, concatenated in this order."""

    def __init__(self, inputs: int, widths: Widths, bn_momentum: float = 0.1) -> None:
        super().__init__()
        (reduce3, out3), (reduce_d, a, b) = widths.three, widths.double
        stride, m = widths.stride, bn_momentum
        self.one = ConvBN(inputs, widths.one, 1, 1, m) if widths.one else None
        self.three_reduce = ConvBN(inputs, reduce3, 1, 1, m)
        self.three = ConvBN(reduce3, out3, 3, stride, m)
        self.double_reduce = ConvBN(inputs, reduce_d, 1, 1, m)
        self.double_a = ConvBN(reduce_d, a, 3, 1, m)
        self.double_b = ConvBN(a, b, 3, stride, m)
        project = widths.projection
        self.projection = ConvBN(inputs, project, 1, 1, m) if project else None
        self.pool, self.stride = widths.pool, stride
        self.channels = widths.own + (0 if project else inputs)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Concatenated branches (B, channels, H / stride, W / stride)."""
        branches = [] if self.one is None else [self.one(x_BCHW)]
        branches.append(self.three(self.three_reduce(x_BCHW)))
        branches.append(self.double_b(self.double_a(self.double_reduce(x_BCHW))))
        pooled_BCHW = self._pool(x_BCHW)
        branches.append(pooled_BCHW if self.projection is None else self.projection(pooled_BCHW))
        return torch.cat(branches, dim=1)

    def _pool(self, x_BCHW: Tensor) -> Tensor:
        if self.pool == "avg":
            # Caffe divides by the window including padding, 9 at the border too.
            return F.avg_pool2d(x_BCHW, 3, 1, 1, count_include_pad=True)
        # Caffe pads the convolutions of a reduction block but not its pool; ceil gives its size.
        padding = 0 if self.stride == 2 else 1
        return F.max_pool2d(x_BCHW, 3, self.stride, padding, ceil_mode=True)


class GoogLeNetBN(Trunk):
    """Trunk of the released networks: 224x224 frames give a 1024x7x7 map.

    10,169,984 parameters in 69 conv + BN layers; 2,017,827,840 multiply-accumulates per 224x224
    frame. The taps for the auxiliary heads are the outputs of blocks 3c (576) and 4e (1024).
    Poolings round sizes up like Caffe: with floor the map would be 6x6 and the region rows shift.

    Args:
        in_channels: channels of the frames (BGR, minus the ImageNet mean, in the reference).
        bn_momentum: weight of the newest batch in the running statistics; Caffe's moving average
            corresponds to 1e-3, which is too slow for short or from-scratch runs.
        weights: safetensors file with a converted state dict (`tools.convert_caffe`), or None.
    """

    channels = 1024
    pool2_channels = 192
    tap_channels: tuple[int, ...] = (576, 1024)

    def __init__(
        self, in_channels: int = 3, bn_momentum: float = 0.1, weights: str | None = None
    ) -> None:
        super().__init__()
        self.conv1 = ConvBN(in_channels, 64, 7, 2, bn_momentum)
        self.conv2_reduce = ConvBN(64, 64, 1, 1, bn_momentum)
        self.conv2 = ConvBN(64, 192, 3, 1, bn_momentum)
        self.blocks = nn.ModuleDict()
        width = self.pool2_channels
        for name, widths in BLOCKS.items():
            block = Inception(width, widths, bn_momentum)
            self.blocks[name] = block
            width = block.channels
        if weights is not None:
            load_trunk(self, weights)

    def forward(self, image_BCHW: Tensor) -> TrunkOutput:
        """Map (B, 1024, H/32, W/32), pool2 (B, 192, H/8, W/8), and the two taps."""
        x = F.max_pool2d(self.conv1(image_BCHW), 3, 2, ceil_mode=True)
        x = self.conv2(self.conv2_reduce(x))
        pool2_BCHW = F.max_pool2d(x, 3, 2, ceil_mode=True)
        x, taps = pool2_BCHW, []
        for name, block in self.blocks.items():
            x = block(x)
            if name in TAPS:
                taps.append(x)
        return TrunkOutput(x, pool2_BCHW, tuple(taps))
