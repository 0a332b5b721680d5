"""Two extractors on one pooling, or each on the pyramid of its task."""

from typing import Any

import pytest
import torch

from detection_tsd.models.d_head import DHead
from detection_tsd.models.sibling_head import SiblingHead
from detection_tsd.tests.small_heads import (
    CLASSES,
    SETTINGS,
    count,
    doubled,
    pyramid,
    rois,
    sample,
    slopes,
    total,
)


def head(**other: Any) -> Any:
    torch.manual_seed(0)
    return doubled(DHead(**{"num_classes": CLASSES} | SETTINGS | other))


def siblings(net: Any) -> tuple[Any, Any]:
    """Ordinary heads with one extractor each."""
    found = []
    for extractor in (net.cls_head, net.box_head):
        one = doubled(SiblingHead(CLASSES, **SETTINGS))
        one.box_head.load_state_dict(extractor.state_dict())
        one.box_predictor.load_state_dict(net.box_predictor.state_dict())
        found.append(one)
    return found[0], found[1]


def test_check_05_parameter_counts() -> None:
    with torch.device("meta"):
        found = DHead(80)
    assert count(found) == 28_206_485
    assert count(found) - count(found.box_head) == 14_310_805


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("split", [True, False])
def test_each_task_has_its_extractor_and_its_pyramid(training: bool, split: bool) -> None:
    net = head().train(training)
    for_cls, for_box = siblings(net)
    cls, roi_R5 = pyramid(0), rois(8)
    reg = pyramid(1) if split else cls
    found = net(cls, reg, roi_R5)
    torch.testing.assert_close(found.logits_RK, for_cls(cls, cls, roi_R5).logits_RK)
    torch.testing.assert_close(found.delta_RK4, for_box(reg, reg, roi_R5).delta_RK4)
    assert torch.equal(found.box_R4, roi_R5[:, 1:])


def test_the_tasks_share_no_extractor() -> None:
    net, cls, reg = head(), pyramid(0), pyramid(1)
    parts, _ = net.losses(cls, reg, sample())
    assert set(parts) == {"loss_cls", "loss_box"}
    groups = {
        "loss_cls": [*net.cls_head.parameters(), *cls.maps],
        "loss_box": [*net.box_head.parameters(), *reg.maps],
    }
    for loss, own in groups.items():
        for owner, leaves in groups.items():
            found = [bool(slope.any()) for slope in slopes(parts[loss], leaves)]
            assert all(found) if leaves is own else not any(found), (loss, owner)


@pytest.mark.parametrize("rows", [0, 5])
def test_no_positives(rows: int) -> None:
    net, maps = head(), pyramid()
    parts, said = net.losses(maps, maps, sample(0, rows))
    assert set(parts) == {"loss_cls", "loss_box"}
    assert said.logits_RK.shape == (rows, CLASSES + 1)
    total(parts).backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_pooling_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    net, cls, reg = head(), pyramid(0), pyramid(1)
    calls, pool = [], net.pool
    monkeypatch.setattr(net, "pool", lambda maps, *rest: calls.append(maps) or pool(maps, *rest))
    net(cls, cls, rois(3))
    net.eval()(cls, cls, rois(3))
    net(cls, reg, rois(3))
    assert calls == [cls, cls, cls, reg]
