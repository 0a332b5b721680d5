"""Cascade: what each stage is given, what a test averages, arguments, the configurations.

Letters: B images of a batch, R RoIs, G objects, M proposals, K class scores.
"""

from typing import Any, cast

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from detection_tsd import boxes
from detection_tsd.matching import RoISampler, Sampled
from detection_tsd.models.cascade import CascadeDetector, with_stds
from detection_tsd.models.detector import Detector, join_rois
from detection_tsd.models.prediction import Prediction
from detection_tsd.models.tiny import TinyFPN
from detection_tsd.models.tsd_head import TSDHead
from detection_tsd.postprocess import PostProcess
from detection_tsd.tests.launch import config
from detection_tsd.tests.small_detectors import STDS, an_input, liven, small, small_head

SHIFT = 3.0  # pixels that `MovingHead` moves its boxes before the deltas


class MovingHead(nn.Module):
    """Moves P by `SHIFT` to P_r; deltas of class c move P_r by c / 10 of its width. Takes notes."""

    def __init__(self, number: int, best: int = 2) -> None:
        super().__init__()
        self.number, self.best, self.stds = number, best, STDS[number]
        self.plus, self.given, self.losses_seen = 0.0, Tensor(), cast(Any, None)

    def forward(self, cls: Any, reg: Any, roi_R5: Tensor) -> Prediction:
        self.given = roi_R5
        logits_RK = torch.zeros(len(roi_R5), 4)
        logits_RK[:, self.best] = 1.0 + self.number
        delta_RK4 = torch.zeros(len(roi_R5), 4, 4)
        delta_RK4[:, :, 0] = torch.arange(4.0) / 10 / self.stds[0]
        return Prediction(logits_RK, delta_RK4, roi_R5[:, 1:] + torch.tensor([SHIFT, 0, SHIFT, 0]))

    def losses(self, cls: Any, reg: Any, sampled: Sampled) -> tuple[dict[str, Tensor], Prediction]:
        self.losses_seen = sampled
        return {"loss_cls": torch.tensor(1.0)}, self(cls, reg, sampled.roi_R5)


def moving(best: int = 2, **other: Any) -> tuple[CascadeDetector, list[MovingHead]]:
    heads = [MovingHead(number, best) for number in range(3)]
    settings: dict[str, Any] = {
        "backbone": TinyFPN(), "heads": heads, "sampler": RoISampler(64, 0.9),
        "post": PostProcess(iou=1.0),
    }  # fmt: skip
    return CascadeDetector(**settings | other), heads


def moved(box_R4: Tensor, label: Tensor | int, size: tuple[int, int]) -> Tensor:
    """What a stage of `MovingHead` makes of boxes."""
    width_R = box_R4[:, 2] - box_R4[:, 0]
    step_R = SHIFT + torch.as_tensor(label) / 10 * width_R
    zero_R = torch.zeros_like(step_R)
    return boxes.clip_boxes(box_R4 + torch.stack((step_R, zero_R, step_R, zero_R), dim=1), size)


@pytest.mark.parametrize(("refine", "best", "expected"), [("foreground", 2, 2), ("any", 0, 0)])
def test_a_test_refines_from_the_shifted_box_and_averages_logits(
    refine: str, best: int, expected: int
) -> None:
    """Mean logits of the stages are 1, 2, 3 -> 2; boxes come from the last stage alone."""
    model, heads = moving(best, refine_class=refine)
    given, box_M4 = an_input(1), torch.tensor([[4.0, 5.0, 14.0, 30.0], [60.0, 1.0, 78.0, 50.0]])
    size = (56, 80)
    features = model.eval().features(given.x_B3HW)
    prob_RK, box_RK4 = model.score(features, join_rois([box_M4]), given.size_B2)
    logits_4 = torch.zeros(4)
    logits_4[best] = 2.0
    torch.testing.assert_close(prob_RK, logits_4.softmax(0).expand(2, 4))
    wanted_R4 = box_M4
    for head in heads:
        torch.testing.assert_close(head.given[:, 1:], wanted_R4)
        wanted_R4 = moved(wanted_R4, expected, size)
    last_R4 = heads[2].given[:, 1:]
    shift_R = SHIFT + 0.3 * (last_R4[:, 2] - last_R4[:, 0])
    torch.testing.assert_close(box_RK4[:, 3, 0], last_R4[:, 0] + shift_R)
    (found,) = model(given.x_B3HW, given.size_B2, proposals=[box_M4])
    assert len(found.box_D4) == 6
    assert found.box_D4[:, 2].max() <= 80


def test_the_best_foreground_class_refines_although_the_background_is_more_likely() -> None:
    model, heads = moving(best=0)
    given, box_M4 = an_input(1), torch.tensor([[4.0, 5.0, 14.0, 30.0]])
    model.eval()(given.x_B3HW, given.size_B2, proposals=[box_M4])
    torch.testing.assert_close(heads[1].given[:, 1:], moved(box_M4, 1, (56, 80)))  # first of equals


@pytest.mark.parametrize("refine", ["foreground", "any"])
@pytest.mark.parametrize("pad", [False, True])
def test_training_refines_with_the_true_class_and_leaves_out_the_objects(
    refine: str, pad: bool
) -> None:
    model, heads = moving(refine_class=refine, sampler=RoISampler(90, 0.5, pad=pad))
    given = an_input(2)
    model.train()(*given)
    first, second = heads[0].losses_seen, heads[1].losses_seen
    label_R = first.label_R
    if refine == "foreground":
        label_R = torch.where(label_R > 0, label_R, 2)
    assert (first.weight_R == 0).any() == pad
    for image, target in enumerate(given.targets):
        mine = (first.roi_R5[:, 0] == image) & (first.weight_R > 0)
        box_R4 = first.roi_R5[mine, 1:]
        is_gt = (box_R4[:, None] == target.box_G4).all(dim=2).any(dim=1)
        assert is_gt.sum() == len(target.box_G4)
        height, width = given.size_B2[image].tolist()
        refined = moved(box_R4[~is_gt], label_R[mine][~is_gt], (height, width))
        allowed = torch.cat((target.box_G4, refined))
        got = second.roi_R5[(second.roi_R5[:, 0] == image) & (second.weight_R > 0), 1:]
        near = (got[:, None] - allowed).abs().amax(dim=2).amin(dim=1)
        assert near.max() < 1e-4
        again = (got[:, None] == target.box_G4).all(dim=2).sum(dim=0)
        assert (again == 1).all()  # added once more, not twice
        assert len(got) == len(allowed) if not pad else len(got) <= len(allowed)


def test_proposals_that_equal_objects_stay_where_objects_are_not_added() -> None:
    model, heads = moving(sampler=RoISampler(90, 0.9, add_gt=False))
    given = an_input(1)
    given.proposals[0] = given.targets[0].box_G4.clone()
    model.train()(*given)
    assert len(heads[1].losses_seen.roi_R5) == 3


def test_stages_have_their_own_overlaps_deltas_and_weights() -> None:
    torch.manual_seed(0)
    model, given = small("sibling", stages=3, ious=(0.5, 0.6, 0.7)), an_input()
    liven(model)
    losses = model.train()(*given)
    assert list(losses) == [f"stage{n}_loss_{kind}" for n in (1, 2, 3) for kind in ("cls", "box")]
    half = small("sibling", stages=3, stage_weights=(1.0, 0.5, 0.25))
    half.load_state_dict(model.state_dict())
    other = half.train()(*given)
    for name, loss in losses.items():
        weight = {"1": 1.0, "2": 0.5, "3": 0.25}[name[5]]
        torch.testing.assert_close(other[name], loss * weight)
    shrunk, heads = moving(ious=(0.5, 0.6, 0.7))
    shrunk.train()(*given)
    for head, least in zip(heads, (0.5, 0.6, 0.7), strict=True):
        seen = head.losses_seen
        positive = seen.label_R > 0
        overlap = boxes.iou_rows(seen.roi_R5[positive, 1:], seen.match_R4[positive])
        assert overlap.min() >= least


def test_each_stage_draws_its_own_regions() -> None:
    stages: list[int] = []

    class Listening(RoISampler):
        def __call__(self, *args: Any, **named: Any) -> Sampled:
            stages.append(named["stage"])
            return super().__call__(*args, **named)

    model, _ = moving(sampler=Listening())
    model.train()(*an_input())
    assert stages == [0, 1, 2]


def test_no_gradient_passes_between_the_stages() -> None:
    model, given = small("tsd", stages=2), an_input()
    losses = model.train()(*given)
    second = sum(loss for name, loss in losses.items() if name.startswith("stage2"))
    assert isinstance(second, Tensor)
    second.backward()
    assert all(p.grad is None for p in model.get_submodule("heads.0").parameters())
    assert all(p.grad is not None for p in model.get_submodule("heads.1").parameters())


def test_one_stage_is_the_plain_detector() -> None:
    given = an_input()
    plain, one = small("tsd", mask=True), small("tsd", mask=True)
    cascade = CascadeDetector(
        one.backbone, [one.head], None, one.sampler, one.post, one.mask, (0.5,), (1.0,)  # type: ignore[list-item]
    )  # fmt: skip
    liven(plain)
    liven(cascade)
    wanted, got = plain.train()(*given), cascade.train()(*given)
    assert {name.removeprefix("stage1_"): loss for name, loss in got.items()} == wanted
    call = {"proposals": given.proposals}
    for a, b in zip(
        plain.eval()(given.x_B3HW, given.size_B2, **call),
        cascade.eval()(given.x_B3HW, given.size_B2, **call),
        strict=True,
    ):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_bad_arguments_are_named() -> None:
    for settings, message in (
        ({"ious": (0.5, 0.6)}, "3, 2 and 3"),
        ({"heads": []}, "0, 3 and 3"),
        ({"stage_weights": (1.0,)}, "3, 3 and 1"),
        ({"refine_class": "best"}, "refine_class='best'"),
        ({"plus": 1.0}, "head 1 is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            moving(**settings)  # type: ignore[arg-type]
    for stds in ((0.1, 0.1, 0.2), (0.1, 0.1, 0.2, 0.0)):
        with pytest.raises(ValueError, match="four positive"):
            with_stds(small_head("sibling"), stds)


@pytest.mark.parametrize("model", ["cascade", "cascade_mask"])
def test_configured_heads_differ_by_their_deltas_alone(model: str) -> None:
    words = ("experiment=synth/tsd", "run_dir=none", "rpn=tiny", f"model={model}")
    cfg = config("train", *words, "head.margin_cls=0.3", "head.width=16")
    built: CascadeDetector = instantiate(cfg.model)
    heads = cast(list[TSDHead], list(built.heads))
    assert [head.stds for head in heads] == list(STDS)
    assert [head.margin_cls for head in heads] == [0.3] * 3
    weights = [head.cls_head.fc6.weight for head in heads]
    assert not torch.equal(weights[0], weights[1])
    assert (built.mask is None) == (model == "cascade")
    assert built.ious == (0.5, 0.6, 0.7)


@pytest.mark.parametrize("model", ["faster", "mask", "glyphs", "glyphs_rpn"])
def test_configured_detectors(model: str) -> None:
    words = ["experiment=synth/tsd", "run_dir=none", f"model={model}"]
    words += [] if model == "glyphs" else ["rpn=tiny"]
    built: Detector = instantiate(config("train", *words, "seed=5").model)
    assert (built.mask is None) == (model != "mask")
    assert (built.rpn is None) == (model == "glyphs")
    assert built.sampler.seed == 5
    assert built.sampler.count == (32 if model.startswith("glyphs") else 512)
