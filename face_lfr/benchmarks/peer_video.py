"""Other ways to make vectors of videos, for the benchmark.

Letters: N frames of all videos, V videos, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from face_lfr.aggregate import frame_weights


def aggregate_dict(
    name_N: Sequence[str], feature_ND: np.ndarray, quality_N: np.ndarray
) -> dict[str, np.ndarray]:
    """QAN++ video by video: frames gathered in a dictionary, weights and sums in NumPy.

    The shape of trojans-face-recognizer's script (generate_aggregation_feat.py): every frame goes
    to the list of its video, every video is a weighted mean. Videos for which that script divides
    by zero, or by a sum of negative qualities, get the plain mean, as `aggregate` gives them.

    Args:
        name_N: the video of each frame.
        feature_ND: frame features.
        quality_N: unbounded scores.

    Returns:
        Vectors (D,) by video, in the order in which the videos come first.
    """
    frames: dict[str, list[tuple[np.ndarray, float]]] = {}
    for name, feature_D, quality in zip(name_N, feature_ND, quality_N, strict=True):
        frames.setdefault(name, []).append((feature_D, quality))
    found = {}
    for name, items in frames.items():
        feature_TD = np.stack([feature_D for feature_D, _ in items])
        quality_T = np.array([quality for _, quality in items])
        found[name] = _weights(quality_T) @ feature_TD
    return found


def _weights(quality_T: np.ndarray) -> np.ndarray:
    low, high = quality_T.min(), quality_T.max()
    if len(quality_T) > 2 and high > low:
        quality_T = (quality_T - low) / (high - low)
    elif len(quality_T) > 2 or low < 0 or high == 0:
        quality_T = np.ones_like(quality_T)
    weight_T: np.ndarray = quality_T / quality_T.sum()
    return weight_T


def aggregate_index_add(feature_ND: Tensor, video_N: Tensor, quality_N: Tensor) -> Tensor:
    """QAN++ with the weights of `aggregate`; frames are multiplied and added by `index_add_`."""
    weight_N = frame_weights(quality_N, video_N, "qanpp")
    videos = int(video_N.max()) + 1
    empty_VD = feature_ND.new_zeros(videos, feature_ND.shape[1])
    return empty_VD.index_add_(0, video_N, feature_ND * weight_N[:, None])


def stacked(vectors: dict[str, np.ndarray]) -> Tensor:
    """The vectors (V, D) of a dictionary in its order."""
    return torch.from_numpy(np.stack(list(vectors.values())))
