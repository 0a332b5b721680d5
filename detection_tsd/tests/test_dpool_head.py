"""Deformable pooling in front of the ordinary head."""

from typing import Any

import pytest
import torch

from detection_tsd.models.dpool_head import DeformPoolHead
from detection_tsd.models.sibling_head import SiblingHead
from detection_tsd.ops.deform_pool import deform_pool
from detection_tsd.tests.small_heads import (
    CLASSES,
    SETTINGS,
    TSD,
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
    return doubled(DeformPoolHead(**{"num_classes": CLASSES} | TSD | other))


def test_parameter_counts() -> None:
    with torch.device("meta"):
        found = DeformPoolHead(80)
    hidden = 12544 * 1024 + 1024 + 1024 * 1024 + 1024
    assert count(found.offset) == hidden + 1024 * 98 + 98
    assert count(found) == 14_310_805 + 13_996_130 == 28_306_935


@pytest.mark.parametrize("pooling", ["aligned", "torchvision"])
def test_it_starts_as_the_sibling_head(pooling: str) -> None:
    net, maps, roi_R5 = head(pooling=pooling), pyramid(), rois(8)
    last = net.offset[4]
    assert not last.weight.any()
    assert not last.bias.any()
    alone = doubled(SiblingHead(CLASSES, **SETTINGS))
    alone.box_head.load_state_dict(net.box_head.state_dict())
    alone.box_predictor.load_state_dict(net.box_predictor.state_dict())
    found, expected = net(maps, maps, roi_R5), alone(maps, maps, roi_R5)
    torch.testing.assert_close(found.logits_RK, expected.logits_RK)
    torch.testing.assert_close(found.delta_RK4, expected.delta_RK4)
    assert found.offset_c.shape == (8, 2, 3, 3)
    assert not found.offset_c.any()


@pytest.mark.parametrize("sampler", ["aligned", "legacy"])
def test_both_tasks_read_the_moved_bins(sampler: str) -> None:
    net, maps, roi_R5 = head(sampler=sampler), pyramid(), rois(8)
    with torch.no_grad():
        net.offset[4].weight.normal_()
    found = net(maps, maps, roi_R5)
    assert found.offset_c.abs().mean() > 0.1
    assert found.offset_r is found.offset_c
    assert torch.equal(found.box_R4, roi_R5[:, 1:])  # no box moves
    samples = {"aligned": 2, "legacy": 4}[sampler]
    level_R = net.levels(maps, roi_R5)
    how: dict[str, Any] = {"size": 3, "samples": samples, "sampler": sampler}
    still = deform_pool(maps, roi_R5, level_R, **how)
    offset = net.offset(still.flatten(1))
    x = net.box_head(deform_pool(maps, roi_R5, level_R, offset, **how).flatten(1))
    torch.testing.assert_close(found.logits_RK, net.box_predictor.cls_score(x))
    torch.testing.assert_close(found.delta_RK4.flatten(1), net.box_predictor.bbox_pred(x))


def test_both_losses_train_the_shifts() -> None:
    net, maps = head(), pyramid()
    parts, said = net.losses(maps, maps, sample())
    assert set(parts) == {"loss_cls", "loss_box"}
    for loss in parts.values():
        assert all(slope.any() for slope in slopes(loss, [said.offset_c, net.offset[4].weight]))
    with torch.no_grad():
        net.offset[4].weight.normal_(std=0.1)
    total(net.losses(maps, maps, sample())[0]).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("rows", [0, 5])
def test_no_positives(rows: int) -> None:
    net, maps = head(), pyramid()
    parts, _ = net.losses(maps, maps, sample(0, rows))
    assert set(parts) == {"loss_cls", "loss_box"}
    total(parts).backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_a_split_backbone_is_refused() -> None:
    with pytest.raises(ValueError, match="DeformPoolHead pools shared features"):
        head()(pyramid(0), pyramid(1), rois(2))
