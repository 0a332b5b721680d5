"""Weighted box voting: detections of several models, or views, become those of an ensemble.

Letters: N detections of all models together, D voted detections.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from detection_tsd import boxes
from detection_tsd.data.detection_data import Detections
from detection_tsd.nms import hard

SCORES = ("mean", "max")


def box_voting(
    models: Sequence[Detections],
    weights: Sequence[float] | None = None,
    *,
    iou: float = 0.5,
    vote_iou: float = 0.5,
    score: str = "mean",
    per_image: int = 100,
) -> Detections:
    """Detections of one image that several models agree on.

    Hard NMS within classes over the detections of all models, ordered by weight times score; then
    each box that is left becomes the mean of the boxes of its class that overlap it, weighted by
    weight times score (box voting, arXiv 1505.01749, section 5). With one model and `vote_iou` = 1
    it is NMS.

    Args:
        models: detections of each model in the same pixels.
        weights: of each model, > 0; equal ones by default. Only their ratios matter.
        iou: above which a worse box goes.
        vote_iou: from which a box votes.
        score: "mean": of the best voting score of each model, 0 for a model without a vote,
            weighted, so that what one model alone has seen falls behind; "max": the best voting
            score.
        per_image: detections at most.

    Returns:
        Detections without masks, best first.

    Raises:
        ValueError: no models, a weight that is missing or not positive, an unknown `score`, or a
            NaN among boxes or scores.
    """
    weight_per_model = _checked(models, weights, score)
    box_N4 = torch.cat([found.box_D4 for found in models])
    score_N = torch.cat([found.score_D for found in models])
    label_N = torch.cat([found.label_D for found in models])
    counts = torch.tensor([len(found.score_D) for found in models], device=score_N.device)
    model_N = torch.arange(len(models), device=score_N.device).repeat_interleave(counts)
    weight_N = score_N.new_tensor(weight_per_model)[model_N] * score_N
    left_D = hard(box_N4, weight_N, label_N, iou).index_D
    votes_DN = (boxes.iou(box_N4[left_D], box_N4) >= vote_iou) & (label_N[left_D, None] == label_N)
    votes_DN[torch.arange(len(left_D)), left_D] = True  # its own vote, whatever rounding says
    share_DN = votes_DN * weight_N
    total_D = share_DN.sum(dim=1, keepdim=True)
    mean_D4 = (share_DN @ box_N4) / total_D.clamp(min=torch.finfo(total_D.dtype).tiny)
    voted_D4 = torch.where(total_D > 0, mean_D4, box_N4[left_D])
    voting_DN = votes_DN * score_N
    if score == "max":
        voted_D = voting_DN.amax(dim=1)
    else:
        voted_D = _mean_of_models(voting_DN, model_N, weight_per_model)
    order = voted_D.argsort(descending=True, stable=True)[:per_image]
    return Detections(voted_D4[order], voted_D[order], label_N[left_D][order])


def _checked(
    models: Sequence[Detections], weights: Sequence[float] | None, score: str
) -> list[float]:
    """Weights of the models, the greatest of them 1."""
    if not models:
        raise ValueError("models=[]: at least one is needed")
    given = [1.0] * len(models) if weights is None else [float(weight) for weight in weights]
    if len(given) != len(models) or not all(weight > 0 for weight in given):
        raise ValueError(f"weights={given}: one > 0 for each of {len(models)} models is needed")
    if score not in SCORES:
        raise ValueError(f"score={score!r}: one of {SCORES} is needed")
    return [weight / max(given) for weight in given]


def _mean_of_models(voting_DN: Tensor, model_N: Tensor, weights: Sequence[float]) -> Tensor:
    """Weighted mean over the models of the best score each gives to a detection."""
    best_DM = voting_DN.new_zeros(len(voting_DN), len(weights))
    best_DM.scatter_reduce_(1, model_N.expand(voting_DN.shape), voting_DN, "amax")
    weight_M = voting_DN.new_tensor(weights)
    return best_DM @ weight_M / weight_M.sum()
