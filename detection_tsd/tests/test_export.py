"""`export`: a release without siblings and an ONNX file, both with the detections of the model."""

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.log import InputError
from detection_tsd import export as module
from detection_tsd import load
from detection_tsd.data.detection_data import Detections
from detection_tsd.export import (
    Example,
    ExportConfig,
    detect,
    export,
    make_examples,
    partners,
    without_sibling,
)
from detection_tsd.onnx_network import Network
from detection_tsd.tests import releases
from detection_tsd.tests.launch import command
from detection_tsd.weights import load_trained, open_trained, read_safetensors


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TSD detector without an RPN, with its sibling."""
    path = tmp_path_factory.mktemp("fixed") / "in.safetensors"
    return releases.write(path, "experiment=synth/tsd", *releases.FAST)


def cfg(path: Path, out: Path, **options: Any) -> ExportConfig:
    given: dict[str, Any] = {"height": 64, "width": 96, "unmatched": 0.0} | options
    return ExportConfig(out=str(out), checkpoint=str(path), **given)


def equal(a: Detections, b: Detections) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))


def keys(path: Path) -> set[str]:
    return set(read_safetensors(path)[0])


def test_check_08_a_stripped_release_gives_identical_detections(
    fixed: Path, tmp_path: Path
) -> None:
    result = export(cfg(fixed, tmp_path, onnx=False))
    assert json.loads((tmp_path / "export.json").read_text()) == result
    whole, alone = open_trained(fixed), open_trained(tmp_path / "model.safetensors")
    gone = keys(fixed) - keys(tmp_path / "model.safetensors")
    assert gone
    assert all(name.startswith("head.sibling.") for name in gone)
    assert not any("sibling" in name for name, _ in alone.model.named_parameters())
    examples = make_examples(whole, (72, 88), seed=9)  # others than the command has seen
    wanted: list[Detections] = [detect(whole.model, one) for one in examples]  # type: ignore[arg-type]
    assert all(len(found.score_D) > 20 for found in wanted)
    assert all(
        equal(detect(alone.model, one), found)  # type: ignore[arg-type]
        for one, found in zip(examples, wanted, strict=True)
    )
    with torch.no_grad():
        for parameter in whole.model.head.sibling.parameters():  # type: ignore[union-attr]
            parameter.normal_()
    assert equal(detect(whole.model, examples[0]), wanted[0])  # type: ignore[arg-type]
    assert result["parameters"]["release"] < result["parameters"]["training"]
    assert result["parameters"]["release"] == sum(p.numel() for p in alone.model.parameters())
    assert (alone.step, alone.classes, alone.class_ids) == (7, whole.classes, whole.class_ids)
    head = alone.config["model"]["head"]
    assert (head["joint"], head["margin_cls"], head["margin_box"]) == (False, None, None)
    assert whole.config["model"]["head"]["joint"] is True


def test_a_stripped_release_is_exported_again(fixed: Path, tmp_path: Path) -> None:
    export(cfg(fixed, tmp_path / "a", onnx=False))
    again = export(cfg(tmp_path / "a" / "model.safetensors", tmp_path / "b", onnx=False))
    assert again["parameters"]["training"] == again["parameters"]["release"]
    (one, said), (two, again_said) = (
        read_safetensors(tmp_path / name / "model.safetensors") for name in "ab"
    )
    assert said == again_said
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.parametrize("words", [
    ("experiment=synth/sibling",), ("experiment=synth/double_head",),
    ("experiment=debug/rpn", releases.MASK),
])  # fmt: skip
def test_other_heads_are_exported(words: tuple[str, ...], tmp_path: Path) -> None:
    path = releases.write(tmp_path / "in.safetensors", *words)
    result = export(cfg(path, tmp_path / "out", onnx=False))
    assert result["safetensors"]["bitwise_equal"]
    assert not load(tmp_path / "out" / "model.safetensors").training


def test_every_tsd_head_of_a_node_is_stripped() -> None:
    tsd = {"_target_": "detection_tsd.models.tsd_head.TSDHead", "joint": True, "margin_box": 0.2}
    other = {"_target_": "detection_tsd.models.sibling_head.SiblingHead", "width": 8}
    node = {"heads": [{"_target_": "x.with_stds", "head": tsd}, {"head": other}], "plus": 0.0}
    found = without_sibling(node)
    off = {"joint": False, "margin_cls": None, "margin_box": None}
    assert found["heads"][0]["head"] == {**tsd, **off}
    assert found["heads"][1] == {"head": other}
    assert tsd["joint"] is True


@pytest.mark.slow
def test_a_cascade_of_a_run_is_stripped(tmp_path: Path, tiny: list[str]) -> None:
    from detection_tsd.tests.launch import train

    # The cascade's own proposals: the fixed ones of the small set.
    train(*tiny, "model=cascade", "model.rpn=null", f"run_dir={tmp_path / 'run'}", "steps=1")
    result = export(ExportConfig(out=str(tmp_path), run_dir=str(tmp_path / "run"), onnx=False))
    assert result["step"] == 1
    gone = {name.split(".")[1] for name in keys_of_run(tmp_path / "run") - keys(
        tmp_path / "model.safetensors")}  # fmt: skip
    assert gone == {"0", "1", "2"}


def keys_of_run(run: Path) -> set[str]:
    return set(load_trained(run).model.state_dict())


@pytest.mark.slow
def test_a_run_becomes_a_release(run: Path, tmp_path: Path) -> None:
    result = export(ExportConfig(out=str(tmp_path), run_dir=str(run), onnx=False))
    assert (result["step"], result["onnx"]) == (40, None)
    metadata = read_safetensors(tmp_path / "model.safetensors")[1]
    assert {"model", "transform", "classes"} <= set(json.loads(metadata["config"]))
    assert "data" not in json.loads(metadata["config"])


def run_file(path: Path, network: Network, example: Example) -> list[Tensor]:
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options)
    given = [value.numpy() for value in example if value is not None]
    found = session.run(None, dict(zip(network.inputs, given, strict=True)))
    return [torch.from_numpy(np.asarray(value)) for value in found]


@pytest.mark.slow
def test_onnx_of_a_whole_detector_with_masks(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    words = ("experiment=debug/rpn", "head=sibling_small", "++head.samples=1", releases.MASK,
             "++model.mask.samples=1", "post.per_image=30")  # fmt: skip
    path = releases.write(tmp_path / "in.safetensors", *words)
    result = export(cfg(path, tmp_path / "out", optimize=False))
    onnx = result["onnx"]
    assert (onnx["unmatched"], onnx["detections"]) == (0, 60)
    assert onnx["max_box_diff"] < 1e-2
    assert onnx["input"] == {"image_13HW": [1, 3, 64, 96], "size_2": [2]}
    assert list(onnx["output"]) == ["box_D4", "score_D", "label_D", "mask_DSS"]
    file = tmp_path / "out" / "model.onnx"
    assert onnx["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    names = {item.name for item in (tmp_path / "out").iterdir()}
    assert names == {"model.safetensors", "model.onnx", "export.json"}
    check_operators(file)
    trained = open_trained(path)
    network = Network(trained.model).eval()  # type: ignore[arg-type]
    for example in make_examples(trained, (64, 96), seed=5):  # others than the command has seen
        box_D4, score_D, label_D, mask_DSS = run_file(file, network, example)
        wanted = detect(network.detector, example)
        torch.testing.assert_close(box_D4, wanted.box_D4, atol=1e-2, rtol=0)
        torch.testing.assert_close(score_D, wanted.score_D, atol=1e-4, rtol=0)
        assert torch.equal(label_D, wanted.label_D)
        torch.testing.assert_close(mask_DSS, wanted.mask_DSS, atol=1e-3, rtol=0)
        assert len(set(label_D.tolist())) > 1


def check_operators(path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="the extra `export` is not installed")
    graph = onnx.load(path)
    assert {entry.version for entry in graph.opset_import if entry.domain == ""} == {20}
    assert all(node.domain == "" for node in graph.graph.node)  # any runtime has these
    assert any(node.op_type == "NonMaxSuppression" for node in graph.graph.node)


@pytest.mark.slow
def test_onnx_of_tsd_takes_any_number_of_proposals(fixed: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    result = export(cfg(fixed, tmp_path))
    assert result["onnx"]["unmatched"] == 0
    assert result["onnx"]["input"]["proposals_M4"] == ["proposals", 4]
    assert result["onnx"]["proposals_tried"] == [60, 20]
    trained = open_trained(fixed)
    network = Network(trained.model).eval()  # type: ignore[arg-type]
    example = make_examples(trained, (64, 96), seed=5)[0]
    assert example.proposals_M4 is not None
    for count in (0, 1, 13, 60):
        one = example._replace(proposals_M4=example.proposals_M4[:count])
        box_D4, score_D, label_D = run_file(tmp_path / "model.onnx", network, one)
        wanted = detect(network.detector, one)
        found = len(wanted.score_D)
        assert found == int((score_D > 0).sum())
        assert len(score_D) == 100
        torch.testing.assert_close(box_D4[:found], wanted.box_D4, atol=1e-2, rtol=0)
        torch.testing.assert_close(score_D[:found], wanted.score_D, atol=1e-4, rtol=0)
        assert torch.equal(label_D[:found], wanted.label_D)
        assert not label_D[found:].any()


def found_of(*rows: tuple[float, float, int]) -> Detections:
    """Detections of boxes (x, 0, x + 10, 10)."""
    box_D4 = torch.tensor([[x, 0.0, x + 10, 10.0] for x, _, _ in rows]).reshape(-1, 4)
    score_D = torch.tensor([score for _, score, _ in rows])
    return Detections(box_D4, score_D, torch.tensor([label for *_, label in rows]))


@pytest.mark.parametrize(
    ("other", "unmatched"),
    [
        (found_of((0, 0.9, 1), (20, 0.5, 2)), 0),
        (found_of((20, 0.5, 2), (0, 0.9, 1)), 0),  # another order
        (found_of((0.09, 0.9, 1), (20, 0.5, 2)), 0),
        (found_of((0.2, 0.9, 1), (20, 0.5, 2)), 1),
        (found_of((0, 0.8, 1), (20, 0.5, 2)), 1),
        (found_of((0, 0.9, 2), (20, 0.5, 2)), 1),
        (found_of((0, 0.9, 1)), 1),
        (found_of((0, 0.9, 1), (20, 0.5, 2), (40, 0.4, 3)), 1),
        (found_of(), 2),
        (found_of((float("nan"), 0.9, 1), (20, 0.5, 2)), 1),
    ],
)
def test_detections_have_partners(other: Detections, unmatched: int) -> None:
    parity = partners(found_of((0, 0.9, 1), (20, 0.5, 2)), other, 0.1, 0.01)
    assert parity.unmatched == unmatched
    assert parity.max_box_diff <= 0.1
    assert partners(found_of(), found_of(), 0.1, 0.01) == module.Parity(0, 0, 0.0, 0.0)


def test_masks_of_partners_are_compared() -> None:
    one = found_of((0, 0.9, 1))._replace(mask_DSS=torch.full((1, 4, 4), 0.5))
    assert partners(one, one, 0.1, 0.01).unmatched == 0
    other = one._replace(mask_DSS=torch.full((1, 4, 4), 0.6))
    assert partners(one, other, 0.1, 0.01).unmatched == 1


def test_a_file_that_differs_does_not_stay(
    fixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.onnx").write_text("of an earlier export")
    monkeypatch.setattr(module, "write_graph", lambda *given: given[2].write_bytes(b""))
    monkeypatch.setattr(module, "compare", lambda *_: module.Parity(200, 3, 0.0, 0.0))
    with pytest.raises(InputError, match=r"model\.onnx: 3 of 200 detections differ from PyTorch"):
        export(cfg(fixed, tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors"}
    assert export(cfg(fixed, tmp_path, unmatched=0.02))["onnx"]["unmatched"] == 3


def test_a_release_that_differs_is_an_error(
    fixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module.save_stripped

    def spoil(given: Any, path: Path) -> None:
        real(given, path)
        given.model.head.box_predictor.cls_score.bias.data += 1e-6

    monkeypatch.setattr(module, "save_stripped", spoil)
    what = r"does not reproduce the weights: head\.box_predictor\.cls_score\.bias"
    with pytest.raises(InputError, match=what):
        export(cfg(fixed, tmp_path, onnx=False))


def test_examples_are_noise_with_a_padded_part(fixed: Path) -> None:
    trained = open_trained(fixed)
    first, second = make_examples(trained, (64, 96), seed=0)
    assert first.size_2.tolist() == [64, 96]
    assert second.size_2.tolist() == [48, 76]
    assert not second.image_13HW[:, :, 48:].any()
    assert not second.image_13HW[..., 76:].any()
    assert 0.5 < first.image_13HW.std() < 3
    for example, count in ((first, 60), (second, 20)):
        assert example.proposals_M4 is not None
        assert len(example.proposals_M4) == count
        assert (example.proposals_M4[:, 2:] >= example.proposals_M4[:, :2]).all()


def test_the_size_of_the_input(tmp_path: Path, fixed: Path) -> None:
    trained = open_trained(fixed)
    check = module._check
    assert check(ExportConfig(out="x"), trained) == (256, 256)
    assert check(ExportConfig(out="x", height=64), trained) == (64, 256)
    words = ("experiment=synth/sibling", "transform=coco_800")
    resizing = open_trained(releases.write(tmp_path / "a.safetensors", *words))
    assert check(ExportConfig(out="x"), resizing) == (800, 1344)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": -1.0}, "tolerance: must not be negative: -1"),
        ({"unmatched": 1.0}, r"unmatched: must be in \[0, 1\): 1.0"),
        ({"height": 65}, "height: must be a multiple of 8: 65"),
        ({"width": 0}, "width: must be a multiple of 8: 0"),
        ({"run_dir": "runs"}, "run_dir, checkpoint: give exactly one of them"),
    ],
)
def test_bad_options_are_named(
    options: dict[str, Any], message: str, fixed: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        export(cfg(fixed, tmp_path / "out", onnx=False, **options))
    assert not (tmp_path / "out").exists()


def test_a_missing_extra_is_named(
    fixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else real(name)
    )
    with pytest.raises(InputError, match=r"onnxruntime: .*vision-tasks\[export\]"):
        export(cfg(fixed, tmp_path))
    assert export(cfg(fixed, tmp_path, onnx=False))["onnx"] is None
    assert not (tmp_path / "model.onnx").exists()


def test_the_command(fixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = command("detection_tsd.export", f"checkpoint={fixed}", f"out={out}", "onnx=false")
    assert done.code == 0, done.err
    assert "bitwise equal" in done.out
    assert {item.name for item in out.iterdir()} == {"model.safetensors", "export.json"}
    (tmp_path / "text").write_text("no weights")
    done = command("detection_tsd.export", f"checkpoint={tmp_path / 'text'}", f"out={out}")
    assert done.code == 2
    last = done.err.strip().splitlines()[-1]
    assert last.startswith(f"error: {tmp_path}/text: is not a safetensors file")
