"""Detectors of torchvision -> a release file of this package.

    python -m detection_tsd.tools.convert_torchvision \
        checkpoint=fasterrcnn_resnet50_fpn_coco-258fb6c6.pth out=faster_r50.safetensors

State dicts of `fasterrcnn_resnet50_fpn` and `maskrcnn_resnet50_fpn`, published or trained with
torchvision's reference scripts, become the two-layer head with pooling=torchvision, anchors and
proposals of rpn=torchvision and a score threshold of 0.05.

Classes: torchvision has a label for each COCO category id, 1..90, although ten of these ids do not
exist. `absent=drop` (the default) leaves out their rows, so that label k is the k-th category, as
this package's COCO loader has it: such a release can be evaluated on COCO. Softmax then runs over
81 instead of 91 scores; as the ten were never seen, theirs are small, and so is the difference.
`absent=keep` keeps the 90 labels, which then equal the category ids, and all scores.

Norms: torchvision runs the published COCO weights with an epsilon of 0 in its frozen norms, ours
have 1e-5. The difference is folded into their scale, with the same result.

Two differences stay: pictures are resized with OpenCV here, and torchvision derives the stride of
a map from its size, so that its coarsest anchors lie elsewhere where a side of the input is no
multiple of 64.
"""

from dataclasses import dataclass
from pathlib import Path

import hydra
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig
from torch import Tensor

from common.log import InputError, exit_on_bad_input, get_logger, setup_logging
from detection_tsd.tools.checkpoints import read_checkpoint
from detection_tsd.tools.class_names import ClassNames, coco_categories, name_classes
from detection_tsd.tools.key_maps import rename
from detection_tsd.tools.structure import (
    Structure,
    compose_model,
    fit,
    read_structure,
    save_release,
    state_on_meta,
)

ABSENT = ("drop", "keep")
OUR_EPS = 1e-5
COCO_ROWS = 91  # the background and ids 1..90


@dataclass
class ConvertTorchvisionConfig:
    """Schema of configs/convert_torchvision.yaml."""

    checkpoint: str = MISSING
    out: str = MISSING
    absent: str = "drop"  # drop | keep: labels of the ten ids that COCO does not use
    norm_eps: float | None = None  # null: 0 of frozen norms, 1e-5 of norms that count batches
    classes: str | None = None  # lines `identifier,name[,label]`, of other classes than COCO's
    train_set: str | None = None  # null: coco/train2017 where the classes are COCO's


ConfigStore.instance().store("tsd_convert_torchvision_schema", ConvertTorchvisionConfig)


def compose_torchvision(structure: Structure, num_classes: int) -> DictConfig:
    """The training configuration of torchvision's detector, in its own conventions."""
    words = [*structure.overrides(), "rpn=torchvision", f"rpn.channels={structure.channels}"]
    words += ["head.pooling=torchvision", "post.score_threshold=0.05"]
    words += ["model.mask.pooling=torchvision"] if structure.mask else []
    return compose_model([*words, f"num_classes={num_classes}"], "checkpoint")


def with_our_eps(named: dict[str, Tensor], eps: float, where: Path) -> dict[str, Tensor]:
    """The tensors with scales of norms that give at 1e-5 what the given ones do at `eps`.

    Args:
        named: tensors by our names.
        eps: what the norms add to their variance.
        where: the file, for messages.

    Raises:
        InputError: `eps` is below 0, or with it a scale is no number.
    """
    if eps < 0:
        raise InputError("norm_eps", "must not be below 0", eps)
    changed = dict(named)
    for name, variance in named.items() if eps != OUR_EPS else ():
        norm, _, part = name.rpartition(".")
        if part != "running_var" or f"{norm}.weight" not in named:
            continue
        # As torchvision computes it: also variances below the normal numbers have their place.
        scale = named[f"{norm}.weight"] * (variance + eps).rsqrt() * (variance + OUR_EPS).sqrt()
        if not scale.isfinite().all():
            raise InputError(where, f"{norm} has a variance of 0, with norm_eps", eps)
        changed[f"{norm}.weight"] = scale
    return changed


def without_absent(named: dict[str, Tensor], structure: Structure) -> dict[str, Tensor]:
    """The tensors with 81 rows of the 91 of COCO's ids: the background and the 80 categories."""
    row = torch.tensor([0, *coco_categories()])
    changed = dict(named)
    for name, value in named.items():
        if name.startswith(("head.box_predictor.cls_score.", "mask.mask_predictor.mask_fcn_log")):
            changed[name] = value[row]
        elif name.startswith("head.box_predictor.bbox_pred."):
            changed[name] = value.unflatten(0, (structure.num_classes + 1, 4))[row].flatten(0, 1)
    return changed


def label_names(count: int, absent: str, path: str | None) -> ClassNames:
    """Names of the labels; of COCO's 90 ids the unused ones are called by their number."""
    if path is not None or count != COCO_ROWS - 1:
        return name_classes(count, path)
    coco = coco_categories()
    ids = tuple(coco) if absent == "drop" else tuple(range(1, COCO_ROWS))
    return ClassNames(tuple(coco.get(number, f"unused {number}") for number in ids), ids)


def convert(cfg: ConvertTorchvisionConfig) -> Path:
    """Write the release file `cfg.out` and return its path.

    Raises:
        InputError: a file that cannot be read, weights that are not those of such a detector
            (every name is listed), or a setting that does not exist.
    """
    if cfg.absent not in ABSENT:
        raise InputError("absent", f"must be one of {', '.join(ABSENT)}", cfg.absent)
    where = Path(cfg.checkpoint)
    published = read_checkpoint(where).tensors
    ours = rename(published, "torchvision")
    named = {new: published[old] for old, new in ours.items()}
    structure = read_structure(named, where)
    counts = any(name.endswith(".num_batches_tracked") for name in published)
    eps = cfg.norm_eps if cfg.norm_eps is not None else (OUR_EPS if counts else 0.0)
    named = with_our_eps(named, eps, where)
    of_coco = cfg.classes is None and structure.num_classes == COCO_ROWS - 1
    classes = label_names(structure.num_classes, cfg.absent, cfg.classes)
    if of_coco and cfg.absent == "drop":
        named = without_absent(named, structure)
    model = compose_torchvision(structure, len(classes.names))
    state = fit({old: named[new] for old, new in ours.items()}, ours, state_on_meta(model), where)
    facts = {
        "train_set": cfg.train_set or ("coco/train2017" if of_coco else "not known"),
        "num_classes": len(classes.names),
        "classes": list(classes.names),
        "class_ids": list(classes.ids),
        "seed": None,  # not known
    }
    out = save_release(state, model, facts, Path(cfg.out))
    get_logger(__name__).info("%s: %d tensors, %s", out, len(state), structure)
    return out


@hydra.main(version_base=None, config_path="../configs", config_name="convert_torchvision")
def main(cfg: DictConfig) -> None:
    setup_logging(0)
    convert(cfg)  # type: ignore[arg-type]


if __name__ == "__main__":
    exit_on_bad_input(main)
