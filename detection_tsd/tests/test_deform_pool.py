"""Deformable pooling: the definition, its identities, gradients, and degenerate inputs."""

import math

import pytest
import torch
import torchvision
from torch import Tensor

from detection_tsd.ops.deform_pool import deform_pool
from detection_tsd.ops.pyramid import Pyramid
from detection_tsd.ops.roi_align import roi_align
from detection_tsd.tests.pool_loop import pool_loop, problem

IMPLS = ("bags", "reference")
SAMPLERS = (("aligned", 2), ("legacy", 4), ("aligned", 1), ("legacy", 3))
each_sampler = pytest.mark.parametrize(("sampler", "samples"), SAMPLERS)
each_impl = pytest.mark.parametrize("impl", IMPLS)


def copies(pyramid: Pyramid, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [one.detach().to(dtype).clone().requires_grad_() for one in pyramid.maps]


@each_impl
@each_sampler
@pytest.mark.parametrize("scale", [0.0, 1.0, 8.0])
def test_check_01_the_definition(sampler: str, samples: int, scale: float, impl: str) -> None:
    pyramid, roi, level, offset = problem(int(scale))
    offset = scale * offset
    maps = [one.numpy() for one in pyramid.maps]
    inputs = maps, (4, 8), roi.numpy(), level.numpy(), offset.numpy()
    wanted = torch.from_numpy(pool_loop(*inputs, samples, 0.1, sampler))
    settings = {"size": 3, "samples": samples, "sampler": sampler, "impl": impl}
    found = deform_pool(pyramid, roi, level, offset, **settings)
    assert (found - wanted).abs().max() < 1e-10
    assert found.abs().max() > 0.5
    if scale == 0:
        found = deform_pool(pyramid, roi, level, **settings)
        assert (found - wanted).abs().max() < 1e-10


def test_check_01_regions_outside_give_zero() -> None:
    pyramid, _, level, _ = problem()
    outside = torch.tensor([[0, -900, -900, -800, -850], [1, 500, 3, 580, 40.0]])
    for sampler, samples in SAMPLERS:
        for impl in IMPLS:
            leaves = copies(pyramid)
            offset = torch.randn(2, 2, 7, 7).double().requires_grad_()
            out = deform_pool(
                Pyramid(leaves, (4, 8)), outside, level[:2], offset, sampler=sampler,
                samples=samples, impl=impl,
            )  # fmt: skip
            assert not out.any()
            out.sum().backward()
            assert not any(one.grad.any() for one in [*leaves, offset] if one.grad is not None)


@pytest.mark.parametrize("offsets", ["none", "one", "bins"])
def test_check_02_roi_align_of_moved_boxes(offsets: str) -> None:
    """Float32 against torchvision: zero offsets, one offset, and an offset of each bin."""
    pyramid, roi, level, _ = problem()
    roi[:, 3:] = torch.maximum(roi[:, 3:], roi[:, 1:3])
    wide, roi = pyramid, roi.float()
    pyramid = Pyramid([one.float() for one in wide.maps], (4, 8))
    side, maker = roi[:, 3:] - roi[:, 1:3], torch.Generator().manual_seed(0)
    offset = torch.randn(len(roi), 2, *((1, 1) if offsets == "one" else (7, 7)), generator=maker)
    box = roi[:, None, 1:]
    if offsets == "none":
        offset = torch.zeros_like(offset)
    if offsets == "bins":
        column, row = torch.arange(7).repeat(7), torch.arange(7).repeat_interleave(7)
        start = box[..., :2] + torch.stack([column, row], 1) * side[:, None] / 7
        box = torch.cat([start, start + side[:, None] / 7], 2)
    if offsets != "none":
        shift = 0.1 * offset.flatten(2).transpose(1, 2) * side[:, None]
        box = box + shift.repeat(1, 1, 2)
    bins = 1 if offsets == "bins" else 7
    image = roi[:, :1, None].expand(-1, box.shape[1], 1)
    moved = torch.cat([image, box], 2).flatten(0, 1)
    wanted = torch.empty(len(moved), 3, bins, bins)
    for one, (x, stride) in enumerate(zip(pyramid.maps, (4, 8), strict=True)):
        place = level.repeat_interleave(box.shape[1]) == one
        pooled = torchvision.ops.roi_align(x, moved[place], bins, 1 / stride, 2, aligned=True)
        wanted[place] = pooled
    if offsets == "bins":
        wanted = wanted.view(-1, 49, 3).transpose(1, 2).reshape(-1, 3, 7, 7)
    for impl in IMPLS:
        assert (deform_pool(pyramid, roi, level, offset, impl=impl) - wanted).abs().max() < 1e-5


def test_check_02_zero_offsets_are_roi_align() -> None:
    pyramid, roi, level, _ = problem()
    for shape in ((24, 2, 7, 7), (24, 2, 1, 1)):
        found = deform_pool(pyramid, roi, level, torch.zeros(shape))
        assert torch.equal(found, deform_pool(pyramid, roi, level))
        assert torch.equal(found, roi_align(pyramid, roi, level))


@each_impl
@pytest.mark.parametrize(("sampler", "samples"), SAMPLERS[:2])
@pytest.mark.parametrize("side", [3, 1])
def test_check_03_gradcheck(sampler: str, samples: int, side: int, impl: str) -> None:
    pyramid, roi, level, offset = problem(side, channels=2, regions=7)
    leaves = [*copies(pyramid), 2 * offset[..., :side, :side].clone()]
    leaves[-1].requires_grad_()

    def run(*inputs: Tensor) -> Tensor:
        return deform_pool(
            Pyramid(inputs[:-1], (4, 8)), roi, level, inputs[-1], size=3, samples=samples,
            sampler=sampler, impl=impl,
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradcheck(lambda x: run(*leaves[:-1], x), leaves[-1:])


@each_sampler
def test_check_03_one_offset_has_the_sum_of_all_gradients(sampler: str, samples: int) -> None:
    pyramid, roi, level, offset = problem()
    one = offset[..., :1, :1].clone().requires_grad_()
    each = one.detach().repeat(1, 1, 3, 3).requires_grad_()
    settings = {"size": 3, "samples": samples, "sampler": sampler}
    out, wanted = (deform_pool(pyramid, roi, level, x, **settings) for x in (one, each))
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)
    upstream = torch.randn(out.shape).double()
    (got,) = torch.autograd.grad(out, one, upstream)
    (every,) = torch.autograd.grad(wanted, each, upstream)
    torch.testing.assert_close(got, every.sum((2, 3), keepdim=True), rtol=0, atol=1e-10)
    assert got.abs().max() > 0.1


@each_impl
def test_check_03_regions_get_no_gradient(impl: str) -> None:
    pyramid, roi, level, offset = problem()
    roi, offset = roi.requires_grad_(), offset.requires_grad_()
    deform_pool(pyramid, roi, level, offset, size=3, impl=impl).sum().backward()
    assert roi.grad is None
    assert offset.grad is not None


@pytest.mark.parametrize("needed", ["maps", "coarse map", "offset"])
def test_check_03_only_what_is_needed(needed: str) -> None:
    results = []
    for impl in IMPLS:
        pyramid, roi, level, offset = problem()
        leaves = [one.clone() for one in pyramid.maps]
        for one in leaves[{"maps": 0, "coarse map": 1, "offset": 2}[needed] :]:
            one.requires_grad_()
        offset.requires_grad_(needed == "offset")
        out = deform_pool(Pyramid(leaves, (4, 8)), roi, level, offset, size=3, impl=impl)
        out.square().sum().backward()
        results.append([one.grad for one in (*leaves, offset)])
    for got, wanted in zip(*results, strict=True):
        assert (got is None) == (wanted is None)
        if got is not None and wanted is not None:
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


@each_sampler
def test_check_03_a_clamped_sample_stands_still(sampler: str, samples: int) -> None:
    """Beyond the centre of the last pixel the value is that of the pixel."""
    x_1CHW = torch.arange(6.0).double().view(1, 1, 1, 6).expand(1, 1, 6, 6)
    last = {"aligned": 23.0, "legacy": 22.0}[sampler]  # legacy ends a pixel later
    roi = torch.tensor([[0, 22.6, 2, 22.9, 20], [0, 9, 2, 16, 20]]).double()
    roi[0, 3] = last
    offset = torch.zeros(2, 2, 1, 1).double().requires_grad_()
    level = torch.zeros(2, dtype=torch.int64)
    for impl in IMPLS:
        out = deform_pool(
            Pyramid([x_1CHW], (4,)), roi, level, offset, size=1, samples=samples, sampler=sampler,
            impl=impl,
        )  # fmt: skip
        (got,) = torch.autograd.grad(out.sum(), offset)
        assert out[0].item() == pytest.approx(5)
        width = 1.75 if sampler == "aligned" else 2.0
        assert got.flatten().tolist() == pytest.approx([0, 0, 0.1 * width, 0])


def test_check_04_whole_pixel_shifts_change_nothing() -> None:
    maker = torch.Generator().manual_seed(0)
    maps = [torch.randn(1, 3, *hw, generator=maker).double() for hw in ((32, 40), (16, 20))]
    roi = torch.tensor([[0, 50, 44, 98, 75], [0, 60, 40, 75, 80], [0, 64, 40, 96, 88]]).double()
    level, offset = torch.tensor([1, 0, 1]), torch.rand(3, 2, 7, 7).double() * 2 - 1
    moved = roi + torch.tensor([0, 16, -8, 16, -8])  # (4, -2) pixels of stride 4, (2, -1) of 8
    shifted = [
        torch.roll(one, shift, (2, 3)) for one, shift in zip(maps, ((-2, 4), (-1, 2)), strict=True)
    ]
    for sampler, samples in SAMPLERS:
        for x in (offset, None):
            settings = {"sampler": sampler, "samples": samples}
            found = deform_pool(Pyramid(maps, (4, 8)), roi, level, x, **settings)
            again = deform_pool(Pyramid(shifted, (4, 8)), moved, level, x, **settings)
            torch.testing.assert_close(found, again, rtol=0, atol=1e-12)


@each_impl
def test_check_04_regions_do_not_depend_on_each_other(impl: str) -> None:
    """Mixed levels and images equal single calls, in any order."""
    pyramid, roi, level, offset = problem()
    assert level.unique().tolist() == [0, 1]
    whole = deform_pool(pyramid, roi, level, offset, size=3, impl=impl)
    order = torch.randperm(len(roi), generator=torch.Generator().manual_seed(1))
    found = deform_pool(pyramid, roi[order], level[order], offset[order], size=3, impl=impl)
    assert torch.equal(found, whole[order])
    for one, stride in enumerate((4, 8)):
        place = level == one
        alone = Pyramid([pyramid.maps[one]], (stride,))
        none = torch.zeros_like(level[place])
        found = deform_pool(alone, roi[place], none, offset[place], size=3, impl=impl)
        torch.testing.assert_close(found, whole[place], rtol=0, atol=1e-13)


@each_sampler
def test_x_is_the_first_offset_and_its_unit_is_the_region(sampler: str, samples: int) -> None:
    ramp = torch.arange(40.0).double()
    across = torch.stack([ramp.expand(30, 40), ramp[:30, None].expand(30, 40)])[None]
    roi, level = torch.tensor([[0, 40, 40, 100, 60]]).double(), torch.tensor([0])
    width, height = (15.0, 5.0) if sampler == "aligned" else (15.25, 5.25)
    offset = torch.zeros(1, 2, 7, 7).double()
    offset[0, 0, 2, 5], offset[0, 1, 4, 1] = 1.5, -1.0
    for gamma in (0.1, 0.2):
        settings = {"gamma": gamma, "sampler": sampler, "samples": samples}
        still = deform_pool(Pyramid([across], (4,)), roi, level, **settings)
        moved = deform_pool(Pyramid([across], (4,)), roi, level, offset, **settings) - still
        wanted = torch.zeros(1, 2, 7, 7).double()
        wanted[0, 0, 2, 5], wanted[0, 1, 4, 1] = 1.5 * gamma * width, -gamma * height
        torch.testing.assert_close(moved, wanted, rtol=0, atol=1e-12)


def test_the_legacy_sampler_rounds_half_away_from_zero() -> None:
    pyramid, _, _, _ = problem()
    roi = torch.tensor([[0, 2.5, 4.5, 40.5, 30.5]]).double()
    away = torch.tensor([[0, 3, 5, 41, 31]]).double()
    even = torch.tensor([[0, 2, 4, 40, 30]]).double()
    level = torch.tensor([0])
    pools = [deform_pool(pyramid, x, level, sampler="legacy") for x in (roi, away, even)]
    assert torch.equal(pools[0], pools[1])
    assert not torch.allclose(pools[0], pools[2])


@each_impl
@each_sampler
def test_nothing_and_huge_offsets(sampler: str, samples: int, impl: str) -> None:
    pyramid, roi, level, _ = problem()
    leaves = copies(pyramid)
    settings = {"samples": samples, "sampler": sampler, "impl": impl}
    empty = torch.zeros(0, 2, 7, 7, requires_grad=True)
    out = deform_pool(Pyramid(leaves, (4, 8)), roi[:0], level[:0], empty, **settings)
    assert out.shape == (0, 3, 7, 7)
    out.sum().backward()
    assert all(one.grad is None or not one.grad.any() for one in leaves)
    for value in (1e4, -1e4, 1e30):
        huge = torch.full((24, 2, 1, 1), value).requires_grad_()
        solid = (roi[:, 3:] - roi[:, 1:3]).abs().amin(1) > 1  # the others do not move
        out = deform_pool(Pyramid(leaves, (4, 8)), roi, level, huge, **settings)
        assert out.isfinite().all()
        assert not out[solid].any()
        out.sum().backward()
        assert huge.grad is not None
        assert not huge.grad[solid].any()
        assert huge.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_pooled_in_float32(dtype: torch.dtype) -> None:
    pyramid, roi, level, offset = problem(size=7)
    leaves = [one.detach().to(dtype).requires_grad_() for one in pyramid.maps]
    offset, roi = offset.to(dtype).requires_grad_(), roi.to(dtype)
    out = deform_pool(Pyramid(leaves, (4, 8)), roi, level, offset)
    assert out.dtype == torch.float32
    wide = Pyramid([one.detach().float() for one in leaves], (4, 8))
    assert torch.equal(out, deform_pool(wide, roi.float(), level, offset.detach().float()))
    out.sum().backward()
    assert all(one.grad is not None and one.grad.dtype == dtype for one in (*leaves, offset))


def test_regions_below_a_pixel_and_maps_of_one_pixel() -> None:
    one = torch.tensor([[[[3.0]]]])
    roi = torch.tensor([[0, 0.0, 0, 3, 3], [0, 1, 1, 1.2, 1.2], [0, 2, 2, 2, 2]])
    for sampler, samples in SAMPLERS:
        settings = {"samples": samples, "sampler": sampler, "size": 2}
        out = deform_pool(Pyramid([one], (4,)), roi, torch.zeros(3).long(), **settings)
        torch.testing.assert_close(out, torch.full_like(out, 3.0))


def test_bad_arguments_are_refused() -> None:
    pyramid, roi, level, offset = problem()

    def refused(text: str, **changes: object) -> None:
        inputs = {"roi_R5": roi, "level_R": level, "offset": offset, "size": 3} | changes
        with pytest.raises(ValueError, match=text):
            deform_pool(pyramid, **inputs)  # type: ignore[arg-type]

    def spoilt(x: Tensor, value: float, *place: int) -> Tensor:
        x = x.clone()
        x[place] = value
        return x

    for value in (2.0, -1.0):
        refused(
            r"region 7 has \[.*\], need an image index below 2", roi_R5=spoilt(roi, value, 7, 0)
        )
    refused("region 4 has .*, need a level below 2", level_R=spoilt(level, 2, 4))
    for value in (math.nan, math.inf):
        refused("region 3 has .*, need finite coordinates", roi_R5=spoilt(roi, value, 3, 4))
        refused("region 9 has .*, need finite offsets", offset=spoilt(offset, value, 9, 1, 2, 0))
    refused(r"offset has shape \(24, 2, 3, 3\), need \(24, 2, 7, 7\) or \(24, 2, 1, 1\)", size=7)
    refused("offset has shape", offset=offset.flatten(1))
    refused(r"roi \(24, 4\)", roi_R5=roi[:, 1:])
    refused(r"level \(23,\)", level_R=level[1:])
    refused("size=0", size=0)
    refused("samples=0", samples=0)
    refused("gamma=nan", gamma=math.nan)
    refused("sampler='bilinear': need one of aligned, legacy", sampler="bilinear")
    refused("impl='cuda': need one of auto, reference, bags, triton", impl="cuda")
