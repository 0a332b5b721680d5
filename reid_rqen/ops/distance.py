"""Distances as signed squared Euclid distances between points, block by block.

Cosine, Euclid and every quadratic form d(x, z) = (x-z)^T W M W^T (x-z), M symmetric, become

    d(i, j) = n_i + n_j - 2 <s * y_i, y_j>,   n_i = <s * y_i, y_i>,   s in {-1, 1}^R,

after one linear map, so ranking and re-ranking need one matrix product per block and nothing of
size rows x rows x dimensions. M = E diag(m) E^T gives y = x W E sqrt|m| and s = sign(m).

Shapes: N rows, D feature dimensions, R mapped dimensions, B rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional

from common.log import InputError

Doubles = NDArray[np.float64]


class Points(NamedTuple):
    """Mapped features: value (N, R), sign (R,) of the coordinates, norm (N,) = n above."""

    value: Tensor
    sign: Tensor
    norm: Tensor

    def rows(self, index: slice | Tensor) -> Points:
        """The same metric on a part of the rows."""
        return Points(self.value[index], self.sign, self.norm[index])


class QuadraticMetric(NamedTuple):
    """d(x, z) = (x-z)^T W M W^T (x-z) with W = projection (D, R), M = kernel (R, R).

    Both are float64. M may be indefinite, so distances may be negative.
    """

    projection: Doubles
    kernel: Doubles

    def points(self, feature_ND: Tensor) -> Points:
        """Map (N, D) features; the result has their dtype and device."""
        if feature_ND.shape[1] != len(self.projection):
            what = f"the metric was learned on {len(self.projection)} dimensions, not on"
            raise InputError("feature", what, feature_ND.shape[1])
        value_R, vector_RR = np.linalg.eigh((self.kernel + self.kernel.T) / 2)
        map_DR = self.projection @ (vector_RR * np.sqrt(np.abs(value_R)))
        sign_R = torch.from_numpy(np.where(value_R < 0, -1.0, 1.0)).to(feature_ND)
        return _with_norm(feature_ND @ torch.from_numpy(map_DR).to(feature_ND), sign_R)

    def distance(self, x_ND: ArrayLike, z_MD: ArrayLike) -> Doubles:
        """(N, M) distances in float64."""
        x_NR = np.asarray(x_ND, np.float64) @ self.projection
        z_MR = np.asarray(z_MD, np.float64) @ self.projection
        norm_N = np.einsum("nr,rs,ns->n", x_NR, self.kernel, x_NR)
        norm_M = np.einsum("mr,rs,ms->m", z_MR, self.kernel, z_MR)
        return norm_N[:, None] + norm_M - 2 * x_NR @ self.kernel @ z_MR.T


def cosine_points(feature_ND: Tensor) -> Points:
    """Unit vectors: the squared distance is 2 - 2 cos; a zero vector stays zero."""
    unit_ND = functional.normalize(feature_ND, dim=1)
    return Points(unit_ND, unit_ND.new_ones(unit_ND.shape[1]), unit_ND.new_ones(len(unit_ND)))


def euclid_points(feature_ND: Tensor) -> Points:
    """The features themselves."""
    return _with_norm(feature_ND, feature_ND.new_ones(feature_ND.shape[1]))


def _with_norm(value_NR: Tensor, sign_R: Tensor) -> Points:
    return Points(value_NR, sign_R, torch.einsum("nr,r,nr->n", value_NR, sign_R, value_NR))


def ranking_block(query: Points, gallery: Points, out: Tensor | None = None) -> Tensor:
    """(B, G) distances up to a constant per query, which no ranking sees; `out` is reused.

    Without n_q, and with n_g shifted to start at 0, unit vectors are compared by their inner
    product alone: adding 1 first would round close ones together and create ties.
    """
    offset_G = gallery.norm - gallery.norm.min()
    signed_BR = query.value * query.sign
    return torch.addmm(offset_G, signed_BR, gallery.value.T, alpha=-2, out=out)


def distance_block(rows: Points, columns: Points, out: Tensor | None = None) -> Tensor:
    """(B, N) distances, in `out` when given; never negative when no sign is."""
    distance_BN = torch.mm(rows.value * rows.sign, columns.value.T, out=out).mul_(-2)
    distance_BN += columns.norm
    distance_BN += rows.norm[:, None]
    return distance_BN.clamp_min_(0) if bool((rows.sign > 0).all()) else distance_BN


def pair_distance(points: Points, left_P: Tensor, right_P: Tensor, chunk: int = 1024) -> Tensor:
    """(P,) distances of listed pairs of rows, `chunk` pairs in memory at a time."""
    distance_P = points.norm[left_P] + points.norm[right_P]
    gathered = [points.value.new_empty(chunk, points.value.shape[1]) for _ in range(2)]
    for start in range(0, len(left_P), chunk):
        part = slice(start, min(start + chunk, len(left_P)))
        own_PR, other_PR = (
            torch.index_select(points.value, 0, side[part], out=buffer[: part.stop - start])
            for side, buffer in zip((left_P, right_P), gathered, strict=True)
        )
        distance_P[part] -= 2 * torch.einsum("pr,pr->p", own_PR.mul_(points.sign), other_PR)
    return distance_P.clamp_min_(0) if bool((points.sign > 0).all()) else distance_P


def block_buffer(points: Points, rows: int) -> Tensor:
    """Memory for `rows` x len(points) distances, to be filled again and again.

    A block that is freed while small results are kept leaves a hole that the next block does not
    fit: a process that allocates anew grows by one block per step.
    """
    return points.value.new_empty(rows, len(points.norm))


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 products in float32 (no TF32, no bfloat16 passes) inside; restores the setting."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
