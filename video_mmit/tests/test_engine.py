"""Scores of videos: views are fused as said, and equal the views looked at one by one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common import dist
from common.log import InputError
from video_mmit.engine import Views, autocast, fuse_views, score_videos
from video_mmit.evaluate import open_data
from video_mmit.weights import Trained, load_trained


@pytest.fixture(scope="module")
def trained(run: Path) -> Trained:
    return load_trained(run, scale_size=36, input_size=32)


def scores(trained: Trained, **options: Any) -> np.ndarray:
    data = open_data(trained)
    how = Views(trained.transform, dist.init("cpu"), **options)
    return score_videos(trained.model, data.test, data, how).scores


@pytest.mark.parametrize("fuse", ["logit", "prob"])
def test_check_15_thirty_views_are_the_mean_of_thirty_calls(trained: Trained, fuse: str) -> None:
    data = open_data(trained)
    found = scores(trained, crops=3, clips=10, fuse=fuse, batch=7)
    video = data.test[4]
    with data.reader.open(video) as clip:
        index_JT = data.sampler.test(clip.frames, 10)
        pictures = [clip.read(index_T) for index_T in index_JT]
    logits = []
    for frames in pictures:
        for image in trained.transform.test(frames, 3):
            with torch.inference_mode():
                logits.append(trained.model(trained.transform.normalize(image[None])))
    assert len(logits) == 30
    each = torch.cat(logits)
    expected = each.mean(dim=0) if fuse == "logit" else each.sigmoid().mean(dim=0)
    np.testing.assert_allclose(found[4], expected.numpy(), atol=1e-5)
    assert len({tuple(row.tolist()) for row in each}) > 3  # the views differ


def test_fusing_follows_the_kind_of_the_labels() -> None:
    logit_NVK = torch.tensor([[[0.0, 2.0], [4.0, -2.0]]])
    assert fuse_views(logit_NVK, "logit", True).tolist() == [[2.0, 0.0]]
    torch.testing.assert_close(fuse_views(logit_NVK, "prob", True), logit_NVK.sigmoid().mean(1))
    torch.testing.assert_close(fuse_views(logit_NVK, "prob", False), logit_NVK.softmax(-1).mean(1))
    assert fuse_views(logit_NVK, "prob", False).sum() == pytest.approx(1)


def test_check_09_two_evaluations_are_the_same_bits(trained: Trained) -> None:
    """Whatever the batch and the number of workers; clips are phases, not draws."""
    first = scores(trained, clips=2)
    np.testing.assert_array_equal(scores(trained, clips=2), first)
    np.testing.assert_array_equal(scores(trained, clips=2, workers=2), first)
    np.testing.assert_allclose(scores(trained, clips=2, batch=2), first, atol=1e-5)


def test_shuffled_frames_are_the_same_frames_in_a_fixed_order(trained: Trained) -> None:
    first = scores(trained, shuffle=0)
    np.testing.assert_array_equal(scores(trained, shuffle=0), first)
    assert not np.allclose(first, scores(trained), atol=1e-4)
    assert not np.allclose(first, scores(trained, shuffle=1), atol=1e-4)


def test_unknown_words_are_named(trained: Trained) -> None:
    with pytest.raises(InputError, match=r"eval\.fuse: must be one of logit, prob: sum"):
        scores(trained, fuse="sum")
    with pytest.raises(InputError, match="precision: must be one of"):
        autocast(torch.device("cpu"), "int8")
