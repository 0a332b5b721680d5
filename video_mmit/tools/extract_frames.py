"""Turn a tree of videos into the same tree of folders with one JPEG a frame.

    python -m video_mmit.tools.extract_frames input=DIR out=DIR

`input/<any>/<name>.mp4` becomes `out/<any>/<name>/img_00001.jpg` and so on, from 1. A run that was
stopped goes on where it was: a folder has its name once it is complete. Videos that cannot be read
are listed in `out/failed.txt`; the exit code is 2 then, unless `allow_failed=true`.
"""

import errno
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from common.log import InputError, exit_on_bad_input, setup_logging
from video_mmit.data.video import FileReader, FolderReader
from video_mmit.data.video_data import Video
from video_mmit.tools.frames import all_frames, check_least, file_reader, fitted_size, resize
from video_mmit.tools.jobs import Job, Tally, find_jobs, run_tree


@dataclass
class ExtractFramesConfig:
    """Schema of configs/extract_frames.yaml.

    `short_side` in pixels, 0 keeps the size, and small videos are never enlarged; `quality` of the
    JPEGs, 1 to 100; `workers` processes, 0 works in the main one.
    """

    input: Path = MISSING
    out: Path = MISSING
    template: str = "img_{:05d}.jpg"
    short_side: int = 256
    quality: int = 95
    backend: str = "decord"
    workers: int = 2
    allow_failed: bool = False


ConfigStore.instance().store("mmit_extract_frames_schema", ExtractFramesConfig)


def extract(cfg: ExtractFramesConfig) -> Tally:
    """Extract every video that has no folder yet.

    Raises:
        InputError: a bad option or folder, or unreadable videos without `allow_failed`.
    """
    _check(cfg)
    out = Path(cfg.out)
    jobs = find_jobs(Path(cfg.input), out, lambda path: path.with_suffix(""))
    settings = {name: getattr(cfg, name) for name in ("template", "short_side", "quality")}
    work = partial(
        extract_video, reader=file_reader(cfg.backend), template=cfg.template,
        short_side=cfg.short_side, quality=cfg.quality,
    )  # fmt: skip
    return run_tree(jobs, out, work, settings, cfg.workers, cfg.allow_failed, "extract frames")


def _check(cfg: ExtractFramesConfig) -> None:
    check_least(cfg, short_side=0, workers=0)
    if not 1 <= cfg.quality <= 100:
        raise InputError("quality", "must be in 1..100", cfg.quality)
    if "/" in cfg.template or not cfg.template.endswith((".jpg", ".jpeg")):
        raise InputError("template", "must be the name of a .jpg file", cfg.template)
    try:
        FolderReader(cfg.template)
    except ValueError as error:
        raise InputError("template", "is not accepted", error) from error


def extract_video(
    job: Job, reader: FileReader, template: str, short_side: int, quality: int
) -> int:
    """Write all frames of a video to the folder `job.partial`; returns how many.

    Raises:
        InputError: the video cannot be read to its end.
        OSError: a frame cannot be written.
    """
    import cv2

    shutil.rmtree(job.partial, ignore_errors=True)  # of a run that was stopped
    job.partial.mkdir(parents=True)
    number = 0
    with reader.open(Video(str(job.path), job.path, None, ())) as clip:
        for number, frame_HW3 in enumerate(all_frames(clip), start=1):
            image = resize(frame_HW3, fitted_size(frame_HW3.shape, short_side))
            path = job.partial / template.format(number)
            bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
            if not cv2.imwrite(str(path), bgr, [cv2.IMWRITE_JPEG_QUALITY, quality]):
                raise OSError(errno.EIO, "image could not be written", str(path))
    return number


@hydra.main(version_base=None, config_path="../configs", config_name="extract_frames")
def main(cfg: ExtractFramesConfig) -> None:
    setup_logging(rank=0)
    extract(cfg)


if __name__ == "__main__":
    exit_on_bad_input(main)
