"""Release files of small detectors with random weights, from the configurations of trainings."""

from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from detection_tsd.tests.launch import config
from detection_tsd.tests.small_detectors import liven
from detection_tsd.weights import write_release

CLASSES = ("plus", "cross", "T", "[L]", "ring", "bars")
CLASS_IDS = (1, 2, 3, 5, 8, 13)
FAST = ("++head.samples=1", "++head.shift_samples=1")  # a quarter of the graph
MASK = (
    "model.mask={_target_: detection_tsd.models.mask_branch.MaskBranch, num_classes: 6, "
    "channels: 32, layers: [16], size: 7, level_base: 18.0}"
)


def write(path: Path, *words: str) -> Path:
    """A release of what `words` compose, with livened output layers."""
    cfg = config("train", *words)
    node: Any = {
        key: OmegaConf.to_container(cfg[key], resolve=True) for key in ("model", "transform")
    }
    torch.manual_seed(0)
    model = instantiate(node["model"])
    liven(model)
    for layer in model.modules():  # statistics as after training
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(layer.running_mean, -0.3, 0.3)
            torch.nn.init.uniform_(layer.running_var, 0.5, 2.0)
    if model.mask is not None:
        torch.nn.init.normal_(model.mask.mask_predictor.mask_fcn_logits.weight)
    facts = {
        "train_set": "drawn", "num_classes": len(CLASSES), "classes": list(CLASSES),
        "class_ids": list(CLASS_IDS), "seed": 0,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    write_release(model.state_dict(), node | facts, 7, path)
    return path
