"""Boxes: sizes, overlaps, the box coder, and the numbers that random choices are made with.

Letters: N M boxes, R boxes in rows with others. Boxes are xyxy in absolute pixels. `plus` is what
a width has beyond x2 - x1: 0 for continuous coordinates, 1 for the inclusive pixels of
mmdetection v1, where [3, 3] is one pixel wide.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

STDS = (0.1, 0.1, 0.2, 0.2)
CLIP = math.log(1000 / 16)  # of the change of a size when decoding (mmdetection, detectron2)
SMALLEST = 1e-6  # pixels; a box without width has a finite logarithm and a finite overlap
WORD = 0xFFFFFFFF


def sizes(box: Tensor, plus: float = 0.0) -> tuple[Tensor, Tensor]:
    """Widths and heights of boxes (..., 4), each (...); negative where corners are swapped."""
    return box[..., 2] - box[..., 0] + plus, box[..., 3] - box[..., 1] + plus


def area(box: Tensor, plus: float = 0.0) -> Tensor:
    """Square pixels of boxes (..., 4); 0 where corners are swapped."""
    width, height = sizes(box, plus)
    return width.clamp(min=0) * height.clamp(min=0)


def valid_mask(box: Tensor, min_size: float = 0.0, plus: float = 0.0) -> Tensor:
    """Boxes (..., 4) with an area and both sides >= `min_size` pixels; False for NaN."""
    width, height = sizes(box, plus)
    side = torch.minimum(width, height)
    return (side >= min_size) & (side > 0)


def clip_boxes(
    box: Tensor, size: tuple[float, float] | Sequence[Tensor] | Tensor, plus: float = 0.0
) -> Tensor:
    """Boxes (..., 4) cut at the borders of an image.

    Args:
        box: (..., 4).
        size: height and width, as numbers or as a tensor (2,) that is then never read by the host.
        plus: see the module.
    """
    height, width = size
    x = _between(box[..., 0::2], width, plus)
    y = _between(box[..., 1::2], height, plus)
    return torch.stack((x[..., 0], y[..., 0], x[..., 1], y[..., 1]), dim=-1)


def _between(x: Tensor, end: float | Tensor, plus: float) -> Tensor:
    if isinstance(end, Tensor):
        return torch.minimum(x.clamp(min=0), (end - plus).to(x))
    return x.clamp(min=0, max=end - plus)


def iou(a_N4: Tensor, b_M4: Tensor, plus: float = 0.0) -> Tensor:
    """Intersection over union of every box with every other, (N, M); 0 for two without area."""
    inter_NM = _intersection(a_N4[:, None], b_M4[None], plus)
    union_NM = area(a_N4, plus)[:, None] + area(b_M4, plus) - inter_NM
    return inter_NM / union_NM.clamp(min=max(plus, SMALLEST))


def iou_rows(a_R4: Tensor, b_R4: Tensor, plus: float = 0.0) -> Tensor:
    """Intersection over union of each row with its partner, (R,); differentiable in both.

    With `plus` = 1 the union is at least one pixel, as in Sense-X/TSD.
    """
    inter_R = _intersection(a_R4, b_R4, plus)
    union_R = area(a_R4, plus) + area(b_R4, plus) - inter_R
    return inter_R / union_R.clamp(min=max(plus, SMALLEST))


def overlap_of_first(a_N4: Tensor, b_M4: Tensor, plus: float = 0.0) -> Tensor:
    """Share of each box of `a` that lies in each box of `b`, (N, M): how crowds are matched."""
    inter_NM = _intersection(a_N4[:, None], b_M4[None], plus)
    return inter_NM / area(a_N4, plus)[:, None].clamp(min=max(plus, SMALLEST))


def _intersection(a: Tensor, b: Tensor, plus: float) -> Tensor:
    # no (..., 2) intermediates: the matrix of anchors and objects is the largest of a step
    width = torch.minimum(a[..., 2], b[..., 2]) - torch.maximum(a[..., 0], b[..., 0]) + plus
    height = torch.minimum(a[..., 3], b[..., 3]) - torch.maximum(a[..., 1], b[..., 1]) + plus
    return width.clamp(min=0) * height.clamp(min=0)


def encode(box: Tensor, gt: Tensor, stds: Sequence[float] = STDS, plus: float = 0.0) -> Tensor:
    """What a regressor has to say so that `decode` turns `box` into `gt`; inverse of `decode`.

    (t_x, t_y) = (centre of gt - centre of box) / size of box / std, (t_w, t_h) = the logarithm of
    the ratio of sizes / std (R-CNN, arXiv 1311.2524, appendix C). Differentiable in both arguments.

    Args:
        box: (..., 4).
        gt: (..., 4), broadcast against it.
        stds: of the four numbers, so that the regressor sees values of the order of one.
        plus: see the module.
    """
    x, y, width, height = _centred(box, plus)
    gt_x, gt_y, gt_width, gt_height = _centred(gt, plus)
    delta = (
        (gt_x - x) / width / stds[0],
        (gt_y - y) / height / stds[1],
        (gt_width / width).log() / stds[2],
        (gt_height / height).log() / stds[3],
    )
    return torch.stack(delta, dim=-1)


def decode(
    box: Tensor,
    delta: Tensor,
    stds: Sequence[float] = STDS,
    plus: float = 0.0,
    clip: float = CLIP,
) -> Tensor:
    """Boxes that deltas of `encode`'s form describe; differentiable in both arguments.

    Args:
        box: (..., 4) what the deltas are relative to; (R, 1, 4) for deltas (R, k, 4) of k classes.
        delta: (..., 4).
        stds: of the four numbers.
        plus: see the module.
        clip: a size changes by at most this factor's logarithm, either way. torchvision and
            detectron2 bound the growth only.

    Returns:
        Boxes of the broadcast shape, not cut at the image.
    """
    x, y, width, height = _centred(box, plus)
    x = x + delta[..., 0] * stds[0] * width
    y = y + delta[..., 1] * stds[1] * height
    half_width = 0.5 * width * (delta[..., 2] * stds[2]).clamp(-clip, clip).exp()
    half_height = 0.5 * height * (delta[..., 3] * stds[3]).clamp(-clip, clip).exp()
    corners = (x - half_width, y - half_height, x + half_width - plus, y + half_height - plus)
    return torch.stack(corners, dim=-1)


def _centred(box: Tensor, plus: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centre and sizes; the centre of inclusive pixels is half a pixel further than (x1 + x2)/2."""
    width, height = sizes(box, plus)
    x, y = box[..., 0] + 0.5 * width, box[..., 1] + 0.5 * height
    return x, y, width.clamp(min=SMALLEST), height.clamp(min=SMALLEST)


def fold_key(*numbers: int) -> int:
    """One 64-bit key of several integers, such as (seed, number of the draw, stage).

    Each is mixed in by the finaliser of SplitMix64, so that neighbouring numbers give unrelated
    keys and the order of the numbers matters.
    """
    key = 0
    for number in numbers:
        key = (key + number + 0x9E3779B97F4A7C15) & (2**64 - 1)
        key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        key ^= key >> 31
    return key


def random_keys(count: int, key: int, device: torch.device | str = "cpu") -> Tensor:
    """Numbers in [0, 1), float64 (count,), without repetition: a function of (index, key) only.

    A counter-based hash in integers, so that every device, rank and restart gets the same numbers
    and no generator has a state that could differ. The mixing is a bijection of 32-bit words for a
    given key, which is why no two numbers are equal; number i does not depend on `count`.
    """
    word = torch.arange(count, dtype=torch.int64, device=device)
    word = _mix(word) ^ (key & WORD)
    word = _mix(word) ^ ((key >> 32) & WORD)
    return _mix(word).to(torch.float64) / 2**32


def _mix(word: Tensor) -> Tensor:
    """A 32-bit finaliser (multipliers of the hash prospector's "lowbias32") in int64 words.

    A product of int64 wraps, which leaves its low 32 bits right.
    """
    word = ((word ^ (word >> 16)) * 0x7FEB352D) & WORD
    word = ((word ^ (word >> 15)) * 0x846CA68B) & WORD
    return word ^ (word >> 16)
