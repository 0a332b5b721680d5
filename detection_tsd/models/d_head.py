"""D_head: one extractor for the classes and one for the boxes.

Letters: R RoIs, W width of a layer, K class scores with the background at column 0.
"""

from typing import Any

from torch import Tensor

from detection_tsd.models.prediction import Prediction
from detection_tsd.models.sibling_head import BoxHead, Predictor, TwoFC, joint_linear
from detection_tsd.ops.pyramid import Pyramid


class DHead(BoxHead):
    """Two extractors of two layers, one for each task (arXiv 2003.07540, table 1).

    On an ordinary backbone both read the same pooled features (D_head); on a split one each pools
    from the pyramid of its task (D_s8, D_s16, D_s32). 28,206,485 parameters for 80 classes.
    """

    def __init__(self, num_classes: int, width: int = 1024, **common: Any):
        """Build the head.

        Args:
            num_classes: foreground classes.
            width: units of all layers.
            common: see `BoxHead`.
        """
        super().__init__(num_classes, **common)
        self.cls_head = TwoFC(self.inputs, width)
        self.box_head = TwoFC(self.inputs, width)
        self.box_predictor = Predictor(width, num_classes)

    def forward(self, cls: Pyramid, reg: Pyramid, roi_R5: Tensor) -> Prediction:
        logits_RK, delta_RK4 = self.box_predictor(*self._features(cls, reg, roi_R5))
        return Prediction(logits_RK, delta_RK4, roi_R5[:, 1:])

    def _features(self, cls: Pyramid, reg: Pyramid, roi_R5: Tensor) -> tuple[Tensor, Tensor]:
        level_R = self.levels(cls, roi_R5)
        x_RI = self.pool(cls, roi_R5, level_R).flatten(1)
        if cls is reg and self.training:
            cls_RW, box_RW = joint_linear(x_RI, self.cls_head.fc6, self.box_head.fc6)
            return self.cls_head.after_first(cls_RW), self.box_head.after_first(box_RW)
        x_reg_RI = x_RI if cls is reg else self.pool(reg, roi_R5, level_R).flatten(1)
        return self.cls_head(x_RI), self.box_head(x_reg_RI)
