"""Extraction as video re-identification code usually does it: a batch is one tracklet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from reid_rqen.data.sets import TrackletSequences
from reid_rqen.data.tracklet import Tracklet
from reid_rqen.engine import autocast


def vectors_one_by_one(
    model: nn.Module,
    tracklets: Sequence[Tracklet],
    transform: Any,
    device: torch.device,
    workers: int = 0,
    precision: str = "float32",
) -> Tensor:
    """(N, E) set vectors on the CPU, each from a forward pass of its own tracklet."""
    dataset = TrackletSequences(tracklets, transform)
    vectors = []
    model.eval()
    with torch.inference_mode(), autocast(device, precision):
        for image_1TCHW, _, _ in DataLoader(dataset, batch_size=None, num_workers=workers):
            output = model(transform.normalize(image_1TCHW.to(device)))
            vectors.append(output.vector_SD.cpu())
    return torch.cat(vectors)
