"""Face recognition under a FLOPs bound: PolyFace, ArcNegFace, QAN++ (arXiv 1909.00632).

    model = face_lfr.load("model.safetensors")
    found = face_lfr.predict("model.safetensors", ["a.jpg", "b.jpg"])
    fresh = face_lfr.build("polyface_deeper")

The functions import what they need when they are called; `import face_lfr` alone is light.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn

    from face_lfr.predict import Prediction

__all__ = ["build", "load", "predict"]


def build(row: str, **overrides: Any) -> nn.Module:
    """A fresh model of `configs/model/<row>.yaml`, in training mode, with random weights.

    Args:
        row: polyface_deeper, ir50, mobilefacenet, quality_net, ...
        overrides: arguments of the model, for instance `features=512`.

    Raises:
        InputError: no such row; lists what there is.
    """
    from face_lfr.rows import build_row

    return build_row(row, overrides)


def load(path: Path | str, device: torch.device | str = "cpu") -> nn.Module:
    """A trained model in evaluation mode.

    Args:
        path: a release file, a `step_XXXXXXXX` folder, or a run folder (its newest checkpoint).
        device: where the model goes.

    Raises:
        InputError: it is none of these, or names a class that is not this package's.
    """
    from face_lfr.weights import open_trained

    return open_trained(path, device).model


def predict(
    model: Path | str,
    images: Sequence[Path | str],
    device: torch.device | str = "cpu",
) -> Prediction:
    """Unit embeddings of aligned faces and their cosine similarities.

    Args:
        model: a path as for `load`.
        images: pictures of aligned faces, 112 x 112 or resized to that.
        device: where the model runs.

    Raises:
        InputError: the path cannot be loaded, a picture cannot be read.
    """
    from face_lfr.predict import predict as run

    return run(model, images, device)
