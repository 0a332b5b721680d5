"""XQDA equals a sum over all pairs and a transcription of the published Matlab code."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from common.log import InputError
from reid_rqen.ops.xqda import XQDA, covariances, fit_xqda, random_halves

Views = tuple[NDArray, NDArray, NDArray, NDArray]


def two_views(seed: int, people: int = 12, dimensions: int = 6, noise: float = 0.5) -> Views:
    """Identity varies in the first two dimensions only; noise in all."""
    rng = np.random.default_rng(seed)
    centre = np.zeros((people, dimensions))
    centre[:, :2] = 3 * rng.standard_normal((people, 2))
    x_pid, z_pid = rng.integers(people, size=50), rng.integers(people, size=40)
    x, z = (
        centre[pid] + noise * rng.standard_normal((len(pid), dimensions)) for pid in (x_pid, z_pid)
    )
    return x, x_pid, z, z_pid


def pair_sums(x: NDArray, x_pid: NDArray, z: NDArray, z_pid: NDArray) -> tuple[NDArray, NDArray]:
    sums, counts = np.zeros((2, x.shape[1], x.shape[1])), [0, 0]
    for left, left_pid in zip(x, x_pid, strict=True):
        for right, right_pid in zip(z, z_pid, strict=True):
            kind = int(left_pid != right_pid)
            sums[kind] += np.outer(left - right, left - right)
            counts[kind] += 1
    return sums[0] / counts[0], sums[1] / counts[1]


def matlab_xqda(
    x: NDArray, x_pid: NDArray, z: NDArray, z_pid: NDArray
) -> tuple[NDArray, NDArray, NDArray]:
    """W, M and the projector onto W, in the order of the statements of XQDA.m."""
    intra, extra = pair_sums(x, x_pid, z, z_pid)
    intra = intra + 0.001 * np.eye(len(intra))
    left, latent, _ = np.linalg.svd(np.linalg.solve(intra, extra))
    left = left[:, np.argsort(-latent)[: max(1, int((latent > 1).sum()))]]
    kernel = np.linalg.inv(left.T @ intra @ left) - np.linalg.inv(left.T @ extra @ left)
    return left, kernel, left @ left.T


def test_check_11_class_sums_equal_pair_sums() -> None:
    views = two_views(0)
    for got, want in zip(covariances(*views), pair_sums(*views), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-8)


def test_check_11_far_from_the_origin_too() -> None:
    x, x_pid, z, z_pid = two_views(1)
    near = covariances(x, x_pid, z, z_pid)
    far = covariances(x + 1e4, x_pid, z + 1e4, z_pid)
    np.testing.assert_allclose(near, far, atol=1e-8)


def test_check_11_svd_equals_the_matlab_code() -> None:
    views = two_views(2)
    direction, kernel, projector = matlab_xqda(*views)
    got = fit_xqda(*views)
    np.testing.assert_allclose(got.projection @ got.projection.T, projector, atol=1e-9)
    want = direction @ kernel @ direction.T
    np.testing.assert_allclose(got.projection @ got.kernel @ got.projection.T, want, atol=1e-7)
    difference = views[0][:5, None] - views[2][None, :7]
    quadratic = np.einsum("ijd,de,ije->ij", difference, want, difference)
    np.testing.assert_allclose(got.distance(views[0][:5], views[2][:7]), quadratic, atol=1e-6)


@pytest.mark.parametrize("solver", ["svd", "eigh"])
def test_check_11_recovers_the_planted_subspace(solver: str) -> None:
    rng = np.random.default_rng(3)
    pid = np.repeat(np.arange(200), 2)
    centre = np.zeros((200, 8))
    centre[:, :2] = 5 * rng.standard_normal((200, 2))
    x, z = (centre[pid] + 0.3 * rng.standard_normal((400, 8)) for _ in range(2))
    metric = fit_xqda(x, pid, z, pid, solver=solver)
    strongest, _ = np.linalg.qr(metric.projection[:, :2])
    assert np.linalg.norm(strongest[:2]) ** 2 == pytest.approx(2, abs=0.01)  # lies in the plane


@pytest.mark.parametrize("solver", ["svd", "eigh"])
def test_check_11_more_dimensions_than_samples(solver: str) -> None:
    rng = np.random.default_rng(4)
    x, x_pid, z, z_pid = two_views(5)
    isometry, _ = np.linalg.qr(rng.standard_normal((150, 6)))
    small = fit_xqda(x, x_pid, z, z_pid, solver=solver)
    large = fit_xqda(x @ isometry.T, x_pid, z @ isometry.T, z_pid, solver=solver)
    np.testing.assert_allclose(
        large.distance(x @ isometry.T, z @ isometry.T), small.distance(x, z), atol=1e-7
    )


def test_eigh_directions_diagonalise_both_covariances() -> None:
    views = two_views(6)
    intra, extra = covariances(*views)
    direction = fit_xqda(*views, solver="eigh").projection
    intra = intra + 1e-3 * np.eye(6)
    np.testing.assert_allclose(
        direction.T @ intra @ direction, np.eye(direction.shape[1]), atol=1e-9
    )
    ratio = direction.T @ extra @ direction
    np.testing.assert_allclose(ratio, np.diag(np.diag(ratio)), atol=1e-9)
    assert (np.diag(ratio) > 1).all()


def test_mars_pairing_crosses_cameras_and_never_reuses_a_row() -> None:
    rng = np.random.default_rng(7)
    pid, cam = rng.integers(9, size=80), rng.integers(3, size=80)
    left, right = random_halves(pid, cam, seed=1)
    assert left.size
    np.testing.assert_array_equal(pid[left], pid[right])
    assert (cam[left] != cam[right]).all()
    assert len(np.unique(np.concatenate([left, right]))) == 2 * len(left)
    again, other = random_halves(pid, cam, seed=1)[0], random_halves(pid, cam, seed=2)[0]
    np.testing.assert_array_equal(left, again)
    assert not np.array_equal(left, other)


@pytest.mark.parametrize("pairing", ["halves", "two_cameras"])
def test_fit_separates_identities(pairing: str) -> None:
    x, x_pid, z, z_pid = two_views(8)
    feature, pid = np.concatenate([x, z]), np.concatenate([x_pid, z_pid])
    cam = np.repeat([1, 2], [len(x), len(z)])
    distance = XQDA(pairing=pairing).fit(feature, pid, cam).distance(x, z)
    same = x_pid[:, None] == z_pid
    assert distance[same].mean() < distance[~same].mean()


def test_bad_settings_and_labels_are_refused() -> None:
    x, x_pid, z, z_pid = two_views(9)
    with pytest.raises(InputError, match=r"xqda\.solver: is none of .*: qz"):
        XQDA(solver="qz")
    with pytest.raises(InputError, match=r"xqda\.pairing"):
        XQDA(pairing="all")
    with pytest.raises(InputError, match=r"xqda\.ridge"):
        XQDA(ridge=-1)
    with pytest.raises(InputError, match="needs 2 cameras"):
        XQDA(pairing="two_cameras").fit(x, x_pid, np.ones(len(x), int))
    with pytest.raises(InputError, match="share no pair of one identity"):
        fit_xqda(x, x_pid, z, z_pid + 100)
    with pytest.raises(InputError, match="share no pair of two"):
        fit_xqda(x, np.zeros_like(x_pid), z, np.zeros_like(z_pid))
    with pytest.raises(InputError, match="larger ridge than: 0"):
        fit_xqda(np.pad(x, ((0, 0), (0, 1))), x_pid, np.pad(z, ((0, 0), (0, 1))), z_pid, ridge=0)
