"""Region features: averages over horizontal slabs of the trunk's map (arXiv 1711.08766).

Letters: B frames, C channels, H W map size, R regions, E = R - 1 inner edges.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

ROW_TOLERANCE = 1e-6  # of a row: edges nearer than this to a row border are that border


def region_edges(regions: Sequence[float]) -> tuple[float, ...]:
    """Inner edges of regions with these relative heights, as fractions of the height.

    (3, 2, 2) gives (3/7, 5/7), the fixed split of the released network; (7,) gives ().

    Raises:
        ValueError: no region, or a height that is not positive.
    """
    if not regions or min(regions) <= 0:
        raise ValueError(
            f"regions={list(regions)}: need one or more positive heights, e.g. [3,2,2]"
        )
    total = sum(regions)
    return tuple(height / total for height in accumulate(regions))[:-1]


def row_masks(edge_BE: Tensor, rows: int) -> Tensor:
    """Share of each map row that lies in each region, (B, R, rows), in [0, 1].

    A row cut by an edge is shared out, so the masks of one frame sum to 1 in every row and a
    region's mask sums to its height in rows. `edge_BE` must ascend within [0, 1].
    """
    edge_BE = edge_BE * rows
    start_B1 = edge_BE.new_zeros(len(edge_BE), 1)
    top_BR = torch.cat([start_B1, edge_BE], dim=1)
    bottom_BR = torch.cat([edge_BE, start_B1 + rows], dim=1)
    row_H = torch.arange(rows, device=edge_BE.device, dtype=edge_BE.dtype)
    upper_BRH = torch.maximum(top_BR[..., None], row_H)
    lower_BRH = torch.minimum(bottom_BR[..., None], row_H + 1)
    return (lower_BRH - upper_BRH).clamp_min(0)


def mask_pool(map_BCHW: Tensor, mask_BRH: Tensor) -> Tensor:
    """Average of the map over each region, (B, R, C); a region without height gives 0.

    `mask_BRH` may have one row of masks for the whole batch (B = 1).
    """
    row_BCH = map_BCHW.sum(dim=3)
    mask_BRH = mask_BRH.to(row_BCH.dtype).expand(len(row_BCH), -1, -1)
    area_BR1 = mask_BRH.sum(dim=2, keepdim=True) * map_BCHW.shape[3]
    total_BRC = torch.einsum("brh,bch->brc", mask_BRH, row_BCH)
    return total_BRC / area_BR1.clamp_min(ROW_TOLERANCE)


class RegionPool(nn.Module):
    """Averages of the map over R stacked regions, for maps of any height.

    The edges are fractions of the height; edges that fall on row borders (3/2/2 on 7 rows) cut
    plain slices, others share a row between two regions. No normalisation follows: the size of
    a feature is part of its weight in the set.

    Args:
        regions: relative heights from top to bottom, e.g. (3, 2, 2), or (7,) for one region.
    """

    def __init__(self, regions: Sequence[float] = (3, 2, 2)) -> None:
        super().__init__()
        self.edges = region_edges(regions)
        self.count = len(regions)

    def forward(self, map_BCHW: Tensor, boundaries_BE: Tensor | None = None) -> Tensor:
        """Region features (B, R, C), float32 at least.

        Args:
            map_BCHW: trunk output.
            boundaries_BE: inner edges per frame as ascending fractions of the height in [0, 1]
                (from body landmarks); the constructor's fractions when None.

        Raises:
            ValueError: `boundaries_BE` is not (B, R - 1).
        """
        map_BCHW = map_BCHW.to(torch.promote_types(map_BCHW.dtype, torch.float32))
        with torch.autocast(map_BCHW.device.type, enabled=False):
            if boundaries_BE is not None:
                self._check(map_BCHW, boundaries_BE)
                edge_BE = boundaries_BE.to(map_BCHW.dtype)
                return mask_pool(map_BCHW, row_masks(edge_BE, map_BCHW.shape[2]))
            return self._fixed(map_BCHW)

    def _fixed(self, map_BCHW: Tensor) -> Tensor:
        rows = map_BCHW.shape[2]
        cuts = [edge * rows for edge in self.edges]
        whole = [round(cut) for cut in cuts]
        if all(abs(a - b) < ROW_TOLERANCE for a, b in zip(cuts, whole, strict=True)):
            spans = zip([0, *whole], [*whole, rows], strict=True)
            return torch.stack([map_BCHW[:, :, a:b].mean(dim=(2, 3)) for a, b in spans], dim=1)
        # Fills, not a copy from the host, which a CUDA graph could not hold.
        edge_1E = torch.stack([map_BCHW.new_full((1,), edge) for edge in self.edges], dim=1)
        return mask_pool(map_BCHW, row_masks(edge_1E, rows))

    def _check(self, map_BCHW: Tensor, boundaries_BE: Tensor) -> None:
        wanted = (len(map_BCHW), self.count - 1)
        if tuple(boundaries_BE.shape) != wanted:
            raise ValueError(
                f"boundaries have shape {tuple(boundaries_BE.shape)}, need {wanted}: the inner "
                "edges of every frame"
            )
