"""What training, evaluation and the tests share: one training step, and the scores of videos.

Letters: N videos, V views (crops x clips), T frame positions, C channels, H W size, K classes.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common import dist
from common.log import InputError, progress
from common.samplers import EvalSampler
from common.seed import worker_init
from video_mmit.data.clips import ClipItem, TestViews
from video_mmit.data.video_data import Video, VideoData

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
FUSIONS = ("logit", "prob")


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
    item: ClipItem,
    transform: Any,
    objective: Callable[[Tensor, Tensor], Tensor],
    device: torch.device,
    precision: str = "float32",
) -> Tensor:
    """Loss of one batch of clips.

    Args:
        model: maps (N, T, C, H, W) float to logits (N, K).
        item: collated clips, image (N, T, C, H, W) uint8, target (N, K).
        transform: its `normalize` runs on `device`, so that bytes travel and not floats.
        objective: maps logits and targets (N, K) to the loss.
        device: where the model is.
        precision: see `autocast`.
    """
    x_NTCHW = transform.normalize(item.image.to(device, non_blocking=True))
    target_NK = item.target.to(device, non_blocking=True)
    with autocast(device, precision):
        return objective(model(x_NTCHW), target_NK)


def check_fits(model: Any, sampler: Any, transform: Any) -> None:
    """Refuse clips that the model cannot take, before anything is read.

    Raises:
        InputError: other frames than a model with weights for one T takes, or other channels.
    """
    fixed = model.num_segments if getattr(model, "fixed_segments", True) else None
    if fixed is not None and sampler.count != fixed:
        raise InputError(
            "data.sampler.count", f"the model takes {fixed} frames, not", sampler.count
        )
    channels = getattr(model, "backbone", model).in_channels
    if transform.channels != channels:
        what = f"the model takes {channels} channels, the transform gives"
        raise InputError("transform", what, transform.channels)


class Views(NamedTuple):
    """How a video is looked at in a test, and on what machine.

    `crops` (1, 3, 5 or 10) times `clips` views are fused as the mean of their logits ("logit") or
    of their probabilities ("prob": sigmoid for multi-label sets, softmax otherwise). `batch` clips
    go through the network at once. `shuffle` is the seed of a random order of the frames of every
    clip, a control that destroys what a model knows of time.
    """

    transform: Any
    world: dist.World
    crops: int = 1
    clips: int = 1
    fuse: str = "logit"
    batch: int = 16
    workers: int = 0
    precision: str = "float32"
    shuffle: int | None = None


class Scored(NamedTuple):
    """Scores (N, K) float32 in the order of the videos, the same on every rank."""

    scores: np.ndarray
    kind: str  # "logit" | "prob"
    mismatched: int  # videos whose decoder counts other frames than the list


def score_videos(
    model: nn.Module,
    videos: Sequence[Video],
    data: VideoData,
    how: Views,
    title: str = "evaluate",
) -> Scored:
    """Score every video once; the ranks share them, without padding, and each receives all.

    Raises:
        InputError: a video cannot be read, or an unknown `fuse`.
    """
    if how.fuse not in FUSIONS:
        raise InputError("eval.fuse", f"must be one of {', '.join(FUSIONS)}", how.fuse)
    check_fits(model, data.sampler, how.transform)
    model.eval()
    dataset = TestViews(videos, data, how.transform, how.crops, how.clips)
    share = EvalSampler(len(videos), how.world.rank, how.world.size)
    loader = DataLoader(
        dataset,
        batch_size=max(how.batch // (how.crops * how.clips), 1),
        sampler=share,
        num_workers=how.workers,
        worker_init_fn=worker_init,
        pin_memory=how.world.device.type == "cuda",
        generator=torch.Generator(),
    )
    parts = [torch.zeros(0, data.num_classes)]
    with torch.inference_mode(), progress(how.world.main) as bar:
        task = bar.add_task(title, total=len(share))
        for item in loader:
            logit_NVK = _views(model, item.image, item.row, how)
            parts.append(fuse_views(logit_NVK, how.fuse, data.multi_label).cpu())
            bar.advance(task, len(item.image))
    scores_NK = dist.gather_rows(torch.cat(parts)).numpy()
    mismatched = sum(dist.gather_objects(dataset.mismatched))
    return Scored(scores_NK, how.fuse, mismatched)


def _views(model: nn.Module, image_NVTCHW: Tensor, row_N: Tensor, how: Views) -> Tensor:
    """Logits (N, V, K) of all views, `how.batch` clips at a time: thirty views fill a memory."""
    logits = []
    views = image_NVTCHW.shape[1]
    if how.shuffle is not None:
        image_NVTCHW = _shuffled(image_NVTCHW, row_N, how.shuffle)
    for clip_VTCHW in image_NVTCHW.flatten(0, 1).split(how.batch):
        x_VTCHW = how.transform.normalize(clip_VTCHW.to(how.world.device, non_blocking=True))
        with autocast(how.world.device, how.precision):
            logits.append(model(x_VTCHW).float())
    return torch.cat(logits).unflatten(0, (-1, views))


def _shuffled(image_NVTCHW: Tensor, row_N: Tensor, seed: int) -> Tensor:
    """Every video with its frame positions in a random order, a function of (seed, row)."""
    count = image_NVTCHW.shape[2]
    order_NT = np.stack(
        [np.random.default_rng([seed, int(row)]).permutation(count) for row in row_N]
    )
    return torch.stack(
        [
            image[:, torch.from_numpy(order)]
            for image, order in zip(image_NVTCHW, order_NT, strict=True)
        ]
    )


def fuse_views(logit_NVK: Tensor, fuse: str, multi_label: bool) -> Tensor:
    """Scores (N, K) of the views (N, V, K): mean logit or mean probability."""
    if fuse == "logit":
        return logit_NVK.mean(dim=1)
    prob_NVK = logit_NVK.sigmoid() if multi_label else logit_NVK.softmax(dim=-1)
    return prob_NVK.mean(dim=1)
