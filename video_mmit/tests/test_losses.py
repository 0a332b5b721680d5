"""Losses: fixtures, loops over all pairs, gradients, two ranks, the objective."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from common.log import InputError
from video_mmit.losses import (
    Objective,
    bce,
    bce_weighted,
    bpmll,
    ce,
    class_weights,
    smooth,
    warp,
    wlsep,
)
from video_mmit.tests.loss_loops import EVERY, WEIGHT, by_loops, gradient, pairs, problem, shares

ROOT = Path(__file__).resolve().parents[2]


def all_pairs_wlsep(score: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """The definition on the N x K x K tensor of differences."""
    gap = score[:, :, None] - score[:, None, :]  # [n, m, k] = s_m - s_k
    used = (1 - target)[:, :, None] * target[:, None, :]
    term = weight * (1 + (gap.exp() * used).sum(dim=1)).log()
    return (term * target).sum() / target.sum()


@pytest.mark.parametrize("name", EVERY)
def test_losses_equal_the_loops(name: str) -> None:
    for seed in range(5):
        score, target = problem(12, seed)
        expected = by_loops(name, score, target)
        assert EVERY[name](score, target).item() == pytest.approx(expected, rel=1e-12)


def test_check_10_fixtures() -> None:
    score = torch.tensor([[2.0, 0.0, -1.0, 0.5]], dtype=torch.float64)
    target = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    assert wlsep(score, target).item() == pytest.approx(0.386988, abs=1e-6)
    only = [wlsep(score[:, row], target[:, row]).item() for row in ([0, 1, 2], [3, 1, 2])]
    assert only == pytest.approx([0.169846, 0.604131], abs=1e-6)
    weight = class_weights(torch.tensor([10, 20, 15, 40]))
    assert weight.tolist() == pytest.approx([1, 0.5, 2 / 3, 0.25])
    assert wlsep(score, target, weight.double()).item() == pytest.approx(0.160439, abs=1e-6)
    zero = torch.zeros(3, 313)
    for labels in (torch.zeros(3, 313), torch.ones(3, 313)):
        assert bce(zero, labels).item() == pytest.approx(0.693147, abs=1e-6)
    scaled = Objective(torch.ones(313), bce, scale=160)(zero, zero)
    assert scaled.item() == pytest.approx(110.90, abs=5e-3)


def test_check_10_wlsep_equals_all_pairs_in_value_and_gradient() -> None:
    for seed in range(10):
        score, target = problem(9, seed, spread=4.0)
        score.requires_grad_()
        losses = wlsep(score, target, WEIGHT), all_pairs_wlsep(score, target, WEIGHT)
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=1e-12)
        ours, expected = (torch.autograd.grad(loss, score)[0] for loss in losses)
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


def test_wlsep_stays_exact_far_from_zero() -> None:
    """Where torch's softplus has become the identity, and where exp has become 0."""
    target = torch.tensor([[1.0, 0.0]])
    for gap in (-40.0, -25.0, 19.0, 25.0, 40.0):
        score = torch.tensor([[0.0, gap]], dtype=torch.float64)
        assert wlsep(score, target).item() == pytest.approx(math.log1p(math.exp(gap)), rel=1e-14)


@pytest.mark.parametrize("name", EVERY)
def test_check_10_gradcheck(name: str) -> None:
    score, target = problem(6, seed=5)
    gap = score[:, :, None] - score[:, None, :]
    assert (gap + 1).abs().min() > 1e-3  # the hinge of warp has no derivative at 0
    assert torch.autograd.gradcheck(lambda s: EVERY[name](s, target), [score.requires_grad_()])


@pytest.mark.parametrize("name", ["bce", "weighted bce_weighted", "ce"])
def test_gradcheck_with_smoothed_targets(name: str) -> None:
    score, target = problem(5, seed=1)
    soft = smooth(target, 0.2, multi_label=name != "ce")
    assert torch.autograd.gradcheck(lambda s: EVERY[name](s, soft), [score.requires_grad_()])


@pytest.mark.parametrize("name", EVERY)
def test_an_empty_batch_is_zero_with_a_graph(name: str) -> None:
    score = torch.zeros(0, 5, requires_grad=True)
    loss = EVERY[name](score, torch.zeros(0, 5))
    loss.backward()
    assert loss.item() == 0
    assert score.grad is not None


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("row", [0.0, 1.0])
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_rows_without_positives_or_without_negatives(name: str, row: float) -> None:
    """Nothing to compare: ranking losses are 0; no NaN passes through, even inside backward."""
    score = problem(4)[0].requires_grad_()
    with torch.autograd.detect_anomaly():
        loss = EVERY[name](score, torch.full_like(score, row))
        loss.backward()
    assert score.grad is not None
    assert score.grad.isfinite().all()
    if "bce" in name or (name, row) == ("ce", 1.0):
        assert loss.item() > 0
    else:
        assert loss.item() == 0
        assert not score.grad.any()


@pytest.mark.parametrize("name", EVERY)
def test_a_row_without_pairs_leaves_the_other_rows_alone(name: str) -> None:
    """It counts as a video, or, where the mean is over positives, by its positives."""
    score, target = problem(8, seed=5)
    for row, labels in enumerate(target[:2]):
        rest = torch.arange(8) != row
        part = EVERY[name](score[rest], target[rest]).item()
        own = EVERY[name](score[~rest], target[~rest]).item()
        if name.removeprefix("weighted ") in ("wlsep", "warp"):
            counts = target[rest].sum().item(), labels.sum().item()
        else:
            counts = 7, 1
        mean = (part * counts[0] + own * counts[1]) / sum(counts)
        assert EVERY[name](score, target).item() == pytest.approx(mean)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_check_10_safe_in_half_precision(name: str, kind: torch.dtype) -> None:
    """Logits of 1e4 in both directions; float32 comes out, and a gradient the norm can carry."""
    _, target = problem(6)
    score = torch.where(torch.rand(6, 5, generator=torch.Generator()) < 0.5, 1e4, -1e4).to(kind)
    score[0], score[3, 2] = score[0].abs(), 1e4  # row 3: its only negative is on top
    score[3, 0] = -1e4
    score.requires_grad_()
    function = EVERY[name]
    if isinstance(function, partial):
        function = partial(function.func, weight_K=WEIGHT.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = function(score, target.float())
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    (gradient,) = torch.autograd.grad(loss, score, retain_graph=True)
    wide = score.detach().float().requires_grad_()
    same = function(wide, target.float())
    torch.testing.assert_close(loss, same)
    (exact,) = torch.autograd.grad(same, wide)
    assert exact.isfinite().all()
    assert exact.square().sum().isfinite()
    if name != "bpmll" and not name.endswith(" bpmll"):  # e^30 is beyond float16
        torch.testing.assert_close(gradient, exact.to(kind))


def test_bpmll_goes_on_as_its_tangent() -> None:
    target = torch.tensor([[1.0, 0.0]])
    below, at, above = (torch.tensor([[0.0, x]], dtype=torch.float64) for x in (29.0, 30.0, 33.0))
    assert bpmll(below, target).item() == pytest.approx(math.exp(29), rel=1e-12)
    assert bpmll(at, target).item() == pytest.approx(math.exp(30), rel=1e-12)
    assert bpmll(above, target).item() == pytest.approx(4 * math.exp(30), rel=1e-12)
    for score in (below, above):
        score.requires_grad_()
        slope = torch.autograd.grad(bpmll(score, target), score)[0][0, 1].item()
        assert slope == pytest.approx(math.exp(min(score[0, 1].item(), 30)), rel=1e-12)


def test_bpmll_without_its_normaliser_sums_the_pairs() -> None:
    score, target = problem(7)
    found = pairs(score, target)
    total = sum(math.exp(x) for row in found for entry in row for x in entry.gap)
    assert bpmll(score, target, normalize=False).item() == pytest.approx(total / 7)


def test_a_class_of_weight_zero_has_no_part_in_bpmll() -> None:
    score, target = problem(3)
    weight = torch.zeros(5, dtype=torch.float64)
    loss = bpmll(score.requires_grad_(), target, weight)
    loss.backward()
    assert loss.item() == 0
    assert score.grad is not None
    assert not score.grad.any()


def test_check_10_scaled_gradient() -> None:
    score, target = problem(6)
    score.requires_grad_()
    counts = torch.tensor([3, 4, 5, 6, 7])
    plain, scaled = (Objective(counts, bce, scale=s)(score, target) for s in (1.0, 160.0))
    one, many = (torch.autograd.grad(loss, score)[0] for loss in (plain, scaled))
    torch.testing.assert_close(many, 160 * one, rtol=1e-14, atol=0)
    expected = (score.detach().sigmoid() - target) / score.numel()
    torch.testing.assert_close(one, expected)


def test_check_10_class_weights_refuse_an_empty_class() -> None:
    with pytest.raises(InputError, match=r"^class 2: 2 of 5 classes have no training video.*: 0$"):
        class_weights(torch.tensor([4, 2, 0, 7, 0]))
    with pytest.raises(InputError, match="class 0"):
        Objective(torch.tensor([0, 3]), wlsep, weighted=True)
    Objective(torch.tensor([0, 3]), wlsep)
    for wrong in (torch.ones(2, 2), torch.ones(0)):
        with pytest.raises(ValueError, match="counts_K has shape"):
            class_weights(wrong)


def test_smoothing() -> None:
    target = torch.tensor([[0.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    torch.testing.assert_close(smooth(target, 0.2, True), target * 0.8 + 0.1)
    single = smooth(target, 0.2, False)
    torch.testing.assert_close(single[0], torch.tensor([0.05, 0.85, 0.05, 0.05]))
    torch.testing.assert_close(single.sum(dim=1), target.sum(dim=1))
    score = problem(2)[0][:, :4].float()
    torch.testing.assert_close(
        Objective(torch.ones(4), ce, smoothing=0.2, multi_label=False)(score[:1], target[:1]),
        nn.functional.cross_entropy(score[:1], torch.tensor([1]), label_smoothing=0.2),
    )
    for amount in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="smoothing="):
            smooth(target, amount, True)


def test_objective_passes_weights_and_smoothing_on() -> None:
    score, target = problem(6)
    counts = torch.tensor([10, 20, 15, 40, 11])
    weight = class_weights(counts)
    found = Objective(counts, bce_weighted, scale=2.0, smoothing=0.1, weighted=True)
    expected = 2 * bce_weighted(score, smooth(target, 0.1, True), weight)
    torch.testing.assert_close(found(score, target), expected)
    assert not found.state_dict()
    assert found.to(torch.float64).weight is not None
    partly = Objective(counts, partial(bpmll, normalize=False), weighted=True)
    torch.testing.assert_close(partly(score, target), bpmll(score, target, weight, normalize=False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"function": wlsep, "smoothing": 0.1}, "smoothing=0.1: wlsep only asks"),
        ({"function": partial(warp), "smoothing": 0.1}, "warp only asks"),
        ({"function": bce, "weighted": True}, "weighted=True: bce takes no class weights"),
        ({"function": bce_weighted}, "weighted=False: bce_weighted needs class weights"),
        ({"function": bce, "scale": 0.0}, "scale=0.0: need a positive factor"),
        ({"function": bce, "scale": math.nan}, "scale=nan"),
        ({"function": bce, "smoothing": 1.0}, "smoothing=1.0: need a share"),
    ],
)
def test_objective_refuses_what_does_nothing(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(torch.ones(3), **options)


@pytest.mark.parametrize("name", EVERY)
def test_wrong_shapes_are_named(name: str) -> None:
    score, target = problem(3)
    for other in (target[:, :1], target[:1], target[0]):  # the first two would broadcast
        with pytest.raises(ValueError, match="need the same"):
            EVERY[name](score, other)
    with pytest.raises(ValueError, match=r"score_NK has shape \(3, 5\), need \(videos, 4\)"):
        Objective(torch.ones(4), bce)(score, target)
    if name.startswith("weighted"):
        with pytest.raises(ValueError, match=r"weight_K has shape \(5,\)"):
            EVERY[name](score[:, :4], target[:, :4])


@pytest.mark.parametrize("path", sorted((ROOT / "video_mmit/configs/loss").glob("*.yaml")))
def test_configs_make_objectives(path: Path) -> None:
    node = OmegaConf.load(path)
    assert path.stem in node.function._target_
    objective = instantiate(node)(counts_K=torch.tensor([3, 4, 5, 6, 7]))
    score, target = problem(6)
    loss = objective(score.requires_grad_(), target)
    loss.backward()
    assert loss.item() > 0
    assert (objective.weight is not None) == (path.stem in ("bce_weighted", "wlsep"))
    assert objective.multi_label == (path.stem != "ce")


@pytest.mark.slow
def test_two_ranks_have_the_gradient_of_one() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    group |= {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "video_mmit.tests.loss_loops"],
            cwd=ROOT, env={**os.environ, **group, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in "01"
    ]  # fmt: skip
    try:
        texts = [one.communicate(timeout=120) for one in running]
    finally:
        for one in running:
            one.kill()
    for one, (out, err) in zip(running, texts, strict=True):
        assert one.returncode == 0, err
        for key, seen in json.loads(out.splitlines()[-1]).items():
            case, name = key.split(", ")
            assert seen == pytest.approx(gradient(name, *shares(case)), rel=1e-10, abs=1e-12), key
