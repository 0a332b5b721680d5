"""Runs and releases load as they were saved, and nothing else loads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import detection_tsd
from common.log import InputError
from detection_tsd.weights import load_trained, open_trained, release_config, write_release


@pytest.fixture(scope="module")
def release(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    trained = load_trained(run)
    path = tmp_path_factory.mktemp("release") / "model.safetensors"
    write_release(trained.model.state_dict(), release_config(trained.config), trained.step, path)
    return path


def test_a_release_is_the_run(run: Path, release: Path) -> None:
    whole, alone = load_trained(run), open_trained(release)
    assert alone.step == whole.step == 40
    assert alone.classes == whole.classes
    state = alone.model.state_dict()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(state[name], value)
    assert not alone.model.training


def test_options_of_the_suppression_are_replaced(release: Path) -> None:
    assert open_trained(release, per_image=7).model.post.per_image == 7
    with pytest.raises(InputError, match="cannot be built"):
        open_trained(release, per_picture=7)


def test_the_public_names_work(release: Path) -> None:
    assert not detection_tsd.load(release).training
    fresh = detection_tsd.build("synth/tsd", "num_classes=4")
    assert fresh.head.num_classes == 4
    with pytest.raises(InputError, match=r"row: is not there, only .*coco/tsd_r50"):
        detection_tsd.build("coco/nothing")
    with pytest.raises(InputError, match="overrides: cannot be composed"):
        detection_tsd.build("synth/tsd", "head.margn=1")


def rewritten(release: Path, path: Path, change: Any) -> Path:
    from detection_tsd.weights import read_safetensors

    state, metadata = read_safetensors(release)
    config = json.loads(metadata["config"])
    change(config)
    save_file(state, path, {**metadata, "config": json.dumps(config)})
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"].update(_target_="os.system"), "names a class that weights may not"),
        (
            lambda c: c["model"]["head"].update(_target_="detection_tsd.train.train"),
            "may not build",
        ),
        (lambda c: c["model"]["head"].update(_target_="detection_tsd.boxes.iou"), "may not build"),
        (
            lambda c: c["model"]["head"].update(
                _target_="detection_tsd.models.tsd_head.torch.load"
            ),
            "may not build",
        ),
        (lambda c: c["model"].update(plus="${oc.env:HOME}"), "may not build"),
        (lambda c: c.pop("classes"), "does not say: classes"),
        (lambda c: c.update(model=3), "model is no configuration node: 3"),
        (lambda c: c["model"]["head"].update(num_classes=5), "weights do not fit"),
        (lambda c: c["model"]["head"].update(num_classes=-5), "cannot be built|do not fit"),
    ],
)
def test_a_foreign_or_unfit_release_is_refused(
    release: Path, tmp_path: Path, change: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        open_trained(rewritten(release, tmp_path / "bad.safetensors", change))


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(InputError, match="is not a safetensors file"):
        open_trained(tmp_path / "text.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "bare.safetensors")
    with pytest.raises(InputError, match="is not a release file"):
        open_trained(tmp_path / "bare.safetensors")
    with pytest.raises(InputError, match="no such file or folder"):
        open_trained(tmp_path / "gone")
    with pytest.raises(InputError, match="holds no complete checkpoint"):
        open_trained(tmp_path)
    with pytest.raises(InputError, match="give exactly one of them"):
        load_trained()
