"""The CUDA kernels: run by triton's interpreter on a CPU, and as they are on a GPU.

The interpreter is chosen when triton is imported, so those checks run in a process of their own.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from video_mmit.ops.interlace import _interlace, interlace

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
G, FOLD = 4, 8
LAYOUTS = ("NCHW", "channels_last", "swapped", "sliced")


def problem(
    frames: int, layout: str = "NCHW", device: str = "cpu", size: tuple[int, int] = (3, 5)
) -> list[Tensor]:
    """Frames (B, 11, H, W), offsets (N, 4) with an integer and one beyond, weights (N, T, 4)."""
    generator = torch.Generator().manual_seed(frames)
    x = torch.randn(2 * frames, 11, *size, generator=generator)
    offset = torch.rand(2, G, generator=generator) * 4 - 2
    offset[0, 1], offset[1, 0], offset[1, 3] = 1, -1, 2.0 * frames
    weight = torch.rand(2, frames, G, generator=generator) * 2
    x, offset, weight = (tensor.to(device) for tensor in (x, offset, weight))
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    if layout == "swapped":
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "sliced":
        x = torch.cat([x, x], dim=1)[:, :11]
    return [x, offset, weight]


def compare(
    inputs: list[Tensor], upstream: Tensor, tolerance: float = 1e-5, fold: int = FOLD
) -> None:
    """Value, gradients and strides of `triton` against the closed form in float64."""
    mine = [tensor.detach().requires_grad_() for tensor in inputs]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    out = interlace(*mine, fold, "triton")
    expected = interlace(*exact, fold, "reference")
    assert out.stride() == torch.empty_like(inputs[0]).stride()
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    got = torch.autograd.grad(out, mine, upstream.to(out.dtype))
    wanted = torch.autograd.grad(expected, exact, upstream.to(out.dtype).double())
    assert got[0].stride() == torch.empty_like(inputs[0]).stride()
    for one, other, tensor in zip(got, wanted, inputs, strict=True):
        assert one.dtype == tensor.dtype
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * 10)


def check_every_layout(device: str, half: tuple[torch.dtype, ...]) -> None:
    for layout, frames in [("NCHW", 1), ("NCHW", 8), *((layout, 3) for layout in LAYOUTS)]:
        inputs = problem(frames, layout, device)
        upstream = torch.randn(inputs[0].shape, device=device)
        compare(inputs, upstream)
        compare(inputs, upstream.to(memory_format=torch.channels_last))
        compare(inputs, torch.ones((1, 1, 1, 1), device=device).expand(upstream.shape))
        for dtype in half:
            compare([inputs[0].to(dtype), *inputs[1:]], upstream, 1e-2)


def check_gradients(device: str) -> None:
    for offsets in ([0.3, -1.2], [1.7, 4.5], [-0.4, -5.5]):
        generator = torch.Generator().manual_seed(0)
        inputs = [
            torch.randn(3, 5, 1, 2, generator=generator).double().to(device),
            torch.tensor([offsets], device=device).double(),
            torch.rand(1, 3, 2, generator=generator).double().to(device),
        ]
        leaves = [tensor.requires_grad_() for tensor in inputs]
        assert torch.autograd.gradcheck(lambda *args: interlace(*args, 4, "triton"), leaves)


def check_pieces(device: str) -> None:
    """More elements in a group than one program takes, and not a multiple of them."""
    for layout in ("NCHW", "channels_last"):
        inputs = problem(4, layout, device, size=(17, 31))
        upstream = torch.randn(inputs[0].shape, device=device)
        compare(inputs, upstream, 1e-4)


def check_adjoint_of_a_shift_by_one(device: str) -> None:
    u = torch.arange(4.0, device=device).view(4, 1, 1, 1).requires_grad_()
    one = torch.ones(1, 1, device=device), torch.ones(1, 4, 1, device=device)
    out = interlace(u, *one, 1, "triton")
    assert out.flatten().tolist() == [0, 0, 1, 2]
    out.sum().backward()
    assert u.grad is not None
    assert u.grad.flatten().tolist() == [1, 1, 1, 0]


def check_offsets_that_are_no_numbers(device: str) -> None:
    for value in (float("nan"), float("inf"), float("-inf")):
        x, offset, weight = problem(4, device=device)
        offset[1, 2] = value
        lost = torch.zeros(x.shape, dtype=torch.bool, device=device)
        lost[4:, 4:6] = True
        assert torch.equal(interlace(x, offset, weight, FOLD, "triton").isnan(), lost)
        offset[1, 2] = 1e30
        assert not interlace(x, offset, weight, FOLD, "triton")[4:, 4:6].any()


def check_only_what_is_needed(device: str) -> None:
    for needed in ((0,), (1,), (2,), (0, 1)):
        mine, exact = (problem(3, device=device) for _ in range(2))
        for index in needed:
            mine[index].requires_grad_()
            exact[index].requires_grad_()
        interlace(*mine, FOLD, "triton").square().sum().backward()
        interlace(*exact, FOLD, "reference").square().sum().backward()
        for one, other in zip(mine, exact, strict=True):
            assert (one.grad is None) == (other.grad is None)
            if one.grad is not None:
                torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)


def check_empty_batch_and_all_channels(device: str) -> None:
    x, offset, weight = (tensor[:0].requires_grad_() for tensor in problem(4, device=device))
    out = interlace(x, offset, weight, FOLD, "triton")
    assert out.shape == x.shape
    out.sum().backward()
    assert weight.grad is not None
    assert weight.grad.shape == (0, 4, G)
    x, *rest = problem(4, device=device)
    compare([torch.cat([x, x[:, :1]], dim=1), *rest], torch.randn(8, 12, 3, 5), fold=12)


def check_the_promises_to_the_compiler(device: str) -> None:
    for layout in LAYOUTS:
        inputs = [tensor.requires_grad_() for tensor in problem(4, layout, device)]
        torch.library.opcheck(_interlace, (*inputs, FOLD, "triton"))
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *args: interlace(*args, FOLD, "triton"), fullgraph=True, backend="aot_eager"
    )
    expected = torch.autograd.grad(interlace(*inputs, FOLD, "triton").square().sum(), inputs)
    got = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def check_two_runs_give_the_same_bits(device: str) -> None:
    inputs = [tensor.requires_grad_() for tensor in problem(8, device=device, size=(17, 31))]
    runs = [
        torch.autograd.grad(interlace(*inputs, FOLD, "triton").square().sum(), inputs)
        for _ in range(2)
    ]
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


CHECKS: tuple[Callable[[str], None], ...] = (
    check_gradients,
    check_pieces,
    check_adjoint_of_a_shift_by_one,
    check_offsets_that_are_no_numbers,
    check_only_what_is_needed,
    check_empty_batch_and_all_channels,
    check_the_promises_to_the_compiler,
    check_two_runs_give_the_same_bits,
)


@pytest.mark.slow
def test_check_02_kernels_in_the_interpreter() -> None:
    """All checks of this file in one process that imports triton with its interpreter on."""
    environment = os.environ | {
        "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    command = [sys.executable, "-m", __name__]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["check_every_layout", *(check.__name__ for check in CHECKS)]


@pytest.mark.parametrize(("dtype", "run"), [("fp32", 0), ("bf16", 16)])
def test_the_kernels_compile_for_a_gpu(
    dtype: str, run: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down to machine code, which needs no GPU: the interpreter accepts more than the compiler."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from video_mmit.ops import interlace_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    frames = dict.fromkeys(("gradient", "x", "dx", "out"), f"*{dtype}")
    settings = dict.fromkeys(("offset", "weight", "sums"), "*fp32")
    constants = {"RUN": run, "ROWS": 8, "BLOCK": 256, "ACC": tl.float32}
    constants |= {"NEED_X": True, "NEED_HAT": True}
    for kernel in (interlace_triton._forward_kernel, interlace_triton._backward_kernel):
        names = kernel.arg_names
        types = frames | settings | dict.fromkeys(constants, "constexpr")
        signature = {name: types.get(name, "i32") for name in names}
        used = {name: value for name, value in constants.items() if name in names}
        source = ASTSource(kernel, signature, constexprs=used)
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


def test_without_cuda_the_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match="impl='triton': x is on cpu, need CUDA"):
        interlace(*problem(4), FOLD, "triton")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("check", CHECKS)
def test_check_02_kernels_on_cuda(check: Callable[[str], None]) -> None:
    check("cuda")


@pytest.mark.gpu
@needs_cuda
def test_check_02_layouts_and_types_on_cuda() -> None:
    check_every_layout("cuda", (torch.bfloat16, torch.float16))


@pytest.mark.gpu
@needs_cuda
def test_check_02_cuda_takes_triton_by_itself() -> None:
    inputs = problem(8, device="cuda", size=(14, 14))
    automatic, chosen = (interlace(*inputs, FOLD, impl) for impl in ("auto", "triton"))
    assert torch.equal(automatic, chosen)


if __name__ == "__main__":
    check_every_layout("cpu", (torch.float16,))
    names = ["check_every_layout"]
    for run in CHECKS:
        run("cpu")
        names.append(run.__name__)
    sys.stdout.write("\n".join(names))
