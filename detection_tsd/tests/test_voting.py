"""Box voting against a loop over detections and models."""

import pytest
import torch
from torch import Tensor

from detection_tsd import boxes
from detection_tsd.data.detection_data import Detections
from detection_tsd.nms import hard
from detection_tsd.voting import box_voting


def member(seed: int, count: int = 40) -> Detections:
    """A noisy view of the same ten objects of three classes."""
    objects = torch.Generator().manual_seed(0)
    corner = torch.rand(10, 2, generator=objects) * 100
    gt = torch.cat((corner, corner + 20 + torch.rand(10, 2, generator=objects) * 20), dim=1)
    maker = torch.Generator().manual_seed(seed + 1)
    pick = torch.randint(0, 10, (count,), generator=maker)
    box = gt[pick] + torch.randn(count, 4, generator=maker) * 2
    score = torch.rand(count, generator=maker).sort(descending=True).values
    return Detections(box, score, pick % 3 + 1)


def loop_voting(
    models: list[Detections], weights: list[float], iou: float, vote_iou: float, score: str
) -> list[tuple[list[float], float, int]]:
    top = max(weights)
    rows = [
        (box, float(value), int(label), number)
        for number, found in enumerate(models)
        for box, value, label in zip(found.box_D4, found.score_D, found.label_D, strict=True)
    ]
    weighted = torch.tensor([weights[row[3]] / top * row[1] for row in rows])
    kept = hard(
        torch.stack([row[0] for row in rows]), weighted, torch.tensor([row[2] for row in rows]), iou
    )
    voted = []
    for index in kept.index_D.tolist():
        votes: list[tuple[Tensor, float, int, int]] = []
        for row in rows:
            same = row[2] == rows[index][2]
            if same and float(boxes.iou_rows(row[0], rows[index][0])) >= vote_iou:
                votes.append(row)
        share = [weights[row[3]] * row[1] for row in votes]
        pairs = zip(votes, share, strict=True)
        mean = sum((row[0] * part for row, part in pairs), torch.zeros(4)) / sum(share)
        best = [
            max([r[1] for r in votes if r[3] == one], default=0.0) for one in range(len(models))
        ]
        value = sum(b * w for b, w in zip(best, weights, strict=True)) / sum(weights)
        voted.append((mean.tolist(), max(best) if score == "max" else value, rows[index][2]))
    return sorted(voted, key=lambda row: -row[1])


@pytest.mark.parametrize("score", ["mean", "max"])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [2.0, 1.0, 0.5]])
def test_voting_equals_the_loop(score: str, weights: list[float]) -> None:
    models = [member(0), member(1, 30), member(2, 20)]
    expected = loop_voting(models, weights, 0.5, 0.6, score)
    found = box_voting(models, weights, iou=0.5, vote_iou=0.6, score=score)
    assert found.label_D.tolist() == [row[2] for row in expected]
    assert found.score_D.tolist() == pytest.approx([row[1] for row in expected], abs=1e-6)
    torch.testing.assert_close(
        found.box_D4, torch.tensor([row[0] for row in expected]), rtol=1e-5, atol=1e-3
    )
    best = box_voting(models, weights, iou=0.5, vote_iou=0.6, score=score, per_image=3)
    assert torch.equal(best.box_D4, found.box_D4[:3])


def test_one_model_that_votes_for_itself_is_hard_suppression() -> None:
    one = member(5)
    kept = hard(*one[:3], 0.5).index_D
    found = box_voting([one], vote_iou=1.0)
    torch.testing.assert_close(found.box_D4, one.box_D4[kept])
    assert torch.equal(found.score_D, one.score_D[kept])


def test_what_one_model_alone_has_seen_falls_behind() -> None:
    box = torch.tensor([[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]])
    first = Detections(box, torch.tensor([0.6, 0.9]), torch.tensor([1, 1]))
    second = Detections(box[:1], torch.tensor([0.8]), torch.tensor([1]))
    mean = box_voting([first, second])
    assert mean.score_D.tolist() == pytest.approx([0.7, 0.45])
    torch.testing.assert_close(mean.box_D4, box)
    assert box_voting([first, second], score="max").score_D.tolist() == pytest.approx([0.9, 0.8])


def test_votes_do_better_than_a_single_noisy_box() -> None:
    truth = torch.tensor([[20.0, 20.0, 80.0, 80.0]])
    noise = torch.randn(30, 1, 4, generator=torch.Generator().manual_seed(0)) * 4
    label = torch.tensor([1])
    models = [Detections(truth + one, torch.tensor([0.9]), label) for one in noise]
    voted = box_voting(models, vote_iou=0.3)
    single = torch.cat([boxes.iou(found.box_D4, truth)[:, 0] for found in models])
    assert float(boxes.iou(voted.box_D4[:1], truth)) > float(single.mean()) + 0.05


def test_models_without_detections_are_fine() -> None:
    none = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert len(box_voting([none, none]).score_D) == 0
    one = member(3)
    both = box_voting([one, none])
    torch.testing.assert_close(both.score_D, box_voting([one]).score_D / 2)
    zero = Detections(one.box_D4[:1], torch.zeros(1), one.label_D[:1])
    assert torch.equal(box_voting([zero]).box_D4, zero.box_D4)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        box_voting([])
    for weights in ([1.0], [1.0, 0.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="one > 0 for each of 2 models"):
            box_voting([member(0), member(1)], weights)
    with pytest.raises(ValueError, match="score='median'"):
        box_voting([member(0)], score="median")
