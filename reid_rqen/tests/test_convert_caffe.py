"""Conversion of Caffe blobs."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from common.log import InputError
from reid_rqen.models.googlenet_bn import BLOCKS, GoogLeNetBN
from reid_rqen.models.quality import ImageQuality, Pool2FC
from reid_rqen.models.rqen import RQEN
from reid_rqen.tools.convert_caffe import convert, read_blobs

RNG = np.random.default_rng(0)
CLASSES = 300


def random(*shape: int) -> np.ndarray:
    return RNG.random(shape, dtype=np.float32) - 0.4


def conv_bn(blobs: dict[str, np.ndarray], layer: str, *shape: int) -> None:
    blobs[f"{layer}/0"] = random(*shape)
    blobs[f"{layer}/bn/0"], blobs[f"{layer}/bn/1"] = random(shape[0]), random(shape[0]) + 1
    blobs[f"{layer}/bn/2"] = np.array([4.0], np.float32)
    blobs[f"{layer}/bn/sc/0"], blobs[f"{layer}/bn/sc/1"] = random(shape[0]), random(shape[0])


def caffe_trunk() -> dict[str, np.ndarray]:
    """Blobs with the layer names and widths of the published prototxt, written out by hand."""
    blobs: dict[str, np.ndarray] = {}
    conv_bn(blobs, "conv1/7x7_s2", 64, 3, 7, 7)
    conv_bn(blobs, "conv2/3x3_reduce", 64, 64, 1, 1)
    conv_bn(blobs, "conv2/3x3", 192, 64, 3, 3)
    inputs = {"3a": 192, "3b": 256, "3c": 320, "4a": 576, "5a": 1024, "5b": 1024}
    for name, w in BLOCKS.items():
        block, c = f"inception_{name}", inputs.get(name, 576)
        if name not in ("3c", "4e"):
            conv_bn(blobs, f"{block}/1x1", w.one, c, 1, 1)
            conv_bn(blobs, f"{block}/pool_proj", w.projection, c, 1, 1)
        conv_bn(blobs, f"{block}/3x3_reduce", w.three[0], c, 1, 1)
        conv_bn(blobs, f"{block}/3x3", w.three[1], w.three[0], 3, 3)
        conv_bn(blobs, f"{block}/double3x3_reduce", w.double[0], c, 1, 1)
        conv_bn(blobs, f"{block}/double3x3a", w.double[1], w.double[0], 3, 3)
        conv_bn(blobs, f"{block}/double3x3b", w.double[2], w.double[1], 3, 3)
    return blobs


def affine(blobs: dict[str, np.ndarray], layer: str, *shape: int) -> None:
    blobs[f"{layer}/0"], blobs[f"{layer}/1"] = random(*shape), random(shape[0])


def caffe_pqan(pool2: bool = False) -> dict[str, np.ndarray]:
    blobs = caffe_trunk()
    for i, (channels, cells) in enumerate(((576, 16), (1024, 4)), start=1):
        conv_bn(blobs, f"loss{i}/conv", 128, channels, 1, 1)
        conv_bn(blobs, f"loss{i}/fc", 1024, 128 * cells)
        affine(blobs, f"loss{i}/classifier_1", CLASSES, 1024)
    affine(blobs, "loss3/classifier_1", CLASSES, 1024)
    if pool2:
        affine(blobs, "conv1_sss1", 32, 192, 3, 3)
        affine(blobs, "conv1_sss2", 32, 32, 3, 3)
        affine(blobs, "fc1_s", 3, 150_528)
    else:
        affine(blobs, "conv1_s", 64, 3, 7, 7)
        affine(blobs, "conv1_sss1", 64, 64, 3, 3)
        affine(blobs, "conv2_s", 64, 64, 3, 3)
        affine(blobs, "fc1_s", 3, 4096)
    return blobs


def test_trunk_of_an_imagenet_model() -> None:
    blobs = caffe_trunk()
    state = convert(blobs, "imagenet")
    trunk = GoogLeNetBN().eval()
    trunk.load_state_dict({k.removeprefix("trunk."): v for k, v in state.items()})
    # The first layer in Caffe's terms: statistics over their factor, then scale.
    layer, image = "conv1/7x7_s2", torch.rand(1, 3, 32, 32)
    b = {key: torch.from_numpy(blobs[f"{layer}/{key}"]) for key in ("0", "bn/0", "bn/1")}
    x = F.conv2d(image, b["0"], stride=2, padding=3)
    mean, var = b["bn/0"] / 4, b["bn/1"] / 4
    x = (x - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + 1e-5).sqrt()
    scale, shift = (torch.from_numpy(blobs[f"{layer}/bn/sc/{i}"]).view(1, -1, 1, 1) for i in (0, 1))
    torch.testing.assert_close(trunk.conv1(image), (x * scale + shift).relu())
    name = "trunk.blocks.4d.double_a.conv.weight"
    assert np.array_equal(state[name].numpy(), blobs["inception_4d/double3x3a/0"])


@pytest.mark.parametrize("pool2", [False, True])
def test_whole_pqan_network_loads(pool2: bool) -> None:
    blobs = caffe_pqan(pool2)
    state = convert(blobs, "pqan_pool2" if pool2 else "pqan_image")
    model = RQEN(GoogLeNetBN(), Pool2FC(3) if pool2 else ImageQuality(3), CLASSES)
    model.load_state_dict(state)
    assert np.array_equal(state["quality.fc.weight"].numpy(), blobs["fc1_s/0"])
    assert np.array_equal(state["auxiliary.1.fc.weight"].numpy(), blobs["loss2/fc/0"])
    if not pool2:
        assert np.array_equal(state["quality.conv3.weight"].numpy(), blobs["conv2_s/0"])
        assert np.array_equal(state["quality.conv2.weight"].numpy(), blobs["conv1_sss1/0"])


def test_old_blob_shapes_and_unused_statistics() -> None:
    blobs = caffe_pqan()
    blobs["fc1_s/0"] = blobs["fc1_s/0"].reshape(1, 1, 3, 4096)
    blobs["conv1/7x7_s2/bn/2"] = np.zeros(1, np.float32)
    state = convert(blobs, "pqan_image")
    assert state["quality.fc.weight"].shape == (3, 4096)
    assert not state["trunk.conv1.bn.running_var"].any()


def test_missing_unknown_and_misshapen_blobs_are_listed() -> None:
    blobs = caffe_trunk()
    lost = blobs.pop("conv2/3x3/bn/2"), blobs.pop("inception_5b/1x1/0")
    with pytest.raises(
        InputError, match=r"f: 2 missing blobs .*: conv2/3x3/bn/2, inception_5b/1x1/0"
    ):
        convert(blobs, "imagenet", "f")
    blobs["conv2/3x3/bn/2"], blobs["inception_5b/1x1/0"] = lost
    with pytest.raises(InputError, match=r"8 missing blobs .*: conv1_s/0, conv1_s/1"):
        convert(blobs, "pqan_image")
    blobs["loss1/conv/0"] = random(128, 576, 1, 1)
    with pytest.raises(InputError, match=r"missing blobs .*: loss1/conv/bn/0"):
        convert(blobs, "imagenet")
    del blobs["loss1/conv/0"]
    blobs["fc1_s/0"] = random(3, 4096)
    with pytest.raises(InputError, match=r"1 unknown blobs .*: fc1_s/0"):
        convert(blobs, "imagenet")
    del blobs["fc1_s/0"]
    blobs["conv2/3x3/0"] = random(192, 64, 1, 1)
    with pytest.raises(InputError, match=r"input\[conv2/3x3/0\]: shape must be \(192, 64, 3, 3\)"):
        convert(blobs, "imagenet")
    with pytest.raises(InputError, match="kind: need one of"):
        convert(blobs, "vgg")


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_blobs(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(InputError, match=r"text\.npz: not an \.npz"):
        read_blobs(tmp_path / "text.npz")
    np.savez(tmp_path / "pickle.npz", a=np.array([{}], dtype=object))
    with pytest.raises(InputError, match=r"not an \.npz of plain arrays"):
        read_blobs(tmp_path / "pickle.npz")


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", **caffe_trunk())
    command = [sys.executable, "-m", "reid_rqen.tools.convert_caffe", f"input={tmp_path}/in.npz"]
    command += [f"out={tmp_path}/sub/out.safetensors"]
    subprocess.run(command, check=True, timeout=120)
    state = load_file(tmp_path / "sub" / "out.safetensors")
    GoogLeNetBN(weights=str(tmp_path / "sub" / "out.safetensors"))
    assert len(state) == 69 * 6
    failed = subprocess.run([*command, "kind=vgg"], capture_output=True, text=True, timeout=120)
    assert failed.returncode == 2
    assert "error: kind: need one of imagenet, pqan_image, pqan_pool2: vgg" in failed.stderr
