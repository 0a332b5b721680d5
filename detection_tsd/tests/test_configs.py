"""Every configuration composes, names what exists, builds, and trains for a step."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.errors import ConfigCompositionException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from detection_tsd.data.detection_data import Batch, Target
from detection_tsd.engine import train_step
from detection_tsd.tests.launch import CONFIGS, config

NODES = ("model", "transform", "optim", "schedule")
GROUPS = (
    "data", "backbone", "rpn", "head", "sampler", "post", "model", "transform", "optim", "schedule",
)  # fmt: skip
EXPERIMENTS = sorted(
    str(path.relative_to(CONFIGS / "experiment").with_suffix(""))
    for path in (CONFIGS / "experiment").rglob("*.yaml")
)
# Choices no experiment makes, with the command line that makes them.
EXTRA = {
    "backbone/r50_dcn": ("experiment=coco/tsd_r50", "backbone=r50_dcn"),
    "backbone/senet154": ("experiment=coco/tsd_r50", "backbone=senet154"),
    "data/coco_test_dev": ("experiment=coco/tsd_r50", "data=coco_test_dev"),
    "data/digits": ("experiment=synth/tsd", "data=digits", "num_classes=10"),
    "data/glyphs_centred": ("experiment=synth/tsd", "data=glyphs_centred"),
    "model/cascade_mask": ("experiment=coco/cascade_tsd_r50", "model=cascade_mask"),
    "post/adjusted": ("experiment=coco/tsd_r50", "post=adjusted"),
    "rpn/mmdet_v1": ("experiment=coco/sibling_r50", "rpn=mmdet_v1", "model.plus=1", "head.plus=1"),
    "rpn/torchvision": ("experiment=coco/sibling_r50", "rpn=torchvision"),
}
LINES = [(f"experiment={name}",) for name in EXPERIMENTS] + [*EXTRA.values()]


@cache
def composed(words: tuple[str, ...]) -> DictConfig:
    return config("train", *words, return_hydra_config=True)


def resolved(words: tuple[str, ...]) -> DictConfig:
    """The nodes of a row, each as it is built."""
    cfg = OmegaConf.create(OmegaConf.to_container(composed(words), resolve=False))
    keys = [*GROUPS[1:], "seed", "num_classes"]
    return OmegaConf.create(OmegaConf.to_container(OmegaConf.masked_copy(cfg, keys), resolve=True))


def chosen(words: tuple[str, ...]) -> set[str]:
    """Config files a command line uses, without suffix."""
    choices = composed(words).hydra.runtime.choices.items()
    return {f"{group}/{option}" for group, option in choices if group in GROUPS and option}


def targets(node: Any) -> list[str]:
    if isinstance(node, dict):
        own = [node["_target_"]] if "_target_" in node else []
        return own + [name for value in node.values() for name in targets(value)]
    return [name for value in node for name in targets(value)] if isinstance(node, list) else []


def files(*groups: str) -> set[str]:
    paths = [path for group in groups for path in (CONFIGS / group).rglob("*.yaml")]
    return {str(path.relative_to(CONFIGS).with_suffix("")) for path in paths}


@pytest.mark.parametrize("words", LINES, ids=" ".join)
def test_a_command_line_composes(words: tuple[str, ...]) -> None:
    cfg = composed(words)
    plain = OmegaConf.to_container(resolved(words))
    assert len(targets([plain[name] for name in NODES])) >= 7  # backbone, head, ... are inside
    assert (cfg.steps is None) != (cfg.epochs is None)
    assert cfg.run_dir.startswith("runs/tsd/")


def test_every_run_has_a_folder_of_its_own() -> None:
    folders = [composed((f"experiment={name}",)).run_dir for name in EXPERIMENTS]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: str(p.relative_to(CONFIGS))
)
def test_every_target_is_there(path: Path) -> None:
    for name in targets(OmegaConf.to_container(OmegaConf.load(path), resolve=False)):
        assert callable(get_object(name)), name


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_header_says_how_to_run_it(name: str) -> None:
    lines = (CONFIGS / "experiment" / f"{name}.yaml").read_text().splitlines()
    header = [line for line in lines[:8] if line.startswith("#")]
    assert header[0] == "# @package _global_"
    (command,) = [line for line in header if "make train-tsd" in line]
    assert re.search(rf'ARGS="experiment={re.escape(name)}[ "]', command)
    assert len(header) >= 3  # what the row is comes first
    assert all(len(line) <= 120 for line in header)


def test_no_configuration_is_left_alone() -> None:
    used = set().union(*(chosen(words) for words in LINES))
    assert files(*GROUPS) == used | {"transform/small"} & files("transform")
    plain = set().union(*(chosen((f"experiment={name}",)) for name in EXPERIMENTS))
    assert not plain & EXTRA.keys()  # otherwise it needs no entry


@pytest.mark.parametrize(
    ("file", "words", "key"),
    [
        ("train", ["stepz=3"], "stepz"),
        ("train", ["experiment=coco/tsd_r50", "log_evry=3"], "log_evry"),
        ("train", ["data.rooot=a"], "rooot"),
        ("train", ["head.margin=1"], "margin"),
        ("train", ["experiment=coco/nothing"], "experiment/coco/nothing"),
        ("eval", ["viewz=[]"], "viewz"),
    ],
)
def test_a_misspelt_key_is_named(file: str, words: list[str], key: str) -> None:
    with pytest.raises(ConfigCompositionException) as caught:
        config(file, *words)
    assert key in f"{caught.value} {caught.value.__cause__}"


# Every row takes a step at reduced size: shallow backbones, narrow heads, few regions.
CLASSES = 3
SHALLOW: dict[str, dict[str, Any]] = {
    "ResNetFPN": {"layers": [1, 1, 1, 1], "channels": 32},
    "SplitResNetFPN": {"layers": [1, 1, 1, 1], "channels": 32},
    "SENet154FPN": {"layers": [1, 1, 1, 1], "channels": 32},
    "MobileNetV2FPN": {"channels": 32},
    "TinyFPN": {},
}
FEW = {"pre_train": 100, "post_train": 30, "count": 32}


def shrink(node: Any) -> None:
    """Narrow every part of a model node, in place."""
    if isinstance(node, list):
        for item in node:
            shrink(item)
    if not isinstance(node, dict):
        return
    name = str(node.get("_target_", "")).rpartition(".")[2]
    node.update(SHALLOW.get(name, {}))
    if name == "RPN":
        node.update(FEW, channels=32)
    if name == "RoISampler":
        node["count"] = 16
    if name == "MaskBranch":
        node.update(channels=32, layers=[16])
    if name.endswith("Head"):
        node.update(channels=32, num_classes=CLASSES)
        node.update({key: 16 for key in ("width", "offset_width") if key in node})
    for value in node.values():
        shrink(value)


def small(words: tuple[str, ...]) -> dict[str, Any]:
    plain: Any = OmegaConf.to_container(resolved(words))
    shrink(plain["model"])
    return {name: plain[name] for name in NODES}


def shape(words: tuple[str, ...]) -> str:
    """What decides the computation of a reduced row, so that equal rows run once."""
    node = small(words)
    return str((node["model"], node["optim"]["_target_"], node["schedule"]["_target_"]))


DIFFERENT = list({shape(words): words for words in reversed(LINES)}.values())[::-1]


def batch(masks: bool) -> Batch:
    """Two small images: one with two objects, one with none; and fixed proposals."""
    side = 128
    image = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    box = torch.tensor([[10.0, 12.0, 70.0, 66.0], [60.0, 50.0, 120.0, 118.0]])
    mask = torch.zeros(2, side, side, dtype=torch.uint8) if masks else None
    if mask is not None:
        mask[0, 20:60, 15:65], mask[1, 55:110, 65:110] = 1, 1
    none = None if mask is None else mask[:0]
    full = Target(box, torch.tensor([1, CLASSES]), torch.zeros(0, 4), mask)
    empty = Target(box[:0], full.label_G[:0], torch.zeros(0, 4), none)
    near = torch.cat([box, box + 3.0, box.flip(0) - 5.0, torch.tensor([[1.0, 1.0, 30.0, 40.0]])])
    number, size = torch.arange(2), torch.full((2, 2), side)
    return Batch(image, size, [full, empty], [near, near], number, number, torch.ones(2, 2), size)


@pytest.mark.slow
@pytest.mark.parametrize("words", DIFFERENT, ids=" ".join)
def test_a_row_takes_a_step(words: tuple[str, ...]) -> None:
    cfg = small(words)
    torch.manual_seed(0)
    transform, model = instantiate(cfg["transform"]), instantiate(cfg["model"]).train()
    optimizer = instantiate(cfg["optim"])(model)
    schedule = instantiate(cfg["schedule"])(optimizer, 10)
    item = batch(masks=model.mask is not None)
    loss, parts = train_step(model, item, transform, torch.device("cpu"))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(part) for part in parts.values())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step()
    schedule.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert any(name.startswith("backbone.") for name in moved)
    assert any(name.startswith(("head.", "heads.")) for name in moved)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert not moved & frozen
    with torch.inference_mode():
        found = model.eval()(
            transform.normalize(item.image_B3HW, item.size_B2),
            item.size_B2,
            proposals=item.proposals,
        )
    assert len(found) == 2
    for one in found:
        assert len(one.box_D4) <= 100
        assert ((one.label_D >= 1) & (one.label_D <= CLASSES)).all()
