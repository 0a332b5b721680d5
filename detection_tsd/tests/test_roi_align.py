"""RoIAlign of a pyramid against torchvision, the definition, and mmdetection's first version."""

import pytest
import torch
import torchvision

from detection_tsd.ops.levels import roi_levels
from detection_tsd.ops.pyramid import Pyramid
from detection_tsd.ops.roi_align import roi_align
from detection_tsd.tests.pool_loop import pool_loop, problem


def by_torchvision(
    maps: list[torch.Tensor], roi: torch.Tensor, level: torch.Tensor, size: int, aligned: bool
) -> torch.Tensor:
    out = maps[0].new_zeros(len(roi), maps[0].shape[1], size, size)
    for one, (x, stride) in enumerate(zip(maps, (4, 8), strict=True)):
        place = (level == one).nonzero()[:, 0]
        pooled = torchvision.ops.roi_align(x, roi[place], size, 1 / stride, 2, aligned)
        out = out.index_copy(0, place, pooled)
    return out


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("mode", ["aligned", "torchvision"])
@pytest.mark.parametrize("last", [True, False])
def test_value_and_gradient_are_torchvisions(mode: str, impl: str, last: bool) -> None:
    pyramid, roi, level, _ = problem()
    layout = torch.channels_last if last else torch.contiguous_format
    leaves = [
        one.contiguous(memory_format=layout).requires_grad_()
        for one in (x.clone() for x in pyramid.maps)
    ]
    out = roi_align(Pyramid(leaves, (4, 8)), roi, level, mode=mode, impl=impl)
    wanted = by_torchvision(leaves, roi, level, 7, mode == "aligned")
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)
    upstream = torch.randn(out.shape, dtype=torch.float64)
    got, exact = (torch.autograd.grad(one, leaves, upstream) for one in (out, wanted))
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("samples", [1, 3])
def test_regions_of_mmdetection_end_behind_their_last_pixel(samples: int, impl: str) -> None:
    pyramid, roi, level, offset = problem()
    mode = "mmdet_v1"
    out = roi_align(pyramid, roi, level, size=3, samples=samples, mode=mode, impl=impl)
    maps = [one.numpy() for one in pyramid.maps]
    inputs = maps, (4, 8), roi.numpy(), level.numpy(), 0 * offset.numpy()
    wanted = pool_loop(*inputs, samples, 0.0, mode)
    torch.testing.assert_close(out, torch.from_numpy(wanted), rtol=0, atol=1e-12)
    moved = roi + torch.tensor([0, 0, 0, 1, 1])
    same = (moved[:, 3:] - moved[:, 1:3] >= 8).all(1)  # torchvision widens to a pixel
    plain = roi_align(pyramid, moved, level, size=3, samples=samples, mode="torchvision")
    torch.testing.assert_close(out[same], plain[same], rtol=0, atol=1e-12)


def test_check_02_float32_at_the_size_of_a_real_map() -> None:
    maker = torch.Generator().manual_seed(0)
    maps = [torch.randn(1, 4, 200, 336, generator=maker), torch.randn(1, 4, 100, 168)]
    side = 16 * 10 ** torch.rand(60, 2, generator=maker)
    corner = torch.rand(60, 2, generator=maker) * (torch.tensor([1344, 800]) - side)
    roi = torch.cat([torch.zeros(60, 1), corner, corner + side], dim=1)
    level = roi_levels(roi, 2)
    out = roi_align(Pyramid(maps, (4, 8)), roi, level)
    exact = by_torchvision([one.double() for one in maps], roi.double(), level, 7, True)
    theirs = by_torchvision(maps, roi, level, 7, True)
    # coordinates near 336 have 3e-5 in float32: no further from the truth than torchvision
    assert (out - exact).abs().max() <= 1.2 * (theirs - exact).abs().max()
    assert (out - exact).abs().mean() < 1e-5


def test_no_regions_and_unknown_modes() -> None:
    pyramid, roi, level, _ = problem()
    leaf = pyramid.maps[0].clone().requires_grad_()
    out = roi_align(Pyramid([leaf], (4,)), roi[:0], level[:0], size=14)
    assert out.shape == (0, 3, 14, 14)
    out.sum().backward()
    assert leaf.grad is not None
    assert not leaf.grad.any()
    with pytest.raises(ValueError, match="mode='legacy': need one of aligned, torchvision"):
        roi_align(pyramid, roi, level, mode="legacy")
