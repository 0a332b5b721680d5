"""Every configuration composes, names what exists, and trains for a step."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.errors import ConfigCompositionException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from face_lfr.data.clips import ClipItem
from face_lfr.engine import train_step
from face_lfr.tests.launch import CONFIGS, config

GROUPS = ("data", "model", "margin", "objective", "draws", "transform", "optim", "schedule")
EXPERIMENTS = sorted(
    str(path.relative_to(CONFIGS / "experiment").with_suffix(""))
    for path in (CONFIGS / "experiment").rglob("*.yaml")
)
SHARED = {"synth/base", "synth/base_quality"}  # no rows of their own
# Choices no experiment makes, with the command line that makes them.
EXTRA = {
    "data/folder": ("experiment=ms1mv3/ir50_arcface", "data=folder"),
    "data/list": ("experiment=ms1mv3/ir50_arcface", "data=list"),
    "data/ms1mv2": ("experiment=ms1mv3/ir50_arcface", "data=ms1mv2"),
    "model/polyface_base": ("experiment=deepglint/polyface_arcface", "model=polyface_base"),
}
LINES = [(f"experiment={name}",) for name in EXPERIMENTS if name not in SHARED] + [*EXTRA.values()]


@cache
def composed(words: tuple[str, ...]) -> DictConfig:
    return config("train", *words, return_hydra_config=True)


def chosen(words: tuple[str, ...]) -> set[str]:
    """Config files a command line uses, without suffix."""
    choices = composed(words).hydra.runtime.choices.items()
    return {f"{group}/{option}" for group, option in choices if group.split("/")[0] in GROUPS}


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
    plain = [OmegaConf.to_container(cfg[name], resolve=True) for name in GROUPS]
    assert len(targets(plain)) >= len(GROUPS)
    assert (cfg.steps is None) != (cfg.epochs is None)
    assert cfg.run_dir.startswith("runs/lfr/")


def test_every_run_has_a_folder_of_its_own() -> None:
    folders = [composed(words).run_dir for words in LINES if "/" in words[0] and len(words) == 1]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_target_is_there(path: Path) -> None:
    for name in targets(OmegaConf.to_container(OmegaConf.load(path), resolve=False)):
        assert callable(get_object(name)), name


@pytest.mark.parametrize("name", sorted({*EXPERIMENTS} - SHARED))
def test_the_header_says_how_to_run_it(name: str) -> None:
    lines = (CONFIGS / "experiment" / f"{name}.yaml").read_text().splitlines()
    header = [line for line in lines[:6] if line.startswith("#")]
    assert header[0] == "# @package _global_"
    (command,) = [line for line in header if "make train-lfr" in line]
    assert re.search(rf'ARGS="experiment={re.escape(name)}( data.root=DIR)?"', command)
    assert len(header) >= 3  # what the row is comes first


def test_no_configuration_is_left_alone() -> None:
    used = set().union(*(chosen(words) for words in LINES))
    assert files(*GROUPS) == used
    plain = set().union(*(chosen((f"experiment={name}",)) for name in EXPERIMENTS))
    assert not plain & EXTRA.keys()  # otherwise it needs no entry


@pytest.mark.parametrize("name", [path.stem for path in sorted((CONFIGS / "data").glob("*.yaml"))])
def test_every_training_set_is_a_test_set(name: str) -> None:
    data = config("train", f"data={name}").data
    assert config("eval", f"data={name}").data == data


@pytest.mark.parametrize(
    ("file", "words", "key"),
    [
        ("train", ["stepz=3"], "stepz"),
        ("train", ["experiment=lfr/tin_r50_8f", "log_evry=3"], "log_evry"),
        ("train", ["data.rooot=a"], "rooot"),
        ("train", ["model.tin.offset_scal=1"], "offset_scal"),
        ("train", ["experiment=lfr/nothing"], "experiment/lfr/nothing"),
        ("eval", ["eval.fuze=prob"], "fuze"),
    ],
)
def test_a_misspelt_key_is_named(file: str, words: list[str], key: str) -> None:
    with pytest.raises(ConfigCompositionException) as caught:
        config(file, *words)
    assert key in f"{caught.value} {caught.value.__cause__}"


# Every row takes a step at reduced size: fewer frames, small pictures, no downloaded weights.
SIDE, CLASSES = 32, 4


def small(words: tuple[str, ...]) -> DictConfig:
    """The model, loss, optimizer and schedule of a row, with a shallow network on small clips."""
    cfg = OmegaConf.create(OmegaConf.to_container(composed(words), resolve=False))
    cfg.model.update({"frames": 8} if "frames" in cfg.model else {})
    if "num_segments" in cfg.model:
        cfg.model.num_segments = 2
    if "layers" in cfg.model.get("backbone", {}):
        cfg.model.backbone.layers = [1, 1, 1, 1]
        cfg.model.backbone.weights = None
    if cfg.model.get("non_local"):
        cfg.model.non_local.blocks = {"layer2": [0]}
    if "depth" in cfg.model:
        cfg.model.depth = 50 if "frames" in cfg.model else 18
    return cfg


def shape(words: tuple[str, ...]) -> str:
    """What decides the computation of a reduced row, so that equal rows run once."""
    cfg = small(words)
    transform = {k: v for k, v in cfg.transform.items() if k in ("modality", "length")}
    return str((cfg.model, transform, cfg.loss["function"], cfg.optim["_target_"]))


DIFFERENT = list({shape(words): words for words in reversed(LINES)}.values())[::-1]


@pytest.mark.slow
@pytest.mark.parametrize("words", DIFFERENT, ids=" ".join)
def test_a_row_takes_a_step(words: tuple[str, ...]) -> None:
    cfg = small(words)
    torch.manual_seed(0)
    cfg.transform.update({"input_size": SIDE, "scale_size": SIDE})
    transform = instantiate(cfg.transform)
    objective = instantiate(cfg.loss)(counts_K=torch.tensor([3, 2, 2, 1]))
    model = instantiate(cfg.model)(num_classes=CLASSES).train()
    optimizer = instantiate(cfg.optim)(model)
    schedule = instantiate(cfg.schedule)(optimizer, 10)
    frames = cfg.model.get("frames", 8 if "depth" in cfg.model else 2)
    length = cfg.transform.get("length", 1)
    channels = length * (2 if cfg.transform.get("modality") == "flow" else 3)
    image = torch.randint(0, 256, (2, frames, channels, SIDE, SIDE), dtype=torch.uint8)
    item = ClipItem(image, torch.eye(CLASSES)[:2])
    loss = train_step(model, item, transform, objective, torch.device("cpu"))
    loss.backward()
    assert torch.isfinite(loss)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert any(parameter.grad.abs().max() > 0 for parameter in model.parameters())
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(id(p) for p in model.parameters())
    optimizer.step()
    schedule.step()
