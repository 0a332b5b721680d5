"""Losses of box heads against loops written from the equations."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from detection_tsd import boxes, losses
from detection_tsd.losses import Rows, count_rows, progressive_rows

STDS = (0.1, 0.1, 0.2, 0.2)


def problem(count: int, seed: int = 0) -> dict[str, Tensor]:
    """Random rows of three images; image 2 has no positive; the last row is padding."""
    rng = torch.Generator().manual_seed(seed)
    image = torch.arange(count) % 3
    label = torch.randint(0, 4, (count,), generator=rng)
    label[image == 2] = 0
    weight = torch.ones(count, dtype=torch.float64)
    weight[17:] = 0
    double: dict[str, Any] = {"generator": rng, "dtype": torch.float64}
    corner = torch.rand(count, 2, **double) * 50
    box = torch.cat((corner, corner + 10 + 20 * torch.rand(count, 2, **double)), dim=1)
    return {
        "image": image, "label": label, "weight": weight, "box": box,
        "match": box + 6 * torch.rand(count, 4, **double) - 3,
        "logits": torch.randn(count, 4, **double), "better": torch.randn(count, 4, **double),
        "delta": torch.randn(count, 4, 4, **double),
    }  # fmt: skip


def rows_of(case: dict[str, Tensor]) -> Rows:
    return count_rows(case["label"], case["weight"], case["image"].float(), 3)


def loop(case: dict[str, Tensor], plus: float, margin: float, mode: str) -> dict[str, float]:
    """The sums of section 2 of the paper, row by row."""
    label, weight = case["label"].tolist(), case["weight"].tolist()
    images = case["image"].tolist()
    contrast = {image for image, y, w in zip(images, label, weight, strict=True) if y and w}
    every = [r for r, w in enumerate(weight) if w]
    totals = {"cls": 0.0, "box": 0.0, "pc_cls": 0.0, "pc_box": 0.0}
    for r in every:
        p = math.exp(case["logits"][r, label[r]]) / sum(math.exp(z) for z in case["logits"][r])
        q = math.exp(case["better"][r, label[r]]) / sum(math.exp(z) for z in case["better"][r])
        totals["cls"] -= math.log(p)
        if images[r] in contrast:
            totals["pc_cls"] += hinge(p, q, margin, mode)
        if label[r]:
            d = case["delta"][r, label[r]].tolist()
            box, match = case["box"][r].tolist(), case["match"][r].tolist()
            t = encoded(box, match, plus)
            totals["box"] += sum(smooth_l1(a - b) for a, b in zip(d, t, strict=True))
            overlap = iou(
                decoded(case["box"][r].tolist(), d, plus), case["match"][r].tolist(), plus
            )
            still = iou(case["box"][r].tolist(), case["match"][r].tolist(), plus)
            totals["pc_box"] += hinge(still, overlap, margin, mode)
    positives = sum(1 for r in every if label[r])
    compared = sum(1 for r in every if images[r] in contrast)
    over = {"cls": len(every), "box": len(every), "pc_cls": compared, "pc_box": positives}
    return {name: value / max(over[name], 1) for name, value in totals.items()}


def hinge(s: float, d: float, margin: float, mode: str) -> float:
    return max(0.0, s - d + margin) if mode == "paper" else max(0.0, min(1.0, s + margin) - d)


def smooth_l1(x: float) -> float:
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def encoded(box: list[float], gt: list[float], plus: float) -> list[float]:
    w, h = box[2] - box[0] + plus, box[3] - box[1] + plus
    gw, gh = gt[2] - gt[0] + plus, gt[3] - gt[1] + plus
    dx = ((gt[0] + gt[2]) - (box[0] + box[2])) / 2 / w
    dy = ((gt[1] + gt[3]) - (box[1] + box[3])) / 2 / h
    return [dx / 0.1, dy / 0.1, math.log(gw / w) / 0.2, math.log(gh / h) / 0.2]


def decoded(box: list[float], d: list[float], plus: float) -> list[float]:
    w, h = box[2] - box[0] + plus, box[3] - box[1] + plus
    x, y = (box[0] + box[2]) / 2 + 0.1 * d[0] * w, (box[1] + box[3]) / 2 + 0.1 * d[1] * h
    w, h = w * math.exp(0.2 * d[2]) - plus, h * math.exp(0.2 * d[3]) - plus
    return [x - w / 2, y - h / 2, x + w / 2, y + h / 2]


def iou(a: list[float], b: list[float], plus: float) -> float:
    w = max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + plus)
    h = max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + plus)
    area = [(c[2] - c[0] + plus) * (c[3] - c[1] + plus) for c in (a, b)]
    return w * h / (sum(area) - w * h)


def ours(case: dict[str, Tensor], plus: float, margin: float, mode: str) -> dict[str, Tensor]:
    rows = rows_of(case)
    entropy = losses.cross_entropy_rows(case["logits"], case["label"])
    better = losses.cross_entropy_rows(case["better"], case["label"])
    delta = losses.deltas_of(case["delta"], case["label"])
    overlap = losses.overlap_rows(delta, case["box"], case["match"], rows, STDS, plus)
    still = losses.overlap_rows(delta * 0, case["box"], case["match"], rows, STDS, plus)
    return {
        "cls": losses.classification(entropy, rows),
        "box": losses.box_regression(delta, case["box"], case["match"], rows, STDS, plus),
        "pc_cls": losses.progressive_classification(entropy, better, rows, margin, mode),
        "pc_box": losses.progressive_box(still, overlap, rows, margin, mode),
    }


@pytest.mark.parametrize("count", [0, 1, 2, 3, 17, 20])
@pytest.mark.parametrize("mode", losses.PC_MODES)
@pytest.mark.parametrize("plus", [0.0, 1.0])
def test_they_match_the_equations(count: int, mode: str, plus: float) -> None:
    for seed in range(3):
        case = problem(count, seed)
        expected = loop(case, plus, 0.3, mode)
        for name, value in ours(case, plus, 0.3, mode).items():
            assert value.item() == pytest.approx(expected[name], abs=1e-12), name


def test_every_loss_takes_part_in_the_comparison() -> None:
    found = ours(problem(17), 0.0, 0.3, "repo")
    assert all(value > 0.01 for value in found.values())


@pytest.mark.parametrize("mode", losses.PC_MODES)
def test_gradients(mode: str) -> None:
    case = problem(8, seed=2)
    leaves = ("logits", "better", "delta", "box")
    # in mode "repo" the sibling is a constant, which differences do not know
    names = leaves if mode == "paper" else leaves[1:]
    inputs = tuple(case[name].requires_grad_() for name in names)

    def total(*values: Tensor) -> Tensor:
        changed = case | dict(zip(names, values, strict=True))
        parts = ours(changed, 0.0, 0.3, mode)
        if mode == "repo":  # `still` of the box part is a function of the box as well
            parts.pop("pc_box")
        return sum(parts.values(), torch.zeros((), dtype=torch.float64))

    assert torch.autograd.gradcheck(total, inputs)


def test_gradient_of_the_overlap() -> None:
    case = problem(8, seed=1)
    delta = losses.deltas_of(case["delta"], case["label"]).detach().requires_grad_()
    rows, box = rows_of(case), case["box"].requires_grad_()

    def constraint(delta_R4: Tensor, box_R4: Tensor) -> Tensor:
        overlap_R = losses.overlap_rows(delta_R4, box_R4, case["match"], rows, STDS)
        return losses.progressive_box(torch.full_like(overlap_R, 0.9), overlap_R, rows, 0.2)

    assert torch.autograd.gradcheck(constraint, (delta, box))
    constraint(delta, box).backward()
    assert delta.grad is not None
    assert (delta.grad[case["label"] > 0].abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize(
    ("s", "d", "margin", "wanted"),
    [(0.9, 0.8, 0.3, 0.2), (0.5, 0.7, 0.3, 0.1), (0.5, 1.0, 0.3, 0.0), (0.2, 0.9, 0.2, 0.0)],
)
def test_check_07_hand_examples(s: float, d: float, margin: float, wanted: float) -> None:
    pair = torch.tensor([s], dtype=torch.float64), torch.tensor([d], dtype=torch.float64)
    assert progressive_rows(*pair, margin, "repo").item() == pytest.approx(wanted, abs=1e-12)


def test_the_paper_asks_for_the_impossible() -> None:
    pair = torch.tensor([0.9]), torch.tensor([1.0])
    assert progressive_rows(*pair, 0.3, "paper").item() == pytest.approx(0.2)
    assert progressive_rows(*pair, 0.3, "repo").item() == 0


@pytest.mark.parametrize("mode", losses.PC_MODES)
def test_check_07_the_sibling_gets_no_gradient(mode: str) -> None:
    case = problem(17)
    logits, better = case["logits"].requires_grad_(), case["better"].requires_grad_()
    parts = ours(case, 0.0, 0.3, mode)
    parts["pc_cls"].backward()
    assert better.grad is not None
    assert better.grad.abs().sum() > 0
    if mode == "repo":
        assert logits.grad is None
    else:
        assert logits.grad is not None
        assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize("count", [0, 9])
def test_check_07_no_positives(count: int) -> None:
    case = problem(count)
    case["label"] = torch.zeros(count, dtype=torch.int64)
    leaves = [case[name].requires_grad_() for name in ("better", "delta", "box")]
    parts = ours(case, 0.0, 0.3, "repo")
    for name in ("box", "pc_cls", "pc_box"):
        assert parts[name].item() == 0
        assert parts[name].requires_grad
    sum(parts.values(), torch.zeros(())).backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert not leaf.grad.any()


def test_which_rows_count() -> None:
    label = torch.tensor([1, 0, 0, 0, 2, 3])
    weight = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    image = torch.tensor([2.0, 0.0, 2.0, 2.0, 1.0, 0.0])  # not grouped; image 0 has padding only
    rows = count_rows(label, weight, image, 3)
    assert rows.every_R.tolist() == [1, 1, 1, 0, 1, 0]
    assert rows.positive_R.tolist() == [1, 0, 0, 0, 1, 0]
    assert rows.contrast_R.tolist() == [1, 0, 1, 0, 1, 0]
    assert rows.divisor_3.tolist() == [4, 2, 3]
    nothing = count_rows(label[:0], weight[:0], image[:0], 3)
    assert nothing.divisor_3.tolist() == [1, 1, 1]


def test_rows_that_do_not_count_may_hold_anything() -> None:
    case = problem(17)
    expected = ours(case, 0.0, 0.3, "repo")
    still = case["label"] == 0
    case["match"][still] = torch.nan
    case["box"][still] = torch.tensor([5.0, 5.0, 5.0, 5.0], dtype=torch.float64)
    leaves = [case[name].requires_grad_() for name in ("delta", "box")]
    found = ours(case, 0.0, 0.3, "repo")
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    (found["box"] + found["pc_box"]).backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)


def test_boxes_are_not_clipped() -> None:
    """A box beyond the border has an overlap that still moves with it."""
    match = torch.tensor([[-40.0, -40.0, 0.0, 0.0]])
    box = torch.tensor([[-50.0, -40.0, -10.0, 0.0]]).requires_grad_()
    rows = count_rows(torch.tensor([1]), torch.ones(1), torch.zeros(1), 1)
    overlap = losses.overlap_rows(torch.zeros(1, 4), box, match, rows, STDS)
    assert overlap.item() == pytest.approx(0.6)
    overlap.sum().backward()
    assert box.grad is not None
    assert box.grad[0, 0] > 0
    assert box.grad[0, 2] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_they_are_float32_inside_autocast(dtype: torch.dtype) -> None:
    case = problem(17)
    half = {n: x.to(dtype) if n in ("logits", "better", "delta") else x for n, x in case.items()}
    half |= {name: half[name].float() for name in ("box", "match", "weight")}
    wide = half | {name: half[name].float() for name in ("logits", "better", "delta")}
    expected = ours(wide, 0.0, 0.3, "repo")
    with torch.autocast("cpu", dtype):
        found = ours(half, 0.0, 0.3, "repo")
    for name, value in found.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


def test_a_hinge_too_small_for_half_precision() -> None:
    """P = 1e-9 is 0 in float16, and so would be its gradient."""
    logits = torch.tensor([[0.0, -20.0]], dtype=torch.float16, requires_grad=True)
    label = torch.tensor([1])
    rows = count_rows(label, torch.ones(1), torch.zeros(1), 1)
    with torch.autocast("cpu", torch.float16):
        entropy = losses.cross_entropy_rows(logits, label)
        other = losses.cross_entropy_rows(torch.zeros(1, 2), label)
        loss = losses.progressive_classification(other, entropy, rows, 0.2)
    assert loss.item() == pytest.approx(0.7 - math.exp(-20), abs=1e-7)
    (slope,) = torch.autograd.grad(loss, entropy)
    assert slope.item() == pytest.approx(math.exp(-20), rel=1e-3)


@pytest.mark.parametrize("label", [-1, 4])
def test_a_label_out_of_range(label: int) -> None:
    with pytest.raises(ValueError, match=rf"label in .*{label}.*need 0..3"):
        losses.cross_entropy_rows(torch.zeros(2, 4), torch.tensor([0, label]))


def test_settings_that_do_not_exist() -> None:
    one = torch.ones(1)
    with pytest.raises(ValueError, match="pc_mode='hard': need one of"):
        progressive_rows(one, one, 0.2, "hard")
    with pytest.raises(ValueError, match=r"margin=-0\.1: need at least 0"):
        progressive_rows(one, one, -0.1, "repo")


def test_the_target_moves_with_the_box() -> None:
    """D target / d x1 of the box is what trains the shift: -1 / width / std, for both corners."""
    box = torch.tensor([[10.0, 10.0, 30.0, 50.0]], dtype=torch.float64, requires_grad=True)
    match = torch.tensor([[12.0, 8.0, 32.0, 48.0]], dtype=torch.float64)
    (slope,) = torch.autograd.grad(boxes.encode(box, match)[0, 0], box)
    assert (slope[0, 0] + slope[0, 2]).item() == pytest.approx(-1 / 20 / 0.1)
