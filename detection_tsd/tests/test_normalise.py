"""Counts over two ranks: their gradients are those of one process with the whole batch."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from detection_tsd.matching import Sampled
from detection_tsd.models.normalise import divisor, over_ranks
from detection_tsd.ops.pyramid import Pyramid
from detection_tsd.tests.small_heads import pyramid, sample, total, tsd


def test_one_process() -> None:
    assert over_ranks(3).item() == 3
    count = torch.tensor([2.0, 0.5], requires_grad=True)
    mean = over_ranks(count)
    assert mean.tolist() == [2.0, 0.5]
    assert not mean.requires_grad
    assert over_ranks(torch.tensor([7])).dtype == torch.float32
    assert over_ranks(torch.ones(1, dtype=torch.float64)).dtype == torch.float64
    assert divisor(torch.tensor([0.0, 1.0, 5.0])).tolist() == [1, 1, 5]


def gradients(model: Any, maps: Pyramid, sampled: Sampled) -> tuple[Tensor, list[Tensor]]:
    """Total loss, and its gradients to the parameters."""
    parts, _ = model.losses(maps, maps, sampled)
    loss = total(parts)
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


def share(maps: Pyramid, sampled: Sampled, image: int) -> tuple[Pyramid, Sampled]:
    """What the rank with one of the images sees."""
    own = sampled.roi_R5[:, 0] == image
    part = Sampled(*[field[own] for field in sampled])
    roi_R5 = part.roi_R5.clone()
    roi_R5[:, 0] = 0
    one = Pyramid([x[image : image + 1] for x in maps.maps], maps.strides, maps.base)
    return one, part._replace(roi_R5=roi_R5)


def cases() -> dict[str, Sampled]:
    """The second rank has other numbers of rows, and no positives unless they are put there."""
    both = sample(positives=4, count=10, padding=3)
    both.label_R[6] = 2
    one = sample(positives=1, count=9)
    return {"both": both, "one rank without": sample(), "one in all": one, "none": sample(0)}


def two_ranks(rank: int, folder: str) -> None:
    maps, model = pyramid(), tsd()
    alone = {name: gradients(model, maps, sampled) for name, sampled in cases().items()}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    assert over_ranks(torch.tensor([rank, 3])).tolist() == [0.5, 3.0]
    assert divisor(float(rank == 1)).item() == 0.5
    assert divisor(0.0).item() == 0.5
    for name, sampled in cases().items():
        loss, slopes = gradients(model, *share(maps, sampled, rank))
        expected_loss, expected = alone[name]
        for value, wanted in zip([loss, *slopes], [expected_loss, *expected], strict=True):
            dist.all_reduce(value)  # as DDP does, and divides
            torch.testing.assert_close(value / 2, wanted, rtol=1e-9, atol=1e-12, msg=name)
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo can abort an interpreter that is torn down


@pytest.mark.slow
def test_two_ranks_are_one_process(tmp_path: Path) -> None:
    mp.spawn(two_ranks, (str(tmp_path),), nprocs=2)
