"""Object detection with task-aware spatial disentanglement, TSD (arXiv 2003.07540).

    model = detection_tsd.load("model.safetensors")
    found = detection_tsd.predict("model.safetensors", ["a.jpg", "b.jpg"])
    fresh = detection_tsd.build("coco/tsd_r50")

The functions import what they need when they are called; `import detection_tsd` alone is light.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn

    from detection_tsd.engine import Found

__all__ = ["build", "load", "predict"]


def build(row: str, *overrides: str) -> nn.Module:
    """A fresh detector of `configs/experiment/<row>.yaml`, in training mode, with random weights.

    Args:
        row: coco/tsd_r50, coco/cascade_tsd_r101, synth/tsd, ...
        overrides: as on the command line, for instance "num_classes=20".

    Raises:
        InputError: no such row (lists what there is), or an override that does not exist.
    """
    from detection_tsd.rows import build_row

    return build_row(row, *overrides)


def load(path: Path | str, device: torch.device | str = "cpu") -> nn.Module:
    """A trained detector in evaluation mode.

    Args:
        path: a release file, a `step_XXXXXXXX` folder, or a run folder (its newest checkpoint).
        device: where the detector goes.

    Raises:
        InputError: it is none of these, or names a class that is not this package's.
    """
    from detection_tsd.weights import open_trained

    return open_trained(path, device).model


def predict(
    model: Path | str, images: Sequence[Path | str], device: torch.device | str = "cpu"
) -> list[Found]:
    """Detections of pictures, in their pixels, best first.

    Args:
        model: a path as for `load`.
        images: pictures of any size.
        device: where the detector runs.

    Raises:
        InputError: the path cannot be loaded, a picture cannot be read.
    """
    from detection_tsd.predict import detect_pictures

    return detect_pictures(model, images, device)
