"""Interlacing: loops, worked vectors, gradients, adjoint, symmetries, wrong input."""

import math

import pytest
import torch
from torch import Tensor

from video_mmit.ops.interlace import interlace
from video_mmit.tests.interlace_loop import CHANNELS, FOLD, IMPLS, G, loop, problem


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["real", "beyond", "integer"])
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 8, 16])
def test_check_01_equals_the_loop(frames: int, kind: str, impl: str) -> None:
    x, offset, weight = problem(frames, kind=kind)
    got = interlace(x, offset, weight, FOLD, impl)
    torch.testing.assert_close(got, loop(x, offset, weight), rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("frames", [1, 2, 4, 8, 16])
def test_check_01_equals_the_hat_formula(frames: int, impl: str) -> None:
    x, offset, weight = problem(frames)
    time = torch.arange(frames).double()
    lag = time[:, None] - time
    expected = x.clone().view(2, frames, CHANNELS, -1)
    for n in range(2):
        for c in range(FOLD):
            hat = torch.relu(1 - (lag - offset[n, c // 2]).abs()) * weight[n, :, c // 2, None]
            expected[n, :, c] = hat @ x.view(2, frames, CHANNELS, -1)[n, :, c]
    got = interlace(x, offset, weight, FOLD, impl)
    torch.testing.assert_close(got, expected.view(x.shape), rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        (0.5, [0.5, 1.5, 2.5, 3.5]),
        (-0.5, [1.5, 2.5, 3.5, 2.0]),
        (1.25, [0, 0.75, 1.75, 2.75]),
        (-1.25, [2.25, 3.25, 3.0, 0]),
        (1.0, [0, 1, 2, 3]),
        (-1.0, [2, 3, 4, 0]),
        (0.0, [1, 2, 3, 4]),
        (4.0, [0, 0, 0, 0]),
    ],
)
def test_check_01_worked_vectors(offset: float, expected: list[float], impl: str) -> None:
    """A positive offset moves content to later frames."""
    x = torch.tensor([1.0, 2, 3, 4]).double().view(4, 1, 1, 1)
    moved = interlace(x, torch.tensor([[offset]]), torch.ones(1, 4, 1), 1, impl)
    assert moved.flatten().tolist() == expected


@pytest.mark.parametrize("impl", IMPLS)
def test_check_02_the_weight_belongs_to_the_time_of_the_output(impl: str) -> None:
    x = torch.tensor([1.0, 2, 3, 4]).view(4, 1, 1, 1)
    weight = torch.tensor([10.0, 20, 30, 40]).view(1, 4, 1)
    moved = interlace(x, torch.tensor([[1.0]]), weight, 1, impl)
    assert moved.flatten().tolist() == [0, 20, 60, 120]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_check_01_gradcheck(impl: str, layout: torch.memory_format) -> None:
    x, offset, weight = problem(3, size=(1, 2))
    inputs = [x.to(memory_format=layout), offset, weight]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(lambda *args: interlace(*args, FOLD, impl), inputs)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_check_01_gradients_that_are_not_needed_are_left_out(needed: tuple[int, ...]) -> None:
    whole, part = problem(3), problem(3)
    for tensor in whole:
        tensor.requires_grad_()
    for index in needed:
        part[index].requires_grad_()
    upstream = torch.randn(whole[0].shape, dtype=torch.float64)
    interlace(*whole, FOLD, "reference").backward(upstream)
    interlace(*part, FOLD, "hat").backward(upstream)
    for index, (expected, got) in enumerate(zip(whole, part, strict=True)):
        assert (got.grad is not None) == (index in needed)
        if got.grad is not None:
            torch.testing.assert_close(got.grad, expected.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_check_01_the_derivative_at_an_integer_is_the_right_one(impl: str) -> None:
    x, offset, weight = problem(4, kind="integer")
    offset.requires_grad_()
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()
    interlace(x, offset, weight, FOLD, impl).backward(upstream)
    step = 2.0**-20  # exact, and so are the integers moved by it
    expected = torch.empty_like(offset)
    for n in range(2):
        for g in range(G):
            after = offset.detach().clone()
            after[n, g] += step
            change = loop(x, after, weight) - loop(x, offset.detach(), weight)
            expected[n, g] = (change * upstream).sum() / step
    assert offset.grad is not None
    torch.testing.assert_close(offset.grad, expected.detach(), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shift", [-5.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 0.4, -1.7])
def test_check_01_backward_is_the_adjoint(shift: float, impl: str) -> None:
    """<S u, v> = <u, S' v>."""
    x, _, weight = problem(4)
    offset = torch.full((2, G), shift, dtype=torch.float64)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).double()
    x.requires_grad_()
    out = interlace(x, offset, weight, FOLD, impl)
    (transposed,) = torch.autograd.grad(out, x, v)
    left, right = (out.detach() * v).sum(), (x.detach() * transposed).sum()
    torch.testing.assert_close(left, right, rtol=0, atol=1e-10)


@pytest.mark.parametrize("impl", IMPLS)
def test_check_01_adjoint_of_a_shift_by_one(impl: str) -> None:
    u = torch.arange(4.0).view(4, 1, 1, 1).requires_grad_()
    interlace(u, torch.ones(1, 1), torch.ones(1, 4, 1), 1, impl).sum().backward()
    assert u.grad is not None
    assert u.grad.flatten().tolist() == [1, 1, 1, 0]


class SameIndexBackward(torch.autograd.Function):
    """A shift by one frame whose backward moves the gradient the same way as the forward."""

    @staticmethod
    def forward(ctx: object, u_T: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(u_T[:1]), u_T[:-1]])

    @staticmethod
    def backward(ctx: object, grad_T: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(grad_T[:1]), grad_T[:-1]])


def test_check_01_a_backward_with_the_index_of_the_forward_is_caught() -> None:
    """By its source `mmcv.ops.tin_shift` is of this kind; only a shift by 0 would pass."""
    u = torch.tensor([1.0, 2, 3, 4], requires_grad=True)
    out = SameIndexBackward.apply(u)
    assert out.tolist() == [0, 1, 2, 3]  # the value is right
    (grad,) = torch.autograd.grad(out, u, torch.ones(4))
    assert grad.tolist() == [0, 1, 1, 1]
    v = torch.tensor([1.0, -2, 3, 5])
    (transposed,) = torch.autograd.grad(SameIndexBackward.apply(u), u, v)
    assert (out * v).sum().item() != pytest.approx((u * transposed).sum().item(), abs=0.5)
    assert not torch.autograd.gradcheck(
        SameIndexBackward.apply, (u.detach().double().requires_grad_(),), raise_exception=False
    )


@pytest.mark.parametrize("fold", [4, 11 - 3, 12])
def test_the_fold_may_be_all_channels(fold: int) -> None:
    x, offset, weight = problem(3)
    x = torch.cat([x, x[:, :1]], dim=1)
    for impl in IMPLS:
        got = interlace(x, offset, weight, fold, impl)
        torch.testing.assert_close(got, loop(x, offset, weight, fold), rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_check_03_time_reversal(impl: str) -> None:
    x, offset, weight = problem(8)
    back = x.view(2, 8, *x.shape[1:]).flip(1).view(x.shape)
    got = interlace(back, -offset, weight.flip(1), FOLD, impl)
    expected = interlace(x, offset, weight, FOLD, impl).view(2, 8, *x.shape[1:]).flip(1)
    torch.testing.assert_close(got, expected.reshape(x.shape), rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_check_03_zero_offset_and_unit_weight_are_the_identity(impl: str) -> None:
    x, offset, weight = problem(8)
    got = interlace(x, torch.zeros_like(offset), torch.ones_like(weight), FOLD, impl)
    assert torch.equal(got, x)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_offset_that_is_no_number_shows(value: float, impl: str) -> None:
    x, offset, weight = problem(4)
    offset[1, 2] = value
    offset.requires_grad_()
    out = interlace(x, offset, weight, FOLD, impl)
    lost = torch.zeros_like(out, dtype=torch.bool)
    lost[4:, 4:6] = True  # video 1, group 2
    assert torch.equal(out.isnan(), lost)
    out[~lost].sum().backward()
    huge = torch.full_like(offset, 1e30).detach()
    assert not interlace(x, huge, weight, FOLD, impl)[:, :FOLD].any()


@pytest.mark.parametrize("impl", ["auto", "hat"])
def test_a_second_derivative_raises_and_is_never_silently_wrong(impl: str) -> None:
    x, offset, weight = (tensor.requires_grad_() for tensor in problem(3))
    (grad,) = torch.autograd.grad(
        interlace(x, offset, weight, FOLD, impl).square().sum(), offset, create_graph=True
    )
    with pytest.raises(RuntimeError):
        grad.sum().backward()


@pytest.mark.parametrize("impl", ["reference", "gather"])
def test_the_plain_forms_have_second_derivatives(impl: str) -> None:
    inputs = [tensor.requires_grad_() for tensor in problem(2, 1, (1, 1))]
    assert torch.autograd.gradgradcheck(lambda *args: interlace(*args, FOLD, impl), inputs)


def test_check_13_wrong_arguments_are_named() -> None:
    x, offset, weight = problem(4)
    cases = {
        "impl='fast': need one of auto": (x, offset, weight, FOLD, "fast"),
        r"x has 8 frames, need 2 videos x 3 frames": (x, offset, weight[:, :3], FOLD),
        r"fold=6: need a multiple of 4 groups in 1\.\.11": (x, offset, weight, 6),
        r"fold=12: need": (x, offset, weight, 12),
        r"fold=0: need": (x, offset, weight, 0),
        r"weight has shape \(2, 4, 2\), need \(2, T, 4\)": (x, offset, weight[..., :2], FOLD),
        r"need \(N, G\)": (x, offset[0], weight, FOLD),
        "fold=8: need a multiple of 0 groups": (x, offset[:, :0], weight[..., :0], FOLD),
        r"need float \(B, C, H, W\)": (x[0], offset, weight, FOLD),
        r"x is torch\.int64": (x.long(), offset, weight, FOLD),
        "impl='triton': x is on cpu": (x, offset, weight, FOLD, "triton"),
    }
    for message, arguments in cases.items():
        with pytest.raises(ValueError, match=message):
            interlace(*arguments)  # type: ignore[arg-type]
