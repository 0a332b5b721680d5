"""Double-Head (arXiv 1904.06493): fully connected layers for the classes, convolutions for boxes.

Letters: R RoIs, B rows of a convolution, C channels, P bins per side, W width of a layer, K class
scores with the background at column 0, 4 box (xyxy), 5 RoI (image index, x1, y1, x2, y2).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detection_tsd import boxes
from detection_tsd.matching import Sampled
from detection_tsd.models.norm import convolve
from detection_tsd.models.normalise import ranks
from detection_tsd.models.prediction import Prediction
from detection_tsd.models.sibling_head import BoxHead, Predictor, TwoFC, count_rows
from detection_tsd.ops.pyramid import Pyramid


class UpBlock(nn.Module):
    """Residual block that widens: 3 x 3 and 1 x 1, beside a 1 x 1; batch norm after each."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.conv1, self.bn1 = _conv(channels, channels, 3), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = _conv(channels, width, 1), nn.BatchNorm2d(width)
        self.conv_identity, self.bn_identity = _conv(channels, width, 1), nn.BatchNorm2d(width)

    def forward(self, x_BCPP: Tensor) -> Tensor:
        y_BCPP = F.relu(convolve(x_BCPP, self.conv1, self.bn1))
        y_BCPP = convolve(y_BCPP, self.conv2, self.bn2)
        return F.relu(y_BCPP + convolve(x_BCPP, self.conv_identity, self.bn_identity))


class Bottleneck(nn.Module):
    """Residual block of ResNet: 1 x 1 to a quarter of the width, 3 x 3, 1 x 1."""

    def __init__(self, width: int):
        super().__init__()
        inner = width // 4
        self.conv1, self.bn1 = _conv(width, inner, 1), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = _conv(inner, inner, 3), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = _conv(inner, width, 1), nn.BatchNorm2d(width)

    def forward(self, x_BCPP: Tensor) -> Tensor:
        y_BCPP = F.relu(convolve(x_BCPP, self.conv1, self.bn1))
        y_BCPP = F.relu(convolve(y_BCPP, self.conv2, self.bn2))
        return F.relu(x_BCPP + convolve(y_BCPP, self.conv3, self.bn3))


class ConvBranch(nn.Module):
    """Pooled features (R, C, P, P) to (R, W): widening block, bottlenecks, mean over the bins.

    5,587,456 parameters for 256 channels, 1024 units and 4 bottlenecks.
    """

    def __init__(self, channels: int, width: int, blocks: int):
        super().__init__()
        self.width = width
        self.up = UpBlock(channels, width)
        self.blocks = nn.Sequential(*[Bottleneck(width) for _ in range(blocks)])

    def forward(self, x_BCPP: Tensor) -> Tensor:
        if not len(x_BCPP) and self._would_spoil_statistics():
            nothing = sum(parameter.sum() for parameter in self.parameters()) * 0.0
            return x_BCPP.new_zeros(0, self.width) + nothing
        x_BCPP = x_BCPP.contiguous(memory_format=torch.channels_last)
        return self.blocks(self.up(x_BCPP)).mean(dim=(2, 3))

    def _would_spoil_statistics(self) -> bool:
        """Whether a live norm would take the mean of nothing, which other ranks do not supply."""
        norm = self.up.bn1
        return norm.training and (type(norm) is nn.BatchNorm2d or ranks() == 1)


class DoubleHead(BoxHead):
    """Two branches: two layers for the classes, a convolutional one for the boxes.

    Widths and depths as in mmdetection. On a split backbone each branch pools from its own
    pyramid. 19,898,261 parameters for 80 classes.
    """

    def __init__(
        self,
        num_classes: int,
        width: int = 1024,
        blocks: int = 4,
        enlarge: float = 1.3,
        loss_weights: tuple[float, float] = (2.0, 2.0),
        **common: Any,
    ):
        """Build the head.

        Args:
            num_classes: foreground classes.
            width: units of the layers and channels of the convolutions; a multiple of 4.
            blocks: bottlenecks.
            enlarge: the convolutional branch pools from the RoI scaled by this about its centre,
                on the level of the RoI itself. Not in the paper; mmdetection has 1.3.
            loss_weights: of classification and box regression.
            common: see `BoxHead`.

        Raises:
            ValueError: a width that has no quarter, no bottleneck, or a scale that is not positive.
        """
        super().__init__(num_classes, loss_weights=loss_weights, **common)
        if width < 4 or width % 4 or blocks < 1 or enlarge <= 0:
            raise ValueError(
                f"width={width}, blocks={blocks}, enlarge={enlarge}: need a multiple of 4, "
                "at least one block and a positive scale"
            )
        self.enlarge = enlarge
        self.cls_head = TwoFC(self.inputs, width)
        self.box_head = ConvBranch(self.channels, width, blocks)
        self.box_predictor = Predictor(width, num_classes)

    def forward(self, cls: Pyramid, reg: Pyramid, roi_R5: Tensor) -> Prediction:
        return self._predict(cls, reg, roi_R5, None)

    def losses(
        self, cls: Pyramid, reg: Pyramid, sampled: Sampled
    ) -> tuple[dict[str, Tensor], Prediction]:
        """See `BoxHead.losses`.

        Batch norm must not see the padding, so its rows are left out of the convolutions: the host
        waits once for the device to know their number, and they have the feature 0.
        """
        real_B = sampled.weight_R.nonzero().squeeze(1)
        padded = len(real_B) < len(sampled.weight_R)
        prediction = self._predict(cls, reg, sampled.roi_R5, real_B if padded else None)
        loss_cls, loss_box, _ = self.branch_losses(prediction, sampled, count_rows(sampled, cls))
        return {"loss_cls": loss_cls, "loss_box": loss_box}, prediction

    def _predict(
        self, cls: Pyramid, reg: Pyramid, roi_R5: Tensor, rows_B: Tensor | None
    ) -> Prediction:
        level_R = self.levels(cls, roi_R5)
        cls_RW = self.cls_head(self.pool(cls, roi_R5, level_R).flatten(1))
        large_R5 = torch.cat((roi_R5[:, :1], scaled(roi_R5[:, 1:], self.enlarge, self.plus)), dim=1)
        if rows_B is not None:
            large_R5, level_R = large_R5[rows_B], level_R[rows_B]
        box_BW = self.box_head(self.pool(reg, large_R5, level_R))
        if rows_B is not None:
            box_BW = box_BW.new_zeros(len(roi_R5), box_BW.shape[1]).index_copy(0, rows_B, box_BW)
        logits_RK, delta_RK4 = self.box_predictor(cls_RW, box_BW)
        return Prediction(logits_RK, delta_RK4, roi_R5[:, 1:])


def scaled(box_R4: Tensor, factor: float, plus: float = 0.0) -> Tensor:
    """Boxes whose width and height are `factor` times as large, about the same centres."""
    grown_R2 = torch.stack(boxes.sizes(box_R4, plus), dim=-1) * (0.5 * (factor - 1.0))
    return torch.cat((box_R4[:, :2] - grown_R2, box_R4[:, 2:] + grown_R2), dim=1)


def _conv(inputs: int, outputs: int, side: int) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv
