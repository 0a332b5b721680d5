"""TSD: task-aware spatial disentanglement of the box head (arXiv 2003.07540, section 2).

The classification pools from bins that move one by one (P_c), the regression from the RoI moved as
a whole (P_r), each with its own extractor. An ordinary sibling head is trained beside them and
dropped at test time.

Letters: R RoIs, I flat pooled features (C * P * P), P bins per side, W width of a layer, K class
scores with the background at column 0, 2 (x, y), 4 box, 5 RoI (image index, x1, y1, x2, y2).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detection_tsd import boxes, losses
from detection_tsd.losses import Rows
from detection_tsd.matching import Sampled
from detection_tsd.models.prediction import Prediction
from detection_tsd.models.sibling_head import (
    BoxHead,
    Predictor,
    TwoFC,
    count_rows,
    joint_linear,
    linear,
    only,
)
from detection_tsd.ops.deform_pool import deform_pool
from detection_tsd.ops.pyramid import Pyramid

SHIFTS = ("point", "prop")
SAMPLERS = {"aligned": 2, "legacy": 4}  # samples per side of a bin, as their authors have it
OFFSET_INITS = ("kaiming", "zero", "normal001")


class DeformHead(BoxHead):
    """A box head with deformable RoI pooling."""

    def __init__(
        self,
        num_classes: int,
        gamma: float = 0.1,
        sampler: str = "aligned",
        shift_samples: int | None = None,
        **common: Any,
    ):
        """Settings of the pooling.

        Args:
            num_classes: foreground classes.
            gamma: a raw shift of 1 moves a bin by this share of the RoI's width or height.
            sampler: "aligned" (without a shift it is RoIAlign), or "legacy" (Sense-X/TSD).
            shift_samples: samples per side of a bin; None for the sampler's own, 2 or 4.
            common: see `BoxHead`.

        Raises:
            ValueError: a setting that does not exist.
        """
        super().__init__(num_classes, **common)
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler={sampler!r}: need one of {tuple(SAMPLERS)}")
        if gamma <= 0:
            raise ValueError(f"gamma={gamma}: need a positive number")
        self.gamma, self.sampler = gamma, sampler
        self.shift_samples = shift_samples or SAMPLERS[sampler]

    def pool_shifted(
        self, pyramid: Pyramid, roi_R5: Tensor, level_R: Tensor, offset: Tensor | None
    ) -> Tensor:
        """Flat deformable pooling (R, I) on the level of the RoI itself, float32 inside autocast.

        Args:
            pyramid: feature maps.
            roi_R5: the RoIs before any shift.
            level_R: their levels; a shifted bin has no box, so no level of its own.
            offset: raw network output (R, 2, P, P) or (R, 2, 1, 1), channel 0 = x; None for none.
        """
        with torch.autocast(roi_R5.device.type, enabled=False):
            return deform_pool(
                pyramid, roi_R5, level_R, offset, size=self.size, gamma=self.gamma,
                samples=self.shift_samples, sampler=self.sampler,
            ).flatten(1)  # fmt: skip


class Offsets(nn.Module):
    """F_c and F_r: three layers each, of which they share the first (arXiv 2003.07540, 2.2).

    3,211,520 + 90,978 + 66,306 parameters for 256 channels, 7 bins, 256 units, 49 shifts for the
    classification and one for the regression. The shifts are unbounded.
    """

    def __init__(self, inputs: int, width: int, cls_bins: int, reg_bins: int, init: str):
        super().__init__()
        if init not in OFFSET_INITS:
            raise ValueError(f"offset_init={init!r}: need one of {OFFSET_INITS}")
        self.shared = linear(inputs, width)
        self.cls = _shift_layers(width, cls_bins, init)
        self.reg = _shift_layers(width, reg_bins, init)

    def forward(self, x_RI: Tensor) -> tuple[Tensor, Tensor]:
        return self.after_first(self.shared(x_RI))

    def after_first(self, y_RW: Tensor) -> tuple[Tensor, Tensor]:
        """Shifts for the classification and for the regression, float32, given the first layer."""
        hidden_RW = F.relu(y_RW)
        return losses.full(self.cls(hidden_RW)), losses.full(self.reg(hidden_RW))


def _shift_layers(width: int, bins: int, init: str) -> nn.Sequential:
    last = linear(width, 2 * bins * bins)
    if init == "zero":
        nn.init.zeros_(last.weight)
    elif init == "normal001":
        nn.init.normal_(last.weight, std=0.01)
    return nn.Sequential(linear(width, width), nn.ReLU(), last, nn.Unflatten(1, (2, bins, bins)))


class Sibling(nn.Module):
    """Extractor and output layers of the auxiliary head; keys as `SiblingHead`'s."""

    def __init__(self, inputs: int, width: int, num_classes: int):
        super().__init__()
        self.box_head = TwoFC(inputs, width)
        self.box_predictor = Predictor(width, num_classes)


class TSDHead(DeformHead):
    """Disentangled head, trained beside a sibling head with the progressive constraint.

    31,575,289 parameters for 80 classes at inference, 45,886,094 with the sibling.
    """

    def __init__(
        self,
        num_classes: int,
        width: int = 1024,
        cls_shift: str = "point",
        reg_shift: str = "prop",
        joint: bool = True,
        margin_cls: float | None = 0.2,
        margin_box: float | None = 0.2,
        pc_mode: str = "repo",
        detach_delta_r_target: bool = False,
        offset_init: str = "kaiming",
        offset_width: int = 256,
        head_init: str = "uniform",
        **common: Any,
    ):
        """Build the head.

        Args:
            num_classes: foreground classes.
            width: units of the extractors.
            cls_shift: how the proposal of the classification is derived: "point" moves each bin,
                "prop" the whole RoI.
            reg_shift: the same for the boxes. With "prop" deltas are relative to the moved RoI P_r;
                with "point" there is no such box, and they are relative to the RoI.
            joint: train the sibling head as well; without it there are no sibling parameters.
            margin_cls: m_c of the progressive constraint; None for none.
            margin_box: m_r; None for none. The authors' ablations have 0.2 for both, their
                released configurations 0.3.
            pc_mode: form of the constraint, see `losses.progressive_rows`.
            detach_delta_r_target: treat P_r as a constant in the regression target and in the
                constraint, so that only the pooling trains the shift (simpledet).
            offset_init: last layers of the shifts: "kaiming" (Sense-X/TSD: shifts from the start),
                "zero", or "normal001" from N(0, 0.01).
            offset_width: units of the layers that predict the shifts.
            head_init: of the output layers of the disentangled branch, see `Predictor`.
            common: see `DeformHead` and `BoxHead`.

        Raises:
            ValueError: a setting that does not exist, or a constraint without the sibling head.
        """
        super().__init__(num_classes, **common)
        for name, shift in (("cls_shift", cls_shift), ("reg_shift", reg_shift)):
            if shift not in SHIFTS:
                raise ValueError(f"{name}={shift!r}: need one of {SHIFTS}")
        losses.check_progressive(margin_cls, pc_mode)
        losses.check_progressive(margin_box, pc_mode)
        if not joint and (margin_cls is not None or margin_box is not None):
            raise ValueError("joint=False: the progressive constraint needs the sibling head")
        self.reg_shift, self.detach_delta_r_target = reg_shift, detach_delta_r_target
        self.margin_cls, self.margin_box, self.pc_mode = margin_cls, margin_box, pc_mode
        bins = {"point": self.size, "prop": 1}
        self.offset = Offsets(
            self.inputs, offset_width, bins[cls_shift], bins[reg_shift], offset_init
        )
        self.cls_head = TwoFC(self.inputs, width)
        self.box_head = TwoFC(self.inputs, width)
        self.box_predictor = Predictor(width, num_classes, head_init)
        self.sibling = Sibling(self.inputs, width, num_classes) if joint else None

    def forward(self, cls: Pyramid, reg: Pyramid, roi_R5: Tensor) -> Prediction:
        """Prediction of the disentangled branch; the sibling does not run."""
        pyramid = only(cls, reg, type(self).__name__)
        level_R = self.levels(pyramid, roi_R5)
        offsets = self.offset(self.pool(pyramid, roi_R5, level_R).flatten(1))
        return self._disentangled(pyramid, roi_R5, level_R, *offsets)

    def losses(
        self, cls: Pyramid, reg: Pyramid, sampled: Sampled
    ) -> tuple[dict[str, Tensor], Prediction]:
        """Losses of both branches, and the prediction of the disentangled one.

        Returns:
            `loss_cls_tsd`, `loss_box_tsd`; with the sibling also `loss_cls`, `loss_box`; for each
            margin that is set also `loss_pc_cls`, `loss_pc_box`. Which keys there are depends on
            the settings only.
        """
        pyramid = only(cls, reg, type(self).__name__)
        sibling, branch = self._both(pyramid, sampled.roi_R5)
        rows = count_rows(sampled, pyramid)
        trained = branch
        if self.detach_delta_r_target:
            trained = branch._replace(box_R4=branch.box_R4.detach())
        loss_cls, loss_box, entropy_R = self.branch_losses(trained, sampled, rows)
        found = {"loss_cls_tsd": loss_cls, "loss_box_tsd": loss_box}
        if sibling is None:
            return found, branch
        loss_cls, loss_box, sibling_R = self.branch_losses(sibling, sampled, rows)
        found |= {"loss_cls": loss_cls, "loss_box": loss_box}
        if self.margin_cls is not None:
            found["loss_pc_cls"] = losses.progressive_classification(
                sibling_R, entropy_R, rows, self.margin_cls, self.pc_mode
            )
        if self.margin_box is not None:
            found["loss_pc_box"] = losses.progressive_box(
                self._overlap(sibling, sampled, rows), self._overlap(trained, sampled, rows),
                rows, self.margin_box, self.pc_mode,
            )  # fmt: skip
        return found, branch

    def _overlap(self, branch: Prediction, sampled: Sampled, rows: Rows) -> Tensor:
        """IoU of the box of the true class with the ground truth of the RoI, (R,)."""
        return losses.overlap_rows(
            losses.deltas_of(branch.delta_RK4, sampled.label_R),
            branch.box_R4, sampled.match_R4, rows, self.stds, self.plus,
        )  # fmt: skip

    def _both(self, pyramid: Pyramid, roi_R5: Tensor) -> tuple[Prediction | None, Prediction]:
        """Prediction of the sibling, if there is one, and of the disentangled branch."""
        if self.sibling is None:
            return None, self(pyramid, pyramid, roi_R5)
        level_R = self.levels(pyramid, roi_R5)
        x_RI = self.pool(pyramid, roi_R5, level_R).flatten(1)
        y_RW, hidden = joint_linear(x_RI, self.sibling.box_head.fc6, self.offset.shared)
        y_RW = self.sibling.box_head.after_first(y_RW)
        logits_RK, delta_RK4 = self.sibling.box_predictor(y_RW, y_RW)
        sibling = Prediction(logits_RK, delta_RK4, roi_R5[:, 1:])
        offsets = self.offset.after_first(hidden)
        return sibling, self._disentangled(pyramid, roi_R5, level_R, *offsets)

    def _disentangled(
        self, pyramid: Pyramid, roi_R5: Tensor, level_R: Tensor, offset_c: Tensor, offset_r: Tensor
    ) -> Prediction:
        cls_RW = self.cls_head(self.pool_shifted(pyramid, roi_R5, level_R, offset_c))
        box_RW = self.box_head(self.pool_shifted(pyramid, roi_R5, level_R, offset_r))
        box_R4 = roi_R5[:, 1:]
        if self.reg_shift == "prop":
            box_R4 = translate(box_R4, offset_r[:, :, 0, 0], self.gamma, self.plus)
        logits_RK, delta_RK4 = self.box_predictor(cls_RW, box_RW)
        return Prediction(logits_RK, delta_RK4, box_R4, offset_c, offset_r)


def translate(box_R4: Tensor, offset_R2: Tensor, gamma: float, plus: float = 0.0) -> Tensor:
    """P_r: boxes moved by gamma * offset * (width, height), their size unchanged (equation 3).

    Args:
        box_R4: float32. Takes no part in the gradient of the pooling, but in that of this shift.
        offset_R2: raw network output (x, y); differentiable.
        gamma: share of the size.
        plus: what a width has beyond x2 - x1.
    """
    shift_R2 = gamma * offset_R2 * torch.stack(boxes.sizes(box_R4, plus), dim=-1)
    return box_R4 + shift_R2.repeat(1, 2)


def strip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without the sibling heads, for a model built with `joint=False`.

    Args:
        state: of a head, a detector or a cascade; the tensors are shared, not copied.
    """
    return {name: value for name, value in state.items() if "sibling" not in name.split(".")}
