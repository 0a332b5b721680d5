"""What a quality network learns: how well a finished recogniser tells an image from other people.

The recogniser stays as it is. On degraded copies of its training images (`data/proxy.py`) it gives
a = cos(f, w_y), the similarity to the centre of the own class, and h = max_{j != y} cos(f, w_j),
the one to the nearest other class. The training of the quality network of arXiv 1909.00632 was
not published; these targets follow the authors' later paper, arXiv 2008.10850 (discriminability
distillation), as far as its abstract and later accounts of it go:

    ddl_ratio   a / max(h, 0.05)
    ddl_diff    a - h            (ours)
    own_cos     a                (ours)

each standardised over the whole proxy set and taken through a sigmoid. `SetTriplet` is the other
way, without targets: the triplet loss of set features of Quality-Aware-Network (CVPR 2017).

Letters: M proxy images, N images, B images of a batch, C classes, D embedding width, S sets of
three, T frames of a set.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from face_lfr.losses import contrastive, quality_regression, set_triplet

LEAST_OTHER = 0.05  # h below it, or negative, says nothing more and would blow up the ratio
ROWS_AT_ONCE = 65536

TARGETS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "ddl_ratio": lambda own_M, other_M: own_M / np.maximum(other_M, LEAST_OTHER),
    "ddl_diff": lambda own_M, other_M: own_M - other_M,
    "own_cos": lambda own_M, other_M: own_M,
}


def targets(own_M: np.ndarray, other_M: np.ndarray, name: str) -> np.ndarray:
    """Targets float32 (M,) in [0, 1] of the whole proxy set.

    T = sigmoid((x - mean x) / std x), x one of `TARGETS`; population deviation. Where x is the
    same everywhere, every target is 0.5.

    Args:
        own_M: a, similarities to the own class.
        other_M: h, greatest similarities to another class.
        name: `ddl_ratio`, `ddl_diff` or `own_cos`.

    Raises:
        ValueError: another name, lengths that differ, or a value that is not finite.
    """
    if name not in TARGETS:
        raise ValueError(f"target={name!r}: need one of {', '.join(TARGETS)}")
    if own_M.ndim != 1 or own_M.shape != other_M.shape:
        raise ValueError(f"own {own_M.shape} and other {other_M.shape}: need the same (M,)")
    raw_M = TARGETS[name](own_M.astype(np.float64), other_M.astype(np.float64))
    if not np.isfinite(raw_M).all():
        raise ValueError("own and other must be finite")
    if not raw_M.size or np.ptp(raw_M) == 0:
        return np.full(raw_M.shape, 0.5, np.float32)
    standard_M = (raw_M - raw_M.mean()) / raw_M.std()
    return (0.5 * (1 + np.tanh(standard_M / 2))).astype(np.float32)  # a sigmoid without overflow


def class_means(feature_ND: np.ndarray, labels_N: np.ndarray, classes: int) -> Tensor:
    """Unit class centres (C, D) float32: normalised means of the unit features of each class.

    For a recogniser whose classifier is not there. Reads mapped features block by block and adds
    in float64.

    Raises:
        ValueError: a label outside [0, classes), rows that do not fit, or a class without image.
    """
    if len(feature_ND) != len(labels_N):
        raise ValueError(f"{len(feature_ND)} features and {len(labels_N)} labels")
    if len(labels_N) and not 0 <= labels_N.min() <= labels_N.max() < classes:
        span = f"{labels_N.min()}..{labels_N.max()}"
        raise ValueError(f"labels {span} must be in [0, {classes})")
    missing = np.flatnonzero(np.bincount(labels_N, minlength=classes) == 0)
    if len(missing):
        raise ValueError(f"{len(missing)} of {classes} classes have no image, first {missing[0]}")
    sum_CD = torch.zeros(classes, feature_ND.shape[1], dtype=torch.float64)
    for start in range(0, len(feature_ND), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        unit_BD = F.normalize(torch.from_numpy(np.array(feature_ND[rows], np.float64)), dim=1)
        sum_CD.index_add_(0, torch.from_numpy(np.asarray(labels_N[rows], np.int64)), unit_BD)
    return F.normalize(sum_CD, dim=1).float()


def own_and_other(
    feature_BD: Tensor, label_B: Tensor, centres_CD: Tensor, classes_at_once: int = 16384
) -> tuple[Tensor, Tensor]:
    """Similarities a and h (both (B,), float32) of features to unit class centres.

    The centres are met block by block, so that memory is B x `classes_at_once`.

    Args:
        feature_BD: of any length; a zero row has the similarity 0 to everything.
        label_B: int64 classes in [0, C).
        centres_CD: unit rows, on the device of the features; at least two.
        classes_at_once: classes of a block.

    Raises:
        ValueError: fewer than two classes, or widths that differ.
    """
    if len(centres_CD) < 2 or centres_CD.shape[1] != feature_BD.shape[1]:
        shapes = f"{tuple(feature_BD.shape)} features, {tuple(centres_CD.shape)} centres"
        raise ValueError(f"{shapes}: need at least two classes of the same width")
    with torch.autocast(feature_BD.device.type, enabled=False):
        unit_BD, centres_CD = F.normalize(feature_BD.float(), dim=1), centres_CD.float()
        own_B = (unit_BD * centres_CD[label_B]).sum(dim=1)
        other_B = torch.full_like(own_B, -torch.inf)
        row_B = torch.arange(len(unit_BD), device=unit_BD.device)
        for start in range(0, len(centres_CD), classes_at_once):
            cos_BC = unit_BD @ centres_CD[start : start + classes_at_once].T
            mine_B = (label_B >= start) & (label_B < start + cos_BC.shape[1])
            cos_BC[row_B[mine_B], label_B[mine_B] - start] = -torch.inf
            other_B = torch.maximum(other_B, cos_BC.amax(dim=1))
    return own_B, other_B


class Distillation(nn.Module):
    """L2 regression of the network's score to the target; an objective without parameters."""

    def forward(self, score_B: Tensor, target_B: Tensor) -> Tensor:
        """Scalar loss of scores and targets in (0, 1)."""
        return quality_regression(score_B, target_B.to(score_B.device))


class SetTriplet(nn.Module):
    """Triplet loss of weighted set features; an objective without parameters.

    Quality-Aware-Network (CVPR 2017): mu = sigmoid(score), w = mu / sum mu over the set, v = sum w
    f over its norm; triplet loss of (anchor, positive, negative) plus `weight` times the
    contrastive loss of (anchor, positive). There the features learn as well; here they are those
    of the finished recogniser, and only the weights learn.

    Args:
        margin: of the triplet loss; 1.2 there.
        weight: of the contrastive loss; 0 leaves it out.
        contrastive_margin: a number lets (anchor, negative) take part in the contrastive loss as a
            pair of different identities, which is where a margin acts (0.8 there); None does not.
        frame_norm: "none" weighs the features as they are, "l2" brings each to unit length first.

    Raises:
        ValueError: a negative number, or another `frame_norm`.
    """

    def __init__(
        self,
        margin: float = 1.2,
        weight: float = 0.0,
        contrastive_margin: float | None = None,
        frame_norm: str = "none",
    ):
        super().__init__()
        numbers = {"margin": margin, "weight": weight, "contrastive_margin": contrastive_margin}
        for name, value in numbers.items():
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name}={value} must be finite and not negative")
        if frame_norm not in ("none", "l2"):
            raise ValueError(f"frame_norm={frame_norm!r}: need none or l2")
        self.margin, self.weight = margin, weight
        self.contrastive_margin, self.frame_norm = contrastive_margin, frame_norm

    def vectors(self, score: Tensor, feature_S3TD: Tensor) -> Tensor:
        """Unit set vectors (S, 3, D) of the scores of all frames, in the order of the features."""
        if feature_S3TD.dim() != 4 or feature_S3TD.shape[1] != 3:
            raise ValueError(f"feature has shape {tuple(feature_S3TD.shape)}, need (S, 3, T, D)")
        if score.numel() != feature_S3TD.shape[:3].numel():
            shapes = f"{score.numel()} scores, features {tuple(feature_S3TD.shape)}"
            raise ValueError(f"{shapes}: need one score a frame")
        with torch.autocast(score.device.type, enabled=False):
            feature_S3TD = feature_S3TD.to(torch.promote_types(feature_S3TD.dtype, torch.float32))
            if self.frame_norm == "l2":
                feature_S3TD = F.normalize(feature_S3TD, dim=-1)
            score_S3T = score.reshape(feature_S3TD.shape[:3]).to(feature_S3TD.dtype)
            # mu / sum mu, also where every sigmoid of a set would underflow to 0.
            weight_S3T = F.logsigmoid(score_S3T).softmax(dim=-1)
            sum_S3D = torch.einsum("nst,nstd->nsd", weight_S3T, feature_S3TD)
            return F.normalize(sum_S3D, dim=-1)

    def forward(self, score: Tensor, feature_S3TD: Tensor) -> Tensor:
        """Scalar loss; `score` has one entry a frame, of any shape in the order (S, 3, T)."""
        anchor_SD, positive_SD, negative_SD = self.vectors(score, feature_S3TD).unbind(1)
        loss = set_triplet(anchor_SD, positive_SD, negative_SD, self.margin)
        if self.weight:
            loss = loss + self.weight * self._contrastive(anchor_SD, positive_SD, negative_SD)
        return loss

    def _contrastive(self, anchor_SD: Tensor, positive_SD: Tensor, negative_SD: Tensor) -> Tensor:
        if self.contrastive_margin is None:
            return contrastive(anchor_SD, positive_SD)
        same_P = torch.arange(2 * len(anchor_SD), device=anchor_SD.device) < len(anchor_SD)
        pairs = torch.cat([anchor_SD, anchor_SD]), torch.cat([positive_SD, negative_SD])
        return contrastive(*pairs, self.contrastive_margin, same_P)
