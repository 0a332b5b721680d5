"""The public names of the package, and what a file with weights may not do."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import save_file

import reid_rqen
from common.log import InputError
from reid_rqen.data.transforms import FrameTransform
from reid_rqen.rows import CONFIGS

MODEL = {
    "_target_": "reid_rqen.models.rqen.RQEN",
    "_partial_": True,
    "trunk": {"_target_": "reid_rqen.models.tiny.TinyTrunk"},
    "quality": {"_target_": "reid_rqen.models.quality.TinyQuality"},
}
TRANSFORM = {"_target_": "reid_rqen.data.transforms.FrameTransform", "size": [56, 28]}
SIZE = (56, 28)


def tiny(**overrides: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return reid_rqen.build("rqen_322", trunk="tiny", quality="tiny", **overrides)


def write(path: Path, model: dict[str, Any], transform: dict[str, Any] = TRANSFORM) -> Path:
    """A release file by hand, with whatever configuration."""
    config = json.dumps({"model": model, "transform": transform})
    save_file(tiny().state_dict(), path, {"format": "pt", "config": config, "step": "1"})
    return path


def test_import_is_light() -> None:
    code = (
        "import sys, reid_rqen\n"
        "heavy = {'torch', 'hydra', 'cv2', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert all(callable(getattr(reid_rqen, name)) for name in reid_rqen.__all__)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_predict_stays_a_function_after_its_module_is_imported(tmp_path: Path) -> None:
    frames = [np.zeros((*SIZE, 3), np.uint8)]
    path = write(tmp_path / "a.safetensors", MODEL)
    before = reid_rqen.predict(path, frames)
    import reid_rqen.predict as loaded

    assert loaded.PredictConfig
    after = reid_rqen.predict(path, frames)
    np.testing.assert_array_equal(before.score_TR, after.score_TR)


def test_build_takes_rows_files_and_arguments() -> None:
    model = tiny(num_classes=7)
    assert model.training
    assert model.classifier.out_features == 7
    assert (model.regions, model.channels) == (3, 64)
    shared = reid_rqen.build("qan_parts", trunk="tiny", quality="tiny")
    assert shared.quality.outputs == 1
    halves = reid_rqen.build(
        "rqen_322", regions=[1, 1], trunk="tiny", quality={"outputs": 2, "grid": [2, 1]}
    )
    assert (halves.regions, halves.quality.outputs) == (2, 2)
    assert type(halves.quality).__name__ == "ImageQuality"


def test_build_names_what_there_is() -> None:
    with pytest.raises(InputError, match=r"row: is not there, only .*qan.*: rqen_323"):
        reid_rqen.build("rqen_323")
    with pytest.raises(InputError, match=r"trunk: is not there, only .*tiny: vgg"):
        reid_rqen.build("rqen_322", trunk="vgg")
    with pytest.raises(InputError, match="row"):
        reid_rqen.build("../train")


def test_build_inside_a_hydra_application() -> None:
    with initialize_config_dir(str(CONFIGS), version_base=None):
        outer = GlobalHydra.instance().hydra
        assert tiny().regions == 3
        assert GlobalHydra.instance().hydra is outer
    assert not GlobalHydra.instance().is_initialized()
    tiny()
    assert not GlobalHydra.instance().is_initialized()


def test_load_gives_the_model_back(tmp_path: Path) -> None:
    model = reid_rqen.load(write(tmp_path / "a.safetensors", MODEL))
    assert not model.training
    for name, value in tiny().state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    with pytest.raises(InputError, match="nothing: no such file or folder"):
        reid_rqen.load(tmp_path / "nothing")
    with pytest.raises(InputError, match="holds no complete checkpoint"):
        reid_rqen.load(tmp_path)


def test_predict_takes_pictures_or_network_input(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", MODEL)
    model, transform = reid_rqen.load(path), FrameTransform(size=SIZE)
    rng = np.random.default_rng(0)
    frames = list(rng.integers(0, 256, (5, 80, 40, 3), dtype=np.uint8))
    found = reid_rqen.predict(path, frames, batch=2)
    assert found.score_TR.shape == found.weight_TR.shape == (5, 3)
    np.testing.assert_allclose(found.weight_TR.sum(axis=0), 1, atol=1e-6)
    assert np.linalg.norm(found.vector_D) == pytest.approx(1, abs=1e-6)
    again = reid_rqen.predict(model.train(), frames, transform)
    np.testing.assert_allclose(again.vector_D, found.vector_D, atol=1e-6)
    from reid_rqen.predict import fit

    ready = torch.stack([fit(frame[..., ::-1], transform) for frame in frames])
    direct = reid_rqen.predict(model, transform.normalize(ready))
    np.testing.assert_allclose(direct.score_TR, found.score_TR, atol=1e-6)


def test_predict_refuses_what_it_cannot_use() -> None:
    model, frame = tiny(), np.zeros((*SIZE, 3), np.uint8)
    with pytest.raises(ValueError, match="transform=None"):
        reid_rqen.predict(model, [frame])
    with pytest.raises(ValueError, match="0 frames"):
        reid_rqen.predict(model, [], FrameTransform(size=SIZE))
    with pytest.raises(ValueError, match="float32"):
        reid_rqen.predict(model, [frame.astype(np.float32)], FrameTransform(size=SIZE))
    with pytest.raises(InputError, match="gives no scores"):
        reid_rqen.predict(reid_rqen.build("cnn_rnn"), torch.zeros(2, 5, 56, 40))


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "os.system", "command": "touch {}"},
        {"_target_": "reid_rqen.models.quality.torch.load", "f": "{}"},
        {"_target_": "reid_rqen.weights.Path.touch", "self": "{}"},
        {"_target_": "reid_rqen.models.pretrained.Path", "path": "{}"},
        "${oc.create:{_target_: numpy.save, file: '{}', arr: 1}}",
    ],
    ids=["foreign", "through_a_module", "not_a_model", "imported_class", "interpolation"],
)
@pytest.mark.parametrize("place", ["model", "trunk", "transform"])
def test_a_release_builds_only_our_classes(tmp_path: Path, node: Any, place: str) -> None:
    mark = tmp_path / "mark.npy"
    node = json.loads(json.dumps(node).replace("'{}'", f"'{mark}'").replace("{}", str(mark)))
    model = {"model": node, "trunk": {**MODEL, "trunk": node}, "transform": MODEL}[place]
    path = write(tmp_path / "a.safetensors", model, node if place == "transform" else TRANSFORM)
    with pytest.raises(InputError, match=r"a\.safetensors"):
        reid_rqen.load(path)
    assert not mark.exists()
