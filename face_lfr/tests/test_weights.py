"""Weights on disk: releases that reload bit for bit, starting weights, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from common.log import InputError
from face_lfr import build, load
from face_lfr.weights import (
    FACTS,
    NODES,
    load_centres,
    load_initial,
    load_trained,
    open_trained,
    refuse_foreign_loader,
    save_release,
    write_release,
)

SMALL = {"widths": [4, 8, 8, 8], "features": 16, "input_size": 24, "stem_stride": 2}


def model(seed: int = 0, **changes: Any) -> nn.Module:
    torch.manual_seed(seed)
    return build("ir_nano", **{**SMALL, **changes})


def write(net: nn.Module, path: Path) -> Path:
    save_file({name: value.contiguous() for name, value in net.state_dict().items()}, path)
    return path


def equal(left: nn.Module, right: nn.Module) -> bool:
    mine, other = left.state_dict(), right.state_dict()
    assert mine.keys() == other.keys()
    return all(torch.equal(mine[name], other[name]) for name in mine)


@pytest.fixture(scope="module")
def release(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("release") / "model.safetensors"
    save_release(load_trained(run), path)
    return path


def test_a_release_gives_back_the_run_bit_for_bit(run: Path, release: Path) -> None:
    whole, alone = load_trained(run), load_trained(checkpoint=release)
    assert equal(whole.model, alone.model)
    assert not alone.model.training
    assert (alone.step, alone.kind) == (40, "embedding")
    assert alone.config["train_set"] == whole.config["train_set"]
    assert vars(alone.transform) == vars(whole.transform)  # the colour order above all
    assert "data" not in alone.config  # where the training data lay is nobody's business
    assert not any("objective" in name for name in load_file(release))
    assert load_centres(alone) is None  # the classifier is no part of it
    assert (release.stat().st_mode & 0o777) == 0o644
    assert equal(load(release), whole.model)


def rewritten(release: Path, path: Path, **changes: Any) -> Path:
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
        ({"model___target_": "face_lfr.models.iresnet.torch.load"}, "may not build"),
        ({"model___target_": "face_lfr.models.fold.folded"}, "may not build"),
        ({"transform___target_": "face_lfr.weights.save_release"}, "may not build"),
        ({"model__dropout": "${oc.env:HOME}"}, "may not build"),
        ({"transform": None}, "transform is no configuration node"),
        ({"kind": "classifier"}, "kind must be one of"),
        ({"model__features": 5}, "weights do not fit"),
        ({"model__widths": [0, 0, 0, 0]}, "cannot be built"),
    ],
)
def test_a_release_may_only_build_what_is_ours(
    release: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load_trained(checkpoint=rewritten(release, tmp_path / "bad.safetensors", **changes))


@pytest.mark.parametrize("key", [*NODES, *FACTS])
def test_a_release_lacks_nothing(release: Path, tmp_path: Path, key: str) -> None:
    with safe_open(release, framework="pt") as file:
        config = json.loads(file.metadata()["config"])
    del config[key]
    write_release(load_file(release), config, 1, tmp_path / "bad.safetensors")
    with pytest.raises(InputError, match=key):
        load_trained(checkpoint=tmp_path / "bad.safetensors")


def test_the_classifier_of_a_run_may_only_be_ours(run: Path) -> None:
    trained = load_trained(run)
    for target in ("os.system", "face_lfr.ops.margin_softmax.margin_softmax"):
        config = trained.config | {"objective": {"_target_": target, "_partial_": True}}
        with pytest.raises(InputError, match="may not build"):
            load_centres(trained._replace(config=config))


def test_what_is_no_release_is_named(tmp_path: Path, run: Path) -> None:
    for given in ({}, {"run_dir": run, "checkpoint": run}):
        with pytest.raises(InputError, match="exactly one"):
            load_trained(**given)
    with pytest.raises(InputError, match=r"none\.safetensors: no such"):
        load_trained(checkpoint=tmp_path / "none.safetensors")
    with pytest.raises(InputError, match="no such file or folder"):
        open_trained(tmp_path / "none")
    with pytest.raises(InputError, match="holds no complete checkpoint"):
        load_trained(run_dir=tmp_path)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(InputError, match="not a safetensors file"):
        open_trained(tmp_path / "text")
    with pytest.raises(InputError, match="is not a release file"):
        load_trained(checkpoint=write(model(), tmp_path / "bare"))


def test_a_data_node_may_only_call_our_loaders(tmp_path: Path) -> None:
    node = {"_target_": "face_lfr.data.rec.load_rec", "root": {"_target_": "os.system"}}
    with pytest.raises(InputError, match=r"may not call: os\.system"):
        refuse_foreign_loader(node, tmp_path)
    with pytest.raises(InputError, match="may not call"):
        refuse_foreign_loader({"_target_": "face_lfr.data.degrade.degrade"}, tmp_path)


def test_starting_weights_come_from_a_file_or_a_run(run: Path, tmp_path: Path) -> None:
    fresh = model(seed=1)
    load_initial(fresh, write(model(seed=0), tmp_path / "all"))
    assert equal(fresh, model(seed=0))
    for path in (run, run / "checkpoints" / "step_00000040"):
        fresh = model(seed=1)
        load_initial(fresh, path)
        assert equal(fresh, load_trained(run).model)
    with pytest.raises(InputError, match="holds no complete checkpoint"):
        load_initial(fresh, tmp_path)


def test_weights_that_do_not_fit_are_all_listed(tmp_path: Path) -> None:
    state = dict(model().state_dict())
    names = list(state)
    state["extra.weight"] = torch.zeros(1)
    state[names[0]] = torch.zeros(2)
    del state[names[1]]
    save_file(state, tmp_path / "bad")
    with pytest.raises(InputError) as caught:
        load_initial(model(), tmp_path / "bad")
    for name in ("extra.weight", names[0], names[1]):
        assert name in str(caught.value)


def test_build_names_what_there_is() -> None:
    with pytest.raises(InputError, match=r"only ir100, .*polyface_deeper.*: nothing"):
        build("nothing")
    assert build("polyface_nano", blocks=[1, 1, 1], width=0.1).features == 128
