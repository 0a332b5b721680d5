"""What the published detectors compute, restated on their own names of the tensors.

Plain functions on a state dict, without this package: mmdetection v1 and Sense-X/TSD with their
inclusive pixels. One image at a time.

Letters: C channels, H W size, R regions, K class scores with the background at 0, P bins per side,
S samples per side of a bin.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import deform_conv2d, roi_align

State = dict[str, Tensor]
STRIDES = (4, 8, 16, 32, 64)
STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
GAMMA = 0.1


class Said(NamedTuple):
    """Of the branch that the test uses: scores (R, K), deltas (R, 4 K), shifts of the regions."""

    score: Tensor
    delta: Tensor
    shift_R2: Tensor


def linear(s: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, s[f"{name}.weight"], s[f"{name}.bias"])


def conv(s: State, name: str, x: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
    weight = s[f"{name}.weight"]
    padding = weight.shape[-1] // 2
    return F.conv2d(x, weight, s.get(f"{name}.bias"), stride, padding, groups=groups)


def norm(s: State, name: str, x: Tensor) -> Tensor:
    parts = (s[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, *parts)


def bottleneck(s: State, name: str, x: Tensor, stride: int) -> Tensor:
    y = F.relu(norm(s, f"{name}.bn1", conv(s, f"{name}.conv1", x)))
    weight = s[f"{name}.conv2.weight"]
    groups = y.shape[1] // weight.shape[1]
    offsets = next(
        (o for o in ("conv2_offset", "conv2.conv_offset") if f"{name}.{o}.bias" in s), ""
    )
    if offsets:
        moved = conv(s, f"{name}.{offsets}", y, stride)
        y = deform_conv2d(y, moved, weight, stride=stride, padding=1)
    else:
        y = conv(s, f"{name}.conv2", y, stride, groups)
    y = norm(s, f"{name}.bn3", conv(s, f"{name}.conv3", F.relu(norm(s, f"{name}.bn2", y))))
    if f"{name}.downsample.0.weight" in s:
        x = norm(s, f"{name}.downsample.1", conv(s, f"{name}.downsample.0", x, stride))
    return F.relu(y + x)


def pyramid(s: State, layers: tuple[int, ...], x: Tensor) -> list[Tensor]:
    """Maps P2 to P6."""
    x = F.relu(norm(s, "backbone.bn1", conv(s, "backbone.conv1", x, 2)))
    x, maps = F.max_pool2d(x, 3, 2, 1), []
    for stage, blocks in enumerate(layers, start=1):
        for index in range(blocks):
            stride = 2 if stage > 1 and index == 0 else 1
            x = bottleneck(s, f"backbone.layer{stage}.{index}", x, stride)
        maps.append(conv(s, f"neck.lateral_convs.{stage - 1}.conv", x))
    for level in (2, 1, 0):
        maps[level] = maps[level] + F.interpolate(maps[level + 1], size=maps[level].shape[2:])
    maps = [conv(s, f"neck.fpn_convs.{level}.conv", x) for level, x in enumerate(maps)]
    return [*maps, F.max_pool2d(maps[-1], 1, 2)]


def anchors(stride: int, height: int, width: int) -> Tensor:
    """AnchorGenerator with scale 8 and ratios 0.5, 1, 2; row, column, ratio."""
    root = torch.tensor([0.5, 1.0, 2.0]).sqrt()
    centre, side = 0.5 * (stride - 1), 8 * stride
    half_w, half_h = 0.5 * (side / root - 1), 0.5 * (side * root - 1)
    base = torch.stack((centre - half_w, centre - half_h, centre + half_w, centre + half_h), 1)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    shift = torch.stack((x, y, x, y), -1).reshape(-1, 1, 4) * stride
    return (shift + base.round()).reshape(-1, 4)


def decode(box: Tensor, delta: Tensor, stds: tuple[float, ...], size: tuple[int, int]) -> Tensor:
    """delta2bbox, cut at the image; delta (R, 4) or (R, K, 4) with box (R, 1, 4)."""
    dx, dy, dw, dh = (delta * torch.tensor(stds)).unbind(-1)
    dw, dh = (d.clamp(-abs(math.log(16 / 1000)), abs(math.log(16 / 1000))) for d in (dw, dh))
    x1, y1, x2, y2 = box.unbind(-1)
    w, h = x2 - x1 + 1, y2 - y1 + 1
    gx, gy = (x1 + x2) * 0.5 + w * dx, (y1 + y2) * 0.5 + h * dy
    gw, gh = w * dw.exp(), h * dh.exp()
    height, width = size
    corners = (
        (gx - gw * 0.5 + 0.5).clamp(0, width - 1), (gy - gh * 0.5 + 0.5).clamp(0, height - 1),
        (gx + gw * 0.5 - 0.5).clamp(0, width - 1), (gy + gh * 0.5 - 0.5).clamp(0, height - 1),
    )  # fmt: skip
    return torch.stack(corners, -1)


def nms(box: Tensor, score: Tensor, threshold: float) -> Tensor:
    """Indices that stay, best first; inclusive pixels."""
    order = score.argsort(descending=True)
    box = box[order]
    low, high = (
        torch.maximum(box[:, None, :2], box[:, :2]),
        torch.minimum(box[:, None, 2:], box[:, 2:]),
    )
    common = (high - low + 1).clamp(min=0).prod(-1)
    area = (box[:, 2:] - box[:, :2] + 1).prod(-1)
    above = (common / (area[:, None] + area - common) > threshold).tolist()
    kept: list[int] = []
    for row in range(len(order)):
        if not any(above[row][other] for other in kept):
            kept.append(row)
    return order[kept]


def propose(s: State, maps: list[Tensor], size: tuple[int, int], most: int) -> Tensor:
    """Proposals (R, 4) of RPNHead.get_bboxes_single, `most` of a level and of all (1000 there)."""
    boxes, scores = [], []
    for stride, x in zip(STRIDES, maps, strict=True):
        y = F.relu(conv(s, "rpn_head.rpn_conv", x))
        score = conv(s, "rpn_head.rpn_cls", y)[0].permute(1, 2, 0).reshape(-1).sigmoid()
        delta = conv(s, "rpn_head.rpn_reg", y)[0].permute(1, 2, 0).reshape(-1, 4)
        score, best = score.topk(min(most, len(score)))
        box = decode(anchors(stride, *x.shape[2:])[best], delta[best], (1.0,) * 4, size)
        kept = nms(box, score, 0.7)[:most]
        boxes.append(box[kept])
        scores.append(score[kept])
    return torch.cat(boxes)[torch.cat(scores).topk(min(most, sum(map(len, scores)))).indices]


def levels(box: Tensor) -> Tensor:
    side = ((box[:, 2] - box[:, 0] + 1) * (box[:, 3] - box[:, 1] + 1)).sqrt()
    return torch.floor(torch.log2(side / 56 + 1e-6)).clamp(0, 3).long()


def align(maps: list[Tensor], box: Tensor, size: int) -> Tensor:
    """RoIAlign of mmdetection v1 with two samples: from x1 / stride to (x2 + 1) / stride."""
    out = torch.zeros(len(box), maps[0].shape[1], size, size)
    for level, (x, stride) in enumerate(zip(maps[:4], STRIDES, strict=False)):
        here = levels(box) == level
        half = 0.5 * stride  # torchvision's aligned mode takes it away again
        moved = box[here] + torch.tensor([half, half, half + 1, half + 1])
        out[here] = roi_align(x, [moved], size, 1 / stride, 2, aligned=True)
    return out


def half_away(x: Tensor) -> Tensor:
    return x.sign() * (x.abs() + 0.5).floor()


def moved_pool(maps: list[Tensor], box: Tensor, shift_R2PP: Tensor) -> Tensor:
    """Deformable RoI pooling of DCN with 4 samples per side, group size 1, (R, C, P, P)."""
    size = shift_R2PP.shape[-1]
    out = torch.zeros(len(box), maps[0].shape[1], size, size)
    step, bins = torch.arange(4) / 4, torch.arange(size)
    for level, (maps_1CHW, stride) in enumerate(zip(maps[:4], STRIDES, strict=False)):
        here = levels(box) == level
        start = half_away(box[here, :2]) / stride - 0.5
        extent = ((half_away(box[here, 2:]) + 1) / stride - 0.5 - start).clamp(min=0.1)
        base = [a[:, :, None, None, None, None] for a in (start.T, extent.T, extent.T / size)]
        u, v = (
            base[0][axis] + base[2][axis] * place + GAMMA * shift[..., None, None] * base[1][axis]
            for axis, place, shift in (
                (0, bins[:, None, None] + step, shift_R2PP[here, 0]),
                (1, bins[:, None, None, None] + step[:, None], shift_R2PP[here, 1]),
            )
        )
        out[here] = sampled(maps_1CHW[0], u, v)
    return out


def sampled(x_CHW: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Mean (R, C, P, P) of the samples (R, P, P, S, S) that are not outside."""
    height, width = x_CHW.shape[1:]
    counts = (u >= -0.5) & (u <= width - 0.5) & (v >= -0.5) & (v <= height - 0.5)
    u, v = torch.broadcast_tensors(u.clamp(0, width - 1), v.clamp(0, height - 1))
    value = torch.zeros(x_CHW.shape[0], *u.shape)
    for xs, wx in ((u.floor(), 1 - (u - u.floor())), (u.ceil(), u - u.floor())):
        for ys, wy in ((v.floor(), 1 - (v - v.floor())), (v.ceil(), v - v.floor())):
            value += x_CHW[:, ys.long(), xs.long()] * wx * wy
    return ((value * counts).sum((-1, -2)) / counts.sum((-1, -2)).clamp(min=1)).transpose(0, 1)


def extract(s: State, name: str, x: Tensor) -> Tensor:
    return F.relu(linear(s, f"{name}.1", F.relu(linear(s, f"{name}.0", x.flatten(1)))))


def sibling(s: State, root: str, maps: list[Tensor], box: Tensor) -> Said:
    """SharedFCBBoxHead, and the sibling of TSDSharedFCBBoxHead."""
    y = extract(s, f"{root}.shared_fcs", align(maps, box, 7))
    return Said(
        linear(s, f"{root}.fc_cls", y), linear(s, f"{root}.fc_reg", y), torch.zeros(len(y), 2)
    )


def tsd(s: State, root: str, maps: list[Tensor], box: Tensor) -> Said:
    """TSDSharedFCBBoxHead at test time."""
    hidden = F.relu(linear(s, f"{root}.shared_fc.0", align(maps, box, 7).flatten(1)))
    shifts = [
        linear(s, f"{root}.{name}.2", F.relu(linear(s, f"{root}.{name}.0", hidden)))
        for name in ("delta_c", "delta_r")
    ]
    cls_shift, box_shift = shifts[0].view(-1, 2, 7, 7), shifts[1].view(-1, 2, 1, 1)
    cls = extract(s, f"{root}.TSD_pc_fcs", moved_pool(maps, box, cls_shift))
    reg = extract(s, f"{root}.TSD_pr_fcs", moved_pool(maps, box, box_shift.repeat(1, 1, 7, 7)))
    score, delta = linear(s, f"{root}.TSD_fc_cls", cls), linear(s, f"{root}.TSD_fc_reg", reg)
    return Said(score, delta, shifts[1])


def shifted(box: Tensor, shift_R2: Tensor) -> Tensor:
    side = box[:, 2:] - box[:, :2] + 1
    return box + (shift_R2 * GAMMA * side).repeat(1, 2)


def detect(
    s: State, layers: tuple[int, ...], x: Tensor, size: tuple[int, int], most: int, stages: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (inclusive pixels), scores and labels of the best 100, threshold 0, NMS at 0.5."""
    maps = pyramid(s, layers, x)
    box, total = propose(s, maps, size, most), torch.zeros(())
    run = tsd if any(".TSD_" in name for name in s) else sibling
    for stage in range(stages):
        said = run(s, "bbox_head" if stages == 1 else f"bbox_head.{stage}", maps, box)
        total, delta = total + said.score, said.delta.view(len(box), -1, 4)
        moved = shifted(box, said.shift_R2)
        if stage + 1 < stages:
            label = said.score.argmax(1)
            chosen = delta[torch.arange(len(box)), label if delta.shape[1] > 1 else 0]
            box = decode(moved, chosen, STDS[stage], size)
    prob = (total / stages).softmax(1)
    boxes = decode(moved[:, None], delta, STDS[stages - 1], size).expand(-1, prob.shape[1], 4)
    found = []
    for label in range(1, prob.shape[1]):
        kept = nms(boxes[:, label], prob[:, label], 0.5)
        found.append((boxes[kept, label], prob[kept, label], torch.full((len(kept),), label)))
    box, score, label = (torch.cat(part) for part in zip(*found, strict=True))
    best = score.topk(min(100, len(score))).indices
    return box[best], score[best], label[best]


def masks(s: State, maps: list[Tensor], box: Tensor, label: Tensor) -> Tensor:
    """Mask probabilities (R, 28, 28) of FCNMaskHead."""
    y = align(maps, box, 14)
    for number in range(4):
        y = F.relu(conv(s, f"mask_head.convs.{number}.conv", y))
    y = F.relu(F.conv_transpose2d(
        y, s["mask_head.upsample.weight"], s["mask_head.upsample.bias"], stride=2
    ))  # fmt: skip
    return conv(s, "mask_head.conv_logits", y)[torch.arange(len(box)), label].sigmoid()
