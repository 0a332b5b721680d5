"""Margined softmax the usual ways, restated to be timed and compared against.

All take unit features and centres and give the mean cross entropy.

Letters: B images of a batch, D embedding width, C classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def arcnegface_loop(
    feature_BD: Tensor, weight_CD: Tensor, label_B: Tensor, scale: float, m: float, alpha: float
) -> Tensor:
    """ArcNegFace as trojans-face-recognizer, FaceX-Zoo and cavaface have it.

    Every image in turn asks for its cosine (a wait on a GPU) and fills one row of four matrices.
    """
    cosine_BC = feature_BD @ weight_CD.t()
    margined_BC, own_BC = torch.zeros_like(cosine_BC), torch.zeros_like(cosine_BC)
    others_BC, weight_BC = torch.ones_like(cosine_BC), torch.ones_like(cosine_BC)
    for i in range(len(cosine_BC)):
        y = int(label_B[i])
        own_BC[i, y], others_BC[i, y] = 1, 0
        if cosine_BC[i, y].item() > math.cos(math.pi - m):
            margined_BC[i, y] = torch.cos(torch.acos(cosine_BC[i, y]) + m)
        else:
            margined_BC[i, y] = cosine_BC[i, y] - math.sin(math.pi - m) * m
        distance_C = cosine_BC[i] - margined_BC[i, y].item()
        weight_BC[i] *= (alpha * torch.exp(-torch.pow(distance_C, 2) / 2)).detach()
    negatives_BC = others_BC * (weight_BC * cosine_BC + weight_BC - 1)
    return F.cross_entropy(scale * (own_BC * margined_BC + negatives_BC), label_B)


def arcnegface_eager(
    feature_BD: Tensor, weight_CD: Tensor, label_B: Tensor, scale: float, m: float, alpha: float
) -> Tensor:
    """ArcNegFace in whole-matrix operators, without the loop."""
    cosine_BC = feature_BD @ weight_CD.t()
    label_B1 = label_B[:, None]
    own_B1 = cosine_BC.gather(1, label_B1)
    inner_B1 = own_B1.clamp(-1 + 1e-7, 1 - 1e-7)
    turned_B1 = own_B1 * math.cos(m) - (1 - inner_B1.square()).sqrt() * math.sin(m)
    straight_B1 = own_B1 - m * math.sin(math.pi - m)
    target_B1 = torch.where(own_B1 > math.cos(math.pi - m), turned_B1, straight_B1)
    with torch.no_grad():
        weight_BC = alpha * torch.exp(-(cosine_BC - target_B1).square() / 2)
    logit_BC = weight_BC * cosine_BC + weight_BC - 1
    return F.cross_entropy(scale * logit_BC.scatter(1, label_B1, target_B1), label_B)


def arcface_in_place(
    feature_BD: Tensor, weight_CD: Tensor, label_B: Tensor, scale: float, m: float
) -> Tensor:
    """ArcFace as insightface's arcface_torch: angles edited in place, without a graph.

    Its backward pass does not see the margin; there is nothing else for theta + m above pi.
    """
    cosine_BC = feature_BD @ weight_CD.t()
    cosine_BC = cosine_BC.clamp(-1, 1)
    with torch.no_grad():
        index_B = torch.arange(len(label_B), device=label_B.device)
        cosine_BC.arccos_()
        cosine_BC[index_B, label_B] += m
        cosine_BC.cos_()
    return F.cross_entropy(cosine_BC * scale, label_B)


def plain_cross_entropy(
    feature_BD: Tensor, weight_CD: Tensor, label_B: Tensor, scale: float
) -> Tensor:
    """Scaled cosines, no margin: what any classifier costs."""
    return F.cross_entropy(scale * (feature_BD @ weight_CD.t()), label_B)
