"""Caffe weights of GoogLeNet-BN and of the released P-QAN networks -> safetensors.

`python -m reid_rqen.tools.convert_caffe input=weights.npz out=weights.safetensors kind=imagenet`

The input is an .npz with one array per blob under `<layer>/<blob index>`, for example written by
pycaffe with `{f"{layer}/{i}": blob.data for layer, blobs in net.params.items() for i, blob in
enumerate(blobs)}`. Layer names are those of lim0606/caffe-googlenet-bn and of the prototxt files
of sciencefans/Quality-Aware-Network. The output has the keys of a whole model: `trunk.*`,
`quality.*`, and, when the file holds them, `auxiliary.*` and `classifier.*`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import hydra
import numpy as np
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING
from safetensors.torch import save_file
from torch import Tensor, nn

from common.log import InputError, exit_on_bad_input
from reid_rqen.models.googlenet_bn import BLOCKS, GoogLeNetBN
from reid_rqen.models.heads import AuxiliaryHead
from reid_rqen.models.quality import ImageQuality, Pool2FC

BRANCHES = {
    "1x1": "one",
    "3x3_reduce": "three_reduce",
    "3x3": "three",
    "double3x3_reduce": "double_reduce",
    "double3x3a": "double_a",
    "double3x3b": "double_b",
    "pool_proj": "projection",
}
STEM = {"conv1/7x7_s2": "conv1", "conv2/3x3_reduce": "conv2_reduce", "conv2/3x3": "conv2"}
IMAGE_HEAD = {"conv1_s": "conv1", "conv1_sss1": "conv2", "conv2_s": "conv3", "fc1_s": "fc"}
POOL2_HEAD = {"fc1_s": "fc"}
# The released pool2 network defines these convolutions but does not use them for the score.
UNUSED = {"pqan_pool2": ("conv1_sss1", "conv1_sss2")}
AUX_GRIDS = ((4, 4), (2, 2))
KINDS = ("imagenet", "pqan_image", "pqan_pool2")


class Blob(NamedTuple):
    """Where one of our tensors comes from: `<layer>/<index>`, over a factor blob if it has one."""

    key: str
    factor: str | None = None


@dataclass
class ConvertConfig:
    """Arguments of the command."""

    input: str = MISSING
    out: str = MISSING
    kind: str = "imagenet"


ConfigStore.instance().store("rqen_convert_caffe_schema", ConvertConfig)


def conv_bn(layer: str, conv: str, norm: str) -> dict[str, Blob]:
    """Blobs of a Caffe convolution (or linear) + BatchNorm + Scale triple, by our names."""
    factor = f"{layer}/bn/2"
    return {
        f"{conv}.weight": Blob(f"{layer}/0"),
        f"{norm}.running_mean": Blob(f"{layer}/bn/0", factor),
        f"{norm}.running_var": Blob(f"{layer}/bn/1", factor),
        f"{norm}.weight": Blob(f"{layer}/bn/sc/0"),
        f"{norm}.bias": Blob(f"{layer}/bn/sc/1"),
    }


def affine(layer: str, name: str) -> dict[str, Blob]:
    """Blobs of a Caffe layer with weight and bias."""
    return {f"{name}.weight": Blob(f"{layer}/0"), f"{name}.bias": Blob(f"{layer}/1")}


def trunk_blobs() -> dict[str, Blob]:
    """Blobs of the trunk by our names."""
    layers = dict(STEM)
    for block, widths in BLOCKS.items():
        for theirs, ours in BRANCHES.items():
            absent = (ours == "one" and not widths.one) or (
                ours == "projection" and not widths.projection
            )
            if not absent:
                layers[f"inception_{block}/{theirs}"] = f"blocks.{block}.{ours}"
    found: dict[str, Blob] = {}
    for layer, name in layers.items():
        found |= conv_bn(layer, f"trunk.{name}.conv", f"trunk.{name}.bn")
    return found


def head_blobs(blobs: Mapping[str, np.ndarray]) -> dict[str, Blob]:
    """Blobs of the auxiliary heads and classifiers, as far as the file has them.

    A deployed network lacks some or all; each layer that is there must be whole.
    """
    found: dict[str, Blob] = {}
    for i in (0, 1):
        loss, ours = f"loss{i + 1}", f"auxiliary.{i}"
        if any(key.startswith((f"{loss}/conv", f"{loss}/fc")) for key in blobs):
            found |= conv_bn(f"{loss}/conv", f"{ours}.conv", f"{ours}.conv_bn")
            found |= conv_bn(f"{loss}/fc", f"{ours}.fc", f"{ours}.fc_bn")
    for i, name in enumerate(("auxiliary.0.classifier", "auxiliary.1.classifier", "classifier")):
        for layer in (f"loss{i + 1}/classifier", f"loss{i + 1}/classifier_1"):
            if any(key.startswith(f"{layer}/") for key in blobs):
                found |= affine(layer, name)
    return found


def wanted_blobs(kind: str, blobs: Mapping[str, np.ndarray]) -> dict[str, Blob]:
    """All blobs of our tensors for one kind of network.

    Raises:
        InputError: unknown kind.
    """
    if kind not in KINDS:
        raise InputError("kind", f"need one of {', '.join(KINDS)}", kind)
    found = trunk_blobs() | head_blobs(blobs)
    head = {"imagenet": {}, "pqan_image": IMAGE_HEAD, "pqan_pool2": POOL2_HEAD}[kind]
    for layer, name in head.items():
        found |= affine(layer, f"quality.{name}")
    return found


def shapes(kind: str, classes: int) -> dict[str, tuple[int, ...]]:
    """Shapes of our tensors; `classes` is the number of identities of the classifiers."""
    quality = {"imagenet": None, "pqan_image": ImageQuality, "pqan_pool2": Pool2FC}[kind]
    with torch.device("meta"):
        model = nn.Module()
        model.trunk = GoogLeNetBN()
        heads = zip(GoogLeNetBN.tap_channels, AUX_GRIDS, strict=True)
        model.auxiliary = nn.ModuleList(AuxiliaryHead(c, classes, g) for c, g in heads)
        model.classifier = nn.Linear(GoogLeNetBN.channels, classes)
        if quality is not None:
            model.quality = quality()
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def convert(blobs: Mapping[str, np.ndarray], kind: str, source: str = "input") -> dict[str, Tensor]:
    """Our state dict from Caffe blobs.

    Caffe keeps sums of means and variances and a third blob by which both are divided.

    Args:
        blobs: arrays by `<layer>/<index>`.
        kind: "imagenet" (trunk), "pqan_image" or "pqan_pool2" (trunk and quality head).
        source: name of the input for messages.

    Raises:
        InputError: missing or unknown blobs (all are listed), or a blob of the wrong shape.
    """
    wanted = wanted_blobs(kind, blobs)
    _check_keys(wanted, blobs, kind, source)
    classes = [
        blobs[b.key].shape[0] for n, b in wanted.items() if n.endswith("classifier.bias")
    ] or [1]
    expected = shapes(kind, classes[0])
    state = {}
    for name, blob in wanted.items():
        value = np.asarray(blobs[blob.key], dtype=np.float64)
        if blob.factor is not None:
            factor = float(np.asarray(blobs[blob.factor]).reshape(-1)[0])
            value = value / factor if factor else value * 0
        # Old Caffe versions store vectors and matrices with leading axes of length 1.
        if value.squeeze().shape != tuple(n for n in expected[name] if n != 1):
            raise InputError(
                f"{source}[{blob.key}]", f"shape must be {expected[name]}", value.shape
            )
        state[name] = torch.from_numpy(value.reshape(expected[name])).float()
        if name.endswith("running_mean"):
            state[name.replace("running_mean", "num_batches_tracked")] = torch.tensor(0)
    return state


def _check_keys(
    wanted: Mapping[str, Blob], blobs: Mapping[str, np.ndarray], kind: str, source: str
) -> None:
    needed = {blob.key for blob in wanted.values()}
    needed |= {blob.factor for blob in wanted.values() if blob.factor is not None}
    ignored = tuple(f"{layer}/" for layer in UNUSED.get(kind, ()))
    missing = sorted(needed - set(blobs))
    unknown = sorted(k for k in set(blobs) - needed if not (ignored and k.startswith(ignored)))
    for what, keys in (("missing blobs", missing), ("unknown blobs", unknown)):
        if keys:
            raise InputError(source, f"{len(keys)} {what} for kind={kind}", ", ".join(keys))


def read_blobs(path: Path) -> dict[str, np.ndarray]:
    """Arrays of an .npz, without pickles.

    Raises:
        InputError: no such file, or not an .npz of plain arrays.
    """
    if not path.is_file():
        raise InputError(path, "no such file")
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(_arrays(file))
    except (BadZipFile, ValueError, OSError, EOFError) as error:
        raise InputError(path, "not an .npz of plain arrays", error) from error


def _arrays(file: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    for key in file:
        yield key, file[key]


@hydra.main(version_base=None, config_path="../configs", config_name="convert_caffe")
def main(cfg: ConvertConfig) -> None:
    """Read, convert, write; the file appears under its name only when it is whole."""
    state = convert(read_blobs(Path(cfg.input)), cfg.kind, cfg.input)
    out = Path(cfg.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".tmp")
    save_file(state, partial)
    partial.replace(out)


if __name__ == "__main__":
    exit_on_bad_input(main)
