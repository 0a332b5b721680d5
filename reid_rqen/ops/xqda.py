"""Cross-view quadratic discriminant analysis (XQDA; Liao et al., CVPR 2015, arXiv 1406.4216).

From samples X of one view and Z of another,

    S_I = 1/n_I sum_{same id} (x-z)(x-z)^T + ridge I,   S_E = 1/n_E sum_{other id} (x-z)(x-z)^T,

over all pairs, from class sums, so no pair is formed and the cost is O(n D^2). W holds the
directions whose extra-personal variance exceeds the intra-personal one, and

    d(x, z) = (x-z)^T W M W^T (x-z),   M = (W^T S_I W)^-1 - (W^T S_E W)^-1.

`solver="svd"` takes W from the left singular vectors of S_I^-1 S_E with singular value above 1, as
the authors' and the MARS Matlab code do, although the product is not symmetric; `solver="eigh"`
solves the generalised eigenproblem S_E w = l S_I w and keeps l > 1.

Shapes: N, M samples of the two views, D dimensions, C identities.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.log import InputError
from reid_rqen.ops.distance import Doubles, QuadraticMetric

Labels = NDArray[np.int64]
SOLVERS = ("svd", "eigh")
PAIRINGS = ("halves", "two_cameras")


@dataclass(frozen=True)
class XQDA:
    """Settings of the metric; `fit` learns it.

    Attributes:
        solver: svd (the published code) or eigh.
        ridge: added to the diagonal of S_I.
        pairing: halves, the MARS rule (see `random_halves`), or two_cameras, every sample of the
            smaller camera number against every one of the other.
        seed: of the random halves.
    """

    solver: str = "svd"
    ridge: float = 1e-3
    pairing: str = "halves"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, accepted in (("solver", SOLVERS), ("pairing", PAIRINGS)):
            if getattr(self, name) not in accepted:
                raise InputError(f"xqda.{name}", f"is none of {accepted}", getattr(self, name))
        if self.ridge < 0:
            raise InputError("xqda.ridge", "must not be negative", self.ridge)

    def fit(self, feature_ND: ArrayLike, pid_N: Labels, cam_N: Labels) -> QuadraticMetric:
        """Learn from (N, D) features with their labels.

        Raises:
            InputError: two_cameras with another number of cameras; no pair of one identity, or no
                pair of two identities, across the views.
        """
        feature_ND = np.asarray(feature_ND, np.float64)
        if self.pairing == "halves":
            left, right = random_halves(pid_N, cam_N, self.seed)
        else:
            left, right = two_cameras(cam_N)
        views = feature_ND[left], pid_N[left], feature_ND[right], pid_N[right]
        return fit_xqda(*views, ridge=self.ridge, solver=self.solver)


def random_halves(pid_N: Labels, cam_N: Labels, seed: int) -> tuple[Labels, Labels]:
    """The MARS rule: two random halves of each identity, row by row, where the cameras differ."""
    generator = np.random.default_rng(seed)
    left: list[NDArray] = []
    right: list[NDArray] = []
    for identity in np.unique(pid_N):
        row = generator.permutation(np.flatnonzero(pid_N == identity))
        half = len(row) // 2
        first, second = row[:half], row[half : 2 * half]
        differs = cam_N[first] != cam_N[second]
        left.append(first[differs])
        right.append(second[differs])
    return np.concatenate(left), np.concatenate(right)


def two_cameras(cam_N: Labels) -> tuple[Labels, Labels]:
    """Rows of the first and of the second of exactly two cameras."""
    cameras = np.unique(cam_N)
    if len(cameras) != 2:
        raise InputError("train_cam", "pairing=two_cameras needs 2 cameras", cameras.tolist())
    return np.flatnonzero(cam_N == cameras[0]), np.flatnonzero(cam_N == cameras[1])


def fit_xqda(
    x_ND: Doubles,
    x_pid: Labels,
    z_MD: Doubles,
    z_pid: Labels,
    ridge: float = 1e-3,
    solver: str = "svd",
) -> QuadraticMetric:
    """XQDA from two views; when D > N + M it runs in the span of the samples, which is exact."""
    samples, dimensions = len(x_ND) + len(z_MD), x_ND.shape[1]
    if dimensions > samples:
        basis_DS, inside_SS = np.linalg.qr(np.concatenate([x_ND, z_MD]).T)
        inner = fit_xqda(
            inside_SS.T[: len(x_ND)], x_pid, inside_SS.T[len(x_ND) :], z_pid, ridge, solver
        )
        return inner._replace(projection=basis_DS @ inner.projection)
    intra_DD, extra_DD = covariances(x_ND, x_pid, z_MD, z_pid)
    intra_DD += ridge * np.eye(dimensions)
    try:
        find = _left_singular if solver == "svd" else _generalised
        direction_DR = find(intra_DD, extra_DD)
        inverse_RR = [
            np.linalg.inv(direction_DR.T @ part @ direction_DR) for part in (intra_DD, extra_DD)
        ]
    except np.linalg.LinAlgError as error:
        raise InputError("xqda.ridge", f"{error}; use a larger ridge than", ridge) from error
    return QuadraticMetric(direction_DR, inverse_RR[0] - inverse_RR[1])


def covariances(
    x_ND: Doubles, x_pid: Labels, z_MD: Doubles, z_pid: Labels
) -> tuple[Doubles, Doubles]:
    """Mean outer products of x - z over the pairs of one identity and of two, (D, D) each.

    sum_{same} (x-z)(x-z)^T = sum_x m(x) x x^T + sum_z n(z) z z^T - A^T B - B^T A, where m and n
    count the partners and A, B are the (C, D) class sums; all pairs together are one big class.
    """
    classes, label = np.unique(np.concatenate([x_pid, z_pid]), return_inverse=True)
    x_class, z_class = label[: len(x_pid)], label[len(x_pid) :]
    x_count = np.bincount(x_class, minlength=len(classes))
    z_count = np.bincount(z_class, minlength=len(classes))
    same = int(x_count @ z_count)
    other = len(x_pid) * len(z_pid) - same
    if not same or not other:
        what = "the two views share no pair of " + ("one identity" if not same else "two")
        raise InputError("train_pid", what, f"{len(x_pid)} and {len(z_pid)} samples")
    # centring changes no difference and keeps the subtraction below well conditioned
    centre_D = np.concatenate([x_ND, z_MD]).mean(axis=0)
    x_ND, z_MD = x_ND - centre_D, z_MD - centre_D
    cross_DD = _class_sums(x_ND, x_class, len(classes)).T @ _class_sums(z_MD, z_class, len(classes))
    intra_DD = (x_ND.T * z_count[x_class]) @ x_ND + (z_MD.T * x_count[z_class]) @ z_MD
    intra_DD -= cross_DD + cross_DD.T
    total_DD = len(z_MD) * x_ND.T @ x_ND + len(x_ND) * z_MD.T @ z_MD
    cross_DD = np.outer(x_ND.sum(axis=0), z_MD.sum(axis=0))
    extra_DD = total_DD - cross_DD - cross_DD.T - intra_DD
    return intra_DD / same, extra_DD / other


def _class_sums(value_ND: Doubles, class_N: Labels, classes: int) -> Doubles:
    sum_CD = np.zeros((classes, value_ND.shape[1]))
    np.add.at(sum_CD, class_N, value_ND)
    return sum_CD


def _left_singular(intra_DD: Doubles, extra_DD: Doubles) -> Doubles:
    left_DD, value_D, _ = np.linalg.svd(np.linalg.solve(intra_DD, extra_DD))
    return left_DD[:, : max(1, int((value_D > 1).sum()))]


def _generalised(intra_DD: Doubles, extra_DD: Doubles) -> Doubles:
    lower_DD = np.linalg.cholesky(intra_DD)
    half_DD = np.linalg.solve(lower_DD, extra_DD)
    value_D, vector_DD = np.linalg.eigh(np.linalg.solve(lower_DD, half_DD.T))
    kept = max(1, int((value_D > 1).sum()))
    return np.linalg.solve(lower_DD.T, vector_DD[:, ::-1][:, :kept])
