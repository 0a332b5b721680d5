"""Result files keep other people's rows, and the benchmark's problems have the published sizes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from common.log import InputError
from reid_rqen.benchmarks import results
from reid_rqen.benchmarks.__main__ import BenchConfig, run
from reid_rqen.benchmarks.peer_aggregate import vectors_by_loop
from reid_rqen.benchmarks.problems import clustered, lpw_labels, mars_labels, mars_lengths
from reid_rqen.ops.aggregate import aggregate_reference, set_vector


def test_merge_replaces_a_row_and_keeps_the_others(tmp_path: Path) -> None:
    mine = results.row("a", "1x2", "loop") | {"ours_ms": 2.0, "peer_ms": 8.0, "ratio": 4.0}
    theirs = results.row("b", "1x2", "loop", "not measured: no compiler")
    path = results.merge([mine, theirs], 1, tmp_path)
    again = results.merge([mine | {"ours_ms": 4.0, "ratio": 2.0}], 1, tmp_path)
    assert again == path
    report = json.loads(path.read_text())
    assert set(report) == {"hardware", "versions", "rows"}
    assert [(entry["name"], entry["ratio"]) for entry in report["rows"]] == [
        ("a", 2.0),
        ("b", None),
    ]
    text = path.with_suffix(".md").read_text()
    assert "| a | 1x2 | 4 | loop | 8 | 2 |" in text
    assert "not measured: no compiler" in text


def test_thread_counts_have_files_of_their_own(tmp_path: Path) -> None:
    paths = {results.merge([results.row("a", "1", "p")], count, tmp_path) for count in (1, 2)}
    assert len(paths) == 2
    assert all(path.stem == results.slug(path.stem) for path in paths)


def test_a_broken_result_file_is_named(tmp_path: Path) -> None:
    path = results.merge([results.row("a", "1", "p")], 1, tmp_path)
    path.write_text("[]")
    with pytest.raises(InputError, match="is no result file"):
        results.merge([results.row("a", "1", "p")], 1, tmp_path)


def test_both_sides_are_called_in_turns() -> None:
    calls: list[str] = []
    timed = results.measure(lambda: calls.append("ours"), lambda: calls.append("peer"), 3)
    assert calls == ["ours", "peer"] * 3
    assert timed["ratio"] == pytest.approx(timed["peer_ms"] / timed["ours_ms"])


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(InputError, match="groups: must be some of"):
        run(BenchConfig(groups=["speed"]))
    with pytest.raises(InputError, match="must be positive"):
        run(BenchConfig(repeats=0))
    with pytest.raises(InputError, match=r"tracks_test_info\.mat: no such file"):
        mars_lengths("nowhere", 0)


def test_problems_have_the_published_sizes() -> None:
    lpw, mars, length = lpw_labels(0), mars_labels(None, 0), mars_lengths(None, 0)
    assert (len(lpw.query_pid), len(lpw.gallery_pid)) == (756, 1072)
    assert np.isin(lpw.gallery_pid, lpw.query_pid).all()
    assert (len(mars.query_pid), len(mars.gallery_pid)) == (1980, 11310)
    pairs = np.stack([mars.query_pid, mars.query_cam])
    assert len(np.unique(pairs, axis=1).T) >= 1900
    assert (mars.gallery_pid == 0).sum() == 3248
    assert np.median(length) == pytest.approx(30, abs=2)
    assert length.mean() == pytest.approx(56, abs=3)
    assert (length.min(), length.max()) >= (2, 500)


def test_the_aggregation_peer_follows_the_equation() -> None:
    generator = torch.Generator().manual_seed(0)
    feature, score = torch.rand(2, 3, 2, 5, generator=generator), torch.rand(2, 3, 2)
    want = set_vector(aggregate_reference(feature, score))
    got = vectors_by_loop([3, 3], feature.flatten(0, 1), score.flatten(0, 1))
    torch.testing.assert_close(got, want.float())


def test_clustered_features_are_unit_and_grouped() -> None:
    pid = np.array([1, 1, 2, 0, 0])
    feature = clustered(pid, 512, 0)
    np.testing.assert_allclose(np.linalg.norm(feature, axis=1), 1, atol=1e-6)
    cosine = feature @ feature.T
    assert cosine[0, 1] > 0.15 > max(cosine[0, 2], cosine[3, 4])
