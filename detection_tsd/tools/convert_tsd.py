"""Checkpoints of Sense-X/TSD, and of mmdetection v1, -> a release file of this package.

    python -m detection_tsd.tools.convert_tsd checkpoint=FILE out=tsd_r50.safetensors
    python -m detection_tsd.tools.convert_tsd checkpoint=FILE out=FILE row=openimages/tsd_r50 \
        classes=challenge2019/cls-label-description.csv

Faster, Mask and Cascade R-CNN with TSD's head or the two-layer head, on ResNet or ResNeXt with or
without deformable convolutions. Without `row` the detector is read off the shapes; with it, the
checkpoint must be that experiment's.

The weights were trained on inclusive pixels, another RoIAlign and another deformable pooling than
this package's default: the release says so (plus=1, pooling=mmdet_v1, sampler=legacy, anchors of
rpn=mmdet_v1, a cascade refines boxes of any class). Order of the classes, background at 0 and the
normalisation (RGB, 0 to 255) are the same here. The file can be evaluated (`checkpoint=FILE`) and
trained from (`init=FILE`).
"""

from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from common.log import InputError, exit_on_bad_input, get_logger, setup_logging
from detection_tsd.rows import CONFIGS
from detection_tsd.tools.checkpoints import read_checkpoint
from detection_tsd.tools.class_names import name_classes
from detection_tsd.tools.key_maps import rename
from detection_tsd.tools.structure import (
    Structure,
    compose_model,
    fit,
    read_structure,
    save_release,
    state_on_meta,
)


@dataclass
class ConvertTSDConfig:
    """Schema of configs/convert_tsd.yaml."""

    checkpoint: str = MISSING
    out: str = MISSING
    row: str | None = None  # experiment, tsd_r50 stands for coco/tsd_r50; null: read off the shapes
    classes: str | None = None  # lines `identifier,name[,label]`; null: the checkpoint's, or COCO's
    train_set: str | None = None  # what it was trained on; null: told by the number of classes


ConfigStore.instance().store("tsd_convert_schema", ConvertTSDConfig)

TRAIN_SETS = {80: "coco/train2017", 500: "OpenImages/train"}
# Test size of the Open Images configurations of Sense-X/TSD; COCO's is the default.
TRANSFORMS = {500: "transform=openimages_1024"}


def compose_tsd(structure: Structure, row: str | None = None) -> DictConfig:
    """The training configuration of a published detector, in its own conventions.

    Args:
        structure: of the checkpoint.
        row: an experiment, with or without its folder; None for the structure alone.

    Raises:
        InputError: there is no such experiment.
    """
    if row is None:
        transform = TRANSFORMS.get(structure.num_classes, "transform=coco_800")
        words, where = [*structure.overrides(), transform], "checkpoint"
    else:
        words, where = [f"experiment={_experiment(row)}"], f"row={row}"
    cfg = compose_model([*words, "rpn=mmdet_v1", f"num_classes={structure.num_classes}"], where)
    as_mmdet_v1(cfg)
    return cfg


def as_mmdet_v1(cfg: DictConfig) -> None:
    """Set what mmdetection v1 and Sense-X/TSD do and no shape shows; `rpn` is set already."""
    OmegaConf.set_struct(cfg, False)
    cfg.head.pooling, cfg.head.plus, cfg.model.plus = "mmdet_v1", 1.0, 1.0
    tsd = "sampler" in cfg.head
    if tsd:
        cfg.head.sampler, cfg.head.margin_cls, cfg.head.margin_box = "legacy", 0.3, 0.3
    if "heads" in cfg.model:
        cfg.model.refine_class = "any"
        cfg.model.stage_weights = [1.0, 1.0, 1.0] if tsd else [1.0, 0.5, 0.25]
    if cfg.model.mask is not None:
        cfg.model.mask.pooling, cfg.model.mask.plus = "mmdet_v1", 1.0


def _experiment(row: str) -> str:
    folder = CONFIGS / "experiment"
    rows = sorted(
        str(path.relative_to(folder).with_suffix(""))
        for path in folder.rglob("*.yaml")
        if path.parent.name in ("coco", "openimages")
    )
    name = row if "/" in row else f"coco/{row}"
    if name not in rows:
        raise InputError("row", f"is not there, only {', '.join(rows)}", row)
    return name


def convert(cfg: ConvertTSDConfig) -> Path:
    """Write the release file `cfg.out` and return its path.

    Raises:
        InputError: a file that cannot be read, weights that are not those of the detector (every
            name is listed), names of the classes that are too many or too few.
    """
    where = Path(cfg.checkpoint)
    published, meta = read_checkpoint(where)
    ours = rename(published, "mmdet_v1")
    structure = read_structure({new: published[old] for old, new in ours.items()}, where)
    count = structure.num_classes
    classes = name_classes(count, cfg.classes, meta)
    model = compose_tsd(structure, cfg.row)
    state = fit(published, ours, state_on_meta(model), where)
    facts = {
        "train_set": cfg.train_set or TRAIN_SETS.get(count, "not known"),
        "num_classes": count,
        "classes": list(classes.names),
        "class_ids": list(classes.ids),
        "seed": None,  # not known
    }
    out = save_release(state, model, facts, Path(cfg.out))
    get_logger(__name__).info("%s: %d tensors, %s", out, len(state), structure)
    return out


@hydra.main(version_base=None, config_path="../configs", config_name="convert_tsd")
def main(cfg: DictConfig) -> None:
    setup_logging(0)
    convert(cfg)  # type: ignore[arg-type]


if __name__ == "__main__":
    exit_on_bad_input(main)
