"""The rows of the margin benchmark compare equal things and count memory."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from face_lfr.benchmarks import bench_margin
from face_lfr.benchmarks.bench_margin import Pair, compare, margin_rows, pairs, peak_mib, problem
from face_lfr.benchmarks.peer_margin import arcface_in_place, arcnegface_eager, arcnegface_loop
from face_lfr.margins import ArcFace, ArcNegFace, NormSoftmax
from face_lfr.tests.margin_loop import loop_loss, with_gradients
from face_lfr.tests.margin_loop import problem as drawn

CPU = torch.device("cpu")
KEYS = {
    "name", "shape", "ours_ms", "peer", "peer_ms", "ratio", "max_abs_diff", "ours_mib", "peer_mib",
}  # fmt: skip


@pytest.mark.parametrize("peer", [arcnegface_loop, arcnegface_eager])
def test_the_arcnegface_peers_are_the_loss(peer: bench_margin.Loss) -> None:
    feature, weight, label = drawn()
    theirs = partial(peer, label_B=label, scale=12.0, m=0.4, alpha=1.3)
    wanted = partial(loop_loss, label=label, margin=ArcNegFace(0.4, 1.3), scale=12.0)
    for got, expected in zip(
        with_gradients(theirs, feature, weight),
        with_gradients(wanted, feature, weight),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_insightface_has_the_identity_gradient() -> None:
    feature, weight, label = drawn()
    kept = (feature * weight[label]).sum(dim=1) > -0.8  # it has nothing for theta + m above pi
    feature, label = feature[kept], label[kept]
    theirs = partial(arcface_in_place, label_B=label, scale=12.0, m=0.5)
    wanted = partial(loop_loss, label=label, margin=ArcFace(0.5, "identity"), scale=12.0)
    for got, expected in zip(
        with_gradients(theirs, feature, weight),
        with_gradients(wanted, feature, weight),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_probabilities_of_the_problem_are_neither_0_nor_1() -> None:
    case = problem(32, 10_000, CPU, 0)
    loss = bench_margin.ours(NormSoftmax())(*case).item()
    assert 0.1 < loss < 10


def test_every_shape_has_a_row_against_every_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_margin, "SHAPES", ((16, 100), (8, 50)))
    monkeypatch.setattr(bench_margin, "QUICK_SHAPES", ((16, 100),))
    found = list(margin_rows(1, CPU))
    assert len(found) == 2 * len(pairs())
    assert len(list(margin_rows(1, CPU, quick=True))) == len(pairs())
    for entry in found:
        assert KEYS <= set(entry)
        assert entry["ratio"] == pytest.approx(entry["peer_ms"] / entry["ours_ms"])
        same = entry["peer"] != "F.cross_entropy, no margin"
        assert (entry["max_abs_diff"] is not None) == same
        if same:
            assert entry["max_abs_diff"] < 1e-4
        else:
            assert entry["note"] == "different losses, costs only"
    assert {entry["peer"] for entry in found} == {
        "loop over the batch (authors)", "whole-matrix operators", "insightface arcface_torch",
        "F.cross_entropy", "F.cross_entropy, no margin",
    }  # fmt: skip


def test_a_row_that_takes_minutes_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_margin, "SHAPES", ((8, 50),))
    monkeypatch.setattr(bench_margin, "LOOP_ENTRIES", 399)
    found = list(margin_rows(1, CPU))
    missing = [entry for entry in found if entry["ours_ms"] is None]
    assert [entry["peer"] for entry in missing] == ["loop over the batch (authors)"]
    assert missing[0]["note"].startswith("not measured: ")
    assert len(found) == len(pairs())


def test_a_peer_that_differs_stops_the_run() -> None:
    def wrong(feature: Tensor, weight: Tensor, label: Tensor) -> Tensor:
        return bench_margin.ours(NormSoftmax())(feature, weight, label) * 1.01

    case = problem(8, 20, CPU, 0)
    pair = Pair("none", bench_margin.ours(NormSoftmax()), "wrong", wrong)
    with pytest.raises(RuntimeError, match=r"none differs from wrong by 0\.0"):
        compare(pair, case, 1)


def test_memory_is_what_lives_at_a_time() -> None:
    kept = torch.zeros(2**18)

    def work() -> None:
        one = kept + 1  # 1 MiB
        two = one * 2  # 2 MiB held
        del one
        two.add_(1).view(2, -1)  # neither takes memory
        _ = two.exp() + 1  # two, its power, the sum: 3 MiB

    assert peak_mib(work, CPU) == pytest.approx(3.0)
    assert peak_mib(lambda: kept.view(-1), CPU) == 0
