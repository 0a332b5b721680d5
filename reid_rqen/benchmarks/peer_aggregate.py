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


def vectors_by_streamed_loop(
    length_N: list[int], feature_BRC: Tensor, score_BR: Tensor, chunk: int
) -> Tensor:
    """The same when frames arrive in chunks: the tracklets of each chunk are summed one by one."""
    index_B = torch.arange(len(length_N)).repeat_interleave(torch.tensor(length_N))
    total_NRC = feature_BRC.new_zeros(len(length_N), *feature_BRC.shape[1:])
    mass_NR = score_BR.new_zeros(len(length_N), score_BR.shape[1])
    chunks = (part.split(chunk) for part in (index_B, feature_BRC, score_BR))
    for index, feature, score in zip(*chunks, strict=True):
        for tracklet in index.unique().tolist():
            mine = index == tracklet
            total_NRC[tracklet] += (feature[mine] * score[mine][..., None]).sum(dim=0)
            mass_NR[tracklet] += score[mine].sum(dim=0)
    return torch.nn.functional.normalize((total_NRC / mass_NR[..., None]).flatten(1), dim=1)
