"""`export`: one safetensors file and ONNX, both equal to the network, and what it states."""

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.log import InputError
from face_lfr import export as module
from face_lfr import load
from face_lfr.export import ExportConfig, export, random_images
from face_lfr.tests.launch import command
from face_lfr.tests.releases import IR, MOBILE, POLY, QUALITY, transform_node, write
from face_lfr.weights import Trained, load_trained, read_safetensors, save_release

POLY_IMAGES = transform_node(
    size=48, colour="bgr", crop_first=True, resize=75, centre=127.5, scale=79.6875
)


def config(path: Path, **options: Any) -> ExportConfig:
    return ExportConfig(out=str(path.parent / "out"), checkpoint=str(path), **options)


def run(path: Path, image_BCHW: Tensor) -> np.ndarray:
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    session = onnxruntime.InferenceSession(str(path))
    (found,) = session.run(None, {"image_BCHW": image_BCHW.numpy()})
    return np.asarray(found)


def check_export(path: Path, **options: Any) -> dict[str, Any]:
    """Export, then compare both files with the network on images the command did not see."""
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    result = export(config(path, **options))
    out = path.parent / "out"
    assert json.loads((out / "export.json").read_text()) == result
    given = load_trained(checkpoint=path)
    again = load(out / "model.safetensors")
    for name, value in given.model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    test_feature: Any = given.model.embed if given.kind == "embedding" else given.model
    for batch in (1, 4):
        image_BCHW = random_images(given, batch)
        with torch.no_grad():
            wanted = test_feature(image_BCHW).numpy()
        found = run(out / "model.onnx", image_BCHW)
        largest = np.abs(wanted).max()
        assert largest > 0.05
        np.testing.assert_allclose(found, wanted, atol=1e-4 * largest)
    assert wanted.std(axis=0).min() > 1e-3, "images must differ to be told apart"
    assert 0 <= result["onnx"]["max_abs_diff"] < 1e-4 * result["onnx"]["max_abs"]
    for name in ("safetensors", "onnx"):
        content = (out / result[name]["file"]).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        assert (result[name]["sha256"], result[name]["bytes"]) == (digest, len(content))
    assert {entry.name for entry in out.iterdir()} == {
        "model.safetensors", "model.onnx", "export.json",
    }  # fmt: skip
    return result


def operators(path: Path) -> dict[str, int]:
    onnx = pytest.importorskip("onnx", reason="the extra `export` is not installed")
    graph = onnx.load(path)
    assert {entry.version for entry in graph.opset_import if entry.domain == ""} == {20}
    assert all(node.domain == "" for node in graph.graph.node)  # any runtime has these
    names = [node.op_type for node in graph.graph.node]
    return {name: names.count(name) for name in names}


def test_a_recogniser(tmp_path: Path) -> None:
    result = check_export(write(tmp_path / "in.safetensors", IR))
    assert result["onnx"]["input"] == {"image_BCHW": ["batch", 3, 24, 24]}
    assert result["onnx"]["output"] == {"feature_BD": ["batch", 16]}
    assert result["onnx"]["folded"]
    assert (result["kind"], result["step"], result["trained_on"]) == ("embedding", 3, "drawn")
    # The norms in front of padded convolutions stay, one in each of four blocks.
    assert operators(tmp_path / "out" / "model.onnx").get("BatchNormalization", 0) == 4
    assert result["output"]["features"] == 16
    assert result["output"]["flip_averaging"] is True
    left_eye = [38.2946 * 24 / 112, 51.6963 * 24 / 112]
    assert result["input"]["landmarks"][0] == pytest.approx(left_eye, abs=1e-4)


def test_a_quality_network(tmp_path: Path) -> None:
    result = check_export(write(tmp_path / "in.safetensors", QUALITY))
    assert result["onnx"]["output"] == {"score_B": ["batch"]}
    assert (result["kind"], result["output"]["features"]) == ("quality", 1)
    assert result["output"]["flip_averaging"] is False
    assert "without a mirror image" in result["output"]["use"]


@pytest.mark.slow
def test_a_mobilefacenet(tmp_path: Path) -> None:
    result = check_export(write(tmp_path / "in.safetensors", MOBILE))
    assert result["onnx"]["folded"]
    assert "BatchNormalization" not in operators(tmp_path / "out" / "model.onnx")


@pytest.mark.slow
def test_a_polyface_gives_the_feature_before_its_last_norm(tmp_path: Path) -> None:
    path = write(tmp_path / "in.safetensors", POLY, POLY_IMAGES)
    result = check_export(path)
    assert result["onnx"]["folded"]
    assert "BatchNormalization" not in operators(tmp_path / "out" / "model.onnx")
    given = load_trained(checkpoint=path)
    image_BCHW = random_images(given, 3)
    found = run(tmp_path / "out" / "model.onnx", image_BCHW)
    with torch.no_grad():
        feature, before = given.model(image_BCHW).numpy(), given.model.embed(image_BCHW).numpy()
    np.testing.assert_allclose(found, before, atol=1e-4 * np.abs(before).max())
    assert np.abs(found - feature).max() > 0.05 * np.abs(before).max()
    assert result["input"]["colour"] == "bgr"
    assert result["input"]["crop"] == "first row and first column dropped"
    assert (result["input"]["aligned_size"], result["input"]["size"]) == (48, 75)


def test_what_a_caller_must_know_about_images_is_what_the_transform_does(tmp_path: Path) -> None:
    path = write(tmp_path / "in.safetensors", POLY, POLY_IMAGES)
    stated = export(config(path, onnx=False))["input"]
    assert stated["values"]["map"] == "(v - 127.5) / 79.6875, v in 0..255"
    assert stated["values"]["range"] == pytest.approx([-1.6, 1.6])
    assert (stated["resize"], stated["resize_mode"]) == (75, "torch")
    transform = load_trained(checkpoint=path).transform
    assert stated["contract"] == transform.contract()
    image_HWC = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8)
    x_HWC = image_HWC[1:, 1:, ::-1].astype(np.float32)  # crop, order of the channels
    x_3HW = torch.from_numpy(np.ascontiguousarray(x_HWC.transpose(2, 0, 1)))
    x_13SS = nn.functional.interpolate(x_3HW[None], (stated["size"],) * 2, mode="bilinear")
    values = stated["values"]
    wanted = (x_13SS - values["centre"]) / values["scale"]
    torch.testing.assert_close(transform.normalize(transform.test(image_HWC)[None]), wanted)


def test_a_plain_transform_states_no_resize(tmp_path: Path) -> None:
    stated = export(config(write(tmp_path / "in.safetensors", IR), onnx=False))["input"]
    assert (stated["colour"], stated["crop"], stated["resize"]) == ("rgb", "none", None)
    assert stated["resize_mode"] is None
    assert stated["values"]["range"] == [-1.0, 1.0]


@pytest.mark.slow
def test_a_run_is_exported_without_its_classifier(run: Path, tmp_path: Path) -> None:
    result = export(ExportConfig(out=str(tmp_path), run_dir=str(run), onnx=False))
    state, metadata = read_safetensors(tmp_path / "model.safetensors")
    assert set(state) == set(load_trained(run).model.state_dict())
    assert not any("objective" in name or "classifier" in name for name in state)
    assert set(json.loads(metadata["config"])) == {
        "model", "transform", "train_set", "num_classes", "seed", "kind",
    }  # fmt: skip
    assert (result["step"], result["onnx"]) == (40, None)


class Fake:
    """A stand-in for ONNX: files are written, and differ by what is asked for."""

    def __init__(self, patch: pytest.MonkeyPatch, *differences: float):
        self.written: list[nn.Module] = []
        left = list(differences)
        patch.setattr(module, "check_installed", lambda: None)
        patch.setattr(module, "write_onnx", self.write)
        patch.setattr(module, "compare", lambda *_: module.Parity(left.pop(0), 1.0))

    def write(self, net: nn.Module, image: Tensor, path: Path, output: str, opset: int) -> None:
        self.written.append(net)
        path.write_bytes(b"onnx")


@pytest.mark.parametrize("difference", [float("nan"), 1e-3])
def test_a_file_that_differs_does_not_stay(
    difference: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "in.safetensors", IR)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.onnx").write_text("of an earlier export")
    Fake(monkeypatch, difference, difference)
    with pytest.raises(InputError, match=r"model\.onnx: feature_BD differs from PyTorch by more"):
        export(config(path))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.safetensors"}
    if difference < 1:
        Fake(monkeypatch, difference)
        assert export(config(path, tolerance=1e-2))["onnx"]["max_abs_diff"] == difference


def test_norms_that_do_not_fold_well_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "in.safetensors", IR)
    fake = Fake(monkeypatch, 0.5, 1e-6)
    result = export(config(path))["onnx"]
    assert (result["folded"], result["max_abs_diff"]) == (False, 1e-6)
    assert "folded norms differ by 0.5" in caplog.text
    folded, plain = (sum(1 for _ in net.parameters()) for net in fake.written)
    assert folded < plain

    def refuse(_: nn.Module) -> nn.Module:
        raise ValueError("a norm without running statistics cannot be folded")

    monkeypatch.setattr(module, "folded", refuse)
    Fake(monkeypatch, 1e-6)
    assert export(config(path))["onnx"]["folded"] is False
    assert "without running statistics" in caplog.text


def test_a_broken_writer_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "in.safetensors", IR)

    def half(net: nn.Module, image: Tensor, part: Path, output: str, opset: int) -> None:
        part.write_bytes(b"half")
        raise RuntimeError("no such operator")

    Fake(monkeypatch)
    monkeypatch.setattr(module, "write_onnx", half)
    with pytest.raises(RuntimeError, match="no such operator"):
        export(config(path))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.safetensors"}


def test_a_difference_is_measured_on_every_batch(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="the extra `export` is not installed")
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    make, kind = onnx.helper, onnx.TensorProto.FLOAT
    sum_node = make.make_node("ReduceSum", ["image_BCHW", "axes"], ["out"], keepdims=0)
    axes = make.make_tensor("axes", onnx.TensorProto.INT64, [3], [1, 2, 3])
    ends = [
        make.make_tensor_value_info("image_BCHW", kind, ["batch", 3, 2, 2]),
        make.make_tensor_value_info("out", kind, ["batch"]),
    ]
    graph = make.make_graph([sum_node], "sum", ends[:1], ends[1:], [axes])
    made = make.make_model(graph, opset_imports=[make.make_opsetid("", 20)], ir_version=10)
    onnx.save(made, tmp_path / "a.onnx")
    images = [torch.randn(count, 3, 2, 2) for count in (1, 2, 5)]

    def total(image_BCHW: Tensor) -> Tensor:
        return image_BCHW.sum(dim=(1, 2, 3)) + 0.5 * (len(image_BCHW) == 5)

    parity = module.compare(total, tmp_path / "a.onnx", images, "out")
    assert parity.max_abs_diff == pytest.approx(0.5, abs=1e-4)
    largest = max(float(total(image).abs().max()) for image in images)
    assert parity.max_abs == pytest.approx(largest, rel=1e-5)
    assert parity.relative == pytest.approx(0.5 / largest, rel=1e-3)
    with pytest.raises(InputError, match=r"out has shape \(1,\), PyTorch has: \(1, 1\)"):
        module.compare(
            lambda x: total(x)[:, None],
            tmp_path / "a.onnx", images, "out",
        )  # fmt: skip


@pytest.mark.parametrize("what", ["weights", "output", "images"])
def test_a_release_that_differs_is_an_error(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "in.safetensors", IR)

    def spoil(given: Trained, target: Path) -> None:
        save_release(given, target)
        if what == "weights":
            given.model.fc.bias.data += 1e-6
        elif what == "output":
            given.model.bn2.eps *= 2
        else:
            given.transform.colour = "bgr"

    monkeypatch.setattr(module, "save_release", spoil)
    message = {
        "weights": r"does not reproduce the weights: fc\.bias",
        "output": "does not reproduce the output",
        "images": "does not reproduce how images are prepared",
    }[what]
    with pytest.raises(InputError, match=message):
        export(config(path, onnx=False))


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "in.safetensors", IR)
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnx" else real(name)
    )
    with pytest.raises(InputError, match=r"onnx: .*vision-tasks\[export\]"):
        export(config(path))
    assert export(config(path, onnx=False))["onnx"] is None
    assert not (tmp_path / "out" / "model.onnx").exists()


def test_bad_options_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "in.safetensors", IR)
    with pytest.raises(InputError, match="tolerance: must not be negative: -1"):
        export(config(path, tolerance=-1))
    with pytest.raises(InputError, match="run_dir, checkpoint: give exactly one of them"):
        export(config(path, run_dir="runs", onnx=False))
    unfit = write(tmp_path / "unfit.safetensors", IR, transform_node(size=32))
    with pytest.raises(InputError, match="the model takes 24 px"):
        export(config(unfit, onnx=False))
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path) -> None:
    path = write(tmp_path / "in.safetensors", IR)
    words = [f"checkpoint={path}", f"out={tmp_path / 'out'}", "onnx=false"]
    done = command("face_lfr.export", *words)
    assert done.code == 0, done.err
    assert "bitwise equal" in done.out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model.safetensors", "export.json",
    }  # fmt: skip
    (tmp_path / "text").write_text("no weights")
    done = command("face_lfr.export", f"checkpoint={tmp_path / 'text'}", f"out={tmp_path}")
    assert done.code == 2
    last = done.err.strip().splitlines()[-1]
    assert last.startswith(f"error: {tmp_path}/text: is not a safetensors file")
