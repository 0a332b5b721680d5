"""Synthetic checkpoints with the names and shapes of the published ones.

Written out by hand from the structure of the published networks, without this package's models:
shapes first (`frame_net`, `slowfast`, `r2plus1d`, `r3d`), then tensors (`random`, `zeros`), then
the file around them (`xtemporal_file`, `tsm_file`, `mmaction2_file`).
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]

BLOCKS = {  # 12 is a small one for tests
    10: (1, 1, 1, 1), 12: (2, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3),
    101: (3, 4, 23, 3), 152: (3, 8, 36, 3),
}  # fmt: skip
NON_LOCAL = {2: (0, 2), 3: (0, 2, 4)}  # blocks of ResNet-50 by stage


def norm(shapes: Shapes, name: str, channels: int) -> None:
    for part in ("weight", "bias", "running_mean", "running_var"):
        shapes[f"{name}.{part}"] = (channels,)
    shapes[f"{name}.num_batches_tracked"] = ()


def affine(shapes: Shapes, name: str, *shape: int) -> None:
    shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]


class Names:
    """Where a source keeps the parts of a frame network."""

    def __init__(self, source: str):
        self.mmaction2 = source == "mmaction2"
        self.root = "backbone" if self.mmaction2 else "base_model"
        self.head = "cls_head.fc_cls" if self.mmaction2 else "new_fc"

    def block(self, stage: int, index: int, pool: bool = False) -> str:
        wrapper = ".net" if pool and stage == 2 else ""
        return f"{self.root}.layer{stage}{wrapper}.{index}"

    def conv(self, place: str, number: int) -> str:
        return f"{place}.conv{number}.conv" if self.mmaction2 else f"{place}.conv{number}"

    def norm(self, place: str, number: int) -> str:
        return f"{place}.conv{number}.bn" if self.mmaction2 else f"{place}.bn{number}"

    def shortcut(self, place: str) -> tuple[str, str]:
        conv, norm = ("conv", "bn") if self.mmaction2 else ("0", "1")
        return f"{place}.downsample.{conv}", f"{place}.downsample.{norm}"

    def interlace(self, conv: str) -> dict[str, str]:
        """The layers in front of a convolution of TIN, and the convolution itself."""
        first = f"{conv}.net1"
        if self.mmaction2:
            offset, weight = f"{first}.offset_net", f"{first}.weight_net.conv"
            layers = (f"{offset}.conv", f"{offset}.fc1", f"{offset}.fc2", weight)
        else:
            offset, weight = f"{first}.biasnet.net", f"{first}.weightnet.net.lastlayer"
            layers = (f"{offset}.conv", f"{offset}.fc", f"{offset}.lastlayer", weight)
        keys = ("summary", "hidden", "offset", "weight")
        return dict(zip(keys, layers, strict=True)) | {"conv": f"{conv}.net2"}

    def non_local(self, block: str) -> dict[str, str]:
        keys = ("g", "theta", "phi", "out", "norm")
        parts = ("g.0", "theta", "phi.0", "W.0", "W.1")
        if self.mmaction2:
            parts = ("g.0.conv", "theta.conv", "phi.0.conv", "conv_out.conv", "conv_out.bn")
        name = "non_local_block" if self.mmaction2 else "nl"
        return {key: f"{block}.{name}.{part}" for key, part in zip(keys, parts, strict=True)}


def frame_net(
    depth: int,
    classes: int,
    source: str = "xtemporal",
    temporal: str | None = None,
    segments: int = 8,
    non_local: bool = False,
    every: int = 1,
    pool: bool = False,
) -> Shapes:
    """A ResNet on frames.

    `temporal` is tin, tsm, block (TSM in front of whole blocks) or None, `every` the distance of
    its blocks; `pool` puts a temporal pool in front of layer2.
    """
    names, shapes = Names(source), Shapes()
    shapes[f"{names.conv(names.root, 1)}.weight"] = (64, 3, 7, 7)
    norm(shapes, names.norm(names.root, 1), 64)
    inputs, bottleneck = 64, depth >= 50
    for stage, blocks in enumerate(BLOCKS[depth], start=1):
        width = 32 << stage
        outputs = 4 * width if bottleneck else width
        for index in range(blocks):
            block = names.block(stage, index, pool)
            attention = non_local and index in NON_LOCAL.get(stage, ())
            if attention:
                add_non_local(shapes, names, block, outputs)
                block += ".block"
            kind = temporal if index % every == 0 else None
            block += ".net" if kind == "block" else ""
            add_block(shapes, names, block, inputs, width, outputs, kind, segments)
            if index == 0 and (stage > 1 or bottleneck):
                conv, batch = names.shortcut(block)
                shapes[f"{conv}.weight"] = (outputs, inputs, 1, 1)
                norm(shapes, batch, outputs)
            inputs = outputs
    affine(shapes, names.head, classes, inputs)
    return shapes


def add_block(
    shapes: Shapes, names: Names, block: str, inputs: int, width: int, outputs: int,
    temporal: str | None, segments: int,
) -> None:  # fmt: skip
    kernels = [(width, inputs, 3), (width, width, 3)]
    if outputs != width:
        kernels = [(width, inputs, 1), (width, width, 3), (outputs, width, 1)]
    for number, (out, into, size) in enumerate(kernels, start=1):
        conv = names.conv(block, number)
        if number == 1 and temporal == "tin":
            layers, folded = names.interlace(conv), inputs // 4
            affine(shapes, layers["summary"], 1, folded, 3)
            affine(shapes, layers["hidden"], segments, segments)
            affine(shapes, layers["offset"], 2, segments)
            affine(shapes, layers["weight"], 2, folded, 3)
            conv = layers["conv"]
        elif number == 1 and temporal == "tsm":
            conv += ".net"
        shapes[f"{conv}.weight"] = (out, into, size, size)
        norm(shapes, names.norm(block, number), out)


def add_non_local(shapes: Shapes, names: Names, block: str, channels: int) -> None:
    parts, inner = names.non_local(block), channels // 2
    for part in ("g", "theta", "phi"):
        affine(shapes, parts[part], inner, channels, 1, 1, 1)
    shapes[f"{parts['out']}.weight"] = (channels, inner, 1, 1, 1)
    if not names.mmaction2:  # mmcv leaves out a bias in front of a norm
        shapes[f"{parts['out']}.bias"] = (channels,)
    norm(shapes, parts["norm"], channels)


def relations(
    classes: int, segments: int, source: str, features: int, multi_scale: bool = True
) -> Shapes:
    """The head of TRN, on features of 256 channels."""
    names, shapes = Names(source), Shapes()
    affine(shapes, names.head, 256, features)
    root = "cls_head.consensus" if names.mmaction2 else "consensus"
    scales = range(segments, 1, -1) if multi_scale else [segments]
    for index, scale in enumerate(scales):
        part = f"{root}.fc_fusion_scales.{index}" if multi_scale else f"{root}.classifier"
        hidden = 256 if multi_scale else 512
        affine(shapes, f"{part}.1", hidden, scale * 256)
        affine(shapes, f"{part}.3", classes, hidden)
    return shapes


def slowfast(depth: int, classes: int) -> Shapes:
    """X-Temporal's SlowFast; alpha 4, an eighth of the channels in the fast pathway."""
    shapes = Shapes()
    for number, name in enumerate(("lateral_p1", "lateral_res2", "lateral_res3", "lateral_res4")):
        channels = 8 if number == 0 else 16 << number
        shapes[f"{name}.weight"] = (2 * channels, channels, 5, 1, 1)
    for path, width, stem, times in (("fast", 8, 5, (3, 3, 3, 3)), ("slow", 64, 1, (1, 1, 3, 3))):
        shapes[f"{path}_conv1.weight"] = (width, 3, stem, 7, 7)
        norm(shapes, f"{path}_bn1", width)
        inputs = width
        for stage, (blocks, time) in enumerate(zip(BLOCKS[depth], times, strict=True)):
            inputs += inputs // 4 if path == "slow" else 0  # what the fast pathway sends
            planes = width << stage
            for index in range(blocks):
                block = f"{path}_res{stage + 2}.{index}"
                kernels = ((time, 1, 1), (1, 3, 3), (1, 1, 1))
                sizes = ((planes, inputs), (planes, planes), (4 * planes, planes))
                for number, (size, kernel) in enumerate(zip(sizes, kernels, strict=True), start=1):
                    shapes[f"{block}.conv{number}.weight"] = size + kernel
                    norm(shapes, f"{block}.bn{number}", size[0])
                if index == 0:
                    shapes[f"{block}.downsample.0.weight"] = (4 * planes, inputs, 1, 1, 1)
                    norm(shapes, f"{block}.downsample.1", 4 * planes)
                inputs = 4 * planes
    shapes["fc.weight"] = (classes, 2048 + 256)
    return shapes


def clip_net(depth: int, classes: int, split: bool) -> Shapes:
    """X-Temporal's R(2+1)D (`split`) or R3D."""
    shapes = Shapes()
    add_clip_conv(shapes, "conv1", 64, 3, (3, 7, 7) if split else (7, 7, 7), split)
    norm(shapes, "bn1", 64)
    inputs, bottleneck = 64, depth >= 50
    for stage, blocks in enumerate(BLOCKS[depth], start=1):
        width = 32 << stage
        outputs = 4 * width if bottleneck else width
        for index in range(blocks):
            block = f"layer{stage}.{index}"
            sizes = [(width, inputs, 3), (width, width, 3)]
            if bottleneck:
                sizes = [(width, inputs, 1), (width, width, 3), (outputs, width, 1)]
            for number, (out, into, k) in enumerate(sizes, start=1):
                add_clip_conv(
                    shapes, f"{block}.conv{number}", out, into, (k, k, k), split and k == 3
                )
                norm(shapes, f"{block}.bn{number}", out)
            if index == 0 and (stage > 1 or bottleneck):
                shapes[f"{block}.downsample.0.weight"] = (outputs, inputs, 1, 1, 1)
                norm(shapes, f"{block}.downsample.1", outputs)
            inputs = outputs
    affine(shapes, "fc", classes, inputs)
    return shapes


def add_clip_conv(
    shapes: Shapes, name: str, out: int, into: int, kernel: tuple[int, int, int], split: bool
) -> None:
    if not split:
        shapes[f"{name}.weight"] = (out, into, *kernel)
        return
    t, h, w = kernel
    middle = int(t * h * w * into * out / (h * w * into + t * out))
    shapes[f"{name}.spatial_conv.weight"] = (middle, into, 1, h, w)
    norm(shapes, f"{name}.bn", middle)
    shapes[f"{name}.temporal_conv.weight"] = (out, middle, t, 1, 1)


def published() -> list[tuple[str, str, Shapes]]:
    """Experiments and the checkpoints that belong to them: (experiment, source, shapes)."""
    rows = [
        ("mmit/tin_r50_8f", "xtemporal", frame_net(50, 313, "xtemporal", "tin", 8)),
        ("mmit/tin_r50_16f", "xtemporal", frame_net(50, 313, "xtemporal", "tin", 16)),
        ("mmit/tin_r101_8f", "xtemporal", frame_net(101, 313, "xtemporal", "tin", 8)),
        ("mmit/tsn_r101_5f", "xtemporal", frame_net(101, 313)),
        ("mmit/slowfast101_8x8_112", "xtemporal", slowfast(101, 313)),
        ("mmit/slowfast152_8x8_112", "xtemporal", slowfast(152, 313)),
        ("kinetics600/slowfast50_8x8_224", "xtemporal", slowfast(50, 600)),
        ("mmit/r2plus1d_18", "xtemporal", clip_net(18, 313, split=True)),
        ("mmit/r2plus1d_50", "xtemporal", clip_net(50, 313, split=True)),
        ("mmit/r3d_34", "xtemporal", clip_net(34, 313, split=False)),
        ("mmit/r3d_50", "xtemporal", clip_net(50, 313, split=False)),
        ("kinetics700/tin_r101_8f", "xtemporal", frame_net(101, 700, "xtemporal", "tin", 8)),
        ("sthv2/tsm_r50_8f", "tsm", frame_net(50, 174, "tsm", "tsm")),
        ("sthv1/tin_r50_8f", "mmaction2", frame_net(50, 174, "mmaction2", "tin", 8)),
        ("mmit/tsn_r101_5f", "mmaction2", frame_net(101, 313, "mmaction2")),
    ]
    for source in ("tsm", "mmaction2"):
        deep = frame_net(101, 174, source, "tsm", every=2)
        rows.append(("sthv2/tsm_r101_8f", source, deep))
        attention = frame_net(50, 400, source, "tsm", non_local=True)
        rows.append(("kinetics400/tsm_r50_8f_nl", source, attention))
    for source in ("xtemporal", "mmaction2"):
        head = relations(174, 8, source, 2048)
        rows.append(("sthv1/trn_r50_8f", source, frame_net(50, 174, source) | head))
    return rows


def random(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Values that keep the maps of a network in bounds and let every tensor matter."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
        elif name.endswith("running_var"):
            state[name] = torch.rand(shape, generator=generator) + 0.5
        elif name.endswith("weight") and len(shape) == 1:
            state[name] = torch.rand(shape, generator=generator) * 0.4 + 0.3
        else:
            inputs = max(1, int(np.prod(shape[1:])))
            scale = (2 / inputs) ** 0.5 if len(shape) > 1 else 0.3
            state[name] = torch.randn(shape, generator=generator) * scale
    return state


def double(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: x.double() if x.is_floating_point() else x for key, x in state.items()}


def zeros(shapes: Shapes) -> dict[str, Tensor]:
    """Tensors of these shapes that share one number of memory."""
    return {
        name: torch.tensor(0 if name.endswith("tracked") else 0.0).expand(shape)
        for name, shape in shapes.items()
    }


def parallel(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{name}": value for name, value in state.items()}


def optimizer(state: dict[str, Tensor]) -> dict[str, Any]:
    group = {"lr": 0.02, "momentum": 0.9, "nesterov": True, "params": [0]}
    return {"state": {0: {"momentum_buffer": next(iter(state.values()))}}, "param_groups": [group]}


def xtemporal_file(state: dict[str, Tensor]) -> dict[str, Any]:
    """As X-Temporal saves it; the best mAP of several labels a video is a number of numpy."""
    return {
        "epoch": 35,
        "optimizer": optimizer(state),
        "model": parallel(state),
        "lr_scheduler": {"last_epoch": 35, "base_lrs": [0.02]},
        "best_prec1": np.float64(62.2),
    }


def tsm_file(state: dict[str, Tensor]) -> dict[str, Any]:
    """As temporal-shift-module and deepcs233/TIN save it."""
    return {
        "epoch": 50,
        "arch": "resnet50",
        "state_dict": parallel(state),
        "optimizer": optimizer(state),
        "best_prec1": torch.tensor(45.6),
    }


def mmaction2_file(state: dict[str, Tensor]) -> dict[str, Any]:
    """As mmaction2 0.x saves it."""
    scores = {"best_score": np.float32(0.62), "history": np.arange(3.0)}
    meta = {"mmaction2_version": "0.24", "config": "model = dict()", "hook_msgs": scores}
    return {"meta": meta, "state_dict": state, "optimizer": optimizer(state)}
