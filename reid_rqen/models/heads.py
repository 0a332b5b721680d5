"""Classifiers on frames, used in training only.

Letters: B frames, C channels, H W map size, K training identities.
"""

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


def fan_in_uniform_(weight: Tensor) -> Tensor:
    """Caffe's "xavier" filler in place: uniform with variance 1 / fan_in (not the Glorot mean)."""
    bound = math.sqrt(3.0 / (weight.numel() / len(weight)))
    return nn.init.uniform_(weight, -bound, bound)


def classifier(channels: int, num_classes: int) -> nn.Linear:
    """Linear identity classifier with Caffe's init and zero bias.

    Raises:
        ValueError: fewer than one class.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes}: need at least 1 training identity")
    layer = nn.Linear(channels, num_classes)
    fan_in_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class AuxiliaryHead(nn.Module):
    """Classifier on an inner map: average 5x5/3, 1x1 conv to 128, linear to 1024, classifier.

    The last pooling window may overhang the map; it is clipped and divides by what is left.

    Args:
        channels: of the tapped map.
        num_classes: K.
        grid: rows and columns after the pooling; for 224x224 frames (4, 4) on the 14x14 tap and
            (2, 2) on the 7x7 tap of GoogLeNet-BN.
        bn_momentum: weight of the newest batch in the running statistics.
    """

    def __init__(
        self, channels: int, num_classes: int, grid: Sequence[int], bn_momentum: float = 0.1
    ) -> None:
        super().__init__()
        self.grid = (grid[0], grid[1])
        self.conv = nn.Conv2d(channels, 128, 1, bias=False)
        self.conv_bn = nn.BatchNorm2d(128, momentum=bn_momentum)
        self.fc = nn.Linear(128 * self.grid[0] * self.grid[1], 1024, bias=False)
        self.fc_bn = nn.BatchNorm1d(1024, momentum=bn_momentum)
        self.classifier = classifier(1024, num_classes)
        fan_in_uniform_(self.conv.weight)
        fan_in_uniform_(self.fc.weight)

    def forward(self, tap_BCHW: Tensor) -> Tensor:
        """Logits (B, K).

        Raises:
            ValueError: the map does not pool to `grid`, or is too small to pool.
        """
        if min(tap_BCHW.shape[2:]) < 3:
            raise ValueError(
                f"auxiliary head got a map of {list(tap_BCHW.shape[2:])}, need at least 3x3: "
                "larger frames, or auxiliary=False"
            )
        x = F.avg_pool2d(tap_BCHW, 5, stride=3, ceil_mode=True)
        if tuple(x.shape[2:]) != self.grid:
            raise ValueError(
                f"auxiliary head built with grid={list(self.grid)} got a map that pools to "
                f"{list(x.shape[2:])}: set aux_grids for this frame size"
            )
        x = F.relu(self.conv_bn(self.conv(x)))
        x = F.relu(self.fc_bn(self.fc(x.flatten(1))))
        return self.classifier(x)
