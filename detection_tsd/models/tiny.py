"""Six convolutions and a pyramid of two maps, for small pictures and tests.

Letters: B images, C channels, H W size.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from detection_tsd.models.fpn import PyramidBackbone, Trunk
from detection_tsd.models.norm import convolve


class _Block(nn.Module):
    """3x3 convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.relu(convolve(x_BCHW, self.conv, self.bn))


class TinyTrunk(Trunk):
    """One convolution to stride 2, two to stride 4, three to stride 8; batch norm and ReLU each.

    Args:
        channels: widths at strides 2, 4 and 8.
        norm: "batch", "sync" or "frozen".
        frozen_stages: see `Trunk`.

    Raises:
        ValueError: an argument that is not accepted.
    """

    def __init__(
        self,
        channels: Sequence[int] = (16, 32, 48),
        norm: str = "batch",
        frozen_stages: int = -1,
    ) -> None:
        super().__init__(frozen_stages)
        if len(channels) != 3 or min(channels) < 1:
            raise ValueError(f"channels={list(channels)}: need three positive widths")
        first, second, third = channels
        self.stem = _Block(3, first, stride=2)
        self.layer1 = nn.Sequential(_Block(first, second, stride=2), _Block(second, second, 1))
        self.layer2 = nn.Sequential(
            _Block(second, third, stride=2), _Block(third, third, 1), _Block(third, third, 1)
        )
        self.widths = (second, third)
        self.finish(norm)

    def run_stem(self, x_BCHW: Tensor) -> Tensor:
        """Map of stride 2."""
        return self.stem(x_BCHW)

    def stages(self) -> list[Sequence[nn.Module]]:
        """Blocks of strides 4 and 8."""
        return [list(self.layer1), list(self.layer2)]


class TinyFPN(PyramidBackbone):
    """`TinyTrunk` under a pyramid of strides 4 and 8, both for RoIs.

    Args:
        channels: widths of the trunk at strides 2, 4 and 8.
        out: width of the pyramid.
        norm: "batch", "sync" or "frozen".
        frozen_stages: see `Trunk`.
    """

    def __init__(
        self,
        channels: Sequence[int] = (16, 32, 48),
        out: int = 32,
        norm: str = "batch",
        frozen_stages: int = -1,
    ) -> None:
        body = TinyTrunk(channels, norm, frozen_stages)
        super().__init__(body, out, strides=(4, 8), extra=False)
