"""Steps of the classifier that look at some classes only, and what a step keeps in memory."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from face_lfr.classifier import Classifier
from face_lfr.margins import ArcFace, ArcNegFace, Margin, Softmax
from face_lfr.optim import SampledSGD, sgd
from face_lfr.tests.test_classifier import C, D, batch, build


def test_samples_hold_the_batch_and_are_even() -> None:
    objective = build(sample_rate=0.25)
    _, label_B = batch()
    count_C = torch.zeros(C)
    for _ in range(400):
        class_S = objective._choose(label_B)
        assert torch.equal(class_S, class_S.unique())
        assert len(class_S) == math.ceil(0.25 * C)
        count_C[class_S] += 1
    present = label_B.unique()
    assert (count_C[present] == 400).all()
    others = torch.ones(C, dtype=torch.bool).index_fill(0, present, False)
    expected = 400 * (11 - len(present)) / (C - len(present))
    # Four standard deviations of a binomial count; 0 and 400 would be a class always out or in.
    assert (count_C[others] - expected).abs().max() < 4 * math.sqrt(expected)
    assert len(objective._choose(torch.arange(30))) == 30  # more in the batch than the rate
    assert len(build(sample_rate=1e-9)._choose(torch.tensor([5, 5]))) == 2


def test_samples_continue_from_a_state() -> None:
    first, second = build(sample_rate=0.25), build(sample_rate=0.25)
    label_B = batch()[1]
    for _ in range(3):
        first._choose(label_B)
    assert not torch.equal(first._choose(label_B), first._choose(label_B))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first._choose(label_B), second._choose(label_B))
    other = build(sample_rate=0.25, seed=1)
    other.load_state_dict(first.state_dict())
    assert not torch.equal(first._choose(label_B), other._choose(label_B))


def test_evaluation_compares_with_all_classes() -> None:
    objective, plain = build(sample_rate=0.25).eval(), build()
    assert objective(*batch()).item() == plain(*batch()).item()
    assert objective.draws == 0
    assert not objective.sampled


@pytest.mark.parametrize("margin", [ArcNegFace(), Softmax()])
def test_rows_that_take_no_part_stay(margin: Margin) -> None:
    objective = build(margin, sample_rate=0.25)
    optimizer = sgd(nn.Linear(1, 1).double(), objective, lr=0.1, weight_decay=0.1)
    for number in range(4):
        before = {name: value.detach().clone() for name, value in objective.named_parameters()}
        momentum = {
            name: optimizer.state[value]["momentum_buffer"].clone()
            for name, value in objective.named_parameters()
            if value in optimizer.state
        }
        draws = objective.draws.clone()
        chosen = objective._choose(batch(number)[1])
        objective.draws.copy_(draws)
        optimizer.zero_grad()
        objective(*batch(number)).backward()
        optimizer.step()
        out_C = torch.ones(C, dtype=torch.bool).index_fill(0, chosen, False)
        for name, value in objective.named_parameters():
            assert value.grad is None
            assert torch.equal(value[out_C], before[name][out_C])
            assert (value[chosen] != before[name][chosen]).any(dim=-1).all()
            if momentum:
                now = optimizer.state[value]["momentum_buffer"]
                assert torch.equal(now[out_C], momentum[name][out_C])
                assert not torch.equal(now[chosen], momentum[name][chosen])


def test_sampled_steps_are_those_of_a_loop_over_rows() -> None:
    objective = build(ArcFace(), sample_rate=0.25, scale=8.0)
    optimizer = sgd(nn.Linear(1, 1).double(), objective, lr=0.3, momentum=0.8, weight_decay=0.05)
    weight = objective.weight.detach().clone()
    momentum = torch.zeros_like(weight)
    for number in range(5):
        feature_BD, label_B = batch(number)
        draws = objective.draws.clone()
        chosen = objective._choose(label_B)
        objective.draws.copy_(draws)
        # The same loss by a classifier of these classes alone.
        small = Classifier(D, len(chosen), ArcFace(), scale=8.0).double()
        small.weight.data.copy_(weight[chosen])
        small(feature_BD, torch.searchsorted(chosen, label_B)).backward()
        for row, grad in zip(chosen.tolist(), small.weight.grad, strict=True):
            momentum[row] = 0.8 * momentum[row] + grad + 0.05 * weight[row]
            weight[row] -= 0.3 * momentum[row]
        optimizer.zero_grad()
        objective(feature_BD, label_B).backward()
        optimizer.step()
        torch.testing.assert_close(objective.weight.detach(), weight, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("margin", [ArcNegFace(), Softmax()])
def test_all_classes_sampled_is_bitwise_the_plain_training(margin: Margin) -> None:
    plain, sampled = build(margin, smoothing=0.1), build(margin, smoothing=0.1, sample_rate=0.999)
    nets = [nn.Linear(D, D).double() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers = [sgd(net, one) for net, one in zip(nets, (plain, sampled), strict=True)]
    assert isinstance(optimizers[1], SampledSGD)
    for number in range(6):
        losses = []
        for net, one, optimizer in zip(nets, (plain, sampled), optimizers, strict=True):
            feature_BD, label_B = batch(number)
            optimizer.zero_grad()
            loss = one(net(feature_BD), label_B)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == losses[1]
    for name, value in plain.named_parameters():
        assert torch.equal(value, sampled.get_parameter(name))
    assert torch.equal(nets[0].weight, nets[1].weight)


def test_batches_of_one_step_are_added() -> None:
    objective = build(sample_rate=0.25)
    for number in (0, 1):
        (objective(*batch(number)) / 2).backward()
    objective(*batch(2))  # without a backward pass: adds nothing
    parts = [(row_S, leaf.grad) for _, row_S, leaf in objective.sampled[:2]]
    assert not torch.equal(parts[0][0], parts[1][0])
    rows = objective.take_sampled()["weight"]
    dense_CD = torch.zeros(C, D, dtype=torch.float64)
    for row_S, grad_SD in parts:
        dense_CD[row_S] += grad_SD
    assert torch.equal(rows.row, dense_CD.any(dim=1).nonzero()[:, 0])
    torch.testing.assert_close(rows.grad, dense_CD[rows.row], rtol=1e-14, atol=0)
    assert objective.take_sampled() == {}


def test_zero_grad_forgets_rows() -> None:
    objective = build(sample_rate=0.25)
    optimizer = sgd(nn.Linear(1, 1).double(), objective)
    before = objective.weight.detach().clone()
    objective(*batch()).backward()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(objective.weight, before)


class Large(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes every operator that makes a new tensor of at least `least` numbers."""

    def __init__(self, least: int):
        super().__init__()
        self.least, self.found = least, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (*args, *(kwargs or {}).values())
        inputs = {x.untyped_storage().data_ptr() for x in given if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, Tensor) and one.untyped_storage().data_ptr() not in inputs:
                if one.untyped_storage().nbytes() >= self.least * one.element_size():
                    self.found.append((str(func), tuple(one.shape)))
        return out


def larger(objective: Classifier, least: int) -> list[list[tuple[int, ...]]]:
    """Shapes of new tensors of at least `least` numbers, in each of two steps."""
    optimizer = sgd(nn.Linear(1, 1), objective, weight_decay=0.0)
    feature_BD = torch.randn(32, objective.features)
    label_B = torch.randint(0, objective.num_classes, (32,))
    seen = []
    for _ in range(2):
        with Large(least) as large:
            optimizer.zero_grad()
            objective(feature_BD, label_B).backward()
            optimizer.step()
        seen.append([shape for _, shape in large.found])
    return seen


def test_memory_at_100_000_classes_is_what_the_docstring_says() -> None:
    classes, width, images = 100_000, 64, 32
    objective = Classifier(width, classes, ArcNegFace())
    first, second = larger(objective, images * classes * 9 // 10)
    # Unit rows, their gradient, that of the weight; cosines; and the momentum, once.
    step = [(classes, width), (images, classes), (classes, width), (classes, width)]
    assert (first, second) == ([*step, (classes, width)], step)


def test_sampling_at_100_000_classes_makes_nothing_of_the_matrix_size() -> None:
    classes, width, images = 100_000, 64, 32
    objective = Classifier(width, classes, ArcNegFace(), sample_rate=0.05)
    first, second = larger(objective, images * classes // 8)
    assert first == [(classes, width)]  # the momentum, once
    assert second == []
    # A twentieth of it is there: copies of the rows and of momentum, unit rows, three gradients.
    _, second = larger(objective, images * 5000 * 9 // 10)
    assert second.count((5000, width)) <= 8
    assert second.count((images, 5000)) == 1
    assert len(second) <= 9
