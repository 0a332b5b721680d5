"""Sums over all bins that read a pixel, in a fixed order: the gradient of the pixels.

Bins are sorted by pixel, so that each pixel is a bag of bins, and nothing is ever added twice at
the same time. Where there are fewer pixels than bins, only the lower left neighbours of samples
are sorted, a quarter of the work: the three other neighbours of a sample lie one pixel, one line,
and both further, so their sums are bags of the same order in a table that is shifted.

Letters: N bins, S = 2 T neighbours of a bin along an axis (the lower ones of its T samples, then
the upper ones), C channels, Q pixels of a table.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

TAPS = 1 << 22  # neighbours of samples that are sorted at once


class Lines(NamedTuple):
    """Where bins read a table of pixels, by axis; a pixel is a row plus a column.

    Attributes:
        row_SN: int32 index of the first pixel of a line.
        column_SN: int32, within the line.
        y_SN: weight of the line.
        x_SN: weight of the column; the weight of a pixel is their product.
    """

    row_SN: Tensor
    column_SN: Tensor
    y_SN: Tensor
    x_SN: Tensor


class Segment(NamedTuple):
    """Pixels of one level in a table, and the width of its map."""

    start: int
    end: int
    width: int


class PixelSums:
    """Gradient of one table of pixels, collected over chunks of bins and summed now and then."""

    def __init__(self, row_QC: Tensor, segments: list[Segment]) -> None:
        self.row_QC, self.segments = row_QC, segments
        self.sum_QC: Tensor | None = None
        self.waiting: list[tuple[Tensor, ...]] = []
        self.taps = 0

    def add(self, lines: Lines, grad_NC: Tensor) -> None:
        """Note bins and their gradients."""
        self.waiting.append((*lines, grad_NC))
        self.taps += lines.row_SN.shape[0] ** 2 * lines.row_SN.shape[1]
        if self.taps >= TAPS:
            self._reduce()

    def result(self) -> Tensor:
        """The gradient (Q, C) of all bins so far."""
        self._reduce()
        return torch.zeros_like(self.row_QC) if self.sum_QC is None else self.sum_QC

    def _reduce(self) -> None:
        if not self.waiting:
            return
        *lines, grads = zip(*self.waiting, strict=True)
        joined = Lines(*(one[0] if len(one) == 1 else torch.cat(one, dim=1) for one in lines))
        grad_NC = grads[0] if len(grads) == 1 else torch.cat(grads)
        self.waiting, self.taps = [], 0
        by_corner = len(self.row_QC) <= len(grad_NC)
        found_QC = self._by_corner(joined, grad_NC) if by_corner else self._by_tap(joined, grad_NC)
        self.sum_QC = found_QC if self.sum_QC is None else self.sum_QC.add_(found_QC)

    def _by_tap(self, lines: Lines, grad_NC: Tensor) -> Tensor:
        order = self._order(lines.row_SN, lines.column_SN)
        return _sum(order, lines.y_SN, lines.x_SN, grad_NC)

    def _by_corner(self, lines: Lines, grad_NC: Tensor) -> Tensor:
        samples = len(lines.row_SN) // 2
        lower, upper = slice(samples), slice(samples, None)
        order = self._order(lines.row_SN[lower], lines.column_SN[lower])
        sum_QC = _sum(order, lines.y_SN[lower], lines.x_SN[lower], grad_NC)
        for down, right in ((0, 1), (1, 0), (1, 1)):
            y_TN, x_TN = lines.y_SN[(lower, upper)[down]], lines.x_SN[(lower, upper)[right]]
            part_QC = _sum(order, y_TN, x_TN, grad_NC)
            for start, end, width in self.segments:
                step = down * width + right
                # upper neighbours that would lie outside the map have no weight
                sum_QC[start + step : end] += part_QC[start : max(end - step, start)]
        return sum_QC

    def _order(self, row_SN: Tensor, column_SN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sorted places in (S, S, N), the bin of each, and where the bag of each pixel begins."""
        pixel, place = (row_SN[:, None] + column_SN).flatten().sort(stable=True)
        count_Q = torch.bincount(pixel, minlength=len(self.row_QC))
        bin_N = torch.arange(row_SN.shape[1], dtype=torch.int32, device=pixel.device)
        bins = bin_N.repeat(len(row_SN) ** 2).index_select(0, place)
        return place, bins, (count_Q.cumsum(0) - count_Q).int()


def _sum(
    order: tuple[Tensor, Tensor, Tensor], y_SN: Tensor, x_SN: Tensor, grad_NC: Tensor
) -> Tensor:
    place, bins, begin_Q = order
    weight = (y_SN[:, None] * x_SN).flatten().index_select(0, place)
    return F.embedding_bag(bins, grad_NC, begin_Q, mode="sum", per_sample_weights=weight)
