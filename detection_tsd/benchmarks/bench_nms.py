"""Speed of suppression and of the decoding before it, for one image.

A detector with a score threshold of 0 hands every pair of region and class to NMS: 1000 regions
and 80 classes make 80,000 boxes. Each row compares our detections with those of the peer first,
then times both in turns in this process. On CUDA the tensors are there.

Letters: R RoIs, K scores with the background at column 0, P pairs above the threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor

from detection_tsd import boxes
from detection_tsd.benchmarks.results import Row, measure, row
from detection_tsd.data.detection_data import Detections
from detection_tsd.postprocess import PostProcess

SIZE = (800, 1333)
CLASSES = 80
OBJECTS = 20
IOU, PER_IMAGE = 0.5, 100
LIMIT = 1e-3  # pixels; torchvision moves classes apart in float32 where there are few boxes
ALL = 10**9
NAMES = {"hard": "hard NMS", "soft_gaussian": "soft NMS, Gaussian", "adjusted": "adjusted NMS"}

Detect = Callable[[], Detections]


class Problem(NamedTuple):
    """What a box head says about the regions of an image."""

    prob_RK: Tensor
    delta_RK4: Tensor
    box_R4: Tensor

    @property
    def label(self) -> str:
        """Regions x classes, for the table."""
        return f"{len(self.box_R4)}x{self.prob_RK.shape[1] - 1}"


def problem(regions: int, seed: int, device: torch.device | str = "cpu") -> Problem:
    """Half of the regions around 20 objects and sure of their class, half background."""
    maker = torch.Generator().manual_seed(seed)
    object_O4, background_R4 = _inside(OBJECTS, maker), _inside(regions, maker)
    class_O = torch.randint(1, CLASSES + 1, (OBJECTS,), generator=maker)
    object_R = torch.arange(regions) % OBJECTS
    sure_R = torch.arange(regions) < regions // 2
    jitter_R4 = 0.1 * torch.randn(regions, 4, generator=maker)
    near_R4 = boxes.clip_boxes(boxes.decode(object_O4[object_R], jitter_R4, (1.0,) * 4), SIZE)
    box_R4 = torch.where(sure_R[:, None], near_R4, background_R4)
    logit_RK = torch.randn(regions, CLASSES + 1, generator=maker)
    column_R = torch.where(sure_R, class_O[object_R], 0)
    logit_RK[torch.arange(regions), column_R] += 6
    delta_RK4 = torch.randn(regions, CLASSES + 1, 4, generator=maker)
    made = Problem(logit_RK.softmax(dim=1), delta_RK4, box_R4)
    return Problem(*(values.to(device) for values in made))


def _inside(count: int, maker: torch.Generator) -> Tensor:
    """Boxes of 16 to 400 pixels a side within the image, (count, 4)."""
    side = 16 * 25 ** torch.rand(count, 2, generator=maker)
    corner = torch.rand(count, 2, generator=maker) * (torch.tensor(SIZE[::-1]) - side)
    return torch.cat((corner, corner + side), dim=1)


def nms_rows(repeats: int, quick: bool = False, seed: int = 0) -> Iterator[Row]:
    """Hard NMS against torchvision's on all pairs, then ours against ours on all pairs.

    Raises:
        RuntimeError: the detections differ.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = problem(100 if quick else 1000, seed, device)
    for threshold in (0.0, 0.05):
        ours = _ours(case, "hard", threshold, PostProcess.candidates)
        yield _compare(case, "hard", threshold, "torchvision, all pairs", ours, repeats)
    for method in NAMES:
        ours = _ours(case, method, 0.0, PostProcess.candidates)
        yield _compare(case, method, 0.0, "ours, all pairs", ours, repeats)


def _compare(
    case: Problem, method: str, threshold: float, peer: str, ours: Detect, repeats: int
) -> Row:
    theirs = _ours(case, method, threshold, ALL)
    if peer.startswith("torchvision"):
        theirs = partial(all_pairs, case, threshold)
    name = f"{NAMES[method]}, threshold {threshold}"
    gap = difference(ours(), theirs())
    if not gap <= LIMIT:
        raise RuntimeError(f"{name} differs from {peer} by {gap}, more than {LIMIT}")
    timed = measure(ours, theirs, repeats)
    return row(name, case.label, peer) | timed | {"max_abs_diff": gap}


def _ours(case: Problem, method: str, threshold: float, candidates: int) -> Detect:
    post = PostProcess(threshold, method, IOU, PER_IMAGE, candidates)
    return partial(post, *case, SIZE)


def all_pairs(case: Problem, threshold: float) -> Detections:
    """Every box decoded, all pairs above the threshold in torchvision's batched NMS."""
    box_RK4 = boxes.decode(case.box_R4[:, None], case.delta_RK4)
    box_RK4 = torchvision.ops.clip_boxes_to_image(box_RK4, SIZE)
    roi_P, label_P = (case.prob_RK[:, 1:] > threshold).nonzero(as_tuple=True)
    label_P = label_P + 1
    box_P4, score_P = box_RK4[roi_P, label_P], case.prob_RK[roi_P, label_P]
    sized = torchvision.ops.remove_small_boxes(box_P4, 1e-9)
    box_P4, score_P, label_P = box_P4[sized], score_P[sized], label_P[sized]
    kept = torchvision.ops.batched_nms(box_P4, score_P, label_P, IOU)[:PER_IMAGE]
    return Detections(box_P4[kept], score_P[kept], label_P[kept])


def difference(ours: Detections, theirs: Detections) -> float:
    """Greatest difference of boxes (pixels) and scores; infinite where counts or labels differ."""
    if not torch.equal(ours.label_D, theirs.label_D):
        return float("inf")
    pairs = ((ours.box_D4, theirs.box_D4), (ours.score_D, theirs.score_D))
    return max((float((a - b).abs().max()) for a, b in pairs if a.numel()), default=0.0)
