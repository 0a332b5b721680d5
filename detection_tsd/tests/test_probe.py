"""The mechanism probe: hand cases, where bins lie, and what it reads from a detector."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.log import InputError
from detection_tsd.data.detection_data import DetectionData
from detection_tsd.data.synthetic import load_synthetic
from detection_tsd.data.transforms import DetectionTransform
from detection_tsd.ops.deform_pool import deform_pool
from detection_tsd.ops.pyramid import Pyramid
from detection_tsd.probe import (
    Shifts,
    bin_points,
    centre_error,
    find_shifts,
    positives,
    probe_detector,
    probe_shifts,
)
from detection_tsd.tests.small_detectors import small, small_head

KEEP = DetectionTransform(keep_size=True, flip=0.0)


def random_boxes(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = 60 * torch.rand(count, 2, generator=generator)
    return torch.cat([corner, corner + 8 + 24 * torch.rand(count, 2, generator=generator)], dim=1)


def moved(box_R4: Tensor, way_R2: Tensor) -> Tensor:
    """Boxes moved by shares of their size."""
    return box_R4 + (way_R2 * (box_R4[:, 2:] - box_R4[:, :2])).repeat(1, 2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DetectionData:
    root = tmp_path_factory.mktemp("glyphs") / "set"
    return load_synthetic(root, "val", kind="glyphs", train=1, val=6)


class Fixed(nn.Module):
    """In place of the layers that predict shifts: the same for every RoI."""

    def __init__(self, cls: Tensor, reg: Tensor):
        super().__init__()
        self.cls, self.reg = cls, reg

    def forward(self, x_RI: Tensor) -> tuple[Tensor, Tensor]:
        rows = len(x_RI)
        return self.cls.expand(rows, 2, 7, 7), self.reg.view(1, 2, 1, 1).expand(rows, 2, 1, 1)


def fixed(plus: float = 0.0, shift: tuple[float, float] = (1.5, -0.5)) -> nn.Module:
    detector = small("tsd", num_classes=6, plus=plus)
    generator = torch.Generator().manual_seed(1)
    offset = torch.randn(1, 2, 7, 7, generator=generator)
    detector.head.offset = Fixed(offset, torch.tensor(shift))
    return detector


def test_errors_are_in_sizes_of_the_proposal() -> None:
    roi_R4 = torch.tensor([[10.0, 20, 30, 60]])
    truth_R4 = torch.tensor([[14.0, 10, 34, 50]])
    assert centre_error(roi_R4, truth_R4).tolist() == [[pytest.approx(0.2), pytest.approx(-0.25)]]
    way_R2 = torch.tensor([[0.3, -0.1]])
    assert torch.allclose(centre_error(roi_R4, moved(roi_R4, way_R2)), way_R2)


@pytest.mark.parametrize(("share", "left"), [(1.0, 0.0), (0.75, 0.25), (0.0, 1.0), (-1.0, 2.0)])
def test_a_shift_by_a_share_of_the_error_leaves_the_rest(share: float, left: float) -> None:
    roi_R4 = random_boxes(50)
    way_R2 = 0.1 * torch.randn(50, 2, generator=torch.Generator().manual_seed(3))
    probe = probe_shifts(roi_R4, moved(roi_R4, share * way_R2), moved(roi_R4, way_R2))
    assert probe.before == pytest.approx(float(way_R2.abs().mean()), rel=1e-4)
    assert probe.after == pytest.approx(left * probe.before, rel=1e-3, abs=1e-6)
    assert probe.correlation == pytest.approx(np.sign(share), abs=1e-4)
    assert probe.proposals == 50


def test_the_correlation_is_numpys() -> None:
    generator = torch.Generator().manual_seed(4)
    roi_R4, way_R2 = random_boxes(80), 0.1 * torch.randn(80, 2, generator=generator)
    shift_R2 = 0.5 * way_R2 + 0.05 * torch.randn(80, 2, generator=generator)
    probe = probe_shifts(roi_R4, moved(roi_R4, shift_R2), moved(roi_R4, way_R2))
    expected = np.corrcoef(shift_R2.flatten().numpy(), way_R2.flatten().numpy())[0, 1]
    assert probe.correlation == pytest.approx(expected, abs=1e-4)
    assert 0.5 < probe.correlation < 0.9


def test_a_probe_needs_proposals_of_one_shape() -> None:
    box_R4 = random_boxes(3)
    with pytest.raises(ValueError, match="R > 0"):
        probe_shifts(box_R4[:0], box_R4[:0], box_R4[:0])
    with pytest.raises(ValueError, match="need the same"):
        probe_shifts(box_R4, box_R4[:2], box_R4)


def test_positives_are_the_proposals_with_overlap() -> None:
    truth_G4 = torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40]])
    roi_R4 = torch.tensor([[0.0, 0, 10, 20], [0, 0, 10, 21], [21, 20, 41, 40], [50, 50, 60, 60]])
    row_R, object_R = positives(roi_R4, truth_G4)
    assert (row_R.tolist(), object_R.tolist()) == ([0, 2], [0, 1])
    for empty in (positives(roi_R4[:0], truth_G4), positives(roi_R4, truth_G4[:0])):
        assert [len(part) for part in empty] == [0, 0]


@pytest.mark.parametrize("bins", [1, 7])
def test_points_are_where_the_pooling_reads(bins: int) -> None:
    """Pooling a map of the coordinates gives the centres of the bins."""
    line = 4 * (torch.arange(40) + 0.5)
    maps_2HW = torch.stack(torch.meshgrid(line, line, indexing="xy"))
    pyramid = Pyramid([maps_2HW[None]], [4])
    box_R4 = random_boxes(5) + 30
    offset = torch.randn(5, 2, bins, bins, generator=torch.Generator().manual_seed(5))
    roi_R5 = torch.cat([torch.zeros(5, 1), box_R4], dim=1)
    pooled = deform_pool(pyramid, roi_R5, torch.zeros(5, dtype=torch.int64), offset, size=7)
    assert pooled.shape == (5, 2, 7, 7)
    points = bin_points(box_R4, offset, size=7)
    assert torch.allclose(points, pooled.flatten(2).transpose(1, 2), atol=1e-3)


@pytest.mark.parametrize("plus", [0.0, 1.0])
def test_shifts_are_read_from_the_head(data: DetectionData, plus: float) -> None:
    detector = fixed(plus)
    parts = list(find_shifts(detector, data, KEEP, batch=4))
    assert len(parts) == len(data)
    assert data.proposals is not None
    for row, part in enumerate(parts):
        objects = data.objects.read(row)
        near_M4 = data.proposals[row][: 12 * len(objects.box_G4)]
        assert 0 < len(part.roi_R4) <= len(data.proposals[row])
        assert {tuple(box) for box in part.roi_R4} <= {tuple(box) for box in data.proposals[row]}
        assert len(part.roi_R4) > 0.5 * len(near_M4)
        size_R2 = part.roi_R4[:, 2:] - part.roi_R4[:, :2]
        way_R4 = np.tile(size_R2 * (0.15, -0.05), 2)
        assert np.abs(part.shifted_R4 - part.roi_R4 - way_R4).max() < 1e-3 + 0.15 * plus
        assert part.point_RS2.shape == (len(part.roi_R4), 49, 2)
        for truth, label in zip(part.truth_R4, part.label_R, strict=True):
            known = np.abs(objects.box_G4 - truth).max(axis=1)
            assert known.min() < 1e-4
            assert objects.label_G[known.argmin()] == label


def test_shifts_are_in_pixels_of_the_file(data: DetectionData) -> None:
    """Enlarged input gives the same numbers."""
    twice = DetectionTransform(short=192, long=192, flip=0.0)
    small_one, large_one = (next(find_shifts(fixed(), data, t)) for t in (KEEP, twice))
    for name in Shifts._fields:
        mine, other = getattr(small_one, name), getattr(large_one, name)
        assert np.abs(mine - other).max() < 1e-3, name


def test_a_constant_shift_knows_nothing(data: DetectionData) -> None:
    detector = fixed()
    detector.train()
    probe = probe_detector(detector, data, KEEP)
    assert detector.training
    assert probe.correlation == pytest.approx(0, abs=0.1)
    assert 0.08 < probe.before < 0.11
    assert probe.after > probe.before
    again = probe_detector(detector, data, KEEP, batch=1)
    assert again.proposals == probe.proposals
    assert again.after == pytest.approx(probe.after, abs=1e-6)
    rows = [part for row in (4, 1) for part in find_shifts(detector, data, KEEP, rows=[row])]
    both = list(find_shifts(detector, data, KEEP, rows=[4, 1]))
    for one, two in zip(rows, both, strict=True):
        assert np.abs(one.shifted_R4 - two.shifted_R4).max() < 1e-4


def test_what_cannot_be_probed_is_named(data: DetectionData, tmp_path: Path) -> None:
    detector = fixed()
    with pytest.raises(InputError, match="has no fixed proposals"):
        probe_detector(detector, replace(data, proposals=None), KEEP)
    far = [np.array([[0.0, 0, 1, 1]], np.float32)] * len(data)
    with pytest.raises(InputError, match=r"no proposal overlaps an object by: 0\.5"):
        probe_detector(detector, replace(data, proposals=far), KEEP)
    with pytest.raises(ValueError, match="SiblingHead does not move"):
        probe_detector(small("sibling", num_classes=6), data, KEEP)
    detector.head = small_head("tsd", num_classes=6, reg_shift="point")
    with pytest.raises(ValueError, match="TSDHead does not move its proposals as a whole"):
        probe_detector(detector, data, KEEP)
    with pytest.raises(ValueError, match="CascadeDetector"):
        probe_detector(small("tsd", num_classes=6, stages=3), data, KEEP)
