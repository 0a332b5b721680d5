"""The disentangled head against a loop over RoIs and bins, and the identities of its parts."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align

from detection_tsd import boxes
from detection_tsd.matching import Sampled
from detection_tsd.models.prediction import Prediction
from detection_tsd.models.sibling_head import SiblingHead
from detection_tsd.models.tsd_head import TSDHead, strip
from detection_tsd.ops.pyramid import Pyramid
from detection_tsd.tests.small_heads import (
    CLASSES,
    PLAIN,
    SETTINGS,
    TSD,
    count,
    doubled,
    pyramid,
    rois,
    sample,
    slopes,
    total,
    tsd,
)


def test_check_05_parameter_counts() -> None:
    with torch.device("meta"):
        found, stripped = TSDHead(80), TSDHead(80, **PLAIN)
    assert found.sibling is not None
    assert count(found.offset.shared) == 3_211_520
    assert count(found.offset.cls) == 90_978
    assert count(found.offset.reg) == 66_306
    for extractor in (found.cls_head, found.box_head, found.sibling.box_head):
        assert count(extractor) == 13_895_680
    for predictor in (found.box_predictor, found.sibling.box_predictor):
        assert count(predictor.cls_score) == 83_025
        assert count(predictor.bbox_pred) == 332_100
    assert count(stripped) == 31_575_289
    assert count(found) == 45_886_094
    assert strip(found.state_dict()).keys() == stripped.state_dict().keys()


@pytest.mark.parametrize("init", ["kaiming", "zero", "normal001"])
def test_initial_values(init: str) -> None:
    torch.manual_seed(0)
    found = TSDHead(80, channels=32, size=4, width=64, offset_width=300, offset_init=init)
    last = {"kaiming": 300**-0.5, "zero": 0.0, "normal001": 0.01}[init]
    for tail in (found.offset.cls, found.offset.reg):
        assert tail[0].weight.std().item() == pytest.approx(300**-0.5, rel=0.03)
        assert tail[2].weight.std().item() == pytest.approx(last, rel=0.15)
        assert not tail[0].bias.any()
        assert not tail[2].bias.any()
    assert found.offset.shared.weight.std().item() == pytest.approx(512**-0.5, rel=0.03)
    assert found.sibling is not None
    assert found.sibling.box_predictor.bbox_pred.weight.std().item() == pytest.approx(
        0.001, rel=0.1
    )
    # the branch keeps PyTorch's own values, as in Sense-X/TSD, unless told otherwise
    assert found.box_predictor.bbox_pred.weight.abs().max().item() == pytest.approx(1 / 8, rel=0.01)
    other = TSDHead(80, channels=32, size=4, width=64, head_init="normal")
    assert other.box_predictor.cls_score.weight.std().item() == pytest.approx(0.01, rel=0.1)


def reference(net: Any, maps: Pyramid, roi_R5: Tensor) -> Prediction:
    """One RoI after another; every bin is an RoIAlign of one bin at its moved place."""
    found = []
    for roi in roi_R5:
        x1, y1, x2, y2 = roi[1:].tolist()
        w, h = x2 - x1, y2 - y1
        level = int((w * h) ** 0.5 >= 32)
        image, scale = maps.maps[level][int(roi[0])][None], 1 / maps.strides[level]

        def align(x: float, y: float, w: float, h: float, side: int) -> Tensor:
            box = torch.tensor([[0.0, x, y, x + w, y + h]], dtype=torch.float64)
            return roi_align(image, box, side, scale, 2, True)  # noqa: B023

        pooled = align(x1, y1, w, h, net.size)
        hidden = F.relu(net.offset.shared(pooled.flatten(1)))
        shift_c = net.offset.cls[2](F.relu(net.offset.cls[0](hidden))).view(2, net.size, net.size)
        dx, dy = net.offset.reg[2](F.relu(net.offset.reg[0](hidden)))[0].tolist()
        bins = torch.zeros_like(pooled)
        for i, j in product(range(net.size), range(net.size)):
            x = x1 + j * w / net.size + 0.1 * shift_c[0, i, j].item() * w
            y = y1 + i * h / net.size + 0.1 * shift_c[1, i, j].item() * h
            bins[0, :, i, j] = align(x, y, w / net.size, h / net.size, 1)[0, :, 0, 0]
        moved = align(x1 + 0.1 * dx * w, y1 + 0.1 * dy * h, w, h, net.size)
        logits, delta = net.box_predictor(
            net.cls_head(bins.flatten(1)), net.box_head(moved.flatten(1))
        )
        move = torch.tensor([dx * w, dy * h, dx * w, dy * h], dtype=torch.float64)
        shift_r = torch.tensor([dx, dy], dtype=torch.float64).view(1, 2, 1, 1)
        box = (roi[1:] + 0.1 * move)[None]
        found.append(Prediction(logits, delta, box, shift_c[None], shift_r))
    return Prediction(*[torch.cat(field) for field in zip(*found, strict=True)])


@torch.no_grad()
def test_it_matches_the_loop() -> None:
    net, maps, roi_R5 = tsd(), pyramid(), rois(9)
    for tail in (net.offset.cls, net.offset.reg):
        tail[2].weight.mul_(5)
    assert net.levels(maps, roi_R5).unique().tolist() == [0, 1]
    expected, found = reference(net, maps, roi_R5), net(maps, maps, roi_R5)
    assert found.offset_c.abs().mean() > 0.1  # they do move
    assert found.offset_r.abs().mean() > 0.1
    for name in Prediction._fields:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), msg=name)


@torch.no_grad()
def test_the_first_channel_is_x() -> None:
    """Of 2 * 7 * 7 outputs the first 49 are x, row after row."""
    net = tsd(size=7)
    for tail in (net.offset.cls, net.offset.reg):
        tail[2].weight.zero_()
    net.offset.cls[2].bias.copy_(torch.arange(98.0))
    net.offset.reg[2].bias.copy_(torch.tensor([1.0, -2.0]))
    roi_R5, maps = rois(3), pyramid()
    found = net(maps, maps, roi_R5)
    assert found.offset_c[0, 0, 2].tolist() == [14, 15, 16, 17, 18, 19, 20]
    assert found.offset_c[1, 1, 6, 6] == 97
    size_R2 = roi_R5[:, 3:] - roi_R5[:, 1:3]
    wanted = torch.cat([size_R2 * torch.tensor([0.1, -0.2])] * 2, dim=1)
    torch.testing.assert_close(found.box_R4 - roi_R5[:, 1:], wanted)


@pytest.mark.parametrize(("cls_shift", "reg_shift"), list(product(("point", "prop"), repeat=2)))
def test_every_way_to_derive_the_proposals(cls_shift: str, reg_shift: str) -> None:
    net = tsd(cls_shift=cls_shift, reg_shift=reg_shift)
    maps, roi_R5, sides = pyramid(), rois(5), {"point": 3, "prop": 1}
    found = net(maps, maps, roi_R5)
    assert found.offset_c.shape == (5, 2, *[sides[cls_shift]] * 2)
    assert found.offset_r.shape == (5, 2, *[sides[reg_shift]] * 2)
    assert torch.equal(found.box_R4, roi_R5[:, 1:]) == (reg_shift == "point")
    parts, _ = net.losses(maps, maps, sample())
    total(parts).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_losses_are_those_of_two_heads() -> None:
    """The joint product and the shared pooling change nothing."""
    net, maps, sampled = tsd(), pyramid(), sample(padding=3)
    alone = doubled(SiblingHead(CLASSES, **SETTINGS))
    alone.load_state_dict(net.sibling.state_dict())
    parts, said = net.losses(maps, maps, sampled)
    expected, _ = alone.losses(maps, maps, sampled)
    branch = net(maps, maps, sampled.roi_R5)
    for name in Prediction._fields:
        torch.testing.assert_close(getattr(said, name), getattr(branch, name))
    torch.testing.assert_close(parts["loss_cls"], expected["loss_cls"])
    torch.testing.assert_close(parts["loss_box"], expected["loss_box"])
    label, real = sampled.label_R, slice(0, 10)
    entropy = F.cross_entropy(branch.logits_RK[real], label[real])
    torch.testing.assert_close(parts["loss_cls_tsd"], entropy)
    rows = torch.arange(4)
    target = boxes.encode(branch.box_R4[:4], sampled.match_R4[:4])
    cost = F.smooth_l1_loss(branch.delta_RK4[rows, label[:4]], target, reduction="sum") / 10
    torch.testing.assert_close(parts["loss_box_tsd"], cost)


def test_padding_changes_nothing() -> None:
    net, maps = tsd(), pyramid()
    padded = sample(padding=5)
    bare = Sampled(*[field[:10] for field in padded])
    leaves = [*net.parameters(), *maps.maps]
    found, _ = net.losses(maps, maps, padded)
    wanted, _ = net.losses(maps, maps, bare)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, msg=name)
    for a, b in zip(slopes(total(found), leaves), slopes(total(wanted), leaves), strict=True):
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_check_08_the_test_ignores_the_sibling() -> None:
    net, maps, roi_R5 = tsd().eval(), pyramid(), rois(6)
    before = net(maps, maps, roi_R5)
    stripped = tsd(**PLAIN).eval()
    stripped.load_state_dict(strip(net.state_dict()))
    for parameter in net.sibling.parameters():
        parameter.fill_(torch.nan)
    for after in (net(maps, maps, roi_R5), stripped(maps, maps, roi_R5)):
        for one, other in zip(before, after, strict=True):
            assert torch.equal(one, other)


def test_strip_takes_the_siblings_of_a_detector_and_a_cascade() -> None:
    names = ["backbone.x", "head.sibling.box_head.fc6.bias", "heads.2.sibling.y", "head.siblings"]
    left = strip({name: torch.zeros(1) for name in names})
    assert list(left) == ["backbone.x", "head.siblings"]


def test_pooling_happens_once_for_each_purpose(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    net, maps = tsd(), pyramid()
    pool, shifted = net.pool, net.pool_shifted
    monkeypatch.setattr(net, "pool", lambda *a: calls.append("plain") or pool(*a))
    monkeypatch.setattr(net, "pool_shifted", lambda *a: calls.append("moved") or shifted(*a))
    net.losses(maps, maps, sample())
    assert calls == ["plain", "moved", "moved"]


def test_gradients_of_the_whole_head() -> None:
    """Analytic against numeric, from all losses to the maps and to the layers of the shifts."""
    torch.manual_seed(0)
    net = doubled(TSDHead(2, channels=2, width=4, size=2, offset_width=4, level_base=16.0))
    maps, sampled = pyramid(channels=2), sample(positives=2, count=4)
    sampled.label_R.clamp_(max=2)
    # the sibling is a constant in the constraint, which numeric differences do not know
    net.margin_cls = net.margin_box = None
    tail = [net.offset.reg[2].weight, net.offset.shared.bias]
    fixed = [one.detach() for one in maps.maps]
    ways = [torch.randn(5, *one.shape, dtype=torch.float64) for one in fixed]  # to go in

    def loss(along: Tensor, *_: Tensor) -> Tensor:
        pairs = zip(fixed, ways, strict=True)
        moved = [one + torch.einsum("n,nbchw->bchw", along, way) for one, way in pairs]
        both = Pyramid(moved, maps.strides, maps.base)
        return total(net.losses(both, both, sampled)[0])

    start = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (start, *tail), eps=1e-7, atol=1e-5)


def test_float32_inside_autocast() -> None:
    net, wide = tsd().float(), pyramid()
    maps = Pyramid([one.detach().bfloat16() for one in wide.maps], wide.strides, wide.base)
    sampled = sample()
    sampled = sampled._replace(roi_R5=sampled.roi_R5.float(), match_R4=sampled.match_R4.float())
    exact, _ = net.losses(*[Pyramid(maps.maps, maps.strides, maps.base)] * 2, sampled)
    with torch.autocast("cpu", torch.bfloat16):
        parts, said = net.losses(maps, maps, sampled)
        moved = net.pool_shifted(
            maps, sampled.roi_R5, net.levels(maps, sampled.roi_R5), said.offset_c
        )
    assert said.logits_RK.dtype == torch.bfloat16
    assert said.box_R4.dtype == said.offset_c.dtype == moved.dtype == torch.float32
    for name, value in parts.items():
        assert value.dtype == torch.float32, name
        torch.testing.assert_close(value, exact[name], rtol=0.1, atol=0.05, msg=name)


def test_far_shifts_are_finite_and_wrong_ones_named() -> None:
    net, maps = tsd(), pyramid()
    with torch.no_grad():
        net.offset.cls[2].bias.fill_(1e4)
        net.offset.reg[2].bias.fill_(-1e4)
    parts, said = net.losses(maps, maps, sample())
    assert all(value.isfinite() for value in parts.values())
    (slope,) = slopes(parts["loss_cls_tsd"], [said.offset_c])
    assert not slope.any()
    with torch.no_grad():
        net.offset.cls[2].bias[3] = torch.nan
    with pytest.raises(ValueError, match=r"region 0 .*need finite offsets"):
        net(maps, maps, rois(2))


def test_the_conventions_of_the_authors_code() -> None:
    net, maps = tsd(sampler="legacy", pooling="mmdet_v1", plus=1.0), pyramid()
    assert net.shift_samples == 4
    parts, said = net.losses(maps, maps, sample())
    assert all(value.isfinite() for value in parts.values())
    roi_R5 = sample().roi_R5
    size_R2 = roi_R5[:, 3:] - roi_R5[:, 1:3] + 1
    moved_R2 = 0.1 * said.offset_r[:, :, 0, 0] * size_R2
    torch.testing.assert_close(said.box_R4, roi_R5[:, 1:] + moved_R2.repeat(1, 2))
    total(parts).backward()
    assert net.offset.cls[2].weight.grad.any()


def test_one_class_one_level_any_order() -> None:
    net, maps = tsd(num_classes=1), pyramid(levels=1)
    roi_R5, order = rois(8), torch.randperm(8)
    found, shuffled = net(maps, maps, roi_R5), net(maps, maps, roi_R5[order])
    for one, other in zip(found, shuffled, strict=True):
        torch.testing.assert_close(one[order], other)
    assert found.logits_RK.shape == (8, 2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"cls_shift": "bin"}, "cls_shift='bin': need one of"),
        ({"reg_shift": "box"}, "reg_shift='box': need one of"),
        ({"pc_mode": "soft"}, "pc_mode='soft': need one of"),
        ({"margin_cls": -0.2}, "margin=-0.2: need at least 0"),
        ({"margin_box": -0.2}, "margin=-0.2: need at least 0"),
        ({"joint": False}, "joint=False: the progressive constraint needs the sibling head"),
        ({"sampler": "fast"}, "sampler='fast': need one of"),
        ({"gamma": 0.0}, "gamma=0.0: need a positive number"),
        ({"offset_init": "one"}, "offset_init='one': need one of"),
        ({"head_init": "one"}, "init='one': need one of"),
    ],
)
def test_settings_that_do_not_exist(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TSDHead(3, **TSD | wrong)


def test_a_split_backbone_is_refused() -> None:
    one, other = pyramid(0), pyramid(1)
    with pytest.raises(ValueError, match="TSDHead pools shared features"):
        tsd()(one, other, rois(2))
    with pytest.raises(ValueError, match="TSDHead pools shared features"):
        tsd().losses(one, other, sample())
