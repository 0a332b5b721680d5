"""What training, evaluation and the tests share: one training step, and the vectors of tracklets.

Letters: N draws, D sets of a draw, S sets, T frames, B frames of a batch, R regions, C channels,
H W size, E embedding, M tracklets of this rank.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from common import dist
from common.log import InputError, progress
from common.samplers import EvalSampler
from common.seed import worker_init
from reid_rqen.data.sets import Boundaries, SetItem, TrackletFrames, TrackletSequences
from reid_rqen.data.tracklet import Tracklet
from reid_rqen.models.output import SetOutput
from reid_rqen.ops.aggregate import StreamingAggregate

Objective = Callable[[SetOutput, Tensor], tuple[Tensor, dict[str, Tensor]]]
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Autocast for `precision`: float32, bfloat16 or float16.

    Raises:
        InputError: another name.
    """
    if precision not in PRECISIONS:
        raise InputError("precision", f"must be one of {', '.join(PRECISIONS)}", precision)
    kind = PRECISIONS[precision]
    return torch.autocast(device.type, dtype=kind, enabled=kind is not None)


def train_step(
    model: nn.Module,
    item: SetItem,
    transform: Any,
    objective: Objective,
    device: torch.device,
    precision: str = "float32",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Forward pass and loss of one batch of draws.

    Args:
        model: maps (S, T, C, H, W) to a SetOutput, S = N*D.
        item: collated draws, image (N, D, T, C, H, W).
        transform: its `normalize` runs on `device`, so that bytes travel and not floats.
        objective: maps (output, pid (N, D)) to the loss and its parts.
        device: where the model is.
        precision: see `autocast`.

    Returns:
        The loss, and its detached parts.
    """
    image_NDTCHW = item.image.to(device, non_blocking=True)
    image_STCHW = transform.normalize(image_NDTCHW.flatten(0, 1))
    boundaries_STE = item.boundaries.to(device).flatten(0, 1) if item.boundaries.numel() else None
    with autocast(device, precision):
        output = model(image_STCHW, None, boundaries_STE)
        loss, parts = objective(output, item.pid.to(device))
    return loss, {name: value.detach() for name, value in parts.items()}


class Extraction(NamedTuple):
    """How tracklets are turned into vectors; the same object serves every split.

    `transform` gets no random generator, so nothing is augmented. `max_frames` of a tracklet are
    taken evenly spaced, all of them when None. `boundaries` is the table of `load_boundaries`.
    """

    transform: Any
    world: dist.World
    batch: int = 256
    workers: int = 0
    precision: str = "float32"
    max_frames: int | None = None
    boundaries: Boundaries | None = None


class Extracted(NamedTuple):
    """Embeddings of tracklets, in their order, the same on every rank.

    `vector` is (M, E), or a list of (T, E) per tracklet for models that compare sequences pair by
    pair. `score` holds (T, R) per tracklet, empty without a quality head.
    """

    vector: Any
    score: list[np.ndarray]
    frames: int


def extract(
    model: Any, tracklets: list[Tracklet], how: Extraction, title: str = "extract"
) -> Extracted:
    """Embed whole tracklets; the ranks share them and each receives all.

    Frame models fill a batch with the frames of many tracklets and stream the weighted sum, so
    that a batch is full and memory does not grow with a tracklet. Sequence models see one tracklet
    at a time.

    Raises:
        InputError: a frame cannot be read.
    """
    model.eval()
    tracklets = [shorten(tracklet, how.max_frames) for tracklet in tracklets]
    share = EvalSampler(len(tracklets), how.world.rank, how.world.size)
    mine = [tracklets[i] for i in share]
    run = extract_frames if hasattr(model, "frames") else extract_sequences
    with torch.inference_mode():
        vector, score = run(model, mine, how, title)
    scores = [rows for part in dist.gather_objects(score) for rows in part]
    if isinstance(vector, Tensor):
        vector = dist.gather_rows(vector)
    else:
        vector = [rows for part in dist.gather_objects(vector) for rows in part]
    return Extracted(vector, scores, sum(len(tracklet.frames) for tracklet in tracklets))


def shorten(tracklet: Tracklet, most: int | None) -> Tracklet:
    """The tracklet with at most `most` frames, evenly spaced over its length."""
    if most is None or len(tracklet.frames) <= most:
        return tracklet
    keep = np.linspace(0, len(tracklet.frames) - 1, most).round().astype(int)
    return Tracklet(
        tuple(tracklet.frames[i] for i in keep),
        tracklet.pid,
        tracklet.camid,
        tracklet.scene,
        tracklet.view,
    )


def extract_frames(
    model: Any, tracklets: list[Tracklet], how: Extraction, title: str
) -> tuple[Tensor, list[np.ndarray]]:
    """Vectors (M, R*C) on the CPU and scores (T, R) per tracklet, for models with `frames`."""
    if not tracklets:  # more ranks than tracklets
        return torch.zeros(0, model.regions * model.channels), []
    device = how.world.device
    dataset = TrackletFrames(tracklets, how.transform, how.boundaries)
    total = StreamingAggregate(len(tracklets), model.regions, model.channels, device=device)
    score_BR: list[Tensor] = []
    with progress(how.world.main) as bar:
        task = bar.add_task(title, total=len(dataset))
        for image_BCHW, index_B, edge_BE in _loader(dataset, how, how.batch):
            with autocast(device, how.precision):
                out = model.frames(
                    how.transform.normalize(image_BCHW.to(device, non_blocking=True)),
                    edge_BE.to(device) if edge_BE.numel() else None,
                )
            total.update(index_B, out.region_BRC, out.score_BR)
            score_BR.append(out.score_BR.float().cpu())
            bar.advance(task, len(index_B))
    lengths = [len(tracklet.frames) for tracklet in tracklets]
    scores = [part.numpy() for part in torch.cat(score_BR).split(lengths)]
    return total.vectors().cpu(), scores


def extract_sequences(
    model: Any, tracklets: list[Tracklet], how: Extraction, title: str
) -> tuple[Any, list[np.ndarray]]:
    """Vectors (M, E), or sequences of them when the model compares pairs; no scores."""
    paired = hasattr(model, "pair_distance")
    if not tracklets:
        return [] if paired else torch.zeros(0, model.dimensions), []
    device, rows = how.world.device, []
    dataset = TrackletSequences(tracklets, how.transform)
    with progress(how.world.main) as bar:
        task = bar.add_task(title, total=len(dataset))
        for image_VTCHW, _, _ in _loader(dataset, how, None):
            with autocast(device, how.precision):
                out = model.sequences(how.transform.normalize(image_VTCHW.to(device)), None)
            # The views of one tracklet (crops, mirrors) are averaged.
            rows.append(out.float().mean(dim=0).cpu())
            bar.advance(task)
    return rows if paired else torch.stack(rows), []


def _loader(dataset: Dataset[Any], how: Extraction, batch: int | None) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_size=batch,
        num_workers=how.workers,
        worker_init_fn=worker_init,
        pin_memory=how.world.device.type == "cuda",
    )
