"""Speed of the temporal operators; run by `python -m video_mmit.benchmarks`.

Every row compares outputs first, and gradients where it times them, then times both sides in turns
in this process. Shapes are the inputs of the blocks of ResNet-50 at 224 x 224. The input of the
TSM row has offsets of one frame, that of the copy has none, so that both sides give the same.
`full=true` adds 16 frames, bfloat16 and channels_last. On CUDA the operator's kernels are measured.

Letters: N videos, T frame positions, B = N*T frames, C channels, H W size, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from video_mmit.benchmarks.peer_interlace import frame_loop, two_shifts
from video_mmit.benchmarks.results import Row, measure, row
from video_mmit.ops.interlace import interlace
from video_mmit.ops.shift import shift

GROUPS = ("interlace", "shift")
SHAPES = ((64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7))  # C, H = W
VIDEOS, SHIFT_DIV, OFFSETS = 2, 4, 4

Operator = Callable[[Tensor, Tensor, Tensor, int], Tensor]


class Sizes(Protocol):
    """What the rows read of the benchmark's configuration."""

    repeats: int
    full: bool
    seed: int


class Case(NamedTuple):
    """One input, with the gradient of the output."""

    x: Tensor
    offset: Tensor
    weight: Tensor
    fold: int
    upstream: Tensor

    @property
    def label(self) -> str:
        """Shape, type and layout for the table."""
        frames, (_, channels, height, width) = self.weight.shape[1], self.x.shape
        last = self.x.is_contiguous(memory_format=torch.channels_last) and height * width > 1
        kind = str(self.x.dtype).removeprefix("torch.")
        layout = "channels_last" if last else "NCHW"
        shape = f"{len(self.offset)}x{frames}x{channels}x{height}x{width}"
        return f"{shape}, {self.fold} shifted, {kind} {layout}"


class Kind(NamedTuple):
    """Frames, type and layout of a case."""

    frames: int = 8
    dtype: torch.dtype = torch.float32
    layout: torch.memory_format = torch.contiguous_format


KINDS = (
    Kind(16),
    Kind(dtype=torch.bfloat16),
    Kind(layout=torch.channels_last),
    Kind(dtype=torch.bfloat16, layout=torch.channels_last),
)


def rows(cfg: Sizes) -> Iterator[Row]:
    """All rows of this file."""
    yield from interlace_rows(cfg)
    yield from shift_rows(cfg)


def interlace_rows(cfg: Sizes) -> Iterator[Row]:
    """Interlacing against the authors' formulation, gathers, a plain product, TSM and a copy."""
    for case in _cases(cfg):
        for peer, call in _peers().items():
            yield _row("interlace", case, interlace, peer, call, cfg.repeats, False)
            yield _row("interlace", case, interlace, peer, call, cfg.repeats, True)
        fixed = case._replace(weight=torch.ones_like(case.weight))
        one = torch.tensor([-1.0, -1.0, 1.0, 1.0], device=case.x.device).expand_as(case.offset)
        yield from _against_shift(fixed._replace(offset=one), cfg.repeats)
        yield from _against_copy(fixed._replace(offset=torch.zeros_like(one)), cfg.repeats)
    yield _mmcv_row(cfg)


def shift_rows(cfg: Sizes) -> Iterator[Row]:
    """The shift of TSM against slices that are concatenated, as in temporal-shift-module."""

    def ours(x: Tensor, offset: Tensor, weight: Tensor, fold: int) -> Tensor:
        return shift(x, weight.shape[1], fold // 2)

    def peer(x: Tensor, offset: Tensor, weight: Tensor, fold: int) -> Tensor:
        return shift(x, weight.shape[1], fold // 2, "reference")

    for case in _cases(cfg):
        for backward in (False, True):
            yield _row("TSM shift", case, ours, "slices and cat", peer, cfg.repeats, backward)


def _peers() -> dict[str, Operator]:
    return {
        "two shifts and a mix (authors)": two_shifts,
        "torch.gather, twice": partial(interlace, impl="gather"),
        "plain matrix product": partial(interlace, impl="reference"),
        "loop over frames": frame_loop,
    }


def _cases(cfg: Sizes) -> Iterator[Case]:
    for kind in (Kind(), *(KINDS if cfg.full else ())):
        for channels, size in SHAPES:
            yield problem(channels, size, kind, cfg.seed)


def problem(channels: int, size: int, kind: Kind, seed: int, videos: int = VIDEOS) -> Case:
    """A drawn input; offsets lie in (-2, 2) and weights in (0, 2), as the module gives them."""
    generator = torch.Generator().manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def maps() -> Tensor:
        drawn = torch.randn(videos * kind.frames, channels, size, size, generator=generator)
        return drawn.to(device, kind.dtype).contiguous(memory_format=kind.layout)

    offset = torch.rand(videos, OFFSETS, generator=generator) * 4 - 2
    weight = torch.rand(videos, kind.frames, OFFSETS, generator=generator) * 2
    x, upstream = maps(), maps()
    return Case(x, offset.to(device), weight.to(device), channels // SHIFT_DIV, upstream)


def _row(
    name: str, case: Case, ours: Operator, peer_name: str, peer: Operator, repeats: int,
    backward: bool,
) -> Row:  # fmt: skip
    """Time one side against the other after their results were found equal."""
    side = _forward_backward if backward else _forward
    mine, theirs = partial(side, ours, case), partial(side, peer, case)
    difference = max(map(_difference, mine(), theirs()))
    limit = 1e-4 if case.x.dtype == torch.float32 else 5e-2
    if not difference <= limit:
        raise RuntimeError(f"{name} differs from {peer_name} by {difference}, more than {limit}")
    title = f"{name}, forward{' and backward' if backward else ''}"
    timed = measure(mine, theirs, repeats)
    return row(title, case.label, peer_name) | timed | {"max_abs_diff": difference}


def _forward(call: Operator, case: Case) -> list[Tensor]:
    with torch.no_grad():
        return [call(case.x, case.offset, case.weight, case.fold)]


def _forward_backward(call: Operator, case: Case) -> list[Tensor]:
    inputs = [tensor.detach().requires_grad_() for tensor in case[:3]]
    out = call(inputs[0], inputs[1], inputs[2], case.fold)
    gradients = torch.autograd.grad(out, inputs, case.upstream, allow_unused=True)
    return [out.detach(), *(gradient for gradient in gradients if gradient is not None)]


def _difference(ours: Tensor, peer: Tensor) -> float:
    """Greatest difference; relative to the greatest entry where that exceeds 1 (gradients)."""
    scale = max(1.0, peer.abs().max().item())
    return (ours.double() - peer.double()).abs().max().item() / scale


def _against_shift(case: Case, repeats: int) -> Iterator[Row]:
    def tsm(x: Tensor, offset: Tensor, weight: Tensor, fold: int) -> Tensor:
        return shift(x, weight.shape[1], fold // 2)

    for backward in (False, True):
        yield _row(
            "interlace", case, interlace, "TSM shift, as many channels", tsm, repeats, backward
        )


def _against_copy(case: Case, repeats: int) -> Iterator[Row]:
    """A ratio of 0.5 says: twice as long as copying what is read and written."""

    def copies(case: Case, count: int) -> list[Tensor]:
        return [case.x.clone(), case.upstream.clone()][:count]

    for count, side, title in (
        (1, _forward, "forward"),
        (2, _forward_backward, "forward and backward"),
    ):
        ours = partial(side, interlace, case)
        difference = _difference(ours()[0], case.x)
        timed = measure(ours, partial(copies, case, count), repeats)
        peer = "copy of x" if count == 1 else "copy of x and of the gradient"
        found = row(f"interlace, {title}", case.label, peer)
        yield found | timed | {"max_abs_diff": difference}


def _mmcv_row(cfg: Sizes) -> Row:
    """`mmcv.ops.tin_shift` moves whole frames on CUDA; by its source its backward is no adjoint."""
    case = problem(*SHAPES[2], Kind(), cfg.seed)
    case = case._replace(offset=case.offset.round(), weight=torch.ones_like(case.weight))
    name, peer = "interlace, forward", "mmcv.ops.tin_shift, whole frames"
    reason = "mmcv is not installed" if find_spec("mmcv") is None else "needs CUDA"
    if find_spec("mmcv") is None or not case.x.is_cuda:
        return row(name, case.label, peer, f"not measured: {reason}")
    tin_shift = import_module("mmcv.ops").tin_shift

    def theirs() -> Tensor:
        u = case.x[:, : case.fold].unflatten(0, (len(case.offset), -1)).flatten(3).contiguous()
        moved: Tensor = tin_shift(u, case.offset.int())
        return moved

    with torch.no_grad():
        ours = _forward(interlace, case)[0][:, : case.fold]
        difference = _difference(ours.unflatten(0, (len(case.offset), -1)).flatten(3), theirs())
    note = "forward only, as its backward is not the adjoint; without the other channels"
    timed = measure(partial(_forward, interlace, case), theirs, cfg.repeats)
    return row(name, case.label, peer, note) | timed | {"max_abs_diff": difference}
