"""A detector as one graph of standard ONNX operators, from an image to its detections.

The graph has fixed sizes everywhere but for the number of given proposals: what a suppression
drops stays in its place with the score 0, so that nothing behind it depends on values. The
suppression of all classes is one `NonMaxSuppression` over all R x (K - 1) pairs, which gives what
`PostProcess` gives with hard suppression, ties included.

Letters: H W size of the input, M proposals, R regions, C foreground classes, K = C + 1 class scores
with the background at column 0, N boxes of a group, G groups, D detections, S mask bins per side.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detection_tsd import boxes, nms
from detection_tsd.models.detector import TwoStage, join_rois
from detection_tsd.models.fpn import Features
from detection_tsd.models.rpn import RPN, STDS

IMAGE, SIZE, PROPOSALS = "image_13HW", "size_2", "proposals_M4"
DETECTIONS = ("box_D4", "score_D", "label_D")
MASKS = "mask_DSS"
REGIONS = ("prob_MK", "box_MK4")


@torch.library.custom_op("detection_tsd::kept", mutates_args=())
def kept(box_GN4: Tensor, score_GN: Tensor, iou: float, limit: int) -> Tensor:
    """1 where hard suppression within a group keeps a box, else 0; float32 (G, N).

    One operator, because the number of boxes that are left depends on their values. Boxes with the
    score -inf come last and may be among those that are kept.

    Args:
        box_GN4: continuous boxes.
        score_GN: any order.
        iou: overlap above which a worse box goes.
        limit: boxes that a group keeps at most.
    """
    kept_GN = torch.zeros_like(score_GN, dtype=torch.float32)
    for group, (box_N4, score_N) in enumerate(zip(box_GN4, score_GN, strict=True)):
        label_N = torch.zeros_like(score_N, dtype=torch.int64)
        kept_GN[group, nms.hard(box_N4, score_N, label_N, iou, limit=limit).index_D] = 1
    return kept_GN


@kept.register_fake
def _(box_GN4: Tensor, score_GN: Tensor, iou: float, limit: int) -> Tensor:
    return torch.empty_like(score_GN, dtype=torch.float32)


class Network(nn.Module):
    """What the ONNX file computes.

    Args:
        detector: in evaluation mode.
        suppress: end with the suppression, which must be hard then; else with what the head says
            of every region.

    Raises:
        ValueError: another suppression.
    """

    def __init__(self, detector: TwoStage, suppress: bool = True) -> None:
        super().__init__()
        if suppress and detector.post.nms != "hard":
            raise ValueError(f"nms={detector.post.nms!r}: only hard suppression has a graph")
        self.detector, self.suppress = detector, suppress

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs."""
        return (IMAGE, SIZE) if self.detector.rpn is not None else (IMAGE, SIZE, PROPOSALS)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs."""
        if not self.suppress:
            return REGIONS
        return DETECTIONS if self.detector.mask is None else (*DETECTIONS, MASKS)

    def forward(
        self, image_13HW: Tensor, size_2: Tensor, proposals_M4: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Detections of one image, best first.

        Args:
            image_13HW: normalised, 0 at the right and below the valid part.
            size_2: int64, height and width of the valid part.
            proposals_M4: float32, where the detector has no RPN.

        Returns:
            Boxes in input pixels, cut at the valid part, scores and labels (int64), each with as
            many rows as `PostProcess` may return; unused rows at the end have score and label 0.
            A mask branch adds mask probabilities on a grid over each box. Without `suppress`:
            probabilities (M, K) and boxes (M, K, 4), not cut; of a region that is not used the
            background has all the probability.
        """
        features = self.detector.features(image_13HW)
        if proposals_M4 is None:
            region_M4, used_M = self._propose(features, size_2)
        else:
            region_M4 = proposals_M4
            used_M = torch.ones_like(proposals_M4[:, 0], dtype=torch.bool)
        prob_MK, box_MK4 = self.detector.score(features, join_rois([region_M4]), size_2[None])
        foreground_MC = torch.where(used_M[:, None], prob_MK[:, 1:], 0.0)
        if not self.suppress:
            background_M1 = torch.where(used_M[:, None], prob_MK[:, :1], 1.0)
            return torch.cat((background_M1, foreground_MC), dim=1), box_MK4
        found = self._select(foreground_MC, box_MK4[:, -foreground_MC.shape[1] :], size_2)
        if self.detector.mask is None:
            return found
        return *found, self.detector.masks(features, join_rois([found[0]]), found[2])

    def _propose(self, features: Features, size_2: Tensor) -> tuple[Tensor, Tensor]:
        """As many proposals as `RPN` may return, and which of them it does return."""
        rpn: RPN = self.detector.rpn  # type: ignore[assignment]
        maps = getattr(features, self.detector.rpn_on)
        hw = tuple(side * rpn.strides[0] for side in maps[0].shape[2:])
        found, logits = [], []
        for logit_1N, delta_1N4, anchor_N4 in zip(*rpn(maps, size_2[None], hw), strict=True):
            logit_N, best_N = logit_1N[0].topk(min(rpn.pre[False], logit_1N.shape[1]))
            box_N4 = boxes.decode(anchor_N4[best_N], delta_1N4[0][best_N], STDS, rpn.plus)
            box_N4 = boxes.clip_boxes(box_N4, size_2, rpn.plus)
            sized_N = boxes.valid_mask(box_N4, rpn.min_size, rpn.plus)
            score_N = torch.where(sized_N, logit_N, -torch.inf)
            found.append(_outer(box_N4, rpn.plus))
            kept_1N = kept(found[-1][None], score_N[None], rpn.nms, rpn.post[False])
            logits.append(torch.where(kept_1N[0] > 0, score_N, -torch.inf))
        logit_N, box_N4 = torch.cat(logits), torch.cat(found)
        logit_M, best_M = logit_N.topk(min(rpn.post[False], len(logit_N)))
        return box_N4[best_M], logit_M > -torch.inf

    def _select(self, score_MC: Tensor, box_MC4: Tensor, size_2: Tensor) -> tuple[Tensor, ...]:
        """What `PostProcess.decoded` does, with rows of 0 at the end."""
        post, plus = self.detector.post, self.detector.plus
        inner_MC4 = boxes.clip_boxes(_outer(box_MC4, -plus), size_2, plus)
        box_MC4 = _outer(inner_MC4, plus).expand(*score_MC.shape, 4)
        good_MC = (score_MC > post.score_threshold) & boxes.valid_mask(inner_MC4, plus=plus)
        ranked_CM = torch.where(good_MC, score_MC, -torch.inf).T
        kept_CM = kept(box_MC4.transpose(0, 1), ranked_CM, post.iou, post.per_image)
        left_MC = torch.where(good_MC & (kept_CM.T > 0), score_MC, 0.0)
        # With rows to spare the number of detections is no function of that of the proposals.
        spare = score_MC.new_zeros(post.per_image)
        score_D, pair_D = torch.cat((left_MC.flatten(), spare)).topk(post.per_image)
        spare_D4 = spare[:, None].expand(-1, 4)
        box_D4 = torch.cat((box_MC4.reshape(-1, 4), spare_D4))[pair_D]
        label_D = torch.where(score_D > 0, pair_D % score_MC.shape[1] + 1, 0)
        return box_D4, score_D, label_D


def _outer(box: Tensor, plus: float) -> Tensor:
    """Boxes whose last pixel is included as continuous ones; the inverse with -plus."""
    return box + box.new_tensor((0.0, 0.0, plus, plus)) if plus else box


def write_onnx(
    network: Network, example: tuple[Tensor, ...], path: Path, opset: int, optimize: bool = True
) -> None:
    """Export a network for inputs of the size of `example`; proposals may be any number.

    Args:
        network: in evaluation mode.
        example: an input.
        path: of the file.
        opset: of the standard operators.
        optimize: fold constants and merge operators: a quarter of the nodes, twice the time.

    Raises:
        ValueError: an example with fewer than two proposals: their number would become a constant.
    """
    shapes: dict[str, Any] = dict.fromkeys(("image_13HW", "size_2"))
    if len(example) == 3:
        if len(example[2]) < 2:
            raise ValueError(f"example has {len(example[2])} proposals, need at least 2")
        shapes["proposals_M4"] = {0: torch.export.Dim.DYNAMIC}
    with torch.no_grad():
        # Strict where a number may vary: eager tracing would turn the length of a tensor into a
        # constant.
        program = torch.export.export(
            network, example, dynamic_shapes=shapes, strict=len(example) == 3
        )
    torch.onnx.export(
        program,
        f=path,
        dynamo=True,
        opset_version=opset,
        external_data=False,
        verbose=False,
        optimize=optimize,
        input_names=list(network.inputs),
        output_names=list(network.outputs),
        custom_translation_table={torch.ops.detection_tsd.kept.default: _translation()},
    )


def _translation() -> Callable[..., Any]:
    """`kept` in operators of ONNX."""
    from onnxscript import opset18

    op: Any = opset18

    def translate(box_GN4: Any, score_GN: Any, iou: float, limit: int) -> Any:
        score_G1N = op.Unsqueeze(score_GN, op.Constant(value_ints=[1]))
        most, least = op.Constant(value_ints=[limit]), op.Constant(value_floats=[iou])
        # Rows (group, 0, box); its groups are a batch, and an overlap does not mind y before x.
        row_X3 = op.NonMaxSuppression(box_GN4, score_G1N, most, least)
        at_X2 = op.Gather(row_X3, op.Constant(value_ints=[0, 2]), axis=1)
        none_GN = op.Expand(op.Constant(value_float=0.0), op.Shape(score_GN))
        one_X = op.Expand(op.Constant(value_float=1.0), op.Shape(at_X2, start=0, end=1))
        return op.ScatterND(none_GN, at_X2, one_X)

    return translate
