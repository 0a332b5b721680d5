"""Aggregation as video re-identification code usually does it: one tracklet after the other."""

from __future__ import annotations

import torch
from torch import Tensor


def vectors_by_loop(length_N: list[int], feature_BRC: Tensor, score_BR: Tensor) -> Tensor:
    """(N, R*C) unit set vectors of tracklets whose frames follow each other."""
    vectors = []
    tracklets = zip(feature_BRC.split(length_N), score_BR.split(length_N), strict=True)
    for feature_TRC, score_TR in tracklets:
        weight_TR = score_TR / score_TR.sum(dim=0)
        vectors.append(torch.einsum("tr,trc->rc", weight_TR, feature_TRC).flatten())
    return torch.nn.functional.normalize(torch.stack(vectors), dim=1)
