"""TSM shift: loop, worked vectors, adjoint, layouts, compiler and export."""

import pytest
import torch
from torch import Tensor

from video_mmit.ops.shift import shift

IMPLS = ("auto", "reference")


def frames_of(frames: int = 4, videos: int = 2, channels: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randn(videos * frames, channels, 2, 3, generator=generator).double()


def loop(x: Tensor, frames: int, fold: int) -> Tensor:
    out = x.clone()
    for b in range(len(x)):
        t = b % frames
        for c in range(2 * fold):
            source = t + 1 if c < fold else t - 1
            inside = 0 <= source < frames
            out[b, c] = x[b - t + source, c] if inside else 0
    return out


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("fold", [0, 1, 3])
@pytest.mark.parametrize("frames", [1, 2, 3, 8])
def test_equals_the_loop(frames: int, fold: int, impl: str) -> None:
    x = frames_of(frames)
    assert torch.equal(shift(x, frames, fold, impl), loop(x, frames, fold))


@pytest.mark.parametrize("impl", IMPLS)
def test_check_03_worked_vectors(impl: str) -> None:
    x = torch.tensor([1.0, 2, 3, 4]).view(4, 1, 1, 1).expand(4, 3, 1, 1)
    moved = shift(x, 4, 1, impl)
    assert moved[:, 0].flatten().tolist() == [2, 3, 4, 0]
    assert moved[:, 1].flatten().tolist() == [0, 1, 2, 3]
    assert moved[:, 2].flatten().tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients(impl: str) -> None:
    x = frames_of(3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: shift(x, 3, 2, impl), x)
    assert torch.autograd.gradgradcheck(lambda x: shift(x, 3, 2, impl).square(), x)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()
    out = shift(x, 3, 2, impl)
    (transposed,) = torch.autograd.grad(out, x, v)
    left, right = (out.detach() * v).sum(), (x.detach() * transposed).sum()
    torch.testing.assert_close(left, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layout_and_type_are_kept(dtype: torch.dtype) -> None:
    x = frames_of(4).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    out = shift(x, 4, 2)
    assert (out.dtype, out.stride()) == (dtype, x.stride())
    assert torch.equal(out.double(), loop(x.double(), 4, 2))
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert grad.stride() == x.stride()
    wide = torch.zeros(8, 14, 4, 3)
    wide[:, ::2, ::2] = x.detach()
    assert torch.equal(shift(wide[:, ::2, ::2], 4, 2).double(), out.double())


def test_compiles_and_exports() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: shift(x, 4, 2), fullgraph=True, backend="aot_eager")
    for videos in (2, 3):
        x = frames_of(4, videos).requires_grad_()
        assert torch.equal(compiled(x), shift(x, 4, 2))
        (mine,) = torch.autograd.grad(compiled(x).square().sum(), x)
        (theirs,) = torch.autograd.grad(shift(x, 4, 2).square().sum(), x)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)

    class Op(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return shift(x, 4, 2)

    shapes = ({0: 4 * torch.export.Dim("videos", max=64)},)
    program = torch.export.export(Op(), (frames_of(4),), dynamic_shapes=shapes)
    x = frames_of(4, 5)
    assert torch.equal(program.module()(x), shift(x, 4, 2))


def test_wrong_arguments_are_named() -> None:
    x = frames_of(4)
    with pytest.raises(ValueError, match="batch of 8 frames is no multiple of frames=3"):
        shift(x, 3, 1)
    with pytest.raises(ValueError, match="frames=0"):
        shift(x, 0, 1)
    with pytest.raises(ValueError, match="fold=4: need 0 to 3, half the channels"):
        shift(x, 4, 4)
    with pytest.raises(ValueError, match="impl='hat': need one of auto, reference"):
        shift(x, 4, 1, "hat")
    with pytest.raises(ValueError, match=r"need \(B, C, H, W\)"):
        shift(x[0], 4, 1)
