"""Write the list files of a known data set, with the number of frames of every video.

    python -m video_mmit.tools.build_lists data=mmit data.root=DIR out=DIR workers=8

Writes `train.txt`, `val.txt` and `classes.txt`, to be used as `data=lists`. Paths are relative to
the deepest folder that holds all videos, unless `base` says otherwise; the log names it. Counting
opens every video once through the reader of the data set (`data/reader=frames` counts JPEGs). A
run that was stopped goes on where it was, and lists that are already there are taken over where
they fit. Videos that cannot be read are listed in `out/failed.txt`; no list is written and the
exit code is 2 then, unless `allow_failed=true`, which leaves them out.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import numpy as np
from hydra.core.config_store import ConfigStore
from hydra.utils import instantiate
from omegaconf import MISSING

from common.log import InputError, exit_on_bad_input, get_logger, progress, setup_logging
from video_mmit.data.annotations import Line, choose, parse_number, read_text
from video_mmit.data.lists import FORMATS, Entry, read_list, write_classes, write_list
from video_mmit.data.video_data import Reader, Video, VideoData
from video_mmit.tools.jobs import Tally, locked, report_failed, run_jobs

PARTIAL = "counts.partial"  # a line "<frames> <path>" for every finished video


@dataclass
class BuildListsConfig:
    """Schema of configs/build_lists.yaml.

    `base` is the folder paths are relative to; `decode` also decodes the first and last frame of
    every video; `workers` processes, 0 works in the main one.
    """

    data: Any = MISSING
    out: Path = MISSING
    base: Path | None = None
    format: str = "xtemporal"
    decode: bool = False
    workers: int = 2
    allow_failed: bool = False


class _Named(NamedTuple):
    """A video and the path a list names it with."""

    name: str
    path: Path
    video: Video


ConfigStore.instance().store("mmit_build_lists_schema", BuildListsConfig)


def build(
    data: VideoData,
    out: Path,
    base: Path | None = None,
    format: str = "xtemporal",
    decode: bool = False,
    workers: int = 2,
    allow_failed: bool = False,
) -> Tally:
    """Count the frames of all videos and write both lists; see `BuildListsConfig`.

    Raises:
        InputError: a bad option, files in `out` that do not fit, or unreadable videos without
            `allow_failed`.
    """
    choose("format", format, FORMATS)
    if workers < 0:
        raise InputError("workers", "must be at least 0", workers)
    base = common_folder(data) if base is None else Path(os.path.abspath(base))
    parts = {"train": _named(data.train, base), "val": _named(data.test, base)}
    videos = parts["train"] | parts["val"]
    logger = get_logger(__name__)
    with locked(out):
        counts = _known(out, format)
        left = {name: video for name, video in videos.items() if name not in counts}
        before = len(videos) - len(left)
        failed = _count(
            left,
            counts,
            out / PARTIAL,
            partial(count_frames, reader=data.reader, decode=decode),
            workers,
            len(videos),
        )
        tally = Tally(len(left) - len(failed), before, len(failed))
        logger.info("%s: %d counted, %d known before, %d failed", out, *tally)
        report_failed(out, failed, allow_failed)
        _write(out, parts, counts, data.classes, format)
        (out / PARTIAL).unlink(missing_ok=True)
    logger.info("use them as data=lists data.root=%s", base)
    return tally


def common_folder(data: VideoData) -> Path:
    """The deepest folder that holds all videos of both splits, as an absolute path."""
    homes = {
        os.path.abspath(video.path.parent) for part in (data.train, data.test) for video in part
    }
    return Path(os.path.commonpath(homes))


def _named(videos: Sequence[Video], base: Path) -> dict[str, Video]:
    """Videos by the path a list names them with."""
    head, named = os.path.join(base, ""), {}
    for video in videos:
        path = os.path.abspath(video.path)
        if not path.startswith(head):
            raise InputError("base", f"does not hold the video {path}", base)
        named[path.removeprefix(head)] = video
    return named


def _write(
    out: Path,
    parts: Mapping[str, Mapping[str, Video]],
    counts: Mapping[str, int],
    classes: Sequence[str],
    format: str,
) -> None:
    for part, videos in parts.items():
        entries = [
            Entry(name, counts[name], video.labels)
            for name, video in videos.items()
            if name in counts
        ]
        if not entries:
            raise InputError(out / f"{part}.txt", "would be empty: no video of it can be read")
        write_list(out / f"{part}.txt", entries, format)
    write_classes(out / "classes.txt", classes)


def _known(out: Path, format: str) -> dict[str, int]:
    """Numbers of frames from finished lists and from the file of an unfinished run."""
    counts: dict[str, int] = {}
    for part in ("train", "val"):
        path = out / f"{part}.txt"
        if path.exists():
            listed = read_list(path, format)
            counts |= {entry.path: entry.frames for entry in listed if entry.frames is not None}
    path = out / PARTIAL
    if path.exists():
        complete, _, torn = read_text(path).rpartition("\n")
        if torn:  # by a killed writer
            os.truncate(path, path.stat().st_size - len(torn.encode()))
        for number, text in enumerate(filter(None, complete.split("\n")), start=1):
            frames, _, name = text.partition(" ")
            counts[name] = parse_number(frames, Line(path, number, text), "number of frames")
    return counts


def _count(
    videos: Mapping[str, Video],
    counts: dict[str, int],
    path: Path,
    work: Callable[[Video], int],
    workers: int,
    total: int,
) -> list[InputError]:
    """Add the counts of `videos` to `counts` and to the file `path`; returns the complaints."""
    failed: list[InputError] = []
    items = [_Named(name, video.path, video) for name, video in videos.items()]
    with progress() as bar, path.open("a", encoding="utf-8") as file:
        task = bar.add_task("count frames", total=total, completed=total - len(items))
        for item, result in run_jobs(lambda item: work(item.video), items, workers):
            if isinstance(result, InputError):
                failed.append(result)
            else:
                counts[item.name] = result
                file.write(f"{result} {item.name}\n")
                file.flush()
            bar.advance(task)
    return failed


def count_frames(video: Video, reader: Reader, decode: bool = False) -> int:
    """Number of frames of a video; `decode` also decodes the first and the last one."""
    with reader.open(video) as clip:
        if decode:
            clip.read(np.array([0, clip.frames - 1]))
        return clip.frames


@hydra.main(version_base=None, config_path="../configs", config_name="build_lists")
def main(cfg: BuildListsConfig) -> None:
    setup_logging(rank=0)
    build(
        instantiate(cfg.data), Path(cfg.out), None if cfg.base is None else Path(cfg.base),
        cfg.format, cfg.decode, cfg.workers, cfg.allow_failed,
    )  # fmt: skip


if __name__ == "__main__":
    exit_on_bad_input(main)
