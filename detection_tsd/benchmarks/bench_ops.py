"""Speed of the region operators; run by `python -m detection_tsd.benchmarks`.

Every row compares outputs first, and gradients where it times them, then times both sides in turns
in this process. Inputs are those of a test (1000 regions of one image), of a training step (512 of
each of two images) with ResNet-50's maps at 800 x 1344, and of the small synthetic task (32 of each
of 8 images, 32 channels). Sides of regions are drawn log-uniformly, offsets from N(0, 0.5^2). Maps
are channels_last, as the backbones give them, on both sides; the test's are NCHW as well, which
torchvision reads without a copy. `full=true` adds NCHW to all, and bfloat16 on CUDA. Some peers
know no offsets or give them no gradient, and so do less than ours: the row's note says it. On CUDA
the peak memory of both sides is in the row.

Letters: B images, C channels, H W size of a map, R regions, P bins of a side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from detection_tsd.benchmarks import peer_pool
from detection_tsd.benchmarks.peer_pool import GAMMA, SAMPLES, SIZE, Pooling
from detection_tsd.benchmarks.results import Row, measure, measured, row
from detection_tsd.ops.deform_pool import deform_pool
from detection_tsd.ops.levels import roi_levels
from detection_tsd.ops.pyramid import Pyramid
from detection_tsd.ops.roi_align import roi_align

LIMITS = {torch.float32: 2e-3, torch.bfloat16: 5e-2}
MIB = 2**20

Operator = Callable[[Pooling], Tensor]


class Kind(NamedTuple):
    """Sizes of an input."""

    name: str
    regions: int  # of an image
    images: int
    channels: int
    image: tuple[int, int]  # height, width in pixels
    strides: tuple[int, ...]
    sides: tuple[float, float]
    base: float
    backward: bool


TEST = Kind("test", 1000, 1, 256, (800, 1344), (4, 8, 16, 32), (16, 800), 56.0, False)
TRAIN = Kind("training", 512, 2, 256, (800, 1344), (4, 8, 16, 32), (16, 800), 56.0, True)
SMALL = Kind("small training", 32, 8, 32, (96, 96), (4, 8), (16, 60), 18.0, True)
QUICK = Kind("quick test", 100, 1, 256, (400, 672), (4, 8, 16, 32), (16, 400), 56.0, False)
KINDS = (TEST, TRAIN, SMALL)
QUICK_KINDS = (QUICK, SMALL)


class Peer(NamedTuple):
    """Another implementation of one of our operators."""

    name: str
    title: str  # of our operator
    call: Operator
    offset: int | None  # side of the offsets: None, 1 or P
    differs: str = ""  # what it leaves out
    scale: bool = False  # it computes something else, and is there for scale only


PEERS = (
    Peer("torchvision roi_align", "roi_align", peer_pool.plain_roi_align, None),
    Peer(
        "torchvision roi_align of moved boxes", "deform_pool, one offset",
        peer_pool.shifted_roi_align, 1, "the peer gives the offset no gradient",
    ),
    Peer("grid_sample", "deform_pool, one offset", peer_pool.grid_samples, 1),
    Peer(
        "torchvision roi_align of single bins", "deform_pool, an offset of each bin",
        peer_pool.bins_roi_align, SIZE, "the peer gives the offset no gradient",
    ),
    Peer("grid_sample", "deform_pool, an offset of each bin", peer_pool.grid_samples, SIZE),
    Peer(
        "torchvision roi_align", "deform_pool, an offset of each bin", peer_pool.plain_roi_align,
        SIZE, "for scale: the peer knows no offsets", True,
    ),
    Peer(
        "mmcv.ops.deform_roi_pool", "deform_pool, an offset of each bin",
        peer_pool.mmcv_deform_roi_pool, SIZE,
    ),
)  # fmt: skip


def pool_rows(
    repeats: int, quick: bool = False, full: bool = False, seed: int = 0
) -> Iterator[Row]:
    """RoIAlign and deformable pooling against every peer.

    Args:
        repeats: of both sides of a row.
        quick: smaller inputs.
        full: also other memory layouts, and bfloat16 on CUDA.
        seed: of the inputs.

    Raises:
        RuntimeError: a peer computes something else.
    """
    kinds = QUICK_KINDS if quick else KINDS
    inputs = [(kind, torch.float32, torch.channels_last) for kind in kinds]
    nchw = [kind for kind in kinds if full or not kind.backward]
    inputs += [(kind, torch.float32, torch.contiguous_format) for kind in nchw]
    if full and torch.cuda.is_available():
        inputs += [(kind, torch.bfloat16, torch.channels_last) for kind in kinds]
    for kind, dtype, layout in inputs:
        case = problem(kind, seed, dtype, layout)
        for peer in PEERS:
            for backward in (False, True) if kind.backward else (False,):
                yield _row(kind, case, peer, repeats, backward)


def problem(
    kind: Kind, seed: int, dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.channels_last,
) -> Pooling:  # fmt: skip
    """Drawn maps, regions inside the image and offsets of every bin, on CUDA where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    maker = torch.Generator().manual_seed(seed)
    height, width = kind.image
    maps = [
        torch.randn(kind.images, kind.channels, height // s, width // s, generator=maker)
        for s in kind.strides
    ]
    count, (low, high) = kind.regions * kind.images, kind.sides
    extent_2 = torch.tensor([width, height])
    side_R2 = low * (high / low) ** torch.rand(count, 2, generator=maker)
    side_R2 = torch.minimum(side_R2, extent_2)
    corner_R2 = torch.rand(count, 2, generator=maker) * (extent_2 - side_R2)
    image_R1 = torch.arange(kind.images).repeat_interleave(kind.regions)[:, None]
    roi_R5 = torch.cat([image_R1, corner_R2, corner_R2 + side_R2], dim=1).to(device)
    offset = 0.5 * torch.randn(count, 2, SIZE, SIZE, generator=maker)
    level_R = roi_levels(roi_R5, len(maps), kind.base)
    placed = [one.to(device, dtype).contiguous(memory_format=layout) for one in maps]
    return Pooling(placed, kind.strides, roi_R5, level_R, offset.to(device))


def ours(case: Pooling) -> Tensor:
    """Our operator: RoIAlign without offsets, else deformable pooling."""
    pyramid = Pyramid(case.maps, case.strides)
    if case.offset is None:
        return roi_align(pyramid, case.roi_R5, case.level_R, size=SIZE, samples=SAMPLES)
    return deform_pool(
        pyramid, case.roi_R5, case.level_R, case.offset, size=SIZE, gamma=GAMMA, samples=SAMPLES
    )


def _with_offsets_of(peer: Peer, case: Pooling) -> Pooling:
    if peer.offset is None or case.offset is None:
        return case._replace(offset=None)
    return case._replace(offset=case.offset[..., : peer.offset, : peer.offset].contiguous())


def _row(kind: Kind, case: Pooling, peer: Peer, repeats: int, backward: bool) -> Row:
    """Time one side against the other after their results were found equal."""
    title = f"{peer.title}, forward{' and backward' if backward else ''}"
    reason = _missing(peer, case)
    if reason:
        return row(title, label(kind, case), peer.name, f"not measured: {reason}")
    case = _with_offsets_of(peer, case)
    side = _forward_backward if backward else _forward
    mine, theirs = partial(side, ours, case), partial(side, peer.call, case)
    difference = None if peer.scale else _difference(mine(), theirs())
    limit = LIMITS[case.maps[0].dtype]
    if difference is not None and not difference <= limit:
        raise RuntimeError(f"{title} differs from {peer.name} by {difference}, more than {limit}")
    note = peer.differs if backward or peer.scale else ""
    timed = measure(mine, theirs, repeats)
    found = measured(title, label(kind, case), peer.name, timed, difference, note)
    return found | _memory(mine, theirs)


def label(kind: Kind, case: Pooling) -> str:
    """Sizes, type and layout for the table."""
    last = case.maps[0].is_contiguous(memory_format=torch.channels_last)
    images, channels = case.maps[0].shape[:2]
    text = f"{kind.name}: {len(case.roi_R5)} regions, {images}x{channels} channels, "
    text += f"{kind.image[0]}x{kind.image[1]}, {str(case.maps[0].dtype).removeprefix('torch.')}"
    return f"{text} {'channels_last' if last else 'NCHW'}"


def _missing(peer: Peer, case: Pooling) -> str:
    """Why a peer cannot be measured here; empty where it can."""
    if not peer.name.startswith("mmcv"):
        return ""
    if find_spec("mmcv") is None:
        return "mmcv is not installed"
    return "" if case.roi_R5.is_cuda else "needs CUDA"


def _forward(call: Operator, case: Pooling) -> list[Tensor]:
    with torch.no_grad():
        return [_wide(call, case)]


def _wide(call: Operator, case: Pooling) -> Tensor:
    """The peers pool in float32 as well: their maps are widened first."""
    if call is not ours and case.maps[0].dtype != torch.float32:
        case = case._replace(maps=[one.float() for one in case.maps])
    return call(case)


def _forward_backward(call: Operator, case: Pooling) -> list[Tensor]:
    """Result and gradients; the upstream gradient is the result itself."""
    maps = [one.detach().requires_grad_() for one in case.maps]
    offset = None if case.offset is None else case.offset.detach().requires_grad_()
    out = _wide(call, case._replace(maps=maps, offset=offset))
    leaves = maps if offset is None else [*maps, offset]
    gradients = torch.autograd.grad(out, leaves, out.detach(), allow_unused=True)
    return [out.detach(), *(one for one in gradients if one is not None)]


def _difference(mine: list[Tensor], theirs: list[Tensor]) -> float:
    """Greatest difference; relative to the greatest entry where that exceeds 1 (gradients).

    A peer that gives the offset no gradient returns one tensor less.
    """
    found = 0.0
    for one, other in zip(mine, theirs, strict=False):
        scale = max(1.0, other.abs().max().item())
        found = max(found, (one.float() - other.float()).abs().max().item() / scale)
    return found


def _memory(mine: Callable[[], object], theirs: Callable[[], object]) -> Row:
    """Peak MiB of both sides beyond their inputs, on CUDA only."""
    if not torch.cuda.is_available():
        return {}
    peaks = {}
    for name, call in (("ours_mib", mine), ("peer_mib", theirs)):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        peaks[name] = (torch.cuda.max_memory_allocated() - before) / MIB
    return peaks
