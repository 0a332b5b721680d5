"""What training, evaluation and the tests share: one training step, and the features of images.

Letters: B images of a batch, N images in all, C channels, H W size, D embedding width.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from common import dist
from common.log import InputError, progress
from common.samplers import EvalSampler
from common.seed import worker_init

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
    item: Any,
    transform: Any,
    objective: Callable[..., Tensor],
    device: torch.device,
    precision: str = "float32",
    frozen: bool = False,
) -> Tensor:
    """Loss of one batch.

    Args:
        model: maps (B, 3, H, W) float to what the objective takes first.
        item: collated named tuple; the first field is the image, uint8 (..., 3, H, W), the others
            go to the objective behind the model's output.
        transform: its `normalize` runs on `device`, so that bytes travel and not floats.
        objective: for instance a classifier, called with (feature (B, D), label (B,)).
        device: where the model is.
        precision: see `autocast`.
        frozen: no gradient to the model.
    """
    image, *rest = (field.to(device, non_blocking=True) for field in item)
    x_BCHW = transform.normalize(image.flatten(0, -4))
    with autocast(device, precision):
        with torch.set_grad_enabled(not frozen):
            output = model(x_BCHW)
        return objective(output, *rest)


def check_fits(model: Any, transform: Any) -> None:
    """Refuse images that the model cannot take, before anything is read.

    Raises:
        InputError: another side than the model's.
    """
    if transform.input_size != model.input_size:
        what = f"the model takes {model.input_size} px, the transform gives"
        raise InputError("transform", what, transform.input_size)


class Embedding(NamedTuple):
    """How images are turned into features, and on what machine.

    With `flip` a feature is the mean of those of the image and of its mirror image, taken after
    crop and resize (trojans-face-recognizer).
    """

    transform: Any
    world: dist.World
    flip: bool = True
    batch: int = 128
    workers: int = 0
    precision: str = "float32"


def embed_images(
    model: nn.Module, images: Dataset[Any], how: Embedding, path: Path, title: str = "embed"
) -> np.ndarray:
    """Features of N images, in their order, as a memory-mapped file.

    The ranks share the images without padding and write their own rows, so that no rank holds all.

    Args:
        model: with `embed` (features (B, D)), or a quality network (scores (B,), stored as D = 1).
        images: items (image uint8 (3, H, W), row).
        how: see `Embedding`.
        path: `.npy` file that is written, float32 (N, D); on storage that all ranks see.
        title: of the progress bar.

    Raises:
        InputError: an image cannot be read; a feature is no number (names the row).
    """
    check_fits(model, how.transform)
    model.eval()
    total = len(images)  # type: ignore[arg-type]
    width = int(getattr(model, "features", 1))
    if how.world.main:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(path, "w+", np.float32, (total, width)).flush()
    dist.barrier()
    out_ND = np.lib.format.open_memmap(path, "r+")
    share = EvalSampler(total, how.world.rank, how.world.size)
    with torch.inference_mode(), progress(how.world.main) as bar:
        task = bar.add_task(title, total=len(share))
        for image_BCHW, row_B in _loader(images, share, how):
            feature_BD = features(model, image_BCHW, how).cpu()
            _require_finite(feature_BD, row_B)
            out_ND[row_B.numpy()] = feature_BD.numpy()
            bar.advance(task, len(row_B))
    out_ND.flush()
    dist.barrier()
    loaded: np.ndarray = np.load(path, mmap_mode="r")
    return loaded


def features(model: nn.Module, image_BCHW: Tensor, how: Embedding) -> Tensor:
    """Test features (B, D) float32 of prepared images (B, 3, H, W) uint8."""
    x_BCHW = how.transform.normalize(image_BCHW.to(how.world.device, non_blocking=True))
    run: Callable[[Tensor], Tensor] = getattr(model, "embed", model)
    with autocast(how.world.device, how.precision):
        out = run(x_BCHW).float()
        if how.flip:
            out = (out + run(x_BCHW.flip(-1)).float()) / 2
    return out.reshape(len(out), -1)


def _require_finite(feature_BD: Tensor, row_B: Tensor) -> None:
    bad = ~feature_BD.isfinite().all(dim=1)
    if bad.any():
        raise InputError("feature", "is no number at image", int(row_B[bad][0]))


def _loader(images: Dataset[Any], share: EvalSampler, how: Embedding) -> DataLoader[Any]:
    return DataLoader(
        images,
        batch_size=how.batch,
        sampler=share,
        num_workers=how.workers,
        worker_init_fn=worker_init,
        pin_memory=how.world.device.type == "cuda",
        generator=torch.Generator(),
    )
