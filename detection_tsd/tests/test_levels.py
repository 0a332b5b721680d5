"""Pyramid level of a region: exact at its boundaries, and safe on regions without area."""

import math

import pytest
import torch

from detection_tsd.ops.levels import roi_levels


def of_sides(*sides: tuple[float, float], plus: float = 0.0, base: float = 56.0) -> list[int]:
    roi = torch.tensor([[0.0, 33.25, 7.5, 33.25 + w, 7.5 + h] for w, h in sides])
    return roi_levels(roi, 4, base, plus).tolist()


def test_check_04_levels_at_the_boundary_sizes() -> None:
    sides = [(112.0, 112.0), (224.0, 224.0), (448.0, 448.0), (896.0, 896.0)]
    assert of_sides(*sides) == [1, 2, 3, 3]
    assert of_sides(*[(w - 0.01, h) for w, h in sides]) == [0, 1, 2, 3]
    assert of_sides(*[(w / 4, h * 4) for w, h in sides]) == [1, 2, 3, 3]
    assert of_sides(*[(w - 1, h - 1) for w, h in sides], plus=1.0) == [1, 2, 3, 3]
    assert of_sides(*[(w - 1, h - 1) for w, h in sides]) == [0, 1, 2, 3]
    assert of_sides((36.0, 36.0), (35.9, 36.0), base=18.0) == [1, 0]


def test_it_is_the_formula() -> None:
    maker = torch.Generator().manual_seed(0)
    side = 4 * 400 ** torch.rand(500, 2, generator=maker)
    corner = 300 * torch.rand(500, 2, generator=maker)
    roi = torch.cat([torch.zeros(500, 1), corner, corner + side], dim=1)
    found = roi_levels(roi, 4).tolist()
    for (_, x1, y1, x2, y2), level in zip(roi.tolist(), found, strict=True):
        exact = math.log2(math.sqrt((x2 - x1) * (y2 - y1)) / 56 + 1e-6)
        assert level == min(max(math.floor(exact), 0), 3)
    assert sorted(set(found)) == [0, 1, 2, 3]


def test_regions_without_area_are_at_the_finest_level() -> None:
    roi = torch.tensor(
        [[0, 5, 5, 5, 900], [0, 900, 900, 0, 0], [0, 5, 5, 5, 5], [0, 0, 0, math.nan, 9]]
    )
    assert roi_levels(roi, 4).tolist() == [0, 0, 0, 0]
    assert roi_levels(roi[:0], 4).shape == (0,)
    assert roi_levels(torch.tensor([[0.0, 0, 0, 900, 900]]).half(), 4).tolist() == [3]
    found = roi_levels(torch.tensor([[0.0, 0, 0, 900, 900]]).requires_grad_(), 1)
    assert found.dtype == torch.int64
    assert found.tolist() == [0]


def test_bad_arguments_are_refused() -> None:
    roi = torch.zeros(1, 5)
    with pytest.raises(ValueError, match="levels=0"):
        roi_levels(roi, 0)
    with pytest.raises(ValueError, match=r"base=-1\.0"):
        roi_levels(roi, 4, -1.0)
    with pytest.raises(ValueError, match=r"roi has shape \(1, 4\)"):
        roi_levels(roi[:, :4], 4)
