"""Synthetic data set in LPW's on-disk format, in which regions of a frame are covered.

A person is three bands of clothing (upper, middle, lower), each one of K styles, and needs all
three to be told from others. In every frame a band may be covered by foreign clothing,
independently of the other bands (`mode="region"`) or together with them (`mode="frame"`). Most
covers carry a faint diagonal hatch, so that quality is visible, but no label says so. The true
mask goes to `quality.npz` (`paths` (N,) relative to the root, `clean` (N, 3) bool) and serves
only to score a quality estimate.

    python -m reid_rqen.data.synthetic out=DIR seed=0

Shapes: T frames, H rows, W columns, 3 = region or colour channel (blue, green, red, in [0, 1]).
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import hydra
import numpy as np
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from common.log import InputError, exit_on_bad_input, get_logger, progress, setup_logging
from reid_rqen.data.lpw import load_lpw
from reid_rqen.data.people import Painter, clean_frames
from reid_rqen.data.tracklet import ReidData

VIEWS = (1, 2, 3)


@dataclass
class Settings:
    """What the images look like and how many there are; the defaults are the hard task.

    Args:
        identities: per half; train (scenes 2 and 3) and test (scene 1) share no person.
        frames: per tracklet.
        height: rows of an image, split 24/40 and 40/56 into regions.
        width: columns; a person is `width - 6` wide.
        styles: K.
        mode: "region" covers regions independently, "frame" all three together.
        cover: p, stationary probability that a region is covered.
        keep: probability per step that a region stays as it is instead of being drawn anew.
        contrast: of the hatch, in [0, 1].
        nohatch: probability that a cover carries no hatch.
        test_cover: "style" as in training, or "blur_dark": the test tracklets' bad regions are
            blurred and darkened instead, a family the training never shows.
    """

    identities: int = 120
    frames: int = 12
    height: int = 56
    width: int = 28
    styles: int = 8
    mode: str = "region"
    cover: float = 0.6
    keep: float = 0.7
    contrast: float = 0.12
    nohatch: float = 0.3
    test_cover: str = "style"

    def __post_init__(self) -> None:
        if self.mode not in ("region", "frame"):
            raise InputError("mode", "accepted: region, frame", self.mode)
        if self.test_cover not in ("style", "blur_dark"):
            raise InputError("test_cover", "accepted: style, blur_dark", self.test_cover)
        for name in ("cover", "keep", "contrast", "nohatch"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(name, "must be in [0, 1]", getattr(self, name))
        if 2 * self.identities > self.styles**3 or self.identities < 2:
            raise InputError(
                "identities", f"two disjoint halves need 4..{self.styles**3} triples",
                self.identities,
            )  # fmt: skip
        if self.frames < 1 or self.width < 12 or self.height < 14:
            raise InputError("frames, height, width", "must be >= 1, 14, 12", self)


def generate(out: Path | str, seed: int = 0, **changes: Any) -> Path:
    """Write the data set for `seed` to `out`, or leave a complete equal one as it is.

    The set is built beside `out` and renamed at the end: `out` is complete or absent. The seed
    decides everything: styles, cameras, identities, numbers, images. `changes` are fields of
    `Settings`.

    Returns:
        `out`, to be read by `load_lpw` with its default split.

    Raises:
        InputError: `out` holds a set with other parameters, or something else.
    """
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
        with contextlib.suppress(OSError):  # another process may have finished first
            os.replace(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if not _complete(out, wanted):
        raise InputError(out, "data set could not be moved into place")
    return out


def _complete(out: Path, wanted: dict[str, Any]) -> bool:
    """Whether `out` holds exactly this set; False for an absent or empty folder."""
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
    return True


def _people(rng: np.random.Generator, settings: Settings) -> Iterator[tuple[int, int, np.ndarray]]:
    """(scene, pid, styles of the three regions) of everyone; numbers repeat across scenes."""
    half = settings.identities
    codes = rng.permutation(settings.styles**3)[: 2 * half]
    triples_N3 = np.stack(np.unravel_index(codes, (settings.styles,) * 3), axis=1)
    scene_N = np.repeat([2, 3, 1], [half - half // 2, half // 2, half])
    for scene in (1, 2, 3):
        rows = np.flatnonzero(scene_N == scene)
        numbers = np.sort(rng.choice(2 * half, size=len(rows), replace=False)) + 1
        for row, pid in zip(rows, numbers, strict=True):
            yield scene, int(pid), triples_N3[row]


def _write(root: Path, seed: int, settings: Settings) -> None:
    rng = np.random.default_rng(seed)
    painter = Painter.draw(
        rng, settings.height, settings.width, settings.styles, len(VIEWS),
        contrast=settings.contrast, nohatch=settings.nohatch,
    )  # fmt: skip
    paths: list[str] = []
    masks: list[np.ndarray] = []
    with progress() as bar:
        task = bar.add_task("synthetic people", total=2 * settings.identities)
        for scene, pid, styles in _people(rng, settings):
            cover = settings.test_cover if scene == 1 else "style"
            for view in VIEWS:
                clean_T3 = clean_frames(
                    rng, settings.frames, settings.cover, settings.keep,
                    together=settings.mode == "frame",
                )  # fmt: skip
                images = painter.tracklet(rng, styles, clean_T3, view - 1, cover)
                folder = f"scen{scene}/view{view}/{pid}"
                paths += _save(root, folder, images)
                masks.append(clean_T3)
            bar.advance(task)
    np.savez(root / "quality.npz", paths=np.array(paths), clean=np.concatenate(masks))


def _save(root: Path, folder: str, image_THW3: np.ndarray) -> list[str]:
    """JPEG, quality 95, colours at full resolution: stripes are as narrow as one pixel."""
    import cv2

    flags = [cv2.IMWRITE_JPEG_QUALITY, 95]
    flags += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    (root / folder).mkdir(parents=True)
    names = [f"{folder}/{number}.jpg" for number in range(1, len(image_THW3) + 1)]
    for name, image in zip(names, image_THW3, strict=True):
        if not cv2.imwrite(str(root / name), image, flags):
            raise InputError(root / name, "image could not be written")
    return names


def load_synthetic(root: Path | str, seed: int = 0, **changes: Any) -> ReidData:
    """Generate the data set unless it is there, then load it with LPW's split.

    Arguments and errors as for `generate`. Ranks may call it at the same time.
    """
    return replace(load_lpw(generate(root, seed, **changes)), name="synth")


@dataclass
class SyntheticConfig(Settings):
    """Schema of configs/synthetic.yaml."""

    out: Path = MISSING
    seed: int = 0


ConfigStore.instance().store("rqen_synthetic_schema", SyntheticConfig)


@hydra.main(version_base=None, config_path="../configs", config_name="synthetic")
def main(cfg: DictConfig) -> None:
    setup_logging(rank=0)
    values: dict[str, Any] = {str(key): value for key, value in cfg.items()}
    generate(**values)


if __name__ == "__main__":
    exit_on_bad_input(main)
