"""All pairs against brute force and scikit-learn; what the result may not depend on; bad input."""

import math
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.progress import Progress
from sklearn.metrics import roc_curve

from common.log import InputError
from face_lfr.all_pairs import AllPairs, all_pairs
from face_lfr.ops.pair_scores import (
    EXCLUDED,
    UNIT,
    Product,
    Tile,
    exact_pairs,
    full_precision,
    negative_corners,
    sorted_rows,
)

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
# Large enough for one pass; large rates in a second; the second in bins as well; a mixture.
BUFFERS = (2**20, 1, 3, 40)


def problem(seed: int, rows: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows with duplicates, every third time from a lattice full of ties, and labels with -1."""
    rng = np.random.default_rng(seed)
    count, width = rows or int(rng.integers(12, 60)), int(rng.choice([2, 4, 16, 33]))
    features = rng.standard_normal((count, width))
    if seed % 3 == 0:  # all norms are powers of two and all scores multiples of 1/16
        width = int(rng.choice([4, 16]))
        features = rng.choice([-1.0, 1.0], (count, width))
    features[rng.integers(0, count, count // 3)] = features[rng.integers(0, count, count // 3)]
    labels = rng.integers(-1, max(2, count // 4), count)
    labels[:3] = 0, 0, -1
    return features.astype([np.float32, np.float64, np.float16][seed % 3]), labels


def brute_force(
    features: np.ndarray, labels: np.ndarray, pairs: str = "all"
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of all positive, and of all negative pairs, as the definition has them.

    The sums round here, so that a score may be one step of 2**-40 off.
    """
    row_ND = features.astype(np.float64)
    row_ND /= np.sqrt((row_ND**2).sum(axis=1, keepdims=True))
    first, second = np.triu_indices(len(labels), 1)
    score = np.rint((row_ND @ row_ND.T)[first, second] * UNIT) / UNIT
    one, two = labels[first], labels[second]
    negative = (one != two) & ((pairs == "all") | (np.minimum(one, two) == -1))
    return score[(one == two) & (one >= 0)], score[negative]


def scikit_learn(positive: np.ndarray, negative: np.ndarray, fprs: list[float]) -> list[float]:
    truth = np.repeat([1, 0], [len(positive), len(negative)])
    scores = np.concatenate([positive, negative])
    fpr_T, tpr_T, _ = roc_curve(truth, scores, drop_intermediate=False)
    return [float(tpr_T[fpr_T <= fpr].max()) for fpr in fprs]


def assert_exact(found: AllPairs, positive: np.ndarray, negative: np.ndarray) -> None:
    """Every number of the result is that of the brute force."""
    assert (found.positives, found.negatives) == (len(positive), len(negative))
    falling = np.append(np.sort(negative)[::-1], -math.inf)
    for point in found.points:
        threshold = falling[point.allowed]
        assert point.threshold == pytest.approx(threshold, abs=1.01 / UNIT)
        assert point.false_accepts == (negative > threshold).sum()
        assert point.true_accepts == (positive > threshold).sum()
    fprs = [point.fpr for point in found.points]
    assert [point.tpr for point in found.points] == scikit_learn(positive, negative, fprs)


def test_check_11_equals_scikit_learn_on_300_problems_with_ties() -> None:
    for seed in range(300):
        features, labels = problem(seed)
        pairs = "gallery_probe" if seed % 7 == 0 else "all"
        scores = brute_force(features, labels, pairs)
        fprs = [fpr for fpr in (1.0, 0.5, 0.1, 0.01) if fpr * len(scores[1]) >= 1]
        tile, buffer = (7, 257, 4096)[seed % 5 % 3], BUFFERS[seed % 4]
        found = all_pairs(features, labels, fprs, pairs, tile=tile, buffer=buffer)
        assert_exact(found, *scores)


def test_check_11_equals_scikit_learn_on_2000_rows() -> None:
    rng = np.random.default_rng(5)
    labels = np.repeat(np.arange(-1, 249), 8)
    features = rng.standard_normal((2000, 24)) + 2 * rng.standard_normal((250, 24))[labels]
    features[rng.integers(0, 2000, 20)] = features[rng.integers(0, 2000, 20)]
    fprs = [1e-6, 1e-4, 1e-2, 0.3]
    found = all_pairs(features, labels, fprs, buffer=10_000)
    assert_exact(found, *brute_force(features, labels))
    assert [point.allowed for point in found.points] == [1, 199, 19_920, 597_600]
    assert [point.threshold == 1.0 for point in found.points] == [True, False, False, False]
    assert 0.1 < found.points[1].tpr < found.points[3].tpr <= 1.0
    assert found.passes == 2


@pytest.mark.parametrize("seed", [0, 1])
def test_check_11_does_not_depend_on_tile_order_or_buffer(seed: int) -> None:
    features, labels = problem(seed, rows=80)
    rng = np.random.default_rng(seed)
    fprs = [1.0, 0.3, 0.01, 0.001]
    expected = all_pairs(features, labels, fprs)
    assert_exact(expected, *brute_force(features, labels))
    for tile in (1, 7, 257, 4096):
        order = rng.permutation(len(labels))
        for buffer in BUFFERS if tile > 1 else BUFFERS[:1]:
            found = all_pairs(features[order], labels[order], fprs, tile=tile, buffer=buffer)
            assert replace(found, passes=0) == replace(expected, passes=0), (tile, buffer)


def test_scores_that_float32_cannot_tell_apart() -> None:
    rng = np.random.default_rng(2)
    features = rng.standard_normal(32) + 1e-3 * rng.standard_normal((300, 32))
    labels = rng.integers(-1, 40, 300)
    positive, negative = brute_force(features, labels)
    assert np.ptp(negative) < 3e-6  # float32 is off by up to 2.4e-6
    assert len(np.unique(negative)) > 0.9 * len(negative)
    for buffer in (2**20, 50):
        found = all_pairs(features, labels, [1e-4, 1e-2, 0.5], tile=64, buffer=buffer)
        for point in found.points:  # the sums of the brute force round, by less than 1e-12
            close = point.threshold - 1e-12, point.threshold + 1e-12
            counts = [(positive > end).sum() for end in close]
            assert counts[1] <= point.true_accepts <= counts[0]
            counts = [(negative > end).sum() for end in close]
            assert counts[1] <= point.false_accepts <= counts[0]
            assert point.allowed - point.false_accepts <= counts[0] - counts[1]


def test_errors_of_float32_up_to_the_bound_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator, product = torch.Generator().manual_seed(0), Product._tile

    def worst(self: Product, row: int, column: int, last: int) -> tuple[Tile, torch.Tensor]:
        tile, score_RC = product(self, row, column, last)
        # Most of them up, so that the others fall far below the (k+1)-th largest.
        sign_RC = (torch.rand(score_RC.shape, generator=generator) < 0.9) * 2 - 1
        score_RC += sign_RC * 0.8 * self.rows.bound
        return tile, score_RC

    monkeypatch.setattr(Product, "_tile", worst)
    rng = np.random.default_rng(0)
    labels = rng.integers(-1, 60, 300)
    for noise in (2e-3, 1e-2):
        features = rng.standard_normal(32) + noise * rng.standard_normal((300, 32))
        for buffer in (2**20, 50):
            fprs = [1e-4, 1e-3, 1e-2, 0.2, 0.5]
            found = all_pairs(features, labels, fprs, tile=64, buffer=buffer)
            assert_exact(found, *brute_force(features, labels))


def test_one_score_for_all_pairs_ends() -> None:
    labels = np.repeat(np.arange(40), 5)
    for features in (np.ones((200, 8)), np.tile([0.1, 0.7, -3.0], (200, 1))):
        found = all_pairs(features, labels, [1e-3, 0.5], tile=64, buffer=20)
        assert [point.threshold for point in found.points] == [1.0, 1.0]
        assert [point.false_accepts for point in found.points] == [0, 0]
        assert [point.tpr for point in found.points] == [0.0, 0.0]


def test_an_identity_larger_than_a_tile_and_many_with_one_image() -> None:
    rng = np.random.default_rng(3)
    labels = np.concatenate([np.full(600, 7), np.arange(100, 400), np.full(50, -1)])
    features = rng.standard_normal((len(labels), 5)).astype(np.float32)
    found = all_pairs(features, labels, [0.01, 0.2], tile=256, buffer=30_000)
    assert_exact(found, *brute_force(features, labels))
    assert found.positives == 600 * 599 // 2


def test_pairs_by_hand() -> None:
    """Two of one person, one of another, two distractors; angles in degrees say the score."""
    angle = np.radians([0, 10, 60, 5, 100])
    features = np.stack([np.cos(angle), np.sin(angle)], axis=1) * [[1], [2], [3], [4], [5]]
    labels = [4, 4, 9, -1, -1]
    found = all_pairs(features, labels, [1 / 8, 2 / 8])
    assert (found.negatives, found.positives, found.distractors) == (2 + 3 * 2, 1, 2)
    assert found.points[0].threshold == pytest.approx(math.cos(math.radians(5)))
    assert found.points[1].threshold == pytest.approx(math.cos(math.radians(40)))
    assert [point.tpr for point in found.points] == [0.0, 1.0]
    assert [point.false_accepts for point in found.points] == [0, 2]  # both of 5 degrees are tied
    probe = all_pairs(features, labels, [0.5], "gallery_probe")
    assert (probe.negatives, probe.positives) == (3 * 2, 1)
    assert probe.points[0].threshold == pytest.approx(math.cos(math.radians(55)))


def test_several_rates_share_their_passes() -> None:
    features, labels = problem(4, rows=200)
    small, large = [2e-4, 1e-3, 2e-3], [0.1, 0.2, 0.6]
    alone = [all_pairs(features, labels, [fpr]).points[0] for fpr in small + large]
    found = all_pairs(features, labels, small + large, buffer=200)
    assert list(found.points) == alone
    assert found.passes == 2
    assert all_pairs(features, labels, small).passes == 1
    assert all_pairs(features, labels, [1.0]).passes == 0


def test_numbers_of_any_type_and_a_memory_map(tmp_path: Path) -> None:
    features, labels = problem(1, rows=60)
    expected = all_pairs(features, labels, [0.01, 0.5])
    np.save(tmp_path / "f.npy", features)
    mapped = np.load(tmp_path / "f.npy", mmap_mode="r")
    assert all_pairs(mapped, labels.astype(np.int16), [0.01, 0.5]) == expected
    assert all_pairs(features * 4.0, list(labels), [0.01, 0.5]) == expected
    whole = np.rint(features * 100).astype(np.int32)
    assert all_pairs(whole, labels, [0.1]) == all_pairs(whole.astype(np.float64), labels, [0.1])


def test_low_precision_around_does_not_matter() -> None:
    features, labels = problem(2, rows=60)
    expected = all_pairs(features, labels, [0.01, 0.5], curve_points=9)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = all_pairs(features, labels, [0.01, 0.5], curve_points=9)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert replace(found, curve=None) == replace(expected, curve=None)
    assert found.curve is not None
    assert expected.curve is not None
    np.testing.assert_array_equal(found.curve.false_accepts, expected.curve.false_accepts)


def test_the_curve_counts_to_its_resolution() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(-1, 49), 8)
    features = rng.standard_normal((400, 16)) + 2 * rng.standard_normal((50, 16))[labels]
    found = all_pairs(features, labels, [0.01], curve_points=100)
    curve, (positive, negative) = found.curve, brute_force(features, labels)
    assert curve is not None
    assert 50 < len(curve.fpr) <= 100
    assert curve.fpr[-1] == 1.0
    assert curve.false_accepts[0] == 1
    for values in (curve.fpr, curve.tpr, -curve.threshold):
        assert (np.diff(values) >= 0).all()
    reach = 1e-6
    for at, threshold in enumerate(curve.threshold):
        least, most = ((negative > threshold + step).sum() for step in (reach, -reach))
        assert least <= curve.false_accepts[at] <= most
        assert curve.fpr[at] == curve.false_accepts[at] / len(negative)
        least, most = ((positive > threshold + step).mean() for step in (reach, -reach))
        assert least <= curve.tpr[at] <= most
        assert threshold % curve.resolution == 0
    assert found.points == all_pairs(features, labels, [0.01]).points


def test_metrics_have_names_and_the_bar_moves() -> None:
    features, labels = problem(1, rows=60)
    with Progress(disable=True) as bar:
        found = all_pairs(features, labels, [0.01, 0.5], tile=16, buffer=20, progress=bar)
    assert [task.description for task in bar.tasks] == [
        "pass 1 over all pairs", "pass 2 over all pairs", "positive pairs",
    ]  # fmt: skip
    assert all(task.completed == task.total for task in bar.tasks)
    metrics, point = found.metrics(), found.points[0]
    assert metrics["tpr@0.01"] == point.tpr
    assert (metrics["tpr_low@0.01"], metrics["tpr_high@0.01"]) == point.interval
    assert metrics["negatives"] == found.negatives
    assert found.interval == "Wilson 95 %"


@pytest.mark.parametrize("width", [1, 3, 64, 700])
def test_float32_scores_are_within_the_bound(width: int) -> None:
    rng = np.random.default_rng(width)
    features = rng.standard_normal((90, width)) * rng.lognormal(0, 3, (90, width))
    rows = sorted_rows(features, np.arange(90), CPU)
    product, seen = Product(rows, 40), 0
    for corner in negative_corners(rows, "all", 40):
        tile = product.negatives(*corner)
        position_P = (tile.score > EXCLUDED).nonzero().flatten()
        exact_P = exact_pairs(rows, *tile.pairs(position_P)) / UNIT
        assert (tile.score[position_P] - exact_P).abs().max() <= rows.bound
        seen += len(position_P)
    assert seen == 90 * 89 // 2
    assert rows.bound < 1e-6 * (width + 20)


def test_keys_are_the_rounded_products_in_whatever_order_they_are_summed() -> None:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((20, 37))
    rows = sorted_rows(features, np.arange(20), CPU)
    with full_precision(CPU):
        tile = Product(rows, 20).negatives(0, 0)
        position_P = torch.arange(400)
        first_P, second_P = tile.pairs(position_P)
        key_P = tile.keys(position_P)  # by one product of the whole tile
        assert torch.equal(key_P, exact_pairs(rows, first_P, second_P))
        assert torch.equal(key_P, exact_pairs(rows, second_P, first_P))
    high_ND, low_ND = (part.tolist() for part in rows.parts(torch.arange(20)))
    unit_ND = features / np.sqrt((features**2).sum(axis=1, keepdims=True))
    for one, two, key in zip(first_P.tolist(), second_P.tolist(), key_P.tolist(), strict=True):
        exact = Fraction(0)
        for a, b, c, d in zip(high_ND[one], low_ND[one], high_ND[two], low_ND[two], strict=True):
            exact += Fraction(a) * (Fraction(c) + Fraction(d)) + Fraction(b) * Fraction(c)
        assert key == round(exact * 2**40)
        assert abs(key / UNIT - math.fsum(unit_ND[one] * unit_ND[two])) < 0.52 / UNIT


def valid() -> dict[str, Any]:
    return {"features": np.eye(4) + 1.0, "labels": [0, 0, 1, -1], "fprs": [0.5]}


def row(value: float) -> np.ndarray:
    features = np.ones((4, 2))
    features[2] = value
    return features


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"features": row(math.nan)}, "features row 2: has no direction, its length is: nan"),
        ({"features": row(math.inf)}, "features row 2: has no direction, its length is: inf"),
        ({"features": row(0.0)}, "features row 2: has no direction, its length is: 0.0"),
        ({"features": np.ones(4)}, "features: must be numbers, images by width: float64"),
        ({"features": np.full((4, 2), "a")}, "features: must be numbers"),
        ({"features": np.ones((4, 0))}, "features: must be 1 to 8192 wide: 0"),
        ({"labels": [0, 0, 1]}, "labels: needs 4, as many as features: 3"),
        ({"labels": [0.0, 0.0, 1.0, 2.0]}, "labels: must be integers: float64"),
        ({"labels": [0, 0, -2, 1]}, "labels: entry 2 must be a class or -1 .*: -2"),
        ({"labels": [0, 1, 2, -1]}, "labels: no two images have one label.*: 3"),
        ({"labels": [-1, -1, -1, -1]}, "labels: no two images have one label.*: 0"),
        ({"labels": [3, 3, 3, 3]}, "labels: no two images of different identities.*: 1"),
        (
            {"labels": [0, 0, 1, 1], "pairs": "gallery_probe"},
            "labels: gallery_probe needs distractors",
        ),
        ({"fprs": [0.5, 0.1]}, "fpr: the smallest that 5 negatives measure is 0.2: 0.1"),
        ({"fprs": [0.0]}, r"fpr: must be in \(0, 1\]: 0.0"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], text: str) -> None:
    all_pairs(**valid())
    with pytest.raises(InputError, match=text):
        all_pairs(**valid() | change)


@pytest.mark.parametrize(
    "change", [{"pairs": "some"}, {"tile": 0}, {"buffer": 0}, {"curve_points": -1}]
)
def test_arguments_out_of_range(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(change))}="):
        all_pairs(**valid() | change)


MEMORY = """
import re, sys
import numpy as np
from face_lfr.all_pairs import all_pairs

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

features = np.load(sys.argv[1], mmap_mode="r")
labels = np.arange(len(features)) // 10 - 1
all_pairs(features[:100], labels[:100], [0.1, 0.01], tile=32, buffer=8, curve_points=5)
before = peak()
all_pairs(features, labels.clip(-1, 4000), [1e-6, 1e-5], buffer=2**16)
print(peak() - before)
"""


@pytest.mark.slow
def test_check_11_memory_stays_under_the_stated_bound(tmp_path: Path) -> None:
    """50,000 rows: the matrix of all pairs would be 10 GB."""
    count, width, tile, buffer = 50_000, 16, 1024, 2**16
    path = tmp_path / "features.npy"
    np.save(path, np.random.default_rng(0).standard_normal((count, width), dtype=np.float32))
    command = [sys.executable, "-c", MEMORY, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    stated = 4 * count * width + 60 * count + 64 * tile * tile + 100 * buffer + 2**26
    assert 2**20 < int(done.stdout) < stated < 160e6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("buffer", BUFFERS)
def test_a_gpu_finds_what_the_cpu_finds(buffer: int) -> None:
    for seed in range(20):
        features, labels = problem(seed, rows=300)
        fprs = [1.0, 0.3, 0.01, 0.001]
        expected = all_pairs(features, labels, fprs, buffer=buffer)
        assert all_pairs(features, labels, fprs, buffer=buffer, device="cuda") == expected
