"""A test with several views, one after another: a clip is read, and every view goes through alone.

Letters: V views, T frame positions, C channels, H W size, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from video_mmit.data.video_data import Video, VideoData
from video_mmit.engine import Views, autocast


def scores_by_view(
    model: nn.Module, videos: Sequence[Video], data: VideoData, how: Views
) -> Tensor:
    """Mean logits (N, K) on the CPU; `how` says which views."""
    scores = []
    with torch.inference_mode(), autocast(how.world.device, how.precision):
        for video in videos:
            logits = []
            for number in range(how.clips):
                with data.reader.open(video) as clip:
                    frames_THWC = clip.read(data.sampler.test(clip.frames, how.clips)[number])
                for view_TCHW in how.transform.test(frames_THWC, how.crops):
                    x_TCHW = how.transform.normalize(view_TCHW.to(how.world.device))
                    logits.append(model(x_TCHW[None]).float())
            scores.append(torch.cat(logits).mean(dim=0))
    return torch.stack(scores).cpu()
