"""Jester: 27 hand gestures, one label a video, in the format of Something-Something version 1.

`20bn-jester-v1/<id>/00001.jpg` with `jester-v1-labels.csv`, `-train.csv`, `-validation.csv` and
`-test.csv`. Swiping left and swiping right are different labels: train without flips.
"""

from pathlib import Path

from video_mmit.data.something import load_templates
from video_mmit.data.video_data import Reader, Sampler, VideoData


def load_jester(
    root: Path | str,
    reader: Reader,
    sampler: Sampler,
    class_order: str = "sorted",
    test_part: str = "validation",
    frames: str = "20bn-jester-v1",
) -> VideoData:
    """List Jester; the arguments and errors are those of `load_something_v1`."""
    return load_templates(
        "jester", Path(root), reader, sampler, "jester-v1", class_order, test_part, frames
    )
