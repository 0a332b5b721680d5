"""Cross-rank and frozen batch norm."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from reid_rqen.models.norm import CrossRankBatchNorm, FrozenBatchNorm, freeze_bn, use_sync_bn


def network(momentum: float | None = 0.1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4, momentum=momentum),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 5),
        nn.BatchNorm1d(5, momentum=momentum),
        nn.ReLU(),
        nn.Linear(5, 1),
    ).double()


def batch() -> Tensor:
    return torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1)).double() * 3 + 1


def loss_of(y_B1: Tensor) -> Tensor:
    return y_B1.square().mean()


@pytest.mark.parametrize("momentum", [0.1, 0.001, None])
def test_alone_it_is_batch_norm(momentum: float | None) -> None:
    plain, synced = network(momentum), use_sync_bn(network(momentum))
    assert list(synced.state_dict()) == list(plain.state_dict())
    for _ in range(2):
        outputs = [model(batch()) for model in (plain, synced)]
        assert torch.equal(*outputs)
        for output in outputs:
            loss_of(output).backward()
    for name, value in plain.state_dict().items():
        assert torch.equal(synced.state_dict()[name], value), name
    assert torch.equal(plain.eval()(batch()), synced.eval()(batch()))


def two_ranks(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for split in (4, 3):
        compare(rank, split)
    with pytest.raises(ValueError, match="need \\(B, C"):
        CrossRankBatchNorm(3)(torch.zeros(3))
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo can abort an interpreter that is torn down


def compare(rank: int, split: int) -> None:
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


def test_two_processes_equal_the_full_batch(tmp_path: Path) -> None:
    mp.spawn(two_ranks, args=(str(tmp_path),), nprocs=2)


def test_frozen_statistics_never_move() -> None:
    model = network()
    model(batch())
    expected = {name: value.clone() for name, value in model.named_buffers()}
    reference = model.eval()(batch())
    frozen = freeze_bn(model).train()
    assert torch.equal(frozen(batch()), reference)
    loss_of(frozen(batch() * 2)).backward()
    for name, value in frozen.named_buffers():
        assert torch.equal(value, expected[name]), name
    norms = [module for module in frozen.modules() if isinstance(module, FrozenBatchNorm)]
    assert len(norms) == 2
    assert all(module.weight.grad is not None for module in norms)
    assert freeze_bn(frozen)[1] is norms[0]


def test_frozen_scale_and_shift_are_optional() -> None:
    model = network()
    parameters = dict(model.named_parameters())
    freeze_bn(model, affine=False)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["1.weight", "1.bias", "5.weight", "5.bias"]
    assert all(parameters[name] is p for name, p in model.named_parameters())


def test_models_for_cuda_get_torch_sync_bn() -> None:
    model = use_sync_bn(network(), torch.device("cuda", 0))
    assert isinstance(model[1], nn.SyncBatchNorm)
    assert isinstance(use_sync_bn(nn.BatchNorm2d(3)), CrossRankBatchNorm)
