"""Proposals and losses against torchvision's RegionProposalNetwork, and the rules it lacks."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork

from detection_tsd import boxes
from detection_tsd.data.detection_data import Target
from detection_tsd.models.rpn import RPN, RPNOutput, base_anchors, grid_anchors

STRIDES = (4, 8, 16, 32, 64)
HW = (128, 192)
PARITY = {
    "floor": 0.0,
    "own_best": True,
    "border": None,
    "rounded_anchors": True,
    "min_size": 1e-3,
}


def pyramid(channels: int = 8, batch: int = 2, seed: int = 0) -> list[Tensor]:
    maker = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, channels, HW[0] // stride, HW[1] // stride, generator=maker)
        for stride in STRIDES
    ]


def network(**settings: object) -> RPN:
    torch.manual_seed(0)
    rpn = RPN(8, STRIDES, **settings)  # type: ignore[arg-type]
    for name, weight in rpn.named_parameters():
        torch.nn.init.normal_(weight, std=0.05 if "bbox_pred" in name else 0.15)
    return rpn


def torchvision_network(rpn: RPN, count: int) -> RegionProposalNetwork:
    sizes = tuple((8 * stride,) for stride in STRIDES)
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(STRIDES))
    tops = [{"training": pair[True], "testing": pair[False]} for pair in (rpn.pre, rpn.post)]
    return RegionProposalNetwork(anchors, rpn.head, 0.7, 0.3, count, 0.5, *tops, 0.7)


def objects(*rows: list[float]) -> Target:
    box_G4 = torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)
    return Target(box_G4, torch.ones(len(rows), dtype=torch.int64), torch.zeros(0, 4))


TARGETS = [
    objects([10, 12, 70, 60], [100, 30, 180, 120], [0, 0, 25, 30]),
    objects([30, 20, 90, 100]),
]
SIZES = torch.tensor([[128, 192], [110, 150]])
DRAWS = torch.tensor([0, 1])


def both(training: bool, count: int = 10**6) -> tuple[RPN, list[Tensor], dict[str, Tensor]]:
    """Our network, and torchvision's proposals and losses of the same weights and inputs."""
    rpn = network(
        pre_train=150, post_train=120, pre_test=90, post_test=50, count=count, **PARITY
    ).train(training)
    peer = torchvision_network(rpn, count).train(training)
    images = ImageList(torch.zeros(2, 3, *HW), [tuple(size) for size in SIZES.tolist()])
    features = {str(level): x_BCHW for level, x_BCHW in enumerate(pyramid())}
    given = [{"boxes": target.box_G4} for target in TARGETS]
    proposals, losses = peer(images, features, given if training else None)
    return rpn, proposals, losses


@pytest.mark.parametrize("training", [True, False])
def test_proposals_equal_those_of_torchvision(training: bool) -> None:
    rpn, expected, _ = both(training)
    found = rpn.proposals(rpn(pyramid(), SIZES, HW), SIZES)
    assert [len(box) for box in found] == [len(box) for box in expected]
    assert max(len(box) for box in found) == (120 if training else 50)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_losses_and_gradients_equal_those_of_torchvision() -> None:
    rpn, _, expected = both(True)
    losses = rpn.losses(rpn(pyramid(), SIZES, HW), TARGETS, SIZES, DRAWS)
    torch.testing.assert_close(losses["loss_rpn_cls"], expected["loss_objectness"])
    torch.testing.assert_close(losses["loss_rpn_box"], expected["loss_rpn_box_reg"])
    assert losses["loss_rpn_box"] > 0
    parameters = list(rpn.parameters())
    ours = torch.autograd.grad(sum(losses.values(), torch.zeros(())), parameters)
    theirs = torch.autograd.grad(sum(expected.values(), torch.zeros(())), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_anchors_equal_those_of_torchvision() -> None:
    images = ImageList(torch.zeros(1, 3, *HW), [HW])
    sizes = tuple((8 * stride,) for stride in STRIDES)
    (expected,) = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)(images, pyramid(batch=1))
    output = network(**PARITY)(pyramid(), SIZES, HW)
    assert torch.equal(torch.cat(output.anchors), expected)
    assert [len(anchor) for anchor in output.anchors] == [3 * h * w for h, w in cells()]


def cells() -> list[tuple[int, int]]:
    return [(HW[0] // stride, HW[1] // stride) for stride in STRIDES]


def test_keys_are_those_of_torchvisions_head() -> None:
    keys = set(network().state_dict())
    layers = ("conv.0.0", "cls_logits", "bbox_pred")
    assert keys == {f"head.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    parameters = sum(weight.numel() for weight in RPN().parameters())
    assert parameters == 256 * 256 * 9 + 256 + 257 * 15


def literal_anchors(stride: int, scale: float, ratio: float) -> list[float]:
    """The generator of mmdetection v1: inclusive pixels about the middle of the cell."""
    centre = 0.5 * (stride - 1)
    width, height = stride * scale / math.sqrt(ratio), stride * scale * math.sqrt(ratio)
    corners = (
        centre - 0.5 * (width - 1),
        centre - 0.5 * (height - 1),
        centre + 0.5 * (width - 1),
        centre + 0.5 * (height - 1),
    )
    return [float(round(corner)) for corner in corners]


@pytest.mark.parametrize("stride", STRIDES)
def test_inclusive_anchors_equal_those_of_mmdetection_v1(stride: int) -> None:
    found = base_anchors(stride, 8.0, (0.5, 1.0, 2.0), rounded=True, offset=0.5, plus=1.0)
    assert found.tolist() == [literal_anchors(stride, 8.0, ratio) for ratio in (0.5, 1.0, 2.0)]


def test_anchors_have_the_area_the_ratio_and_the_order_of_the_map() -> None:
    base = base_anchors(8, 6.0, (0.5, 2.0), offset=0.5)
    width, height = boxes.sizes(base)
    torch.testing.assert_close(width * height, torch.full((2,), 48.0**2))
    torch.testing.assert_close(height / width, torch.tensor([0.5, 2.0]))
    torch.testing.assert_close((base[:, :2] + base[:, 2:]) / 2, torch.full((2, 2), 4.0))
    grid = grid_anchors(base, 8, 3, 5)
    assert grid.shape == (30, 4)
    torch.testing.assert_close(grid[2 * 7 + 1], base[1] + torch.tensor([16.0, 8.0, 16.0, 8.0]))


def test_scores_and_deltas_belong_to_their_anchors() -> None:
    rpn = network(floor=None)
    maps = pyramid()
    output = rpn(maps, SIZES, HW)
    x_BCHW = F.relu(rpn.head.conv[0][0](maps[2]))
    delta = rpn.head.bbox_pred(x_BCHW)
    row, column, ratio = 3, 5, 2
    index = (row * 12 + column) * 3 + ratio
    torch.testing.assert_close(
        output.deltas[2][1, index], delta[1, 4 * ratio : 4 * ratio + 4, row, column]
    )
    logit = rpn.head.cls_logits(x_BCHW)
    torch.testing.assert_close(output.logits[2][1, index], logit[1, ratio, row, column])


def test_losses_in_another_layout_are_the_same() -> None:
    rpn = network()
    last = [x_BCHW.contiguous(memory_format=torch.channels_last) for x_BCHW in pyramid()]
    one = rpn.losses(rpn(pyramid(), SIZES, HW), TARGETS, SIZES, DRAWS)
    other = rpn.losses(rpn(last, SIZES, HW), TARGETS, SIZES, DRAWS)
    torch.testing.assert_close(one, other)


def chosen(rpn: RPN, draw: int = 0, image: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    anchors = rpn(pyramid(), SIZES, HW).anchors
    return rpn._choose(torch.cat(anchors), TARGETS[image], SIZES[image], draw)


def test_anchors_over_the_border_are_not_trained() -> None:
    for border, least in ((0.0, 0.0), (5.0, -5.0)):
        rpn = network(border=border, count=10**6)
        anchor = torch.cat(rpn(pyramid(), SIZES, HW).anchors)
        positive, negative, match = chosen(rpn, image=1)
        used = anchor[torch.cat((positive, negative))]
        assert used[:, :2].min() >= least
        assert used[:, 2].max() <= 150 - least
        assert used[:, 3].max() <= 110 - least
        assert (boxes.iou_rows(anchor[positive], match) >= 0.3).all()
        assert len(positive) > 0
    everything = chosen(network(border=None, count=10**6), image=1)
    assert len(everything[1]) > len(negative)


def test_inclusive_anchors_may_touch_the_last_pixel() -> None:
    inside = network(plus=1.0)._inside(
        torch.tensor([[0.0, 0.0, 149.0, 109.0], [0.0, 0.0, 150.0, 109.0], [-1.0, 0.0, 9.0, 9.0]]),
        SIZES[1],
    )
    assert inside is not None
    assert inside.tolist() == [0]


def test_the_floor_decides_which_objects_claim_anchors() -> None:
    lonely = [objects([0, 0, 11, 3])] * 2  # no anchor overlaps it by more than 0.05
    for floor, positives in ((0.3, 0), (0.001, 1), (None, 0)):
        rpn = network(floor=floor, border=None)
        anchor = torch.cat(rpn(pyramid(), SIZES, HW).anchors)
        positive, _, _ = rpn._choose(anchor, lonely[0], SIZES[0], 0)
        assert min(len(positive), 1) == positives


def test_the_choice_depends_on_seed_and_draw_only() -> None:
    first = chosen(network(count=32), draw=5)
    torch.manual_seed(1)
    for a, b in zip(first, chosen(network(count=32), draw=5), strict=True):
        assert torch.equal(a, b)
    assert len(first[0]) + len(first[1]) == 32
    assert not torch.equal(first[1], chosen(network(count=32), draw=6)[1])
    assert not torch.equal(first[1], chosen(network(count=32, seed=1), draw=5)[1])


@pytest.mark.parametrize("settings", [{}, {"border": None, "floor": 0.0}, {"count": 7}])
def test_the_loss_is_the_sum_over_the_choice_divided_by_its_number(
    settings: dict[str, float],
) -> None:
    rpn = network(**settings)
    output = rpn(pyramid(), SIZES, HW)
    anchor = torch.cat(output.anchors)
    cls, box, count = 0.0, 0.0, 0
    for image in range(2):
        logit = torch.cat([level[image] for level in output.logits]).detach()
        delta = torch.cat([level[image] for level in output.deltas]).detach()
        positive, negative, match = rpn._choose(anchor, TARGETS[image], SIZES[image], image)
        cls += float(F.softplus(-logit[positive]).sum() + F.softplus(logit[negative]).sum())
        gap = (delta[positive] - boxes.encode(anchor[positive], match, (1.0,) * 4)).abs()
        box += float(torch.where(gap < 1 / 9, 4.5 * gap.square(), gap - 1 / 18).sum())
        count += len(positive) + len(negative)
    losses = rpn.losses(output, TARGETS, SIZES, DRAWS)
    assert losses["loss_rpn_cls"].item() == pytest.approx(cls / count, rel=1e-5)
    assert losses["loss_rpn_box"].item() == pytest.approx(box / count, rel=1e-5)


def test_the_number_is_the_mean_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    rpn = network()
    output = rpn(pyramid(), SIZES, HW)
    alone = rpn.losses(output, TARGETS, SIZES, DRAWS)
    monkeypatch.setattr("detection_tsd.models.rpn.over_ranks", lambda count: 4 * count)
    for name, value in rpn.losses(output, TARGETS, SIZES, DRAWS).items():
        torch.testing.assert_close(value, alone[name] / 4)


def test_every_parameter_gets_a_gradient() -> None:
    rpn = network()
    losses = rpn.losses(rpn(pyramid(), SIZES, HW), TARGETS, SIZES, DRAWS)
    sum(losses.values(), torch.zeros(())).backward()
    for name, weight in rpn.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().sum() > 0, name


def test_images_without_objects_train_as_background() -> None:
    rpn = network()
    output = rpn(pyramid(), SIZES, HW)
    losses = rpn.losses(output, [objects(), objects()], SIZES, DRAWS)
    assert losses["loss_rpn_box"].item() == 0
    assert losses["loss_rpn_cls"].item() > 0
    sum(losses.values(), torch.zeros(())).backward()
    assert all(weight.grad is not None for weight in rpn.parameters())


def test_without_a_trainable_anchor_both_losses_are_zero_with_a_gradient() -> None:
    rpn = network()
    output = rpn(pyramid(), SIZES, HW)
    small = torch.tensor([[3, 3], [3, 3]])
    losses = rpn.losses(output, [objects([0, 0, 2, 2]), objects()], small, DRAWS)
    assert {key: value.item() for key, value in losses.items()} == {
        "loss_rpn_cls": 0.0,
        "loss_rpn_box": 0.0,
    }
    sum(losses.values(), torch.zeros(())).backward()
    for weight in rpn.parameters():
        assert weight.grad is not None
        assert weight.grad.abs().sum() == 0


def test_tiny_objects_and_images_work() -> None:
    rpn = network(border=None, floor=0.0)
    losses = rpn.losses(
        rpn(pyramid(), SIZES, HW),
        [objects([5, 5, 5.01, 5.02]), objects([0, 0, 128, 192])],
        SIZES,
        DRAWS,
    )
    assert all(value.isfinite() for value in losses.values())
    found = rpn.eval().proposals(rpn(pyramid(), SIZES, HW), torch.tensor([[1, 1], [128, 192]]))
    assert all(boxes.valid_mask(box).all() for box in found)
    assert found[0].max() <= 1


def test_proposals_are_cut_ranked_and_detached() -> None:
    rpn = network(post_test=40).eval()
    found = rpn.scored_proposals(rpn(pyramid(), SIZES, HW), SIZES)
    for (box, score), (height, width) in zip(found, SIZES.tolist(), strict=True):
        assert box.shape == (40, 4)
        assert box.dtype == score.dtype == torch.float32
        assert not box.requires_grad
        assert box.min() >= 0
        assert box[:, 2].max() <= width
        assert box[:, 3].max() <= height
        assert (score.diff() <= 0).all()
        assert 0 <= score.min() <= score.max() <= 1


def test_scores_rank_where_their_probabilities_are_equal() -> None:
    rpn = network(min_size=0.0).eval()
    output = rpn(pyramid(batch=1), SIZES[:1], HW)
    logits = [torch.full_like(level, -9.0) for level in output.logits]
    logits[0][0, [100, 3001]] = torch.tensor([200.0, 300.0])
    (found,) = rpn.scored_proposals(output._replace(logits=logits), SIZES[:1])
    expected = boxes.decode(output.anchors[0][3001], output.deltas[0][0, 3001], (1.0,) * 4)
    torch.testing.assert_close(found.box_M4[0], boxes.clip_boxes(expected, HW))
    assert found.score_M[:2].tolist() == [1.0, 1.0]


def test_levels_do_not_suppress_each_other() -> None:
    rpn = network(nms=0.5).eval()
    box = torch.tensor([[10.0, 10.0, 60.0, 60.0]])
    output = RPNOutput([torch.zeros(1, 1)] * 2, [torch.zeros(1, 1, 4)] * 2, [box, box])
    assert len(rpn.proposals(output, SIZES[:1])[0]) == 2
    together = RPNOutput([torch.zeros(1, 2)], [torch.zeros(1, 2, 4)], [box.repeat(2, 1)])
    assert len(rpn.proposals(together, SIZES[:1])[0]) == 1


def test_half_precision_ends_in_float32_losses() -> None:
    rpn = network()
    with torch.autocast("cpu", torch.bfloat16):
        output = rpn(pyramid(), SIZES, HW)
        losses = rpn.losses(output, TARGETS, SIZES, DRAWS)
    assert all(value.dtype == torch.float32 for value in losses.values())
    assert all(level.dtype == torch.float32 for level in output.logits + output.deltas)


def test_nan_scores_are_refused() -> None:
    rpn = network()
    output = rpn(pyramid(), SIZES, HW)
    output.logits[0].data[1, 0] = math.nan
    with pytest.raises(ValueError, match="is NaN"):
        rpn.proposals(output, SIZES)


def test_maps_that_do_not_cover_the_input_are_refused() -> None:
    rpn = network()
    with pytest.raises(ValueError, match=r"do not cover \(128, 256\) pixels"):
        rpn(pyramid(), SIZES, (128, 256))
    with pytest.raises(ValueError, match="do not cover"):
        rpn(pyramid()[:4], SIZES, HW)
    with pytest.raises(ValueError, match="size_B2 has 1 rows, the maps 2 images"):
        rpn(pyramid(), SIZES[:1], HW)
    odd = [torch.zeros(1, 8, math.ceil(100 / s), math.ceil(90 / s)) for s in STRIDES]
    assert len(rpn(odd, torch.tensor([[100, 90]]), (100, 90)).anchors) == 5


@pytest.mark.parametrize("wrong", [{"low": 0.8}, {"count": 0}, {"post_test": 0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="low <= high, counts >= 1"):
        network(**wrong)


CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "rpn").glob("*.yaml")))
def test_each_configuration_composes_and_instantiates(name: str) -> None:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose(f"rpn/{name}", overrides=["+seed=5"])
    rpn = instantiate(cfg.rpn, seed=5)
    assert isinstance(rpn, RPN)
    assert rpn.seed == 5
    assert rpn.floor == {"openimages": 0.5, "torchvision": 0.0}.get(name, 0.3)
    assert rpn.strides == ((4, 8) if name == "tiny" else STRIDES)
