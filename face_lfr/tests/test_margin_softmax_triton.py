"""The CUDA kernels: run by triton's interpreter on a CPU, and as they are on a GPU.

The interpreter is chosen when triton is imported, so those checks run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from face_lfr.margins import ArcFace, ArcNegFace, CosFace, Margin
from face_lfr.ops.margin_softmax import margin_softmax
from face_lfr.tests.margin_loop import loop_loss, margins, problem, with_gradients

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
SCALE = 12.0


def compare(
    margin: Margin, device: str, count: int = 9, classes: int = 7, centers: int = 1,
    smoothing: float = 0.0, dtype: torch.dtype = torch.float64,
) -> None:  # fmt: skip
    """Loss and gradients of the kernels against the plain operators in float64."""
    feature, weight, label = (
        tensor.to(device) for tensor in problem(count=count, classes=classes, centers=centers)
    )
    call = partial(
        margin_softmax, label_B=label, margin=margin, scale=SCALE, centers=centers,
        smoothing=smoothing,
    )  # fmt: skip
    expected = with_gradients(partial(call, impl="reference"), feature, weight)
    got = with_gradients(partial(call, impl="triton"), feature.to(dtype), weight.to(dtype))
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def check_every_margin(device: str) -> None:
    for margin in margins().values():
        if isinstance(margin, torch.nn.Module):
            margin.to(device)
        for centers, smoothing in ((1, 0.0), (1, 0.1), (3, 0.1)):
            compare(margin, device, centers=centers, smoothing=smoothing)
        compare(margin, device, dtype=torch.float32)


def check_the_loop(device: str) -> None:
    feature, weight, label = problem()
    for margin in (ArcFace(), CosFace(), ArcNegFace()):
        slow = partial(loop_loss, label=label, margin=margin, scale=SCALE)
        fast = partial(
            margin_softmax, label_B=label.to(device), margin=margin, scale=SCALE, impl="triton"
        )
        got = with_gradients(fast, feature.to(device), weight.to(device))
        expected = with_gradients(slow, feature, weight)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one.cpu(), other, rtol=0, atol=1e-12)


def check_splits_and_pieces(device: str) -> None:
    """Several steps in a split, several splits in a row, and none of them full."""
    from face_lfr.ops import margin_softmax_triton

    usual = margin_softmax_triton.ELEMENTS, margin_softmax_triton.PROGRAMS
    for elements, programs in ((32, 1), (32, 9), (64, 27)):
        margin_softmax_triton.ELEMENTS, margin_softmax_triton.PROGRAMS = elements, programs
        compare(ArcNegFace(), device, classes=333, smoothing=0.1)
        compare(ArcFace(), device, classes=101, centers=2)
    margin_softmax_triton.ELEMENTS, margin_softmax_triton.PROGRAMS = usual
    compare(ArcNegFace(), device, classes=1500)


def check_edges(device: str) -> None:
    """Cosines of +-1, an empty batch, and a product that needs no gradient."""
    weight = problem()[1].float().to(device)
    feature, label = torch.cat([weight, -weight]), torch.arange(7, device=device).repeat(2)
    for margin in margins().values():
        if isinstance(margin, torch.nn.Module):
            margin.to(device)
        call = partial(margin_softmax, margin=margin, scale=64.0, impl="triton")
        found = with_gradients(partial(call, label_B=label), feature, weight)
        assert all(x.isfinite().all() for x in found)
        with torch.no_grad():
            assert call(feature, weight, label_B=label).double().item() == found[0].item()
        empty = with_gradients(partial(call, label_B=label[:0]), feature[:0], weight)
        assert empty[0].item() == 0
        assert not empty[2].any()


def check_two_runs_give_the_same_bits(device: str) -> None:
    feature, weight, label = (x.to(device) for x in problem(count=20, classes=50))
    call = partial(margin_softmax, label_B=label, margin=ArcNegFace(), scale=SCALE, impl="triton")
    runs = [with_gradients(call, feature.float(), weight.float()) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


CHECKS: tuple[Callable[[str], None], ...] = (
    check_every_margin,
    check_the_loop,
    check_splits_and_pieces,
    check_edges,
    check_two_runs_give_the_same_bits,
)


@pytest.mark.slow
def test_check_03_kernels_in_the_interpreter() -> None:
    """All checks of this file in one process that imports triton with its interpreter on."""
    environment = os.environ | {
        "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    command = [sys.executable, "-m", __name__]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [check.__name__ for check in CHECKS]


@pytest.mark.parametrize(
    ("kind", "centers", "dtype"),
    [(0, 1, "fp32"), (1, 1, "fp32"), (2, 3, "fp32"), (3, 1, "fp32"), (3, 2, "fp64")],
)
def test_the_kernels_compile_for_a_gpu(
    kind: int, centers: int, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down to machine code, which needs no GPU: the interpreter accepts more than the compiler."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from face_lfr.ops import margin_softmax_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    wide = tl.float64 if dtype == "fp64" else tl.float32
    constants = {"KIND": kind, "CENTERS": centers, "BLOCK": 512, "ACC": wide}
    tensors = (
        "cosine", "value_of", "pivot_of", "constants", "found", "top_of", "factor_of", "even",
        "target_of",
    )  # fmt: skip
    types = dict.fromkeys(tensors, f"*{dtype}") | {"column_of": "*i64"}
    types |= dict.fromkeys(constants, "constexpr")
    for kernel in (
        margin_softmax_triton._statistics_kernel,
        margin_softmax_triton._gradient_kernel,
    ):
        signature = {name: types.get(name, "i32") for name in kernel.arg_names}
        source = ASTSource(kernel, signature, constexprs=constants)
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


def test_without_cuda_the_kernels_are_refused() -> None:
    feature, weight, label = problem()
    with pytest.raises(ValueError, match="impl='triton': cosines are on cpu, need CUDA"):
        margin_softmax(feature, weight, label, ArcFace(), SCALE, impl="triton")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("check", CHECKS)
def test_check_03_kernels_on_cuda(check: Callable[[str], None]) -> None:
    check("cuda")


@pytest.mark.gpu
@needs_cuda
def test_check_03_cuda_takes_triton_by_itself_and_agrees_with_blocks() -> None:
    feature, weight, label = (x.to("cuda") for x in problem(count=64, classes=5000))
    call = partial(margin_softmax, label_B=label, margin=ArcNegFace(), scale=SCALE)
    by_itself, chosen, blocks = (
        with_gradients(partial(call, impl=impl), feature.float(), weight.float())
        for impl in ("auto", "triton", "blocked")
    )
    assert all(torch.equal(one, other) for one, other in zip(by_itself, chosen, strict=True))
    torch.testing.assert_close(blocks, chosen, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@needs_cuda
def test_an_unknown_label_on_cuda_makes_the_loss_nan() -> None:
    feature, weight, label = (x.to("cuda") for x in problem())
    label[3] = 7
    for impl in ("blocked", "triton"):
        assert margin_softmax(feature, weight, label, ArcFace(), SCALE, impl=impl).isnan()


if __name__ == "__main__":
    for run in CHECKS:
        run("cpu")
        sys.stdout.write(f"{run.__name__}\n")
