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

from detection_tsd.ops.deform_pool import _pool, deform_pool
from detection_tsd.ops.pyramid import Pyramid
from detection_tsd.ops.roi_align import roi_align
from detection_tsd.tests.pool_loop import problem

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def on(device: str, dtype: torch.dtype, regions: int = 7, channels: int = 3) -> list[Tensor]:
    """Two maps, regions, their levels, and offsets of two by two bins."""
    pyramid, *rest = problem(regions=max(regions, 7), channels=channels, size=2)
    maps = [one.to(device, dtype) for one in pyramid.maps]
    roi, level, offset = (one[-regions:].to(device) for one in rest)
    return [*maps, roi.to(dtype), level, offset.to(dtype)]


def compare(inputs: list[Tensor], side: int | None, tolerance: float, **settings: object) -> None:
    """Value and gradients of `triton` against the plain operators in float64 on the CPU."""
    *maps, roi, level, offset = inputs
    moved = None if side is None else offset[..., :side, :side].contiguous()
    results = []
    for impl, device, dtype in (("triton", roi.device, None), ("reference", "cpu", torch.float64)):
        leaves = [
            one.detach().to(device, dtype or one.dtype).requires_grad_()
            for one in (*maps, *([] if moved is None else [moved]))
        ]
        args = roi.to(device, dtype or roi.dtype), level.to(device)
        out = deform_pool(
            Pyramid(leaves[:2], (4, 8)), *args, leaves[2] if moved is not None else None, size=2,
            impl=impl, **settings,
        )  # fmt: skip
        upstream = torch.arange(out.numel(), device=device).view(out.shape) % 7 - 3.0
        results.append([out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype))])
    for one, other in zip(*results, strict=True):
        scale = max(1.0, other.abs().max().item())
        assert (one.cpu().double() - other.double()).abs().max() < tolerance * scale


def check_float32(device: str) -> None:
    for sampler, samples in (("aligned", 2), ("legacy", 2)):
        for side in (None, 1, 2):
            settings = {"sampler": sampler, "samples": samples}
            compare(on(device, torch.float32), side, 1e-4, **settings)


def check_float64_and_bfloat16(device: str) -> None:
    compare(on(device, torch.float64, 3), 2, 1e-6)  # gamma is passed in float32
    *maps, roi, level, offset = on(device, torch.float32, 3)
    halves = [one.bfloat16() for one in maps]
    compare([*halves, roi, level, offset], 2, 2e-2)


def check_more_channels_than_a_program_holds(device: str) -> None:
    from detection_tsd.ops import deform_pool_triton

    block, deform_pool_triton.BLOCK = deform_pool_triton.BLOCK, 4
    try:
        compare(on(device, torch.float32, 2, 9), 2, 1e-4)
    finally:
        deform_pool_triton.BLOCK = block


def check_the_modes_of_roi_align(device: str) -> None:
    *maps, roi, level, _ = on(device, torch.float32, 5)
    pyramid = Pyramid(maps, (4, 8))
    for mode in ("aligned", "torchvision", "mmdet_v1"):
        found, wanted = (
            roi_align(pyramid, roi, level, size=2, mode=mode, impl=impl)
            for impl in ("triton", "reference")
        )
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def check_only_what_is_needed(device: str) -> None:
    for needed in ((0,), (4,), (0, 4)):
        grads = []
        for impl in ("triton", "reference"):
            inputs = on(device, torch.float32, 3)
            for index in needed:
                inputs[index].requires_grad_()
            *maps, roi, level, offset = inputs
            out = deform_pool(Pyramid(maps, (4, 8)), roi, level, offset, size=2, impl=impl)
            out.square().sum().backward()
            grads.append([one.grad for one in inputs])
        for one, other in zip(*grads, strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def check_no_regions_and_huge_offsets(device: str) -> None:
    *maps, roi, level, offset = on(device, torch.float32, 3)
    pyramid = Pyramid([one.requires_grad_() for one in maps], (4, 8))
    out = deform_pool(pyramid, roi[:0], level[:0], offset[:0], size=2, impl="triton")
    assert out.shape == (0, 3, 2, 2)
    out.sum().backward()
    solid = (roi[:, 3:] - roi[:, 1:3]).abs().amin(1) > 1
    for value in (1e4, -1e4):
        huge = torch.full_like(offset, value).requires_grad_()
        out = deform_pool(pyramid, roi, level, huge, size=2, impl="triton")
        assert not out[solid].any()
        (slope,) = torch.autograd.grad(out.sum(), huge)
        assert not slope[solid].any()
        assert slope.isfinite().all()


def check_a_fixed_order_is_not_promised(device: str) -> None:
    *maps, roi, level, offset = on(device, torch.float32, 2)
    leaf = maps[0].requires_grad_()
    torch.use_deterministic_algorithms(True)
    try:
        inputs = Pyramid([leaf, maps[1]], (4, 8)), roi, level, offset
        out = deform_pool(*inputs, size=2, impl="triton")
        with pytest.raises(RuntimeError, match="adds gradients in no fixed order"):
            out.sum().backward()
        runs = []
        for _ in range(2):
            out = deform_pool(*inputs, size=2)
            runs.append(torch.autograd.grad(out.square().sum(), leaf, retain_graph=True)[0])
        assert torch.equal(*runs)
    finally:
        torch.use_deterministic_algorithms(False)


def check_the_promises_to_the_compiler(device: str) -> None:
    *maps, roi, level, offset = on(device, torch.float32, 2)
    pyramid = Pyramid(maps, (4, 8))
    rows = [pyramid.flat.detach().requires_grad_()]
    for moved in (offset.requires_grad_(), None):
        inputs = (rows, pyramid.table, roi, level, moved, 2, 2, 0.1, "aligned", "triton")
        utils = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(_pool, inputs, test_utils=utils)


CHECKS: tuple[Callable[[str], None], ...] = (
    check_float32,
    check_float64_and_bfloat16,
    check_more_channels_than_a_program_holds,
    check_the_modes_of_roi_align,
    check_only_what_is_needed,
    check_no_regions_and_huge_offsets,
    check_a_fixed_order_is_not_promised,
    check_the_promises_to_the_compiler,
)


@pytest.mark.slow
def test_check_01_kernels_in_the_interpreter() -> None:
    """All checks of this file in one process that imports triton with its interpreter on."""
    environment = os.environ | {
        "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    command = [sys.executable, "-m", __name__]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [check.__name__ for check in CHECKS]


@pytest.mark.parametrize(("mode", "samples", "side"), [(0, 2, 7), (3, 4, 1)])
def test_the_kernels_compile_for_a_gpu(
    mode: int, samples: int, side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down to machine code, which needs no GPU: the interpreter accepts more than the compiler."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from detection_tsd.ops import deform_pool_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"SIZE": 7, "SAMPLES": samples, "MODE": mode, "SIDE": side, "MOVED": True}
    constants |= {"BLOCK": 256, "NEED_FLAT": True, "NEED_OFFSET": True}
    types = {"table": "*i64", "level": "*i64", "gamma": "fp32", "channels": "i32"}
    types |= dict.fromkeys(constants, "constexpr")
    for kernel in (deform_pool_triton._forward_kernel, deform_pool_triton._backward_kernel):
        signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
        used = {name: value for name, value in constants.items() if name in kernel.arg_names}
        source = ASTSource(kernel, signature, constexprs=used)
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


def test_without_cuda_the_kernels_are_refused() -> None:
    *maps, roi, level, offset = on("cpu", torch.float32)
    with pytest.raises(ValueError, match="impl='triton': the maps are on cpu, need CUDA"):
        deform_pool(Pyramid(maps, (4, 8)), roi, level, offset, size=2, impl="triton")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("check", CHECKS)
def test_check_03_kernels_on_cuda(check: Callable[[str], None]) -> None:
    check("cuda")


@pytest.mark.gpu
@needs_cuda
def test_check_01_cuda_takes_triton_by_itself() -> None:
    *maps, roi, level, offset = on("cuda", torch.float32, 24, 40)
    inputs = Pyramid(maps, (4, 8)), roi, level, offset
    automatic, chosen = (deform_pool(*inputs, size=2, impl=impl) for impl in ("auto", "triton"))
    assert torch.equal(automatic, chosen)
    compare(on("cuda", torch.float32, 24, 300), 2, 1e-4)


@pytest.mark.gpu
@needs_cuda
def test_bags_run_on_cuda() -> None:
    results = []
    for device in ("cuda", "cpu"):
        *maps, roi, level, offset = on(device, torch.float32, 24)
        leaves = [one.requires_grad_() for one in (*maps, offset)]
        out = deform_pool(Pyramid(maps, (4, 8)), roi, level, offset, size=2, impl="bags")
        found = [out, *torch.autograd.grad(out.square().sum(), leaves)]
        results.append([one.cpu() for one in found])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    for run in CHECKS:
        run("cpu")
        sys.stdout.write(run.__name__ + "\n")
