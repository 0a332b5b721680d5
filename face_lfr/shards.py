"""Rows of a matrix spread over ranks: who owns which, their first values, what the ranks exchange.

Letters: B rows of one rank, A rows of all ranks, C classes, S classes of one rank, D width, T own
rows of a tile, J rows of a peer's block, M rows whose nearest row is in that block.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as td
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

INITIAL = ("normal", "uniform")
BLOCK = 1024  # rows that are drawn from one seed
TILE = (2048, 8192)  # own rows x rows of a peer whose cosines are in memory at a time


def share(rows: int, rank: int, size: int) -> range:
    """The rows of `rank`, as `torch.chunk` and a DTensor divide them; the last may have none."""
    width = -(-rows // size)
    return range(min(rank * width, rows), min((rank + 1) * width, rows))


def starts(rows: int, size: int) -> list[int]:
    """First row of every rank, and the number of rows."""
    return [share(rows, rank, size).start for rank in range(size)] + [rows]


def local_rows(tensor: Tensor) -> Tensor:
    """This rank's rows of a matrix; differentiable, and sharing memory with it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class UnitRows(torch.autograd.Function):
    """Rows (last dimension) scaled to length 1; those shorter than 1e-12 are divided by that.

    `F.normalize` with one temporary of the matrix's size in its backward pass instead of seven.
    """

    @staticmethod
    def forward(ctx: Any, row: Tensor) -> Tensor:
        length = row.norm(dim=-1, keepdim=True).clamp_min_(1e-12)
        unit = row / length
        ctx.save_for_backward(unit, length)
        return unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        unit, length = ctx.saved_tensors
        along = grad.unsqueeze(-2) @ unit.unsqueeze(-1)  # scalar products without a temporary
        return torch.addcmul(grad, unit, along.squeeze(-1), value=-1).div_(length)


def initial_rows(rows: range, width: int, kind: str, seed: int) -> Tensor:
    """Values of some rows of an endless matrix; rows have the same values in whatever range.

    Nothing beside the range is kept, and little beside it is drawn.

    Args:
        rows: which.
        width: numbers in a row.
        kind: "normal" (standard deviation 0.01, as arcface_torch) or "uniform" (up to
            1/sqrt(width) either way, as the losses of trojans-face-recognizer).
        seed: of the matrix.

    Returns:
        (len(rows), width) float32 on the CPU.

    Raises:
        ValueError: another kind.
    """
    if kind not in INITIAL:
        raise ValueError(f"initial={kind!r} must be one of {', '.join(INITIAL)}")
    out_SD = torch.empty(len(rows), width)
    block_D = torch.empty(BLOCK, width)
    for number in range(rows.start // BLOCK, -(-rows.stop // BLOCK) if len(rows) else 0):
        generator = torch.Generator().manual_seed(stream(seed, 0, number))
        if kind == "normal":
            block_D.normal_(0, 0.01, generator=generator)
        else:
            block_D.uniform_(-(width**-0.5), width**-0.5, generator=generator)
        first = number * BLOCK
        start, stop = max(first, rows.start), min(first + BLOCK, rows.stop)
        out_SD[start - rows.start : stop - rows.start] = block_D[start - first : stop - first]
    return out_SD


def stream(*key: int) -> int:
    """A 32-bit seed for every key; torch's CPU generator looks at no more bits than these."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def keys(classes: int, seed: int, step: int, device: torch.device) -> Tensor:
    """A random number for each class: the same on every rank, device and number of ranks.

    The finaliser of splitmix64 (Steele, Lea, Flood 2014) over a counter: whole numbers only, so
    that no device rounds otherwise.

    Returns:
        (classes,) int64, not negative.
    """
    key_C = torch.arange(classes, device=device)
    key_C *= _signed(0x9E3779B97F4A7C15)
    key_C += _signed(stream(seed, 1, step) << 32 | stream(seed, 2, step))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        key_C ^= _shifted(key_C, shift)
        key_C *= _signed(factor)
    key_C ^= _shifted(key_C, 31)
    return key_C.bitwise_and_(2**63 - 1)


def _signed(value: int) -> int:
    """The 64-bit pattern as torch's int64 reads it."""
    return value - 2**64 if value >= 2**63 else value


def _shifted(key_C: Tensor, by: int) -> Tensor:
    """Right shift that brings in zeros; that of int64 brings in the sign."""
    return (key_C >> by).bitwise_and_(2 ** (64 - by) - 1)


class GatherRows(torch.autograd.Function):
    """Rows of all ranks, in rank order; every rank must hold the same number of them.

    Backward: the sum over ranks of the gradient of a rank's own rows, times the number of ranks,
    because the mean that DistributedDataParallel takes divides by it (as arcface_torch).
    """

    @staticmethod
    def forward(ctx: Any, row_BD: Tensor, group: td.ProcessGroup) -> Tensor:
        ctx.group = group
        return gathered(row_BD, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_AD: Tensor) -> tuple[Tensor, None]:
        size = ctx.group.size()
        own_BD = grad_AD.new_empty(len(grad_AD) // size, *grad_AD.shape[1:])
        td.reduce_scatter(own_BD, list(grad_AD.contiguous().chunk(size)), group=ctx.group)
        return own_BD * size, None


def gathered(row: Tensor, group: td.ProcessGroup) -> Tensor:
    """Rows of all ranks, in rank order, without a gradient."""
    out = row.new_empty(len(row) * group.size(), *row.shape[1:])
    td.all_gather(list(out.chunk(group.size())), row.contiguous(), group=group)
    return out


class RegularFace(torch.autograd.Function):
    """`losses.regular_face` of a matrix whose rows are spread over ranks; exact.

    (1/C) sum_i max_{j != i} w_i . w_j over unit rows. Every rank sends its rows in turn, in
    blocks, twice: to find the nearest row of each, and to collect what that row owes to others.
    No rank holds more of the matrix than its own rows and a block. Every rank gets the whole
    value, and the exact gradient of its rows.

    Arguments of `apply`: unit_SD, this rank's unit rows; starts, the first row of every rank and
    the number of rows; group.
    """

    @staticmethod
    def forward(ctx: Any, unit_SD: Tensor, starts: Sequence[int], group: td.ProcessGroup) -> Tensor:
        best_S, at_S = _nearest(unit_SD, starts, group)
        total = best_S.sum()
        td.all_reduce(total, group=group)
        grad_SD = torch.zeros_like(unit_SD)
        if unit_SD.requires_grad:
            _collect(grad_SD, unit_SD, at_S, starts, group)
        ctx.save_for_backward(grad_SD / starts[-1])
        return total / starts[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (grad_SD,) = ctx.saved_tensors
        return grad * grad_SD, None, None


def _nearest(
    unit_SD: Tensor, starts: Sequence[int], group: td.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Greatest cosine of each own row with another row, and which row that is."""
    first = starts[group.rank()]
    best_S = unit_SD.new_full((len(unit_SD),), float("-inf"))
    at_S = torch.zeros(len(unit_SD), dtype=torch.int64, device=unit_SD.device)
    for _, start, block_JD in _blocks(unit_SD, starts, group):
        for row in range(0, len(unit_SD), TILE[0]):
            part = slice(row, row + TILE[0])
            cos_TJ = unit_SD[part] @ block_JD.T
            # No row is its own neighbour; the diagonal is empty where the two do not meet.
            cos_TJ.diagonal(first + row - start).fill_(float("-inf"))
            value_T, place_T = cos_TJ.max(dim=1)
            better_T = value_T > best_S[part]
            best_S[part] = torch.where(better_T, value_T, best_S[part])
            at_S[part] = torch.where(better_T, place_T + start, at_S[part])
    return best_S, at_S


def _collect(
    grad_SD: Tensor,
    unit_SD: Tensor,
    at_S: Tensor,
    starts: Sequence[int],
    group: td.ProcessGroup,
) -> None:
    """Add to every row its nearest row, and the rows whose nearest it is."""
    first = starts[group.rank()]
    for owner, start, block_JD in _blocks(unit_SD, starts, group):
        row_M = ((at_S >= start) & (at_S < start + len(block_JD))).nonzero().squeeze(1)
        place_M = at_S[row_M] - start
        grad_SD[row_M] += block_JD[place_M]
        owed_JD = torch.zeros_like(block_JD).index_add_(0, place_M, unit_SD[row_M])
        td.reduce(owed_JD, group=group, group_dst=owner)
        if owner == group.rank():
            grad_SD[start - first : start - first + len(block_JD)] += owed_JD


def _blocks(
    unit_SD: Tensor, starts: Sequence[int], group: td.ProcessGroup
) -> Iterator[tuple[int, int, Tensor]]:
    """Owner, first row and rows of every block of the whole matrix, the same on every rank."""
    rank = group.rank()
    for owner, (begin, end) in enumerate(itertools.pairwise(starts)):
        for start in range(begin, end, TILE[1]):
            stop = min(start + TILE[1], end)
            if owner == rank:
                block_JD = unit_SD.detach()[start - begin : stop - begin].contiguous()
            else:
                block_JD = unit_SD.new_empty(stop - start, unit_SD.shape[1])
            td.broadcast(block_JD, group=group, group_src=owner)
            yield owner, start, block_JD
