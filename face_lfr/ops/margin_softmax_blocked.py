"""The passes over the buffer of cosines, in blocks of rows; see `face_lfr.ops.margin_softmax`.

A block is worked on while it lies in the cache: logits, greatest, powers, sum and, with one
process, the gradient. Ranks that share the classes must exchange the first and the third in between
and then go through the blocks again. Values for a mask of rows are selected, not indexed: counting
them would stop the queue of a GPU.

Letters: B images of the global batch, C classes (of this rank in shapes), K sub-centres, b rows of
a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as td
from torch import Tensor

from face_lfr.margins import AdaCos, Margin, Target

CPU_ELEMENTS = 2**17  # of a block, for each thread: its temporaries stay in the cache
CUDA_ELEMENTS = 2**22  # enough to hide the launches
PARTS = 8  # at least so many blocks, so that a block's temporaries are a fraction of the buffer


class Task(NamedTuple):
    """What is asked for besides the tensors."""

    margin: Margin
    scale: float
    smoothing: float
    centers: int
    group: td.ProcessGroup | None
    first: int
    classes: int
    impl: str


class Rows(NamedTuple):
    """What is known of each row before its logits: (B,) each, and the scale, 0-dim."""

    column: Tensor  # of the target among the classes here, -1 where another rank has it
    target: Target
    scale: Tensor
    share: float  # of a row in the mean, 1 / B

    def part(self, part: slice) -> Rows:
        """The same of some rows."""
        return Rows(self.column[part], self.target.rows(part), self.scale, self.share)


class Stats(NamedTuple):
    """Of the logits without their scale, row by row (B,)."""

    top: Tensor  # greatest
    total: Tensor  # sum of exp(scale * (logit - top))
    plain: Tensor  # their sum; 0 where no smoothing asks for it

    def part(self, part: slice) -> Stats:
        """The same of some rows."""
        return Stats(self.top[part], self.total[part], self.plain[part])


class Logits(NamedTuple):
    """Of a block, without the scale, (b, C) each."""

    value: Tensor  # u and v; may be the block itself
    slope: Tensor | None  # dv / dc, None for 1
    winner: Tensor | None  # which sub-centre, None for one


def losses(cosine_BC: Tensor, rows: Rows, task: Task, differentiated: bool) -> Tensor:
    """Losses of the rows, (B,); the cosines become the gradient of their mean, or are lost."""
    found, parts = [], list(_blocks(cosine_BC))
    for part in parts:
        logits = _logits(cosine_BC[part], rows.part(part), task)
        stats, power_bC = _statistics(logits, rows.scale, task)
        found.append(stats)
        if differentiated and task.group is None:
            _write(cosine_BC[part], logits, power_bC, rows.part(part), stats, task)
    stats = joined(Stats(*map(torch.cat, zip(*found, strict=True))), rows.scale, task)
    if differentiated and task.group is not None and cosine_BC.shape[1]:
        for part in parts:
            logits = _logits(cosine_BC[part], rows.part(part), task)
            power_bC = logits.value.sub(stats.top[part, None]).mul_(rows.scale).exp_()
            _write(cosine_BC[part], logits, power_bC, rows.part(part), stats.part(part), task)
    return row_losses(rows, stats, task)


def prepare(cosine_BC: Tensor, label_B: Tensor, task: Task) -> Rows:
    """What is known before the logits: exchanges target cosines, updates the margin's state."""
    width = cosine_BC.shape[1] // task.centers
    column_B = label_B - task.first
    column_B = torch.where((column_B >= 0) & (column_B < width), column_B, -1)
    cosine_B = cosine_BC.new_zeros(len(label_B))
    if width:
        index_B1K = column_B.clamp_min(0)[:, None, None].expand(-1, 1, task.centers)
        taken_BK = cosine_BC.unflatten(1, (width, task.centers)).gather(1, index_B1K)[:, 0]
        cosine_B = torch.where(column_B >= 0, taken_BK.amax(dim=1), 0.0)
    _reduce(cosine_B, task, td.ReduceOp.SUM)
    unknown_B = (label_B < 0) | (label_B >= task.classes)
    cosine_B = cosine_B.masked_fill(unknown_B, torch.nan)
    task.margin.observe(cosine_B)
    scale = cosine_B.new_full((), task.scale)
    rows = Rows(column_B, task.margin.target(cosine_B), scale, 1 / len(label_B))
    if isinstance(task.margin, AdaCos):
        scale = task.margin.current(task.classes).to(cosine_B)
        mass_B = _mass(cosine_BC, rows._replace(scale=scale), task)
        rows = rows._replace(scale=task.margin.rescaled(scale, mass_B, cosine_B))
    return rows


def _mass(cosine_BC: Tensor, rows: Rows, task: Task) -> Tensor:
    """The number ln sum_{j != y} exp(scale * c[j]) over all ranks, (B,)."""
    found = []
    for part in _blocks(cosine_BC):
        best_bC, _ = _nearest(cosine_BC[part], task)
        others_bC = best_bC * rows.scale
        _put(others_bC, rows.column[part], others_bC.new_full((len(others_bC),), -torch.inf))
        found.append(others_bC.logsumexp(dim=1))
    mass_B = torch.cat(found)
    if task.group is None:
        return mass_B
    top_B = _reduce(mass_B.clone(), task, td.ReduceOp.MAX)
    return top_B + _reduce((mass_B - top_B).exp_(), task, td.ReduceOp.SUM).log()


def _nearest(block_bC: Tensor, task: Task) -> tuple[Tensor, Tensor | None]:
    """The greatest of the K cosines of each class, and which; the block itself for K = 1."""
    if task.centers == 1:
        return block_bC, None
    shape = (block_bC.shape[1] // task.centers, task.centers)
    best = block_bC.unflatten(1, shape).max(dim=2)
    return best.values, best.indices


def _logits(block_bC: Tensor, rows: Rows, task: Task) -> Logits:
    best_bC, winner_bC = _nearest(block_bC, task)
    value_bC, slope_bC = task.margin.negatives(best_bC, rows.target)
    _put(value_bC, rows.column, rows.target.value)
    return Logits(value_bC, slope_bC, winner_bC)


def _put(value_bC: Tensor, column_b: Tensor, new_b: Tensor) -> None:
    """Write into one column of each row, none where it is -1; without a mask, which would wait."""
    if value_bC.shape[1]:
        index_b1 = column_b.clamp_min(0)[:, None]
        kept_b = value_bC.gather(1, index_b1)[:, 0]
        value_bC.scatter_(1, index_b1, torch.where(column_b >= 0, new_b, kept_b)[:, None])


def _statistics(logits: Logits, scale: Tensor, task: Task) -> tuple[Stats, Tensor]:
    """Stats of the classes here, and the powers exp(scale * (z - top)).

    In one process these take the place of the logits, which may be the buffer itself.
    """
    value_bC = logits.value
    nothing_b = value_bC.new_zeros(len(value_bC))
    if not value_bC.shape[1]:
        return Stats(nothing_b - torch.inf, nothing_b, nothing_b), value_bC
    top_b = value_bC.amax(dim=1)
    plain_b = value_bC.sum(dim=1) if task.smoothing else nothing_b
    lower_bC = value_bC.sub_(top_b[:, None]) if task.group is None else value_bC - top_b[:, None]
    power_bC = lower_bC.mul_(scale).exp_()
    return Stats(top_b, power_bC.sum(dim=1), plain_b), power_bC


def joined(stats: Stats, scale: Tensor, task: Task) -> Stats:
    """Stats over the classes of all ranks."""
    if task.group is None:
        return stats
    top_B = _reduce(stats.top.clone(), task, td.ReduceOp.MAX)
    total_B = stats.total * (scale * (stats.top - top_B)).exp()
    both_2B = _reduce(torch.stack([total_B, stats.plain]), task, td.ReduceOp.SUM)
    return Stats(top_B, both_2B[0], both_2B[1])


def row_losses(rows: Rows, stats: Stats, task: Task) -> Tensor:
    """The numbers ln sum exp z - z[y] + eps * (z[y] - mean z), (B,)."""
    value_B = rows.target.value
    loss_B = rows.scale * (stats.top - value_B) + stats.total.log()
    if not task.smoothing:
        return loss_B
    return loss_B + task.smoothing * rows.scale * (value_B - stats.plain / task.classes)


def target_gradient(rows: Rows, stats: Stats, task: Task) -> Tensor:
    """Gradient of the mean loss by the target cosine of each row, (B,)."""
    power_B = (rows.scale * (rows.target.value - stats.top)).exp()
    wanted = 1 - task.smoothing + task.smoothing / task.classes
    return (power_B / stats.total - wanted) * (rows.scale * rows.share) * rows.target.slope


def _write(
    block_bC: Tensor, logits: Logits, power_bC: Tensor, rows: Rows, stats: Stats, task: Task
) -> None:
    """The gradient of a block: (p - eps / C) * s * slope / B, and the one of the targets."""
    power_bC.mul_((rows.scale * rows.share / stats.total)[:, None])
    if task.smoothing:
        power_bC.sub_(rows.scale * (task.smoothing * rows.share / task.classes))
    if logits.slope is not None:  # straight into the buffer where it has the shape
        out_bC = block_bC if logits.winner is None else power_bC
        power_bC = torch.mul(power_bC, logits.slope, out=out_bC)
    _put(power_bC, rows.column, target_gradient(rows, stats, task))
    if logits.winner is not None:
        gradient_bCK = block_bC.zero_().unflatten(1, (-1, task.centers))
        gradient_bCK.scatter_(2, logits.winner[..., None], power_bC[..., None])
    elif power_bC.data_ptr() != block_bC.data_ptr():
        block_bC.copy_(power_bC)


def _blocks(cosine_BC: Tensor) -> Iterator[slice]:
    """Rows that are worked on together."""
    count, width = cosine_BC.shape
    limit = CUDA_ELEMENTS if cosine_BC.is_cuda else CPU_ELEMENTS * torch.get_num_threads()
    step = max(1, min(limit // max(width, 1), -(-count // PARTS)))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _reduce(x: Tensor, task: Task, operation: Any) -> Tensor:
    if task.group is not None:
        td.all_reduce(x, operation, group=task.group)
    return x
