"""Double-Head against torchvision's bottleneck and a plain computation of the rest."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import Bottleneck as Peer

from detection_tsd.models.double_head import Bottleneck, ConvBranch, DoubleHead, UpBlock, scaled
from detection_tsd.models.norm import CrossRankBatchNorm2d, freeze_bn, use_sync_bn
from detection_tsd.models.sibling_head import TwoFC
from detection_tsd.ops.roi_align import roi_align
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
    return doubled(DoubleHead(**{"num_classes": CLASSES, "blocks": 2} | SETTINGS | other))


def statistics(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.named_buffers()}


def test_parameter_counts() -> None:
    with torch.device("meta"):
        found = DoubleHead(80)
    up = 256 * 256 * 9 + 2 * 256 + 2 * (256 * 1024 + 2 * 1024)
    block = 2 * 256 * 1024 + 256 * 256 * 9 + 2 * (256 + 256 + 1024)
    assert count(found.box_head.up) == up
    assert count(found.box_head) == up + 4 * block == 5_587_456
    assert count(found) == 13_895_680 + 83_025 + 332_100 + up + 4 * block == 19_898_261


def test_the_bottleneck_is_torchvisions() -> None:
    torch.manual_seed(0)
    ours, peer = Bottleneck(16), Peer(16, 4)
    peer.load_state_dict(ours.state_dict())
    x = torch.randn(5, 16, 7, 7)
    torch.testing.assert_close(ours(x), peer(x))
    torch.testing.assert_close(ours.eval()(x), peer.eval()(x))


def test_the_widening_block() -> None:
    torch.manual_seed(0)
    net = UpBlock(4, 8)
    x = torch.randn(5, 4, 7, 7)

    def normed(y: Tensor) -> Tensor:
        return F.batch_norm(y, None, None, training=True)

    main = F.relu(normed(F.conv2d(x, net.conv1.weight, padding=1)))
    main = normed(F.conv2d(main, net.conv2.weight))
    side = normed(F.conv2d(x, net.conv_identity.weight))
    torch.testing.assert_close(net(x), F.relu(main + side))


def test_the_box_is_enlarged_about_its_centre() -> None:
    box_R4 = torch.tensor([[10.0, 20.0, 30.0, 60.0]])
    assert scaled(box_R4, 1.3).tolist() == [[7, 14, 33, 66]]
    inclusive = torch.tensor([[10.0, 20.0, 29.0, 59.0]])
    # mmdetection: centre of the corners, w = x2 - x1 + 1, corners at half the new size +- 1/2
    x, w = 19.5, 20 * 1.3
    y, h = 39.5, 40 * 1.3
    wanted = [[x - w / 2 + 0.5, y - h / 2 + 0.5, x + w / 2 - 0.5, y + h / 2 - 0.5]]
    torch.testing.assert_close(scaled(inclusive, 1.3, 1.0), torch.tensor(wanted))


@pytest.mark.parametrize("split", [True, False])
def test_the_branches(split: bool) -> None:
    net, cls, roi_R5 = head().eval(), pyramid(0), rois(20)
    reg = pyramid(1) if split else cls
    found = net(cls, reg, roi_R5)
    level_R = net.levels(cls, roi_R5)
    how: dict[str, Any] = {"size": 3}
    large_R5 = torch.cat((roi_R5[:, :1], scaled(roi_R5[:, 1:], 1.3)), dim=1)
    assert (net.levels(reg, large_R5) != level_R).any()  # the level is that of the RoI itself
    for_cls = net.cls_head(roi_align(cls, roi_R5, level_R, **how).flatten(1))
    for_box = net.box_head.blocks(net.box_head.up(roi_align(reg, large_R5, level_R, **how)))
    for_box = F.avg_pool2d(for_box, 3).flatten(1)
    torch.testing.assert_close(found.logits_RK, net.box_predictor.cls_score(for_cls))
    torch.testing.assert_close(found.delta_RK4.flatten(1), net.box_predictor.bbox_pred(for_box))
    assert torch.equal(found.box_R4, roi_R5[:, 1:])


def test_losses_have_their_weights() -> None:
    maps, sampled = pyramid(), sample()
    found, _ = head().losses(maps, maps, sampled)
    single, _ = head(loss_weights=(1.0, 1.0)).losses(maps, maps, sampled)
    assert set(found) == {"loss_cls", "loss_box"}
    for name, value in found.items():
        torch.testing.assert_close(value, 2 * single[name])


def test_gradients_reach_every_parameter() -> None:
    net, cls, reg = head(), pyramid(0), pyramid(1)
    parts, _ = net.losses(cls, reg, sample())
    assert not any(slope.any() for slope in slopes(parts["loss_cls"], list(reg.maps)))
    assert not any(slope.any() for slope in slopes(parts["loss_box"], list(cls.maps)))
    total(parts).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_padding_does_not_reach_the_statistics() -> None:
    maps, padded = pyramid(), sample(padding=5)
    bare = sample()._replace(
        roi_R5=padded.roi_R5[:10], label_R=padded.label_R[:10], match_R4=padded.match_R4[:10]
    )
    nets = head(), head()
    found, said = nets[0].losses(maps, maps, padded)
    wanted, bare_said = nets[1].losses(maps, maps, bare)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value)
    torch.testing.assert_close(said.delta_RK4[:10], bare_said.delta_RK4)
    assert said.delta_RK4.shape == (15, CLASSES + 1, 4)
    for name, value in statistics(nets[0]).items():
        torch.testing.assert_close(value, statistics(nets[1])[name], msg=name)
    total(found).backward()
    total(wanted).backward()
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("sync", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_no_rois_leave_the_statistics_alone(training: bool, sync: bool) -> None:
    net, maps = head().train(training), pyramid()
    if sync:
        use_sync_bn(net)
        assert isinstance(net.box_head.up.bn1, CrossRankBatchNorm2d)
    before = statistics(net)
    parts, said = net.losses(maps, maps, sample(0, 0))
    assert said.delta_RK4.shape == (0, CLASSES + 1, 4)
    total(parts).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
    for name, value in statistics(net).items():
        assert torch.equal(value, before[name]), name


def test_no_positives() -> None:
    net, maps = head(), pyramid()
    parts, _ = net.losses(maps, maps, sample(0, 5))
    assert parts["loss_box"].item() == 0
    total(parts).backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_frozen_norms_are_folded_without_a_difference() -> None:
    net, maps, roi_R5 = head(), pyramid(), rois(6)
    net.losses(maps, maps, sample())  # statistics that differ from 0 and 1
    expected = net.eval()(maps, maps, roi_R5)
    freeze_bn(net.train())
    torch.testing.assert_close(net(maps, maps, roi_R5).delta_RK4, expected.delta_RK4)


@pytest.mark.parametrize(
    "wrong", [{"width": 6}, {"width": 0}, {"blocks": 0}, {"enlarge": 0.0}], ids=str
)
def test_settings_that_do_not_exist(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="need a multiple of 4, at least one block"):
        DoubleHead(**{"num_classes": 3} | SETTINGS | wrong)


def test_the_parts_have_the_right_widths() -> None:
    branch = ConvBranch(4, 8, 1)
    assert branch(torch.zeros(3, 4, 7, 7)).shape == (3, 8)
    assert TwoFC(4 * 49, 8)(torch.zeros(3, 4 * 49)).shape == (3, 8)
