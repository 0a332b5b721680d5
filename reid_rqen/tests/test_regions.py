"""Region pooling: slices, fractions, per-frame edges."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from reid_rqen.models.regions import RegionPool, mask_pool, region_edges, row_masks


def random_map(rows: int = 7, columns: int = 5) -> Tensor:
    return torch.rand(3, 4, rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("regions", "cuts"),
    [
        ((3, 2, 2), (0, 3, 5, 7)),
        ((2, 2, 3), (0, 2, 4, 7)),
        ((7,), (0, 7)),
        ((1,) * 7, tuple(range(8))),
    ],
)
def test_check_05_integer_rows_are_slices(regions: tuple[int, ...], cuts: tuple[int, ...]) -> None:
    x = random_map()
    spans = pairwise(cuts)
    slices = torch.stack([x[:, :, a:b].mean(dim=(2, 3)) for a, b in spans], dim=1)
    assert torch.equal(RegionPool(regions)(x), slices)
    edge = torch.tensor(region_edges(regions)).expand(3, -1)
    torch.testing.assert_close(RegionPool(regions)(x, edge), slices, rtol=0, atol=2e-7)


def test_check_05_masks_of_integer_rows_are_bit_exact() -> None:
    """On a map whose sums have no rounding, masks and slices agree in every bit."""
    x = (random_map() * 16).round()
    edge = torch.tensor([region_edges((3, 2, 2))])
    mask = row_masks(edge, 7)
    assert torch.equal(mask[0].sum(dim=1), torch.tensor([3.0, 2.0, 2.0]))
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(mask_pool(x, mask), RegionPool((3, 2, 2))(x))


@pytest.mark.parametrize("rows", [1, 4, 8, 12, 14])
def test_check_05_fractions_conserve_mass(rows: int) -> None:
    x = random_map(rows).double()
    regions = (3, 2, 2)
    pooled = RegionPool(regions)(x)
    share = torch.tensor(regions).double() / 7
    torch.testing.assert_close(
        torch.einsum("r,brc->bc", share, pooled), x.mean(dim=(2, 3)), rtol=0, atol=1e-9
    )
    ones = RegionPool(regions)(torch.ones_like(x))
    torch.testing.assert_close(ones, torch.ones_like(ones), rtol=0, atol=1e-9)


def test_a_cut_row_is_shared() -> None:
    x = torch.tensor([1.0, 10.0, 100.0]).view(1, 1, 3, 1)
    pooled = RegionPool((1, 1))(x).flatten()
    torch.testing.assert_close(pooled, torch.tensor([(1 + 5) / 1.5, (5 + 100) / 1.5]))


def test_edges_per_frame() -> None:
    x = random_map(rows=8)
    edge = torch.tensor([[0.25, 0.5], [0.5, 0.75], [0.0, 1.0]])
    pooled = RegionPool((3, 2, 2))(x, edge)
    torch.testing.assert_close(pooled[0, 0], x[0, :, :2].mean(dim=(1, 2)))
    torch.testing.assert_close(pooled[1, 1], x[1, :, 4:6].mean(dim=(1, 2)))
    torch.testing.assert_close(pooled[2, 1], x[2].mean(dim=(1, 2)))
    assert not pooled[2, [0, 2]].any()  # regions without height


def test_pooling_is_float32_in_autocast() -> None:
    x = random_map().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert RegionPool()(x).dtype == torch.float32
        assert RegionPool()(x, torch.tensor([[0.3, 0.6]]).expand(3, -1)).dtype == torch.float32
    torch.testing.assert_close(RegionPool()(x), RegionPool()(x.float()))


def test_gradient_reaches_every_cell() -> None:
    x = random_map().double().requires_grad_()
    edge = torch.tensor([[0.3, 0.6]]).expand(3, -1)
    assert torch.autograd.gradcheck(lambda x: RegionPool()(x, edge), (x,))


def test_wrong_regions_and_edges_are_named() -> None:
    for regions in ((), (3, 0), (2, -1)):
        with pytest.raises(ValueError, match="regions="):
            RegionPool(regions)
    with pytest.raises(ValueError, match=r"shape \(3, 1\), need \(3, 2\)"):
        RegionPool()(random_map(), torch.zeros(3, 1))
