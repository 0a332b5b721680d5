"""The benchmark's problem has the published shape, its rows agree, and disagreement stops it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from video_mmit.benchmarks import bench_metrics
from video_mmit.benchmarks.bench_metrics import all_pairs, comparisons, metric_rows, problem
from video_mmit.losses import wlsep


def test_the_problem_looks_like_multi_moments_in_time() -> None:
    case = problem(2000, 0)
    assert case.score.shape == case.target.shape == (2000, 313)
    assert case.score.dtype == np.float32
    labels = case.target.sum(axis=1)
    assert labels.min() >= 1
    assert labels.mean() == pytest.approx(2.1, abs=0.2)
    count = case.target.sum(axis=0)
    assert count[0] > 20 * np.median(count)
    np.testing.assert_array_equal(problem(2000, 0).score, case.score)


def test_both_sides_of_every_row_agree() -> None:
    rows = list(comparisons(problem(40, 1)))
    assert [(name, peer) for name, _, peer, _ in rows] == [
        ("mmit mAP", "scikit-learn AP per video"),
        ("mmit mAP", "scikit-learn LRAP"),
        ("macro mAP", "scikit-learn AP, macro"),
        ("micro mAP", "scikit-learn AP, micro"),
    ]
    for _, ours, _, theirs in rows:
        assert ours() == pytest.approx(theirs(), abs=1e-12)


def test_the_peer_of_wlsep_is_its_definition() -> None:
    case = problem(5, 2)
    score, target = torch.from_numpy(case.score).double(), torch.from_numpy(case.target).double()
    torch.testing.assert_close(all_pairs(score, target), wlsep(score, target))


def test_rows_have_the_shape_of_the_result_files(monkeypatch: pytest.MonkeyPatch) -> None:
    small = problem(30, 0)
    monkeypatch.setattr(bench_metrics, "problem", lambda videos, seed: small)
    rows = list(metric_rows(1, quick=True))
    assert len(rows) == 6
    keys = {"name", "shape", "ours_ms", "peer", "peer_ms", "ratio", "max_abs_diff"}
    assert all(keys <= set(entry) for entry in rows)
    assert all(entry["ours_ms"] > 0 for entry in rows)
    assert len({(entry["name"], entry["shape"], entry["peer"]) for entry in rows}) == 6
    assert rows[4]["peer_ms"] is None
    assert "two halves" in rows[4]["note"]


def test_a_row_that_disagrees_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_metrics, "mmit_map", lambda score, target: 0.5)
    with pytest.raises(RuntimeError, match="mmit mAP differs from scikit-learn AP per video"):
        next(metric_rows(1, quick=True))
