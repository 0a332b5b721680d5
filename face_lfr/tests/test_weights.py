"""Weights on disk: releases that reload bit for bit, starting weights, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from common.log import InputError
from face_lfr import build
from face_lfr.weights import (
    FACTS,
    NODES,
    load_initial,
    load_trained,
    refuse_foreign_loader,
    save_release,
    write_release,
)

SMALL = {"num_segments": 2, "backbone": {"layers": [1, 1, 1, 1], "block": "basic"}}


def model(row: str = "tin", classes: int = 3, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build(row, classes, **SMALL)


def write(net: nn.Module, path: Path) -> Path:
    save_file({name: value.contiguous() for name, value in net.state_dict().items()}, path)
    return path


def equal(left: nn.Module, right: nn.Module, *prefixes: str) -> bool:
    mine, other = left.state_dict(), right.state_dict()
    names = [name for name in mine if name.startswith(prefixes)]
    assert names
    return all(torch.equal(mine[name], other[name]) for name in names)


@pytest.fixture(scope="module")
def release(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("release") / "model.safetensors"
    save_release(load_trained(run), path)
    return path


def test_a_release_gives_back_the_run_bit_for_bit(run: Path, release: Path) -> None:
    whole, alone = load_trained(run), load_trained(checkpoint=release)
    assert equal(whole.model, alone.model, "")
    assert not alone.model.training
    assert (alone.step, alone.classes, alone.multi_label) == (40, whole.classes, True)
    assert alone.config["train_set"] == whole.config["train_set"]
    assert alone.sampler == whole.sampler
    assert "data" not in alone.config  # where the training data lay is nobody's business
    assert (release.stat().st_mode & 0o777) == 0o644


def test_options_of_the_transform_can_be_replaced(release: Path) -> None:
    assert load_trained(checkpoint=release, scale_size=40).transform.scale_size == 40
    with pytest.raises(InputError, match="cannot be built"):
        load_trained(checkpoint=release, nothing=1)


def rewritten(release: Path, path: Path, **changes: Any) -> Path:
    from safetensors import safe_open

    with safe_open(release, framework="pt") as file:
        config = json.loads(file.metadata()["config"])
    for key, value in changes.items():
        node = config
        *parents, last = key.split("__")
        for name in parents:
            node = node[name]
        node[last] = value
    write_release(load_file(release), config, 1, path)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model___target_": "os.system"}, "may not build: os.system"),
        ({"model___target_": "face_lfr.models.tin.torch.load"}, "may not build"),
        ({"transform___target_": "face_lfr.weights.save_release"}, "may not build"),
        ({"model__tin___target_": "face_lfr.models.tin.record_offsets"}, "may not build"),
        ({"model__dropout": "${oc.env:HOME}"}, "may not build"),
        ({"sampler": None}, "sampler is no configuration node"),
        ({"num_classes": 5}, "weights do not fit"),
    ],
)
def test_a_release_may_only_build_what_is_ours(
    release: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load_trained(checkpoint=rewritten(release, tmp_path / "bad.safetensors", **changes))


@pytest.mark.parametrize("key", [*NODES, *FACTS])
def test_a_release_lacks_nothing(release: Path, tmp_path: Path, key: str) -> None:
    from safetensors import safe_open

    with safe_open(release, framework="pt") as file:
        config = json.loads(file.metadata()["config"])
    del config[key]
    write_release(load_file(release), config, 1, tmp_path / "bad.safetensors")
    with pytest.raises(InputError, match=key):
        load_trained(checkpoint=tmp_path / "bad.safetensors")


def test_what_is_no_release_is_named(tmp_path: Path, run: Path) -> None:
    for given in ({}, {"run_dir": run, "checkpoint": run}):
        with pytest.raises(InputError, match="exactly one"):
            load_trained(**given)
    with pytest.raises(InputError, match=r"none\.safetensors: no such"):
        load_trained(checkpoint=tmp_path / "none.safetensors")
    with pytest.raises(InputError, match="holds no complete checkpoint"):
        load_trained(run_dir=tmp_path)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(InputError, match="not a safetensors file"):
        load_trained(checkpoint=tmp_path / "text")
    with pytest.raises(InputError, match="is not a release file"):
        load_trained(checkpoint=write(model(), tmp_path / "bare"))


def test_a_data_node_may_only_call_our_loaders(tmp_path: Path) -> None:
    node = {"_target_": "face_lfr.data.lfr.load_lfr", "reader": {"_target_": "os.system"}}
    with pytest.raises(InputError, match=r"may not call: os\.system"):
        refuse_foreign_loader(node, tmp_path)
    with pytest.raises(InputError, match="may not call"):
        refuse_foreign_loader({"_target_": "face_lfr.data.lfr.find_file"}, tmp_path)


def test_starting_weights_of_the_same_classes_are_complete(tmp_path: Path) -> None:
    fresh = model(seed=1)
    load_initial(fresh, write(model(seed=0), tmp_path / "all"))
    assert equal(fresh, model(seed=0), "")


def test_a_classifier_of_other_classes_stays_new(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fresh, start = model(classes=5, seed=1), model(classes=3, seed=0)
    with caplog.at_level("INFO"):
        load_initial(fresh, write(start, tmp_path / "three"))
    assert "stays behind" in caplog.text
    assert equal(fresh, start, "backbone.")
    assert equal(fresh, model(classes=5, seed=1), "head.")


def test_temporal_modules_may_come_or_stay_new(tmp_path: Path) -> None:
    """TSN weights start a TIN and the other way round: the same convolutions."""
    tsn, tin = model("tsn", seed=0), model("tin", seed=1)
    key = "backbone.layer1.0.conv1"
    load_initial(tin, write(tsn, tmp_path / "tsn"))
    assert torch.equal(tin.state_dict()[f"{key}.conv.weight"], tsn.state_dict()[f"{key}.weight"])
    assert equal(tin, model("tin", seed=1), f"{key}.temporal.")


def test_a_bare_backbone_starts_a_model(tmp_path: Path) -> None:
    tsn, tin = model("tsn", seed=0), model("tin", seed=1)
    load_initial(tin, write(tsn.backbone, tmp_path / "backbone"))
    name = "backbone.layer2.0.conv2.weight"
    assert torch.equal(tin.state_dict()[name], tsn.state_dict()[name])


def test_weights_that_do_not_fit_are_all_listed(tmp_path: Path) -> None:
    state = dict(model("tsn").state_dict())
    state["backbone.extra.weight"] = torch.zeros(1)
    state["backbone.conv1.weight"] = torch.zeros(2)
    del state["backbone.bn1.weight"]
    save_file(state, tmp_path / "bad")
    with pytest.raises(InputError) as caught:
        load_initial(model("tsn"), tmp_path / "bad")
    for name in ("extra.weight", "conv1.weight", "bn1.weight"):
        assert f"backbone.{name}" in str(caught.value)
