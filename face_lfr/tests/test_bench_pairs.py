"""The benchmark's problem, its peers against the brute force, and what stops a wrong row."""

import numpy as np
import pytest
import torch

from face_lfr.all_pairs import all_pairs
from face_lfr.benchmarks import bench_pairs
from face_lfr.benchmarks.bench_pairs import (
    against,
    alone,
    alone_row,
    pair_rows,
    peak_mib,
    problem,
    products_row,
)
from face_lfr.benchmarks.peer_pairs import partitioned_pairs, sorted_pairs
from face_lfr.tests.test_all_pairs import brute_force, scikit_learn

CPU = torch.device("cpu")


def test_the_problem_has_clusters_and_distractors() -> None:
    case = problem(1000, 16, 0)
    assert case.shape == "1000x16"
    assert case.features.dtype == np.float32
    counts = np.unique(case.labels, return_counts=True)[1]
    assert counts[0] == 250
    assert set(counts[1:]) == {15}
    np.testing.assert_array_equal(problem(1000, 16, 0).features, case.features)
    positive, negative = brute_force(*case)
    assert positive.mean() > negative.mean() + 0.25


@pytest.mark.parametrize("peer", [sorted_pairs, partitioned_pairs])
def test_peers_agree_with_the_brute_force(peer: bench_pairs.Peer) -> None:
    case, fprs = problem(600, 8, 1), [1e-4, 1e-2, 0.3]
    expected = scikit_learn(*brute_force(*case), fprs)
    np.testing.assert_allclose(peer(*case, fprs), expected, atol=2e-3)
    assert 0 < expected[0] < expected[2]


def test_rows_have_the_shape_of_the_result_files(monkeypatch: pytest.MonkeyPatch) -> None:
    small = problem(1700, 8, 0)
    monkeypatch.setattr(bench_pairs, "problem", lambda rows, width, seed: small)
    monkeypatch.setattr(bench_pairs, "alone_row", lambda *words: {"name": "alone", "words": words})
    rows = list(pair_rows(1, CPU, quick=True))
    assert [entry.get("peer") for entry in rows] == [
        "NumPy, all scores, scikit-learn roc_curve",
        "NumPy, all scores, partition",
        "its matrix products alone",
        None,
    ]
    keys = {"name", "shape", "ours_ms", "peer", "peer_ms", "ratio", "max_abs_diff"}
    for entry in rows[:3]:
        assert keys <= set(entry)
        assert entry["shape"] == "1700x8"
        assert entry["ratio"] == pytest.approx(entry["peer_ms"] / entry["ours_ms"])
    assert rows[0]["max_abs_diff"] <= 1e-4
    assert "million pairs/s" in rows[0]["note"]
    assert 0 < rows[2]["ratio"] < 1
    assert rows[3]["words"] == (40_000, 256, CPU, 0)


def test_a_slow_peer_is_called_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_pairs, "SLOW_S", 0.0)
    calls: list[str] = []

    def peer() -> list[float]:
        calls.append("peer")
        return [0.5]

    def ours() -> list[float]:
        calls.append("ours")
        return [0.5]

    found = against(ours, peer, "peer", 3)
    assert calls == ["peer", "ours", "ours", "ours", "ours"]
    assert found["note"] == "peer timed once"
    assert found["ratio"] == pytest.approx(found["peer_ms"] / found["ours_ms"])


def test_a_row_that_disagrees_is_not_timed() -> None:
    with pytest.raises(RuntimeError, match="all_pairs differs from the peer by 0"):
        against(lambda: [0.5], lambda: [0.6], "the peer", 1)


def test_the_products_are_those_of_the_tiles() -> None:
    found = products_row(problem(1700, 8, 0), CPU, 1)
    assert "GFLOP/s" in found["note"]
    assert found["peer_ms"] > 0


def test_alone_counts_all_pairs() -> None:
    found, case = alone(1700, 8, torch.get_num_threads(), 0, CPU), problem(1700, 8, 0)
    result = all_pairs(*case, bench_pairs.FPRS)
    assert found["pairs"] == result.negatives + result.positives
    assert 50 < found["mib"] <= peak_mib()


@pytest.mark.slow
def test_a_process_of_its_own_reports_its_memory() -> None:
    found = alone_row(2000, 16, CPU, 0)
    assert (found["shape"], found["peer"], found["ratio"]) == ("2000x16", "none", None)
    assert 50 < found["ours_mib"] < 2000
    assert found["ours_ms"] > 0


def test_a_process_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_pairs, "MODULE", "no_such_module")
    with pytest.raises(RuntimeError, match=r"failed: .*No module named no_such_module"):
        alone_row(2000, 16, CPU, 0)
