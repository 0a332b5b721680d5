"""Published checkpoints: the same outputs after conversion, the transform, every error by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors import safe_open
from torch import Tensor, nn

import face_lfr.tools.convert_faces  # noqa: F401  (stores the schema)
from common.log import InputError
from face_lfr.models.iresnet import IResNet
from face_lfr.models.mobilefacenet import MobileFaceNet
from face_lfr.models.poly_blocks import scaled
from face_lfr.models.polyface import EfficientPolyFace
from face_lfr.models.quality_net import QualityNet
from face_lfr.tests import published_keys as published
from face_lfr.tools.convert_faces import convert, fit, read_checkpoint
from face_lfr.tools.key_maps import detect
from face_lfr.weights import load_trained

WIDTH = 0.125
CONFIGS = str(Path(__file__).parents[1] / "configs")


def narrow(channels: int) -> int:
    return scaled(channels, WIDTH)


def images(size: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(3))


def converted(model: nn.Module, state: dict[str, Tensor], source: str) -> nn.Module:
    model.load_state_dict(fit(state, model.state_dict(), source, Path("f")))
    return model.eval()


def config(*overrides: str) -> Any:
    with initialize_config_dir(CONFIGS, version_base=None):
        return compose("convert_faces", overrides=list(overrides))


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("merge", [True, False])
@torch.no_grad()
def test_polyface_computes_what_the_published_network_does(merge: bool) -> None:
    state = published.random_state(published.polyface((2, 1, 1), 16, 2, narrow))
    net = EfficientPolyFace((2, 1, 1), 16, 107, WIDTH, merge=merge)
    net, x = converted(net, state, "polyface"), images(107)
    feature, normed = published.polyface_features(state, x)
    close(net.embed(x), feature)
    close(net(x), normed)


def test_names_and_shapes_of_the_released_sizes_fit() -> None:
    nets = {
        "polyface": (published.polyface((23, 38, 23)), EfficientPolyFace, {}),
        "quality": (published.quality(), QualityNet, {}),
        "iresnet": (published.iresnet((3, 13, 30, 3)), IResNet, {"layers": (3, 13, 30, 3)}),
        "mobilefacenet": (published.mobilefacenet(), MobileFaceNet, {}),
    }
    for source, (shapes, kind, options) in nets.items():
        with torch.device("meta"):
            net = kind(**options)
            state = {name: torch.empty(shape) for name, shape in shapes.items()}
            assert detect(state) == source
            assert fit(state, net.state_dict(), source, Path("f")).keys() == net.state_dict().keys()


@torch.no_grad()
def test_quality_scores() -> None:
    state, x = published.random_state(published.quality()), images(112, 3)
    net = converted(QualityNet(), state, "quality")
    close(net(x), published.quality_scores(state, x))


@torch.no_grad()
def test_iresnet_features() -> None:
    layers, widths = (1, 2, 1, 1), (8, 12, 16, 24)
    state = published.random_state(published.iresnet(layers, widths, 20))
    net, x = converted(IResNet(layers, widths, 20), state, "iresnet"), images(112)
    close(net(x), published.iresnet_features(state, x))


@pytest.mark.parametrize("blocks", [(1, 1, 2, 1), (2, 1, 1, 1)])
@torch.no_grad()
def test_mobilefacenet_features(blocks: tuple[int, int, int, int]) -> None:
    state = published.random_state(published.mobilefacenet(blocks, 1, 32))
    net, x = converted(MobileFaceNet(blocks, 1, features=32), state, "mobilefacenet"), images(112)
    close(net(x), published.mobilefacenet_features(state, x))


def polyface_config(checkpoint: Path, out: Path, *overrides: str) -> Any:
    small = ("model.blocks=[1,1,1]", f"model.width={WIDTH}", "model.features=8")
    names = (f"checkpoint={checkpoint}", f"out={out}", "train_set=ms1mv3")
    return config(*names, *(small if "model=quality_net" not in overrides else ()), *overrides)


def test_an_image_track_file_becomes_a_release(tmp_path: Path) -> None:
    state = published.random_state(published.polyface((1, 1, 1), 8, wide=narrow))
    old = {n: x for n, x in state.items() if not n.endswith("num_batches_tracked")}
    wrapped = {f"module.base.{name}": value for name, value in old.items()}
    wrapped["module.head.weight"] = torch.zeros(5, 8)
    torch.save({"epoch": 3, "state_dict": wrapped, "best": 0.9}, tmp_path / "ckpt.pth.tar")
    path = convert(polyface_config(tmp_path / "ckpt.pth.tar", tmp_path / "out.safetensors"))
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["config"])
    assert facts["kind"] == "embedding"
    assert facts["train_set"] == "ms1mv3"
    assert facts["transform"] == {
        "_target_": "face_lfr.data.transforms.FaceTransform",
        "size": 112, "colour": "bgr", "crop_first": True, "resize": 235,
        "centre": 127.5, "scale": 79.6875,
    }  # fmt: skip
    trained = load_trained(checkpoint=path)
    assert trained.transform.input_size == trained.model.input_size == 235
    assert not trained.model.training
    weight = trained.model.state_dict()["stage_b.0.branches.entry.convs.0.conv.weight"]
    parts = [state[f"b20.0.branch{part}.conv.weight"] for part in ("0.0", "1")]
    assert torch.equal(weight, torch.cat(parts))


def test_both_networks_of_the_video_track_file(tmp_path: Path) -> None:
    feature = published.random_state(published.polyface((1, 1, 1), 8, wide=narrow))
    quality = published.random_state(published.quality())
    content = {
        "ckpt_feature": {f"module.base.{name}": value for name, value in feature.items()},
        "ckpt_quality": {f"module.base.{name}": value for name, value in quality.items()},
    }
    torch.save(content, tmp_path / "qan.pth.tar")
    checkpoint, out = tmp_path / "qan.pth.tar", tmp_path / "out.safetensors"
    assert load_trained(checkpoint=convert(polyface_config(checkpoint, out))).kind == "embedding"
    convert(polyface_config(checkpoint, out, "model=quality_net"))
    trained = load_trained(checkpoint=out)
    assert trained.kind == "quality"
    assert trained.transform.input_size == 112
    assert trained.config["transform"]["colour"] == "bgr"
    with torch.no_grad():
        close(trained.model(images(112)), published.quality_scores(quality, images(112)))


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod."])
def test_an_insightface_file_becomes_a_release(tmp_path: Path, wrapper: str) -> None:
    layers, widths = (1, 1, 1, 1), (8, 8, 8, 8)
    state = published.random_state(published.iresnet(layers, widths, 16))
    torch.save({f"{wrapper}{n}": x for n, x in state.items()}, tmp_path / "backbone.pth")
    small = ("model=ir50", "model.layers=[1,1,1,1]", "model.widths=[8,8,8,8]", "model.features=16")
    names = (f"checkpoint={tmp_path / 'backbone.pth'}", f"out={tmp_path / 'new' / 'o.safetensors'}")
    trained = load_trained(checkpoint=convert(config(*names, *small, "train_set=glint360k")))
    facts = trained.config["transform"]
    assert (facts["colour"], facts["crop_first"], facts["centre"]) == ("rgb", False, 127.5)
    assert facts["scale"] == 127.5
    with torch.no_grad():
        close(trained.model(images(112)), published.iresnet_features(state, images(112)))


def test_every_misfit_is_listed() -> None:
    state = published.random_state(published.iresnet((1, 1, 1, 1), (8, 8, 8, 8), 16))
    del state["layer3.0.bn2.weight"]
    state["fc.bias"] = torch.zeros(17)
    state["layer9.0.conv1.weight"] = torch.zeros(1)
    net = IResNet((1, 1, 1, 1), (8, 8, 8, 8), 16)
    with pytest.raises(InputError) as error:
        fit(state, net.state_dict(), "iresnet", Path("b.pth"))
    said = str(error.value)
    assert said.startswith("b.pth: is not a checkpoint of this network: ")
    assert "unknown: layer9.0.conv1.weight" in said
    assert "missing (by our names): layer3.0.bn2.weight" in said
    assert "wrong shapes: fc.bias (17,) not (16,)" in said


def test_a_broken_parallel_convolution_is_named() -> None:
    state = published.random_state(published.polyface((1, 1, 1), 8, 1, narrow))
    net = EfficientPolyFace((1, 1, 1), 8, 75, WIDTH)
    state["b20.0.branch1.conv.weight"] = torch.zeros(24, 5, 1, 1)
    with pytest.raises(InputError, match=r"unknown: .*b20\.0\.branch1\.conv\.weight"):
        fit(state, net.state_dict(), "polyface", Path("f"))
    del state["b20.0.branch1.conv.weight"]
    with pytest.raises(InputError, match=r"wrong shapes: stage_b\.0\.branches\.entry\.convs\.0"):
        fit(state, net.state_dict(), "polyface", Path("f"))


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_checkpoint(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("weights")
    with pytest.raises(InputError, match="is not a PyTorch file of tensors"):
        read_checkpoint(tmp_path / "text.pth")
    torch.save({"model": Path("/")}, tmp_path / "object.pth")
    with pytest.raises(InputError, match=r"could run code.*PosixPath"):
        read_checkpoint(tmp_path / "object.pth")
    torch.save({"state_dict": {"a": torch.zeros(1), "b": 2}}, tmp_path / "mixed.pth")
    with pytest.raises(InputError, match=r"no tensors: \['b'\]"):
        read_checkpoint(tmp_path / "mixed.pth")
    torch.save({"a.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"no known source; the first is: a\.weight"):
        convert(polyface_config(tmp_path / "other.pth", tmp_path / "o"))


def test_settings_that_no_shape_shows(tmp_path: Path) -> None:
    state = published.random_state(published.polyface((1, 1, 1), 8, wide=narrow))
    torch.save({"state_dict": state}, tmp_path / "c.pth")
    with pytest.raises(InputError, match=r"model\.keep: is 0.8 in the published network: 0.9"):
        convert(polyface_config(tmp_path / "c.pth", tmp_path / "o", "model.keep=0.9"))
    with pytest.raises(InputError, match=r"model\.input_size: is 235"):
        convert(polyface_config(tmp_path / "c.pth", tmp_path / "o", "model.input_size=236"))
    with pytest.raises(InputError, match="source: must be one of auto, polyface"):
        convert(polyface_config(tmp_path / "c.pth", tmp_path / "o", "source=caffe"))
    with pytest.raises(InputError, match="model: cannot be built"):
        convert(polyface_config(tmp_path / "c.pth", tmp_path / "o", "model.input_size=112"))
    assert not (tmp_path / "o").exists()
