"""What trains the shifts and the branch of TSD: moved targets and the progressive constraint."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from detection_tsd import boxes
from detection_tsd.matching import Sampled
from detection_tsd.models import tsd_head
from detection_tsd.models.prediction import Prediction
from detection_tsd.models.sibling_head import SiblingHead
from detection_tsd.models.tsd_head import translate
from detection_tsd.tests.small_heads import (
    CLASSES,
    EVERY,
    PLAIN,
    SETTINGS,
    doubled,
    pyramid,
    sample,
    slopes,
    total,
    tsd,
)


def test_the_constraint_of_the_head() -> None:
    """M_cls over the 5 RoIs of the image with positives, M_loc over the 4 positives."""
    net, maps, sampled = tsd(margin_cls=0.3, margin_box=0.1), pyramid(), sample()
    alone = doubled(SiblingHead(CLASSES, **SETTINGS))
    alone.load_state_dict(net.sibling.state_dict())
    parts, branch = net.losses(maps, maps, sampled)
    sibling = alone(maps, maps, sampled.roi_R5)
    label = sampled.label_R
    own, other = (
        said.logits_RK.softmax(dim=1)[torch.arange(10), label] for said in (branch, sibling)
    )
    hinge = F.relu((other + 0.3).clamp(max=1) - own)
    assert (sampled.roi_R5[:5, 0] == 0).all()
    torch.testing.assert_close(parts["loss_pc_cls"], hinge[:5].mean())
    own, other = (
        boxes.iou_rows(
            boxes.decode(said.box_R4[:4], said.delta_RK4[torch.arange(4), label[:4]]),
            sampled.match_R4[:4],
        )
        for said in (branch, sibling)
    )
    hinge = F.relu((other + 0.1).clamp(max=1) - own)
    assert ((other + 0.1 < 1) & (hinge > 0)).any()
    torch.testing.assert_close(parts["loss_pc_box"], hinge.mean())


def test_check_06_the_target_of_a_moved_roi() -> None:
    torch.manual_seed(0)
    sampled = sample(positives=10, count=10)
    box_R4, gt_R4 = sampled.roi_R5[:, 1:], sampled.match_R4
    offset_R2 = torch.randn(10, 2, dtype=torch.float64)
    for scale, plus in product((1, 2, 3), (0.0, 1.0)):
        stds = (0.1 / scale, 0.1 / scale, 0.2 / scale, 0.2 / scale)
        moved_R4 = translate(box_R4, offset_R2, 0.1, plus)
        target_R4 = boxes.encode(moved_R4, gt_R4, stds, plus)
        wanted_R4 = boxes.encode(box_R4, gt_R4, stds, plus)
        wanted_R4[:, :2] -= scale * offset_R2  # gamma / sigma
        torch.testing.assert_close(target_R4, wanted_R4, rtol=0, atol=1e-9)
        again_R4 = boxes.decode(moved_R4, target_R4, stds, plus)
        torch.testing.assert_close(again_R4, gt_R4, rtol=0, atol=1e-9)


def shift_gradient(
    net: Any, sampled: Sampled, monkeypatch: pytest.MonkeyPatch, name: str
) -> tuple[Tensor, Prediction]:
    """Gradient of a loss to the raw shift of the RoIs, with the pooling's way to it blocked."""

    def blocked(*args: Any, **named: Any) -> Tensor:
        *rest, offset = args
        return tsd_head_pool(*rest, offset.detach(), **named)

    tsd_head_pool = tsd_head.deform_pool
    monkeypatch.setattr(tsd_head, "deform_pool", blocked)
    maps = pyramid()
    parts, said = net.losses(maps, maps, sampled)
    (slope,) = slopes(parts[name], [said.offset_r])
    return slope.flatten(1), said


def test_check_06_the_target_trains_the_shift(monkeypatch: pytest.MonkeyPatch) -> None:
    sampled = sample(positives=6, count=10)
    found_R2, said = shift_gradient(tsd(), sampled, monkeypatch, "loss_box_tsd")
    target_R4 = boxes.encode(said.box_R4, sampled.match_R4)
    delta_R4 = said.delta_RK4[torch.arange(10), sampled.label_R]
    slope_R4 = (delta_R4 - target_R4).clamp(-1, 1)  # of SmoothL1; t = const - delta
    wanted_R2 = slope_R4[:, :2] / 10 * (sampled.label_R > 0)[:, None]
    assert wanted_R2[:6].abs().min() > 0
    torch.testing.assert_close(found_R2, wanted_R2)


@pytest.mark.parametrize("name", ["loss_box_tsd", "loss_pc_box"])
def test_check_06_a_detached_target_does_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for detach in (True, False):
        with monkeypatch.context() as patch:
            net = tsd(detach_delta_r_target=detach, margin_box=0.9)
            found_R2, said = shift_gradient(net, sample(6), patch, name)
        assert bool(found_R2.any()) is not detach
        assert said.box_R4.requires_grad  # what a cascade gets is not touched


def test_the_constraint_moves_the_shift_through_the_box() -> None:
    net, maps = tsd(margin_box=0.9), pyramid()
    parts, said = net.losses(maps, maps, sample())
    (slope,) = slopes(parts["loss_pc_box"], [said.offset_r])
    assert slope[:4].abs().sum() > 0
    assert not slope[4:].any()


def test_check_07_the_sibling_gets_no_gradient() -> None:
    net, maps = tsd(margin_cls=0.5, margin_box=0.5), pyramid()
    parts, said = net.losses(maps, maps, sample())
    sibling = list(net.sibling.parameters())
    for name, own in (("loss_pc_cls", said.logits_RK), ("loss_pc_box", said.delta_RK4)):
        assert not any(slope.any() for slope in slopes(parts[name], sibling)), name
        assert slopes(parts[name], [own])[0].any(), name
    own = [net.offset.shared.weight, net.cls_head.fc6.weight, net.box_predictor.cls_score.weight]
    assert all(slope.any() for slope in slopes(parts["loss_pc_cls"], own))
    literal, _ = tsd(pc_mode="paper").losses(maps, maps, sample())
    assert set(literal) == EVERY


def test_the_papers_form_pushes_the_sibling_down() -> None:
    net, maps = tsd(pc_mode="paper", margin_cls=0.5, margin_box=0.5), pyramid()
    parts, _ = net.losses(maps, maps, sample())
    sibling = list(net.sibling.parameters())
    for name in ("loss_pc_cls", "loss_pc_box"):
        assert any(slope.any() for slope in slopes(parts[name], sibling)), name


@pytest.mark.parametrize(("positives", "rows"), [(0, 0), (0, 6)])
def test_check_07_no_positives(positives: int, rows: int) -> None:
    net, maps = tsd(), pyramid()
    parts, said = net.losses(maps, maps, sample(positives, rows))
    assert set(parts) == EVERY
    for name in ("loss_box", "loss_box_tsd", "loss_pc_cls", "loss_pc_box"):
        assert parts[name].item() == 0, name
        assert parts[name].requires_grad, name
    assert said.offset_c is not None
    assert said.offset_c.shape == (rows, 2, 3, 3)
    total(parts).backward()
    for name, parameter in net.named_parameters():  # as DDP needs
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_which_losses_there_are() -> None:
    maps, sampled = pyramid(), sample()
    branch, both = {"loss_cls_tsd", "loss_box_tsd"}, EVERY - {"loss_pc_cls", "loss_pc_box"}
    wanted: list[tuple[dict[str, Any], set[str]]] = [
        (PLAIN, branch),
        ({"margin_cls": None, "margin_box": None}, both),
        ({"margin_box": None}, both | {"loss_pc_cls"}),
        ({"margin_cls": None}, both | {"loss_pc_box"}),
        ({"margin_cls": 0.0, "margin_box": 0.0}, EVERY),
    ]
    for settings, names in wanted:
        parts, _ = tsd(**settings).losses(maps, maps, sampled)
        assert set(parts) == names
