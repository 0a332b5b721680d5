"""KISSME metric (Koestinger et al., CVPR 2012) after PCA, as the MARS Matlab code runs it.

M = S_match^-1 - S_nonmatch^-1 with both covariances of the differences of listed pairs; negative
eigenvalues are cut to 0, so distances are never negative. Matching pairs are all pairs of one
identity across two cameras; as many pairs of two identities across two cameras are drawn.

Shapes: N samples, D dimensions, R principal components, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.log import InputError
from reid_rqen.ops.distance import Doubles, QuadraticMetric

Labels = NDArray[np.int64]
WORST_CONDITION = 1e12


@dataclass(frozen=True)
class KISSME:
    """Settings; `fit` learns the metric.

    Attributes:
        components: principal components kept (200 in the MARS code), at most N - 1 and D.
        ridge: added to both covariances' diagonals; 0 in the published code.
        seed: of the drawn pairs of two identities.
        chunk: pairs whose differences are in memory at a time.
    """

    components: int = 200
    ridge: float = 0.0
    seed: int = 0
    chunk: int = 16384

    def __post_init__(self) -> None:
        for name in ("components", "chunk"):
            if getattr(self, name) < 1:
                raise InputError(f"kissme.{name}", "must be 1 or more", getattr(self, name))
        if self.ridge < 0:
            raise InputError("kissme.ridge", "must not be negative", self.ridge)

    def fit(self, feature_ND: ArrayLike, pid_N: Labels, cam_N: Labels) -> QuadraticMetric:
        """Learn from (N, D) features with their labels.

        Raises:
            InputError: no pair across cameras, or a covariance that cannot be inverted.
        """
        feature_ND = np.asarray(feature_ND, np.float64)
        axis_DR = principal_axes(feature_ND, self.components)
        reduced_NR = feature_ND @ axis_DR  # the mean cancels in every difference
        match_2P = matching_pairs(pid_N, cam_N)
        other_2P = other_pairs(pid_N, cam_N, match_2P.shape[1], self.seed)
        kernel_RR = self._inverse(reduced_NR, match_2P, "matching")
        kernel_RR = kernel_RR - self._inverse(reduced_NR, other_2P, "non-matching")
        return QuadraticMetric(axis_DR, clip_negative(kernel_RR))

    def _inverse(self, value_NR: Doubles, pair_2P: Labels, name: str) -> Doubles:
        covariance_RR = pair_covariance(value_NR, pair_2P, self.chunk)
        covariance_RR += self.ridge * np.eye(len(covariance_RR))
        if np.linalg.cond(covariance_RR) > WORST_CONDITION:
            what = f"the covariance of {pair_2P.shape[1]} {name} pairs is singular"
            raise InputError(
                "kissme", f"{what}; lower components or raise ridge", len(covariance_RR)
            )
        return np.asarray(np.linalg.inv(covariance_RR), np.float64)


def principal_axes(feature_ND: Doubles, components: int) -> Doubles:
    """(D, R) axes of largest variance; R = min(components, N - 1, D)."""
    kept = max(1, min(components, len(feature_ND) - 1, feature_ND.shape[1]))
    axis_RD: Doubles = np.linalg.svd(feature_ND - feature_ND.mean(axis=0), full_matrices=False)[2]
    return axis_RD[:kept].T


def matching_pairs(pid_N: Labels, cam_N: Labels) -> Labels:
    """(2, P) rows of every pair of one identity seen by two cameras."""
    pairs = []
    for identity in np.unique(pid_N):
        row = np.flatnonzero(pid_N == identity)
        left, right = np.triu_indices(len(row), k=1)
        differs = cam_N[row[left]] != cam_N[row[right]]
        pairs.append(np.stack([row[left][differs], row[right][differs]]))
    pair_2P = np.concatenate(pairs, axis=1)
    if not pair_2P.size:
        raise InputError("train_cam", "no identity is seen by two cameras", np.unique(cam_N))
    return pair_2P


def other_pairs(pid_N: Labels, cam_N: Labels, count: int, seed: int) -> Labels:
    """(2, count) random rows of two identities and two cameras, with replacement.

    Candidates that do not qualify are drawn again; 1,000 rounds without `count` hits mean that
    there is hardly such a pair.
    """
    generator = np.random.default_rng(seed)
    found: list[Labels] = []
    missing = count
    for _ in range(1000):
        draw_2P = generator.integers(len(pid_N), size=(2, count))
        fits = (pid_N[draw_2P[0]] != pid_N[draw_2P[1]]) & (cam_N[draw_2P[0]] != cam_N[draw_2P[1]])
        found.append(draw_2P[:, fits][:, :missing])
        missing -= found[-1].shape[1]
        if not missing:
            return np.concatenate(found, axis=1)
    what = "too few pairs of two identities across two cameras; missing"
    raise InputError("train_pid", what, missing)


def pair_covariance(value_NR: Doubles, pair_2P: Labels, chunk: int = 16384) -> Doubles:
    """(R, R) mean outer product of the differences of the listed pairs."""
    sum_RR = np.zeros((value_NR.shape[1],) * 2)
    for start in range(0, pair_2P.shape[1], chunk):
        left, right = pair_2P[:, start : start + chunk]
        difference_PR = value_NR[left] - value_NR[right]
        sum_RR += difference_PR.T @ difference_PR
    return sum_RR / pair_2P.shape[1]


def clip_negative(kernel_RR: Doubles) -> Doubles:
    """The closest positive semi-definite matrix."""
    value_R, vector_RR = np.linalg.eigh((kernel_RR + kernel_RR.T) / 2)
    return (vector_RR * value_R.clip(min=0)) @ vector_RR.T
