"""The sibling head behind deformable RoI pooling: bins move, but both tasks share them.

Letters: R RoIs, W width of a layer, K class scores with the background at column 0.
"""

from typing import Any

from torch import Tensor, nn

from detection_tsd.losses import full
from detection_tsd.models.prediction import Prediction
from detection_tsd.models.sibling_head import Predictor, TwoFC, linear, only
from detection_tsd.models.tsd_head import DeformHead
from detection_tsd.ops.pyramid import Pyramid


class DeformPoolHead(DeformHead):
    """Deformable RoI pooling (arXiv 1703.06211, section 2.2) in front of a sibling head.

    Three layers predict the shifts of the bins from unshifted pooling; the last starts at zero. It
    is the control that tells bins that move from bins of their own for each task. 28,306,935
    parameters for 80 classes. Boxes are relative to the RoI.
    """

    def __init__(
        self, num_classes: int, width: int = 1024, offset_width: int = 1024, **common: Any
    ):
        """Build the head.

        Args:
            num_classes: foreground classes.
            width: units of the extractor.
            offset_width: units of the two hidden layers that predict the shifts.
            common: see `DeformHead` and `BoxHead`.
        """
        super().__init__(num_classes, **common)
        last = nn.Linear(offset_width, 2 * self.size * self.size)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.offset = nn.Sequential(
            linear(self.inputs, offset_width), nn.ReLU(),
            linear(offset_width, offset_width), nn.ReLU(),
            last, nn.Unflatten(1, (2, self.size, self.size)),
        )  # fmt: skip
        self.box_head = TwoFC(self.inputs, width)
        self.box_predictor = Predictor(width, num_classes)

    def forward(self, cls: Pyramid, reg: Pyramid, roi_R5: Tensor) -> Prediction:
        pyramid = only(cls, reg, type(self).__name__)
        level_R = self.levels(pyramid, roi_R5)
        offset = full(self.offset(self.pool_shifted(pyramid, roi_R5, level_R, None)))
        x_RW = self.box_head(self.pool_shifted(pyramid, roi_R5, level_R, offset))
        logits_RK, delta_RK4 = self.box_predictor(x_RW, x_RW)
        return Prediction(logits_RK, delta_RK4, roi_R5[:, 1:], offset, offset)
