"""Synthetic checkpoints with the names and shapes of the published ones, and what they compute.

Written out by hand from the structure of the published networks, without this package's models:
shapes first (`polyface`, `quality`, `iresnet`, `mobilefacenet`), then tensors (`random_state`),
then the networks themselves as functions of such tensors (`*_features`), in evaluation mode.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Shapes = dict[str, tuple[int, ...]]
State = dict[str, Tensor]


def norm(shapes: Shapes, name: str, channels: int, affine: bool = True) -> None:
    for part in ("weight", "bias") if affine else ():
        shapes[f"{name}.{part}"] = (channels,)
    for part in ("running_mean", "running_var"):
        shapes[f"{name}.{part}"] = (channels,)
    shapes[f"{name}.num_batches_tracked"] = ()


def polyface(
    blocks: tuple[int, int, int],
    features: int = 256,
    side: int = 6,
    wide: Callable[[int], int] = int,
) -> Shapes:
    """Names and shapes of APolynet; `wide` gives the channels of a smaller one."""
    shapes: Shapes = {}

    def basic(name: str, inputs: int, outputs: int, height: int = 1, width: int = 1) -> int:
        shapes[f"{name}.conv.weight"] = (outputs, inputs, height, width)
        norm(shapes, f"{name}.bn", outputs)
        return outputs

    def branch(name: str, inputs: int, *convs: tuple[int, int, int]) -> int:
        for number, (outputs, height, width) in enumerate(convs):
            inputs = basic(f"{name}.{number}", inputs, wide(outputs), height, width)
        return inputs

    def closing(name: str, inputs: int, outputs: int) -> None:
        shapes[f"{name}.stem.0.weight"] = (outputs, inputs, 1, 1)
        norm(shapes, f"{name}.stem.1", outputs)

    stem = branch("stem.step1.stem", 3, (32, 3, 3), (32, 3, 3), (64, 3, 3))
    c = stem + basic("stem.step1.branch1", stem, wide(96), 3, 3)
    left = branch("stem.step2.branch0", c, (64, 1, 1), (96, 3, 3))
    c = left + branch("stem.step2.branch1", c, (64, 1, 1), (64, 7, 1), (64, 1, 7), (96, 3, 3))
    a = c + basic("stem.step3.branch1", c, wide(192), 3, 3)
    for number in range(blocks[0]):
        name = f"a10.{number}"
        c = branch(f"{name}.branch0", a, (32, 1, 1), (48, 3, 3), (64, 3, 3))
        c += branch(f"{name}.branch1", a, (32, 1, 1), (32, 3, 3))
        c += basic(f"{name}.branch2", a, wide(32))
        closing(name, c, a)
    b = a + branch("a2b.branch0", a, (256, 1, 1), (256, 3, 3), (384, 3, 3))
    b += basic("a2b.branch1", a, wide(384), 3, 3)
    for number in range(blocks[1]):
        name = f"b20.{number}"
        c = branch(f"{name}.branch0", b, (128, 1, 1), (160, 1, 7), (192, 7, 1))
        c += basic(f"{name}.branch1", b, wide(192))
        closing(name, c, b)
    last = b + branch("b2c.branch0", b, (256, 1, 1), (256, 3, 3), (256, 3, 3))
    last += branch("b2c.branch1", b, (256, 1, 1), (256, 3, 3))
    last += branch("b2c.branch2", b, (256, 1, 1), (384, 3, 3))
    for number in range(blocks[2]):
        name = f"c10.{number}"
        c = branch(f"{name}.branch0", last, (192, 1, 1), (224, 1, 3), (256, 3, 1))
        c += basic(f"{name}.branch1", last, wide(192))
        closing(name, c, last)
    norm(shapes, "fc.bn1", last)
    shapes["fc.fc.weight"], shapes["fc.fc.bias"] = (features, last * side * side), (features,)
    norm(shapes, "fc.bn2", features, affine=False)
    return shapes


def quality(channels: tuple[int, ...] = (8, 16, 32, 48), blocks: int = 2) -> Shapes:
    """Names and shapes of Quality with one slope for each PReLU."""
    shapes: Shapes = {"group1.conv1.weight": (channels[0], 3, 3, 3), "group1.act1.weight": (1,)}
    norm(shapes, "group1.bn1", channels[0])
    inputs = channels[0]
    for stage, outputs in enumerate(channels, 1):
        for number in range(blocks):
            name = f"layer{stage}.{number}"
            norm(shapes, f"{name}.group1.bn1", inputs)
            shapes[f"{name}.group1.conv1.weight"] = (outputs, inputs, 3, 3)
            norm(shapes, f"{name}.group1.bn2", outputs)
            shapes[f"{name}.group1.act1.weight"] = (1,)
            shapes[f"{name}.group1.conv2.weight"] = (outputs, outputs, 3, 3)
            norm(shapes, f"{name}.group1.bn3", outputs)
            shapes[f"{name}.act2.weight"] = (1,)
            if number == 0:
                shapes[f"{name}.downsample.0.weight"] = (outputs, inputs, 1, 1)
                norm(shapes, f"{name}.downsample.1", outputs)
            inputs = outputs
    shapes["fc1.1.weight"] = (1, inputs, 1, 1)
    return shapes


def iresnet(
    layers: tuple[int, ...], widths: tuple[int, ...] = (64, 128, 256, 512), features: int = 512
) -> Shapes:
    """Names and shapes of IResNet of arcface_torch."""
    shapes: Shapes = {"conv1.weight": (widths[0], 3, 3, 3), "prelu.weight": (widths[0],)}
    norm(shapes, "bn1", widths[0])
    inputs = widths[0]
    for stage, (count, outputs) in enumerate(zip(layers, widths, strict=True), 1):
        for number in range(count):
            name = f"layer{stage}.{number}"
            norm(shapes, f"{name}.bn1", inputs)
            shapes[f"{name}.conv1.weight"] = (outputs, inputs, 3, 3)
            norm(shapes, f"{name}.bn2", outputs)
            shapes[f"{name}.prelu.weight"] = (outputs,)
            shapes[f"{name}.conv2.weight"] = (outputs, outputs, 3, 3)
            norm(shapes, f"{name}.bn3", outputs)
            if number == 0:
                shapes[f"{name}.downsample.0.weight"] = (outputs, inputs, 1, 1)
                norm(shapes, f"{name}.downsample.1", outputs)
            inputs = outputs
    norm(shapes, "bn2", inputs)
    shapes["fc.weight"], shapes["fc.bias"] = (features, inputs * 49), (features,)
    norm(shapes, "features", features)
    return shapes


def mobilefacenet(
    blocks: tuple[int, int, int, int] = (1, 4, 6, 2), scale: int = 2, features: int = 512
) -> Shapes:
    """Names and shapes of MobileFaceNet of arcface_torch."""
    shapes: Shapes = {}

    def conv(name: str, inputs: int, outputs: int, kernel: int, groups: int, act: bool) -> None:
        shapes[f"{name}.layers.0.weight"] = (outputs, inputs // groups, kernel, kernel)
        norm(shapes, f"{name}.layers.1", outputs)
        if act:
            shapes[f"{name}.layers.2.weight"] = (outputs,)

    def depthwise(name: str, inputs: int, outputs: int, inside: int) -> None:
        conv(f"{name}.layers.0", inputs, inside, 1, 1, True)
        conv(f"{name}.layers.1", inside, inside, 3, inside, True)
        conv(f"{name}.layers.2", inside, outputs, 1, 1, False)

    def residual(name: str, channels: int, count: int, inside: int) -> None:
        for number in range(count):
            depthwise(f"{name}.layers.{number}", channels, channels, inside)

    narrow, wide = 64 * scale, 128 * scale
    conv("layers.0", 3, narrow, 3, 1, True)
    if blocks[0] == 1:
        conv("layers.1", narrow, narrow, 3, 64, True)
    else:
        residual("layers.1", narrow, blocks[0], 128)
    depthwise("layers.2", narrow, narrow, 128)
    residual("layers.3", narrow, blocks[1], 128)
    depthwise("layers.4", narrow, wide, 256)
    residual("layers.5", wide, blocks[2], 256)
    depthwise("layers.6", wide, wide, 512)
    residual("layers.7", wide, blocks[3], 256)
    conv("conv_sep", wide, 512, 1, 1, True)
    conv("features.layers.0", 512, 512, 7, 512, False)
    shapes["features.layers.2.weight"] = (features, 512)
    norm(shapes, "features.layers.3", features)
    return shapes


def random_state(shapes: Shapes, seed: int = 0) -> State:
    """Values that keep activations near 1 and norms that do something."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
        elif name.endswith("running_var") or (name.endswith("weight") and len(shape) == 1):
            state[name] = 0.5 + torch.rand(shape, generator=generator)
        elif name.endswith(("running_mean", "bias")):
            state[name] = 0.2 * torch.randn(shape, generator=generator)
        else:
            fan_in = max(1, int(torch.tensor(shape[1:]).prod()))
            state[name] = torch.randn(shape, generator=generator) / fan_in**0.5
    return state


def normalise(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    """Batch norm in evaluation, from its formula."""
    shape = [1, -1, *[1] * (x.dim() - 2)]
    mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    y = (x - mean.view(shape)) / (variance.view(shape) + eps).sqrt()
    if f"{name}.weight" not in state:
        return y
    return y * state[f"{name}.weight"].view(shape) + state[f"{name}.bias"].view(shape)


def polyface_features(state: State, x: Tensor, factor: float = 0.24) -> tuple[Tensor, Tensor]:
    """`feature_nobn` and `feature` of APolynet for images that are already resized."""

    def basic(name: str, x: Tensor, stride: int = 1, same: bool = True) -> Tensor:
        weight = state[f"{name}.conv.weight"]
        pad = (weight.shape[2] // 2, weight.shape[3] // 2) if same else 0
        y = F.conv2d(x, weight, stride=stride, padding=pad)
        return normalise(state, f"{name}.bn", y, 1e-10).relu()

    def chain(name: str, x: Tensor) -> Tensor:
        number = 0
        while f"{name}.{number}.conv.weight" in state:
            x, number = basic(f"{name}.{number}", x), number + 1
        return x

    def pool(x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, 2, ceil_mode=True)

    def stage(name: str, x: Tensor) -> Tensor:
        number = 0
        while f"{name}.{number}.stem.0.weight" in state:
            block = f"{name}.{number}"
            parts = []
            for branch in range(3):
                key = f"{block}.branch{branch}"
                if f"{key}.conv.weight" in state:
                    parts.append(basic(key, x))
                elif f"{key}.0.conv.weight" in state:
                    parts.append(chain(key, x))
            y = F.conv2d(torch.cat(parts, 1), state[f"{block}.stem.0.weight"])
            x = (x + factor * normalise(state, f"{block}.stem.1", y, 1e-10)).relu()
            number += 1
        return x

    s1, s2 = "stem.step1", "stem.step2"
    x = basic(f"{s1}.stem.0", x, 2, False)
    x = basic(f"{s1}.stem.2", basic(f"{s1}.stem.1", x, 1, False))
    x = torch.cat([pool(x), basic(f"{s1}.branch1", x, 2, False)], 1)
    left = basic(f"{s2}.branch0.1", basic(f"{s2}.branch0.0", x), 1, False)
    right = basic(f"{s2}.branch1.1", basic(f"{s2}.branch1.0", x))
    right = basic(f"{s2}.branch1.3", basic(f"{s2}.branch1.2", right), 1, False)
    x = torch.cat([left, right], 1)
    x = stage("a10", torch.cat([pool(x), basic("stem.step3.branch1", x, 2, False)], 1))
    left = basic("a2b.branch0.1", basic("a2b.branch0.0", x))
    left = basic("a2b.branch0.2", left, 2, False)
    x = stage("b20", torch.cat([left, basic("a2b.branch1", x, 2, False), pool(x)], 1))
    first = basic("b2c.branch0.1", basic("b2c.branch0.0", x))
    parts = [
        basic("b2c.branch0.2", first, 2, False),
        basic("b2c.branch1.1", basic("b2c.branch1.0", x), 2, False),
        basic("b2c.branch2.1", basic("b2c.branch2.0", x), 2, False),
        pool(x),
    ]
    x = normalise(state, "fc.bn1", stage("c10", torch.cat(parts, 1)), 2e-5)
    feature = F.linear(x.flatten(1), state["fc.fc.weight"], state["fc.fc.bias"])
    return feature, normalise(state, "fc.bn2", feature, 2e-5)


def quality_scores(state: State, x: Tensor) -> Tensor:
    """Scores of Quality for images that are already resized."""

    def bn(name: str, x: Tensor) -> Tensor:
        return normalise(state, name, x, 2e-5)

    x = F.conv2d(x, state["group1.conv1.weight"], padding=1)
    x = F.prelu(bn("group1.bn1", x), state["group1.act1.weight"])
    for stage in (1, 2, 3, 4):
        for number in (0, 1):
            name = f"layer{stage}.{number}"
            stride = 2 if number == 0 else 1
            y = F.conv2d(
                bn(f"{name}.group1.bn1", x), state[f"{name}.group1.conv1.weight"], padding=1
            )
            y = F.prelu(bn(f"{name}.group1.bn2", y), state[f"{name}.group1.act1.weight"])
            y = F.conv2d(y, state[f"{name}.group1.conv2.weight"], stride=stride, padding=1)
            y = bn(f"{name}.group1.bn3", y)
            if number == 0:
                x = F.conv2d(x, state[f"{name}.downsample.0.weight"], stride=2)
                x = bn(f"{name}.downsample.1", x)
            x = F.prelu(x + y, state[f"{name}.act2.weight"])
    return F.conv2d(x.mean((2, 3), keepdim=True), state["fc1.1.weight"]).flatten()


def iresnet_features(state: State, x: Tensor) -> Tensor:
    """Features of IResNet."""

    def bn(name: str, x: Tensor) -> Tensor:
        return normalise(state, name, x, 1e-5)

    x = F.prelu(bn("bn1", F.conv2d(x, state["conv1.weight"], padding=1)), state["prelu.weight"])
    for stage in (1, 2, 3, 4):
        number = 0
        while f"layer{stage}.{number}.conv1.weight" in state:
            name = f"layer{stage}.{number}"
            y = F.conv2d(bn(f"{name}.bn1", x), state[f"{name}.conv1.weight"], padding=1)
            y = F.prelu(bn(f"{name}.bn2", y), state[f"{name}.prelu.weight"])
            stride = 2 if number == 0 else 1
            y = F.conv2d(y, state[f"{name}.conv2.weight"], stride=stride, padding=1)
            if number == 0:
                x = F.conv2d(x, state[f"{name}.downsample.0.weight"], stride=2)
                x = bn(f"{name}.downsample.1", x)
            x, number = x + bn(f"{name}.bn3", y), number + 1
    x = F.linear(bn("bn2", x).flatten(1), state["fc.weight"], state["fc.bias"])
    return bn("features", x)


def mobilefacenet_features(state: State, x: Tensor) -> Tensor:
    """Features of MobileFaceNet."""

    def conv(name: str, x: Tensor, stride: int = 1, pad: int = 0) -> Tensor:
        weight = state[f"{name}.layers.0.weight"]
        groups = x.shape[1] // weight.shape[1]
        x = F.conv2d(x, weight, stride=stride, padding=pad, groups=groups)
        x = normalise(state, f"{name}.layers.1", x, 1e-5)
        slopes = state.get(f"{name}.layers.2.weight")
        return x if slopes is None else F.prelu(x, slopes)

    def depthwise(name: str, x: Tensor, stride: int) -> Tensor:
        y = conv(f"{name}.layers.1", conv(f"{name}.layers.0", x), stride, 1)
        return conv(f"{name}.layers.2", y)

    def residual(name: str, x: Tensor) -> Tensor:
        number = 0
        while f"{name}.layers.{number}.layers.0.layers.0.weight" in state:
            x, number = x + depthwise(f"{name}.layers.{number}", x, 1), number + 1
        return x

    x = conv("layers.0", x, 2, 1)
    single = "layers.1.layers.0.weight" in state
    x = conv("layers.1", x, 1, 1) if single else residual("layers.1", x)
    for number in (2, 4, 6):
        x = residual(f"layers.{number + 1}", depthwise(f"layers.{number}", x, 2))
    x = conv("features.layers.0", conv("conv_sep", x)).flatten(1)
    x = F.linear(x, state["features.layers.2.weight"])
    return normalise(state, "features.layers.3", x, 1e-5)
