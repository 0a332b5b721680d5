"""Re-encode a tree of videos for fast random access: small frames, a key frame every few frames.

    python -m video_mmit.tools.reencode input=DIR out=DIR keyframe=8

A sparse sampler reads 8 of 90 frames, and a decoder must start each at the key frame before it; in
videos from the web that is often the first frame. The result is H.264 without B-frames and without
sound, upright, at a constant frame rate, with exactly as many frames as before (checked after
writing). Files keep their names, so that lists stay valid; the container is MP4 whatever the
suffix, which decoders find out by themselves. A run that was stopped goes on where it was, and
videos that cannot be read are listed in `out/failed.txt`; the exit code is 2 then, unless
`allow_failed=true`. It pays for long videos: clips of a few seconds read about as fast with one key
frame (rows `read` of the benchmarks). Needs PyAV: pip install 'vision-tasks[video-av]'.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import numpy as np
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from common.log import InputError, exit_on_bad_input, setup_logging
from video_mmit.data.annotations import choose
from video_mmit.data.video import FileReader
from video_mmit.data.video_data import Video
from video_mmit.tools.frames import all_frames, check_least, file_reader, fitted_size, resize
from video_mmit.tools.jobs import Job, Tally, find_jobs, run_tree

USUAL_RATE = Fraction(25)  # of a container that states none


@dataclass
class ReencodeConfig:
    """Schema of configs/reencode.yaml.

    `keyframe` is the greatest distance of two key frames; `short_side` in pixels, 0 keeps the
    size, and small videos are never enlarged; `crf` is the quality of x264, 0 (lossless) to 51;
    `preset` its speed; `workers` processes, 0 works in the main one.
    """

    input: Path = MISSING
    out: Path = MISSING
    short_side: int = 256
    keyframe: int = 8
    crf: int = 20
    preset: str = "medium"
    backend: str = "decord"
    workers: int = 2
    allow_failed: bool = False


ConfigStore.instance().store("mmit_reencode_schema", ReencodeConfig)
PRESETS = "ultrafast superfast veryfast faster fast medium slow slower veryslow".split()
OPTIONS = ("short_side", "keyframe", "crf", "preset")


def reencode(cfg: ReencodeConfig) -> Tally:
    """Re-encode every video that is not in `out` yet.

    Raises:
        InputError: PyAV is missing, a bad option or folder, or unreadable videos without
            `allow_failed`.
    """
    _check(cfg)
    out = Path(cfg.out)
    jobs = find_jobs(Path(cfg.input), out, lambda path: path)
    options = {name: getattr(cfg, name) for name in OPTIONS}
    work = partial(reencode_video, reader=file_reader(cfg.backend), **options)
    return run_tree(jobs, out, work, options, cfg.workers, cfg.allow_failed, "re-encode")


def _check(cfg: ReencodeConfig) -> None:
    av = _pyav()
    try:
        av.codec.Codec("libx264", "w")
    except ValueError as error:  # of which PyAV's errors are
        raise InputError("av", "was built without the encoder", "libx264") from error
    check_least(cfg, short_side=0, keyframe=1, crf=0, workers=0)
    if cfg.crf > 51:
        raise InputError("crf", "must be in 0..51", cfg.crf)
    choose("preset", cfg.preset, PRESETS)


def _pyav() -> Any:
    try:
        import av
    except ImportError as error:
        what = "is not installed, re-encoding needs it: pip install"
        raise InputError("av", what, "'vision-tasks[video-av]'") from error
    return av


def reencode_video(
    job: Job, reader: FileReader, short_side: int, keyframe: int, crf: int, preset: str
) -> int:
    """Write a video to the file `job.partial` and read it back; returns the number of frames.

    Raises:
        InputError: the video cannot be read to its end, or the result has another length.
        OSError: the result cannot be written.
    """
    job.partial.parent.mkdir(parents=True, exist_ok=True)
    rate = _frame_rate(job.path)
    with reader.open(Video(str(job.path), job.path, None, ())) as clip:
        options = {
            "g": str(keyframe), "keyint_min": str(keyframe), "sc_threshold": "0", "bf": "0",
            "crf": str(crf), "preset": preset,
        }  # fmt: skip
        written = encode(job.partial, all_frames(clip), rate, short_side, options)
    with reader.open(Video(str(job.path), job.partial, None, ())) as clip:
        clip.read(np.array([clip.frames - 1]))
        if clip.frames != written:
            what = f"has {written} frames, but after re-encoding"
            raise InputError(job.path, what, clip.frames)
    return written


def encode(
    path: Path,
    frames: Iterator[np.ndarray],
    rate: Fraction,
    short_side: int,
    options: dict[str, str],
) -> int:
    """Write (H, W, 3) frames as H.264 in MP4; returns their number. `options` are x264's.

    Raises:
        InputError: the encoder refuses the frames.
        OSError: the file cannot be written.
    """
    av = _pyav()
    try:
        return _encode(av, path, frames, rate, short_side, options)
    except av.FFmpegError as error:
        if isinstance(error, OSError):  # as itself, which another process can pass on
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise InputError(path, "cannot be encoded", error) from None


def _encode(
    av: Any,
    path: Path,
    frames: Iterator[np.ndarray],
    rate: Fraction,
    short_side: int,
    options: dict[str, str],
) -> int:
    number = 0
    with av.open(os.path.abspath(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1  # many workers, one thread each
        for number, image_HW3 in enumerate(frames, start=1):
            if number == 1:
                size = fitted_size(image_HW3.shape, short_side, even=True)
                stream.height, stream.width = size
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(resize(image_HW3, size)))
            frame.pts = number - 1
            frame.time_base = 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return number


def _frame_rate(path: Path) -> Fraction:
    av = _pyav()
    try:
        with av.open(os.path.abspath(path)) as container:
            if not container.streams.video:
                raise InputError(path, "has no video stream")
            rate = container.streams.video[0].average_rate
    except av.FFmpegError as error:
        raise InputError(path, "video cannot be opened", error) from error
    # A still picture or a broken header states rates that no player could follow.
    return Fraction(rate) if rate and 1 <= rate <= 240 else USUAL_RATE


@hydra.main(version_base=None, config_path="../configs", config_name="reencode")
def main(cfg: ReencodeConfig) -> None:
    setup_logging(rank=0)
    reencode(cfg)


if __name__ == "__main__":
    exit_on_bad_input(main)
