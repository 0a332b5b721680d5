"""How many wrong gallery rows lie before each right one, without ranking the gallery.

CMC, AP and INP of a query depend only on the ranks of its few positives, and a rank is a count:
for the k-th closest positive at distance v, `k + #{kept negatives closer than v}`. On a CPU that
count is one comparison pass over the row; a row with many positives is sorted by value once and
searched instead. On a GPU every row is sorted by value and searched.

Shapes: Q queries of one chunk, G gallery rows, P positives of one query, F = all positives of the
chunk laid end to end, each query's in the order (distance, gallery row).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.log import InputError

Labels = NDArray[np.int64]

# Above this many positives one value sort (185 us for 11,310 floats) is cheaper than two passes of
# 3 us for each of them.
SORT_ABOVE = 30
TIED_ROWS_AT_ONCE = 1024


class GalleryIndex(NamedTuple):
    """Gallery rows grouped by identity, built once for all queries.

    Attributes:
        row: rows sorted by (pid, row), without the dropped ones.
        pid, cam: labels of these rows.
        dropped: rows no query is ranked against.
        size: G, dropped rows included.
    """

    row: Labels
    pid: Labels
    cam: Labels
    dropped: Labels
    size: int


class Counts(NamedTuple):
    """Per positive: kept negatives strictly closer, closer or as close, and before it.

    `before` follows the stable order (distance, gallery row). `positives` is (Q,), the others (F,).
    """

    positives: Labels
    closer: Labels
    not_farther: Labels
    before: Labels


def index_gallery(pid_G: Labels, cam_G: Labels, dropped_G: NDArray[np.bool_]) -> GalleryIndex:
    """Group the rows by identity; rows marked in `dropped_G` belong to nobody."""
    kept = np.flatnonzero(~dropped_G)
    row = kept[np.argsort(pid_G[kept], kind="stable")]
    return GalleryIndex(row, pid_G[row], cam_G[row], np.flatnonzero(dropped_G), len(pid_G))


def count_before(
    distance_QG: NDArray | Tensor,
    pid_Q: Labels,
    cam_Q: Labels,
    gallery: GalleryIndex,
    drop_same_camera: bool,
) -> Counts:
    """Count the negatives before every positive, on the device the distances lie on.

    Args:
        distance_QG: finite; smaller is more alike.
        pid_Q: labels of the queries.
        cam_Q: their cameras.
        gallery: from `index_gallery`.
        drop_same_camera: rows of the query's identity and camera are neither right nor wrong.

    Raises:
        InputError: a distance is NaN or infinite.
    """
    if isinstance(distance_QG, Tensor) and distance_QG.device.type != "cpu":
        return count_before_torch(distance_QG, pid_Q, cam_Q, gallery, drop_same_camera)
    return count_before_numpy(np.asarray(distance_QG), pid_Q, cam_Q, gallery, drop_same_camera)


def count_before_numpy(
    distance_QG: NDArray,
    pid_Q: Labels,
    cam_Q: Labels,
    gallery: GalleryIndex,
    drop_same_camera: bool,
) -> Counts:
    """`count_before` on a CPU."""
    if not np.isfinite(distance_QG).all():
        raise _not_finite(int(np.flatnonzero(~np.isfinite(distance_QG).all(axis=1))[0]))
    first = np.searchsorted(gallery.pid, pid_Q, side="left").tolist()
    last = np.searchsorted(gallery.pid, pid_Q, side="right").tolist()
    negative_G = np.empty(gallery.size, distance_QG.dtype)
    found: tuple[list[int], list[int], list[int]] = ([], [], [])
    positives = np.zeros(len(pid_Q), np.int64)
    for query, (start, stop) in enumerate(zip(first, last, strict=True)):
        own = gallery.row[start:stop]
        right = own[gallery.cam[start:stop] != cam_Q[query]] if drop_same_camera else own
        if not right.size:
            continue
        negative_G[:] = distance_QG[query]
        if gallery.dropped.size:
            negative_G[gallery.dropped] = np.inf
        negative_G[own] = np.inf
        value_P = distance_QG[query, right]
        order = np.argsort(value_P, kind="stable")
        for total, part in zip(
            found, _count_row(negative_G, value_P[order], right[order]), strict=True
        ):
            total.extend(part)
        positives[query] = len(right)
    return Counts(positives, *(np.array(total, np.int64) for total in found))


def _count_row(
    negative_G: NDArray, value_P: NDArray, row_P: Labels
) -> tuple[list[int], list[int], list[int]]:
    """The three counts of one query; `negative_G` is inf wherever a row is no negative."""
    if len(value_P) > SORT_ABOVE:
        ordered_G = np.sort(negative_G)
        closer = np.searchsorted(ordered_G, value_P, side="left").tolist()
        not_farther = np.searchsorted(ordered_G, value_P, side="right").tolist()
    else:
        closer = [int(np.count_nonzero(negative_G < value)) for value in value_P]
        not_farther = [int(np.count_nonzero(negative_G <= value)) for value in value_P]
    if closer == not_farther:
        return closer, not_farther, closer
    before = [
        below + int(np.count_nonzero(negative_G[:row] == value)) if below < upto else below
        for below, upto, row, value in zip(closer, not_farther, row_P, value_P, strict=True)
    ]
    return closer, not_farther, before


def count_before_torch(
    distance_QG: Tensor,
    pid_Q: Labels,
    cam_Q: Labels,
    gallery: GalleryIndex,
    drop_same_camera: bool,
) -> Counts:
    """`count_before` as whole-chunk tensor operations, for a GPU."""
    finite_Q = distance_QG.isfinite().all(dim=1)
    if not bool(finite_Q.all()):
        raise _not_finite(int((~finite_Q).nonzero()[0]))
    own_QG, right_QG = _label_masks(distance_QG, pid_Q, cam_Q, gallery, drop_same_camera)
    query_F, row_F = right_QG.nonzero(as_tuple=True)
    value_F = distance_QG[query_F, row_F]
    order = value_F.argsort(stable=True)
    order = order[query_F[order].argsort(stable=True)]
    query_F, row_F, value_F = query_F[order], row_F[order], value_F[order]
    positives_Q = right_QG.sum(dim=1)
    negative_QG = distance_QG.masked_fill(own_QG, float("inf"))
    negative_QG[:, torch.as_tensor(gallery.dropped, device=distance_QG.device)] = float("inf")
    closer_F, not_farther_F = _search_rows(negative_QG, value_F, query_F, positives_Q)
    before_F = closer_F + _tied_before(
        negative_QG, value_F, query_F, row_F, not_farther_F > closer_F
    )
    flat = (positives_Q, closer_F, not_farther_F, before_F)
    return Counts(*(value.cpu().numpy() for value in flat))


def _label_masks(
    distance_QG: Tensor,
    pid_Q: Labels,
    cam_Q: Labels,
    gallery: GalleryIndex,
    drop_same_camera: bool,
) -> tuple[Tensor, Tensor]:
    """Masks of the rows of the query's identity, and of those among them that are right."""
    device = distance_QG.device
    row = torch.as_tensor(gallery.row, device=device)
    label_2G = torch.full((2, gallery.size), torch.iinfo(torch.int64).min, device=device)
    label_2G[0, row] = torch.as_tensor(gallery.pid, device=device)
    label_2G[1, row] = torch.as_tensor(gallery.cam, device=device)
    own_QG = torch.as_tensor(pid_Q, device=device)[:, None] == label_2G[0]
    if not drop_same_camera:
        return own_QG, own_QG
    return own_QG, own_QG & (torch.as_tensor(cam_Q, device=device)[:, None] != label_2G[1])


def _search_rows(
    negative_QG: Tensor, value_F: Tensor, query_F: Tensor, positives_Q: Tensor
) -> tuple[Tensor, Tensor]:
    """Counts below, and not above, each value in the sorted row of its query."""
    ordered_QG = negative_QG.sort(dim=1).values
    start_Q = positives_Q.cumsum(0) - positives_Q
    slot_F = torch.arange(len(value_F), device=value_F.device) - start_Q[query_F]
    width = int(positives_Q.max()) if len(positives_Q) else 0
    value_QP = value_F.new_zeros(len(positives_Q), width)
    value_QP[query_F, slot_F] = value_F
    below_QP = torch.searchsorted(ordered_QG, value_QP, side="left")
    not_above_QP = torch.searchsorted(ordered_QG, value_QP, side="right")
    return below_QP[query_F, slot_F], not_above_QP[query_F, slot_F]


def _tied_before(
    negative_QG: Tensor, value_F: Tensor, query_F: Tensor, row_F: Tensor, tied_F: Tensor
) -> Tensor:
    """Equally distant negatives at a smaller gallery row; 0 where nothing is tied."""
    before_F = torch.zeros_like(query_F)
    column_G = torch.arange(negative_QG.shape[1], device=value_F.device)
    for part in tied_F.nonzero().squeeze(1).split(TIED_ROWS_AT_ONCE):
        equal = negative_QG[query_F[part]] == value_F[part, None]
        before_F[part] = (equal & (column_G < row_F[part, None])).sum(dim=1)
    return before_F


def _not_finite(row: int) -> InputError:
    return InputError("distance", "is NaN or infinite in row", row)
