"""`export`: one safetensors file and ONNX, both equal to the model, for every row of the models."""

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hydra.utils import instantiate

from common.log import InputError
from video_mmit import export as module
from video_mmit import load
from video_mmit.export import ExportConfig, export, random_clips
from video_mmit.rows import build_row
from video_mmit.tests.launch import command
from video_mmit.weights import Trained, load_trained, save_release

MODELS = "video_mmit.models"
CLASSES = ("a", "b", "c", "d", "e")
TINY = {"_target_": f"{MODELS}.tiny.TinyNet", "widths": [16]}
TINY2 = {**TINY, "widths": [16, 32]}
TSN = {
    "_target_": f"{MODELS}.frame_net.FrameNet",
    "_partial_": True,
    "backbone": TINY,
    "num_segments": 3,
    "head_std": 0.5,
}
TSM = {**TSN, "tsm": {"_target_": f"{MODELS}.tsm.add_tsm", "_partial_": True}}
TIN = {**TSN, "tin": {"_target_": f"{MODELS}.tin.add_tin", "_partial_": True}}
TRN = {**TSN, "trn": {"_target_": f"{MODELS}.trn.TRN", "_partial_": True}}
R2PLUS1D = {"_target_": f"{MODELS}.r2plus1d.R2Plus1D", "_partial_": True, "depth": 10}
R3D = {"_target_": f"{MODELS}.r3d.R3D", "_partial_": True, "depth": 10}
SLOWFAST = {"_target_": f"{MODELS}.slowfast.SlowFast", "_partial_": True, "frames": 4}
PYSLOWFAST = {**SLOWFAST, "frames": 8, "variant": "pyslowfast"}


def non_local(model: dict[str, Any], mode: str) -> dict[str, Any]:
    insert = {
        "_target_": f"{MODELS}.non_local.add_non_local",
        "_partial_": True,
        "mode": mode,
        "blocks": {"layer1": [0]},
    }
    return {**model, "non_local": insert}


def settle(model: torch.nn.Module) -> None:
    """Statistics and scales as after training, so that every branch of the network counts."""
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d | torch.nn.BatchNorm3d):
            torch.nn.init.uniform_(layer.running_mean, -0.3, 0.3)
            torch.nn.init.uniform_(layer.running_var, 0.5, 2.0)
            torch.nn.init.uniform_(layer.weight, 0.5, 1.5)


def make_release(
    path: Path, model: dict[str, Any], count: int = 3, size: int = 32, **transform: Any
) -> Path:
    torch.manual_seed(1)
    built = instantiate(model)(num_classes=len(CLASSES)).eval()
    settle(built)
    length = transform.get("length", 1)
    config = {
        "model": model,
        "transform": {
            "_target_": "video_mmit.data.transforms.GroupTransform",
            "input_size": size, "scale_size": size, **transform,
        },
        "sampler": {
            "_target_": "video_mmit.data.sampling.Uniform", "count": count, "length": length,
        },
        "train_set": "none", "num_classes": len(CLASSES), "classes": list(CLASSES),
        "multi_label": True, "seed": 0,
    }  # fmt: skip
    parts = (instantiate(config[name]) for name in ("transform", "sampler"))
    save_release(Trained(built, *parts, config, 4, path), path)
    return path


def config(path: Path, **options: Any) -> ExportConfig:
    return ExportConfig(out=str(path.parent / "out"), checkpoint=str(path), **options)


def check_export(path: Path, **options: Any) -> dict[str, Any]:
    """Export, then compare both files with the model on clips that the command did not see."""
    result = export(config(path, **options))
    out = path.parent / "out"
    assert json.loads((out / "export.json").read_text()) == result
    given = load_trained(checkpoint=path)
    again = load(out / "model.safetensors")
    for name, value in given.model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert 0 <= result["onnx"]["max_abs_diff"] < 1e-4 * max(result["onnx"]["max_abs"], 0.01)
    session = onnxruntime.InferenceSession(str(out / "model.onnx"))
    logits = []
    for batch in (1, 5):
        x_NTCHW = random_clips(given, batch)
        with torch.no_grad():
            wanted_NK = given.model(x_NTCHW).numpy()
        (found_NK,) = session.run(["logit_NK"], {"clip_NTCHW": x_NTCHW.numpy()})
        np.testing.assert_allclose(found_NK, wanted_NK, atol=1e-4 * np.abs(wanted_NK).max())
        logits.append(wanted_NK)
    assert np.concatenate(logits).std(axis=0).min() > 0, "videos must differ to be told apart"
    for name in ("safetensors", "onnx"):
        content = (out / result[name]["file"]).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        assert (result[name]["sha256"], result[name]["bytes"]) == (digest, len(content))
    return result


SMALL = [
    pytest.param(TSN, 3, id="tsn"),
    pytest.param(TSM, 3, id="tsm"),
    pytest.param({**TIN, "backbone": TINY2}, 3, id="tin"),
    pytest.param(TRN, 3, id="trn"),
    pytest.param(non_local(TSN, "embedded"), 3, id="non_local"),
]
LARGE = [
    pytest.param(R2PLUS1D, 2, id="r2plus1d"),
    pytest.param(R3D, 2, id="r3d"),
    pytest.param(SLOWFAST, 4, id="slowfast"),
    pytest.param(PYSLOWFAST, 8, id="pyslowfast"),
    pytest.param(non_local(TIN, "gaussian"), 3, id="tin_non_local_gaussian"),
    pytest.param(non_local(TSM, "dot"), 3, id="tsm_non_local_dot"),
    pytest.param(
        {**TSM, "backbone": TINY2, "tsm": {**TSM["tsm"], "temporal_pool": True}}, 4, id="tsm_pool"
    ),
]


@pytest.mark.parametrize(("model", "count"), SMALL)
def test_rows_agree_for_any_batch(model: dict[str, Any], count: int, tmp_path: Path) -> None:
    model = model | ({"num_segments": count} if "num_segments" in model else {})
    path = make_release(tmp_path / "in.safetensors", model, count)
    result = check_export(path)
    assert result["onnx"]["input"] == {"clip_NTCHW": ["batch", count, 3, 32, 32]}
    assert result["onnx"]["output"] == {"logit_NK": ["batch", len(CLASSES)]}
    assert result["classes"] == list(CLASSES)
    assert result["sampler"]["count"] == count
    graph = onnx.load(tmp_path / "out" / "model.onnx")
    assert {entry.version for entry in graph.opset_import if entry.domain == ""} == {20}
    assert all(node.domain == "" for node in graph.graph.node)  # any runtime has these
    operators = {node.op_type for node in graph.graph.node}
    # A non-local block normalises behind a linear layer, which has nothing to fold it into.
    assert "BatchNormalization" not in operators or "non_local" in model


def test_a_difference_is_measured_on_every_batch(tmp_path: Path) -> None:
    path = make_release(tmp_path / "in.safetensors", TSM)
    model = load_trained(checkpoint=path).model
    clips = [torch.randn(count, 3, 3, 32, 32) for count in (2, 3)]
    module.write_onnx(model, clips[0], tmp_path / "a.onnx", opset=20)
    assert module.compare(model, tmp_path / "a.onnx", clips).relative < 1e-5
    turned = module.compare(lambda x: model(x.flip(1)), tmp_path / "a.onnx", clips)
    assert turned.relative > 1e-3, "the order of the frames must be seen"

    def last_is_off(x: torch.Tensor) -> torch.Tensor:
        return model(x) + 0.5 * (len(x) == 3)

    parity = module.compare(last_is_off, tmp_path / "a.onnx", clips)
    assert parity.max_abs_diff == pytest.approx(0.5, abs=1e-4)
    with pytest.raises(InputError, match=r"logit_NK has shape \(2, 5\), PyTorch has: \(2, 4\)"):
        module.compare(lambda x: model(x)[:, :4], tmp_path / "a.onnx", clips)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "count"), LARGE)
def test_large_rows_agree_for_any_batch(model: dict[str, Any], count: int, tmp_path: Path) -> None:
    model = model | ({"num_segments": count} if "num_segments" in model else {})
    check_export(make_release(tmp_path / "in.safetensors", model, count))


@pytest.mark.slow
def test_check_15_onnx_of_tin_resnet50_equals_eager(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_row("tin", len(CLASSES), {"backbone": "resnet50", "num_segments": 8}).eval()
    settle(model)
    torch.nn.init.normal_(model.head.weight, std=0.1)
    clips = [torch.randn(count, 8, 3, 64, 64) for count in (1, 2, 3)]
    module.write_onnx(model, clips[1], tmp_path / "a.onnx", opset=20)
    parity = module.compare(model, tmp_path / "a.onnx", clips)
    assert parity.max_abs > 0.1
    assert parity.relative < 1e-4


def test_random_clips_differ_between_frames(tmp_path: Path) -> None:
    given = load_trained(checkpoint=make_release(tmp_path / "a.safetensors", TSN))
    x_NTCHW = random_clips(given, 2)
    assert x_NTCHW.shape == (2, 3, 3, 32, 32)
    assert not torch.equal(x_NTCHW[:, 0], x_NTCHW[:, 1])
    assert 0.5 < x_NTCHW.std() < 2


@pytest.mark.parametrize("modality", ["flow", "rgbdiff"])
def test_random_clips_have_the_channels_of_the_model(modality: str, tmp_path: Path) -> None:
    model = {**TSN, "backbone": {**TINY, "in_channels": 6}}
    path = make_release(tmp_path / "a.safetensors", model, modality=modality, length=3)
    given = load_trained(checkpoint=path)
    assert given.model(random_clips(given, 2)).shape == (2, len(CLASSES))
    assert export(config(path, onnx=False))["transform"]["modality"] == modality


@pytest.mark.parametrize("difference", [float("nan"), 1e-3])
def test_a_file_that_differs_does_not_stay(
    difference: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_release(tmp_path / "in.safetensors", TSN)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.onnx").write_text("of an earlier export")
    monkeypatch.setattr(module, "write_onnx", lambda *given: given[2].write_bytes(b""))
    monkeypatch.setattr(module, "compare", lambda *_: module.Parity(difference, 1.0))
    with pytest.raises(InputError, match=r"model\.onnx: logit_NK differs from PyTorch by more"):
        export(config(path))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.safetensors"}
    if difference < 1:
        assert export(config(path, tolerance=1e-2))["onnx"]["max_abs_diff"] == difference


def test_a_file_with_other_weights_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_release(tmp_path / "in.safetensors", TSN)

    def spoil(given: Trained, target: Path) -> None:
        save_release(given, target)
        given.model.head.bias.data += 1e-7

    monkeypatch.setattr(module, "save_release", spoil)
    with pytest.raises(InputError, match=r"does not reproduce the weights: head\.bias"):
        export(config(path, onnx=False))


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_release(tmp_path / "in.safetensors", TSN)
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else real(name)
    )
    with pytest.raises(InputError, match=r"onnxruntime: .*vision-tasks\[export\]"):
        export(config(path))
    assert export(config(path, onnx=False))["onnx"] is None
    assert not (tmp_path / "out" / "model.onnx").exists()


def test_a_model_that_draws_at_random_has_no_onnx_form(tmp_path: Path) -> None:
    model = {**TRN, "num_segments": 4, "trn": {**TRN["trn"], "stochastic_eval": True}}
    path = make_release(tmp_path / "in.safetensors", model, count=4)
    with pytest.raises(InputError, match=r"stochastic_eval: draws frames at random, .*onnx=false"):
        export(config(path))
    assert export(config(path, onnx=False))["safetensors"]["bitwise_equal"]


def test_bad_options_are_named(tmp_path: Path) -> None:
    path = make_release(tmp_path / "in.safetensors", TSN)
    with pytest.raises(InputError, match="tolerance: must not be negative: -1"):
        export(config(path, tolerance=-1))
    with pytest.raises(InputError, match="run_dir, checkpoint: give exactly one of them"):
        export(config(path, run_dir="runs"))
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path) -> None:
    path = make_release(tmp_path / "in.safetensors", TSN)
    done = command("video_mmit.export", f"checkpoint={path}", f"out={tmp_path / 'out'}")
    assert done.code == 0, done.err
    assert "bitwise equal" in done.out
    assert "from PyTorch" in done.out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model.safetensors", "model.onnx", "export.json",
    }  # fmt: skip
    (tmp_path / "text").write_text("no weights")
    done = command("video_mmit.export", f"checkpoint={tmp_path / 'text'}", f"out={tmp_path}")
    assert done.code == 2
    last = done.err.strip().splitlines()[-1]
    assert last.startswith(f"error: {tmp_path}/text: is not a safetensors file")
