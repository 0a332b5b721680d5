"""Synthetic data set in M-MiT's on-disk format, in which the order of frames matters.

See `video_mmit.data.motion` for the three parts. `out` holds `videos/<class_dir>/<id>.mp4`,
`moments_categories.txt`, `trainingSet.txt` and `validationSet.txt` as M-MiT has them, the same
videos as X-Temporal's lists `train.txt` and `val.txt` (paths relative to `videos`), and
`synthetic.json`, the settings it was made with.

    python -m video_mmit.data.synthetic out=DIR seed=0

Shapes: N videos, K classes, F frames, H rows, W columns.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import hydra
import numpy as np
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from common.dist import main_first
from common.log import InputError, exit_on_bad_input, get_logger, progress, setup_logging
from video_mmit.data.lists import Entry, format_entry
from video_mmit.data.mmit import load_mmit
from video_mmit.data.motion import CATEGORIES, PAIRS, Painter, draw_labels
from video_mmit.data.video_data import Reader, Sampler, VideoData

RATE = 8  # frames a second
SPLITS = (("trainingSet.txt", "train"), ("validationSet.txt", "val"))


@dataclass
class Settings:
    """What the videos show and how many there are.

    Args:
        part: "order", "gap" or "static", see `video_mmit.data.motion`.
        train: number of training videos.
        val: number of validation videos.
        size: height and width in pixels; even, as the coder wants it.
        segments: of 3 frames each.
        noise: grey noise of a pixel, standard deviation in grey levels. Above about 6 the coder
            runs out of bits, and the loss of quality differs between early and late frames.
        jitter: of a position in a frame, standard deviation in pixels at size 32.
        speed: mean pixels a segment at size 32 along each axis; part "gap" only.
        max_gap: the blob shows in every g-th segment, g in 1..max_gap; part "gap" only.
    """

    part: str = "order"
    train: int = 1600
    val: int = 500
    size: int = 32
    segments: int = 8
    noise: float = 3.0
    jitter: float = 0.3
    speed: float = 0.8
    max_gap: int = 4

    def __post_init__(self) -> None:
        if self.part not in CATEGORIES:
            raise InputError("part", f"accepted: {', '.join(CATEGORIES)}", self.part)
        if self.size < 16 or self.size % 2:
            raise InputError("size", "must be even and at least 16", self.size)
        for name, least in (("train", 1), ("val", 1), ("segments", 4), ("max_gap", 1)):
            if getattr(self, name) < least:
                raise InputError(name, f"must be at least {least}", getattr(self, name))
        for name in ("noise", "jitter", "speed"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(name, "must be finite and at least 0", getattr(self, name))


def generate(out: Path | str, seed: int = 0, **changes: Any) -> Path:
    """Write the data set for `seed` to `out`, or leave a complete equal one as it is.

    The set is built beside `out` and renamed at the end. A set with the same settings that lost
    some of its files is made anew. Every video is a function of the seed, its split and its
    number: a larger set contains the smaller one. `changes` are fields of `Settings`.

    Returns:
        `out`, to be read by `load_mmit`.

    Raises:
        InputError: a bad setting; or `out` holds a set with other settings, or something else.
    """
    if seed < 0:
        raise InputError("seed", "must be at least 0", seed)
    out, settings = Path(out), Settings(**changes)
    wanted = {"seed": seed, **asdict(settings)}
    if _complete(out, wanted):
        get_logger(__name__).info("%s: complete, nothing generated", out)
        return out
    work = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        _write(work, seed, settings)
        (work / "synthetic.json").write_text(json.dumps(wanted, indent=1))
        if not _complete(out, wanted):
            shutil.rmtree(out, ignore_errors=True)
        with contextlib.suppress(OSError):  # another process may have finished first
            os.replace(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if not _complete(out, wanted):
        raise InputError(out, "data set could not be moved into place")
    return out


def _complete(out: Path, wanted: dict[str, Any]) -> bool:
    """Whether `out` holds exactly this set; False for an absent, empty or damaged one."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / "synthetic.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(out, "exists and holds no complete synthetic data set") from error
    different = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
    if different:
        what = "holds a data set with other parameters (use another folder)"
        pairs = ", ".join(f"{key}={found.get(key)} not {wanted.get(key)}" for key in different)
        raise InputError(out, what, pairs)
    lists = ("moments_categories.txt", *(name for split in SPLITS for name in _lists(split)))
    videos = sum(1 for _ in out.glob("videos/*/*.mp4"))
    return videos == wanted["train"] + wanted["val"] and all((out / n).is_file() for n in lists)


def _lists(split: tuple[str, str]) -> tuple[str, str]:
    """Names of the two lists of a split."""
    return split[0], f"{split[1]}.txt"


def _write(root: Path, seed: int, settings: Settings) -> None:
    names = CATEGORIES[settings.part]
    rows = "".join(f"{name},{index}\n" for index, name in enumerate(names))
    (root / "moments_categories.txt").write_text(rows)
    for name in names:
        (root / "videos" / name).mkdir(parents=True)
    counts = (settings.train, settings.val)
    with progress() as bar:
        task = bar.add_task(f"synthetic videos, {settings.part}", total=sum(counts))
        for number, (split, count) in enumerate(zip(SPLITS, counts, strict=True)):
            entries = []
            for index in range(count):
                rng = np.random.default_rng([seed, number, index])
                entries.append(_write_video(root, rng, settings, f"{split[1]}_{index:05d}"))
                bar.advance(task)
            _write_lists(root, split, entries)


def _painter(settings: Settings) -> Painter:
    return Painter(
        settings.part, settings.size, settings.segments, settings.noise, settings.jitter,
        settings.speed, settings.max_gap,
    )  # fmt: skip


def _write_video(root: Path, rng: np.random.Generator, settings: Settings, stem: str) -> Entry:
    """Draw and write one video; as in M-MiT its folder is its first label, in no special order."""
    labels = draw_labels(settings.part, rng)
    frames_FHW3 = _painter(settings).video(rng, labels)
    labels = tuple(rng.permutation(labels).tolist())
    name = f"{CATEGORIES[settings.part][labels[0]]}/{stem}.mp4"
    write_mp4(root / "videos" / name, frames_FHW3)
    return Entry(name, len(frames_FHW3), labels)


def _write_lists(root: Path, split: tuple[str, str], entries: Sequence[Entry]) -> None:
    mmit, xtemporal = _lists(split)
    rows = (",".join([entry.path, *map(str, entry.labels)]) for entry in entries)
    (root / mmit).write_text("".join(f"{row}\n" for row in rows))
    (root / xtemporal).write_text("".join(f"{format_entry(entry)}\n" for entry in entries))


def write_mp4(path: Path, frames_FHW3: np.ndarray, rate: float = RATE) -> None:
    """Write uint8 frames, blue first, as MPEG-4 part 2; lossy, chroma at half resolution.

    Raises:
        InputError: the file could not be written.
    """
    import cv2

    height, width = frames_FHW3.shape[1:3]
    code = cv2.VideoWriter.fourcc(*"mp4v")
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, code, rate, (width, height))
    try:
        if not writer.isOpened():
            raise InputError(path, "video could not be written")
        for frame_HW3 in frames_FHW3:
            writer.write(np.ascontiguousarray(frame_HW3))
    finally:
        writer.release()
    if not path.is_file() or not path.stat().st_size:
        raise InputError(path, "video could not be written")


def load_synthetic(
    root: Path | str, reader: Reader, sampler: Sampler, seed: int = 0, **changes: Any
) -> VideoData:
    """Generate the data set unless it is there, then load it as M-MiT.

    Arguments and errors as for `generate` and `load_mmit`. Among several ranks the main one
    generates.
    """
    with main_first():
        generate(root, seed, **changes)
    return replace(load_mmit(root, reader, sampler), name="synthetic")


def pair_accuracy(score_NK: np.ndarray, target_NK: np.ndarray, part: str) -> dict[str, float]:
    """How often the right label of a pair of opposite motions scores higher than the other.

    Chance is 0.5; ties count one half.

    Args:
        score_NK: (N, K), any monotone scale.
        target_NK: (N, K) of 0 and 1.
        part: decides which labels are pairs.

    Returns:
        "first|second" of each pair and "all" (every video once for each of its motions); NaN
        where no video carries a label of the pair.
    """
    results: dict[str, np.ndarray] = {}
    for first, second in PAIRS[part]:
        rows = (target_NK[:, first] + target_NK[:, second]) > 0
        lead_N = score_NK[rows, first] - score_NK[rows, second]
        sense_N = np.where(target_NK[rows, first] > 0, 1, -1)
        names = CATEGORIES[part]
        results[f"{names[first]}|{names[second]}"] = (1 + np.sign(lead_N) * sense_N) / 2
    results["all"] = np.concatenate([np.empty(0), *results.values()])
    return {name: float(hit.mean()) if len(hit) else float("nan") for name, hit in results.items()}


@dataclass
class SyntheticConfig(Settings):
    """Schema of configs/synthetic.yaml."""

    out: Path = MISSING
    seed: int = 0


ConfigStore.instance().store("mmit_synthetic_schema", SyntheticConfig)


@hydra.main(version_base=None, config_path="../configs", config_name="synthetic")
def main(cfg: DictConfig) -> None:
    setup_logging(rank=0)
    values: dict[str, Any] = {str(key): value for key, value in cfg.items()}
    generate(**values)


if __name__ == "__main__":
    exit_on_bad_input(main)
