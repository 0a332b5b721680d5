"""Video recognition with temporal interlacing and its relatives (arXiv 2003.05837, 2001.06499).

    model = video_mmit.load("model.safetensors")
    found = video_mmit.predict("model.safetensors", "clip.mp4")
    fresh = video_mmit.build("tin", num_classes=313, backbone="resnet101")

The functions import what they need when they are called; `import video_mmit` alone is light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn

    from video_mmit.predict import Prediction

__all__ = ["build", "load", "predict"]


def build(row: str, num_classes: int, **overrides: Any) -> nn.Module:
    """A fresh model of `configs/model/<row>.yaml`, in training mode, with random weights.

    Args:
        row: tsn, trn, tsm, tin, slowfast, r2plus1d or r3d.
        num_classes: K, at least 1.
        overrides: arguments of the model. A dictionary is merged into the row's
            (`tin={"offset_scale": 8.0}`); a name chooses another file of the group
            (`backbone="resnet101"`, `non_local="embedded"`).

    Raises:
        InputError: no such row, or no such file of a group; lists what there is.
    """
    from video_mmit.rows import build_row

    return build_row(row, num_classes, overrides)


def load(path: Path | str, device: torch.device | str = "cpu") -> nn.Module:
    """A trained model in evaluation mode.

    Args:
        path: a release file, a `step_XXXXXXXX` folder, or a run folder (its newest checkpoint).
        device: where the model goes.

    Raises:
        InputError: it is none of these, or names a class that is not this package's.
    """
    from video_mmit.predict import open_trained

    return open_trained(path, device).model


def predict(
    model: Path | str,
    video: Path | str,
    clips: int = 1,
    crops: int = 1,
    device: torch.device | str = "cpu",
) -> Prediction:
    """Probabilities of the classes of one video.

    Args:
        model: a path as for `load`.
        video: a video file or a folder of frames.
        clips: temporal views.
        crops: spatial views, 1, 3, 5 or 10.
        device: where the model runs.

    Returns:
        `prob_K`, the names of the classes, and the frames that were looked at.

    Raises:
        InputError: the path cannot be loaded, the video cannot be read.
    """
    from video_mmit.predict import predict as run

    return run(model, video, clips, crops, device)
