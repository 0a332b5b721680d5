"""Losses on logits and multi-hot targets, class weights, label smoothing, and the objective.

Everything is float32 inside autocast (float64 stays float64), finite for every logit that float16
can hold, and 0 with a graph on an empty batch. A target row may mark any number of classes:

- rows without a positive count as videos in `bce`, `bce_weighted`, `lsep`, `bpmll` and `ce`, where
  the last three find nothing to lose in them, and have no pair in `wlsep` and `warp`;
- rows that are all positive have no negative to compare with: their terms of the four ranking
  losses (`wlsep`, `lsep`, `warp`, `bpmll`) are 0.

Letters: N videos, K classes, P positive entries of a batch, Y_i the positives of video i.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.nn import functional as F

from common import dist
from common.log import InputError

LARGEST_EXPONENT = 30.0


def bce(score_NK: Tensor, target_NK: Tensor) -> Tensor:
    """Binary cross entropy of logits, 1/(NK) sum softplus(s) - y s: a mean over both dimensions.

    The loss of X-Temporal (`build_criterion`). Its gradient is K times smaller than that of the
    sum over classes; mmaction2 multiplies it by 160 for the 313 classes of Multi-Moments in Time.

    Raises:
        ValueError: the shapes are not the same (N, K).
    """
    score_NK, target_NK = _aligned(score_NK, target_NK)
    return _entropy(score_NK, target_NK).sum() / max(score_NK.numel(), 1)


def bce_weighted(score_NK: Tensor, target_NK: Tensor, weight_K: Tensor) -> Tensor:
    """1/N sum_ik ((1 - w_k) y_ik + w_k (1 - y_ik)) BCE_ik: a sum over classes.

    From the authors of Multi-Moments in Time (arXiv 1911.00232, `loss_functions.py` of
    moments_models). With their weights (`class_weights`) the positives of the rarest class, whose
    weight is 1, count nothing.

    Args:
        score_NK: logits.
        target_NK: 0 and 1, or smoothed.
        weight_K: w in [0, 1].

    Raises:
        ValueError: the shapes do not fit.
    """
    score_NK, target_NK = _aligned(score_NK, target_NK, weight_K)
    factor_NK = (1 - weight_K) * target_NK + weight_K * (1 - target_NK)
    return (factor_NK * _entropy(score_NK, target_NK)).sum() / max(len(score_NK), 1)


def wlsep(score_NK: Tensor, target_NK: Tensor, weight_K: Tensor | None = None) -> Tensor:
    """Weighted log-sum-exp of pairs (arXiv 1911.00232), averaged over all positive entries.

    The term of a positive entry (i, k) is w_k log(1 + sum_m exp(s_im - s_ik)), m over the negatives
    of video i. It equals w_k softplus(logsumexp_m s_im - s_ik), which takes O(K) memory a video
    where the comparison of all pairs takes O(K^2).

    The number of positive entries varies, so the mean is over those of all ranks: a rank divides
    its sum by the total over the number of ranks, and the mean over the ranks, which DDP takes of
    the gradients, is that of one process. Every rank has to call it.

    Args:
        score_NK: logits.
        target_NK: above 0.5 where a class is positive.
        weight_K: w; all 1 when None.

    Returns:
        Scalar; 0 with a graph where nothing is positive.

    Raises:
        ValueError: the shapes do not fit.
    """
    score_NK, target_NK = _aligned(score_NK, target_NK, weight_K)
    positive_NK = target_NK > 0.5
    gap_NK = _log_sum_exp(score_NK, ~positive_NK).unsqueeze(1) - score_NK
    term_NK = _softplus(gap_NK) if weight_K is None else _softplus(gap_NK) * weight_K
    return _mean((term_NK * positive_NK).sum(), positive_NK.sum())


def lsep(score_NK: Tensor, target_NK: Tensor) -> Tensor:
    """Mean over the videos of log(1 + sum_{k in Y, m not in Y} exp(s_m - s_k)).

    Li et al., "Improving Pairwise Ranking for Multi-label Image Classification", CVPR 2017. The
    logarithm is per video, as there; moments_models takes one of the sum over the whole batch.

    Raises:
        ValueError: the shapes are not the same (N, K).
    """
    score_NK, target_NK = _aligned(score_NK, target_NK)
    return _softplus(_pair_exponent(score_NK, target_NK > 0.5)).sum() / max(len(score_NK), 1)


def warp(score_NK: Tensor, target_NK: Tensor, weight_K: Tensor | None = None) -> Tensor:
    """Weighted approximate-rank pairwise loss, averaged over all positive entries of all ranks.

    The term of a positive entry (i, k) is w_k L(r) mean_m max(0, 1 + s_im - s_ik), m over the
    negatives of video i, with L(r) = 1 + 1/2 + ... + 1/r and r the rank of class k in its video
    (1 + the number of classes with a greater score; no gradient). Weston et al., IJCAI 2011, in
    the form of moments_models, which however looks L up by the number of a class in place of its
    rank. For the mean over ranks see `wlsep`.

    Args:
        score_NK: logits.
        target_NK: above 0.5 where a class is positive.
        weight_K: w; all 1 when None.

    Raises:
        ValueError: the shapes do not fit.
    """
    score_NK, target_NK = _aligned(score_NK, target_NK, weight_K)
    positive_NK = target_NK > 0.5
    row_P, class_P = positive_NK.nonzero(as_tuple=True)
    other_PK, negative_PK = score_NK[row_P], ~positive_NK[row_P]
    gap_PK = other_PK - score_NK[row_P, class_P].unsqueeze(1)
    hinge_P = (F.relu(1 + gap_PK) * negative_PK).sum(dim=1)
    hinge_P = hinge_P / negative_PK.sum(dim=1).clamp_min(1)
    place_K = torch.arange(1, score_NK.shape[1] + 1, device=score_NK.device)
    factor_P = place_K.to(score_NK.dtype).reciprocal().cumsum(dim=0)[(gap_PK > 0).sum(dim=1)]
    if weight_K is not None:
        factor_P = factor_P * weight_K[class_P]
    return _mean((factor_P * hinge_P).sum(), positive_NK.sum())


def bpmll(
    score_NK: Tensor, target_NK: Tensor, weight_K: Tensor | None = None, normalize: bool = True
) -> Tensor:
    """Mean over the videos of 1/(|Y| |not Y|) sum_{k in Y, m not in Y} w_k exp(s_m - s_k).

    Zhang and Zhou, "Multilabel Neural Networks with Applications to Functional Genomics and Text
    Categorization", TKDE 2006. There the scores lie in [-1, 1]; logits do not, so where a video's
    sum exceeds e^30 the exponential goes on as its tangent: neither it nor its gradient overflows.

    Args:
        score_NK: logits.
        target_NK: above 0.5 where a class is positive.
        weight_K: w; all 1 when None.
        normalize: False leaves the factor 1/(|Y| |not Y|) away, as moments_models does.

    Raises:
        ValueError: the shapes do not fit.
    """
    score_NK, target_NK = _aligned(score_NK, target_NK, weight_K)
    positive_NK = target_NK > 0.5
    exponent_N = _pair_exponent(score_NK, positive_NK, weight_K)
    near_N = exponent_N.clamp_max(LARGEST_EXPONENT).exp()
    sum_N = near_N * (1 + F.relu(exponent_N - LARGEST_EXPONENT))
    if normalize:
        pairs_N = positive_NK.sum(dim=1) * (~positive_NK).sum(dim=1)
        sum_N = sum_N / pairs_N.clamp_min(1)
    return sum_N.sum() / max(len(score_NK), 1)


def ce(score_NK: Tensor, target_NK: Tensor) -> Tensor:
    """Softmax cross entropy, mean over the videos of -sum_k q_k log p_k with q = y / sum y.

    One-hot rows give the usual loss; a row with several positives shares its weight among them.

    Raises:
        ValueError: the shapes are not the same (N, K).
    """
    score_NK, target_NK = _aligned(score_NK, target_NK)
    mass_N1 = target_NK.sum(dim=1, keepdim=True)
    share_NK = target_NK / torch.where(mass_N1 > 0, mass_N1, 1)
    return -(share_NK * score_NK.log_softmax(dim=1)).sum() / max(len(score_NK), 1)


def class_weights(counts_K: Tensor) -> Tensor:
    """w_k = min_j n_j / n_k in (0, 1], float32 (arXiv 1911.00232): 1 for the rarest class.

    Args:
        counts_K: n, training videos of each class.

    Raises:
        InputError: a class without training videos has no weight.
        ValueError: the counts are not one row of numbers.
    """
    if counts_K.dim() != 1 or not len(counts_K):
        raise ValueError(f"counts_K has shape {tuple(counts_K.shape)}, need (classes,)")
    count_K = counts_K.double()
    empty = (~(count_K > 0)).nonzero().flatten().tolist()
    if empty:
        what = f"{len(empty)} of {len(counts_K)} classes have no training video and so no weight"
        raise InputError(f"class {empty[0]}", what, counts_K[empty[0]].item())
    return (count_K.min() / count_K).float()


def smooth(target_NK: Tensor, amount: float, multi_label: bool) -> Tensor:
    """Targets moved towards the uniform ones by the share `amount`.

    - multi-label: every class is a choice of two, y (1 - a) + a/2;
    - single-label: a choice of K, y (1 - a) + a (sum y)/K, which keeps the sum of a row.

    mmaction2 adds a/K in both cases.

    Raises:
        ValueError: `amount` is outside [0, 1).
    """
    if not 0 <= amount < 1:
        raise ValueError(f"smoothing={amount}: need a share in [0, 1)")
    even = 0.5 if multi_label else target_NK.mean(dim=1, keepdim=True)
    return target_NK * (1 - amount) + amount * even


class Objective(nn.Module):
    """`scale` times a loss of (smoothed) targets, with class weights where they are asked for.

    Args:
        counts_K: training videos of each class.
        function: one of this module's losses, or another with the same arguments.
        scale: factor of the loss; 160 with `bce` is mmaction2's for Multi-Moments in Time, K that
            of a sum over classes.
        smoothing: share `amount` of `smooth`.
        weighted: pass `class_weights(counts_K)` as `weight_K`.
        multi_label: which form of `smooth`; False belongs to `ce`.

    Raises:
        InputError: weights are asked for and a class has no training video.
        ValueError: the function takes no weights, or needs them; smoothed targets would not change
            a ranking loss; a scale that is not positive.
    """

    weight: Tensor | None

    def __init__(
        self,
        counts_K: Tensor,
        function: Callable[..., Tensor],
        scale: float = 1.0,
        smoothing: float = 0.0,
        weighted: bool = False,
        multi_label: bool = True,
    ):
        super().__init__()
        _check(function, scale, smoothing, weighted)
        self.num_classes, self.function, self.scale = len(counts_K), function, scale
        self.smoothing, self.multi_label = smoothing, multi_label
        weight_K = class_weights(counts_K) if weighted else None
        self.register_buffer("weight", weight_K, persistent=False)  # the data tells it again

    def forward(self, score_NK: Tensor, target_NK: Tensor) -> Tensor:
        """Scalar loss of logits and multi-hot targets, both (N, K)."""
        if score_NK.dim() != 2 or score_NK.shape[1] != self.num_classes:
            what = f"score_NK has shape {tuple(score_NK.shape)}, need (videos, {self.num_classes})"
            raise ValueError(what)
        if self.smoothing:
            target_NK = smooth(target_NK, self.smoothing, self.multi_label)
        weights = () if self.weight is None else (self.weight,)
        return self.scale * self.function(score_NK, target_NK, *weights)


RANKING = (wlsep, lsep, warp, bpmll)


def _check(function: Callable[..., Tensor], scale: float, smoothing: float, weighted: bool) -> None:
    if not scale > 0:
        raise ValueError(f"scale={scale}: need a positive factor")
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing={smoothing}: need a share in [0, 1)")
    base: Any = function.func if isinstance(function, partial) else function
    name = getattr(base, "__name__", type(base).__name__)
    if smoothing and base in RANKING:
        raise ValueError(f"smoothing={smoothing}: {name} only asks which classes are positive")
    found = inspect.signature(function).parameters.get("weight_K")
    if weighted and found is None:
        raise ValueError(f"weighted={weighted}: {name} takes no class weights")
    if not weighted and found is not None and found.default is inspect.Parameter.empty:
        raise ValueError(f"weighted={weighted}: {name} needs class weights")


def _aligned(
    score_NK: Tensor, target_NK: Tensor, weight_K: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Both in float32 at least, after a look at the shapes: broadcasting would hide a mistake."""
    if score_NK.dim() != 2 or score_NK.shape != target_NK.shape:
        shapes = tuple(score_NK.shape), tuple(target_NK.shape)
        raise ValueError(f"score_NK and target_NK have shapes {shapes}, need the same (N, K)")
    if weight_K is not None and weight_K.shape != score_NK.shape[1:]:
        raise ValueError(f"weight_K has shape {tuple(weight_K.shape)}, need {score_NK.shape[1:]}")
    kind = torch.promote_types(score_NK.dtype, torch.float32)
    return score_NK.to(kind), target_NK.to(kind)


def _entropy(score_NK: Tensor, target_NK: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(score_NK, target_NK, reduction="none")


def _softplus(x: Tensor) -> Tensor:
    """log(1 + e^x); torch's softplus is the identity from 20 on, which float64 can tell."""
    return torch.logaddexp(x, torch.zeros_like(x))


def _log_sum_exp(x_NK: Tensor, chosen_NK: Tensor) -> Tensor:
    """Per row over the chosen entries; the least number for a row without any.

    Minus infinity would be right there as well, but its gradient passes through NaN.
    """
    return x_NK.masked_fill(~chosen_NK, torch.finfo(x_NK.dtype).min).logsumexp(dim=1)


def _pair_exponent(score_NK: Tensor, positive_NK: Tensor, weight_K: Tensor | None = None) -> Tensor:
    """Log of sum_{k in Y, m not in Y} w_k exp(s_m - s_k) per row: the double sum is a product."""
    minus_NK = -score_NK
    if weight_K is not None:
        least = torch.finfo(score_NK.dtype).min  # of a class whose weight is 0
        minus_NK = weight_K.to(score_NK.dtype).log().clamp_min(least) - score_NK
    return _log_sum_exp(score_NK, ~positive_NK) + _log_sum_exp(minus_NK, positive_NK)


def _mean(total: Tensor, count: Tensor) -> Tensor:
    """`total` over the `count` of all ranks, times their number: DDP divides by it again."""
    if dist.size() == 1:
        return total / count.clamp_min(1)
    every = count.clone()
    td.all_reduce(every)
    return total * dist.size() / every.clamp_min(1)
