"""The ordinary two-layer box head, and the parts that every box head is made of.

Letters: R RoIs, I flat pooled features (C * P * P), W width of a layer, K class scores with the
background at column 0, 5 RoI (image index, x1, y1, x2, y2).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detection_tsd import boxes, losses
from detection_tsd.losses import Rows
from detection_tsd.matching import Sampled
from detection_tsd.models.prediction import Prediction
from detection_tsd.ops.levels import roi_levels
from detection_tsd.ops.pyramid import Pyramid
from detection_tsd.ops.roi_align import roi_align

POOLINGS = ("aligned", "torchvision", "mmdet_v1")
INITS = ("normal", "uniform")


class TwoFC(nn.Module):
    """Extractor of two layers, (R, I) to (R, W); keys as torchvision's `TwoMLPHead`.

    13,895,680 parameters for 256 channels, 7 bins per side and 1024 units.
    """

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.fc6 = linear(inputs, width)
        self.fc7 = linear(width, width)

    def forward(self, x_RI: Tensor) -> Tensor:
        return self.after_first(self.fc6(x_RI))

    def after_first(self, y_RW: Tensor) -> Tensor:
        """The rest, given what `fc6` says."""
        return F.relu(self.fc7(F.relu(y_RW)))


class Predictor(nn.Module):
    """Class scores and the box deltas of each class; keys as torchvision's `FastRCNNPredictor`.

    83,025 + 332,100 parameters for 1024 units and 80 classes.
    """

    def __init__(self, width: int, num_classes: int, init: str = "normal"):
        """Build the two layers.

        Args:
            width: of the features.
            num_classes: foreground classes.
            init: "normal" draws the weights from N(0, 0.01) and N(0, 0.001) with biases 0;
                "uniform" keeps PyTorch's initial values, which the layers of the disentangled
                branch have in Sense-X/TSD.
        """
        super().__init__()
        if init not in INITS:
            raise ValueError(f"init={init!r}: need one of {INITS}")
        self.classes = num_classes + 1
        self.cls_score = nn.Linear(width, self.classes)
        self.bbox_pred = nn.Linear(width, 4 * self.classes)
        if init == "normal":
            for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
                nn.init.normal_(layer.weight, std=std)
                nn.init.zeros_(layer.bias)

    def forward(self, cls_RW: Tensor, box_RW: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (R, K) of the one feature and deltas (R, K, 4) of the other."""
        return self.cls_score(cls_RW), self.bbox_pred(box_RW).unflatten(1, (self.classes, 4))


class BoxHead(nn.Module):
    """What all box heads share: pooling, the box coder, and the losses of one branch.

    A subclass defines `forward`.
    """

    def __init__(
        self,
        num_classes: int,
        channels: int = 256,
        size: int = 7,
        samples: int = 2,
        pooling: str = "aligned",
        stds: tuple[float, float, float, float] = boxes.STDS,
        plus: float = 0.0,
        loss_weights: tuple[float, float] = (1.0, 1.0),
        level_base: float = 56.0,
    ):
        """Settings of every head.

        Args:
            num_classes: foreground classes; scores have one more column, the background at 0.
            channels: of the pyramid.
            size: bins per side, P.
            samples: per side of a bin, in RoIAlign.
            pooling: convention of RoIAlign: "aligned" (detectron2), "torchvision" (no half-pixel
                shift) or "mmdet_v1" (neither, and inclusive corners).
            stds: of the box deltas.
            plus: what a width has beyond x2 - x1: 1 for the inclusive pixels of mmdetection v1.
            loss_weights: of classification and box regression.
            level_base: side in pixels that an RoI of level 0 has in the middle, see `roi_levels`.

        Raises:
            ValueError: a setting that does not exist.
        """
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes}: need at least one foreground class")
        if pooling not in POOLINGS:
            raise ValueError(f"pooling={pooling!r}: need one of {POOLINGS}")
        if len(stds) != 4 or min(stds) <= 0:
            raise ValueError(f"stds={tuple(stds)}: need four positive numbers")
        self.num_classes, self.size, self.samples = num_classes, size, samples
        self.pooling, self.level_base, self.plus = pooling, level_base, plus
        self.stds: tuple[float, ...] = tuple(stds)
        self.loss_weights = tuple(loss_weights)
        self.channels, self.inputs = channels, channels * size * size

    def forward(self, cls: Pyramid, reg: Pyramid, roi_R5: Tensor) -> Prediction:
        """Scores and deltas of the RoIs, as the test uses them.

        Args:
            cls: feature maps for the classification.
            reg: feature maps for the boxes; the same object unless the backbone is split.
            roi_R5: float32, in network-input pixels; may be empty, in any order.

        Raises:
            ValueError: the head reads one pyramid and got two.
        """
        raise NotImplementedError

    def losses(
        self, cls: Pyramid, reg: Pyramid, sampled: Sampled
    ) -> tuple[dict[str, Tensor], Prediction]:
        """Losses of sampled RoIs, the same keys for any input, and what the test would predict."""
        prediction = self(cls, reg, sampled.roi_R5)
        rows = count_rows(sampled, cls)
        loss_cls, loss_box, _ = self.branch_losses(prediction, sampled, rows)
        return {"loss_cls": loss_cls, "loss_box": loss_box}, prediction

    def branch_losses(
        self, branch: Prediction, sampled: Sampled, rows: Rows
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted classification and box loss of a branch, and its cross entropies (R,)."""
        entropy_R = losses.cross_entropy_rows(branch.logits_RK, sampled.label_R)
        loss_box = losses.box_regression(
            losses.deltas_of(branch.delta_RK4, sampled.label_R),
            branch.box_R4, sampled.match_R4, rows, self.stds, self.plus,
        )  # fmt: skip
        loss_cls = losses.classification(entropy_R, rows)
        return loss_cls * self.loss_weights[0], loss_box * self.loss_weights[1], entropy_R

    def levels(self, pyramid: Pyramid, roi_R5: Tensor) -> Tensor:
        """Pyramid level of each RoI, int64 (R,)."""
        return roi_levels(roi_R5, len(pyramid.maps), self.level_base, self.plus)

    def pool(self, pyramid: Pyramid, roi_R5: Tensor, level_R: Tensor) -> Tensor:
        """RoIAlign (R, C, P, P), float32 inside autocast: coordinates do not fit into half."""
        with torch.autocast(roi_R5.device.type, enabled=False):
            return roi_align(
                pyramid, roi_R5, level_R, size=self.size, samples=self.samples, mode=self.pooling
            )


class SiblingHead(BoxHead):
    """Head of Faster R-CNN with FPN: two shared layers, then scores and deltas from one feature.

    14,310,805 parameters for 80 classes; `width` makes it as large as another head, as a control.
    """

    def __init__(self, num_classes: int, width: int = 1024, **common: Any):
        """Build the head.

        Args:
            num_classes: foreground classes.
            width: units of both layers.
            common: see `BoxHead`.
        """
        super().__init__(num_classes, **common)
        self.box_head = TwoFC(self.inputs, width)
        self.box_predictor = Predictor(width, num_classes)

    def forward(self, cls: Pyramid, reg: Pyramid, roi_R5: Tensor) -> Prediction:
        pyramid = only(cls, reg, type(self).__name__)
        x_RW = self.box_head(self.pool(pyramid, roi_R5, self.levels(pyramid, roi_R5)).flatten(1))
        logits_RK, delta_RK4 = self.box_predictor(x_RW, x_RW)
        return Prediction(logits_RK, delta_RK4, roi_R5[:, 1:])


def only(cls: Pyramid, reg: Pyramid, head: str) -> Pyramid:
    """The pyramid of a backbone that is not split.

    Raises:
        ValueError: there are two: which one the head's shared features come from is not defined.
    """
    if cls is not reg:
        raise ValueError(f"{head} pools shared features: it needs a backbone that is not split")
    return cls


def count_rows(sampled: Sampled, pyramid: Pyramid) -> Rows:
    """`losses.count_rows` of a sample."""
    image_R = sampled.roi_R5[:, 0]
    return losses.count_rows(sampled.label_R, sampled.weight_R, image_R, pyramid.batch)


def linear(inputs: int, outputs: int) -> nn.Linear:
    """Layer with weights from N(0, 1 / inputs) and zero bias (`kaiming_normal_` with a = 1)."""
    layer = nn.Linear(inputs, outputs)
    nn.init.kaiming_normal_(layer.weight, a=1)
    nn.init.zeros_(layer.bias)
    return layer


def joint_linear(x_RI: Tensor, first: nn.Linear, second: nn.Linear) -> tuple[Tensor, Tensor]:
    """`first(x)` and `second(x)` by one product, which reads the large input once.

    The gradient of the input, the largest tensor of a head, is also one product then, instead of
    two and their sum.
    """
    weight = torch.cat((first.weight, second.weight))
    bias = torch.cat((first.bias, second.bias))
    y_RW, y_RV = F.linear(x_RI, weight, bias).split((first.out_features, second.out_features), 1)
    return y_RW, y_RV
