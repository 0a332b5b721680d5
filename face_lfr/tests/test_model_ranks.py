"""Two ranks: batch norm over both, and stochastic depth in step."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from face_lfr.models.norm import CrossRankBatchNorm, use_sync_bn
from face_lfr.models.polyface import EfficientPolyFace
from face_lfr.tests.test_norm import batch, loss_of, network


def two_ranks(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for split in (4, 3):
        compare_norms(rank, split)
    with pytest.raises(ValueError, match="need \\(B, C"):
        CrossRankBatchNorm(3)(torch.zeros(3))
    stay_in_step(rank)
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo can abort an interpreter that is torn down


def compare_norms(rank: int, split: int) -> None:
    """Two training steps of both; the ranks have `split` and 8 - `split` rows."""
    whole, parts = network(), use_sync_bn(network())
    wrapped = DistributedDataParallel(parts)
    rows = slice(0, split) if rank == 0 else slice(split, 8)
    for _ in range(2):
        expected = whole(batch())
        got = wrapped(batch()[rows])
        torch.testing.assert_close(got, expected[rows], rtol=0, atol=1e-10)
        whole.zero_grad()
        wrapped.zero_grad()
        loss_of(expected).backward()
        # DDP divides by the ranks; each rank adds its part of the mean over all rows.
        (got.square().sum() / 8 * 2).backward()
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert (a.grad - b.grad).abs().max() <= 1e-6, name
        assert a.grad.abs().max() > 1e-4 or name == "4.bias", name  # a norm follows this bias
    for name, value in whole.named_buffers():
        torch.testing.assert_close(dict(parts.named_buffers())[name], value, msg=name)


def stay_in_step(rank: int) -> None:
    """Steps of PolyFace with dropped and recomputed blocks leave the same network on both."""
    torch.manual_seed(0)
    sizes = {"blocks": (2, 3, 2), "features": 8, "input_size": 75, "width": 0.125}
    net = use_sync_bn(EfficientPolyFace(**sizes, keep=0.6, checkpoints=(1, 1, 1)))
    wrapped = DistributedDataParallel(net, find_unused_parameters=net.skips_parameters)
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    torch.manual_seed(rank)  # ranks differ in their global generators
    x = torch.randn(4, 3, 75, 75)
    for _ in range(4):
        optimizer.zero_grad()
        wrapped(x).square().mean().backward()
        optimizer.step()
    for name, value in net.state_dict().items():
        first = value.clone()
        dist.broadcast(first, 0)
        torch.testing.assert_close(value, first, rtol=0, atol=0, msg=name)
    assert int(net.depth.forwards) == 4


@pytest.mark.slow
def test_check_05_two_ranks_stay_in_step_and_share_statistics(tmp_path: Path) -> None:
    mp.spawn(two_ranks, args=(str(tmp_path),), nprocs=2)
