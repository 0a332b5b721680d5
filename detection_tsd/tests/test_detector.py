"""Detectors: losses under the same names, boxes at the border, choices that depend on the draw.

Letters: B images of a batch, R RoIs, M proposals, D detections, K class scores.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detection_tsd.data.detection_data import Detections, Target
from detection_tsd.matching import RoISampler
from detection_tsd.models.detector import Detector, join_rois
from detection_tsd.models.fpn import Features
from detection_tsd.models.prediction import Prediction
from detection_tsd.models.tiny import TinyFPN
from detection_tsd.models.tsd_head import strip
from detection_tsd.postprocess import PostProcess
from detection_tsd.tests.small_detectors import (
    Input,
    an_input,
    liven,
    small,
    small_head,
    small_mask,
    small_rpn,
)

NONE_04 = torch.zeros(0, 4)
VARIANTS: dict[str, dict[str, Any]] = {
    "sibling": {"head": "sibling"},
    "d_head": {"head": "d_head"},
    "tsd": {"head": "tsd"},
    "rpn": {"head": "sibling", "rpn": True},
    "mask": {"head": "tsd", "rpn": True, "mask": True},
    "cascade": {"head": "tsd", "stages": 3, "mask": True},
}


def without_objects(given: Input, images: tuple[int, ...]) -> Input:
    def empty(target: Target) -> Target:
        assert target.mask_GHW is not None
        return Target(target.box_G4[:0], target.label_G[:0], target.crowd_I4, target.mask_GHW[:0])

    targets = [empty(t) if i in images else t for i, t in enumerate(given.targets)]
    return given._replace(targets=targets)


def far_proposals(given: Input) -> Input:
    """Proposals that no object overlaps with 0.5."""
    return given._replace(proposals=[torch.tensor([[0.0, 0.0, 96.0, 64.0]])] * 2)


def losses_and_gradients(model: nn.Module, given: Input) -> dict[str, Tensor]:
    model.train()
    model.zero_grad()
    losses: dict[str, Tensor] = model(*given)
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad is not None, name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    return losses


@pytest.mark.parametrize("name", VARIANTS)
def test_losses_have_the_same_names_for_any_input(name: str) -> None:
    """And every parameter takes part in each of them, as DDP needs it."""
    model, given = small(**VARIANTS[name], sampler=RoISampler(24, 0.5, add_gt=False)), an_input()
    ordinary = losses_and_gradients(model, given)
    assert all(loss.shape == () and loss.item() > 0 for loss in ordinary.values())
    assert model.mask is None or "loss_mask" in ordinary
    nothing = given._replace(proposals=[NONE_04] * 2)
    cases = {
        "no proposals": nothing,
        "one image without proposals": given._replace(proposals=[given.proposals[0], NONE_04]),
        "no positives": far_proposals(given),
        "one image without objects": without_objects(given, (0,)),
        "no objects": without_objects(given, (0, 1)),
        "nothing at all": without_objects(nothing, (0, 1)),
    }  # fmt: skip
    for case, other in cases.items():
        losses = losses_and_gradients(model, other)
        assert losses.keys() == ordinary.keys(), case
        assert all(loss.isfinite() for loss in losses.values()), case
        if case == "no objects":
            positive = ("box", "mask", "pc")
            assert all(v == 0 for k, v in losses.items() if any(p in k for p in positive)), case


@pytest.mark.parametrize("name", VARIANTS)
def test_detections_are_sorted_few_and_inside(name: str) -> None:
    model, given = small(**VARIANTS[name], post=PostProcess(per_image=9)).eval(), an_input()
    liven(model)
    with torch.no_grad():
        found: list[Detections] = model(given.x_B3HW, given.size_B2, proposals=given.proposals)
    assert len(found) == 2
    for one, (height, width) in zip(found, given.size_B2.tolist(), strict=True):
        assert len(one.box_D4) == len(one.score_D) == len(one.label_D) == 9
        assert (one.score_D.diff() <= 0).all()
        assert one.label_D.min() >= 1
        assert one.label_D.max() <= 3
        assert (one.box_D4 >= 0).all()
        assert (one.box_D4 <= torch.tensor([width, height, width, height])).all()
        assert (one.box_D4[:, 2:] > one.box_D4[:, :2]).all()
        assert (one.mask_DSS is None) == (model.mask is None)
        if one.mask_DSS is not None:
            assert one.mask_DSS.shape == (9, 14, 14)
            assert 0 <= one.mask_DSS.min() < one.mask_DSS.max() <= 1


@pytest.mark.parametrize("name", ["sibling", "tsd", "cascade"])
def test_no_proposals_give_no_detections(name: str) -> None:
    model, given = small(**VARIANTS[name]).eval(), an_input()
    given.proposals[0] = torch.zeros(0, 4)
    found = model(given.x_B3HW, given.size_B2, proposals=given.proposals)
    assert len(found[0].box_D4) == 0
    assert len(found[1].box_D4) > 0
    nothing = model(given.x_B3HW, given.size_B2, proposals=[NONE_04] * 2)
    assert [len(one.score_D) for one in nothing] == [0, 0]


def test_the_choice_of_regions_depends_on_the_draw_alone() -> None:
    model, given = small("tsd", rpn=True).train(), an_input()
    losses = model(*given)
    torch.manual_seed(123)
    again = model(*given)
    assert all(torch.equal(losses[name], again[name]) for name in losses)
    other = model(*given._replace(draw_B=given.draw_B + 1))
    assert any(not torch.equal(losses[name], other[name]) for name in losses)
    swapped = Input(*(part.flip(0) if isinstance(part, Tensor) else part[::-1] for part in given))
    turned = model(*swapped)
    for name in losses:
        torch.testing.assert_close(losses[name], turned[name], rtol=1e-4, atol=1e-5)


def test_score_and_select_are_the_test() -> None:
    for name in ("tsd", "cascade"):
        model, given = small(**VARIANTS[name]).eval(), an_input()
        liven(model)
        with torch.no_grad():
            found = model(given.x_B3HW, given.size_B2, proposals=given.proposals)
            features = model.features(given.x_B3HW)
            prob_RK, box_RK4 = model.score(features, join_rois(given.proposals), given.size_B2)
        counts = [len(one) for one in given.proposals]
        rows = zip(
            prob_RK.split(counts), box_RK4.split(counts), given.size_B2.tolist(), strict=True
        )
        for wanted, (prob, box, size) in zip(found, rows, strict=True):
            got = model.select(prob, box, (size[0], size[1]))
            torch.testing.assert_close(got.box_D4, wanted.box_D4, rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(got.score_D, wanted.score_D)
            assert torch.equal(got.label_D, wanted.label_D)


class StillHead(nn.Module):
    """Certain of class 1, deltas 0: detections are the proposals. Keeps what it was given."""

    def __init__(self, plus: float) -> None:
        super().__init__()
        self.plus, self.stds = plus, (0.1, 0.1, 0.2, 0.2)

    def forward(self, cls: Any, reg: Any, roi_R5: Tensor) -> Prediction:
        self.seen = (cls, reg, roi_R5)
        logits_RK = torch.tensor([0.0, 9.0, 0.0, 0.0]) - 1e-3 * torch.arange(len(roi_R5))[:, None]
        logits_RK = logits_RK * torch.tensor([0.0, 1.0, 0.0, 0.0])
        return Prediction(logits_RK, torch.zeros(len(roi_R5), 4, 4), roi_R5[:, 1:])

    def losses(self, cls: Any, reg: Any, sampled: Any) -> tuple[dict[str, Tensor], Prediction]:
        self.sampled = sampled
        return {}, self(cls, reg, sampled.roi_R5)


@pytest.mark.parametrize("plus", [0.0, 1.0])
def test_boxes_are_converted_at_the_border(plus: float) -> None:
    head: Any = StillHead(plus)
    model = Detector(TinyFPN(), head, plus=plus, post=PostProcess(0.5, iou=1.0))
    given, box_M4 = an_input(1), torch.tensor([[4.0, 5.0, 20.0, 30.0], [50.0, 10.0, 200.0, 99.0]])
    (found,) = model.eval()(given.x_B3HW, given.size_B2, proposals=[box_M4])
    inner_4 = torch.tensor([0.0, 0.0, plus, plus])
    assert torch.equal(head.seen[2][:, 1:], box_M4 - inner_4)
    torch.testing.assert_close(found.box_D4, torch.tensor([[4.0, 5, 20, 30], [50, 10, 80, 56]]))
    prob_RK, box_RK4 = model.score(model.features(given.x_B3HW), join_rois([box_M4]))
    torch.testing.assert_close(box_RK4[:, 2], box_M4)
    assert prob_RK[0, 1] > 0.99
    model.train()(given.x_B3HW, given.size_B2, given.targets, [box_M4], given.draw_B)
    is_gt = head.sampled.label_R > 0
    wanted = given.targets[0].box_G4[head.sampled.gt_R[is_gt]] - inner_4
    assert is_gt.any()
    assert torch.equal(head.sampled.roi_R5[is_gt, 1:], wanted)


def test_inclusive_pixels_need_every_part_to_know() -> None:
    for part, other in (
        ("head", {"head": small_head("sibling")}),
        ("rpn", {"head": small_head("sibling", plus=1.0), "rpn": small_rpn()}),
        ("mask", {"head": small_head("sibling", plus=1.0), "mask": small_mask()}),
    ):
        with pytest.raises(ValueError, match=f"that of the {part} is 0"):
            Detector(TinyFPN(), plus=1.0, **other)  # type: ignore[arg-type]
    model, given = small("tsd", rpn=True, mask=True, plus=1.0), an_input()
    losses_and_gradients(model, given)
    (found, _) = model.eval()(given.x_B3HW, given.size_B2)
    assert found.box_D4.amax() <= 96


class TwoCopies(TinyFPN):
    """A backbone whose branches read different maps."""

    def forward(self, x_B3HW: Tensor) -> Features:
        maps = super().forward(x_B3HW).cls
        return Features(maps, [one + 1 for one in maps])


def test_separate_maps_reach_their_branches_and_the_rpn_reads_the_chosen() -> None:
    given = an_input(1)
    proposals = []
    for rpn_on in ("cls", "reg"):
        torch.manual_seed(0)
        head: Any = StillHead(0.0)
        model = Detector(TwoCopies(), head, small_rpn(), rpn_on=rpn_on).eval()
        features = model.features(given.x_B3HW)
        proposals.append(model.propose(features, given.size_B2, (64, 96))[0])
        model(given.x_B3HW, given.size_B2)
        for cls, reg in zip(head.seen[0].maps, head.seen[1].maps, strict=True):
            torch.testing.assert_close(cls + 1, reg)
    assert proposals[0].shape != proposals[1].shape or not torch.equal(*proposals)
    with pytest.raises(ValueError, match="rpn_on='both'"):
        Detector(TinyFPN(), small_head("sibling"), rpn_on="both")


def test_one_class_one_level_and_a_tall_image() -> None:
    model, given = small("tsd", num_classes=1), an_input()
    model.backbone.roi_levels = 1
    turned = given._replace(
        x_B3HW=given.x_B3HW.transpose(2, 3).contiguous(), size_B2=given.size_B2.flip(1),
        targets=[t._replace(label_G=torch.ones_like(t.label_G)) for t in given.targets],
    )  # fmt: skip
    losses = model.train()(*turned)
    assert all(loss.isfinite() for loss in losses.values())
    found = model.eval()(turned.x_B3HW, turned.size_B2, proposals=turned.proposals)
    assert {int(label) for one in found for label in one.label_D} == {1}


def test_an_rpn_comes_before_given_proposals() -> None:
    model, given = small(rpn=True).eval(), an_input()
    (one, _), (two, _) = (
        model(given.x_B3HW, given.size_B2, proposals=proposals)
        for proposals in (None, given.proposals)
    )
    assert torch.equal(one.box_D4, two.box_D4)


def test_missing_and_misshapen_arguments_are_named() -> None:
    model, given = small(), an_input()
    x_B3HW, size_B2, targets, proposals, draw_B = given
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("proposals=None", (x_B3HW, size_B2)),
        ("targets and draw_B", (x_B3HW, size_B2, targets, proposals, None)),
        ("targets and draw_B", (x_B3HW, size_B2, None, proposals, draw_B)),
        ("x_B3HW is", (x_B3HW[:, :2], size_B2, targets, proposals, draw_B)),
        ("x_B3HW is", (x_B3HW[:0], size_B2[:0], [], [], draw_B[:0])),
        ("size_B2 is", (x_B3HW, size_B2[0], targets, proposals, draw_B)),
        ("targets: 1", (x_B3HW, size_B2, targets[:1], proposals, draw_B)),
        ("draw_B: 1", (x_B3HW, size_B2, targets, proposals, draw_B[:1])),
        ("one is .5, 5.", (x_B3HW, size_B2, targets, [torch.zeros(5, 5)] * 2, draw_B)),
    ]
    for message, call in calls:
        with pytest.raises(ValueError, match=message):
            model.train()(*call)
    with pytest.raises(ValueError, match="does not propose"):
        model.propose(model.features(x_B3HW), size_B2, (64, 96))
    with pytest.raises(ValueError, match="predicts no masks"):
        model.masks(model.features(x_B3HW), torch.zeros(1, 5), torch.ones(1, dtype=torch.int64))
    bad = [t._replace(label_G=t.label_G + 9) for t in targets]
    with pytest.raises(ValueError, match="label"):
        model.train()(x_B3HW, size_B2, bad, proposals, draw_B)


@pytest.mark.parametrize("stages", [1, 3])
def test_check_08_the_sibling_has_no_part_in_detections(stages: int) -> None:
    model, given = small("tsd", stages=stages).eval(), an_input()
    liven(model)
    with torch.no_grad():
        before = model(given.x_B3HW, given.size_B2, proposals=given.proposals)
        for name, parameter in model.named_parameters():
            if ".sibling." in f".{name}.":
                parameter.normal_()
        after = model(given.x_B3HW, given.size_B2, proposals=given.proposals)
    for one, two in zip(before, after, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[:3], two[:3], strict=True))
    assert len(strip(model.state_dict())) < len(model.state_dict())


def test_half_precision_has_the_same_losses_and_nearly_their_values() -> None:
    model, given = small("tsd", rpn=True, mask=True).train(), an_input()
    whole = model(*given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(*given)
        found = model.eval()(given.x_B3HW, given.size_B2)
    assert half.keys() == whole.keys()
    for name, loss in half.items():
        assert loss.dtype == torch.float32, name
        torch.testing.assert_close(loss, whole[name], rtol=0.1, atol=0.02, msg=name)
    assert all(one.box_D4.dtype == one.score_D.dtype == torch.float32 for one in found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", VARIANTS)
def test_a_gpu_computes_what_the_cpu_does(name: str) -> None:
    model, given = small(**VARIANTS[name]), an_input()
    liven(model)
    there = given._replace(
        x_B3HW=given.x_B3HW.cuda(), size_B2=given.size_B2.cuda(),
        proposals=[one.cuda() for one in given.proposals],
        targets=[
            Target(t.box_G4.cuda(), t.label_G.cuda(), t.crowd_I4.cuda(), t.mask_GHW.cuda())  # type: ignore[union-attr]
            for t in given.targets
        ],
    )  # fmt: skip
    wanted = model.train()(*given)
    found = model.eval()(given.x_B3HW, given.size_B2, proposals=given.proposals)
    model.cuda()
    losses = model.train()(*there)
    again = model.eval()(there.x_B3HW, there.size_B2, proposals=there.proposals)
    for key, loss in wanted.items():
        torch.testing.assert_close(losses[key].cpu(), loss, rtol=1e-2, atol=1e-3, msg=key)
    for one, two in zip(found, again, strict=True):
        torch.testing.assert_close(two.score_D.cpu(), one.score_D, rtol=1e-2, atol=1e-3)
