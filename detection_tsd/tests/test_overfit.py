"""Every detector learns eight pictures by heart: RPN, heads, masks and the test work together.

Letters: B images of a batch, G objects, D detections, H W size.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from detection_tsd.data.batch import collate
from detection_tsd.data.coco import load_coco
from detection_tsd.data.coco_replica import make_coco_replica
from detection_tsd.data.detection_data import Batch, Detections, Item
from detection_tsd.data.draws import DetectionDraws
from detection_tsd.data.transforms import DetectionTransform
from detection_tsd.engine import train_step
from detection_tsd.matching import RoISampler
from detection_tsd.metrics.coco import evaluate
from detection_tsd.models.cascade import CascadeDetector, with_stds
from detection_tsd.models.d_head import DHead
from detection_tsd.models.detector import Detector, TwoStage
from detection_tsd.models.mask_branch import MaskBranch, paste
from detection_tsd.models.sibling_head import BoxHead, SiblingHead
from detection_tsd.models.tiny import TinyFPN
from detection_tsd.models.tsd_head import TSDHead
from detection_tsd.postprocess import PostProcess
from detection_tsd.tests.small_detectors import STDS, small_rpn

pytestmark = pytest.mark.slow
IMAGES, RATE, WARMUP = 8, 0.005, 20
COMMON: dict[str, Any] = {"channels": 32, "width": 128, "level_base": 18.0}
TRANSFORM = DetectionTransform(keep_size=True, flip=0.0)


def sibling() -> BoxHead:
    return SiblingHead(3, **COMMON)


def d_head() -> BoxHead:
    return DHead(3, **COMMON)


def tsd() -> BoxHead:
    return TSDHead(3, offset_width=64, offset_init="normal001", **COMMON)


def detector(make: Callable[[], BoxHead], mask: bool = False, stages: int = 1) -> TwoStage:
    torch.manual_seed(0)
    parts: dict[str, Any] = {
        "backbone": TinyFPN((12, 24, 32), 32),
        "rpn": small_rpn(pre_train=150, post_train=60, post_test=40),
        "sampler": RoISampler(32, 0.5),
        "post": PostProcess(0.05),
    }
    if mask:
        settings = {"channels": 32, "layers": (32, 32), "size": 7, "level_base": 18.0}
        parts["mask"] = MaskBranch(3, **settings)  # type: ignore[arg-type]
    if stages == 1:
        return Detector(head=make(), **parts)
    return CascadeDetector(heads=[with_stds(make(), stds) for stds in STDS[:stages]], **parts)


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> list[Item]:
    """The last eight pictures of a set, with the masks of their objects."""
    root = make_coco_replica(tmp_path_factory.mktemp("replica"), 11, val=3)
    data = load_coco(root, masks=True, filter_empty=True)
    draws = DetectionDraws(data, TRANSFORM)
    found = {item.row: item for item in (draws[number] for number in range(8 * len(data)))}
    return [found[row] for row in sorted(found)][-IMAGES:]


def learn(model: TwoStage, batch: Batch, steps: int) -> None:
    """AdamW at a rate that rises, then falls to 0 as a cosine; new regions in every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=1e-4)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            rise, fall = min(1.0, (step + 1) / WARMUP), 0.5 + 0.5 * math.cos(math.pi * step / steps)
            group["lr"] = RATE * rise * fall
        drawn = batch._replace(draw_B=batch.draw_B + 1000 * step)
        loss, _ = train_step(model, drawn, TRANSFORM, torch.device("cpu"))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 35.0, error_if_nonfinite=True)
        optimizer.step()


@torch.no_grad()
def detections(model: TwoStage, batch: Batch) -> list[Detections]:
    x_B3HW = TRANSFORM.normalize(batch.image_B3HW, batch.size_B2)
    found: list[Detections] = model.eval()(x_B3HW, batch.size_B2)
    return found


def average_precision(found: list[Detections], items: list[Item]) -> float:
    """COCO's AP, over IoU thresholds 0.50 to 0.95."""
    truth, said = [], []
    for item, one in zip(items, found, strict=True):
        for box, label in zip(xywh(item.target.box_G4), item.target.label_G.tolist(), strict=True):
            entry = {"id": len(truth) + 1, "image_id": item.row, "category_id": label}
            truth.append(entry | {"bbox": box, "area": box[2] * box[3], "iscrowd": 0})
        rows = zip(xywh(one.box_D4), one.score_D.tolist(), one.label_D.tolist(), strict=True)
        said += [
            {"image_id": item.row, "category_id": label, "bbox": box, "score": score}
            for box, score, label in rows
        ]
    images = [{"id": i.row, "height": i.original[0], "width": i.original[1]} for i in items]
    categories = [{"id": label, "name": str(label)} for label in (1, 2, 3)]
    dataset = {"images": images, "annotations": truth, "categories": categories}
    return evaluate(said, dataset).summary["AP"]


def xywh(box: torch.Tensor) -> list[list[float]]:
    return torch.cat((box[:, :2], box[:, 2:] - box[:, :2]), dim=1).tolist()


@pytest.mark.parametrize(
    ("make", "other", "steps"),
    [
        pytest.param(sibling, {}, 220, id="sibling"),
        pytest.param(d_head, {}, 220, id="d_head"),
        pytest.param(tsd, {}, 150, id="tsd"),
        pytest.param(sibling, {"mask": True}, 190, id="mask"),
        pytest.param(tsd, {"stages": 3}, 100, id="cascade"),
    ],
)
def test_check_12_eight_pictures_are_learned_by_heart(
    make: Callable[[], BoxHead], other: dict[str, Any], steps: int, items: list[Item]
) -> None:
    model, batch = detector(make, **other), collate(items, divisor=8)
    before = average_precision(detections(model, batch), items)
    learn(model, batch, steps)
    found = detections(model, batch)
    assert before < 0.1
    assert average_precision(found, items) >= 0.95
    if model.mask is not None:
        assert mask_overlap(found, items) > 0.85


def mask_overlap(found: list[Detections], items: list[Item]) -> float:
    """Mean IoU of the masks of the best detections with those of the objects they lie on."""
    overlaps = []
    for item, one in zip(items, found, strict=True):
        assert one.mask_DSS is not None
        assert item.target.mask_GHW is not None
        height, width = item.original
        count = len(item.target.box_G4)
        mask_DHW = paste(one.mask_DSS[:count], one.box_D4[:count], height, width).bool()
        for mask_HW in mask_DHW:
            truth_GHW = item.target.mask_GHW.bool()
            both_G = (truth_GHW & mask_HW).sum(dim=(1, 2))
            either_G = (truth_GHW | mask_HW).sum(dim=(1, 2))
            overlaps.append((both_G / either_G).max().item())
    return sum(overlaps) / len(overlaps)
