"""Assignment against the loop over objects, torchvision's matcher, and what a step samples."""

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection._utils import Matcher

from detection_tsd import boxes, matching
from detection_tsd.data.detection_data import Target
from detection_tsd.matching import BETWEEN, NEGATIVE, RoISampler, Sampled, assign, sample


def whole_boxes(count: int, seed: int, size: int = 12) -> Tensor:
    """Boxes on a coarse grid, so that overlaps are often equal."""
    maker = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, size, (count, 2), generator=maker)
    side = torch.randint(1, 6, (count, 2), generator=maker)
    return torch.cat((corner, corner + side), dim=1).float() * 4


def target(gt: Tensor, label: Tensor | None = None) -> Target:
    label = torch.arange(1, len(gt) + 1) if label is None else label
    return Target(gt, label, torch.zeros(0, 4))


def loop_assign(
    iou_MG: Tensor, high: float, low: float, floor: float | None, all_ties: bool
) -> list[int]:
    """The rule one box and one object at a time."""
    rows = iou_MG.tolist()
    matched = []
    for row in rows:
        best = max(row)
        matched.append(row.index(best) if best >= high else -1 if best < low else -2)
    for gt in range(len(rows[0])):
        column = [row[gt] for row in rows]
        if floor is None or max(column) < floor:
            continue
        reached = [box for box, value in enumerate(column) if value == max(column)]
        for box in reached if all_ties else reached[:1]:
            matched[box] = gt
    return matched


@pytest.mark.parametrize("pairs", [2**24, 50])
@pytest.mark.parametrize("all_ties", [True, False])
@pytest.mark.parametrize("floor", [None, 0.0, 0.3, 0.5])
@pytest.mark.parametrize("plus", [0.0, 1.0])
def test_the_rule_equals_the_loop(
    monkeypatch: pytest.MonkeyPatch, floor: float | None, all_ties: bool, pairs: int, plus: float
) -> None:
    monkeypatch.setitem(matching.PAIRS, "cpu", pairs)
    for seed in range(8):
        box, gt = whole_boxes(120, seed), whole_boxes(7, 100 + seed)
        expected = loop_assign(boxes.iou(box, gt, plus), 0.6, 0.3, floor, all_ties)
        assert assign(box, gt, 0.6, 0.3, floor, all_ties, plus=plus).tolist() == expected


def test_the_loop_sees_ties_claims_and_all_three_outcomes() -> None:
    outcomes, claims, ties = set(), 0, 0
    for seed in range(8):
        box, gt = whole_boxes(120, seed), whole_boxes(7, 100 + seed)
        iou_MG = boxes.iou(box, gt)
        with_claims, without = assign(box, gt, 0.6, 0.3, 0.3), assign(box, gt, 0.6, 0.3)
        outcomes |= set(without.clamp(max=0).tolist())
        claims += int((with_claims != without).sum())
        ties += int(((iou_MG == iou_MG.amax(dim=0)).sum(dim=0) > 1).sum())
    assert outcomes == {0, NEGATIVE, BETWEEN}
    assert claims > 5
    assert ties > 5


def test_torchvisions_matcher_is_one_setting_of_the_rule() -> None:
    for seed in range(20):
        box, gt = whole_boxes(80, seed), whole_boxes(5, 200 + seed)
        expected = Matcher(0.7, 0.3, allow_low_quality_matches=True)(boxes.iou(gt, box))
        assert torch.equal(assign(box, gt, 0.7, 0.3, 0.0, own_best=True), expected)


def test_among_objects_that_claim_a_box_the_last_wins() -> None:
    box = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    gt = torch.tensor([[0.0, 0.0, 10.0, 9.0], [0.0, 0.0, 10.0, 8.0], [0.0, 0.0, 10.0, 1.0]])
    assert assign(box, gt, 0.7, 0.3).tolist() == [0]
    assert assign(box, gt, 0.7, 0.3, 0.3).tolist() == [1]
    assert assign(box, gt, 0.7, 0.3, 0.3, own_best=True).tolist() == [0]
    assert assign(box, gt, 0.7, 0.3, 0.1).tolist() == [2]


def test_neither_boxes_nor_objects_are_needed() -> None:
    some, none = whole_boxes(3, 0), torch.zeros(0, 4)
    assert assign(some, none, 0.7, 0.3, 0.3).tolist() == [NEGATIVE] * 3
    assert assign(none, some, 0.7, 0.3, 0.3).shape == (0,)
    assert assign(none, none, 0.7, 0.3, 0.3).dtype == torch.int64


def test_thresholds_that_cross_are_refused() -> None:
    with pytest.raises(ValueError, match=r"low=0\.7 must not exceed high=0\.3"):
        assign(whole_boxes(3, 0), whole_boxes(1, 1), 0.3, 0.7)


class Count(TorchDispatchMode):
    """How many operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_the_work_is_not_a_loop_over_objects() -> None:
    calls = []
    for count in (2, 200):
        with Count() as counted:
            assign(whole_boxes(300, 0), whole_boxes(count, 1), 0.7, 0.3, 0.3)
        calls.append(counted.calls)
    assert calls[0] == calls[1]


def test_the_smallest_keys_win() -> None:
    matched = torch.tensor([0, -1, 1, -2, -1, 0, -1, 2, -1, -1, 0, -2])
    key_M = boxes.random_keys(len(matched), 9)
    positive, negative = sample(matched, 6, 0.5, 9)

    def expected(candidates: list[int], count: int) -> list[int]:
        return sorted(sorted(candidates, key=lambda index: float(key_M[index]))[:count])

    assert positive.tolist() == expected([0, 2, 5, 7, 10], 3)
    assert negative.tolist() == expected([1, 4, 6, 8, 9], 3)


@pytest.mark.parametrize(
    ("matched", "sizes"),
    [([], (0, 0)), ([0] * 9, (4, 0)), ([-1] * 9, (0, 8)), ([-2] * 9, (0, 0)), ([0, -1], (1, 1))],
)
def test_missing_positives_make_room_for_negatives(
    matched: list[int], sizes: tuple[int, int]
) -> None:
    positive, negative = sample(torch.tensor(matched, dtype=torch.int64), 8, 0.5, 1)
    assert (len(positive), len(negative)) == sizes


def test_every_box_is_drawn_about_equally_often() -> None:
    matched = torch.full((40,), -1)
    times = torch.zeros(40)
    for draw in range(2000):
        times[sample(matched, 10, 0.5, boxes.fold_key(0, draw))[1]] += 1
    assert times.sum() == 20_000
    assert float((times - 500).abs().max()) < 5 * (500 * 0.75) ** 0.5


@pytest.fixture
def images() -> tuple[list[Tensor], list[Target]]:
    gts = [whole_boxes(3, 50), torch.zeros(0, 4), whole_boxes(2, 51)]
    proposals = []
    for seed, gt in enumerate(gts):
        near = gt.repeat(6, 1) + torch.randn(6 * len(gt), 4, generator=torch.manual_seed(seed))
        proposals.append(torch.cat((near, whole_boxes(40, 60 + seed))))
    return proposals, [target(gt, torch.arange(4, 4 + len(gt))) for gt in gts]


def draw(images: tuple[list[Tensor], list[Target]], numbers: list[int], **other: object) -> Sampled:
    settings = {"count": 16, "seed": 3} | other
    return RoISampler(**settings)(*images, torch.tensor(numbers))  # type: ignore[arg-type]


def test_rows_say_what_they_are_trained_towards(images: tuple[list[Tensor], list[Target]]) -> None:
    proposals, targets = images
    rows = draw(images, [0, 1, 2])
    image_R = rows.roi_R5[:, 0].long()
    assert rows.roi_R5.dtype == rows.match_R4.dtype == rows.weight_R.dtype == torch.float32
    assert image_R.tolist() == sorted(image_R.tolist())
    assert image_R.bincount().tolist() == [16, 16, 16]
    for image in range(3):
        positive = rows.gt_R[image_R == image] >= 0
        assert positive.tolist() == sorted(positive.tolist(), reverse=True)
        assert positive.sum() == (0 if image == 1 else 4)
    for roi, label, match, gt in zip(*rows[:4], strict=True):
        its = targets[int(roi[0])]
        pool = torch.cat((its.box_G4, proposals[int(roi[0])]))
        assert (pool == roi[1:]).all(dim=1).any()
        iou_G = boxes.iou(roi[None, 1:], its.box_G4)[0]
        if gt >= 0:
            assert label == its.label_G[gt]
            assert torch.equal(match, its.box_G4[gt])
            assert iou_G[gt] >= 0.5
        else:
            assert label == 0
            assert torch.equal(match, roi[1:])
            assert (iou_G < 0.5).all()
    assert torch.equal(rows.weight_R, torch.ones(48))


def test_the_choice_depends_on_seed_draw_and_stage_only(
    images: tuple[list[Tensor], list[Target]],
) -> None:
    proposals, targets = images
    rows = draw(images, [7, 8, 9])
    assert torch.equal(rows.roi_R5, draw(images, [7, 8, 9]).roi_R5)
    alone = draw((proposals[2:], targets[2:]), [9])
    assert torch.equal(alone.roi_R5[:, 1:], rows.roi_R5[32:, 1:])
    torch.manual_seed(99)
    assert torch.equal(rows.roi_R5, draw(images, [7, 8, 9]).roi_R5)
    assert not torch.equal(rows.roi_R5, draw(images, [7, 8, 10]).roi_R5)
    assert not torch.equal(rows.roi_R5, draw(images, [7, 8, 9], seed=4).roi_R5)
    sampler, numbers = RoISampler(count=16, seed=3), torch.tensor([7, 8, 9])
    assert torch.equal(sampler(*images, numbers).roi_R5, rows.roi_R5)
    assert not torch.equal(sampler(*images, numbers, stage=1).roi_R5, rows.roi_R5)


def test_objects_join_the_proposals_on_request(images: tuple[list[Tensor], list[Target]]) -> None:
    proposals, targets = images
    none = [proposal[:0] for proposal in proposals]
    rows = draw((none, targets), [0, 1, 2])
    assert rows.gt_R.tolist() == [0, 1, 2, 0, 1]
    assert torch.equal(rows.roi_R5[:, 1:], rows.match_R4)
    assert len(draw((none, targets), [0, 1, 2], add_gt=False).roi_R5) == 0
    everything = draw((proposals, targets), [0, 1, 2], add_gt=False, count=500, positive_share=1.0)
    assert len(everything.roi_R5) == sum(map(len, proposals))


def test_padding_fills_every_image_with_weightless_rows(
    images: tuple[list[Tensor], list[Target]],
) -> None:
    plain, rows = draw(images, [0, 1, 2], count=90), draw(images, [0, 1, 2], count=90, pad=True)
    assert rows.roi_R5[:, 0].long().bincount().tolist() == [90, 90, 90]
    used = rows.weight_R > 0
    for name, values in rows._asdict().items():
        assert torch.equal(values[used], getattr(plain, name))
        assert values.dtype == getattr(plain, name).dtype
    assert rows.label_R[~used].sum() == 0
    assert (rows.gt_R[~used] == -1).all()
    assert boxes.valid_mask(rows.roi_R5[~used, 1:]).all()
    empty = draw(([torch.zeros(0, 4)], [target(torch.zeros(0, 4))]), [0], pad=True)
    assert empty.weight_R.tolist() == [0.0] * 16


def test_a_stage_has_its_own_threshold_and_inclusive_pixels_theirs() -> None:
    gt = torch.tensor([[0.0, 0.0, 9.0, 9.0]])
    box = torch.tensor([[0.0, 0.0, 9.0, 5.0]])  # IoU 5/9 continuous, 60/100 inclusive
    args = [box], [target(gt)], torch.tensor([0])
    sampler = RoISampler(add_gt=False)
    assert sampler(*args).gt_R.tolist() == [0]
    assert sampler(*args, iou=0.6).gt_R.tolist() == [-1]
    assert sampler(*args, iou=0.6, plus=1.0).gt_R.tolist() == [0]


def test_crowds_are_ordinary_background(images: tuple[list[Tensor], list[Target]]) -> None:
    proposals, targets = images
    crowded = [its._replace(crowd_I4=torch.tensor([[0.0, 0.0, 99.0, 99.0]])) for its in targets]
    expected = draw(images, [0, 1, 2])
    assert torch.equal(draw((proposals, crowded), [0, 1, 2]).roi_R5, expected.roi_R5)


def test_gradients_stop_at_the_proposals() -> None:
    box = whole_boxes(5, 1).requires_grad_()
    rows = draw(([box], [target(whole_boxes(1, 2))]), [0])
    assert not any(values.requires_grad for values in rows)


def test_lists_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="1 proposals, 2 targets, 1 draws"):
        draw(([whole_boxes(2, 0)], [target(whole_boxes(1, 1))] * 2), [0])


@pytest.mark.parametrize("wrong", [{"count": 0}, {"positive_share": 1.5}, {"iou": 0.0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="count >= 1, a share in"):
        dataclasses.replace(RoISampler(), **wrong)
