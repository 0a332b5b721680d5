"""Losses: fixtures, loops, gradients, objectives."""

import pytest
import torch
from torch import Tensor

from reid_rqen.losses import (
    PKObjective,
    SetObjective,
    SiameseObjective,
    SoftmaxObjective,
    contrastive,
    frame_cross_entropy,
    hinge_embedding,
    pk_triplet,
    score_spread,
    set_triplet,
)
from reid_rqen.models.output import SetOutput

ANCHOR = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
POSITIVE = torch.tensor([[0.6, 0.8]], dtype=torch.float64)
NEGATIVE = torch.tensor([[0.0, 1.0]], dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_check_04_fixtures() -> None:
    assert set_triplet(ANCHOR, POSITIVE, NEGATIVE, 1.8).item() == pytest.approx(0.3)
    assert set_triplet(ANCHOR, POSITIVE, NEGATIVE, 1.2).item() == pytest.approx(0, abs=1e-15)
    assert contrastive(ANCHOR, POSITIVE).item() == pytest.approx(0.4)


def test_check_04_gradient_of_the_anchor() -> None:
    anchor, positive, negative = (random(4, 3, seed=i) for i in range(3))
    anchor.requires_grad_()
    distance = (anchor - positive).square().sum(1) - (anchor - negative).square().sum(1)
    margin = -float(distance.detach().sort().values[1:3].mean())
    set_triplet(anchor, positive, negative, margin).backward()
    active = (distance.detach() + margin > 0)[:, None]
    assert active.sum() == 2
    torch.testing.assert_close(anchor.grad, active * (negative - positive) / 4)


def test_check_04_gradcheck() -> None:
    rows = [random(3, 4, seed=i).requires_grad_() for i in range(3)]
    assert torch.autograd.gradcheck(lambda a, p, n: set_triplet(a, p, n, 1.2), rows)
    assert torch.autograd.gradcheck(contrastive, rows[:2])
    same = torch.tensor([True, False, False])
    assert torch.autograd.gradcheck(lambda a, b: hinge_embedding(a, b, same, 2.0), rows[:2])
    label = torch.tensor([0, 1, 0])
    for mining in ("all", "hard"):
        assert torch.autograd.gradcheck(lambda v, m=mining: pk_triplet(v, label, 5.0, m), rows[:1])
    assert torch.autograd.gradcheck(lambda x: frame_cross_entropy(x, torch.tensor([3])), rows[:1])


@pytest.mark.parametrize("count", [0, 5])
def test_losses_of_nothing_are_zero_with_a_graph(count: int) -> None:
    """No set at all, or sets without a negative."""
    vector = random(count, 3).requires_grad_()
    label = torch.zeros(count, dtype=torch.int64)
    losses = [pk_triplet(vector, label, 1.0, "all"), pk_triplet(vector, label, 1.0)]
    if not count:
        losses += [set_triplet(vector, vector, vector, 1.0), contrastive(vector, vector)]
        losses += [hinge_embedding(vector, vector, label.bool(), 2.0)]
        losses += [frame_cross_entropy(vector, label)]
    for loss in losses:
        assert loss.item() == 0
        loss.backward(retain_graph=True)
    assert vector.grad is not None
    assert not vector.grad.any()


def test_siamese_distance_of_equal_vectors_has_a_finite_gradient() -> None:
    left = torch.ones(2, 3, requires_grad=True)
    hinge_embedding(left, torch.ones(2, 3), torch.tensor([True, False]), 2.0).backward()
    assert left.grad is not None
    assert left.grad.isfinite().all()


def test_hinge_embedding_equals_the_loop() -> None:
    left, right = random(6, 4), random(6, 4, seed=1)
    same = torch.tensor([True, False, True, False, False, True])
    total = 0.0
    for a, b, s in zip(left, right, same, strict=True):
        distance = float((a - b).square().sum().sqrt())
        total += distance if s else max(0.0, 3.0 - distance)
    assert hinge_embedding(left, right, same, 3.0).item() == pytest.approx(total / 6)


def test_pk_triplets_equal_the_loops() -> None:
    label = torch.tensor([0, 0, 0, 1, 1, 2])
    vector, margin = random(6, 3), 1.2
    distance = (vector[:, None] - vector[None]).square().sum(-1)
    every, hard = [], []
    for a in range(6):
        positive = [p for p in range(6) if p != a and label[p] == label[a]]
        negative = [n for n in range(6) if label[n] != label[a]]
        gaps = [margin + float(distance[a, p] - distance[a, n]) for p in positive for n in negative]
        every += [max(0.0, gap) / 2 for gap in gaps]
        hard += [max(0.0, max(gaps)) / 2] if gaps else []
    assert len(hard) == 5
    assert pk_triplet(vector, label, margin, "all").item() == pytest.approx(sum(every) / len(every))
    assert pk_triplet(vector, label, margin).item() == pytest.approx(sum(hard) / 5)
    with pytest.raises(ValueError, match="mining='soft'"):
        pk_triplet(vector, label, margin, "soft")


def test_cross_entropy_gives_every_frame_the_label_of_its_set() -> None:
    logits, label = random(6, 4), torch.tensor([3, 1])
    rows = -logits.log_softmax(dim=1)
    expected = torch.cat([rows[:3, 3], rows[3:, 1]]).mean()
    torch.testing.assert_close(frame_cross_entropy(logits, label), expected)
    with pytest.raises(ValueError, match="5 rows of logits for 2 sets"):
        frame_cross_entropy(logits[:5], label)


def test_losses_are_float32_inside_autocast() -> None:
    vector = random(4, 3).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = [
            set_triplet(vector, vector, vector, 1.2),
            contrastive(vector, vector.flip(0)),
            frame_cross_entropy(vector, torch.tensor([0, 1])),
            pk_triplet(vector, torch.tensor([0, 0, 1, 1]), 1.2),
            hinge_embedding(vector, vector.flip(0), torch.ones(4).bool(), 2.0),
        ]
    assert {loss.dtype for loss in losses} == {torch.float32}
    assert losses[1].item() == pytest.approx(
        (vector.float() - vector.float().flip(0)).square().sum().item() / 8
    )


def output(draws: int = 2, sets: int = 3, frames: int = 4, heads: int = 3) -> SetOutput:
    vector = torch.nn.functional.normalize(random(draws * sets, 5).abs(), dim=1)
    logits = tuple(random(draws * sets * frames, 7, seed=i) for i in range(heads))
    return SetOutput(vector, logits, random(draws * sets, frames, 3).sigmoid())


PID = torch.tensor([[0, 0, 1], [5, 5, 2]])


def test_set_objective_adds_up() -> None:
    out = output()
    anchor, positive, negative = out.vector_SD.view(2, 3, 5).unbind(1)
    triplet, pull = set_triplet(anchor, positive, negative, 1.8), contrastive(anchor, positive)
    ce = [frame_cross_entropy(logits, PID.flatten()) for logits in out.logits]
    total, parts = SetObjective(1.8)(out, PID)
    torch.testing.assert_close(total, sum(ce) + triplet + pull)
    torch.testing.assert_close(parts["aux2"], ce[2])
    weighted, _ = SetObjective(1.8, triplet=2, contrastive=3, softmax=5, auxiliary=7)(out, PID)
    torch.testing.assert_close(weighted, 2 * triplet + 3 * pull + 5 * ce[0] + 7 * (ce[1] + ce[2]))
    assert 0 <= parts["accuracy"] <= 1


def test_objectives_name_what_does_not_fit() -> None:
    out = output()
    with pytest.raises(ValueError, match=r"pid has shape \(2, 2\)"):
        SetObjective()(out, PID[:, :2])
    with pytest.raises(ValueError, match="6 set vectors for 3 identities"):
        SetObjective()(out, PID[:1])
    with pytest.raises(ValueError, match="no classifier"):
        SetObjective()(out._replace(logits=()), PID)


def test_softmax_and_pk_objectives() -> None:
    out = output(heads=2)
    ce = [frame_cross_entropy(logits, PID.flatten()) for logits in out.logits]
    total, parts = SoftmaxObjective(auxiliary=0.5)(out, PID)
    torch.testing.assert_close(total, ce[0] + 0.5 * ce[1])
    assert set(parts) == {"softmax", "aux1", "accuracy"}
    total, _ = PKObjective(1.2, "all", triplet=2)(out, PID)
    expected = pk_triplet(out.vector_SD, PID.flatten(), 1.2, "all")
    torch.testing.assert_close(total, ce[0] + ce[1] + 2 * expected)


def test_siamese_objective_pairs_the_anchor_twice() -> None:
    out = output(frames=1, heads=1)._replace(score_STR=None)
    total, parts = SiameseObjective(margin=2.0)(out, PID)
    left, right = out.vector_SD[[0, 3, 0, 3]], out.vector_SD[[1, 4, 2, 5]]
    same = torch.tensor([True, True, False, False])
    hinge = hinge_embedding(left, right, same, 2.0)
    rows = out.logits[0][[0, 3, 0, 3, 1, 4, 2, 5]]
    ce = torch.nn.functional.cross_entropy(rows, PID.flatten()[[0, 3, 0, 3, 1, 4, 2, 5]])
    torch.testing.assert_close(total, hinge + 2 * ce)
    torch.testing.assert_close(parts["hinge"], hinge)
    paired = out._replace(logits=(rows,), pairs=(left, right))
    torch.testing.assert_close(SiameseObjective()(paired, PID)[0], total)


def test_score_spread_tells_constant_scores() -> None:
    score = torch.tensor([0.2, 0.6]).view(1, 2, 1)
    assert score_spread(score).item() == pytest.approx(0.5)
    assert score_spread(torch.full((2, 4, 3), 0.37)).item() == pytest.approx(0, abs=1e-6)
