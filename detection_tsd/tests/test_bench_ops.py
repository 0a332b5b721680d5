"""Rows of the operator benchmark compare equal things; its inputs are what they say."""

import pytest
import torch

from detection_tsd.benchmarks import bench_ops, peer_pool
from detection_tsd.benchmarks.bench_ops import PEERS, Kind, Peer, label, ours, pool_rows, problem
from detection_tsd.benchmarks.peer_pool import Pooling
from detection_tsd.tests.pool_loop import problem as odd_problem

TINY = Kind("tiny", 9, 2, 8, (96, 160), (4, 8), (8, 90), 18.0, True)
KEYS = {"name", "shape", "ours_ms", "peer", "peer_ms", "ratio", "max_abs_diff"}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_ops, "QUICK_KINDS", (TINY._replace(backward=False), TINY))
    monkeypatch.setattr(bench_ops, "KINDS", (TINY,))


@pytest.mark.parametrize(
    ("peer", "side"),
    [
        (peer_pool.plain_roi_align, None),
        (peer_pool.shifted_roi_align, 1),
        (peer_pool.bins_roi_align, 7),
        (peer_pool.bins_roi_align, None),
        (peer_pool.grid_samples, None),
        (peer_pool.grid_samples, 1),
        (peer_pool.grid_samples, 7),
    ],
)
def test_check_02_the_peers_compute_the_same(peer: bench_ops.Operator, side: int | None) -> None:
    """In float64, with regions and samples outside the maps among them; gradients as well."""
    pyramid, roi, level, offset = odd_problem(size=7)
    roi[:, 3:] = torch.maximum(roi[:, 3:], roi[:, 1:3])
    leaves = [one.clone().requires_grad_() for one in pyramid.maps]
    if side is not None:
        leaves.append(3 * offset[..., :side, :side].contiguous())
        leaves[-1].requires_grad_()
    moved = leaves[2] if side is not None else None
    case = Pooling(leaves[:2], (4, 8), roi, level, moved)
    found = []
    for call in (ours, peer):
        out = call(case)
        gradients = torch.autograd.grad(out, leaves, out.detach(), allow_unused=True)
        found.append([out, *gradients])
    assert len(found[0]) == len(found[1])
    for mine, theirs in zip(*found, strict=True):
        if theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)
    if side is not None:
        assert (found[1][3] is None) == (peer is not peer_pool.grid_samples)


@pytest.mark.usefixtures("small")
def test_every_peer_has_a_row() -> None:
    found = list(pool_rows(1, quick=True))
    assert all(KEYS <= set(entry) for entry in found)
    measured = [entry for entry in found if entry["ours_ms"] is not None]
    missing = [entry for entry in found if entry["ours_ms"] is None]
    assert all(entry["note"].startswith("not measured: ") for entry in missing)
    assert any(entry["peer"].startswith("mmcv") for entry in found)
    names = {(entry["name"], entry["peer"]) for entry in found}
    for peer in PEERS:
        for end in ("forward", "forward and backward"):
            assert (f"{peer.title}, {end}", peer.name) in names
    for entry in measured:
        if entry["max_abs_diff"] is None:
            assert entry["note"].startswith("for scale")
        else:
            assert entry["max_abs_diff"] < 1e-4
    layouts = [entry["shape"].rsplit(" ", 1)[1] for entry in measured]
    assert set(layouts) == {"channels_last", "NCHW"}
    keys = {(entry["name"], entry["shape"], entry["peer"]) for entry in found}
    assert len(keys) == len(found) - len(PEERS)  # both inputs of this test have one name


@pytest.mark.usefixtures("small")
def test_the_full_run_adds_layouts() -> None:
    shapes = {entry["shape"] for entry in pool_rows(1, full=True)}
    wanted = "tiny: 18 regions, 2x8 channels, 96x160, float32"
    assert {f"{wanted} channels_last", f"{wanted} NCHW"} <= shapes


def test_a_peer_that_differs_stops_the_run() -> None:
    def wrong(case: Pooling) -> torch.Tensor:
        return ours(case) + 0.01

    peer = Peer("wrong", "roi_align", wrong, None)
    with pytest.raises(RuntimeError, match="roi_align, forward differs from wrong by 0"):
        bench_ops._row(TINY, problem(TINY, 0), peer, 1, False)


@pytest.mark.parametrize("kind", [*bench_ops.QUICK_KINDS])
def test_the_inputs_are_what_they_say(kind: Kind) -> None:
    case = problem(kind, 0)
    count = kind.regions * kind.images
    assert case.roi_R5.shape == (count, 5)
    assert case.roi_R5[:, 0].int().bincount().tolist() == [kind.regions] * kind.images
    assert case.level_R.bincount().gt(0).sum() >= min(len(kind.strides), 3)
    low, high = case.roi_R5[:, 1:3], case.roi_R5[:, 3:]
    side = high - low
    assert side.min() >= kind.sides[0] * 0.99
    assert side.max() <= kind.sides[1]
    assert low.min() >= 0
    assert (high <= torch.tensor(kind.image[::-1]) + 1e-3).all()
    assert case.offset is not None
    assert case.offset.std().item() == pytest.approx(0.5, abs=0.02)
    assert label(kind, case).startswith(f"{kind.name}: {count} regions, ")
    again = problem(kind, 0)
    assert torch.equal(again.roi_R5, case.roi_R5)
    assert torch.equal(again.maps[0], case.maps[0])
