"""Every configuration composes, names what exists, and trains for a step."""

import re
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.errors import ConfigCompositionException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from reid_rqen.data.sets import FrameDraws, PKDraws, SetItem, TripletDraws
from reid_rqen.engine import train_step
from reid_rqen.tests.launch import CONFIGS, config

GROUPS = ("data", "model", "draws", "transform", "loss", "optim", "schedule")
EXPERIMENTS = sorted(
    str(path.relative_to(CONFIGS / "experiment").with_suffix(""))
    for path in (CONFIGS / "experiment").rglob("*.yaml")
)
SHARED = {"synth/base"}  # what other experiments build on; no row of its own
# Choices no experiment makes, with the command line that makes them.
EXTRA = {
    "data/duke_video": ("experiment=mars/rqen", "data=duke_video"),
    "model/quality/pool2_conv": ("experiment=lpw/rqen_pool2", "model/quality=pool2_conv"),
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
    assert cfg.steps >= 1
    assert cfg.run_dir.startswith("runs/rqen/")


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
    (command,) = [line for line in header if "make train-rqen" in line]
    assert re.search(rf'ARGS="experiment={name}"', command)
    assert len(header) >= 3  # what the row is comes first


def test_no_configuration_is_left_alone() -> None:
    used = set().union(*(chosen(words) for words in LINES))
    assert files(*GROUPS) == used
    plain = set().union(*(chosen((f"experiment={name}",)) for name in EXPERIMENTS))
    assert not plain & EXTRA.keys()  # otherwise it needs no entry


@pytest.mark.parametrize("name", [path.stem for path in sorted((CONFIGS / "data").glob("*.yaml"))])
def test_every_training_set_is_a_test_set(name: str) -> None:
    data = config("train", f"data={name}").data
    assert config("eval", f"eval={name}").eval == data


@pytest.mark.parametrize(
    ("file", "words", "key"),
    [
        ("train", ["stepz=3"], "stepz"),
        ("train", ["experiment=lpw/rqen", "log_evry=3"], "log_evry"),
        ("train", ["data.rooot=a"], "rooot"),
        ("train", ["loss.margn=1"], "margn"),
        ("train", ["experiment=lpw/nothing"], "experiment/lpw/nothing"),
        ("eval", ["rernk=true"], "rernk"),
    ],
)
def test_a_misspelt_key_is_named(file: str, words: list[str], key: str) -> None:
    with pytest.raises(ConfigCompositionException) as caught:
        config(file, *words)
    assert key in f"{caught.value} {caught.value.__cause__}"


def shape(words: tuple[str, ...]) -> str:
    """What decides the computation of a row, so that equal rows run once."""
    nodes = [OmegaConf.to_container(composed(words)[name]) for name in ("model", "transform")]
    return str((nodes, composed(words).draws["_target_"], composed(words).loss["_target_"]))


DIFFERENT = list({shape(words): words for words in reversed(LINES)}.values())[::-1]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    import cv2

    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = [folder / f"{number}.png" for number in range(8)]
    for path in paths:
        cv2.imwrite(str(path), rng.integers(0, 256, (64, 32, 3), dtype=np.uint8))
    return paths


def batch(draws: Any, transform: Any, pictures: list[Path]) -> SetItem:
    """Draws like those of the data set class `draws`, of 4 identities and few frames."""
    pid_ND = {TripletDraws: [[0, 0, 1]], FrameDraws: [[2], [3]], PKDraws: [[0, 0, 1, 1]]}[draws]
    frames = 1 if draws is FrameDraws else 2
    source, pid = iter(pictures), torch.tensor(pid_ND)
    images = [transform.load(list(islice(source, frames))) for _ in range(pid.numel())]
    image = torch.stack(images).unflatten(0, tuple(pid.shape))
    return SetItem(image, pid, torch.zeros_like(pid), torch.zeros(*pid.shape, frames, 0))


@pytest.mark.parametrize("words", DIFFERENT, ids=" ".join)
def test_a_row_takes_a_step(words: tuple[str, ...], pictures: list[Path]) -> None:
    cfg = composed(words)
    torch.manual_seed(0)
    transform, objective = instantiate(cfg.transform), instantiate(cfg.loss)
    model = instantiate(cfg.model)(num_classes=4).train()
    optimizer = instantiate(cfg.optim)(model)
    schedule = instantiate(cfg.schedule)(optimizer)
    item = batch(get_object(cfg.draws["_target_"]), transform, pictures)
    loss, parts = train_step(model, item, transform, objective, torch.device("cpu"))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(value) for value in parts.values())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    for name in {name.split(".")[0] for name, _ in model.named_parameters()}:
        part = [p for key, p in model.named_parameters() if key.startswith(name)]
        assert any(p.grad.abs().max() > 0 for p in part), name
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    optimizer.step()
    schedule.step()
