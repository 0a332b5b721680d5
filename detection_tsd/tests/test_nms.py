"""Suppression against literal loops, and the best pairs against all pairs."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor

from detection_tsd import boxes, nms
from detection_tsd.nms import Selected, adjusted, hard, hard_nms_topk, select, soft


def crowd(count: int, seed: int, labels: int = 3, steps: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Overlapping boxes with scores; with `steps` there are only that many different scores."""
    maker = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, 8, (count, 2), generator=maker) * 2
    side = torch.randint(2, 12, (count, 2), generator=maker) * 2
    score = torch.rand(count, generator=maker)
    if steps:
        score = (score * steps).ceil() / steps
    label = torch.randint(1, labels + 1, (count,), generator=maker)
    return torch.cat((corner, corner + side), dim=1).float(), score, label


def pair_iou(a: list[float], b: list[float], plus: float) -> float:
    width = max(min(a[2], b[2]) - max(a[0], b[0]) + plus, 0.0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]) + plus, 0.0)
    first, second = ((c[2] - c[0] + plus) * (c[3] - c[1] + plus) for c in (a, b))
    return width * height / (first + second - width * height)


def loop_hard(box: Tensor, score: Tensor, label: Tensor, iou: float, plus: float) -> list[int]:
    rows, kept = box.tolist(), []
    for index in sorted(range(len(rows)), key=lambda index: (-float(score[index]), index)):
        rivals = [other for other in kept if label[other] == label[index]]
        if all(pair_iou(rows[index], rows[other], plus) <= iou for other in rivals):
            kept.append(index)
    return kept


def loop_soft(
    box: Tensor, score: Tensor, label: Tensor, kind: str, iou: float, sigma: float, least: float
) -> tuple[list[int], list[float]]:
    """The paper's figure: take the best, lower the others of its class, drop the low ones."""
    rows, left = box.tolist(), dict(enumerate(score.double().tolist()))
    index, scores = [], []
    while left:
        best = max(left, key=lambda one: (left[one], float(score[one]), -one))
        value = left.pop(best)
        if value < least:
            break
        index.append(best)
        scores.append(value)
        for other in left:
            overlap = pair_iou(rows[best], rows[other], 0.0)
            if label[other] != label[best]:
                continue
            if kind == "gaussian":
                left[other] *= math.exp(-(overlap**2) / sigma)
            elif overlap > iou:
                left[other] *= 1 - overlap
    return index, scores


@pytest.mark.parametrize("plus", [0.0, 1.0])
@pytest.mark.parametrize("steps", [0, 5, 1])
def test_hard_suppression_equals_the_loop(steps: int, plus: float) -> None:
    for seed in range(5):
        box, score, label = crowd(80, seed, steps=steps)
        kept = hard(box, score, label, 0.5, plus=plus)
        expected = loop_hard(box, score, label, 0.5, plus)
        assert kept.index_D.tolist() == expected
        assert torch.equal(kept.score_D, score[expected])
        assert hard(box, score, label, 0.5, plus=plus, limit=7).index_D.tolist() == expected[:7]
        assert 10 < len(expected) < 70


def test_classes_moved_apart_in_one_call_keep_the_same_boxes() -> None:
    for seed in range(10):
        box, score, label = crowd(200, seed, labels=500, steps=4)
        order = score.argsort(descending=True, stable=True)
        apart = torch.rand(200, 4, generator=torch.Generator().manual_seed(seed)) * (seed % 2)
        given = box[order] + apart, label[order] % 9 * 62  # whole pixels in every other round
        expected = nms._per_class(*given, 0.5)
        assert torch.equal(nms._moved_apart(*given, 0.5), expected)


def test_an_overlap_equal_to_the_threshold_stays() -> None:
    box = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 5.0]])
    score, label = torch.tensor([0.9, 0.8]), torch.tensor([1, 1])
    assert len(hard(box, score, label, 0.5).index_D) == 2
    assert len(hard(box, score, label, 0.499).index_D) == 1


@pytest.mark.parametrize("kind", ["linear", "gaussian"])
@pytest.mark.parametrize("steps", [0, 3])
def test_soft_suppression_equals_the_loop(kind: str, steps: int) -> None:
    for seed in range(5):
        box, score, label = crowd(50, seed, steps=steps)
        kept = soft(box, score, label, kind=kind, iou=0.4, sigma=0.5, min_score=0.3)
        index, scores = loop_soft(box, score, label, kind, 0.4, 0.5, 0.3)
        assert kept.score_D.tolist() == pytest.approx(scores, abs=1e-5)
        if not steps:  # equals may change places where float32 rounds them apart
            assert kept.index_D.tolist() == index
        assert 10 < len(index) < 50
        part = soft(box, score, label, kind=kind, iou=0.4, sigma=0.5, min_score=0.3, limit=6)
        assert torch.equal(part.index_D, kept.index_D[:6])


def test_a_box_that_equals_a_kept_one_ends_at_nothing() -> None:
    box = torch.tensor([[0.0, 0.0, 8.0, 8.0]]).repeat(3, 1)
    score, label = torch.tensor([0.5, 0.9, 0.7]), torch.tensor([1, 1, 1])
    kept = soft(box, score, label, kind="linear", min_score=0.0)
    assert kept.index_D.tolist() == [1, 2, 0]  # among equals the one that began higher
    assert kept.score_D.tolist() == pytest.approx([0.9, 0.0, 0.0], abs=1e-6)
    assert soft(box, score, label, kind="linear", min_score=1e-3).index_D.tolist() == [1]


def test_adjusted_suppression_is_hard_then_soft() -> None:
    box, score, label = crowd(80, 3)
    first = loop_hard(box, score, label, 0.5, 0.0)
    part = box[first], score[first], label[first]
    index, scores = loop_soft(*part, "gaussian", 0.5, 0.5, 1e-3)
    kept = adjusted(box, score, label, iou=0.5, sigma=0.5)
    assert kept.index_D.tolist() == [first[one] for one in index]
    assert kept.score_D.tolist() == pytest.approx(scores, abs=1e-5)
    assert set(kept.index_D.tolist()) <= set(hard(box, score, label, 0.5).index_D.tolist())
    assert (kept.score_D <= score[kept.index_D]).all()


RULES = {
    "hard": partial(hard, iou=0.5),
    "linear": partial(soft, kind="linear", iou=0.5),
    "gaussian": partial(soft, kind="gaussian"),
    "adjusted": partial(adjusted, iou=0.5),
}


class Head:
    """Scores of R regions and K - 1 classes, with the boxes of every pair."""

    def __init__(self, regions: int, classes: int, seed: int, scores: str = "softmax") -> None:
        maker = torch.Generator().manual_seed(seed)
        corner = torch.rand(regions, 1, 2, generator=maker) * 60
        corner = corner + torch.rand(regions, classes + 1, 2, generator=maker) * 4
        side = torch.rand(regions, classes + 1, 2, generator=maker) * 8 + 20
        self.box_RK4 = torch.cat((corner, corner + side), dim=2)
        logit = torch.randn(regions, classes + 1, generator=maker) * 3
        self.score_RK = logit.softmax(dim=1)
        if scores == "ties":
            self.score_RK = (self.score_RK * 6).round() / 6
        if scores == "equal":
            self.score_RK = torch.full_like(logit, 0.25)
        self.decoded = 0

    def decode(self, roi: Tensor, label: Tensor) -> Tensor:
        self.decoded += len(roi)
        return self.box_RK4[roi, label]

    def all_pairs(self, threshold: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        roi, label = (self.score_RK[:, 1:] > threshold).nonzero(as_tuple=True)
        label = label + 1
        return self.box_RK4[roi, label], self.score_RK[roi, label], label, roi


def per_class_torchvision(head: Head, threshold: float, per_image: int) -> Selected:
    """Full NMS of every class by torchvision, joined in the order of scores, then of pairs."""
    box, score, label, roi = head.all_pairs(threshold)
    kept = []
    for one in label.unique():
        member = (label == one).nonzero()[:, 0]
        rank = torch.linspace(1, 0, len(member), dtype=torch.float32)
        order = member[score[member].argsort(descending=True, stable=True)]
        kept.append(order[torchvision.ops.nms(box[order], rank, 0.5)])
    index = torch.cat(kept).sort().values if kept else label[:0]
    index = index[score[index].argsort(descending=True, stable=True)][:per_image]
    return Selected(box[index], score[index], label[index], roi[index])


def assert_same(found: Selected, expected: Selected) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("scores", ["softmax", "ties", "equal"])
@pytest.mark.parametrize("threshold", [0.0, 0.05])
def test_check_10_the_best_pairs_give_the_detections_of_all(scores: str, threshold: float) -> None:
    for seed in range(6):
        head = Head(60, 12, seed, scores)
        expected = per_class_torchvision(head, threshold, 40)
        assert len(expected.score_D) == 40
        for candidates in (1, 13, 100, 4096):
            found = hard_nms_topk(
                head.score_RK,
                head.decode,
                threshold=threshold,
                per_image=40,
                candidates=candidates,
            )
            assert_same(found, expected)


def test_check_10_fewer_survivors_than_wanted_use_every_pair() -> None:
    head = Head(60, 12, 0, "ties")
    head.box_RK4[:] = head.box_RK4[:1, :1]
    expected = per_class_torchvision(head, 0.0, 40)
    assert len(expected.score_D) == 12
    for candidates in (5, 4096):
        found = hard_nms_topk(head.score_RK, head.decode, per_image=40, candidates=candidates)
        assert_same(found, expected)


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("scores", ["softmax", "ties", "equal"])
def test_every_rule_is_exact_on_the_best_pairs(rule: str, scores: str) -> None:
    for seed in range(3):
        head = Head(40, 8, seed, scores)
        whole = select(head.score_RK, head.decode, RULES[rule], per_image=30, candidates=10_000)
        box, score, label, roi = head.all_pairs(0.0)
        order = score.argsort(descending=True, stable=True)
        kept = RULES[rule](box[order], score[order], label[order], limit=30)
        index = order[kept.index_D]
        assert_same(whole, Selected(box[index], kept.score_D, label[index], roi[index]))
        for candidates in (3, 50):
            part = select(
                head.score_RK, head.decode, RULES[rule], per_image=30, candidates=candidates
            )
            assert_same(part, whole)


def test_only_the_best_pairs_are_decoded() -> None:
    head = Head(200, 20, 1)
    head.box_RK4 += torch.arange(200)[:, None, None] * 50
    hard_nms_topk(head.score_RK, head.decode, per_image=50, candidates=64)
    assert head.decoded == 64


def test_boxes_without_an_area_make_room_for_others() -> None:
    head = Head(30, 4, 2)
    flat = head.score_RK[:, 1:].flatten().topk(10).indices
    head.box_RK4[flat // 4, flat % 4 + 1, 2] = head.box_RK4[flat // 4, flat % 4 + 1, 0]
    found = hard_nms_topk(head.score_RK, head.decode, per_image=10, candidates=10)
    assert len(found.score_D) == 10
    assert boxes.valid_mask(found.box_D4).all()


@pytest.mark.parametrize(("regions", "classes"), [(0, 5), (3, 0), (1, 1)])
def test_small_heads_work(regions: int, classes: int) -> None:
    head = Head(regions, classes, 0)
    for rule in RULES.values():
        found = select(head.score_RK, head.decode, rule)
        assert found.box_D4.shape == (len(found.score_D), 4)
        assert len(found.score_D) == min(regions, 1) * classes
        assert (found.label_D >= 1).all()


@pytest.mark.parametrize("rule", sorted(RULES))
def test_nothing_in_gives_nothing_out(rule: str) -> None:
    kept = RULES[rule](torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert kept.index_D.shape == kept.score_D.shape == (0,)
    assert kept.index_D.dtype == torch.int64


@pytest.mark.parametrize("rule", sorted(RULES))
def test_nan_is_refused_with_its_row(rule: str) -> None:
    box, score, label = crowd(9, 0)
    with pytest.raises(ValueError, match="row 4 of"):
        RULES[rule](box, score.index_fill(0, torch.tensor([4]), np.nan), label)
    with pytest.raises(ValueError, match="row 5 of"):
        RULES[rule](box.index_fill(0, torch.tensor([5]), np.nan), score, label)
    head = Head(6, 3, 0)
    head.score_RK[2, 0] = np.nan
    with pytest.raises(ValueError, match="row 2 of"):
        select(head.score_RK, head.decode, RULES[rule])
    head = Head(6, 3, 0)
    head.box_RK4[3] = np.nan
    with pytest.raises(ValueError, match="is NaN"):
        select(head.score_RK, head.decode, RULES[rule])


def test_arguments_out_of_range_are_refused() -> None:
    head = Head(4, 2, 0)
    with pytest.raises(ValueError, match=r"candidates=0 per_image=100: both must be >= 1"):
        select(head.score_RK, head.decode, RULES["hard"], candidates=0)
    with pytest.raises(ValueError, match="kind='cubic'"):
        soft(*crowd(3, 0), kind="cubic")
    with pytest.raises(ValueError, match=r"sigma=0\.0"):
        soft(*crowd(3, 0), sigma=0.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rule", sorted(RULES))
def test_cuda_gives_the_same_detections(rule: str) -> None:
    head = Head(200, 20, 4)
    expected = select(head.score_RK, head.decode, RULES[rule])
    head.score_RK, head.box_RK4 = head.score_RK.cuda(), head.box_RK4.cuda()
    found = select(head.score_RK, head.decode, RULES[rule])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs)
