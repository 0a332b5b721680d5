"""R(2+1)D: 3D convolutions split into a spatial and a temporal one (arXiv 1711.11248).

Widths as in X-Temporal: every convolution has the middle width of its own sizes. (torchvision
computes one for both convolutions of a block, so its network has fewer parameters.)

Letters: N videos, T frame positions, C channels, M middle channels, H W size, K classes.
"""

from torch import Tensor, nn

from video_mmit.models.blocks3d import ClipResNet, Insert


class SplitConv(nn.Module):
    """A t x k x k convolution as 1 x k x k to M channels, batch norm, ReLU, t x 1 x 1.

    M keeps the number of weights: M = floor(t k k C_in C_out / (k k C_in + t C_out)).

    Args:
        inputs: C_in.
        outputs: C_out.
        kernel: t and k, odd.
        stride: in time and in space.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: tuple[int, int], stride: tuple[int, int]
    ) -> None:
        super().__init__()
        t, k = kernel
        middle = (t * k * k * inputs * outputs) // (k * k * inputs + t * outputs)
        self.out_channels = outputs
        self.spatial = nn.Conv3d(
            inputs, middle, (1, k, k), (1, stride[1], stride[1]), (0, k // 2, k // 2), bias=False
        )
        self.bn = nn.BatchNorm3d(middle)
        self.relu = nn.ReLU(inplace=True)
        self.temporal = nn.Conv3d(
            middle, outputs, (t, 1, 1), (stride[0], 1, 1), (t // 2, 0, 0), bias=False
        )

    def forward(self, x_NCTHW: Tensor) -> Tensor:
        """Maps (N, C_out, T', H', W')."""
        return self.temporal(self.relu(self.bn(self.spatial(x_NCTHW))))


class R2Plus1D(ClipResNet):
    """Clip (N, T, C, H, W) -> logits (N, K).

    Args:
        num_classes: K.
        depth: 10, 18, 34 (basic blocks), 50, 101, 152 or 200 (bottlenecks).
        max_pool: a 1x3x3 maximum with stride (1, 2, 2) after the stem.
        dropout: of the pooled features.
        non_local: inserts non-local blocks: `(network, None) -> None`.
        in_channels: C.
    """

    def __init__(
        self,
        num_classes: int,
        depth: int = 18,
        max_pool: bool = True,
        dropout: float = 0.0,
        non_local: Insert | None = None,
        in_channels: int = 3,
    ) -> None:
        stem = SplitConv(in_channels, 64, (3, 7), (1, 2))
        pool = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)) if max_pool else nn.Identity()
        super().__init__(stem, pool, _conv, num_classes, depth, dropout, non_local, in_channels)


def _conv(inputs: int, outputs: int, stride: int) -> nn.Module:
    return SplitConv(inputs, outputs, (3, 3), (stride, stride))
