"""Targets, centres and objectives of the quality network, against loops in float64."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from face_lfr.quality import (
    LEAST_OTHER,
    TARGETS,
    Distillation,
    SetTriplet,
    class_means,
    own_and_other,
    targets,
)


def loop_targets(own: np.ndarray, other: np.ndarray, name: str) -> list[float]:
    """The equation, one number after the other."""
    raw = []
    for a, h in zip(own.tolist(), other.tolist(), strict=True):
        ratio = a / (h if h > LEAST_OTHER else LEAST_OTHER)
        raw.append({"ddl_ratio": ratio, "ddl_diff": a - h, "own_cos": a}[name])
    mean = sum(raw) / len(raw)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in raw) / len(raw))
    return [1 / (1 + math.exp(-(x - mean) / deviation)) for x in raw]


@pytest.mark.parametrize("name", TARGETS)
def test_targets_equal_the_equation(name: str) -> None:
    rng = np.random.default_rng(0)
    own = rng.uniform(-0.2, 1, 50).astype(np.float32)
    other = rng.uniform(-0.3, 0.6, 50).astype(np.float32)  # some below the guard, some negative
    got = targets(own, other, name)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, loop_targets(own, other, name), rtol=2e-6)
    assert (got > 0).all()
    assert (got < 1).all()


def test_a_guarded_similarity_counts_as_the_guard() -> None:
    own = np.array([0.5, 0.5, 0.5, 0.9])
    got = targets(own, np.array([-0.4, 0.0, LEAST_OTHER, 0.3]), "ddl_ratio")
    assert got[0] == got[1] == got[2] > got[3]


@pytest.mark.parametrize("name", TARGETS)
def test_the_same_everywhere_is_one_half(name: str) -> None:
    assert targets(np.full(3, 0.7), np.full(3, 0.2), name).tolist() == [0.5] * 3
    assert targets(np.zeros(0), np.zeros(0), name).shape == (0,)


def test_an_extreme_ratio_does_not_overflow() -> None:
    own = np.r_[1.0, np.full(10**6, 1e-3)]
    got = targets(own, np.full(len(own), 0.5), "ddl_ratio")
    assert got[0] == 1.0
    assert np.isfinite(got).all()


def test_bad_targets_are_named() -> None:
    with pytest.raises(ValueError, match="target='ratio': need one of ddl_ratio"):
        targets(np.ones(2), np.ones(2), "ratio")
    with pytest.raises(ValueError, match="need the same"):
        targets(np.ones(2), np.ones(3), "own_cos")
    with pytest.raises(ValueError, match="must be finite"):
        targets(np.array([1.0, np.nan]), np.ones(2), "own_cos")


@pytest.mark.parametrize("block", [1, 3, 7, 100])
def test_own_and_other_equal_a_loop(block: int) -> None:
    generator = torch.Generator().manual_seed(1)
    feature_BD = torch.randn(11, 5, generator=generator)
    centres_CD = torch.nn.functional.normalize(torch.randn(7, 5, generator=generator), dim=1)
    label_B = torch.randint(0, 7, (11,), generator=generator)
    own_B, other_B = own_and_other(feature_BD, label_B, centres_CD, block)
    for b in range(11):
        cosines = [
            torch.nn.functional.cosine_similarity(feature_BD[b].double(), c.double(), dim=0).item()
            for c in centres_CD
        ]
        own = cosines.pop(int(label_B[b]))
        assert own_B[b].item() == pytest.approx(own, abs=1e-6)
        assert other_B[b].item() == pytest.approx(max(cosines), abs=1e-6)


def test_own_and_other_refuse_what_does_not_fit() -> None:
    label_B = torch.zeros(2, dtype=torch.int64)
    for centres in (torch.ones(1, 3), torch.ones(4, 2)):
        with pytest.raises(ValueError, match="at least two classes of the same width"):
            own_and_other(torch.ones(2, 3), label_B, centres)
    own_B, other_B = own_and_other(torch.zeros(2, 3), label_B, torch.eye(3))
    assert own_B.tolist() == other_B.tolist() == [0, 0]


def test_class_means_equal_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("face_lfr.quality.ROWS_AT_ONCE", 4)
    rng = np.random.default_rng(2)
    feature_ND = (rng.standard_normal((13, 5)) * rng.uniform(0.1, 9, (13, 1))).astype(np.float32)
    labels_N = np.r_[np.arange(4), rng.integers(0, 4, 9)]
    got = class_means(feature_ND, labels_N, 4)
    for c in range(4):
        rows = [f / np.linalg.norm(f) for f in feature_ND[labels_N == c].astype(np.float64)]
        mean = sum(rows)
        np.testing.assert_allclose(got[c], mean / np.linalg.norm(mean), atol=1e-6)


def test_class_means_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="1 of 3 classes have no image, first 1"):
        class_means(np.ones((2, 2)), np.array([0, 2]), 3)
    with pytest.raises(ValueError, match=r"labels 0\.\.3 must be in \[0, 3\)"):
        class_means(np.ones((2, 2)), np.array([0, 3]), 3)
    with pytest.raises(ValueError, match="2 features and 3 labels"):
        class_means(np.ones((2, 2)), np.array([0, 1, 2]), 3)


def test_distillation_is_a_mean_square_and_has_its_gradient() -> None:
    score_B = torch.tensor([0.1, -2.0, 3.0], dtype=torch.float64, requires_grad=True)
    target_B = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    got = Distillation()(score_B, target_B)
    squares = [(0.1 - 0.2) ** 2, 2.5**2, 2.1**2]
    assert got.item() == pytest.approx(sum(squares) / 3, rel=1e-12)
    assert torch.autograd.gradcheck(lambda s: Distillation()(s, target_B), (score_B,))


def sets(seed: int, count: int = 4, frames: int = 5, width: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    feature = torch.randn(count, 3, frames, width, generator=generator, dtype=torch.float64)
    score = torch.randn(count * 3 * frames, generator=generator, dtype=torch.float64)
    return score, 3 * feature


@pytest.mark.parametrize("unit", [False, True])
def test_set_vectors_equal_a_loop(unit: bool) -> None:
    score, feature = sets(3)
    got = SetTriplet(frame_norm="l2" if unit else "none").vectors(score, feature)
    at = iter(score.tolist())
    for s in range(4):
        for k in range(3):
            mu = [1 / (1 + math.exp(-next(at))) for _ in range(5)]
            total = torch.zeros(3, dtype=torch.float64)
            for t in range(5):
                frame = feature[s, k, t]
                total += mu[t] / sum(mu) * (frame / frame.norm() if unit else frame)
            torch.testing.assert_close(got[s, k], total / total.norm(), atol=1e-13, rtol=0)


@pytest.mark.parametrize(("weight", "margin"), [(0.0, None), (0.7, None), (0.7, 1.3)])
def test_set_triplet_equals_the_equation(weight: float, margin: float | None) -> None:
    score, feature = sets(4)
    objective = SetTriplet(margin=1.2, weight=weight, contrastive_margin=margin)
    total = 0.0
    for anchor, positive, negative in objective.vectors(score, feature):
        near, far = ((anchor - x).square().sum().item() for x in (positive, negative))
        total += max(0.0, near - far + 1.2) / (2 * 4)
        if margin is None:
            total += weight * near / (2 * 4)
        else:
            total += weight * (near + max(0.0, margin - math.sqrt(far)) ** 2) / (2 * 8)
    assert objective(score, feature).item() == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("frame_norm", ["none", "l2"])
def test_set_triplet_gradient_reaches_every_score(frame_norm: str) -> None:
    score, feature = sets(5, count=2, frames=3)
    score.requires_grad_()
    objective = SetTriplet(margin=4.5, weight=0.5, contrastive_margin=2.0, frame_norm=frame_norm)
    assert torch.autograd.gradcheck(lambda s: objective(s, feature), (score,))
    objective(score, feature).backward()
    assert score.grad is not None
    assert (score.grad != 0).all()


def test_training_the_scores_lowers_the_weight_of_a_foreign_frame() -> None:
    """Three clean frames and one that shows the negative: the loss pushes that one out."""
    clean, foreign = torch.eye(4)[0], torch.eye(4)[1]
    anchor = torch.stack([clean, clean, clean, foreign])
    feature = torch.stack([anchor, clean.expand(4, 4), foreign.expand(4, 4)])[None]
    score = torch.zeros(1, 3, 4, requires_grad=True)
    SetTriplet(margin=3.0)(score, feature).backward()
    assert score.grad is not None
    assert score.grad[0, 0, 3] > 0
    assert (score.grad[0, 0, :3] < 0).all()


def test_very_low_scores_still_weigh() -> None:
    _, feature = sets(6)
    low = SetTriplet().vectors(torch.full((60,), -400.0), feature)
    even = torch.nn.functional.normalize(feature.mean(dim=2), dim=-1)
    torch.testing.assert_close(low, even)


def test_objectives_are_float32_inside_autocast() -> None:
    score, feature = sets(7)
    with torch.autocast("cpu", torch.bfloat16):
        got = SetTriplet()(score.bfloat16(), feature.float())
    assert got.dtype == torch.float32
    want = SetTriplet()(score.bfloat16().double(), feature)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)


def test_bad_arguments_of_the_set_triplet() -> None:
    for name in ("margin", "weight", "contrastive_margin"):
        with pytest.raises(ValueError, match=f"{name}=-1"):
            SetTriplet(**{name: -1})
    with pytest.raises(ValueError, match="frame_norm='l1'"):
        SetTriplet(frame_norm="l1")
    with pytest.raises(ValueError, match=r"need \(S, 3, T, D\)"):
        SetTriplet()(torch.zeros(6), torch.zeros(1, 2, 3, 4))
    with pytest.raises(ValueError, match="need one score a frame"):
        SetTriplet()(torch.zeros(6), torch.zeros(1, 3, 3, 4))
