"""Deformable region pooling as weighted sums of rows: `torch.nn.functional.embedding_bag`.

A bin is a bag of (2 T)^2 pixels, whose features lie together in memory. The derivative by an
offset is a bag of the same pixels with other weights, and the gradient of a pixel is the bag of
all bins that read it, found by sorting. Sums have a fixed order: two runs give the same bits, on
a GPU too. Regions are grouped by level and taken in chunks that fit the cache of a CPU, which
bounds the memory; the maps of the levels are read where they are.

Where there are fewer pixels than bins, all levels are one table, which saves calls.

Letters: R regions, n regions of a chunk, 2 = (x, y), P bins of a side, T samples of a bin along
an axis, S = 2 T neighbours along an axis, N = n P P bins, K = S S taps of a bin, C channels, L
levels, Q pixels of a table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from detection_tsd.ops import sampling
from detection_tsd.ops.pixel_sums import Lines, PixelSums, Segment
from detection_tsd.ops.sampling import Settings

CHUNK = 1 << 20  # elements that a chunk pools, or taps of it


class Chunk(NamedTuple):
    """Regions of one table that are worked on together.

    Attributes:
        table: index of the table of pixels.
        level_n4: (height, width, start, stride) of each region's map, or (1, 4) for all.
        region: where the regions are among all.
        roi_n5: the regions.
        offset_n2PP: their offsets.
    """

    table: int
    level_n4: Tensor
    region: slice | Tensor
    roi_n5: Tensor
    offset_n2PP: Tensor | None


class Slopes(NamedTuple):
    """Derivatives of `Lines` by the offsets."""

    y_SN: Tensor
    x_SN: Tensor


def pool_bags(
    rows: list[Tensor], table_L4: Tensor, roi_R5: Tensor, level_R: Tensor,
    offset_R2PP: Tensor | None, settings: Settings,
) -> Tensor:  # fmt: skip
    """Pooled features (R, C, P, P).

    `rows` are the pixels (Q, C) of each level, or one table that has all levels; other arguments
    are those of `deform_pool` after its checks.
    """
    channels, bins = rows[0].shape[1], settings.size**2
    out_RCB = rows[0].new_empty(len(roi_R5), channels, bins)
    for chunk in _chunks(rows, table_L4, roi_R5, level_R, offset_R2PP, settings):
        lines, _ = _lines(chunk, settings, slopes=False)
        pixel_NK = _outer(torch.add, lines.row_SN, lines.column_SN)
        bag_NC = _bag(pixel_NK, rows[chunk.table], _outer(torch.mul, lines.y_SN, lines.x_SN))
        out_RCB[chunk.region] = bag_NC.view(-1, bins, channels).transpose(1, 2)
    return out_RCB.view(len(roi_R5), channels, settings.size, settings.size)


def pool_bags_backward(
    grad_RCPP: Tensor, rows: list[Tensor], table_L4: Tensor, roi_R5: Tensor, level_R: Tensor,
    offset_R2PP: Tensor | None, settings: Settings, need_rows: bool, need_offset: bool,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """Gradients of the rows and of the offset; what is not needed comes back empty."""
    shape = offset_R2PP.shape if need_offset and offset_R2PP is not None else (0,)
    doffset = grad_RCPP.new_empty(shape)
    sums = _sums(rows, table_L4) if need_rows else []
    for chunk in _chunks(rows, table_L4, roi_R5, level_R, offset_R2PP, settings):
        lines, slopes = _lines(chunk, settings, slopes=doffset.dim() == 4)
        grad_nBC = grad_RCPP[chunk.region].flatten(2).transpose(1, 2)
        grad_NC = grad_nBC.reshape(-1, rows[0].shape[1])
        if slopes is not None and chunk.offset_n2PP is not None:
            found_2N = _offset_gradient(grad_NC, rows[chunk.table], lines, slopes)
            found_2nPP = found_2N.view(2, -1, settings.size, settings.size)
            found_n2PP = found_2nPP.transpose(0, 1).sum_to_size(chunk.offset_n2PP.shape)
            doffset[chunk.region] = found_n2PP
        if need_rows:
            sums[chunk.table].add(lines, grad_NC)
    return [one.result() for one in sums], doffset


def _sums(rows: list[Tensor], table_L4: Tensor) -> list[PixelSums]:
    """The gradient of each table."""
    levels = table_L4.tolist()
    if len(rows) == len(levels):
        pairs = zip(rows, levels, strict=True)
        return [PixelSums(row, [Segment(0, len(row), width)]) for row, (_, width, _, _) in pairs]
    ends = [start for _, _, start, _ in levels[1:]] + [len(rows[0])]
    pairs = zip(levels, ends, strict=True)
    return [PixelSums(rows[0], [Segment(start, end, w) for (_, w, start, _), end in pairs])]


def _chunks(
    rows: list[Tensor], table_L4: Tensor, roi_R5: Tensor, level_R: Tensor,
    offset_R2PP: Tensor | None, settings: Settings,
) -> Iterator[Chunk]:  # fmt: skip
    """Regions table by table, and image by image for the cache's sake."""
    taps = 4 * settings.samples**2
    step = max(1, CHUNK // (settings.size**2 * max(rows[0].shape[1], taps)))
    for table, level_R4, order in _tables(len(rows), table_L4, roi_R5, level_R):
        count = len(roi_R5) if order is None else len(order)
        for start in range(0, count, step):
            part = slice(start, min(start + step, count))
            region = part if order is None else order[part]
            moved = None if offset_R2PP is None else offset_R2PP[region]
            level_n4 = level_R4 if len(level_R4) == 1 else level_R4[part]
            yield Chunk(table, level_n4, region, roi_R5[region], moved)


def _tables(
    tables: int, table_L4: Tensor, roi_R5: Tensor, level_R: Tensor
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Index, levels and regions of each table; None stands for all regions in their order."""
    if not len(roi_R5):
        return
    if tables == 1:
        yield 0, table_L4[level_R], None
        return
    image_R = roi_R5[:, 0].long()
    order_R = (level_R * (image_R.max() + 1) + image_R).argsort(stable=True)
    counts = torch.bincount(level_R, minlength=tables).tolist()
    for table, region_n in enumerate(order_R.split(counts)):
        level_14 = table_L4[table, None].clone()
        level_14[:, 2] = 0  # each table has one level only
        yield table, level_14, region_n


def _lines(chunk: Chunk, settings: Settings, slopes: bool) -> tuple[Lines, Slopes | None]:
    """Rows and columns of a chunk's bins with their weights."""
    x, y = sampling.axes(chunk.roi_n5, chunk.level_n4, chunk.offset_n2PP, settings)
    shape = (len(chunk.roi_n5), settings.size, settings.size)
    height, width, start, _ = (one[:, None, None].int() for one in chunk.level_n4.unbind(1))
    first_n11 = start + chunk.roi_n5[:, 0].int()[:, None, None] * (height * width)
    live_y = y.live * sampling.share(x, y, settings)
    high_x, high_y = x.live * x.part, live_y * y.part
    lines = Lines(
        _both(first_n11 + y.low * width, first_n11 + y.high * width, shape),
        _both(x.low, x.high, shape),
        _both(live_y - high_y, high_y, shape),
        _both(x.live - high_x, high_x, shape),
    )
    if not slopes:
        return lines, None
    slope_y = live_y * y.slope
    return lines, Slopes(_both(-slope_y, slope_y, shape), _both(-x.slope, x.slope, shape))


def _both(low: Tensor, high: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Lower and upper neighbours of all samples of an axis, (S, N)."""
    return torch.cat([low.expand(-1, *shape), high.expand(-1, *shape)]).flatten(1)


def _outer(combine: Callable[[Tensor, Tensor], Tensor], y_SN: Tensor, x_SN: Tensor) -> Tensor:
    """Every row of a bin with every column of it, (N, K)."""
    return combine(y_SN[:, None], x_SN).flatten(0, 1).t().contiguous()


def _bag(pixel_NK: Tensor, row_QC: Tensor, weight_NK: Tensor) -> Tensor:
    return F.embedding_bag(pixel_NK, row_QC, mode="sum", per_sample_weights=weight_NK)


def _offset_gradient(grad_NC: Tensor, row_QC: Tensor, lines: Lines, slopes: Slopes) -> Tensor:
    """Gradients of every bin's x and y offset, (2, N)."""
    pixel_NK = _outer(torch.add, lines.row_SN, lines.column_SN)
    dots = []
    for y_SN, x_SN in ((lines.y_SN, slopes.x_SN), (slopes.y_SN, lines.x_SN)):
        bag_NC = _bag(pixel_NK, row_QC, _outer(torch.mul, y_SN, x_SN))
        dots.append(torch.linalg.vecdot(bag_NC, grad_NC))
    return torch.stack(dots)
