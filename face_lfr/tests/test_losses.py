"""Losses beside the classifier against loops over their equations."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from face_lfr.losses import contrastive, quality_regression, regular_face, set_triplet


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).double().requires_grad_()


def loop_regular(weight: Tensor, rows: list[int]) -> Tensor:
    """Autograd goes through every cosine and Python's greatest of them."""
    total = weight.sum() * 0
    for i in rows:
        cosines = [
            weight[i] @ weight[j] / (weight[i].norm() * weight[j].norm())
            for j in range(len(weight))
            if j != i
        ]
        total = total + max(cosines, key=Tensor.item)
    return total / len(rows)


@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
@pytest.mark.parametrize("rows", [None, [3], [7, 0, 7, 12]])
def test_regular_face_matches_the_loop(chunk: int, rows: list[int] | None) -> None:
    weight = draw(13, 5)
    chosen = None if rows is None else torch.tensor(rows)
    mine = regular_face(weight, chunk, chosen)
    theirs = loop_regular(weight, rows or list(range(13)))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    got, wanted = (torch.autograd.grad(loss, weight)[0] for loss in (mine, theirs))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_regular_face_of_known_centres() -> None:
    """Two at right angles, a third between them: it is the nearest of both and they of it."""
    half = math.sqrt(0.5)
    weight = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]], requires_grad=True)
    assert regular_face(weight, 2).item() == pytest.approx(half)
    assert torch.autograd.gradcheck(partial(regular_face, chunk=3), draw(6, 3))
    twins = torch.ones(4, 3)
    assert regular_face(twins).item() == pytest.approx(1)
    with pytest.raises(ValueError, match="chunk=0: need at least 1"):
        regular_face(weight, 0)


@pytest.mark.parametrize("shape", [(0, 4), (1, 4)])
def test_regular_face_without_another_class(shape: tuple[int, int]) -> None:
    weight = draw(*shape)
    loss = regular_face(weight)
    loss.backward()
    assert loss.item() == 0
    assert weight.grad is not None
    assert not weight.grad.any()
    none = regular_face(draw(5, 4), rows=torch.empty(0, dtype=torch.int64))
    assert none.item() == 0
    assert none.requires_grad


def test_quality_regression() -> None:
    quality, target = draw(6), draw(6, seed=1)
    loss = quality_regression(quality, target)
    pairs = zip(quality.tolist(), target.tolist(), strict=True)
    assert loss.item() == pytest.approx(sum((q - t) ** 2 for q, t in pairs) / 6, abs=1e-12)
    loss.backward()
    assert target.grad is None
    assert torch.autograd.gradcheck(lambda q: quality_regression(q, target), quality)
    with pytest.raises(ValueError, match=r"quality is \(6,\), need \(6, 1\) as target is"):
        quality_regression(quality, target[:, None])


def test_set_triplet_matches_the_loop() -> None:
    sets = [draw(9, 4, seed=seed) for seed in range(3)]
    total = 0.0
    for a, p, n in zip(*(x.tolist() for x in sets), strict=True):
        near = sum((x - y) ** 2 for x, y in zip(a, p, strict=True))
        far = sum((x - y) ** 2 for x, y in zip(a, n, strict=True))
        total += max(0.0, 1.2 + near - far)
    assert set_triplet(*sets).item() == pytest.approx(total / 18, abs=1e-12)
    assert torch.autograd.gradcheck(set_triplet, tuple(sets))
    with pytest.raises(ValueError, match=r"negative is \(8, 4\), need \(9, 4\) as anchor is"):
        set_triplet(*sets[:2], sets[2][1:])


def test_contrastive_matches_the_loop() -> None:
    left, right = (draw(9, 4, seed=seed) / 2 for seed in (0, 1))
    same = torch.arange(9) % 2 == 0
    distances = [math.dist(a, b) for a, b in zip(left.tolist(), right.tolist(), strict=True)]
    pulled = sum(d**2 for d in distances) / 18
    assert contrastive(left, right).item() == pytest.approx(pulled, abs=1e-12)
    costs = [
        d**2 if alike else max(0.0, 2.0 - d) ** 2
        for d, alike in zip(distances, same.tolist(), strict=True)
    ]
    loss = contrastive(left, right, 2.0, same)
    assert loss.item() == pytest.approx(sum(costs) / 18, abs=1e-12)
    assert min(distances) < 2.0 < max(distances)  # on both sides of the margin
    inputs = (left.detach().requires_grad_(), right.detach().requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: contrastive(a, b, 2.0, same), inputs)
    with pytest.raises(ValueError, match=r"same is \(8,\), need \(9,\) as distance is"):
        contrastive(left, right, 2.0, same[1:])


def test_contrastive_pairs_that_coincide_have_a_finite_gradient() -> None:
    left = draw(3, 4)
    loss = contrastive(left, left.detach(), 0.8, torch.tensor([True, False, False]))
    assert loss.item() == pytest.approx(2 * 0.64 / 6)
    (gradient,) = torch.autograd.grad(loss, left)
    assert not gradient.any()  # NaN would count


def calls() -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    return {
        "regular": (regular_face, [draw(5, 4)]),
        "quality": (quality_regression, [draw(5), draw(5, seed=1)]),
        "triplet": (set_triplet, [draw(5, 4, seed=seed) for seed in range(3)]),
        "contrastive": (contrastive, [draw(5, 4, seed=seed) for seed in range(2)]),
    }


@pytest.mark.parametrize("name", list(calls()))
def test_float32_inside_autocast(name: str) -> None:
    loss, inputs = calls()[name]
    half = [x.detach().bfloat16() for x in inputs]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(*half)
    assert found.dtype == torch.float32
    assert found.item() == loss(*(x.float() for x in half)).item()


@pytest.mark.parametrize("name", ["quality", "triplet", "contrastive"])
def test_empty_input_is_zero_with_a_graph(name: str) -> None:
    loss, inputs = calls()[name]
    empty = [x.detach()[:0].requires_grad_() for x in inputs]
    found = loss(*empty)
    found.backward()
    assert found.item() == 0
    assert empty[0].grad is not None
