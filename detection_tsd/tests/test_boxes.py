"""Box functions against loops in inclusive pixels, torchvision, gradients, and integer hashing."""

import math

import pytest
import torch
import torchvision
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torchvision.models.detection._utils import BoxCoder

from detection_tsd import boxes


def random_boxes(count: int, seed: int, size: float = 100.0, least: float = 2.0) -> Tensor:
    maker = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=maker, dtype=torch.float64) * size
    side = torch.rand(count, 2, generator=maker, dtype=torch.float64) * size / 2 + least
    return torch.cat((corner, corner + side), dim=1)


def loop_iou(a: Tensor, b: Tensor, plus: float) -> Tensor:
    """Rows of mmdetection v1's definition, one pair after the other."""
    result = torch.zeros(len(a), len(b), dtype=torch.float64)
    for row, (x1, y1, x2, y2) in enumerate(a.tolist()):
        for column, (u1, v1, u2, v2) in enumerate(b.tolist()):
            width = max(min(x2, u2) - max(x1, u1) + plus, 0.0)
            height = max(min(y2, v2) - max(y1, v1) + plus, 0.0)
            first = (x2 - x1 + plus) * (y2 - y1 + plus)
            second = (u2 - u1 + plus) * (v2 - v1 + plus)
            result[row, column] = width * height / (first + second - width * height)
    return result


def loop_encode(box: Tensor, gt: Tensor, stds: tuple[float, ...], plus: float) -> Tensor:
    rows = []
    for (x1, y1, x2, y2), (u1, v1, u2, v2) in zip(box.tolist(), gt.tolist(), strict=True):
        width, height = x2 - x1 + plus, y2 - y1 + plus
        delta = (
            ((u1 + u2) / 2 - (x1 + x2) / 2) / width,
            ((v1 + v2) / 2 - (y1 + y2) / 2) / height,
            math.log((u2 - u1 + plus) / width),
            math.log((v2 - v1 + plus) / height),
        )
        rows.append([value / std for value, std in zip(delta, stds, strict=True)])
    return torch.tensor(rows, dtype=torch.float64)


def loop_decode(box: Tensor, delta: Tensor, stds: tuple[float, ...], plus: float) -> Tensor:
    """The decoder of mmdetection v1, which takes half an inclusive pixel off both sides."""
    rows, half = [], plus / 2
    for (x1, y1, x2, y2), row in zip(box.tolist(), delta.tolist(), strict=True):
        dx, dy, dw, dh = (value * std for value, std in zip(row, stds, strict=True))
        limit = abs(math.log(16 / 1000))
        width, height = x2 - x1 + plus, y2 - y1 + plus
        x, y = (x1 + x2) / 2 + width * dx, (y1 + y2) / 2 + height * dy
        width *= math.exp(min(max(dw, -limit), limit))
        height *= math.exp(min(max(dh, -limit), limit))
        rows.append(
            [
                x - width / 2 + half,
                y - height / 2 + half,
                x + width / 2 - half,
                y + height / 2 - half,
            ]
        )
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("plus", [0.0, 1.0])
def test_overlaps_equal_the_loop(plus: float) -> None:
    a, b = random_boxes(20, 0), random_boxes(17, 1)
    expected = loop_iou(a, b, plus)
    torch.testing.assert_close(boxes.iou(a, b, plus), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        boxes.iou_rows(a[:17], b, plus), expected[:17].diagonal(), rtol=0, atol=1e-12
    )
    assert (expected > 0).any()
    assert (expected == 0).any()


def test_continuous_overlaps_equal_torchvision_in_every_bit() -> None:
    a, b = random_boxes(50, 2).float(), random_boxes(40, 3).float()
    assert torch.equal(boxes.iou(a, b), torchvision.ops.box_iou(a, b))
    assert torch.equal(boxes.area(a), torchvision.ops.box_area(a))


def test_the_overlap_of_the_first_is_a_share_of_its_area() -> None:
    crowd = torch.tensor([[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]])
    box = torch.tensor([[5.0, 0.0, 15.0, 10.0], [2.0, 2.0, 4.0, 4.0], [3.0, 3.0, 3.0, 3.0]])
    expected = torch.tensor([[0.5, 0.0], [1.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(boxes.overlap_of_first(box, crowd), expected)
    inclusive = boxes.overlap_of_first(box[2:], crowd, 1.0)
    torch.testing.assert_close(inclusive, torch.tensor([[1.0, 0.0]]))


@pytest.mark.parametrize("plus", [0.0, 1.0])
def test_the_coder_equals_the_loop_and_its_inverse(plus: float) -> None:
    box, gt, stds = random_boxes(30, 4), random_boxes(30, 5), (0.1, 0.2, 0.3, 0.4)
    delta = boxes.encode(box, gt, stds, plus)
    torch.testing.assert_close(delta, loop_encode(box, gt, stds, plus), rtol=0, atol=1e-11)
    torch.testing.assert_close(boxes.decode(box, delta, stds, plus), gt, rtol=0, atol=1e-9)
    wild = 20 * torch.randn(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    expected = loop_decode(box, wild, stds, plus)
    torch.testing.assert_close(boxes.decode(box, wild, stds, plus), expected, rtol=1e-11, atol=1e-9)


def test_the_coder_equals_that_of_torchvision() -> None:
    box, gt = random_boxes(40, 7).float(), random_boxes(40, 8).float()
    coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
    delta = boxes.encode(box, gt)
    torch.testing.assert_close(delta, coder.encode_single(gt, box), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        boxes.decode(box, delta), coder.decode_single(delta, box), rtol=1e-5, atol=1e-4
    )
    huge = torch.full((40, 4), 30.0)
    torch.testing.assert_close(
        boxes.decode(box, huge), coder.decode_single(huge, box), rtol=1e-5, atol=1e-2
    )


def test_deltas_of_classes_share_a_box() -> None:
    box = random_boxes(6, 9)
    delta = torch.randn(6, 5, 4, dtype=torch.float64)
    together = boxes.decode(box[:, None], delta)
    assert together.shape == (6, 5, 4)
    for label in range(5):
        torch.testing.assert_close(together[:, label], boxes.decode(box, delta[:, label]))


@pytest.mark.parametrize("plus", [0.0, 1.0])
def test_the_coder_and_the_overlap_have_gradients_in_both_arguments(plus: float) -> None:
    box = random_boxes(4, 10).requires_grad_()
    gt = (random_boxes(4, 10) + torch.tensor([1.3, -0.7, 2.1, 0.9])).requires_grad_()
    delta = torch.randn(4, 4, dtype=torch.float64).requires_grad_()
    stds = (0.1, 0.1, 0.2, 0.2)
    assert gradcheck(lambda a, b: boxes.encode(a, b, stds, plus), (box, gt))
    assert gradcheck(lambda a, b: boxes.decode(a, b, stds, plus), (box, delta))
    assert gradcheck(lambda a, b: boxes.iou_rows(a, b, plus), (box, gt))
    assert gradgradcheck(lambda a, b: boxes.encode(a, b, stds, plus), (box, gt))
    assert gradgradcheck(lambda a, b: boxes.decode(a, b, stds, plus), (box, delta))


def test_a_clipped_size_has_no_gradient() -> None:
    delta = torch.tensor([[0.0, 0.0, 25.0, -25.0]], requires_grad=True)
    decoded = boxes.decode(torch.tensor([[0.0, 0.0, 16.0, 16.0]]), delta)
    torch.testing.assert_close(decoded[0, 2] - decoded[0, 0], torch.tensor(1000.0))
    torch.testing.assert_close(decoded[0, 3] - decoded[0, 1], torch.tensor(0.256))
    decoded.square().sum().backward()
    assert delta.grad is not None
    assert delta.grad[0, 2:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("plus", [0.0, 1.0])
def test_check_06_a_moved_proposal_moves_its_target(plus: float) -> None:
    gamma, stds = 0.1, (0.1, 0.1, 0.2, 0.2)
    box, gt = random_boxes(50, 11), random_boxes(50, 12)
    shift = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(13))
    shift.requires_grad_()
    width, height = boxes.sizes(box, plus)
    moved = box + (gamma * shift * torch.stack((width, height), dim=1)).repeat(1, 2)
    target = boxes.encode(moved, gt, stds, plus)
    correction = torch.cat((gamma / 0.1 * shift, torch.zeros_like(shift)), dim=1)
    expected = boxes.encode(box, gt, stds, plus) - correction
    torch.testing.assert_close(target, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(boxes.decode(moved, target, stds, plus), gt, rtol=0, atol=1e-6)
    # the loss of a regressor that says 0 pulls the shift by the slope of smooth L1
    loss = torch.nn.functional.smooth_l1_loss(torch.zeros_like(target), target, reduction="sum")
    (slope,) = torch.autograd.grad(loss / 50, shift)
    expected_slope = -target.detach()[:, :2].clamp(-1, 1) / 50
    torch.testing.assert_close(slope, expected_slope, rtol=0, atol=1e-9)


@pytest.mark.parametrize("plus", [0.0, 1.0])
def test_boxes_are_cut_at_the_image(plus: float) -> None:
    box = torch.tensor([[-5.0, -6.0, 300.0, 400.0], [10.0, 20.0, 30.0, 40.0]])
    expected = torch.tensor([[0.0, 0.0, 200 - plus, 100 - plus], [10.0, 20.0, 30.0, 40.0]])
    assert torch.equal(boxes.clip_boxes(box, (100, 200), plus), expected)
    assert torch.equal(boxes.clip_boxes(box, torch.tensor([100, 200]), plus), expected)
    per_class = boxes.clip_boxes(box[:, None].expand(2, 3, 4), (100, 200), plus)
    assert torch.equal(per_class[:, 1], expected)


def test_boxes_without_a_size_stay_finite() -> None:
    box = torch.tensor([[5.0, 5.0, 5.0, 5.0], [5.0, 5.0, 5.2, 5.1], [9.0, 9.0, 3.0, 3.0]])
    gt = torch.tensor([[4.0, 4.0, 8.0, 8.0]]).expand(3, 4)
    assert boxes.encode(box, gt).isfinite().all()
    assert boxes.encode(gt, box).isfinite().all()
    assert boxes.iou(box, box).isfinite().all()
    assert boxes.iou(box[:1], box[:1]).item() == 0
    assert boxes.area(box).tolist() == pytest.approx([0.0, 0.02, 0.0], abs=1e-6)
    same = boxes.encode(box[:2], box[:2])
    assert torch.equal(same, torch.zeros(2, 4))


def test_valid_boxes_have_an_area_and_the_size() -> None:
    box = torch.tensor(
        [[0, 0, 4, 4], [0, 0, 4, 0], [4, 4, 0, 0], [0, 0, 1, 9], [0, 0, math.nan, 4]],
        dtype=torch.float32,
    )
    assert boxes.valid_mask(box).tolist() == [True, False, False, True, False]
    assert boxes.valid_mask(box, 2.0).tolist() == [True, False, False, False, False]
    assert boxes.valid_mask(box, 2.0, 1.0).tolist() == [True, False, False, True, False]


def test_no_boxes_are_fine() -> None:
    none = torch.zeros(0, 4)
    some = torch.tensor([[0.0, 0.0, 4.0, 4.0]])
    assert boxes.iou(none, some).shape == (0, 1)
    assert boxes.iou(some, none).shape == (1, 0)
    assert boxes.iou_rows(none, none).shape == (0,)
    assert boxes.encode(none, none).shape == boxes.decode(none, none).shape == (0, 4)
    assert boxes.clip_boxes(none, (5, 5)).shape == (0, 4)
    assert boxes.random_keys(0, 1).shape == (0,)


def reference_keys(count: int, key: int) -> list[float]:
    """The same hash with Python's integers, one number after the other."""

    def mix(word: int) -> int:
        word = ((word ^ (word >> 16)) * 0x7FEB352D) % 2**32
        word = ((word ^ (word >> 15)) * 0x846CA68B) % 2**32
        return word ^ (word >> 16)

    low, high = key % 2**32, (key // 2**32) % 2**32
    return [mix(mix(mix(number) ^ low) ^ high) / 2**32 for number in range(count)]


@pytest.mark.parametrize("key", [0, 7, 2**32 + 5, 2**64 - 1, boxes.fold_key(3, 14, 15)])
def test_keys_are_the_hash_in_integers(key: int) -> None:
    assert boxes.random_keys(500, key).tolist() == reference_keys(500, key)
    assert torch.equal(boxes.random_keys(100, key), boxes.random_keys(500, key)[:100])


def test_keys_are_uniform_unrepeated_and_unrelated() -> None:
    one, other = (boxes.random_keys(200_000, boxes.fold_key(0, draw)) for draw in (41, 42))
    assert len(one.unique()) == 200_000
    counts = torch.histc(one, bins=100, min=0, max=1)
    chi_square = float(((counts - 2000).square() / 2000).sum())
    assert 50 < chi_square < 160  # 99 degrees of freedom
    assert abs(float(torch.corrcoef(torch.stack((one, other)))[0, 1])) < 0.01
    assert abs(float(torch.corrcoef(torch.stack((one[1:], one[:-1])))[0, 1])) < 0.01


def test_folding_tells_numbers_and_their_order_apart() -> None:
    keys = {boxes.fold_key(a, b) for a in range(30) for b in range(30)}
    assert len(keys) == 900
    assert all(0 <= key < 2**64 for key in keys)
    assert boxes.fold_key(-1, 2) == boxes.fold_key(2**64 - 1, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_keys_are_the_same_on_cuda() -> None:
    key = boxes.fold_key(5, 6, 7)
    assert torch.equal(boxes.random_keys(10_000, key, "cuda").cpu(), boxes.random_keys(10_000, key))
