"""`export`: one safetensors file and ONNX, both equal to the model."""

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hydra.utils import instantiate

from common.log import InputError
from reid_rqen import export as module
from reid_rqen import load
from reid_rqen.export import ExportConfig, export
from reid_rqen.weights import Trained, save_release

MODELS = "reid_rqen.models"
TINY = {"_target_": f"{MODELS}.tiny.TinyTrunk"}
FRAMES = {
    "_target_": "reid_rqen.data.transforms.FrameTransform",
    "size": [56, 28],
    "scale": 0.01,
}
FLOW = {"_target_": "reid_rqen.data.transforms.FlowTransform"}
RQEN = {
    "_target_": f"{MODELS}.rqen.RQEN",
    "_partial_": True,
    "trunk": TINY,
    "quality": {"_target_": f"{MODELS}.quality.TinyQuality", "outputs": 3},
}
IMAGE_QUALITY = {"_target_": f"{MODELS}.quality.ImageQuality", "outputs": 1, "grid": [2, 1]}
CONSTANT = {"_target_": f"{MODELS}.quality.ConstantQuality"}
ATTENTION = {
    "_target_": f"{MODELS}.temporal.TemporalAttention",
    "channels": 64,
    "hidden": 8,
}


def make_release(path: Path, model: dict[str, Any], transform: dict[str, Any] = FRAMES) -> Path:
    torch.manual_seed(1)
    built = instantiate(model)(num_classes=None)
    for layer in built.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):  # statistics as after training
            torch.nn.init.uniform_(layer.running_mean, -0.3, 0.3)
            torch.nn.init.uniform_(layer.running_var, 0.5, 2.0)
    config = {"model": model, "transform": transform}
    save_release(Trained(built.eval(), instantiate(transform), config, 4, path), path)
    return path


def config(path: Path, **options: Any) -> ExportConfig:
    return ExportConfig(out=str(path.parent / "out"), checkpoint=str(path), **options)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"regions": [7], "quality": CONSTANT},
        {"regions": [3, 3, 2], "quality": IMAGE_QUALITY},  # edges inside a row of the map
        {"use_regions": [0, 2]},
    ],
    ids=["rqen", "mean", "shared_rows", "two_regions"],
)
def test_frame_models_agree_for_any_batch(tmp_path: Path, change: dict[str, Any]) -> None:
    path = make_release(tmp_path / "in.safetensors", {**RQEN, **change})
    result = export(config(path))
    assert json.loads((tmp_path / "out" / "export.json").read_text()) == result
    assert 0 <= result["onnx"]["max_abs_diff"] < 1e-5
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    model = load(tmp_path / "out" / "model.safetensors")
    for batch in (1, 7):
        image = torch.randn(batch, 3, 56, 28)
        with torch.no_grad():
            wanted = model.frames(image)
        region, score = session.run(["region_BRC", "score_BR"], {"image_BCHW": image.numpy()})
        assert region.shape == (batch, model.regions, 64)
        np.testing.assert_allclose(region, wanted.region_BRC, atol=1e-5)
        np.testing.assert_allclose(score, wanted.score_BR, atol=1e-6)
    operators = {node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node}
    assert "BatchNormalization" not in operators


@pytest.mark.parametrize(
    ("model", "transform"),
    [
        ({"_target_": f"{MODELS}.cnn_rnn.CNNRNN", "_partial_": True}, FLOW),
        (
            {
                "_target_": f"{MODELS}.temporal.TemporalModel",
                "_partial_": True,
                "trunk": TINY,
                "attention": ATTENTION,
            },
            FRAMES,
        ),
    ],
    ids=["cnn_rnn", "attention"],
)
def test_sequence_models_have_a_fixed_length(
    tmp_path: Path, model: dict[str, Any], transform: dict[str, Any]
) -> None:
    path = make_release(tmp_path / "in.safetensors", model, transform)
    result = export(config(path, frames=3))
    assert result["onnx"] is not None, "no ONNX was written"
    (shape,) = result["onnx"]["input"].values()
    assert shape[:2] == ["batch", 3]
    image = torch.randn(4, *shape[1:])
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    (vector,) = session.run(["vector"], {"image_STCHW": image.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(vector, load(path).sequences(image), atol=1e-5)


def test_without_an_onnx_form_only_safetensors_is_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = {"_target_": f"{MODELS}.astpn.ASTPN", "_partial_": True}
    path = make_release(tmp_path / "in.safetensors", model, FLOW)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.onnx").write_text("of an earlier export")
    with caplog.at_level(logging.WARNING, "reid_rqen"):
        result = export(config(path, frames=2))
    assert [record.getMessage() for record in caplog.records if "reid" in record.name] == [
        "ASTPN has no ONNX form: only safetensors was written"
    ]
    assert result["onnx"] is None
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"model.safetensors", "export.json"}


def test_a_difference_beyond_the_tolerance_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_release(tmp_path / "in.safetensors", RQEN)
    real = module.write_onnx

    def spoil(exported: Any, image: torch.Tensor, target: Path, opset: int) -> None:
        real(exported, image, target, opset)
        with torch.no_grad():
            exported.model.quality.fc.bias += 0.01

    monkeypatch.setattr(module, "write_onnx", spoil)
    with pytest.raises(InputError, match=r"model\.onnx: score_BR differs from PyTorch"):
        export(config(path))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.safetensors"}


def test_not_a_number_is_a_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_release(tmp_path / "in.safetensors", RQEN)
    nan = module.Parity(float("nan"), 1.0)
    monkeypatch.setattr(module, "write_onnx", lambda *given: given[2].write_bytes(b""))
    monkeypatch.setattr(
        module, "compare", lambda *_: {"region_BRC": module.Parity(0.0, 1.0), "score_BR": nan}
    )
    with pytest.raises(InputError, match="score_BR"):
        export(config(path))


def test_a_file_with_other_weights_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_release(tmp_path / "in.safetensors", RQEN)

    def spoil(trained: Trained, target: Path) -> None:
        state = {name: value.clone() for name, value in trained.model.state_dict().items()}
        trained.model.quality.fc.bias.data += 1e-7
        save_release(trained, target)
        trained.model.load_state_dict(state)

    monkeypatch.setattr(module, "save_release", spoil)
    with pytest.raises(InputError, match=r"does not reproduce the weights: quality\.fc\.bias"):
        export(config(path, onnx=False))


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_release(tmp_path / "in.safetensors", RQEN)
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else real(name)
    )
    with pytest.raises(InputError, match=r"onnxruntime: .*vision-tasks\[export\]"):
        export(config(path))
    assert export(config(path, onnx=False))["onnx"] is None
    assert not (tmp_path / "out" / "model.onnx").exists()
