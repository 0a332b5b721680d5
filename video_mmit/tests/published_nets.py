"""The published networks, run slowly from a checkpoint's own names and the equations.

Nothing of this package's models is used. Every network is in evaluation mode.

Letters: N videos, T frame positions, B = N*T frames (N-major), C channels, f folded channels,
H W size, K classes, P positions of a clip, Q pooled positions.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from video_mmit.tests.published_keys import BLOCKS, NON_LOCAL, Names

State = dict[str, Tensor]


def batch_norm(state: State, name: str, x: Tensor) -> Tensor:
    keys = ("running_mean", "running_var", "weight", "bias")
    return F.batch_norm(x, *(state[f"{name}.{key}"] for key in keys))


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def conv1d(state: State, name: str, x: Tensor) -> Tensor:
    return F.conv1d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1)


def interlaced(state: State, layers: dict[str, str], x_BCHW: Tensor, segments: int) -> Tensor:
    """TIN (arXiv 2001.06499): offset o and weight w predicted per video, o in (-2, 2)."""
    x = x_BCHW.unflatten(0, (-1, segments))
    folded = state[f"{layers['summary']}.weight"].shape[1]
    mean_NfT = x[:, :, :folded].mean(dim=(3, 4)).transpose(1, 2)
    hidden_NT = linear(state, layers["hidden"], conv1d(state, layers["summary"], mean_NfT)[:, 0])
    offset_N2 = 4 * (linear(state, layers["offset"], hidden_NT.relu()).sigmoid() - 0.5)
    weight_N2T = 2 * conv1d(state, layers["weight"], mean_NfT).sigmoid()
    out, size = x.clone(), folded // 4
    for n in range(x.shape[0]):
        offsets = [*offset_N2[n].tolist(), *(-offset_N2[n]).tolist()]
        for group, offset in enumerate(offsets):
            part = slice(group * size, (group + 1) * size)
            for t in range(segments):
                low = math.floor(offset)
                rest = offset - low
                value = torch.zeros_like(x[n, t, part])
                for source, share in ((t - low, 1 - rest), (t - low - 1, rest)):
                    if 0 <= source < segments:
                        value += share * x[n, source, part]
                out[n, t, part] = weight_N2T[n, group % 2, t] * value
    return out.flatten(0, 1)


def shifted(x_BCHW: Tensor, segments: int) -> Tensor:
    """TSM (arXiv 1811.08383): an eighth from the next frame, an eighth from the one before."""
    x = x_BCHW.unflatten(0, (-1, segments))
    fold, out = x.shape[2] // 8, x.clone()
    out[:, :, : 2 * fold] = 0
    for t in range(segments):
        if t + 1 < segments:
            out[:, t, :fold] = x[:, t + 1, :fold]
        if t > 0:
            out[:, t, fold : 2 * fold] = x[:, t - 1, fold : 2 * fold]
    return out.flatten(0, 1)


def halved(x_TCHW: Tensor) -> Tensor:
    """The greatest of frames 2k - 1, 2k and 2k + 1, for every k."""
    count = x_TCHW.shape[0]
    windows = [x_TCHW[max(0, t - 1) : t + 2] for t in range(0, count, 2)]
    return torch.stack([window.amax(dim=0) for window in windows])


def attended(state: State, parts: dict[str, str], x_BCHW: Tensor, segments: int) -> Tensor:
    """A non-local block of embedded Gaussians, keys and values pooled (arXiv 1711.07971)."""
    x = x_BCHW.unflatten(0, (-1, segments)).transpose(1, 2)

    def conv(part: str, x: Tensor) -> Tensor:
        name = parts[part]
        return F.conv3d(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    query = conv("theta", x).flatten(2)
    key, value = (F.max_pool3d(conv(part, x), (1, 2, 2)).flatten(2) for part in ("phi", "g"))
    share_NPQ = torch.einsum("ncp,ncq->npq", query, key).softmax(dim=2)
    y = torch.einsum("npq,ncq->ncp", share_NPQ, value).unflatten(2, x.shape[2:])
    y = batch_norm(state, parts["norm"], conv("out", y))
    return (x + y).transpose(1, 2).flatten(0, 1)


def run_frame_net(
    state: State, source: str, depth: int, x_NTCHW: Tensor, temporal: str | None = None,
    non_local: bool = False, pool: bool = False,
) -> Tensor:  # fmt: skip
    """Mean over frames of the logits of each, (N, K); see `frame_net` for the options."""
    names, segments = Names(source), x_NTCHW.shape[1]
    weight = state[f"{names.conv(names.root, 1)}.weight"]
    x = F.conv2d(x_NTCHW.flatten(0, 1), weight, stride=2, padding=3)
    x = F.max_pool2d(batch_norm(state, names.norm(names.root, 1), x).relu(), 3, 2, 1)
    for stage, blocks in enumerate(BLOCKS[depth], start=1):
        if pool and stage == 2:
            clip_NTCHW, segments = x.unflatten(0, (-1, segments)), segments // 2
            x = torch.stack([halved(clip) for clip in clip_NTCHW]).flatten(0, 1)
        for index in range(blocks):
            outer = names.block(stage, index, pool)
            attention = non_local and index in NON_LOCAL.get(stage, ())
            block = f"{outer}.block" if attention else outer
            if temporal == "block":
                block, x = f"{block}.net", shifted(x, segments)
            stride = 2 if stage > 1 and index == 0 else 1
            x = run_block(state, names, block, x, stride, depth >= 50, temporal, segments)
            if attention:
                x = attended(state, names.non_local(outer), x, segments)
    logits_NTK = linear(state, names.head, x.mean(dim=(2, 3))).unflatten(0, (-1, segments))
    return logits_NTK.mean(dim=1)


def run_block(
    state: State, names: Names, block: str, x: Tensor, stride: int, bottleneck: bool,
    temporal: str | None, segments: int,
) -> Tensor:  # fmt: skip
    strides = (1, stride, 1) if bottleneck else (stride, 1)
    y = x
    for number, step in enumerate(strides, start=1):
        name = names.conv(block, number)
        if number == 1 and temporal == "tin":
            layers = names.interlace(name)
            name, y = layers["conv"], interlaced(state, layers, y, segments)
        elif number == 1 and temporal == "tsm" and f"{name}.net.weight" in state:
            name, y = f"{name}.net", shifted(y, segments)
        weight = state[f"{name}.weight"]
        y = F.conv2d(y, weight, stride=step, padding=weight.shape[-1] // 2)
        y = batch_norm(state, names.norm(block, number), y)
        y = y.relu() if number < len(strides) else y
    conv, norm = names.shortcut(block)
    if f"{conv}.weight" in state:
        x = batch_norm(state, norm, F.conv2d(x, state[f"{conv}.weight"], stride=stride))
    return (x + y).relu()


def run_slowfast(state: State, depth: int, x_NTCHW: Tensor) -> Tensor:
    """X-Temporal's SlowFast: every fourth frame is slow, lateral maps join before each stage."""
    x = x_NTCHW.transpose(1, 2)
    maps = {}
    for path, clip in (("fast", x), ("slow", x[:, :, ::4])):
        y = clip_conv(state, f"{path}_conv1", clip, (1, 2, 2))
        y = batch_norm(state, f"{path}_bn1", y).relu()
        maps[path] = F.max_pool3d(y, (1, 3, 3), (1, 2, 2), (0, 1, 1))
    for stage, lateral in enumerate(("p1", "res2", "res3", "res4")):
        sent = clip_conv(state, f"lateral_{lateral}", maps["fast"], (4, 1, 1))
        maps["slow"] = torch.cat([maps["slow"], sent], dim=1)
        for path in maps:
            for index in range(BLOCKS[depth][stage]):
                stride = 2 if stage > 0 and index == 0 else 1
                block = f"{path}_res{stage + 2}.{index}"
                maps[path] = clip_block(state, block, maps[path], (1, stride, stride))
    pooled = [maps[path].mean(dim=(2, 3, 4)) for path in ("slow", "fast")]
    return F.linear(torch.cat(pooled, dim=1), state["fc.weight"])


def run_clip_net(state: State, depth: int, x_NTCHW: Tensor, pool: tuple[int, ...]) -> Tensor:
    """X-Temporal's R(2+1)D or R3D; `pool` is the kernel after the stem."""
    x = clip_conv(state, "conv1", x_NTCHW.transpose(1, 2), (1, 2, 2))
    x = batch_norm(state, "bn1", x).relu()
    steps = (1, 2, 2) if pool[0] == 1 else (2, 2, 2)
    x = F.max_pool3d(x, pool, steps, tuple(size // 2 for size in pool))
    for stage, blocks in enumerate(BLOCKS[depth], start=1):
        for index in range(blocks):
            stride = 2 if stage > 1 and index == 0 else 1
            x = clip_block(state, f"layer{stage}.{index}", x, (stride,) * 3)
    return linear(state, "fc", x.mean(dim=(2, 3, 4)))


def clip_block(state: State, block: str, x: Tensor, stride: tuple[int, ...]) -> Tensor:
    count = 3 if f"{block}.bn3.weight" in state else 2
    y = x
    for number in range(1, count + 1):
        step = stride if number == count - 1 else (1, 1, 1)
        y = clip_conv(state, f"{block}.conv{number}", y, step)
        y = batch_norm(state, f"{block}.bn{number}", y)
        y = y.relu() if number < count else y
    name = f"{block}.downsample"
    if f"{name}.0.weight" in state:
        x = batch_norm(state, f"{name}.1", clip_conv(state, f"{name}.0", x, stride))
    return (x + y).relu()


def clip_conv(state: State, name: str, x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """A 3D convolution, or a spatial and a temporal one with norm and ReLU in between."""
    weight = state.get(f"{name}.weight")
    if weight is not None:
        padding = tuple(size // 2 for size in weight.shape[2:])
        return F.conv3d(x, weight, stride=stride, padding=padding)
    y = clip_conv(state, f"{name}.spatial_conv", x, (1, *stride[1:]))
    y = batch_norm(state, f"{name}.bn", y).relu()
    return clip_conv(state, f"{name}.temporal_conv", y, (stride[0], 1, 1))
