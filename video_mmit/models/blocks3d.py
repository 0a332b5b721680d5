"""Residual networks on clips: the block, and the network that R(2+1)D and R3D share.

Depths, strides, shortcuts and first weights as in X-Temporal.

Letters: N videos, T frame positions, C channels, H W size, D feature width, K classes.
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from video_mmit.models.clip_shape import check_clip

# Blocks of the four stages; from 50 on they are bottlenecks.
DEPTHS = {
    10: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}
EXPANSION = 4  # of a bottleneck
Insert = Callable[[nn.Module, int | None], None]  # puts modules into a network, in place
Convolution = Callable[[int, int, int], nn.Module]  # (inputs, outputs, stride), kernel 3x3x3


class Block3D(nn.Module):
    """Convolutions `conv1`, `conv2`, ... with batch norms, and a shortcut around all of them.

    Args:
        convs: modules with `out_channels`: two make a basic block, three a bottleneck.
        downsample: module on the shortcut; None is the identity.
    """

    def __init__(self, convs: Sequence[nn.Module], downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.count = len(convs)
        for number, conv in enumerate(convs, start=1):
            self.add_module(f"conv{number}", conv)
            self.add_module(f"bn{number}", nn.BatchNorm3d(int(conv.out_channels)))  # type: ignore[arg-type]
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x_NCTHW: Tensor) -> Tensor:
        """Maps (N, C, T, H, W)."""
        shortcut = x_NCTHW if self.downsample is None else self.downsample(x_NCTHW)
        x = x_NCTHW
        for number in range(1, self.count + 1):
            x = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(x))
            x = self.relu(x) if number < self.count else x
        return self.relu(x + shortcut)


def shortcut(inputs: int, outputs: int, stride: tuple[int, int, int]) -> nn.Module | None:
    """A 1x1x1 convolution with batch norm where the block changes the shape, else None."""
    if inputs == outputs and stride == (1, 1, 1):
        return None
    return nn.Sequential(nn.Conv3d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm3d(outputs))


def init_convolutions(net: nn.Module) -> None:
    """Kaiming-normal convolutions by fan-out."""
    for module in net.modules():
        if isinstance(module, nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class ClipResNet(nn.Module):
    """Clip (N, T, C, H, W) -> logits (N, K) through a stem and four stages of 3D blocks.

    Stages two to four halve time and size. Pools are adaptive: any T, H and W.

    Args:
        stem: convolution from the input to 64 channels.
        pool: after the stem.
        conv: builds the 3x3x3 convolutions of the blocks.
        num_classes: K.
        depth: a key of `DEPTHS`.
        dropout: of the pooled features.
        non_local: inserts non-local blocks.
        in_channels: C.

    Raises:
        ValueError: an unknown depth or no class.
    """

    num_segments = None  # any T

    def __init__(
        self,
        stem: nn.Module,
        pool: nn.Module,
        conv: Convolution,
        num_classes: int,
        depth: int,
        dropout: float,
        non_local: Insert | None,
        in_channels: int,
    ) -> None:
        super().__init__()
        check_arguments(num_classes, depth, tuple(DEPTHS))
        self.in_channels = in_channels
        self.conv1, self.bn1, self.relu, self.maxpool = (
            stem,
            nn.BatchNorm3d(64),
            nn.ReLU(True),
            pool,
        )
        inputs = 64
        for number, blocks in enumerate(DEPTHS[depth]):
            made = []
            for index in range(blocks):
                stride = 2 if number > 0 and index == 0 else 1
                made.append(_block(inputs, 64 << number, stride, depth >= 50, conv))
                inputs = (64 << number) * (EXPANSION if depth >= 50 else 1)
            self.add_module(f"layer{number + 1}", nn.Sequential(*made))
        self.avgpool, self.dropout = nn.AdaptiveAvgPool3d(1), nn.Dropout(dropout)
        self.head = nn.Linear(inputs, num_classes)
        init_convolutions(self)
        if non_local is not None:
            non_local(self, None)

    def forward(self, x_NTCHW: Tensor) -> Tensor:
        """Logits (N, K) of a clip (N, T, C, H, W) of floats.

        Raises:
            ValueError: not five dimensions, or another C.
        """
        check_clip(x_NTCHW, self.in_channels)
        x = self.maxpool(self.relu(self.bn1(self.conv1(x_NTCHW.transpose(1, 2)))))
        for name in ("layer1", "layer2", "layer3", "layer4"):
            x = getattr(self, name)(x)
        return self.head(self.dropout(self.avgpool(x).flatten(1)))


def check_arguments(num_classes: int, depth: int, depths: Sequence[int]) -> None:
    """Raise ValueError unless there is a class and the depth is one of `depths`."""
    if depth not in depths:
        raise ValueError(f"depth={depth}: need one of {tuple(depths)}")
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes}: need at least 1")


def _block(inputs: int, planes: int, stride: int, bottleneck: bool, conv: Convolution) -> Block3D:
    if not bottleneck:
        convs = [conv(inputs, planes, stride), conv(planes, planes, 1)]
        return Block3D(convs, shortcut(inputs, planes, (stride,) * 3))
    outputs = planes * EXPANSION
    first = nn.Conv3d(inputs, planes, 1, bias=False)
    last = nn.Conv3d(planes, outputs, 1, bias=False)
    convs = [first, conv(planes, planes, stride), last]
    return Block3D(convs, shortcut(inputs, outputs, (stride,) * 3))
