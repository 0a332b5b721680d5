"""Synthetic faces in the on-disk formats of the real sets, made from a seed.

`out` holds, as the real sets do,

* `train.rec`, `train.idx`, `property`: the training set, as InsightFace writes its sets;
* `syn.bin`: pairs of faces, 10 folds, in each one half of the pairs of one person;
* `glint_syn/filelist.txt`, `labels.txt` and images: identities and distractors (label -1), as
  the image track of the 2019 challenge, with the labels its server kept;
* `iqiyi_syn/<video>/<frame>.jpg`, `filelist.txt`, `labels.txt`: videos in which some frames are
  degraded, as the video track; `quality.txt` says for each frame how good it truly is
  (`video/frame.jpg quality`, 1 is undegraded) and serves only to score an estimate;
* `iqiyi_clean`: the same videos before any degradation;
* `synthetic.json`: the settings it was made with.

No person is in two of these parts. Every image is a function of the seed, its part and its
numbers: a larger set contains the smaller one.

    python -m face_lfr.data.synthetic out=DIR seed=0
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import hydra
import numpy as np
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from common.dist import main_first
from common.log import InputError, exit_on_bad_input, get_logger, progress, setup_logging
from face_lfr.data.bins import write_bin
from face_lfr.data.degrade import degrade
from face_lfr.data.face_data import FaceData
from face_lfr.data.faces import SIDE, Identity, Pose, render
from face_lfr.data.rec import load_rec
from face_lfr.data.recordio import RecordWriter, pack

TRAIN, GLINT, DISTRACTOR, VIDEO, PAIR = range(5)  # parts; each has persons of its own
PERSON, POSE, DAMAGE = range(3)  # what a stream of random numbers decides
FOLDS = 10
SUFFIXES = (".jpg", ".rec", ".idx", ".bin", ".txt")
JPEG_QUALITY = 95

Tick = Callable[[], None]


@dataclass
class Settings:
    """How many images there are and how much they vary.

    Args:
        train_ids: persons of the training set.
        train_images: images of each of them.
        glint_ids: labelled persons of the image test.
        glint_images: images of each of them.
        distractors: further persons of the image test, one image each, without label.
        video_ids: persons of the video test.
        videos: of each person.
        frames: of a video.
        degraded: probability that a frame of a video is degraded.
        least_level: degraded frames have a level uniform between this and 1.
        fold_pairs: pairs of one person in a fold, and as many of two persons.
        strength: of the changes of pose, expression and light between images of one person.
    """

    train_ids: int = 500
    train_images: int = 30
    glint_ids: int = 150
    glint_images: int = 12
    distractors: int = 2000
    video_ids: int = 120
    videos: int = 4
    frames: int = 5
    degraded: float = 0.5
    least_level: float = 0.5
    fold_pairs: int = 30
    strength: float = 1.0

    def __post_init__(self) -> None:
        least = {"train_ids": 2, "glint_ids": 2, "glint_images": 2, "distractors": 0}
        for name in ("train_images", "video_ids", "videos", "frames", "fold_pairs"):
            least[name] = 2 if name in ("video_ids", "videos") else 1
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise InputError(name, f"must be at least {bound}", getattr(self, name))
        for name in ("degraded", "least_level", "strength"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(name, "must be in [0, 1]", getattr(self, name))

    @property
    def total(self) -> int:
        """Faces to draw."""
        test = self.glint_ids * self.glint_images + self.distractors
        video = self.video_ids * self.videos * self.frames
        return self.train_ids * self.train_images + test + video + 4 * FOLDS * self.fold_pairs


def generate(out: Path | str, seed: int = 0, **changes: Any) -> Path:
    """Write the data set for `seed` to `out`, or leave a complete equal one as it is.

    The set is built beside `out` and renamed at the end. A set with the same settings that lost
    some of its files is made anew. `changes` are fields of `Settings`.

    Returns:
        `out`.

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
        (work / "synthetic.json").write_text(json.dumps(wanted | _inventory(work), indent=1))
        if not _complete(out, wanted):
            shutil.rmtree(out, ignore_errors=True)
        with contextlib.suppress(OSError):  # another process may have finished first
            os.replace(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if not _complete(out, wanted):
        raise InputError(out, "data set could not be moved into place")
    return out


def _inventory(root: Path) -> dict[str, int]:
    """Number and bytes of the files of the set; caches beside them are not counted."""
    sizes = [path.stat().st_size for path in root.rglob("*") if path.suffix in SUFFIXES]
    return {"files": len(sizes), "bytes": sum(sizes)}


def _complete(out: Path, wanted: dict[str, Any]) -> bool:
    """Whether `out` holds exactly this set; False for an absent, empty or damaged one."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / "synthetic.json").read_text())
        inventory = {name: found.pop(name) for name in ("files", "bytes")}
    except (OSError, ValueError, KeyError) as error:
        raise InputError(out, "exists and holds no complete synthetic data set") from error
    different = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
    if different:
        what = "holds a data set with other parameters (use another folder)"
        pairs = ", ".join(f"{key}={found.get(key)} not {wanted.get(key)}" for key in different)
        raise InputError(out, what, pairs)
    return _inventory(out) == inventory and (out / "property").is_file()


def _write(root: Path, seed: int, settings: Settings) -> None:
    with progress() as bar:
        task = bar.add_task("synthetic faces", total=settings.total)

        def tick() -> None:
            bar.advance(task)

        _write_train(root, seed, settings, tick)
        _write_pairs(root, seed, settings, tick)
        _write_glint(root / "glint_syn", seed, settings, tick)
        _write_videos(root, seed, settings, tick)


def person(seed: int, part: int, number: int) -> Identity:
    """The `number`-th person of a part."""
    return Identity.draw(np.random.default_rng([seed, part, PERSON, number]))


def picture(
    seed: int, part: int, number: int, image: int, strength: float, *, face: Identity | None = None
) -> np.ndarray:
    """The `image`-th undegraded image, uint8 (SIDE, SIDE, 3) RGB, of a person of a part."""
    face = person(seed, part, number) if face is None else face
    rng = np.random.default_rng([seed, part, POSE, number, image])
    return render(face, Pose.draw(rng, strength))


def encode(image_HWC: np.ndarray) -> bytes:
    """JPEG of an RGB image."""
    import cv2

    bgr_HWC = cv2.cvtColor(image_HWC, cv2.COLOR_RGB2BGR)
    _, code = cv2.imencode(".jpg", bgr_HWC, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return code.tobytes()


def _pictures(
    seed: int, part: int, ids: int, images: int, strength: float, tick: Tick
) -> Iterator[tuple[int, int, bytes]]:
    """(person, image, JPEG) of all images of a part, person by person."""
    for number in range(ids):
        face = person(seed, part, number)
        for image in range(images):
            yield number, image, encode(picture(seed, part, number, image, strength, face=face))
            tick()


def _write_train(root: Path, seed: int, settings: Settings, tick: Tick) -> None:
    """Key 0 says where the images end; behind them every person has the range of its keys."""
    ids, images = settings.train_ids, settings.train_images
    end = 1 + ids * images
    with RecordWriter(root / "train") as writer:
        writer.write(0, pack([end, end + ids], id2=1))
        rows = _pictures(seed, TRAIN, ids, images, settings.strength, tick)
        for key, (number, _, code) in enumerate(rows, start=1):
            writer.write(key, pack(number, code, id=key))
        for number in range(ids):
            first = 1 + number * images
            writer.write(end + number, pack([first, first + images], id=end + number))
    (root / "property").write_text(f"{ids},{SIDE},{SIDE}\n")


def _write_pairs(root: Path, seed: int, settings: Settings, tick: Tick) -> None:
    """Fold by fold, first the pairs of one person, then those of two."""
    codes: list[bytes] = []
    same: list[bool] = []
    for pair in range(2 * FOLDS * settings.fold_pairs):
        is_same = pair // settings.fold_pairs % 2 == 0
        for side in (0, 1):
            number = 2 * pair + (0 if is_same else side)
            codes.append(encode(picture(seed, PAIR, number, side, settings.strength)))
            tick()
        same.append(is_same)
    write_bin(root / "syn.bin", codes, same)


def _write_glint(root: Path, seed: int, settings: Settings, tick: Tick) -> None:
    names: list[str] = []
    labels: list[int] = []
    parts = ((GLINT, settings.glint_ids, settings.glint_images),
             (DISTRACTOR, settings.distractors, 1))  # fmt: skip
    for part, ids, images in parts:
        for number, image, code in _pictures(seed, part, ids, images, settings.strength, tick):
            folder = f"images/{number:04d}" if part == GLINT else f"images/d{number // 100:03d}"
            name = f"{folder}/{image if part == GLINT else number}.jpg"
            _save(root / name, code)
            names.append(name)
            labels.append(number if part == GLINT else -1)
    _lines(root / "filelist.txt", names)
    _lines(root / "labels.txt", labels)


def _write_videos(root: Path, seed: int, settings: Settings, tick: Tick) -> None:
    names: list[str] = []
    labels: list[int] = []
    quality: list[str] = []
    for number in range(settings.video_ids):
        face = person(seed, VIDEO, number)
        for video in range(settings.videos):
            name = f"video_{number:04d}_{video}"
            names.append(name)
            labels.append(number)
            for frame in range(settings.frames):
                image = video * settings.frames + frame
                clean = picture(seed, VIDEO, number, image, settings.strength, face=face)
                rng = np.random.default_rng([seed, VIDEO, DAMAGE, number, image])
                level = rng.uniform(settings.least_level, 1.0)
                level = level if rng.random() < settings.degraded else 0.0
                _save(root / "iqiyi_clean" / name / f"{frame}.jpg", encode(clean))
                bad = degrade(clean, level, rng)
                _save(root / "iqiyi_syn" / name / f"{frame}.jpg", encode(bad))
                quality.append(f"{name}/{frame}.jpg {1 - level:.4f}")
                tick()
    for folder in (root / "iqiyi_syn", root / "iqiyi_clean"):
        _lines(folder / "filelist.txt", names)
        _lines(folder / "labels.txt", labels)
    _lines(root / "iqiyi_syn" / "quality.txt", quality)


def _save(path: Path, code: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(code)


def _lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(f"{row}\n" for row in rows))


def load_synthetic(
    root: Path | str, seed: int = 0, noise: float = 0.0, noise_seed: int = 0, **changes: Any
) -> FaceData:
    """Generate the data set unless it is there, then load its training part.

    Among several ranks the main one generates.

    Args:
        root: folder of the set.
        seed: of the images.
        noise: fraction of the training images that get a uniformly random class.
        noise_seed: chooses them.
        changes: fields of `Settings`.

    Raises:
        InputError: as for `generate` and `load_rec`.
    """
    with main_first():
        generate(root, seed, **changes)
    return replace(load_rec(root, noise=noise, noise_seed=noise_seed), name="synthetic")


@dataclass
class SyntheticConfig(Settings):
    """Schema of configs/synthetic.yaml."""

    out: Path = MISSING
    seed: int = 0


ConfigStore.instance().store("lfr_synthetic_schema", SyntheticConfig)


@hydra.main(version_base=None, config_path="../configs", config_name="synthetic")
def main(cfg: DictConfig) -> None:
    setup_logging(rank=0)
    values: dict[str, Any] = {str(key): value for key, value in cfg.items()}
    generate(**values)


if __name__ == "__main__":
    exit_on_bad_input(main)
