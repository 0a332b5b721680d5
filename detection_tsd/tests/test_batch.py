"""Joining items of different sizes."""

import pytest
import torch
from torch import Tensor

from detection_tsd.data.batch import collate, to
from detection_tsd.data.detection_data import Batch, Item, Target
from detection_tsd.data.transforms import DetectionTransform


def item(height: int, width: int, draw: int = 0, proposals: int | None = None) -> Item:
    image = torch.randint(1, 256, (3, height, width), dtype=torch.uint8)
    target = Target(torch.rand(2, 4), torch.tensor([1, 2]), torch.zeros(0, 4), torch.ones(2, 1, 1))
    box = None if proposals is None else torch.rand(proposals, 4)
    return Item(image, target, box, draw + 10, draw, (1.5, 2.0), (height // 2, width))


def test_smaller_images_are_padded_at_the_right_and_the_bottom() -> None:
    items = [item(30, 65), item(64, 20, draw=7)]
    batch = collate(items, divisor=32)
    assert batch.image_B3HW.shape == (2, 3, 64, 96)
    assert batch.size_B2.tolist() == [[30, 65], [64, 20]]
    for x_3HW, source in zip(batch.image_B3HW, items, strict=True):
        height, width = source.image.shape[1:]
        assert torch.equal(x_3HW[:, :height, :width], source.image)
        assert x_3HW.sum() == source.image.sum()
    assert batch.row_B.tolist() == [10, 17]
    assert batch.draw_B.tolist() == [0, 7]
    assert batch.scale_B2.tolist() == [[1.5, 2.0]] * 2
    assert batch.original_B2.tolist() == [[15, 65], [32, 20]]
    assert batch.proposals is None


@pytest.mark.parametrize(("side", "divisor", "padded"), [(64, 32, 64), (65, 32, 96), (5, 1, 5)])
def test_sides_are_multiples_of_the_divisor(side: int, divisor: int, padded: int) -> None:
    assert collate([item(side, side)], divisor).image_B3HW.shape == (1, 3, padded, padded)


def test_draws_beyond_32_bits_survive() -> None:
    batch = collate([item(8, 8, draw=2**61)])
    assert batch.draw_B.dtype == torch.int64
    assert batch.draw_B.item() == 2**61


def test_proposals() -> None:
    items = [item(8, 8, proposals=3), item(8, 8, proposals=0)]
    batch = collate(items)
    assert batch.proposals is not None
    assert [len(box) for box in batch.proposals] == [3, 0]
    with pytest.raises(ValueError, match="1 of 2 items have proposals"):
        collate([items[0], item(8, 8)])


@pytest.mark.parametrize(("count", "divisor"), [(0, 32), (1, 0)])
def test_nothing_to_join(count: int, divisor: int) -> None:
    with pytest.raises(ValueError, match=f"items={count} and divisor={divisor}"):
        collate([item(8, 8)] * count, divisor)


def leaves(batch: Batch) -> list[Tensor]:
    parts = [part for target in batch.targets for part in target]
    return [batch.image_B3HW, batch.size_B2, *parts, *(batch.proposals or [])]


def test_moving_to_a_device() -> None:
    batch = to(collate([item(8, 8, proposals=2)]), "meta")
    assert all(part.device.type == "meta" for part in leaves(batch))
    assert batch.draw_B.device.type == "cpu"
    assert to(collate([item(8, 8)]), "cpu", masks=False).targets[0].mask_GHW is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_gets_the_same_input() -> None:
    batch, transform = collate([item(30, 50), item(20, 60)]), DetectionTransform()
    moved = to(batch, "cuda")
    got = transform.normalize(moved.image_B3HW, moved.size_B2)
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got.cpu(), transform.normalize(batch.image_B3HW, batch.size_B2))
