"""R3D: residual networks of full 3D convolutions (arXiv 1711.09577), as in X-Temporal."""

from torch import nn

from video_mmit.models.blocks3d import ClipResNet, Insert


class R3D(ClipResNet):
    """Clip (N, T, C, H, W) -> logits (N, K); 7x7x7 stem, then a 3x3x3 maximum with stride 2.

    Args:
        num_classes: K.
        depth: 10, 18, 34 (basic blocks), 50, 101, 152 or 200 (bottlenecks).
        dropout: of the pooled features.
        non_local: inserts non-local blocks: `(network, None) -> None`.
        in_channels: C.
    """

    def __init__(
        self,
        num_classes: int,
        depth: int = 18,
        dropout: float = 0.0,
        non_local: Insert | None = None,
        in_channels: int = 3,
    ) -> None:
        stem = nn.Conv3d(in_channels, 64, 7, (1, 2, 2), padding=3, bias=False)
        pool = nn.MaxPool3d(3, 2, padding=1)
        super().__init__(stem, pool, _conv, num_classes, depth, dropout, non_local, in_channels)


def _conv(inputs: int, outputs: int, stride: int) -> nn.Module:
    return nn.Conv3d(inputs, outputs, 3, stride, padding=1, bias=False)
