"""Synthetic sets in the on-disk formats of the real ones, made from a seed.

    python -m detection_tsd.data.synthetic out=DIR seed=0 kind=glyphs

writes one of

* `glyphs`: the scenes of `glyphs.py` in the layout of COCO: `train/*.png`, `val/*.png`,
  `annotations/instances_{train,val}.json`, and `proposals_{train,val}.npz`, which holds an array
  float32 (M, 4) for every image, by its id;
* `digits`: the same with handwritten digits as glyphs (`digits.py`);
* `coco`: a small copy of the layout and the oddities of COCO 2017 (`coco_replica.py`);
* `openimages`: the same of Open Images Challenge 2019, in both of its formats (`oid_replica.py`);
* `hierarchy`: scenes with a long tail of classes in a hierarchy (`hierarchy_scenes.py`), in the
  format of Open Images.

`synthetic.json` says what a set was made with. Every image is a function of the seed, its split
and its number: a larger set contains the smaller one.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import numpy as np
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from common.dist import main_first
from common.log import InputError, exit_on_bad_input, get_logger, progress, setup_logging
from detection_tsd.data.coco import load_coco
from detection_tsd.data.coco_replica import make_coco_replica
from detection_tsd.data.detection_data import DetectionData
from detection_tsd.data.digits import digit_marks
from detection_tsd.data.glyphs import TRAIN, VAL, Law, Marks, Scene, draw_scene, glyph_marks
from detection_tsd.data.hierarchy_scenes import load_hierarchy, write_hierarchy
from detection_tsd.data.oid_replica import make_oid_replica
from detection_tsd.data.openimages import load_openimages

SPLITS = ("train", "val")
POINTS = 32  # of the outline of an ellipse
DONE = "synthetic.json"
OPTIONS = ("val_seed", "side", "centred", "jitter")


@dataclass
class Settings:
    """What a set is made with.

    Args:
        seed: of the training images.
        val_seed: of the validation images, when it is not the same; splits never share images
            (glyphs, digits and hierarchy).
        kind: glyphs, digits, coco, openimages or hierarchy.
        train: training images; None is what is usual for the kind.
        val: validation images; None is what is usual for the kind.
        side: of the square images of glyphs, digits and hierarchy, pixels.
        centred: glyphs in the middle of their objects (glyphs and digits).
        jitter: of the proposals, see `Law` (glyphs and digits).
    """

    seed: int = 0
    val_seed: int | None = None
    kind: str = "glyphs"
    train: int | None = None
    val: int | None = None
    side: int = 96
    centred: bool = False
    jitter: float = 0.3

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError("kind", f"must be one of {', '.join(KINDS)}", self.kind)
        for name in ("seed", "val_seed"):
            if (getattr(self, name) or 0) < 0:
                raise InputError(name, "must be at least 0", getattr(self, name))
        self.train = KINDS[self.kind].train if self.train is None else self.train
        self.val = KINDS[self.kind].val if self.val is None else self.val
        for name in SPLITS:
            if getattr(self, name) < 1:
                raise InputError(name, "must be at least 1 image", getattr(self, name))
        for name in OPTIONS:
            usual = type(self).__dataclass_fields__[name].default
            if name not in KINDS[self.kind].options and getattr(self, name) != usual:
                what = f"means nothing for a set of kind {self.kind}"
                raise InputError(name, what, getattr(self, name))
        Law(self.side, self.centred, self.jitter)  # refuses what cannot be drawn

    def seed_of(self, split: int) -> int:
        """Seed of a split."""
        return self.val_seed if split == VAL and self.val_seed is not None else self.seed


class Kind(NamedTuple):
    """How a kind of set is written and read, and how many images it usually has.

    `load` takes the root, the split, and whether to read outlines; `options` are the settings
    that mean something for the kind and not for all.
    """

    write: Callable[[Path, Settings], object]
    load: Callable[[Path, str, bool], DetectionData]
    train: int
    val: int
    options: tuple[str, ...]


def generate(out: Path | str, **changes: Any) -> Path:
    """Write a set to `out`, or leave a complete equal one as it is.

    The set is built beside `out` and renamed at the end. A set with the same settings that lost
    some of its files is made anew.

    Args:
        out: folder of the set.
        changes: fields of `Settings`.

    Returns:
        `out`.

    Raises:
        InputError: a bad setting; or `out` holds a set with other settings, or something else.
    """
    out, settings = Path(out), Settings(**changes)
    wanted = asdict(settings)
    if _complete(out, wanted):
        get_logger(__name__).info("%s: complete, nothing generated", out)
        return out
    work = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        KINDS[settings.kind].write(work, settings)
        files = {str(p.relative_to(work)): p.stat().st_size for p in work.rglob("*") if p.is_file()}
        (work / DONE).write_text(json.dumps(wanted | {"files": files}, indent=1, sort_keys=True))
        if not _complete(out, wanted):
            shutil.rmtree(out, ignore_errors=True)
        with contextlib.suppress(OSError):  # another process may have finished first
            os.replace(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if not _complete(out, wanted):
        raise InputError(out, "data set could not be moved into place")
    return out


def write_glyphs(root: Path | str, seed: int = 0, **changes: Any) -> Path:
    """`generate` for the glyph scenes."""
    return generate(root, kind="glyphs", seed=seed, **changes)


def load_synthetic(
    root: Path | str, split: str = "train", masks: bool = False, **changes: Any
) -> DetectionData:
    """Generate a set unless it is there, then load a split of it; glyphs with their proposals.

    Among several ranks the main one generates.

    Args:
        root: folder of the set.
        split: train or val.
        masks: read the outlines of the objects as well; only glyphs, digits and coco have some.
        changes: fields of `Settings`.

    Raises:
        InputError: as for `generate`; there is no such split, or no outline.
    """
    if split not in SPLITS:
        raise InputError("split", f"must be one of {', '.join(SPLITS)}", split)
    with main_first():
        generate(root, **changes)
    return KINDS[Settings(**changes).kind].load(Path(root), split, masks)


def _complete(out: Path, wanted: dict[str, Any]) -> bool:
    """Whether `out` holds exactly this set; False for an absent, empty or damaged one."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / DONE).read_text())
        files: dict[str, int] = found.pop("files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(out, "exists and holds no complete synthetic data set") from error
    different = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
    if different:
        what = "holds a data set with other parameters (use another folder)"
        pairs = ", ".join(f"{key}={found.get(key)} not {wanted.get(key)}" for key in different)
        raise InputError(out, what, pairs)
    try:
        return all((out / name).stat().st_size == size for name, size in files.items())
    except OSError:
        return False


def _write_scenes(root: Path, settings: Settings, marks: Callable[[int], Marks]) -> None:
    """Both splits of a set of glyph scenes; `marks` gives those of a split."""
    law = Law(settings.side, settings.centred, settings.jitter)
    (root / "annotations").mkdir()
    with progress() as bar:
        counts = (settings.train or 0, settings.val or 0)
        task = bar.add_task(f"{settings.kind} scenes", total=sum(counts))
        for split, count in enumerate(counts):
            images: list[dict[str, Any]] = []
            annotations: list[dict[str, Any]] = []
            proposals: dict[str, np.ndarray] = {}
            (root / SPLITS[split]).mkdir()
            drawn = marks(split)
            for number in range(count):
                scene = draw_scene(drawn, law, settings.seed_of(split), split, number)
                image = _save_image(root / SPLITS[split], scene.image_HW3, number + 1)
                images.append(image)
                annotations += _annotations(scene, drawn, image["id"], len(annotations) + 1)
                proposals[str(image["id"])] = scene.proposal_M4
                bar.advance(task)
            _write_split(root, SPLITS[split], drawn, images, annotations, proposals)


def _write_split(
    root: Path,
    name: str,
    marks: Marks,
    images: list[dict[str, Any]],
    annotations: list[dict[str, Any]],
    proposals: dict[str, np.ndarray],
) -> None:
    pairs = zip(marks.class_ids, marks.classes, strict=True)
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in pairs],
    }
    (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))
    np.savez(root / f"proposals_{name}.npz", allow_pickle=False, **proposals)


def _save_image(folder: Path, image_HW3: np.ndarray, number: int) -> dict[str, Any]:
    """Write the PNG; returns its entry in the annotation file."""
    import cv2

    name = f"{number:06d}.png"
    if not cv2.imwrite(str(folder / name), image_HW3[..., ::-1]):
        raise InputError(folder / name, "cannot be written")
    height, width = image_HW3.shape[:2]
    return {"id": number, "file_name": name, "height": height, "width": width}


def _annotations(scene: Scene, marks: Marks, image_id: int, first_id: int) -> list[dict[str, Any]]:
    """Entries of the objects of a scene; `glyph` is the centre of the glyph, for pictures."""
    rows = zip(scene.box_G4, scene.label_G, scene.ellipse_G, scene.mark_G2, strict=True)
    found = []
    for number, (box, label, ellipse, mark) in enumerate(rows, start=first_id):
        x1, y1, x2, y2 = (float(value) for value in box)
        width, height = x2 - x1, y2 - y1
        found.append(
            {
                "id": number,
                "image_id": image_id,
                "category_id": marks.class_ids[int(label) - 1],
                "bbox": [round(value, 3) for value in (x1, y1, width, height)],
                "area": round(width * height * (np.pi / 4 if ellipse else 1.0), 3),
                "iscrowd": 0,
                "segmentation": [_outline(x1, y1, width, height, bool(ellipse))],
                "glyph": [float(value) for value in mark],
            }
        )
    return found


def _outline(x: float, y: float, width: float, height: float, ellipse: bool) -> list[float]:
    """Polygon x1, y1, x2, y2, ... of a body."""
    angle_P = np.arange(POINTS) * (2 * np.pi / POINTS)
    corner_P2 = np.array([[0.0, 0], [1, 0], [1, 1], [0, 1]])
    round_P2 = 0.5 + 0.5 * np.stack([np.cos(angle_P), np.sin(angle_P)], axis=1)
    point_P2 = (round_P2 if ellipse else corner_P2) * (width, height) + (x, y)
    return [round(float(value), 2) for value in point_P2.ravel()]


def _load_scenes(root: Path, split: str, masks: bool) -> DetectionData:
    return load_coco(root, split, masks=masks, proposals=f"proposals_{split}.npz")


def _load_openimages(root: Path, split: str, masks: bool) -> DetectionData:
    _refuse_masks(masks, "openimages")
    return load_openimages(root, split)


def _load_hierarchy(root: Path, split: str, masks: bool) -> DetectionData:
    _refuse_masks(masks, "hierarchy")
    return load_hierarchy(root, split)


def _refuse_masks(masks: bool, kind: str) -> None:
    if masks:
        raise InputError("masks", "there are no outlines in a set of kind", kind)


KINDS: dict[str, Kind] = {
    "glyphs": Kind(
        lambda root, made: _write_scenes(root, made, lambda split: glyph_marks()),
        _load_scenes, 1200, 250, ("val_seed", "side", "centred", "jitter"),
    ),
    "digits": Kind(
        lambda root, made: _write_scenes(root, made, digit_marks),
        _load_scenes, 1200, 250, ("val_seed", "side", "centred", "jitter"),
    ),
    "coco": Kind(
        lambda root, made: make_coco_replica(root, made.train or 0, made.seed, made.val),
        lambda root, split, masks: load_coco(root, f"{split}2017", masks=masks), 24, 12, (),
    ),
    "openimages": Kind(
        lambda root, made: make_oid_replica(root, made.train or 0, made.seed, made.val),
        _load_openimages, 24, 12, (),
    ),
    "hierarchy": Kind(
        lambda root, made: write_hierarchy(
            root,
            (made.train or 0, made.val or 0),
            (made.seed_of(TRAIN), made.seed_of(VAL)),
            made.side,
        ),
        _load_hierarchy, 1200, 250, ("val_seed", "side"),
    ),
}  # fmt: skip


@dataclass
class SyntheticConfig(Settings):
    """Schema of configs/synthetic.yaml."""

    out: Path = MISSING


ConfigStore.instance().store("tsd_synthetic_schema", SyntheticConfig)


@hydra.main(version_base=None, config_path="../configs", config_name="synthetic")
def main(cfg: DictConfig) -> None:
    setup_logging(rank=0)
    values: dict[str, Any] = {str(key): value for key, value in cfg.items()}
    generate(**values)


if __name__ == "__main__":
    exit_on_bad_input(main)
