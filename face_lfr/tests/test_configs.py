"""Every configuration composes, names what exists, and trains for a step."""

import re
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.errors import ConfigCompositionException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from face_lfr.data.draws import FaceItem
from face_lfr.data.proxy import QualityItem, SetItem
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


def resolved(words: tuple[str, ...]) -> DictConfig:
    """The nodes of a row, each as it is built."""
    cfg = OmegaConf.create(OmegaConf.to_container(composed(words), resolve=False))
    plain = OmegaConf.to_container(
        OmegaConf.masked_copy(cfg, [*GROUPS, "seed", "frozen_steps"]), resolve=True
    )
    return OmegaConf.create(plain)


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
    plain = resolved(words)
    nodes = [plain[name] for name in GROUPS if name != "margin" or cfg.teacher is None]
    assert len(targets(OmegaConf.to_container(OmegaConf.create(nodes)))) >= len(nodes)
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
    assert re.search(
        rf'ARGS="experiment={re.escape(name)}( data.root=DIR)?( teacher=RUN)?"', command
    )
    assert len(header) >= 3  # what the row is comes first


def test_no_configuration_is_left_alone() -> None:
    used = set().union(*(chosen(words) for words in LINES))
    assert files(*GROUPS) == used
    plain = set().union(*(chosen((f"experiment={name}",)) for name in EXPERIMENTS))
    assert not plain & EXTRA.keys()  # otherwise it needs no entry


@pytest.mark.parametrize(
    ("file", "words", "key"),
    [
        ("train", ["stepz=3"], "stepz"),
        ("train", ["experiment=deepglint/r100_arcface", "log_evry=3"], "log_evry"),
        ("train", ["data.rooot=a"], "rooot"),
        ("train", ["margin.alfa=1"], "alfa"),
        ("train", ["experiment=ms1mv3/nothing"], "experiment/ms1mv3/nothing"),
        ("eval", ["fprs=[1e-8]"], "fprs"),
    ],
)
def test_a_misspelt_key_is_named(file: str, words: list[str], key: str) -> None:
    with pytest.raises(ConfigCompositionException) as caught:
        config(file, *words)
    assert key in f"{caught.value} {caught.value.__cause__}"


# Every row takes a step at reduced size: narrow networks on small pictures, few classes.
CLASSES, IMAGES = 7, 4
NARROW: dict[str, dict[str, Any]] = {
    "IResNet": {"layers": [1, 1, 1, 1], "widths": [4, 8, 8, 8], "features": 8, "input_size": 32},
    "EfficientPolyFace": {"blocks": [1, 1, 1], "width": 0.1, "features": 8, "input_size": 75},
    "PolyNet": {"modules": [1, 1, 1], "features": 8, "input_size": 75, "width": 0.1},
    "MobileFaceNet": {"blocks": [1, 1, 1, 1], "features": 8, "input_size": 112},
    "QualityNet": {"channels": [4, 4, 4, 4], "blocks": 1, "input_size": 32},
}


def small(words: tuple[str, ...]) -> DictConfig:
    """A row with a narrow network of the same kind on small images."""
    cfg = resolved(words)
    cfg.model.update(NARROW[cfg.model["_target_"].rpartition(".")[2]])
    cfg.transform.update({"size": 32, "resize": cfg.model.input_size})
    return cfg


def shape(words: tuple[str, ...]) -> str:
    """What decides the computation of a reduced row, so that equal rows run once."""
    cfg = small(words)
    sizes = {key: cfg.objective.get(key) for key in ("centers", "smoothing", "regular")}
    names = [cfg[group]["_target_"] for group in ("draws", "objective", "optim", "schedule")]
    sampled = cfg.objective.get("sample_rate", 1.0) < 1
    return str((cfg.model, cfg.margin, sizes, sampled, names))


DIFFERENT = list({shape(words): words for words in reversed(LINES)}.values())[::-1]


def batch(cfg: DictConfig) -> tuple[torch.Tensor, ...]:
    """Images with what the row's objective is given beside the network's output."""
    side = cfg.transform["size"]
    if cfg.draws["_target_"].endswith("SetDraws"):
        image = torch.randint(0, 256, (2, 3, 2, 3, side, side), dtype=torch.uint8)
        return SetItem(image, torch.randn(2, 3, 2, 5))
    image = torch.randint(0, 256, (IMAGES, 3, side, side), dtype=torch.uint8)
    if cfg.draws["_target_"].endswith("ProxyDraws"):
        return QualityItem(image, torch.rand(IMAGES))
    return FaceItem(image, torch.arange(IMAGES))


@pytest.mark.slow
@pytest.mark.parametrize("words", DIFFERENT, ids=" ".join)
def test_a_row_takes_a_step(words: tuple[str, ...]) -> None:
    cfg = small(words)
    torch.manual_seed(0)
    transform, model = instantiate(cfg.transform), instantiate(cfg.model).train()
    objective = instantiate(cfg.objective)
    if isinstance(objective, partial):
        objective = objective(features=model.features, num_classes=CLASSES)
    optimizer = instantiate(cfg.optim)(model, objective)
    frozen = {"frozen": 2} if "frozen" in cfg.schedule else {}
    schedule = instantiate(cfg.schedule, **frozen)(optimizer, 10)
    loss = train_step(model, batch(cfg), transform, objective, torch.device("cpu"))
    loss.backward()
    assert torch.isfinite(loss)
    skipped = getattr(model, "skips_parameters", False)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not skipped:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    wanted = [p for part in (model, objective) for p in part.parameters() if p.requires_grad]
    assert sorted(held) == sorted(map(id, wanted))
    before = [p.detach().clone() for p in objective.parameters()]
    optimizer.step()
    schedule.step()
    after = list(objective.parameters())
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
