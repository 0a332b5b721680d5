"""What training, evaluation and the tests share: one training step, and detections of a set.

Letters: B images of a batch, N images in all, D detections, H W size.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from common import dist
from common.log import InputError, progress
from common.samplers import EvalSampler
from common.seed import worker_init
from detection_tsd.data.batch import collate, to
from detection_tsd.data.detection_data import Batch, Detections

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
    model: nn.Module, batch: Batch, transform: Any, device: torch.device, precision: str = "float32"
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of one batch, the sum of its parts, and the parts.

    Args:
        model: a detector in training mode.
        batch: see `detection_tsd.data.detection_data.Batch`.
        transform: its `normalize` runs on `device`, so that bytes travel and not floats.
        device: where the model is.
        precision: see `autocast`.
    """
    batch = to(batch, device)
    x_B3HW = transform.normalize(batch.image_B3HW, batch.size_B2)
    with autocast(device, precision):
        parts = model(x_B3HW, batch.size_B2, batch.targets, batch.proposals, batch.draw_B)
    return torch.stack([part.float() for part in parts.values()]).sum(), parts


class Found(NamedTuple):
    """Detections of one image in the pixels of its file, best first.

    Attributes:
        row: of the set.
        size: height and width of the picture.
        box_D4: float32 xyxy. score_D: float32. label_D: int64, 1..classes.
        masks: D run-length codes of the picture's size, or None.
    """

    row: int
    size: tuple[int, int]
    box_D4: np.ndarray
    score_D: np.ndarray
    label_D: np.ndarray
    masks: list[dict[str, Any]] | None = None


class Detecting(NamedTuple):
    """How images are turned into detections, and on what machine."""

    transform: Any
    world: dist.World
    batch: int = 1
    workers: int = 0
    precision: str = "float32"


def detect(
    model: nn.Module, images: Dataset[Any], how: Detecting, title: str = "detect"
) -> list[Found]:
    """Detections of N images, in their order; the ranks share the images without padding.

    Args:
        model: a detector; it is put into evaluation mode.
        images: items as `detection_tsd.data.draws.ImageRows` gives them.
        how: see `Detecting`.
        title: of the progress bar.

    Returns:
        N entries on every rank.

    Raises:
        InputError: an image cannot be read.
    """
    model.eval()
    share = EvalSampler(len(images), how.world.rank, how.world.size)  # type: ignore[arg-type]
    found: list[Found] = []
    with torch.inference_mode(), progress(how.world.main) as bar:
        task = bar.add_task(title, total=len(share))
        for batch in _loader(images, share, how):
            found += list(_detect(model, batch, how))
            bar.advance(task, len(batch.row_B))
    return [item for part in dist.gather_objects(found) for item in part]


def _detect(model: nn.Module, batch: Batch, how: Detecting) -> Iterator[Found]:
    batch = to(batch, how.world.device)
    x_B3HW = how.transform.normalize(batch.image_B3HW, batch.size_B2)
    with autocast(how.world.device, how.precision):
        detections = model(x_B3HW, batch.size_B2, proposals=batch.proposals)
    for image, detected in enumerate(detections):
        yield in_file_pixels(
            detected, int(batch.row_B[image]), batch.scale_B2[image], batch.original_B2[image]
        )


def in_file_pixels(detected: Detections, row: int, scale_2: Tensor, original_2: Tensor) -> Found:
    """Detections of one image, from network-input pixels to those of the picture.

    Args:
        detected: of the network.
        row: of the image in its set.
        scale_2: network-input pixels per pixel of the picture, (x, y).
        original_2: height and width of the picture.
    """
    height, width = (int(side) for side in original_2)
    box_D4 = detected.box_D4.float().cpu() / scale_2.cpu().repeat(2)
    limit_4 = torch.tensor([width, height, width, height], dtype=torch.float32)
    box_D4 = torch.minimum(box_D4.clamp(min=0), limit_4)
    masks = None
    if detected.mask_DSS is not None:
        masks = _run_lengths(detected.mask_DSS.float().cpu(), box_D4, height, width)
    return Found(
        row, (height, width), box_D4.numpy(), detected.score_D.float().cpu().numpy(),
        detected.label_D.cpu().numpy(), masks,
    )  # fmt: skip


def _run_lengths(mask_DSS: Tensor, box_D4: Tensor, height: int, width: int) -> list[dict[str, Any]]:
    from pycocotools import mask as coder

    from detection_tsd.models.mask_branch import paste

    codes = []
    for mask_SS, box_4 in zip(mask_DSS, box_D4, strict=True):  # one at a time bounds the memory
        pasted_HW = paste(mask_SS[None], box_4[None], height, width)[0]
        code = coder.encode(np.asfortranarray(pasted_HW.numpy().astype(np.uint8)))
        codes.append({"size": code["size"], "counts": code["counts"].decode("ascii")})
    return codes


def _loader(images: Dataset[Any], share: EvalSampler, how: Detecting) -> DataLoader[Any]:
    return DataLoader(
        images,
        batch_size=how.batch,
        sampler=share,
        num_workers=how.workers,
        worker_init_fn=worker_init,
        collate_fn=partial(collate, divisor=how.transform.divisor),
        pin_memory=how.world.device.type == "cuda",
        generator=torch.Generator(),
    )
