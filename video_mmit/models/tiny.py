"""Small frame backbone for the synthetic tasks and for tests.

Letters: B frames, C channels, H W size, D feature width.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock


class TinyNet(nn.Module):
    """Frames (B, C, H, W) -> features (B, D): a 5x5 stem and one residual block per width.

    The stages are `layer1`, `layer2`, ... as in `ResNet`, so temporal modules go in alike.

    Args:
        widths: channels of the blocks; the stem has the first. The map is halved before every
            block but the first.
        stem_stride: stride of the stem.
        in_channels: channels of a frame.
    """

    def __init__(
        self, widths: Sequence[int] = (16, 32, 64), stem_stride: int = 2, in_channels: int = 3
    ) -> None:
        super().__init__()
        if len(widths) < 1 or min(widths) < 1:
            raise ValueError(f"widths={list(widths)}: need at least one positive width")
        if stem_stride < 1 or in_channels < 1:
            raise ValueError(f"stem_stride={stem_stride}, in_channels={in_channels}: need >= 1")
        self.in_channels, self.out_features = in_channels, int(widths[-1])
        self.conv1 = nn.Conv2d(in_channels, widths[0], 5, stem_stride, padding=2, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.stages = [f"layer{number + 1}" for number in range(len(widths))]
        for name, before, width in zip(self.stages, [widths[0], *widths], widths, strict=False):
            self.add_module(name, nn.Sequential(_block(before, width, 1 + (name != "layer1"))))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Features (B, D) of frames."""
        x = self.relu(self.bn1(self.conv1(x_BCHW)))
        for name in self.stages:
            x = getattr(self, name)(x)
        return x.mean(dim=(2, 3))


def _block(before: int, width: int, stride: int) -> BasicBlock:
    if stride == 1 and before == width:
        return BasicBlock(before, width)
    shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))
    return BasicBlock(before, width, stride, shortcut)
