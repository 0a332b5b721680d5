"""What a box head says about regions.

Letters: R RoIs, K class scores with the background at column 0, P bins per side, 4 box (xyxy).
"""

from typing import NamedTuple

from torch import Tensor


class Prediction(NamedTuple):
    """Scores and boxes of R regions, from the branch that the test uses.

    Attributes:
        logits_RK: class scores before the softmax.
        delta_RK4: box deltas of each class, relative to `box_R4`; the background's are unused.
        box_R4: float32, network-input pixels: the RoI itself, or the shifted RoI P_r
            (arXiv 2003.07540, equation 3), which the gradient reaches the shift through.
        offset_c: raw shifts of the bins for the classification, (R, 2, P, P) or (R, 2, 1, 1),
            channel 0 = x; None when the head does not shift.
        offset_r: the same for the regression.
    """

    logits_RK: Tensor
    delta_RK4: Tensor
    box_R4: Tensor
    offset_c: Tensor | None = None
    offset_r: Tensor | None = None
