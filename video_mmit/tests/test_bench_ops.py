"""Rows of the operator benchmark compare equal things; result files keep other rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.log import InputError
from video_mmit.benchmarks import bench_ops, results
from video_mmit.benchmarks.bench_ops import KINDS, Kind, problem
from video_mmit.benchmarks.compare import better, compare, stored, table
from video_mmit.benchmarks.peer_interlace import frame_loop, two_shifts
from video_mmit.benchmarks.results import Row, measure, merge, row
from video_mmit.ops.interlace import interlace

KEYS = {"name", "shape", "ours_ms", "peer", "peer_ms", "ratio", "max_abs_diff"}


@dataclass
class Small:
    repeats: int = 1
    full: bool = False
    seed: int = 0


@pytest.mark.parametrize("peer", [two_shifts, frame_loop])
@pytest.mark.parametrize("offset", [0.3, -1.7, 1.0, 9.0, -9.5])
def test_the_peers_compute_the_same(peer: bench_ops.Operator, offset: float) -> None:
    case = problem(32, 3, Kind(4), 0)
    inputs = [case.x.double(), torch.full((2, 4), offset).double(), case.weight.double()]
    leaves = [tensor.requires_grad_() for tensor in inputs]
    results_ = []
    for call in (peer, interlace):
        out = call(*leaves, case.fold)
        gradients = torch.autograd.grad(
            out, leaves, case.upstream.double(), allow_unused=True, materialize_grads=True
        )
        results_.append([out, *gradients])
    torch.testing.assert_close(*results_, rtol=0, atol=1e-10)


def test_every_peer_has_a_forward_and_a_backward_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_ops, "SHAPES", ((32, 3),) * 3)
    found = list(bench_ops.rows(Small()))
    assert all(KEYS <= set(entry) for entry in found)
    measured = [entry for entry in found if entry["ours_ms"] is not None]
    assert all(entry["max_abs_diff"] < 1e-4 for entry in measured)
    names = {(entry["name"], entry["peer"]) for entry in measured}
    peers = {peer for name, peer in names if name.startswith("interlace")}
    assert peers == {
        "two shifts and a mix (authors)", "torch.gather, twice", "plain matrix product",
        "loop over frames", "TSM shift, as many channels", "copy of x",
        "copy of x and of the gradient",
    }  # fmt: skip
    both = [peer for peer in peers if not peer.startswith("copy")]
    for title in ("interlace, forward", "interlace, forward and backward"):
        assert all((title, peer) in names for peer in both)
    assert ("TSM shift, forward and backward", "slices and cat") in names
    missing = [entry for entry in found if entry["ours_ms"] is None]
    assert all(entry["note"].startswith("not measured: ") for entry in missing)
    assert any(entry["peer"].startswith("mmcv") for entry in found)


def test_the_full_run_adds_frames_types_and_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_ops, "SHAPES", ((32, 3),))
    labels = {entry["shape"] for entry in bench_ops.shift_rows(Small(full=True))}
    assert labels == {
        "2x8x32x3x3, 8 shifted, float32 NCHW", "2x16x32x3x3, 8 shifted, float32 NCHW",
        "2x8x32x3x3, 8 shifted, bfloat16 NCHW", "2x8x32x3x3, 8 shifted, float32 channels_last",
        "2x8x32x3x3, 8 shifted, bfloat16 channels_last",
    }  # fmt: skip
    for kind in KINDS:
        case = problem(32, 3, kind, 0)
        entry = bench_ops._row("i", case, interlace, "p", two_shifts, 1, True)
        assert entry["max_abs_diff"] < (1e-4 if kind.dtype == torch.float32 else 5e-2)


def test_a_peer_that_differs_stops_the_run() -> None:
    def wrong(x: Tensor, offset: Tensor, weight: Tensor, fold: int) -> Tensor:
        return interlace(x, offset + 0.01, weight, fold)

    case = problem(32, 3, Kind(), 0)
    with pytest.raises(RuntimeError, match="interlace differs from wrong by"):
        bench_ops._row("interlace", case, interlace, "wrong", wrong, 1, False)


def test_both_sides_are_called_in_turns() -> None:
    calls: list[str] = []
    timed = measure(lambda: calls.append("ours"), lambda: calls.append("peer"), 3)
    assert calls == ["ours", "peer"] * 3
    assert timed["ratio"] == pytest.approx(timed["peer_ms"] / timed["ours_ms"])


def test_merge_replaces_a_row_and_keeps_the_others(tmp_path: Path) -> None:
    mine = row("a", "1x2", "loop") | {"ours_ms": 2.0, "peer_ms": 8.0, "ratio": 4.0}
    theirs = row("b", "1x2", "loop", "not measured: no compiler")
    path = merge([mine, theirs], 1, tmp_path)
    assert merge([mine | {"ours_ms": 4.0, "ratio": 2.0}], 1, tmp_path) == path
    report = json.loads(path.read_text())
    assert set(report) == {"hardware", "versions", "rows"}
    assert [(entry["name"], entry["ratio"]) for entry in report["rows"]] == [
        ("a", 2.0),
        ("b", None),
    ]
    text = path.with_suffix(".md").read_text()
    assert "| a | 1x2 | 4 | loop | 8 | 2 |" in text
    assert "not measured: no compiler" in text
    assert merge([mine], 2, tmp_path) != path  # the thread count is part of the name
    path.write_text("[]")
    with pytest.raises(InputError, match="is no result file"):
        merge([mine], 1, tmp_path)


def timed(name: str, ratio: float | None) -> Row:
    return row(name, "1", "peer") | {"ratio": ratio}


def report(*entries: Row) -> dict[str, object]:
    versions = results.versions() | {"torch": "0.1"}
    return {"hardware": results.hardware(1), "versions": versions, "rows": list(entries)}


def test_rows_are_compared_by_ratio(tmp_path: Path) -> None:
    before = report(timed("a", 2.2), timed("b", 2.2), timed("c", None), timed("d", 2.0))
    now = [timed("a", 2.001), timed("b", 1.999), timed("c", 1.0), timed("d", None), timed("e", 1.0)]
    changes = compare(now, before, 0.1)
    assert [change.status for change in changes] == [
        "ok", "worse", "not measured", "no longer measured", "not stored",
    ]  # fmt: skip
    assert "torch 0.1, now" in str(table(changes, before).caption)
    kept = better(now[:2], [timed("a", 1.0), timed("b", 3.0)])
    assert [entry["ratio"] for entry in kept] == [2.001, 3.0]
    path = merge(now, 1, tmp_path)
    assert stored(1, tmp_path) is not None
    assert stored(2, tmp_path) is None
    path.write_text(json.dumps({"hardware": "another", "rows": []}))
    assert stored(1, tmp_path) is None
    path.write_text("[]")
    with pytest.raises(InputError, match="is no result file"):
        stored(1, tmp_path)
