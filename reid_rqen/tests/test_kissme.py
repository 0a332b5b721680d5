"""KISSME equals its formula over listed pairs and is never negative."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from common.log import InputError
from reid_rqen.ops.kissme import (
    KISSME,
    clip_negative,
    matching_pairs,
    other_pairs,
    pair_covariance,
    principal_axes,
)


def people(seed: int, count: int = 20) -> tuple[NDArray, NDArray, NDArray]:
    rng = np.random.default_rng(seed)
    pid = np.repeat(np.arange(count), 6)
    cam = np.tile([1, 1, 2, 2, 3, 3], count)
    centre = rng.standard_normal((count, 8)) * np.array([4, 4, 0, 0, 0, 0, 0, 0])
    return centre[pid] + rng.standard_normal((len(pid), 8)), pid, cam


def test_matching_pairs_are_all_cross_camera_pairs_once() -> None:
    _, pid, cam = people(0, count=4)
    left, right = matching_pairs(pid, cam)
    expected = {
        (i, j)
        for i in range(len(pid))
        for j in range(i + 1, len(pid))
        if pid[i] == pid[j] and cam[i] != cam[j]
    }
    assert len(left) == len(expected)
    assert set(zip(left.tolist(), right.tolist(), strict=True)) == expected


def test_other_pairs_differ_in_both_labels_and_follow_the_seed() -> None:
    _, pid, cam = people(1)
    left, right = pair = other_pairs(pid, cam, 500, seed=3)
    assert pair.shape == (2, 500)
    assert ((pid[left] != pid[right]) & (cam[left] != cam[right])).all()
    np.testing.assert_array_equal(pair, other_pairs(pid, cam, 500, seed=3))
    assert not np.array_equal(pair, other_pairs(pid, cam, 500, seed=4))


def test_pair_covariance_is_the_mean_outer_product() -> None:
    feature, pid, cam = people(2, count=3)
    pair = matching_pairs(pid, cam)
    want = np.mean(
        [np.outer(feature[i] - feature[j], feature[i] - feature[j]) for i, j in pair.T], 0
    )
    np.testing.assert_allclose(pair_covariance(feature, pair, chunk=7), want, atol=1e-12)


def test_the_metric_is_the_clipped_difference_of_inverses() -> None:
    feature, pid, cam = people(3)
    metric = KISSME(components=5, seed=2).fit(feature, pid, cam)
    reduced = (feature - feature.mean(axis=0)) @ principal_axes(feature, 5)
    match = matching_pairs(pid, cam)
    other = other_pairs(pid, cam, match.shape[1], seed=2)
    inverse = []
    for left, right in (match, other):
        difference = reduced[left] - reduced[right]
        inverse.append(np.linalg.inv(difference.T @ difference / len(difference)))
    value, vector = np.linalg.eigh(inverse[0] - inverse[1])
    want = vector @ np.diag(np.maximum(value, 0)) @ vector.T
    np.testing.assert_allclose(metric.kernel, want, atol=1e-9)
    assert metric.projection.shape == (8, 5)


def test_distances_are_never_negative_and_separate_identities() -> None:
    feature, pid, cam = people(4)
    distance = KISSME(seed=1).fit(feature, pid, cam).distance(feature, feature)
    assert distance.min() > -1e-9
    same = (pid[:, None] == pid) & ~np.eye(len(pid), dtype=bool)
    assert distance[same].mean() < 0.5 * distance[pid[:, None] != pid].mean()


def test_principal_axes_follow_the_variance() -> None:
    rng = np.random.default_rng(5)
    feature = rng.standard_normal((200, 4)) * np.array([0.1, 3.0, 0.2, 1.0]) + 7
    axes = principal_axes(feature, 2)
    np.testing.assert_allclose(np.abs(axes).argmax(axis=0), [1, 3])
    assert principal_axes(feature[:3], 10).shape == (4, 2)


def test_clip_negative_leaves_a_positive_matrix_alone() -> None:
    rng = np.random.default_rng(6)
    root = rng.standard_normal((4, 4))
    np.testing.assert_allclose(clip_negative(root @ root.T), root @ root.T, atol=1e-12)
    assert np.linalg.eigvalsh(clip_negative(-np.eye(3))).max() == 0


def test_bad_settings_and_labels_are_refused() -> None:
    feature, pid, cam = people(7)
    with pytest.raises(InputError, match=r"kissme\.components"):
        KISSME(components=0)
    with pytest.raises(InputError, match=r"kissme\.ridge"):
        KISSME(ridge=-1.0)
    with pytest.raises(InputError, match="seen by two cameras"):
        KISSME().fit(feature, pid, np.ones_like(cam))
    with pytest.raises(InputError, match="too few pairs"):
        KISSME().fit(feature, np.zeros_like(pid), cam)
    flat = np.pad(feature[:12], ((0, 0), (0, 30)))
    with pytest.raises(InputError, match="singular; lower components or raise ridge"):
        KISSME().fit(flat, pid[:12], cam[:12])
    assert KISSME(ridge=1e-3).fit(flat, pid[:12], cam[:12]).kernel.shape == (11, 11)
