"""The benchmark's problem, its agreement with torchvision, and the rows it gives."""

import pytest
import torch

from detection_tsd import boxes
from detection_tsd.benchmarks import bench_nms
from detection_tsd.benchmarks.bench_nms import all_pairs, difference, nms_rows, problem
from detection_tsd.postprocess import PostProcess


def test_the_problem_is_that_of_a_detector() -> None:
    case = problem(1000, 0)
    assert case.prob_RK.shape == (1000, 81)
    assert case.delta_RK4.shape == (1000, 81, 4)
    assert case.label == "1000x80"
    torch.testing.assert_close(case.prob_RK.sum(dim=1), torch.ones(1000))
    assert boxes.valid_mask(case.box_R4).all()
    over = [(case.prob_RK[:, 1:] > threshold).sum().item() for threshold in (0.0, 0.05)]
    assert over[0] == 80_000
    assert 300 < over[1] < 3000
    torch.testing.assert_close(problem(1000, 0), case, rtol=0, atol=0)


@pytest.mark.parametrize("threshold", [0.0, 0.05])
def test_ours_agrees_with_torchvision_on_all_pairs(threshold: float) -> None:
    case = problem(200, 1)
    found = PostProcess(threshold)(*case, bench_nms.SIZE)
    assert difference(found, all_pairs(case, threshold)) <= bench_nms.LIMIT
    assert len(found.score_D) > 20


def test_rows_have_the_shape_of_the_result_files() -> None:
    rows = list(nms_rows(1, quick=True))
    assert len(rows) == 5
    keys = {"name", "shape", "ours_ms", "peer", "peer_ms", "ratio", "max_abs_diff"}
    assert all(keys <= set(entry) for entry in rows)
    assert all(entry["ours_ms"] > 0 and entry["peer_ms"] > 0 for entry in rows)
    assert len({(entry["name"], entry["shape"], entry["peer"]) for entry in rows}) == 5
    assert [entry["max_abs_diff"] for entry in rows[2:]] == [0.0, 0.0, 0.0]


def test_rows_that_disagree_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    other = all_pairs(problem(100, 3), 0.0)
    monkeypatch.setattr(bench_nms, "all_pairs", lambda case, threshold: other)
    with pytest.raises(RuntimeError, match=r"hard NMS, threshold 0\.0 differs from torchvision"):
        next(nms_rows(1, quick=True))
