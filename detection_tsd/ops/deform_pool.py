"""Deformable region pooling over a pyramid (arXiv 2003.07540, equations 3 to 6).

Bin (i, j) of a region of w x h pixels is moved by gamma (o_x w, o_y h) and is the mean of bilinear
samples there; `sampling` says where they lie. With the `aligned` sampler zero offsets give
`torchvision.ops.roi_align(aligned=True)`, one offset for all bins gives the same of the moved box,
and any offsets give it bin by bin.

Letters: R regions, 5 = (image index, x1, y1, x2, y2), 2 = (x, y), P bins of a side, C channels.
"""

from __future__ import annotations

import math
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from detection_tsd.ops.deform_pool_cpu import pool_bags, pool_bags_backward
from detection_tsd.ops.deform_pool_reference import pool_reference
from detection_tsd.ops.pyramid import Pyramid
from detection_tsd.ops.sampling import SAMPLERS, Settings

IMPLEMENTATIONS = ("auto", "reference", "bags", "triton")


def deform_pool(
    pyramid: Pyramid, roi_R5: Tensor, level_R: Tensor, offset: Tensor | None = None, *,
    size: int = 7, gamma: float = 0.1, samples: int = 2, sampler: str = "aligned",
    impl: str = "auto",
) -> Tensor:  # fmt: skip
    """Features of moved bins, in float32 at least.

    Differentiable, once, in the maps and in `offset`; regions receive no gradient. A sample that
    was clamped to the map does not move with its offset.

    Args:
        pyramid: maps to read.
        roi_R5: regions in pixels of the network's input, in any order.
        level_R: map of each region; see `roi_levels`.
        offset: (R, 2, P, P), or (R, 2, 1, 1) for one movement of all bins: x first, in units of
            gamma times the width and height of the region. None is zero.
        size: P.
        gamma: unit of the offsets.
        samples: of a bin along each axis; the published settings are 2 for `aligned` and 4 for
            `legacy`.
        sampler: `aligned` or `legacy`; `legacy` takes boxes whose x2, y2 are the last pixel.
        impl: `reference` is plain operators, and what an export contains; `bags` sums rows, in
            a fixed order on any device; `triton` is a CUDA kernel whose gradients of the maps
            are added in no fixed order; `auto` is `triton` on CUDA where it is installed and
            `torch.use_deterministic_algorithms` is off, else `bags`.

    Raises:
        ValueError: shapes or names that do not fit, an image or level that does not exist, or a
            region or offset that is no finite number.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler={sampler!r}: need one of {', '.join(SAMPLERS)}")
    return pool(pyramid, roi_R5, level_R, offset, Settings(size, samples, gamma, sampler), impl)


def pool(
    pyramid: Pyramid, roi_R5: Tensor, level_R: Tensor, offset: Tensor | None, settings: Settings,
    impl: str = "auto",
) -> Tensor:  # fmt: skip
    """`deform_pool` and `roi_align` after their own arguments: checks, types, dispatch."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r}: need one of {', '.join(IMPLEMENTATIONS)}")
    _check_shapes(roi_R5, level_R, offset, settings)
    wide = torch.promote_types(pyramid.maps[0].dtype, torch.float32)
    roi_R5 = roi_R5.detach().to(wide)
    offset = None if offset is None else offset.to(wide)
    _check_values(pyramid, roi_R5, level_R, offset)
    impl = _choose(impl, pyramid)
    if impl == "reference":
        flat_QC, table_L4 = pyramid.flat, pyramid.table
        return pool_reference(flat_QC, table_L4, roi_R5, level_R, offset, settings)
    single = impl == "triton" or pyramid.pixels <= roi_R5.shape[0] * settings.size**2
    rows = [pyramid.flat] if single else list(pyramid.rows)
    found: Tensor = _pool(rows, pyramid.table, roi_R5, level_R, offset, *settings, impl)
    return found


def _choose(impl: str, pyramid: Pyramid) -> str:
    """The implementation by name; in an export one of standard operators."""
    if torch.compiler.is_exporting():
        return "reference"  # our own operator would not run elsewhere
    if impl == "triton" and find_spec("triton") is None:
        raise ValueError("impl='triton': triton is not installed")
    if impl != "auto":
        return impl
    device = pyramid.maps[0].device
    repeatable = torch.are_deterministic_algorithms_enabled()  # triton's gradients are not
    fast = device.type == "cuda" and not repeatable and _triton_runs_on(device.index or 0)
    return "triton" if fast else "bags"


@cache
def _triton_runs_on(device: int) -> bool:
    """Triton is installed and knows the device."""
    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (7, 0)


@torch.library.custom_op("detection_tsd::deform_pool", mutates_args=())
def _pool(
    rows: list[Tensor], table_L4: Tensor, roi_R5: Tensor, level_R: Tensor, offset: Tensor | None,
    size: int, samples: int, gamma: float, mode: str, impl: str,
) -> Tensor:  # fmt: skip
    """One operator to autograd and to the compiler, which neither opens nor breaks at it."""
    settings = Settings(size, samples, gamma, mode)
    if impl == "triton":
        from detection_tsd.ops.deform_pool_triton import pool_triton

        return pool_triton(rows[0], table_L4, roi_R5, level_R, offset, settings)
    return pool_bags(rows, table_L4, roi_R5, level_R, offset, settings)


@_pool.register_fake
def _(
    rows: list[Tensor], table_L4: Tensor, roi_R5: Tensor, level_R: Tensor, offset: Tensor | None,
    size: int, samples: int, gamma: float, mode: str, impl: str,
) -> Tensor:  # fmt: skip
    return rows[0].new_empty(roi_R5.shape[0], rows[0].shape[1], size, size)


@torch.library.custom_op("detection_tsd::deform_pool_backward", mutates_args=())
def _pool_backward(
    grad_RCPP: Tensor, rows: list[Tensor], table_L4: Tensor, roi_R5: Tensor, level_R: Tensor,
    offset: Tensor | None, size: int, samples: int, gamma: float, mode: str, impl: str,
    need_rows: bool, need_offset: bool,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """Gradients of the rows and of the offset; what is not needed comes back empty."""
    settings, needs = Settings(size, samples, gamma, mode), (need_rows, need_offset)
    if impl == "triton":
        from detection_tsd.ops.deform_pool_triton import pool_triton_backward

        dflat, doffset = pool_triton_backward(
            grad_RCPP, rows[0], table_L4, roi_R5, level_R, offset, settings, *needs
        )
        return [dflat] if need_rows else [], doffset
    return pool_bags_backward(grad_RCPP, rows, table_L4, roi_R5, level_R, offset, settings, *needs)


@_pool_backward.register_fake
def _(
    grad_RCPP: Tensor, rows: list[Tensor], table_L4: Tensor, roi_R5: Tensor, level_R: Tensor,
    offset: Tensor | None, size: int, samples: int, gamma: float, mode: str, impl: str,
    need_rows: bool, need_offset: bool,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    doffset = grad_RCPP.new_empty(offset.shape if offset is not None and need_offset else 0)
    return [torch.empty_like(one) for one in rows if need_rows], doffset


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, table_L4, roi_R5, level_R, offset, *ctx.settings = inputs
    ctx.save_for_backward(table_L4, roi_R5, level_R, offset, *rows)


def _backward(ctx: Any, grad_RCPP: Tensor) -> tuple[Any, ...]:
    table_L4, roi_R5, level_R, offset, *rows = ctx.saved_tensors
    need_rows, need_offset = any(ctx.needs_input_grad[0]), ctx.needs_input_grad[4]
    drows, doffset = _pool_backward(
        grad_RCPP, rows, table_L4, roi_R5, level_R, offset, *ctx.settings, need_rows, need_offset
    )
    drows = drows if need_rows else [None] * len(rows)
    return drows, None, None, None, doffset if need_offset else None, *[None] * 5


_pool.register_autograd(_backward, setup_context=_setup_context)


def _check_shapes(
    roi_R5: Tensor, level_R: Tensor, offset: Tensor | None, settings: Settings
) -> None:
    size, samples, gamma, _ = settings
    if size < 1 or samples < 1 or not math.isfinite(gamma):
        raise ValueError(f"size={size}, samples={samples}, gamma={gamma}: need counts and a number")
    if roi_R5.dim() != 2 or roi_R5.shape[1] != 5 or level_R.shape != roi_R5.shape[:1]:
        raise ValueError(
            f"roi {tuple(roi_R5.shape)}, level {tuple(level_R.shape)}: need (R, 5) and (R,)"
        )
    if offset is None:
        return
    shapes = [(roi_R5.shape[0], 2, side, side) for side in (size, 1)]
    if tuple(offset.shape) not in shapes:
        raise ValueError(f"offset has shape {tuple(offset.shape)}, need {shapes[0]} or {shapes[1]}")


def _check_values(pyramid: Pyramid, roi_R5: Tensor, level_R: Tensor, offset: Tensor | None) -> None:
    """One look at all values, which is one wait for the device."""
    if not roi_R5.shape[0] or torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return
    if roi_R5.is_cuda and torch.cuda.is_current_stream_capturing():  # a graph cannot wait
        return
    image_R, levels = roi_R5[:, 0], len(pyramid.maps)
    bad = [
        ~((image_R >= 0) & (image_R < pyramid.batch)),
        ~((level_R >= 0) & (level_R < levels)),
        ~roi_R5.isfinite().all(1),
    ]
    wanted = [
        f"an image index below {pyramid.batch}",
        f"a level below {levels}",
        "finite coordinates",
    ]
    if offset is not None:
        bad.append(~offset.isfinite().flatten(1).all(1))
        wanted.append("finite offsets")
    bad_KR = torch.stack(bad)
    if not bad_KR.any():
        return
    kind, roi = (int(index) for index in bad_KR.nonzero()[0])
    found = (image_R, level_R, roi_R5, offset)[kind]
    values = [] if found is None else found[roi].flatten().tolist()
    raise ValueError(f"region {roi} has {values[:8]}, need {wanted[kind]}")
