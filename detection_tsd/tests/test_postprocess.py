"""From scores and deltas to detections, against the full computation."""

import dataclasses

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor

from detection_tsd import boxes
from detection_tsd.nms import adjusted, hard, soft
from detection_tsd.postprocess import PostProcess

SIZE = (90, 120)
STDS = (0.1, 0.1, 0.2, 0.2)


def head(regions: int, classes: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    maker = torch.Generator().manual_seed(seed)
    corner = torch.rand(regions, 2, generator=maker) * 90
    box_R4 = torch.cat((corner, corner + 10 + torch.rand(regions, 2, generator=maker) * 30), dim=1)
    prob_RK = (2 * torch.randn(regions, classes + 1, generator=maker)).softmax(dim=1)
    return prob_RK, torch.randn(regions, classes + 1, 4, generator=maker), box_R4


def full(prob_RK: Tensor, delta_RK4: Tensor, box_R4: Tensor, threshold: float, plus: float):  # type: ignore[no-untyped-def]
    """All boxes decoded and cut, all pairs above the threshold."""
    box_RK4 = boxes.clip_boxes(boxes.decode(box_R4[:, None], delta_RK4, STDS, plus), SIZE, plus)
    roi, label = (prob_RK[:, 1:] > threshold).nonzero(as_tuple=True)
    box, score, label = box_RK4[roi, label + 1], prob_RK[roi, label + 1], label + 1
    order = score.argsort(descending=True, stable=True)
    sized = order[boxes.valid_mask(box[order], plus=plus)]
    return box[sized], score[sized], label[sized]


@pytest.mark.parametrize("plus", [0.0, 1.0])
@pytest.mark.parametrize("threshold", [0.0, 0.05])
@pytest.mark.parametrize("method", ["hard", "soft_linear", "soft_gaussian", "adjusted"])
def test_detections_equal_the_full_computation(method: str, threshold: float, plus: float) -> None:
    made = head(70, 9, 1)
    box, score, label = full(*made, threshold, plus)
    if method == "hard":
        kept = hard(box, score, label, 0.4, plus=plus, limit=25)
    elif method == "adjusted":
        kept = adjusted(box, score, label, iou=0.4, sigma=0.3, plus=plus, limit=25)
    else:
        kind = method.removeprefix("soft_")
        kept = soft(box, score, label, kind=kind, iou=0.4, sigma=0.3, plus=plus, limit=25)
    post = PostProcess(threshold, method, 0.4, per_image=25, candidates=30, sigma=0.3)
    found = post(*made, SIZE, STDS, plus)
    assert torch.equal(found.box_D4, box[kept.index_D])
    assert torch.equal(found.score_D, kept.score_D)
    assert torch.equal(found.label_D, label[kept.index_D])
    assert len(found.score_D) == 25
    assert found.mask_DSS is None


def test_hard_detections_equal_torchvisions_pipeline() -> None:
    prob_RK, delta_RK4, box_R4 = head(50, 5, 2)
    box_RK4 = torchvision.ops.clip_boxes_to_image(
        boxes.decode(box_R4[:, None], delta_RK4, STDS), SIZE
    )
    box, score = box_RK4[:, 1:].reshape(-1, 4), prob_RK[:, 1:].reshape(-1)
    label = torch.arange(1, 6).repeat(50)
    over = (score > 0.05).nonzero()[:, 0]
    kept = over[torchvision.ops.batched_nms(box[over], score[over], label[over], 0.5)][:100]
    found = PostProcess(score_threshold=0.05)(prob_RK, delta_RK4, box_R4, SIZE, STDS)
    assert torch.equal(found.box_D4, box[kept])
    assert torch.equal(found.label_D, label[kept])
    assert torch.equal(found.score_D, score[kept])


def test_forms_of_the_arguments_that_mean_the_same() -> None:
    prob_RK, delta_RK4, box_R4 = head(30, 4, 3)
    post = PostProcess(per_image=20)
    expected = post(prob_RK, delta_RK4, box_R4, SIZE, STDS)
    box_RK4 = boxes.decode(box_R4[:, None], delta_RK4, STDS)
    forms = [
        post(prob_RK, delta_RK4.flatten(1), box_R4, SIZE, STDS),
        post(prob_RK, delta_RK4, box_R4, torch.tensor(SIZE), STDS),
        post.decoded(prob_RK, box_RK4, SIZE),
        post.decoded(prob_RK, boxes.clip_boxes(box_RK4, SIZE)),
    ]
    for found in forms:
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_classes_may_share_one_box() -> None:
    prob_RK, delta_RK4, box_R4 = head(30, 4, 4)
    one = delta_RK4[:, :1]
    post = PostProcess()
    expected = post(prob_RK, one.expand(-1, 5, -1), box_R4, SIZE, STDS)
    torch.testing.assert_close(post(prob_RK, one, box_R4, SIZE, STDS), expected)
    box_R14 = boxes.decode(box_R4[:, None], one, STDS)
    torch.testing.assert_close(post.decoded(prob_RK, box_R14, SIZE), expected)


def test_a_score_equal_to_the_threshold_is_left_out() -> None:
    prob_RK = torch.tensor([[0.0, 0.5, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]])
    box_RK4 = torch.tensor([0.0, 0.0, 5.0, 5.0]).expand(2, 4, 4)
    assert PostProcess(0.25).decoded(prob_RK, box_RK4).label_D.tolist() == [1]
    assert PostProcess(0.0).decoded(prob_RK, box_RK4).label_D.tolist() == [1, 2, 3]


def test_everything_stays_inside_the_image_in_float32() -> None:
    prob_RK, delta_RK4, box_R4 = head(40, 3, 5)
    found = PostProcess()(prob_RK.bfloat16(), (delta_RK4 * 9).bfloat16(), box_R4, SIZE, STDS)
    assert found.box_D4.dtype == found.score_D.dtype == torch.float32
    assert found.box_D4.min() >= 0
    assert found.box_D4[:, 2].max() <= 120
    assert found.box_D4[:, 3].max() <= 90
    assert boxes.valid_mask(found.box_D4).all()
    assert (found.score_D.diff() <= 0).all()


@pytest.mark.parametrize("method", ["hard", "soft_linear", "soft_gaussian", "adjusted"])
def test_no_regions_give_no_detections(method: str) -> None:
    found = PostProcess(nms=method)(*head(0, 4, 0), SIZE)
    assert found.box_D4.shape == (0, 4)
    assert found.label_D.dtype == torch.int64
    flat = PostProcess(nms=method)(torch.zeros(0, 5), torch.zeros(0, 20), torch.zeros(0, 4), SIZE)
    assert len(flat.score_D) == 0


def test_detections_take_no_part_in_the_graph() -> None:
    prob_RK, delta_RK4, box_R4 = head(5, 2, 6)
    found = PostProcess()(prob_RK, delta_RK4.requires_grad_(), box_R4, SIZE)
    assert not found.box_D4.requires_grad


def test_nan_scores_are_refused() -> None:
    prob_RK, delta_RK4, box_R4 = head(5, 2, 7)
    prob_RK[3, 1] = np.nan
    with pytest.raises(ValueError, match="row 3 of"):
        PostProcess()(prob_RK, delta_RK4, box_R4, SIZE)


@pytest.mark.parametrize(
    "wrong", [{"nms": "mean"}, {"per_image": 0}, {"candidates": 0}, {"sigma": 0.0}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        dataclasses.replace(PostProcess(), **wrong)  # type: ignore[arg-type]
