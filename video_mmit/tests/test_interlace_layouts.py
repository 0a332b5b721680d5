"""Interlacing: memory layouts, types, autocast, compiler, export; the mean of the fold."""

import pytest
import torch
from torch import Tensor

from video_mmit.ops.interlace import _interlace, fold_mean, interlace
from video_mmit.tests.interlace_loop import CHANNELS, FOLD, IMPLS, G, loop, problem, variants


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
