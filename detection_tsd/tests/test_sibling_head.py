"""The two-layer head, and the parts of every head."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign

from detection_tsd.models.sibling_head import (
    BoxHead,
    Predictor,
    SiblingHead,
    TwoFC,
    joint_linear,
    linear,
    only,
)
from detection_tsd.ops.pyramid import Pyramid
from detection_tsd.tests.small_heads import (
    CHANNELS,
    CLASSES,
    SETTINGS,
    count,
    doubled,
    pyramid,
    rois,
    sample,
)


def head(**other: Any) -> Any:
    torch.manual_seed(0)
    return doubled(SiblingHead(**{"num_classes": CLASSES} | SETTINGS | other))


def test_check_05_parameter_counts() -> None:
    with torch.device("meta"):
        found = SiblingHead(80)
        wide = SiblingHead(80, width=2048)
    assert count(found) == 14_310_805
    assert count(found.box_head) == 13_895_680
    assert count(found.box_predictor.cls_score) == 83_025
    assert count(found.box_predictor.bbox_pred) == 332_100
    assert count(wide) == 30_718_357


def test_initial_values() -> None:
    torch.manual_seed(0)
    found = SiblingHead(80, width=400, channels=32, size=4)
    stds = {
        "box_head.fc6": 512**-0.5, "box_head.fc7": 400**-0.5,
        "box_predictor.cls_score": 0.01, "box_predictor.bbox_pred": 0.001,
    }  # fmt: skip
    for name, std in stds.items():
        layer = found.get_submodule(name)
        assert isinstance(layer, torch.nn.Linear)
        assert layer.weight.std().item() == pytest.approx(std, rel=0.03), name
        assert abs(layer.weight.mean().item()) < 0.05 * std, name
        assert not layer.bias.any(), name
    uniform = Predictor(400, 80, "uniform").cls_score.weight
    assert uniform.abs().max().item() == pytest.approx(400**-0.5, rel=0.01)
    assert uniform.std().item() == pytest.approx((400 * 3) ** -0.5, rel=0.03)


def test_it_is_torchvisions_head() -> None:
    """RoIs of two levels and sizes at the boundary, with torchvision's modules and weights."""
    torch.manual_seed(0)
    ours = SiblingHead(CLASSES, width=16, channels=8, pooling="torchvision").eval()
    maps = [torch.randn(2, 8, 64 >> i, 96 >> i) for i in range(2)]
    corner_R2 = torch.rand(30, 2) * 120
    size_R2 = torch.cat((torch.full((3, 2), 112.0), 20 + 230 * torch.rand(27, 2)))
    box_R4 = torch.cat((corner_R2, corner_R2 + size_R2), dim=1)
    extractor, predictor = TwoMLPHead(8 * 49, 16), FastRCNNPredictor(16, CLASSES + 1)
    extractor.load_state_dict(ours.box_head.state_dict())
    predictor.load_state_dict(ours.box_predictor.state_dict())
    pool = MultiScaleRoIAlign(["0", "1"], 7, 2)
    x = pool({"0": maps[0], "1": maps[1]}, [box_R4[:12], box_R4[12:]], [(256, 384)] * 2)
    logits_RK, delta_RT = predictor(extractor(x))
    image_R1 = torch.tensor([[0.0]] * 12 + [[1.0]] * 18)
    both = Pyramid(maps, (4, 8))
    found = ours(both, both, torch.cat((image_R1, box_R4), dim=1))
    assert ours.levels(both, torch.cat((image_R1, box_R4), dim=1)).unique().tolist() == [0, 1]
    torch.testing.assert_close(found.logits_RK, logits_RK, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.delta_RK4.flatten(1), delta_RT, rtol=1e-4, atol=1e-6)
    assert torch.equal(found.box_R4, box_R4)
    assert found.offset_c is None
    assert found.offset_r is None


def test_losses_are_those_of_its_prediction() -> None:
    ours, maps, sampled = head(loss_weights=(2.0, 3.0)), pyramid(), sample(padding=2)
    parts, said = ours.losses(maps, maps, sampled)
    again = ours(maps, maps, sampled.roi_R5)
    torch.testing.assert_close(said.logits_RK, again.logits_RK)
    entropy = F.cross_entropy(again.logits_RK[:10], sampled.label_R[:10])
    assert set(parts) == {"loss_cls", "loss_box"}
    torch.testing.assert_close(parts["loss_cls"], 2 * entropy)
    cost = 0.0
    for r in range(4):
        x1, y1, x2, y2 = sampled.roi_R5[r, 1:]
        a1, b1, a2, b2 = sampled.match_R4[r]
        w, h = x2 - x1, y2 - y1
        target = torch.stack(
            [(a1 + a2 - x1 - x2) / 2 / w / 0.1, (b1 + b2 - y1 - y2) / 2 / h / 0.1,
             ((a2 - a1) / w).log() / 0.2, ((b2 - b1) / h).log() / 0.2]
        )  # fmt: skip
        delta = again.delta_RK4[r, sampled.label_R[r]]
        cost = cost + F.smooth_l1_loss(delta, target, reduction="sum")
    torch.testing.assert_close(parts["loss_box"], 3 * torch.as_tensor(cost) / 10)


def test_gradients_reach_every_parameter() -> None:
    ours, maps = head(), pyramid()
    parts, _ = ours.losses(maps, maps, sample())
    sum(parts.values()).backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert all(one.grad is not None and one.grad.abs().sum() > 0 for one in maps.maps)


@pytest.mark.parametrize(("positives", "rows"), [(0, 0), (0, 5)])
def test_the_keys_are_always_there(positives: int, rows: int) -> None:
    ours, maps = head(), pyramid()
    parts, said = ours.losses(maps, maps, sample(positives, rows))
    assert set(parts) == {"loss_cls", "loss_box"}
    assert said.delta_RK4.shape == (rows, CLASSES + 1, 4)
    assert parts["loss_box"].item() == 0
    sum(parts.values()).backward()
    assert all(parameter.grad is not None for parameter in ours.parameters())


def test_one_class_and_one_level() -> None:
    ours = head(num_classes=1)
    maps = pyramid(levels=1)
    found = ours(maps, maps, rois(6))
    assert found.logits_RK.shape == (6, 2)
    assert found.delta_RK4.shape == (6, 2, 4)


def test_the_order_of_rois_is_kept() -> None:
    ours, maps, roi_R5 = head(), pyramid(), rois(12)
    order = torch.randperm(12)
    found = ours(maps, maps, roi_R5).logits_RK[order]
    torch.testing.assert_close(ours(maps, maps, roi_R5[order]).logits_RK, found)


def test_two_layers_in_one_product() -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 10, dtype=torch.float64, requires_grad=True)
    pair = linear(10, 6).double(), linear(10, 3).double()
    leaves = [x, *(p for layer in pair for p in layer.parameters())]
    found, expected = joint_linear(x, *pair), (pair[0](x), pair[1](x))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    slopes = torch.autograd.grad(found[0].sin().sum() + found[1].cos().sum(), leaves)
    wanted = torch.autograd.grad(expected[0].sin().sum() + expected[1].cos().sum(), leaves)
    for a, b in zip(slopes, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_pooling_stays_in_float32_inside_autocast() -> None:
    ours, maps = head().float(), pyramid()
    wide = Pyramid([one.detach().float() for one in maps.maps], maps.strides, maps.base)
    half = Pyramid([one.bfloat16() for one in wide.maps], maps.strides, maps.base)
    roi_R5 = rois(8).float()
    with torch.autocast("cpu", torch.bfloat16):
        pooled = ours.pool(wide, roi_R5, ours.levels(wide, roi_R5))
        rounded = ours.pool(half, roi_R5, ours.levels(half, roi_R5))
        found = ours(half, half, roi_R5)
    assert pooled.dtype == rounded.dtype == torch.float32
    exact = ours.pool(maps, rois(8), ours.levels(maps, rois(8)))
    torch.testing.assert_close(pooled.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rounded.double(), exact, rtol=0.02, atol=0.02)
    assert found.box_R4.dtype == torch.float32


def test_a_split_backbone_is_refused() -> None:
    one, other = pyramid(0), pyramid(1)
    assert only(one, one, "X") is one
    with pytest.raises(ValueError, match="SiblingHead pools shared features: it needs a backbone"):
        head()(one, other, rois(2))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_classes": 0}, "num_classes=0: need at least one foreground class"),
        ({"pooling": "max"}, "pooling='max': need one of"),
        ({"stds": (0.1, 0.1, 0.2)}, "stds=.*: need four positive numbers"),
        ({"stds": (0.1, 0.1, 0.2, 0.0)}, "stds=.*: need four positive numbers"),
    ],
)
def test_settings_that_do_not_exist(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SiblingHead(**{"num_classes": 3} | wrong)


def test_other_mistakes() -> None:
    with pytest.raises(TypeError, match="colour"):
        SiblingHead(3, colour=1)
    with pytest.raises(ValueError, match="init='xavier': need one of"):
        Predictor(4, 3, "xavier")
    with pytest.raises(NotImplementedError):
        BoxHead(3)(pyramid(), pyramid(), rois(1))
    assert TwoFC(CHANNELS, 3)(torch.zeros(0, CHANNELS)).shape == (0, 3)
