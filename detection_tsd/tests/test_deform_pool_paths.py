"""Deformable pooling's fast path: chunks, tables, threads, the compiler, and exports."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from detection_tsd.ops import deform_pool_cpu, deform_pool_reference, pixel_sums
from detection_tsd.ops.deform_pool import _pool, deform_pool
from detection_tsd.ops.deform_pool_cpu import CHUNK, pool_bags, pool_bags_backward
from detection_tsd.ops.levels import roi_levels
from detection_tsd.ops.pyramid import Pyramid
from detection_tsd.ops.roi_align import roi_align
from detection_tsd.ops.sampling import Settings
from detection_tsd.tests.pool_loop import problem
from detection_tsd.tests.test_deform_pool import copies, each_sampler


def forward_backward(impl: str = "bags", **settings: object) -> list[Tensor]:
    pyramid, roi, level, offset = problem(size=7, regions=60)
    leaves = [*copies(pyramid, torch.float32), offset.float().requires_grad_()]
    inputs = Pyramid(leaves[:-1], (4, 8)), roi, level, leaves[-1]
    out = deform_pool(*inputs, impl=impl, **settings)  # type: ignore[arg-type]
    return [out, *torch.autograd.grad(out.square().sum(), leaves)]


@pytest.mark.parametrize("tables", ["one", "one of each level"])
def test_memory_is_bounded_by_chunks(tables: str) -> None:
    pyramid, roi, level, _ = problem(regions=500)
    roi, level = roi.repeat(9, 1), level.repeat(9)
    for channels, samples in ((3, 2), (256, 2), (3, 4)):
        settings = Settings(7, samples, 0.1, "aligned")
        rows = [pyramid.flat] if tables == "one" else list(pyramid.rows)
        wide = [one[:, :1].expand(-1, channels) for one in rows]
        found = deform_pool_cpu._chunks(wide, pyramid.table, roi, level, None, settings)
        chunks = list(found)
        counts = [len(chunk.roi_n5) for chunk in chunks]
        assert sum(counts) == 4500
        assert max(counts) * 49 * max(channels, 4 * samples**2) <= CHUNK
        regions = torch.cat([torch.arange(4500)[chunk.region] for chunk in chunks])
        assert torch.equal(regions.sort().values, torch.arange(4500))


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = forward_backward()
    monkeypatch.setattr(deform_pool_cpu, "CHUNK", 7 * 49 * 16)
    monkeypatch.setattr(pixel_sums, "TAPS", 15 * 49 * 16)
    pieces = forward_backward()
    assert torch.equal(pieces[0], whole[0])
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-4)
    whole = forward_backward("reference")
    monkeypatch.setattr(deform_pool_reference, "PIECE", 7 * 49 * 3)
    torch.testing.assert_close(forward_backward("reference"), whole, rtol=1e-5, atol=1e-5)


@each_sampler
@pytest.mark.parametrize("regions", [8, 60])
@pytest.mark.parametrize("tables", ["one", "one of each level"])
def test_few_and_many_regions_and_tables(
    tables: str, regions: int, sampler: str, samples: int
) -> None:
    """Gradients of the pixels by sorting all neighbours, and by sorting the lower ones."""
    pyramid, roi, level, offset = problem(size=4, regions=regions)
    bins = 16 * level.bincount()
    assert (pyramid.rows[0].shape[0] > bins[0]) == (regions == 8)
    rows = [pyramid.flat] if tables == "one" else list(pyramid.rows)
    settings = Settings(4, samples, 0.1, sampler)
    shared = pyramid.table, roi, level, 2 * offset, settings
    found = pool_bags(rows, *shared)
    drows, doffset = pool_bags_backward(found, rows, *shared, True, True)
    leaves = [pyramid.flat.clone().requires_grad_(), (2 * offset).requires_grad_()]
    inputs = leaves[0], pyramid.table, roi, level, leaves[1], settings
    wanted = deform_pool_reference.pool_reference(*inputs)
    gradients = torch.autograd.grad(wanted, leaves, wanted.detach())
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat(drows), gradients[0], rtol=0, atol=1e-11)
    torch.testing.assert_close(doffset, gradients[1], rtol=0, atol=1e-10)


def test_bits_do_not_depend_on_the_run_or_the_threads() -> None:
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            runs.append(forward_backward())
    finally:
        torch.set_num_threads(before)
    torch.use_deterministic_algorithms(True)
    try:
        runs.append(forward_backward("auto"))
    finally:
        torch.use_deterministic_algorithms(False)
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run, runs[0], strict=True))


def test_three_poolings_share_one_pyramid() -> None:
    pyramid, roi, level, offset = problem(size=7)

    def pools(of: Callable[[], Pyramid]) -> Tensor:
        return roi_align(of(), roi, level) + sum(
            deform_pool(of(), roi, level, x) for x in (offset, offset[..., :1, :1])
        )

    leaves = copies(pyramid)
    shared = Pyramid(leaves, (4, 8))
    wanted = torch.autograd.grad(pools(lambda: Pyramid(leaves, (4, 8))).square().sum(), leaves)
    got = torch.autograd.grad(pools(lambda: shared).square().sum(), leaves)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_the_promises_to_the_compiler() -> None:
    pyramid, roi, level, offset = problem(size=7)
    leaves = [*copies(pyramid), offset.requires_grad_()]
    rows = [one.detach().requires_grad_() for one in pyramid.rows]
    for moved in (offset, None):
        inputs = (rows, pyramid.table, roi, level, moved, 7, 2, 0.1, "aligned", "bags")
        torch.library.opcheck(_pool, inputs)

    def run(*inputs: Tensor) -> Tensor:
        level = roi_levels(roi, 2, 18.0)
        return deform_pool(Pyramid(inputs[:-1], (4, 8)), roi, level, inputs[-1])

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(run(*leaves).square().sum(), leaves)
    got = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


class Pools(torch.nn.Module):
    """What a head does, to be exported."""

    def forward(self, fine: Tensor, coarse: Tensor, roi: Tensor, offset: Tensor) -> Tensor:
        pyramid, level = Pyramid([fine, coarse], (4, 8)), roi_levels(roi, 2, 18.0)
        return deform_pool(pyramid, roi, level, offset) + roi_align(pyramid, roi, level)


def test_an_export_has_standard_operators_and_any_number_of_regions() -> None:
    pyramid, roi, _, offset = problem(size=7)
    maps, roi, offset = [one.float() for one in pyramid.maps], roi.float(), offset.float()
    count = torch.export.Dim("regions", min=2, max=4096)
    shapes = {"fine": None, "coarse": None, "roi": {0: count}, "offset": {0: count}}
    program = torch.export.export(Pools(), (*maps, roi, offset), dynamic_shapes=shapes)
    assert "detection_tsd" not in program.graph_module.code
    for regions in (24, 5):
        inputs = (*maps, roi[:regions], offset[:regions])
        torch.testing.assert_close(program.module()(*inputs), Pools()(*inputs))
