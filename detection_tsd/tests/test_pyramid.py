"""The pixel table of a pyramid: order, gradients, types, and what it refuses."""

import pytest
import torch

from detection_tsd.ops.pyramid import Pyramid

SIZES = ((4, 6), (2, 3))


def maps(dtype: torch.dtype = torch.float32, last: bool = True) -> list[torch.Tensor]:
    layout = torch.channels_last if last else torch.contiguous_format
    drawn = [torch.randn(2, 5, *hw).to(dtype) for hw in SIZES]
    return [one.contiguous(memory_format=layout) for one in drawn]


@pytest.mark.parametrize("last", [False, True])
def test_a_pixel_is_where_the_table_says(last: bool) -> None:
    built = maps(last=last)
    pyramid = Pyramid(built, (4, 8))
    assert (pyramid.batch, pyramid.channels, pyramid.sizes) == (2, 5, SIZES)
    assert pyramid.flat.shape == (2 * (24 + 6), 5)
    for level, (height, width, start, stride) in enumerate(pyramid.table.tolist()):
        assert (height, width) == SIZES[level]
        assert (start, stride) == (pyramid.starts[level], (4, 8)[level])
        for b in range(2):
            for y in range(height):
                for x in range(width):
                    row = (b * height + y) * width + x
                    assert torch.equal(pyramid.rows[level][row], built[level][b, :, y, x])
                    assert torch.equal(pyramid.flat[start + row], built[level][b, :, y, x])


def test_channels_last_maps_are_not_copied() -> None:
    built = maps()
    pyramid = Pyramid(built, (4, 8))
    pairs = zip(pyramid.rows, built, strict=True)
    assert all(row.data_ptr() == one.data_ptr() for row, one in pairs)
    assert all(row.is_contiguous() for row in Pyramid(maps(last=False), (4, 8)).rows)
    sliced = torch.cat([built[0], built[0]], dim=1)[:, 2:7]
    assert Pyramid([sliced], (4,)).rows[0].is_contiguous()


def test_it_is_built_once_and_gradients_meet() -> None:
    built = [one.requires_grad_() for one in maps(last=False)]
    pyramid = Pyramid(built, (4, 8))
    assert pyramid.rows is pyramid.rows
    assert pyramid.flat is pyramid.flat
    (2 * pyramid.flat.sum() + 3 * pyramid.rows[0].sum()).backward()
    for one, wanted in zip(built, (5.0, 2.0), strict=True):
        assert one.grad is not None
        assert (one.grad == wanted).all()


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_half_types_are_widened(dtype: torch.dtype, wide: torch.dtype) -> None:
    built = [one.requires_grad_() for one in maps(dtype)]
    pyramid = Pyramid(built, (4, 8))
    assert pyramid.flat.dtype == wide
    pyramid.flat.sum().backward()
    assert built[0].grad is not None
    assert built[0].grad.dtype == dtype


def test_bad_maps_are_refused() -> None:
    one, two = maps()
    with pytest.raises(ValueError, match="0 maps and strides"):
        Pyramid([], ())
    with pytest.raises(ValueError, match=r"2 maps and strides \(4,\): need one stride"):
        Pyramid([one, two], (4,))
    with pytest.raises(ValueError, match=r"strides=\(4, 0\)"):
        Pyramid([one, two], (4, 0))
    with pytest.raises(ValueError, match=r"base=0\.0"):
        Pyramid([one], (4,), 0.0)
    for bad in (one[0], one.long(), one[:, :, :0]):
        with pytest.raises(ValueError, match=r"need float \(B, C, H, W\)"):
            Pyramid([bad], (4,))
    for bad in (two[:1], two[:, :3]):
        with pytest.raises(ValueError, match="need the batch, the channels and the device"):
            Pyramid([one, bad], (4, 8))
