"""Quality-weighted set features: region weights over the frames of one set.

arXiv 1711.08766, set aggregation: w_i^r = mu_i^r / sum_j mu_j^r over the frames of one set, for
every region on its own; F^r = sum_i w_i^r f_i^r; the set vector is [F^1; ...; F^R] divided by its
L2 norm. Frames are never normalised one by one.

Letters: S sets, T frames of a set, R regions, C channels, B frames of one update, M sets
among them, N sets in all.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from reid_rqen.ops.distance import full_precision

EPS = 1e-12  # floor of the score sum and of the norm
FRAMES_AT_ONCE = 256  # bounds the weight matrix of frames that all belong to different sets


def _full(x: Tensor) -> Tensor:
    """At least float32: half precision loses sum w = 1."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def score_weights(score_STR: Tensor, valid_ST: Tensor | None = None) -> Tensor:
    """Scores divided by their sum over the frames of the set, (S, T, R), float32 at least.

    Frames that are False in `valid_ST` weigh 0; a set without frames has only zeros.
    """
    with torch.autocast(score_STR.device.type, enabled=False):
        score_STR = _full(score_STR)
        if valid_ST is not None:
            score_STR = score_STR.masked_fill(~valid_ST[..., None], 0.0)
        return score_STR / score_STR.sum(dim=1, keepdim=True).clamp_min(EPS)


def aggregate(feature_STRC: Tensor, score_STR: Tensor, valid_ST: Tensor | None = None) -> Tensor:
    """Weighted mean of the frames of each set and region, (S, R, C), float32 at least.

    Args:
        feature_STRC: frame features.
        score_STR: positive scores; R may be 1, one score per frame for all regions.
        valid_ST: False on padding, whose content then does not matter (NaN included).

    Raises:
        ValueError: the shapes do not fit each other.
    """
    _check(feature_STRC, score_STR, valid_ST)
    with torch.autocast(feature_STRC.device.type, enabled=False):
        feature_STRC = _full(feature_STRC)
        if valid_ST is not None:
            feature_STRC = feature_STRC.masked_fill(~valid_ST[..., None, None], 0.0)
        weight_STR = score_weights(score_STR, valid_ST).to(feature_STRC.dtype)
        weight_STR = weight_STR.expand(feature_STRC.shape[:3])
        return torch.einsum("str,strc->src", weight_STR, feature_STRC)


def set_vector(aggregate_SRC: Tensor) -> Tensor:
    """Regions side by side over one common L2 norm, (S, R*C); all-zero sets stay zero."""
    with torch.autocast(aggregate_SRC.device.type, enabled=False):
        return F.normalize(_full(aggregate_SRC).flatten(1), dim=1, eps=EPS)


def aggregate_reference(
    feature_STRC: Tensor, score_STR: Tensor, valid_ST: Tensor | None = None
) -> Tensor:
    """The equation as loops in float64, (S, R, C): the truth for `aggregate` and the stream."""
    _check(feature_STRC, score_STR, valid_ST)
    sets, frames, regions, channels = feature_STRC.shape
    feature, score = feature_STRC.double(), score_STR.double().expand(sets, frames, regions)
    result = feature.new_zeros(sets, regions, channels)
    for s in range(sets):
        kept = [t for t in range(frames) if valid_ST is None or valid_ST[s, t]]
        for r in range(regions):
            total = sum(score[s, t, r].item() for t in kept)
            for t in kept:
                result[s, r] += score[s, t, r].item() / total * feature[s, t, r]
    return result


def _check(feature_STRC: Tensor, score_STR: Tensor, valid_ST: Tensor | None) -> None:
    if feature_STRC.dim() != 4:
        raise ValueError(f"feature has shape {tuple(feature_STRC.shape)}, need (S, T, R, C)")
    sets, frames, regions, _ = feature_STRC.shape
    if score_STR.shape not in ((sets, frames, regions), (sets, frames, 1)):
        raise ValueError(
            f"score has shape {tuple(score_STR.shape)}, need ({sets}, {frames}, {regions} or 1)"
        )
    if valid_ST is not None and (valid_ST.shape != (sets, frames) or valid_ST.dtype != torch.bool):
        raise ValueError(
            f"valid is {valid_ST.dtype} {tuple(valid_ST.shape)}, need bool ({sets}, {frames})"
        )


class StreamingAggregate:
    """The aggregation of N sets whose frames arrive in any order, chunk by chunk, on any rank.

    Keeps sum mu f and sum mu, so memory is N*R*(C+1) numbers however long the tracklets are.
    The same chunks give the same bits on every run; other chunks, orders or ranks only change the
    rounding. A frame that is NaN spoils the sets that share its chunk.

    Args:
        sets: N.
        regions: R.
        channels: C.
        dtype: of the sums; float32 or float64.
        device: of the sums; every chunk is moved there.
    """

    def __init__(
        self,
        sets: int,
        regions: int,
        channels: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype={dtype}: need torch.float32 or torch.float64")
        self.total_NRC = torch.zeros(sets, regions, channels, dtype=dtype, device=device)
        self.mass_NR = torch.zeros(sets, regions, dtype=dtype, device=device)
        self.frames_N = torch.zeros(sets, dtype=torch.int64, device=device)
        self._merged = False

    def update(self, index_B: Tensor, feature_BRC: Tensor, score_BR: Tensor) -> None:
        """Add frames; `index_B` (int64) says to which set, a negative index drops the row.

        Raises:
            ValueError: an index beyond the last set, shapes that do not fit, or a call after
                `merge_ranks`.
        """
        if self._merged:
            raise ValueError("update after merge_ranks: the sums of all ranks would count twice")
        self._check(index_B, feature_BRC, score_BR)
        device, dtype = self.total_NRC.device, self.total_NRC.dtype
        index_B, feature_BRC, score_BR = (x.to(device) for x in (index_B, feature_BRC, score_BR))
        kept = index_B >= 0
        if not bool(kept.all()):
            index_B, feature_BRC, score_BR = index_B[kept], feature_BRC[kept], score_BR[kept]
        with torch.no_grad(), torch.autocast(device.type, enabled=False), full_precision():
            parts = (x.split(FRAMES_AT_ONCE) for x in (index_B, feature_BRC, score_BR))
            for index, feature, score in zip(*parts, strict=True):
                self._add(index, feature.to(dtype), score.to(dtype))

    def _add(self, index_B: Tensor, feature_BRC: Tensor, score_BR: Tensor) -> None:
        target_M, slot_B = index_B.unique(return_inverse=True)
        weight_RMB = feature_BRC.new_zeros(feature_BRC.shape[1], len(target_M), len(index_B))
        column_B = torch.arange(len(index_B), device=index_B.device)
        weight_RMB[:, slot_B, column_B] = score_BR.expand(-1, len(weight_RMB)).T
        # One matrix product per region weighs and sums in one pass, in an order of its own choice
        # that is always the same; `index_add_` on CUDA is not, and on a CPU it is slower.
        self.total_NRC[target_M] += torch.bmm(weight_RMB, feature_BRC.transpose(0, 1)).transpose(
            0, 1
        )
        self.mass_NR[target_M] += weight_RMB.sum(dim=2).T
        self.frames_N[target_M] += torch.bincount(slot_B)

    def merge(self, other: "StreamingAggregate") -> None:
        """Add the sums of another stream over the same N sets."""
        if other.total_NRC.shape != self.total_NRC.shape:
            raise ValueError(
                f"other has shape {tuple(other.total_NRC.shape)}, "
                f"need {tuple(self.total_NRC.shape)}"
            )
        self.total_NRC += other.total_NRC.to(self.total_NRC)
        self.mass_NR += other.mass_NR.to(self.mass_NR)
        self.frames_N += other.frames_N.to(self.frames_N)

    def merge_ranks(self) -> None:
        """Sum over all ranks, in place (collective); nothing happens without a process group."""
        if dist.is_initialized() and not self._merged:
            for sums in (self.total_NRC, self.mass_NR, self.frames_N):
                dist.all_reduce(sums)
            self._merged = True

    def vectors(self) -> Tensor:
        """Set vectors (N, R*C) of unit norm.

        Raises:
            ValueError: a set received no frame.
        """
        missing = (self.frames_N == 0).nonzero().flatten()
        if len(missing):
            raise ValueError(
                f"{len(missing)} of {len(self.frames_N)} sets have no frame, "
                f"first index {int(missing[0])}"
            )
        return set_vector(self.total_NRC / self.mass_NR.clamp_min(EPS)[..., None])

    def _check(self, index_B: Tensor, feature_BRC: Tensor, score_BR: Tensor) -> None:
        sets, regions, channels = self.total_NRC.shape
        rows = len(index_B)
        if feature_BRC.shape != (rows, regions, channels) or score_BR.shape not in {
            (rows, regions),
            (rows, 1),
        }:
            raise ValueError(
                f"feature {tuple(feature_BRC.shape)} and score {tuple(score_BR.shape)}: need "
                f"({rows}, {regions}, {channels}) and ({rows}, {regions} or 1)"
            )
        if rows and int(index_B.max()) >= sets:
            raise ValueError(f"index {int(index_B.max())} is beyond the last of {sets} sets")
