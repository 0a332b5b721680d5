"""The rows of inference: what is called equal is equal, and sides that differ are refused."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection import fasterrcnn_resnet50_fpn

from detection_tsd.benchmarks import bench_infer, networks, peer_detector
from detection_tsd.benchmarks.agreement import as_detections, boxes_agree, tensors_agree
from detection_tsd.benchmarks.bench_infer import Bench, Sides, infer_rows, stages
from detection_tsd.benchmarks.networks import (
    Inference,
    Work,
    full_float32,
    like_torchvision,
    pair,
    twin,
    usual,
)
from detection_tsd.benchmarks.peer_detector import NAME
from detection_tsd.benchmarks.results import Row, row
from detection_tsd.data.detection_data import Detections
from detection_tsd.models.detector import join_rois

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = Work(2, (64, 120), 60, 32, (1, 1, 1, 1), 32, 32)
BENCH = Bench(SMALL, "float32", 1, CPU)
FIELDS = {"name", "shape", "ours_ms", "peer", "peer_ms", "ratio", "max_abs_diff"}
STAGES = ["backbone", "RPN", "head", "NMS, threshold 0.05", "NMS, threshold 0.0"]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return [*bench_infer.torchvision_rows(BENCH), *bench_infer.tsd_rows(BENCH)]


def test_the_peer_is_what_torchvision_builds() -> None:
    with torch.device("meta"):
        ours = peer_detector.bare(Work(), 91)
        theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91)
    shapes = {name: tuple(x.shape) for name, x in theirs.state_dict().items()}
    shapes = {name: x for name, x in shapes.items() if "num_batches_tracked" not in name}
    assert {name: tuple(x.shape) for name, x in ours.state_dict().items()} == shapes
    for part in ("score_thresh", "nms_thresh", "detections_per_img"):
        assert getattr(ours.roi_heads, part) == getattr(theirs.roi_heads, part)
    trained = {name for name, x in ours.named_parameters() if x.requires_grad}
    assert "backbone.body.layer2.0.conv1.weight" in trained
    assert not any("layer1" in name or "body.conv1" in name for name in trained)


def test_rows_of_torchvision(rows: list[Row]) -> None:
    names = [entry["name"].removeprefix("inference, R14 sibling, ") for entry in rows[:9]]
    assert names == [*STAGES, *(2 * ["threshold 0.05", "threshold 0.0"])]
    assert [entry["peer"] for entry in rows[:9]] == 7 * [NAME] + 2 * [f"{NAME}, channels_last"]
    assert all(FIELDS <= set(entry) for entry in rows)
    assert all(entry["max_abs_diff"] <= 1e-4 for entry in rows)
    assert rows[0]["shape"] == "2 images of 64x120 in 64x128, 60 proposals, float32"
    assert rows[5]["note"].startswith("100% of the detections in common; ")


def test_rows_of_tsd(rows: list[Row]) -> None:
    assert [entry["name"] for entry in rows[9:]] == [
        "inference, TSD-R14, threshold 0.05", "inference, TSD-R14, threshold 0.0",
        "inference, TSD-R14, head only",
    ]  # fmt: skip
    assert {entry["peer"] for entry in rows[9:]} == {"sibling-R14"}
    for entry in rows[9:]:
        factor = entry["ours_ms"] / entry["peer_ms"]
        assert entry["note"].startswith(f"{factor:.3f} times the sibling's time")
    assert "wanted at most 1.2" in rows[9]["note"]
    assert "wanted" not in rows[11]["note"]


def test_detections_of_random_weights_differ_as_those_of_trained_ones_do() -> None:
    both = pair(SMALL)
    for model in both:
        run = Inference(model, SMALL, CPU, "float32")
        found = run.at_threshold(0.05)()
        assert all(len(one.label_D.unique()) > 10 for one in found)
        assert all(one.score_D[0] > 2 * one.score_D[-1] for one in found)
        assert all(len(one.score_D) == 100 for one in run.at_threshold(0.0)())
    pyramids, proposals = run.regions()
    said = both.tsd.head(*pyramids, join_rois(proposals))
    for shift in (said.offset_c, said.offset_r):
        assert shift is not None
        assert 0.1 < shift.std() < 2.0
        assert shift.std(dim=0).min() > 0.05


def test_a_pair_shares_its_proposals_and_a_twin_its_results() -> None:
    both = pair(SMALL)
    assert both.tsd.backbone is both.sibling.backbone
    assert both.tsd.rpn is both.sibling.rpn
    assert bench_infer.twin_difference(both, BENCH) <= 1e-6
    head: Any = both.sibling.head
    other = twin(head)
    with torch.no_grad():
        other.offset.reg[2].bias.fill_(1.0)
    run = Inference(both.sibling, SMALL, CPU, "float32")
    pyramids, proposals = run.regions()
    roi_R5 = join_rois(proposals)
    sides = [networks.HeadOnly(one, pyramids, roi_R5, run)() for one in (other, head)]
    with pytest.raises(RuntimeError, match="a shift: results differ by"):
        tensors_agree("a shift", *sides, 1e-3)


def test_other_weights_are_refused() -> None:
    with torch.no_grad(), full_float32():
        sides = Sides.of(Inference(like_torchvision(SMALL), SMALL, CPU, "float32"))
        sides.peer.net.roi_heads.box_predictor.cls_score.weight.mul_(1.5)
        found = {stage.name: stage for stage in stages(sides)}
        assert found["RPN"].compare()[1] == "100% of the boxes in common"
        with pytest.raises(RuntimeError, match="head: results differ by"):
            found["head"].compare()
        with pytest.raises(RuntimeError, match="of the boxes are on both sides"):
            boxes_agree("whole", sides.ours(), sides.peer())


def test_a_threshold_leaves_the_modules_where_they_are() -> None:
    run = Inference(like_torchvision(SMALL), SMALL, CPU, "float32")
    other = run.at_threshold(0.05)
    assert other.model.head is run.model.head
    assert (other.model.post.score_threshold, run.model.post.score_threshold) == (0.05, 0.0)
    assert not other.model.training
    assert other.x_B3HW is run.x_B3HW


def detections(box_D4: Tensor, score_D: Tensor) -> Detections:
    return Detections(box_D4, score_D, torch.ones(len(score_D), dtype=torch.int64))


def test_boxes_are_compared_without_their_order() -> None:
    box_D4 = torch.arange(200.0)[:, None] + torch.tensor([0.0, 0.0, 40.0, 50.0])
    score_D = torch.linspace(0.9, 0.1, 200)
    ours, turned = detections(box_D4, score_D), detections(box_D4.flip(0), score_D.flip(0))
    share, gap = boxes_agree("a", [ours], [turned])
    assert (share, gap) == (1.0, 0.0)
    few = detections(box_D4[:196], score_D[:196] + 1e-3)
    share, gap = boxes_agree("a", [ours], [few])
    assert share == 0.98
    assert gap == pytest.approx(1e-3, abs=1e-6)
    fewer, none = detections(box_D4[:190], score_D[:190]), detections(box_D4[:0], score_D[:0])
    for other in (fewer, none):
        with pytest.raises(RuntimeError, match="of the boxes are on both sides"):
            boxes_agree("a", [ours], [other])
    assert boxes_agree("nothing", [none], [none]) == (1.0, 0.0)


def test_proposals_are_compared_like_detections() -> None:
    box_M4 = torch.tensor([[0.0, 0, 10, 10], [20, 0, 40, 10]])
    assert boxes_agree("a", as_detections([box_M4]), as_detections([box_M4.flip(0)])) == (1.0, 0.0)
    with pytest.raises(RuntimeError, match="50"):
        boxes_agree("a", as_detections([box_M4]), as_detections([box_M4[:1]]))


def test_tensors_that_differ_are_refused() -> None:
    one = [torch.tensor([1.0, 100.0])]
    assert tensors_agree("a", one, [torch.tensor([1.0, 100.01])], 1e-3) == pytest.approx(1e-4, 1e-2)
    with pytest.raises(RuntimeError, match="differ by 0"):
        tensors_agree("a", one, [torch.tensor([2.0, 100.0])], 1e-3)
    with pytest.raises(RuntimeError, match="differ by nan"):
        tensors_agree("a", [torch.tensor([torch.nan])], [torch.ones(1)], 1e-3)
    with pytest.raises(RuntimeError, match="shapes"):
        tensors_agree("a", one, [torch.ones(3)], 1e-3)


@pytest.mark.parametrize(
    ("device", "quick", "compile", "work", "rows", "repeats"),
    [
        (CPU, False, False, bench_infer.BASE, 2, 3),
        (CPU, True, True, bench_infer.QUICK, 3, 3),
        (CUDA, False, False, bench_infer.BASE, 3, 50),
    ],
)
def test_rows_of_a_device(
    device: torch.device,
    quick: bool,
    compile: bool,
    work: Work,
    rows: int,
    repeats: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Bench] = []

    def note(bench: Bench) -> Row:
        seen.append(bench)
        return row("a", "1", "peer")

    monkeypatch.setattr(bench_infer, "torchvision_rows", lambda bench: [note(bench)])
    monkeypatch.setattr(bench_infer, "tsd_rows", lambda bench: [note(bench)])
    monkeypatch.setattr(bench_infer, "compiled_row", note)
    assert len(list(infer_rows(3, device, compile, quick, 5))) == rows
    assert set(seen) == {Bench(work._replace(seed=5), usual(device), repeats, device)}


def test_a_missing_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_infer, "no_compiler", lambda: "no compiler")
    found = bench_infer.compiled_row(BENCH)
    assert found["note"] == "not measured: no compiler"
    assert found["ours_ms"] is None


def test_memory_of_a_call_is_seen() -> None:
    def much() -> Tensor:
        return torch.ones(50 * 2**18).sum()  # 50 MiB

    found = networks.peaks(much, lambda: None, CPU)
    if found:  # Linux with glibc
        assert 40 < found["ours_mib"] < 90
        assert found["peer_mib"] < 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rows_on_cuda() -> None:
    bench = Bench(SMALL, usual(CUDA), 1, CUDA)
    found = [*bench_infer.torchvision_rows(bench), *bench_infer.tsd_rows(bench)]
    assert all(entry["ratio"] > 0 for entry in found)
    assert found[-1]["ours_mib"] > 0
