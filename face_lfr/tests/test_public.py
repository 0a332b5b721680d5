"""The public names of the package, and what a file with weights may not do."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file

import face_lfr
from common.log import InputError
from face_lfr.rows import CONFIGS
from face_lfr.tests.releases import FACTS, IR, QUALITY, transform_node, write
from face_lfr.weights import write_release

TINY = {"widths": [4, 8, 8, 8], "features": 16, "input_size": 24}


def tiny(**overrides: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return face_lfr.build("ir_nano", **(TINY | overrides))


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("net") / "net.safetensors")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of several sizes; the last is the first again."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    images = [rng.integers(0, 256, (side, side, 3), np.uint8) for side in (24, 24, 112, 30)]
    paths = [folder / f"{number}.png" for number in range(5)]
    for path, image in zip(paths, [*images, images[0]], strict=True):
        cv2.imwrite(str(path), image)
    return paths


def test_import_is_light() -> None:
    code = (
        "import sys, face_lfr\n"
        "heavy = {'torch', 'hydra', 'cv2', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert all(callable(getattr(face_lfr, name)) for name in face_lfr.__all__)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.slow
def test_optional_packages_are_imported_when_needed() -> None:
    code = (
        "import sys\n"
        "names = 'cv2', 'matplotlib', 'onnx', 'onnxruntime', 'sklearn', 'scipy'\n"
        "sys.modules.update(dict.fromkeys(names))\n"
        "import face_lfr.predict, face_lfr.export\n"
        "assert callable(face_lfr.predict)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_predict_equals_the_model_itself(net: Path, pictures: list[Path]) -> None:
    found = face_lfr.predict(net, pictures)
    model, rows = face_lfr.load(net), []
    for path in pictures:
        image = cv2.resize(cv2.imread(str(path))[..., ::-1], (24, 24))
        x_3HW = (torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32)) - 127.5) / 127.5
        with torch.no_grad():
            pair_2D = model.embed(torch.stack([x_3HW, x_3HW.flip(-1)])).double()
        rows.append(pair_2D.mean(dim=0).numpy())
    vector_ND = np.stack([row / np.linalg.norm(row) for row in rows])
    assert found.names == tuple(map(str, pictures))
    np.testing.assert_allclose(found.vector_ND, vector_ND, atol=1e-6)
    np.testing.assert_allclose(found.similarity_NN, vector_ND @ vector_ND.T, atol=1e-6)
    np.testing.assert_array_equal(found.similarity_NN, found.similarity_NN.T)
    np.testing.assert_array_equal(np.diag(found.similarity_NN), 1)
    assert found.similarity_NN[0, 4] == pytest.approx(1, abs=1e-6)
    assert found.similarity_NN[0, 1:4].max() < 0.999


def test_predict_takes_paths_as_texts_and_a_loaded_model(net: Path, pictures: list[Path]) -> None:
    from face_lfr.weights import open_trained

    wanted = face_lfr.predict(net, pictures[:2])
    for model in (str(net), open_trained(net)):
        found = face_lfr.predict(model, [str(path) for path in pictures[:2]])
        np.testing.assert_array_equal(found.vector_ND, wanted.vector_ND)


@pytest.mark.slow
def test_predict_takes_a_run(run: Path, pictures: list[Path]) -> None:
    found = face_lfr.predict(run, pictures[:2])
    newest = max((run / "checkpoints").iterdir())
    again = face_lfr.predict(newest, pictures[:2])
    assert found.vector_ND.shape == (2, 16)
    np.testing.assert_array_equal(found.vector_ND, again.vector_ND)


def test_predict_stays_a_function_after_its_module_is_imported(
    net: Path, pictures: list[Path]
) -> None:
    before = face_lfr.predict(net, pictures[:1])
    import face_lfr.predict as loaded

    assert loaded.PredictConfig
    after = face_lfr.predict(net, pictures[:1])
    np.testing.assert_array_equal(before.vector_ND, after.vector_ND)


def test_predict_refuses_what_it_cannot_use(net: Path, pictures: list[Path]) -> None:
    with pytest.raises(ValueError, match=r"images=\[\]: need a sequence of at least one path"):
        face_lfr.predict(net, [])
    with pytest.raises(ValueError, match="need a sequence"):
        face_lfr.predict(net, str(pictures[0]))
    with pytest.raises(InputError, match=r"none\.png: image cannot be read"):
        face_lfr.predict(net, [pictures[0], "none.png"])
    with pytest.raises(InputError, match="nothing: no such file or folder"):
        face_lfr.predict("nothing", pictures)


def test_build_takes_rows_and_arguments() -> None:
    model = tiny(features=7)
    assert model.training
    assert (model.features, model.input_size) == (7, 24)
    assert type(face_lfr.build("quality_nano")).__name__ == "QualityNet"
    poly = face_lfr.build("polyface_nano", blocks=[1, 1, 1], width=0.1)
    assert (type(poly).__name__, poly.input_size) == ("EfficientPolyFace", 75)


def test_build_names_what_there_is() -> None:
    with pytest.raises(InputError, match=r"row: is not there, only .*ir100.*polyface_base.*: ir51"):
        face_lfr.build("ir51")
    with pytest.raises(InputError, match="row"):
        face_lfr.build("../train")


def test_build_inside_a_hydra_application() -> None:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base=None):
        outer = GlobalHydra.instance().hydra
        assert tiny().features == 16
        assert GlobalHydra.instance().hydra is outer
    assert not GlobalHydra.instance().is_initialized()
    tiny()
    assert not GlobalHydra.instance().is_initialized()


def test_load_gives_the_model_back(net: Path, tmp_path: Path) -> None:
    model = face_lfr.load(net)
    assert not model.training
    for name, value in load_file(net).items():
        assert torch.equal(model.state_dict()[name], value), name
    rater = write(tmp_path / "rater.safetensors", QUALITY)
    assert face_lfr.load(str(rater))(torch.zeros(2, 3, 24, 24)).shape == (2,)
    with pytest.raises(InputError, match="nothing: no such file or folder"):
        face_lfr.load(tmp_path / "nothing")
    with pytest.raises(InputError, match="holds no complete checkpoint"):
        face_lfr.load(tmp_path)


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "os.system", "command": "touch {}"},
        {"_target_": "face_lfr.models.fold.torch.load", "f": "{}"},
        {"_target_": "face_lfr.weights.Path.touch", "self": "{}"},
        {"_target_": "face_lfr.data.transforms.Path", "path": "{}"},
        {"_target_": "face_lfr.models.fold.folded", "model": "{}"},
        "${oc.create:{_target_: numpy.save, file: '{}', arr: 1}}",
    ],
    ids=["foreign", "through_a_module", "not_a_model", "imported", "function", "interpolation"],
)
@pytest.mark.parametrize("place", ["model", "inside", "transform"])
def test_a_release_builds_only_our_classes(
    net: Path, tmp_path: Path, node: Any, place: str
) -> None:
    mark = tmp_path / "mark.npy"
    node = json.loads(json.dumps(node).replace("'{}'", f"'{mark}'").replace("{}", str(mark)))
    nodes = {"model": IR, "transform": transform_node(size=24)}
    if place == "inside":
        nodes["model"] = {**IR, "dropout": node}
    else:
        nodes[place] = node
    path = tmp_path / "bad.safetensors"
    write_release(load_file(net), nodes | FACTS, 3, path)
    with pytest.raises(InputError, match=r"bad\.safetensors"):
        face_lfr.load(path)
    assert not mark.exists()
