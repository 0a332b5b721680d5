"""Feature maps of several strides as the one table of pixels that region operators read.

Letters: B images, C channels, H W size of a map, L levels, P pixels of all maps of all images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Pyramid:
    """Maps of one forward pass; built once and shared by every pooling of it.

    Attributes:
        maps: (B, C, H, W) each, from fine to coarse.
        strides: pixels of the network's input between neighbours in a map.
        base: half of the region side, in pixels, at which level 1 begins; see `roi_levels`.
        batch: B.
        channels: C.
        sizes: (H, W) of each map.
        starts: row of `flat` at which each map begins.
        pixels: P.
    """

    def __init__(self, maps: Sequence[Tensor], strides: Sequence[int], base: float = 56.0) -> None:
        """Keep the maps.

        Args:
            maps: one of each stride, any floating type, with equal B and C.
            strides: positive, as many as maps.
            base: see `roi_levels`.

        Raises:
            ValueError: no maps, shapes that do not fit, or strides that are not positive.
        """
        self.maps, self.strides, self.base = tuple(maps), tuple(strides), base
        _check(self.maps, self.strides, base)
        self.batch, self.channels = self.maps[0].shape[:2]
        self.sizes = tuple((one.shape[2], one.shape[3]) for one in self.maps)
        counts = [self.batch * height * width for height, width in self.sizes]
        self.starts = tuple(sum(counts[:level]) for level in range(len(counts)))
        self.pixels = sum(counts)
        self._rows: tuple[Tensor, ...] | None = None
        self._flat: Tensor | None = None
        self._table: Tensor | None = None

    @property
    def rows(self) -> tuple[Tensor, ...]:
        """Pixels of each level, (B H W, C): image after image, row after row.

        Differentiable, float32 (float64 where a map is), made at the first use; a view where the
        map is float32 and channels_last. Gradients of all poolings meet here.
        """
        if self._rows is None:
            wide = torch.promote_types(self.maps[0].dtype, torch.float32)
            rows = (one.to(wide).permute(0, 2, 3, 1).flatten(0, 2) for one in self.maps)
            self._rows = tuple(one.contiguous() for one in rows)
        return self._rows

    @property
    def flat(self) -> Tensor:
        """`rows` of all levels as one table (P, C), a copy where there are several."""
        if self._flat is None:
            self._flat = torch.cat(self.rows) if len(self.rows) > 1 else self.rows[0]
        return self._flat

    @property
    def table(self) -> Tensor:
        """int64 (height, width, start, stride) of each level, on the device of the maps."""
        if self._table is None:
            rows = zip(self.sizes, self.starts, self.strides, strict=True)
            table = [(height, width, start, stride) for (height, width), start, stride in rows]
            self._table = torch.tensor(table, device=self.maps[0].device)
        return self._table


def _check(maps: tuple[Tensor, ...], strides: tuple[int, ...], base: float) -> None:
    if not maps or len(maps) != len(strides):
        raise ValueError(f"{len(maps)} maps and strides {strides}: need one stride for each map")
    if min(strides) <= 0 or not base > 0:
        raise ValueError(f"strides={strides}, base={base}: need positive numbers")
    for one in maps:
        if one.dim() != 4 or not one.is_floating_point() or 0 in one.shape[2:]:
            raise ValueError(f"map is {one.dtype} {tuple(one.shape)}, need float (B, C, H, W)")
        if one.shape[:2] != maps[0].shape[:2] or one.device != maps[0].device:
            raise ValueError(
                f"map {tuple(one.shape)} on {one.device}: need the batch, the channels and the "
                f"device of the first, {tuple(maps[0].shape)} on {maps[0].device}"
            )
