"""Interlacing: loops, worked vectors, gradients, adjoint, layouts, types, compiler and export."""

import math

import pytest
import torch
from torch import Tensor

from video_mmit.ops.interlace import _interlace, fold_mean, interlace

IMPLS = ("reference", "gather", "hat")
G, CHANNELS, FOLD = 4, 11, 8


def problem(
    frames: int = 4, videos: int = 2, size: tuple[int, int] = (2, 3), kind: str = "real"
) -> tuple[Tensor, Tensor, Tensor]:
    """Frames (B, 11, H, W), offsets (N, 4), weights (N, T, 4) in float64."""
    generator = torch.Generator().manual_seed(frames)
    x = torch.randn(videos * frames, CHANNELS, *size, generator=generator).double()
    offset = torch.rand(videos, G, generator=generator).double() * 4 - 2
    if kind == "beyond":
        offset = offset * frames * 3
    if kind == "integer":
        offset = offset.round()
    weight = torch.rand(videos, frames, G, generator=generator).double() * 2
    return x, offset, weight


def loop(x: Tensor, offset: Tensor, weight: Tensor, fold: int = FOLD) -> Tensor:
    """The floor form, element by element over videos, times and channels."""
    videos, frames, groups = weight.shape
    u = x.double().view(videos, frames, *x.shape[1:])
    out = u.clone()
    for n in range(videos):
        for t in range(frames):
            for c in range(fold):
                g = c // (fold // groups)
                o = offset[n, g].item()
                base = math.floor(o)
                value = torch.zeros(x.shape[2:], dtype=torch.float64)
                if 0 <= t - base < frames:
                    value += (1 - (o - base)) * u[n, t - base, c]
                if 0 <= t - base - 1 < frames:
                    value += (o - base) * u[n, t - base - 1, c]
                out[n, t, c] = weight[n, t, g].item() * value
    return out.view(x.shape)


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
    """`mmcv.ops.tin_shift` is of this kind; only a shift by 0 would pass."""
    u = torch.tensor([1.0, 2, 3, 4], requires_grad=True)
    out = SameIndexBackward.apply(u)
    assert out.tolist() == [0, 1, 2, 3]  # the value is right
    (grad,) = torch.autograd.grad(out, u, torch.ones(4))
    assert grad.tolist() == [0, 1, 1, 1]
    (v,) = (torch.tensor([1.0, -2, 3, 5]),)
    (transposed,) = torch.autograd.grad(SameIndexBackward.apply(u), u, v)
    assert (out * v).sum().item() != pytest.approx((u * transposed).sum().item(), abs=0.5)
    assert not torch.autograd.gradcheck(
        SameIndexBackward.apply, (u.detach().double().requires_grad_(),), raise_exception=False
    )


def variants() -> dict[str, Tensor]:
    """The same frames in several layouts, (8, 11, 4, 5)."""
    x = problem(4, size=(4, 5))[0].float()
    wide = torch.zeros(8, 22, 4, 10)
    wide[:, ::2, :, ::2] = x
    return {
        "NCHW": x,
        "channels_last": x.to(memory_format=torch.channels_last),
        "every second": wide[:, ::2, :, ::2],
        "frames of a longer batch": torch.cat([x, x])[:8],
        "channels of a wider map": torch.cat([x, x], dim=1)[:, :11],
        "H and W swapped": x.transpose(2, 3).contiguous().transpose(2, 3),
    }


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", list(variants()))
@pytest.mark.parametrize("gradient", ["same", "NCHW", "channels_last", "expanded"])
def test_check_02_layouts(layout: str, gradient: str, impl: str) -> None:
    _, *rest = problem(4, size=(4, 5))
    x, rest = variants()[layout].requires_grad_(), [tensor.requires_grad_() for tensor in rest]
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    if gradient == "channels_last":
        upstream = upstream.to(memory_format=torch.channels_last)
    if gradient == "expanded":
        upstream = torch.full((1, 1, 1, 1), 0.7).expand(x.shape)
    out = interlace(x, *rest, FOLD, impl)
    upstream = torch.empty_like(out).copy_(upstream) if gradient == "same" else upstream
    got = torch.autograd.grad(out, [x, *rest], upstream)
    plain = [tensor.detach().double().contiguous().requires_grad_() for tensor in (x, *rest)]
    expected = interlace(*plain, FOLD, "reference")
    wanted = torch.autograd.grad(expected, plain, upstream.double())
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("videos", [0, 1, 3])
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (3, 1)])
def test_check_02_small_sizes(videos: int, size: tuple[int, int], impl: str) -> None:
    inputs = [tensor.requires_grad_() for tensor in problem(4, videos, size)]
    out = interlace(*inputs, FOLD, impl)
    torch.testing.assert_close(out, loop(*inputs).detach(), rtol=0, atol=1e-12, check_stride=False)
    out.square().sum().backward()
    for tensor in inputs:
        assert tensor.grad is not None
        assert tensor.grad.shape == tensor.shape


@pytest.mark.parametrize("fold", [4, 11 - 3, 12])
def test_the_fold_may_be_all_channels(fold: int) -> None:
    x, offset, weight = problem(3)
    x = torch.cat([x, x[:, :1]], dim=1)
    for impl in IMPLS:
        got = interlace(x, offset, weight, fold, impl)
        torch.testing.assert_close(got, loop(x, offset, weight, fold), rtol=0, atol=1e-12)


def test_check_02_channels_last_stays_channels_last() -> None:
    _, offset, weight = problem(4, size=(4, 5))
    leaf = variants()["channels_last"].requires_grad_()
    out = interlace(leaf, offset, weight, FOLD)
    assert out.stride() == leaf.stride()
    (grad,) = torch.autograd.grad(out, leaf, torch.ones(out.shape))  # an NCHW gradient
    assert grad.stride() == leaf.stride()
    plain = variants()["NCHW"]
    assert interlace(plain, offset, weight, FOLD).stride() == plain.stride()


def test_check_02_nothing_is_copied_to_reach_the_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """In NCHW the products read and write the tensors themselves."""
    x, offset, weight = problem(4, size=(4, 5))
    seen: list[int] = []
    product = torch.bmm

    def spy(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
        seen.append(b.untyped_storage().data_ptr())
        return product(a, b) if out is None else product(a, b, out=out)

    monkeypatch.setattr(torch, "bmm", spy)
    interlace(x, offset, weight, FOLD, "hat")
    assert seen == [x.untyped_storage().data_ptr()] * G


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
def test_check_02_half_precision(layout: str, dtype: torch.dtype, impl: str) -> None:
    _, offset, weight = problem(4, size=(4, 5))
    x = variants()[layout].to(dtype)
    exact = [x.double(), offset.float().double(), weight.float().double()]
    inputs = [x, offset.float(), weight.float()]
    for tensor in (*exact, *inputs):
        tensor.requires_grad_()
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    out, expected = interlace(*inputs, FOLD, impl), interlace(*exact, FOLD, "reference")
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=1e-2)
    got = torch.autograd.grad(out, inputs, upstream)
    wanted = torch.autograd.grad(expected, exact, upstream.double())
    assert [grad.dtype for grad in got] == [dtype, torch.float32, torch.float32]
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("impl", IMPLS)
def test_check_02_autocast_changes_nothing(impl: str) -> None:
    """float32 frames stay float32 and are not rounded on the way, forward and backward."""
    x, offset, weight = (tensor.float().requires_grad_() for tensor in problem(4))
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = interlace(x, offset, weight, FOLD, impl)
            # plain operators called by backward obey autocast, as everywhere in PyTorch
            inside = enabled and impl == "hat"
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            results.append([out, *torch.autograd.grad(out.square().sum(), [x, offset, weight])])
    for plain, cast in zip(*results, strict=True):
        assert plain.dtype == cast.dtype == torch.float32
        torch.testing.assert_close(cast, plain, rtol=0, atol=0)


def test_half_precision_offsets_are_used_in_float32() -> None:
    x, offset, weight = problem(8)
    got = interlace(x.float(), offset.bfloat16(), weight.bfloat16(), FOLD)
    expected = loop(x, offset.bfloat16(), weight.bfloat16())
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)


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


@pytest.mark.parametrize("layout", list(variants()))
def test_the_operator_keeps_its_promises_to_the_compiler(layout: str) -> None:
    """Schema, autograd registration, and strides and types as the fake kernel states them."""
    _, offset, weight = problem(4, size=(4, 5))
    inputs = [tensor.requires_grad_() for tensor in (variants()[layout], offset, weight)]
    inputs[1:] = [tensor.detach().float().requires_grad_() for tensor in inputs[1:]]
    torch.library.opcheck(_interlace, (*inputs, FOLD, "auto"))


def test_check_02_compiles_without_a_break() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *args: interlace(*args, FOLD).relu(), fullgraph=True, backend="aot_eager"
    )
    for videos in (2, 3):  # the second size makes the batch dynamic
        x, offset, weight = (tensor.requires_grad_() for tensor in problem(4, videos))
        got, expected = compiled(x, offset, weight), interlace(x, offset, weight, FOLD).relu()
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
        mine, theirs = (torch.autograd.grad(y.sum(), [x, offset, weight]) for y in (got, expected))
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
def test_check_02_inductor(layout: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: interlace(*args, FOLD).relu(), fullgraph=True)
    _, offset, weight = problem(4, size=(4, 5))
    leaves = variants()[layout], offset.float(), weight.float()
    x, offset, weight = (tensor.requires_grad_() for tensor in leaves)
    got, expected = compiled(x, offset, weight), interlace(x, offset, weight, FOLD).relu()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert got.stride() == expected.stride()
    mine, theirs = (torch.autograd.grad(y.sum(), [x, offset, weight]) for y in (got, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


class Op(torch.nn.Module):
    def forward(self, x: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
        return interlace(x, offset, weight, FOLD) + fold_mean(x, 1)[..., None, None]


def test_check_15_exports_standard_operators_with_a_dynamic_batch() -> None:
    inputs = tuple(tensor.float() for tensor in problem(4))
    videos = torch.export.Dim("videos", max=64)
    shapes = ({0: 4 * videos}, {0: videos}, {0: videos})
    program = torch.export.export(Op(), inputs, dynamic_shapes=shapes)
    assert "video_mmit" not in program.graph_module.code
    for videos_now in (1, 5):
        x, offset, weight = (tensor.float() for tensor in problem(4, videos_now))
        expected = Op()(x, offset, weight)
        torch.testing.assert_close(program.module()(x, offset, weight), expected)


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
        r"need float \(B, C, H, W\)": (x[0], offset, weight, FOLD),
        r"x is torch\.int64": (x.long(), offset, weight, FOLD),
        "impl='triton': x is on cpu": (x, offset, weight, FOLD, "triton"),
    }
    for message, arguments in cases.items():
        with pytest.raises(ValueError, match=message):
            interlace(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", list(variants()))
def test_fold_mean_is_the_mean_of_the_slice(layout: str) -> None:
    x = variants()[layout].requires_grad_()
    got, expected = fold_mean(x, 3), x[:, :3].mean(dim=(2, 3))
    torch.testing.assert_close(got, expected)
    upstream = torch.randn(8, 3, generator=torch.Generator().manual_seed(5))
    mine, theirs = (torch.autograd.grad(y, x, upstream)[0] for y in (got, expected))
    torch.testing.assert_close(mine, theirs)
    assert mine.untyped_storage().nbytes() == 4 * 8 * CHANNELS  # no map of zeros


def test_fold_mean_gradcheck_and_types() -> None:
    x = problem(2, 1)[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fold_mean(x, 3), x)
    assert torch.autograd.gradgradcheck(lambda x: fold_mean(x, 3), x)
    half = torch.full((2, 4, 64, 64), 1.001).bfloat16().requires_grad_()
    mean = fold_mean(half, 2)
    assert mean.dtype == torch.float32
    mean.sum().backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16
    assert half.grad.is_contiguous()
    torch.testing.assert_close(half.grad[:, :2].float(), torch.full((2, 2, 64, 64), 2.0**-12))
    assert not half.grad[:, 2:].any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("impl", ["auto", "hat", "gather", "reference"])
def test_check_02_cuda(impl: str) -> None:
    inputs = [tensor.float() for tensor in problem(8, size=(4, 5))]
    expected = interlace(*inputs, FOLD, "reference")
    got = interlace(*(tensor.cuda() for tensor in inputs), FOLD, impl)
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=1e-5)
