"""Frame backbone: ResNet 18 to 152, the deep stems "c" and "d", and ResNeXt, without classifier.

He et al. (arXiv 1512.03385), Xie et al. (arXiv 1611.05431); stems and pooled shortcuts as in
X-Temporal. Layers, key names and values are those of torchvision's ResNet without `fc`.

Letters: B frames, C channels, H W size, D feature width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.resnet import ResNet as TorchvisionResNet

from common.log import InputError

BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}
STEMS = ("plain", "c", "d")


class _Shape(NamedTuple):
    """What tells the networks apart for which torchvision has weights."""

    block: str
    layers: tuple[int, ...]
    groups: int = 1
    width_per_group: int = 64


PUBLISHED = {
    _Shape("basic", (2, 2, 2, 2)): "resnet18",
    _Shape("basic", (3, 4, 6, 3)): "resnet34",
    _Shape("bottleneck", (3, 4, 6, 3)): "resnet50",
    _Shape("bottleneck", (3, 4, 23, 3)): "resnet101",
    _Shape("bottleneck", (3, 8, 36, 3)): "resnet152",
    _Shape("bottleneck", (3, 4, 6, 3), 32, 4): "resnext50_32x4d",
    _Shape("bottleneck", (3, 4, 23, 3), 32, 8): "resnext101_32x8d",
}


class ResNet(TorchvisionResNet):
    """Frames (B, C, H, W) -> globally pooled features (B, D).

    Stem "c" is three 3x3 convolutions (32, 32, 64 channels) in `conv1`; "d" also halves its
    shortcuts by average pooling instead of a strided 1x1 convolution.

    Starting weights are loaded here, before any temporal module wraps a convolution. A classifier
    (`fc`) in them is ignored. For other inputs than RGB (10 channels of stacked flow, 15 of
    RGB differences) the first convolution is averaged over RGB and repeated (TSN,
    arXiv 1608.00859, section 3.2).

    Args:
        block: "basic" or "bottleneck".
        layers: blocks of the four stages.
        groups: groups of the 3x3 convolution of a bottleneck (ResNeXt).
        width_per_group: channels per group at 64 planes.
        stem: "plain" (7x7), "c" or "d".
        in_channels: channels of a frame.
        weights: name of torchvision's weights ("IMAGENET1K_V1"), or a file (safetensors, or
            a PyTorch file of tensors); None starts from random weights.

    Raises:
        ValueError: an argument that is not accepted, or torchvision's weights for a deep stem.
        InputError: a file or name that is not there, cannot be read or does not fit.
    """

    conv1: nn.Module

    def __init__(
        self,
        block: str,
        layers: Sequence[int],
        groups: int = 1,
        width_per_group: int = 64,
        stem: str = "plain",
        in_channels: int = 3,
        weights: str | None = None,
    ) -> None:
        _check(block, layers, stem, in_channels)
        super().__init__(
            BLOCKS[block], list(layers), groups=groups, width_per_group=width_per_group
        )
        self.in_channels, self.out_features = in_channels, int(self.fc.in_features)
        del self.fc
        if stem != "plain":
            self.conv1 = _deep_stem(in_channels)
        elif in_channels != 3:
            self.conv1 = _convolution(in_channels, 64, kernel=7, stride=2)
        if stem == "d":
            _pool_shortcuts(self)
        if weights is not None:
            shape = _Shape(block, tuple(layers), groups, width_per_group)
            state = _read_weights(weights, shape, stem)
            _load(self, state, weights)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Features (B, D) of frames."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x_BCHW))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.avgpool(x).flatten(1)


def _check(block: str, layers: Sequence[int], stem: str, in_channels: int) -> None:
    if block not in BLOCKS:
        raise ValueError(f"block={block!r}: need one of {tuple(BLOCKS)}")
    if len(layers) != 4 or min(layers) < 1:
        raise ValueError(f"layers={list(layers)}: need four positive numbers of blocks")
    if stem not in STEMS:
        raise ValueError(f"stem={stem!r}: need one of {STEMS}")
    if in_channels < 1:
        raise ValueError(f"in_channels={in_channels}: need at least 1")


def _convolution(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _deep_stem(in_channels: int) -> nn.Sequential:
    return nn.Sequential(
        _convolution(in_channels, 32, kernel=3, stride=2),
        nn.BatchNorm2d(32),
        nn.ReLU(inplace=True),
        _convolution(32, 32, kernel=3, stride=1),
        nn.BatchNorm2d(32),
        nn.ReLU(inplace=True),
        _convolution(32, 64, kernel=3, stride=1),
    )


def _pool_shortcuts(net: TorchvisionResNet) -> None:
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        if stage[0].downsample is None:  # basic blocks of the first stage
            continue
        conv, norm = stage[0].downsample
        stride, conv.stride = conv.stride, (1, 1)
        pool = nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
        stage[0].downsample = nn.Sequential(pool, conv, norm)


def _read_weights(weights: str, shape: _Shape, stem: str) -> dict[str, Tensor]:
    """Tensors of a named set of weights or of a file, without the classifier."""
    name = PUBLISHED.get(shape)
    published = get_model_weights(name).__members__ if name else {}
    if weights not in published:
        state = _read_file(weights, tuple(published))
    elif stem != "plain":
        raise ValueError(
            f"weights={weights!r} with stem={stem!r}: torchvision has weights of the plain stem "
            "only; give a file trained with this stem, or None"
        )
    else:
        state = _download(published[weights])
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


def _download(weights: Any) -> dict[str, Tensor]:
    try:
        return dict(weights.get_state_dict(progress=False, check_hash=True))
    except (OSError, RuntimeError) as error:
        raise InputError(weights.url, "weights could not be downloaded", error) from error


def _read_file(path: str, names: tuple[str, ...]) -> dict[str, Tensor]:
    if not Path(path).is_file():
        known = ", ".join(names) or "none for this network"
        raise InputError(path, f"no such weights: need a file or a name of torchvision ({known})")
    state = _read_safetensors(path) if path.endswith(".safetensors") else _read_pickle(path)
    return {key.removeprefix("module."): value for key, value in state.items()}


def _read_safetensors(path: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(path, "is not a safetensors file", error) from error


def _read_pickle(path: str) -> dict[str, Tensor]:
    from pickle import UnpicklingError

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise InputError(path, "is not a PyTorch file of tensors", error) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(path, "holds no dictionary of tensors", type(state).__name__)
    return state


def _load(net: ResNet, state: dict[str, Tensor], source: str) -> None:
    first = "conv1.0.weight" if isinstance(net.conv1, nn.Sequential) else "conv1.weight"
    if first not in state and "conv1.weight" in state:
        raise InputError(source, "has the plain stem, this network has a deep one", "conv1.weight")
    if first in state and state[first].dim() == 4 and state[first].shape[1] == 3:
        state = {**state, first: _other_input(state[first], net.state_dict()[first].shape[1])}
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(source, "weights do not fit this backbone", error) from error


def _other_input(weight_OCHW: Tensor, in_channels: int) -> Tensor:
    """A kernel for RGB made one for `in_channels`: its mean over RGB, repeated."""
    if in_channels == weight_OCHW.shape[1]:
        return weight_OCHW
    return weight_OCHW.mean(dim=1, keepdim=True).repeat(1, in_channels, 1, 1)
