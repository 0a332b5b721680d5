"""Several views of an image: one view is the plain test, boxes come back, answers are averaged.

Letters: H W size, M proposals, D detections, K class scores, S mask bins per side.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from detection_tsd import boxes
from detection_tsd.data.detection_data import Detections
from detection_tsd.data.transforms import DetectionTransform
from detection_tsd.models.detector import TwoStage, join_rois
from detection_tsd.postprocess import PostProcess
from detection_tsd.tests.small_detectors import Input, an_input, liven, small
from detection_tsd.tta import Seen, View, Views, into, look, out_of, views_of

VARIANTS: dict[str, dict[str, Any]] = {
    "fixed proposals": {"head": "tsd"},
    "rpn and masks": {"head": "tsd", "rpn": True, "mask": True},
    "cascade": {"head": "tsd", "rpn": True, "stages": 3},
    "inclusive pixels": {"head": "tsd", "rpn": True, "plus": 1.0},
}


def lively(name: str) -> TwoStage:
    model = small(**VARIANTS[name], post=PostProcess(per_image=12)).eval()
    liven(model)
    return model


def plain(model: TwoStage, given: Input) -> list[Detections]:
    found: list[Detections] = model(given.x_B3HW, given.size_B2, proposals=given.proposals)
    return found


def mirrored(given: Input) -> Input:
    """Each image and its proposals mirrored within its valid part."""
    x_B3HW, proposals = torch.zeros_like(given.x_B3HW), []
    for image, (height, width) in enumerate(given.size_B2.tolist()):
        part = given.x_B3HW[image, :, :height, :width]
        x_B3HW[image, :, :height, :width] = part.flip(2)
        proposals.append(mirror(given.proposals[image], width))
    return given._replace(x_B3HW=x_B3HW, proposals=proposals)


def mirror(box: Tensor, width: int) -> Tensor:
    return torch.stack((width - box[:, 2], box[:, 1], width - box[:, 0], box[:, 3]), dim=1)


def assert_alike(got: Detections, wanted: Detections) -> None:
    assert torch.equal(got.label_D, wanted.label_D)
    torch.testing.assert_close(got.score_D, wanted.score_D, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got.box_D4, wanted.box_D4, rtol=1e-4, atol=1e-3)
    assert (got.mask_DSS is None) == (wanted.mask_DSS is None)
    if got.mask_DSS is not None:
        torch.testing.assert_close(got.mask_DSS, wanted.mask_DSS, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_one_view_is_the_plain_test(name: str) -> None:
    model, given = lively(name), an_input()
    got = Views(model)(given.x_B3HW, given.size_B2, proposals=given.proposals)
    for one, wanted in zip(got, plain(model, given), strict=True):
        assert len(one.box_D4) == 12
        assert_alike(one, wanted)


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_check_08_one_mirrored_view_is_the_plain_test_of_the_mirrored_image(name: str) -> None:
    model, given = lively(name), an_input()
    views = Views(model)
    views.views = [View(flip=True)]
    got = views(given.x_B3HW, given.size_B2, proposals=given.proposals)
    wanted = plain(model, mirrored(given))
    widths = given.size_B2[:, 1].tolist()
    for one, two, width in zip(got, wanted, widths, strict=True):
        masks = two.mask_DSS
        turned = two._replace(
            box_D4=mirror(two.box_D4, width), mask_DSS=None if masks is None else masks.flip(2)
        )
        assert_alike(one, turned)
    unlike = plain(model, given)[0]
    assert not torch.equal(unlike.score_D, wanted[0].score_D)


@torch.no_grad()
def test_probabilities_and_boxes_of_each_proposal_are_averaged() -> None:
    """A loop over the views in this file, against `Views`."""
    model, given = lively("fixed proposals"), an_input(1)
    sizes = [(96, 64), (144, 96), (60, 40)]
    (got,) = Views(model, sizes, flip=True)(
        given.x_B3HW, given.size_B2, proposals=given.proposals
    )  # fmt: skip
    x_3HW, box_M4 = given.x_B3HW[0, :, :56, :80], given.proposals[0]
    prob, box = [], []
    for long, short in sizes:
        scale = min(short / 56, long / 80)
        height, width = int(56 * scale + 0.5), int(80 * scale + 0.5)
        ratio = torch.tensor([width / 80, height / 56] * 2)
        view = torch.nn.functional.interpolate(x_3HW[None], (height, width), mode="bilinear")
        padded = torch.zeros(1, 3, -(-height // 32) * 32, -(-width // 32) * 32)
        for flip in (False, True):
            padded[:, :, :height, :width] = view.flip(3) if flip else view
            roi_M4 = mirror(box_M4 * ratio, width) if flip else box_M4 * ratio
            prob_MK, box_MK4 = model.score(model.features(padded), join_rois([roi_M4]))
            if flip:
                box_MK4 = mirror(box_MK4.flatten(0, 1), width).view_as(box_MK4)
            prob.append(prob_MK)
            box.append(box_MK4 / ratio)
    wanted = model.select(torch.stack(prob).mean(0), torch.stack(box).mean(0), (56, 80))
    assert_alike(got, wanted)
    assert torch.stack(prob).std(dim=0).max() > 1e-3


@torch.no_grad()
def test_proposals_of_all_views_are_joined_and_suppressed() -> None:
    model, given = lively("rpn and masks"), an_input(1)
    views = Views(model, [(96, 64), (144, 96)], flip=True, count=30)
    x_3HW = given.x_B3HW[0, :, :56, :80]
    seen = [look(model, x_3HW, view) for view in views.views]
    joined = views._joined(seen)
    assert len(joined) == 30
    overlap = boxes.iou(joined, joined).fill_diagonal_(0)
    assert overlap.max() <= 0.7 + 1e-5
    sources = [
        out_of(model.propose(one.features, torch.tensor([one.size]), one.padded)[0], one)
        for one in seen
    ]
    kept = [(joined[:, None] == part).all(dim=2).any(dim=0).sum().item() for part in sources]
    assert sum(kept) == 30
    assert sum(count > 0 for count in kept) > 1
    (found,) = views(given.x_B3HW, given.size_B2)
    assert found.mask_DSS is not None
    assert found.mask_DSS.shape == (12, 14, 14)


def test_boxes_go_into_a_view_and_come_back() -> None:
    seen = Seen(None, (50, 70), (1.4, 1.25), True, (64, 96))  # type: ignore[arg-type]
    box_M4 = torch.tensor([[5.0, 8.0, 20.0, 30.0]])
    there = into(box_M4, seen)
    torch.testing.assert_close(there, torch.tensor([[70 - 28.0, 10.0, 70 - 7.0, 37.5]]))
    torch.testing.assert_close(out_of(there, seen), box_M4)
    torch.testing.assert_close(out_of(there[:, None], seen)[:, 0], box_M4)


def test_a_view_is_what_the_transform_makes_of_the_picture() -> None:
    """Up to the rounding of resized pictures to whole grey levels."""

    class Nothing:
        def features(self, x_B3HW: Tensor) -> Tensor:
            return x_B3HW

    rng = np.random.default_rng(0)
    picture_HWC = rng.integers(0, 256, (37, 53, 3), dtype=np.uint8)
    transform = DetectionTransform(keep_size=True)
    whole = transform.test(picture_HWC).image
    x_13HW = transform.normalize(whole[None], torch.tensor([[37, 53]]))
    for view in views_of([(90, 60), (40, 40)], flip=True):
        assert view.long is not None
        assert view.short is not None
        resizing = DetectionTransform(short=view.short, long=view.long)
        made = resizing.test(picture_HWC, flip=view.flip)
        height, width = made.image.shape[1:]
        seen = look(Nothing(), x_13HW[0], view)  # type: ignore[arg-type]
        assert seen.size == (height, width)
        assert seen.scale == pytest.approx(made.scale)
        wanted = resizing.normalize(made.image[None], torch.tensor([[height, width]]))
        got = seen.features
        assert isinstance(got, Tensor)
        assert got.shape[2] % 32 == got.shape[3] % 32 == 0
        difference = (got[:, :, :height, :width] - wanted).abs().max()
        assert difference < 1.0 / 57  # one grey level
        assert not got[:, :, height:].any()


def test_views_and_bad_arguments() -> None:
    assert views_of(None, True) == [View(), View(flip=True)]
    assert views_of([(9, 8)]) == [View(9, 8)]
    for sizes in ([], [(9, 0)], [(9, 8, 7)]):
        with pytest.raises(ValueError, match="sizes="):
            views_of(sizes)
    model, given = lively("fixed proposals"), an_input()
    views = Views(model)
    with pytest.raises(ValueError, match="proposals=None"):
        views.eval()(given.x_B3HW, given.size_B2)
    with pytest.raises(ValueError, match="no training"):
        views.train()(given.x_B3HW, given.size_B2, proposals=given.proposals)
