"""Region-based quality estimation for person re-identification in video (arXiv 1711.08766).

    model = reid_rqen.load("model.safetensors")
    found = reid_rqen.predict("model.safetensors", ["1.jpg", "2.jpg"])
    fresh = reid_rqen.build("rqen_322", num_classes=89)

The functions import what they need when they are called; `import reid_rqen` alone is light.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import torch
    from torch import Tensor, nn

    from reid_rqen.data.transforms import FrameTransform
    from reid_rqen.predict import Prediction

__all__ = ["build", "load", "predict"]


def build(row: str, num_classes: int | None = None, **overrides: Any) -> nn.Module:
    """A fresh model of `configs/model/<row>.yaml`, in training mode, with random weights.

    Args:
        row: for instance `rqen_322`, `qan`, `cnn_rnn`.
        num_classes: identities of the training set; None leaves the classifiers out.
        overrides: arguments of the model. A dictionary is merged into the row's
            (`quality={"outputs": 1}`); a name chooses another file of the group
            (`trunk="tiny"`, `quality="image"`).

    Raises:
        InputError: no such row, or no such file of a group; lists what there is.
    """
    from reid_rqen.rows import build_row

    return build_row(row, num_classes, overrides)


def load(path: Path | str, device: torch.device | str = "cpu") -> nn.Module:
    """A trained model in evaluation mode, without its classifiers.

    Args:
        path: a release file, a `step_XXXXXXXX` folder, or a run folder (its newest checkpoint).
        device: where the model goes.

    Raises:
        InputError: it is none of these, or names a class that is not this package's.
    """
    from reid_rqen.predict import open_trained

    return open_trained(path, device).model


def predict(
    model: nn.Module | Path | str,
    frames: Tensor | Sequence[Path | str | np.ndarray],
    transform: FrameTransform | None = None,
    batch: int = 64,
) -> Prediction:
    """Region scores, frame weights and set vector of the frames of one person.

    Args:
        model: an RQEN (left in evaluation mode), or a path as for `load`.
        frames: pictures, as paths or (H, W, 3) uint8 arrays with red first; or normalised network
            input (T, C, H, W) float, for which no transform is needed.
        transform: prepares pictures; that of the path when None.
        batch: frames that go through the network at once.

    Returns:
        `score_TR` in (0, 1), `weight_TR` (columns sum to 1), `vector_D` of unit norm.

    Raises:
        InputError: the path cannot be loaded, a picture cannot be read, the model has no scores.
        ValueError: no frames, or pictures without a transform.
    """
    from reid_rqen.predict import predict as run

    return run(model, frames, transform, batch)
