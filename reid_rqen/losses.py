"""Losses on set vectors and frame logits, and the objectives that weigh them.

All distances but the siamese one are squared Euclid with Caffe's factor 1/2 (arXiv 1711.08766 and
its released training files). Everything is float32 inside autocast and safe on empty input.

Letters: N draws, D sets of a draw, S = N*D sets, E embedding, B logits rows, K identities.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from reid_rqen.models.output import SetOutput

Parts = dict[str, Tensor]


def _full(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def squared_distance(left_NE: Tensor, right_NE: Tensor) -> Tensor:
    """Squared Euclid distance row by row, (N,), float32 at least."""
    return (_full(left_NE) - _full(right_NE)).square().sum(dim=-1)


def set_triplet(
    anchor_NE: Tensor, positive_NE: Tensor, negative_NE: Tensor, margin: float
) -> Tensor:
    """Triplet loss 1/(2N) sum max(0, m + |A-P|^2 - |A-N|^2) on set vectors.

    Args:
        anchor_NE: unit vectors; non-negative features put squared distances in [0, 2].
        positive_NE: other sets of the anchors' identities.
        negative_NE: sets of other identities.
        margin: m in squared distance; 1.2 with scores from the image, 1.8 from pool2.

    Returns:
        Scalar; 0 with a graph when N is 0.
    """
    gap_N = squared_distance(anchor_NE, positive_NE) - squared_distance(anchor_NE, negative_NE)
    return F.relu(margin + gap_N).sum() / (2 * max(len(gap_N), 1))


def contrastive(anchor_NE: Tensor, positive_NE: Tensor) -> Tensor:
    """Pull of the positive pairs, 1/(2N) sum |A-P|^2.

    The reference's contrastive layer only ever sees positive pairs, so its margin never acts.
    """
    distance_N = squared_distance(anchor_NE, positive_NE)
    return distance_N.sum() / (2 * max(len(distance_N), 1))


def frame_cross_entropy(logits_BK: Tensor, label_S: Tensor) -> Tensor:
    """Mean cross entropy of B = S*T frames (or S sets), all frames of a set with its label.

    Raises:
        ValueError: B is no multiple of S.
    """
    rows, sets = len(logits_BK), len(label_S)
    if rows % max(sets, 1):
        raise ValueError(f"{rows} rows of logits for {sets} sets: need the same number per set")
    if not rows:
        return _full(logits_BK).sum()
    label_B = label_S.repeat_interleave(rows // sets)
    return F.cross_entropy(_full(logits_BK), label_B)


def pk_triplet(vector_SE: Tensor, label_S: Tensor, margin: float, mining: str = "hard") -> Tensor:
    """Triplet loss over all sets of a batch, squared Euclid with the factor 1/2 (our extension).

    Args:
        vector_SE: set vectors.
        label_S: their identities.
        margin: m in squared distance.
        mining: "all" averages every (anchor, positive, negative); "hard" takes the farthest
            positive and the nearest negative of each anchor that has both.

    Returns:
        Scalar; 0 with a graph when there is no triplet.

    Raises:
        ValueError: unknown `mining`.
    """
    if mining not in ("all", "hard"):
        raise ValueError(f"mining={mining!r}: need 'all' or 'hard'")
    distance_SS = squared_distance(vector_SE[:, None], vector_SE[None])
    same_SS = label_S[:, None] == label_S[None]
    positive_SS = same_SS & ~torch.eye(len(label_S), dtype=torch.bool, device=label_S.device)
    usable_S = positive_SS.any(dim=1) & (~same_SS).any(dim=1)
    if not usable_S.any():
        return _full(vector_SE).sum() * 0
    if mining == "hard":
        far_S = distance_SS.masked_fill(~positive_SS, -torch.inf).amax(dim=1)
        near_S = distance_SS.masked_fill(same_SS, torch.inf).amin(dim=1)
        return F.relu(margin + far_S[usable_S] - near_S[usable_S]).mean() / 2
    gap_SSS = margin + distance_SS[:, :, None] - distance_SS[:, None, :]
    return F.relu(gap_SSS[positive_SS[:, :, None] & ~same_SS[:, None, :]]).mean() / 2


def hinge_embedding(left_NE: Tensor, right_NE: Tensor, same_N: Tensor, margin: float) -> Tensor:
    """Mean of d for pairs of one identity and of max(0, m - d) for the others, d Euclid.

    McLaughlin et al., CVPR 2016 (siamese cost); m is 2 there. 0 with a graph when N is 0.
    """
    distance_N = torch.linalg.vector_norm(_full(left_NE) - _full(right_NE), dim=-1)
    cost_N = torch.where(same_N, distance_N, F.relu(margin - distance_N))
    return cost_N.sum() / max(len(cost_N), 1)


def score_spread(score_STR: Tensor) -> Tensor:
    """Standard deviation of w*T (weights relative to the mean's), 0 for constant scores.

    A model reported as RQEN whose spread is 0 is mean pooling.
    """
    score_STR = _full(score_STR.detach())
    relative_STR = score_STR / score_STR.mean(dim=1, keepdim=True).clamp_min(1e-12)
    return (relative_STR - 1).square().mean().sqrt()


def _logits_parts(output: SetOutput, pid_S: Tensor) -> Parts:
    """Cross entropy of every classifier, and the accuracy of the main one."""
    if not output.logits:
        raise ValueError("the model has no classifier: set num_classes to train with softmax")
    losses = [frame_cross_entropy(logits_BK, pid_S) for logits_BK in output.logits]
    parts = {"softmax": losses[0]}
    parts |= {f"aux{i}": loss for i, loss in enumerate(losses[1:], start=1)}
    label_B = pid_S.repeat_interleave(len(output.logits[0]) // max(len(pid_S), 1))
    hit_B = output.logits[0].detach().argmax(dim=1) == label_B
    return parts | {"accuracy": hit_B.float().mean()}


def _softmax_total(parts: Parts, softmax: float, auxiliary: float) -> Tensor:
    extra = sum((loss for name, loss in parts.items() if name.startswith("aux")), start=0.0)
    return softmax * parts["softmax"] + auxiliary * extra


def _sets(output: SetOutput, pid_ND: Tensor, sets: int | None) -> Tensor:
    """Set vectors as (N, D, E); `sets` is the D an objective is made for."""
    if pid_ND.dim() != 2 or (sets is not None and pid_ND.shape[1] != sets):
        raise ValueError(f"pid has shape {tuple(pid_ND.shape)}, need (draws, {sets or 'sets'})")
    if len(output.vector_SD) != pid_ND.numel():
        raise ValueError(f"{len(output.vector_SD)} set vectors for {pid_ND.numel()} identities")
    return output.vector_SD.unflatten(0, (pid_ND.shape[0], pid_ND.shape[1]))


def _scores(output: SetOutput) -> Parts:
    return {} if output.score_STR is None else {"score_std": score_spread(output.score_STR)}


@dataclass(frozen=True)
class SoftmaxObjective:
    """Frame classification only (the `gnbn_avg` baseline); any number of sets per draw."""

    auxiliary: float = 1.0

    def __call__(self, output: SetOutput, pid_ND: Tensor) -> tuple[Tensor, Parts]:
        """Total loss, and its unweighted parts with the accuracy."""
        parts = _logits_parts(output, pid_ND.flatten())
        return _softmax_total(parts, 1.0, self.auxiliary), parts


@dataclass(frozen=True)
class SetObjective:
    """L_softmax + L_aux1 + L_aux2 + L_triplet + L_contrastive on draws of three sets.

    Args:
        margin: of the triplet, in squared distance.
        triplet: weight, 1 in the reference like all others.
        contrastive: weight.
        softmax: weight of the main classifier.
        auxiliary: weight of each auxiliary classifier.
    """

    margin: float = 1.2
    triplet: float = 1.0
    contrastive: float = 1.0
    softmax: float = 1.0
    auxiliary: float = 1.0

    def __call__(self, output: SetOutput, pid_ND: Tensor) -> tuple[Tensor, Parts]:
        """Total loss, and its unweighted parts with diagnostics.

        Args:
            output: of S = 3N sets, ordered (anchor, positive, negative) draw by draw.
            pid_ND: labels (N, 3), the first two columns equal.
        """
        anchor_NE, positive_NE, negative_NE = _sets(output, pid_ND, 3).unbind(dim=1)
        parts = _logits_parts(output, pid_ND.flatten())
        parts["triplet"] = set_triplet(anchor_NE, positive_NE, negative_NE, self.margin)
        parts["contrastive"] = contrastive(anchor_NE, positive_NE)
        total = _softmax_total(parts, self.softmax, self.auxiliary)
        total = total + self.triplet * parts["triplet"] + self.contrastive * parts["contrastive"]
        return total, parts | _scores(output)


@dataclass(frozen=True)
class PKObjective:
    """Softmax plus the triplets of all sets of the batch (P identities x K sets; extension)."""

    margin: float = 1.2
    mining: str = "hard"
    triplet: float = 1.0
    softmax: float = 1.0
    auxiliary: float = 1.0

    def __call__(self, output: SetOutput, pid_ND: Tensor) -> tuple[Tensor, Parts]:
        """Total loss, and its unweighted parts with diagnostics; draws are pooled."""
        vector_SE = _sets(output, pid_ND, None).flatten(0, 1)
        parts = _logits_parts(output, pid_ND.flatten())
        parts["triplet"] = pk_triplet(vector_SE, pid_ND.flatten(), self.margin, self.mining)
        total = _softmax_total(parts, self.softmax, self.auxiliary)
        return total + self.triplet * parts["triplet"], parts | _scores(output)


@dataclass(frozen=True)
class SiameseObjective:
    """Hinge embedding on (anchor, positive) and (anchor, negative), and both members' softmax.

    McLaughlin et al., CVPR 2016: one hinge and two identity costs per pair, mean over the pairs.
    Uses `output.pairs` and its logits when the model has pair-dependent vectors.
    """

    margin: float = 2.0
    softmax: float = 1.0

    def __call__(self, output: SetOutput, pid_ND: Tensor) -> tuple[Tensor, Parts]:
        """Total loss, and its unweighted parts; `pid_ND` is (N, 3) as for `SetObjective`."""
        anchor_NE, positive_NE, negative_NE = _sets(output, pid_ND, 3).unbind(dim=1)
        left = torch.cat([anchor_NE, anchor_NE])
        right = torch.cat([positive_NE, negative_NE])
        anchor_N, positive_N, negative_N = pid_ND.unbind(dim=1)
        pid_P = torch.cat([anchor_N, anchor_N, positive_N, negative_N])
        logits = output.logits
        if output.pairs is not None:
            left, right = output.pairs
        elif logits:
            main_NDK = logits[0].unflatten(0, tuple(pid_ND.shape))
            logits = (main_NDK[:, [0, 0, 1, 2]].transpose(0, 1).flatten(0, 1),)
        same_P = torch.arange(len(left), device=left.device) < len(anchor_NE)
        parts = _logits_parts(output._replace(logits=logits), pid_P)
        parts["hinge"] = hinge_embedding(left, right, same_P, self.margin)
        return parts["hinge"] + 2 * self.softmax * parts["softmax"], parts
