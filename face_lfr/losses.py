"""Losses beside the classifier: spread of the centres, quality of an image, vectors of sets.

All are pure functions, float32 inside autocast (float64 stays) and 0 with a graph on empty input.

Letters: C classes, D embedding width, B images of a batch, V sets, P pairs, c rows of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def _full(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def regular_face(weight_CD: Tensor, chunk: int = 2048, rows: Tensor | None = None) -> Tensor:
    """Mean over the classes of the greatest cosine to the centre of another class.

        R = 1/C sum_i max_{j != i} cos(w_i, w_j)

    (RegularFace, CVPR 2019, equation 4). The nearest other centre is looked for without a graph,
    tile by tile, so that no C x C matrix exists; the cosine to it carries the exact gradient, to
    both centres.

    Args:
        weight_CD: centres, of any length.
        chunk: rows and columns of a tile.
        rows: class numbers that the mean is taken over, such as those of a batch; None for all.
            Their neighbours are looked for among all.

    Returns:
        Scalar in [-1, 1]; 0 with a graph when there are no rows or there is one class only.

    Raises:
        ValueError: `chunk` is below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: need at least 1")
    with torch.autocast(weight_CD.device.type, enabled=False):
        unit_CD = F.normalize(_full(weight_CD), dim=1)
        if rows is None:
            rows = torch.arange(len(unit_CD), device=unit_CD.device)
        if len(unit_CD) < 2 or not len(rows):
            return unit_CD.sum() * 0
        nearest = _nearest_other(unit_CD.detach(), rows, chunk)
        return (unit_CD[rows] * unit_CD[nearest]).sum(dim=1).mean()


def _nearest_other(unit_CD: Tensor, rows: Tensor, chunk: int) -> Tensor:
    """Number of the closest other centre of each row; the first of equals."""
    found = []
    for row_c in rows.split(chunk):
        best_c = unit_CD.new_full((len(row_c),), -torch.inf)
        where_c = torch.zeros_like(row_c)
        for start in range(0, len(unit_CD), chunk):
            tile_cc = unit_CD[row_c] @ unit_CD[start : start + chunk].t()
            column = torch.arange(start, start + tile_cc.shape[1], device=row_c.device)
            tile_cc.masked_fill_(row_c[:, None] == column, -torch.inf)
            top = tile_cc.max(dim=1)
            where_c = torch.where(top.values > best_c, top.indices + start, where_c)
            best_c = torch.maximum(best_c, top.values)
        found.append(where_c)
    return torch.cat(found)


def quality_regression(quality_B: Tensor, target_B: Tensor) -> Tensor:
    """Mean squared difference of predicted and wanted quality (arXiv 2008.10850).

    Args:
        quality_B: the network's unbounded scores.
        target_B: what they should be; no gradient flows into it.

    Raises:
        ValueError: the shapes differ, which would broadcast.
    """
    _same("quality", quality_B, "target", target_B)
    gap_B = _full(quality_B) - _full(target_B.detach())
    return gap_B.square().sum() / max(len(gap_B), 1)


def set_triplet(
    anchor_VD: Tensor, positive_VD: Tensor, negative_VD: Tensor, margin: float = 1.2
) -> Tensor:
    """Triplet loss 1/(2V) sum max(0, m + |A-P|^2 - |A-N|^2) on the vectors of sets.

    Args:
        anchor_VD: vectors of unit length.
        positive_VD: other sets of the anchors' identities.
        negative_VD: sets of other identities.
        margin: m in squared distance (Quality-Aware-Network, the authors' prototxt: 1.2).

    Raises:
        ValueError: the shapes differ.
    """
    _same("positive", positive_VD, "anchor", anchor_VD)
    _same("negative", negative_VD, "anchor", anchor_VD)
    gap_V = _squared(anchor_VD, positive_VD) - _squared(anchor_VD, negative_VD)
    return F.relu(margin + gap_V).sum() / (2 * max(len(gap_V), 1))


def contrastive(
    left_PD: Tensor, right_PD: Tensor, margin: float = 0.8, same_P: Tensor | None = None
) -> Tensor:
    """Contrastive loss 1/(2P) sum d^2 for pairs of one identity, max(0, m - d)^2 for the others.

    Hadsell, Chopra and LeCun, CVPR 2006, as Caffe's layer has it; d is Euclid's distance.

    Args:
        left_PD: vectors of unit length.
        right_PD: their partners.
        margin: m in distance (Quality-Aware-Network: 0.8).
        same_P: bool, whether a pair is of one identity; None when all are, and m does not act.

    Raises:
        ValueError: the shapes differ.
    """
    _same("right", right_PD, "left", left_PD)
    square_P = _squared(left_PD, right_PD)
    if same_P is None:
        return square_P.sum() / (2 * max(len(square_P), 1))
    _same("same", same_P, "distance", square_P)
    # the root of 0 has no derivative: two selections keep its NaN out of the gradient
    apart_P = square_P > 0
    distance_P = torch.where(apart_P, torch.where(apart_P, square_P, 1.0).sqrt(), 0.0)
    cost_P = torch.where(same_P, square_P, F.relu(margin - distance_P).square())
    return cost_P.sum() / (2 * max(len(cost_P), 1))


def _squared(left_PD: Tensor, right_PD: Tensor) -> Tensor:
    return (_full(left_PD) - _full(right_PD)).square().sum(dim=-1)


def _same(name: str, x: Tensor, other: str, y: Tensor) -> None:
    if x.shape != y.shape:
        raise ValueError(f"{name} is {tuple(x.shape)}, need {tuple(y.shape)} as {other} is")
