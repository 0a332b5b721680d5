"""Frozen norms, folded or not, and batch norm over ranks."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from detection_tsd.models.norm import (
    CrossRankBatchNorm2d,
    FrozenBatchNorm2d,
    convolve,
    convolve_all,
    freeze_bn,
    set_norm,
    use_sync_bn,
)


def batch(count: int = 4, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 7, 6, generator=generator, dtype=torch.float64) * 3 + 1


def network(momentum: float | None = 0.1) -> nn.Sequential:
    """Two convolutions and norms whose statistics and affine are not the start values."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4, momentum=momentum),
        nn.ReLU(),
        nn.Conv2d(4, 5, 1, groups=1, bias=False),
        nn.BatchNorm2d(5, momentum=momentum),
    ).double()
    for norm in (net[1], net[4]):
        nn.init.uniform_(norm.weight, 0.5, 2.0)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.1, 4.0)
    return net


def test_frozen_statistics_never_move() -> None:
    model = network().eval()
    reference = model(batch())
    tensors = dict(model.state_dict(keep_vars=True))
    frozen = freeze_bn(model).train()
    assert all(frozen.state_dict(keep_vars=True)[name] is t for name, t in tensors.items())
    before = {name: value.clone() for name, value in frozen.named_buffers()}
    assert torch.equal(frozen(batch()), reference)
    frozen(batch() * 2).square().mean().backward()
    for name, value in frozen.named_buffers():
        assert torch.equal(value, before[name]), name
    norms = [module for module in frozen.modules() if isinstance(module, FrozenBatchNorm2d)]
    assert len(norms) == 2
    assert all(not norm.training and norm.weight.grad is not None for norm in norms)
    assert freeze_bn(frozen)[1] is norms[0]


def test_a_folded_norm_has_the_values_and_gradients_of_two_layers() -> None:
    plain, folded = network().eval(), freeze_bn(network()).train()
    x, y = batch().requires_grad_(), batch().requires_grad_()
    expected, got = plain(x), convolve_all(y, folded)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for out in (expected, got):
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    torch.testing.assert_close(y.grad, x.grad, rtol=1e-10, atol=1e-10)
    for (name, p), q in zip(plain.named_parameters(), folded.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-10, atol=1e-10, msg=name)


def test_gradcheck_of_the_fold() -> None:
    conv, norm = nn.Conv2d(2, 2, 2, bias=False).double(), FrozenBatchNorm2d(2).double()
    norm.running_var.fill_(0.3)
    norm.running_mean.fill_(-0.7)

    def run(x: Tensor, w: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        del conv.weight, norm.weight, norm.bias
        conv.weight, norm.weight, norm.bias = w, scale, shift
        return convolve(x, conv, norm)

    torch.manual_seed(0)
    shapes = ((2, 2, 3, 3), (2, 2, 2, 2), (2,), (2,))
    inputs = tuple(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    assert torch.autograd.gradcheck(run, inputs)


def test_live_norms_and_biased_convolutions_are_not_folded() -> None:
    conv, norm = nn.Conv2d(3, 4, 3, bias=False).double(), nn.BatchNorm2d(4).double()
    x = batch()
    expected = nn.BatchNorm2d(4).double()(conv(x))
    assert torch.equal(convolve(x, conv, norm), expected)
    assert int(norm.num_batches_tracked) == 1
    biased = nn.Conv2d(3, 4, 3).double()
    frozen = freeze_bn(norm)
    assert isinstance(frozen, FrozenBatchNorm2d)
    torch.testing.assert_close(convolve(x, biased, frozen), frozen(biased(x)))
    # Two convolutions in a row, and one at the end without a norm.
    layers = [conv, nn.Conv2d(4, 4, 1).double(), frozen, nn.Conv2d(4, 2, 1).double()]
    torch.testing.assert_close(convolve_all(x, layers), nn.Sequential(*layers)(x))


def test_a_frozen_norm_without_statistics_is_refused() -> None:
    with pytest.raises(ValueError, match="track_running_stats=False"):
        convolve(
            torch.zeros(1, 3, 4, 4),
            nn.Conv2d(3, 4, 1, bias=False),
            FrozenBatchNorm2d(4, track_running_stats=False),
        )


def test_bfloat16_folds_in_float32() -> None:
    conv, norm = nn.Conv2d(3, 4, 3, bias=False), FrozenBatchNorm2d(4)
    norm.running_var.fill_(1e-3)  # a large scale, whose rounding would be visible
    x = batch().float()
    with torch.autocast("cpu", torch.bfloat16):
        got = convolve(x, conv, norm)
    assert got.dtype == torch.bfloat16
    expected = norm(conv(x))
    assert (got - expected).abs().max() < 0.01 * expected.abs().max()


def test_set_norm() -> None:
    kinds = {"frozen": FrozenBatchNorm2d, "batch": nn.BatchNorm2d, "sync": CrossRankBatchNorm2d}
    for norm, kind in kinds.items():
        assert type(set_norm(network(), norm)[1]) is kind
    with pytest.raises(ValueError, match="norm='group': need one of"):
        set_norm(network(), "group")
    frozen = freeze_bn(network())
    assert type(use_sync_bn(frozen)[1]) is FrozenBatchNorm2d  # frozen for good
    synced, cuda = set_norm(network(), "sync"), torch.device("cuda", 0)
    weight = synced[1].weight
    assert type(use_sync_bn(synced, cuda)[1]) is nn.SyncBatchNorm
    assert synced[1].weight is weight
    assert type(use_sync_bn(synced, torch.device("cpu"))[1]) is CrossRankBatchNorm2d
    assert type(use_sync_bn(frozen, cuda)[1]) is FrozenBatchNorm2d


@pytest.mark.parametrize("momentum", [0.1, None])
def test_alone_the_cross_rank_norm_is_batch_norm(momentum: float | None) -> None:
    plain, synced = network(momentum), use_sync_bn(network(momentum))
    for _ in range(2):
        outputs = [model(batch()) for model in (plain, synced)]
        assert torch.equal(*outputs)
    for name, value in plain.state_dict().items():
        assert torch.equal(synced.state_dict()[name], value), name
    assert torch.equal(plain.eval()(batch()), synced.eval()(batch()))


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    model = use_sync_bn(network())
    own = batch(5)[:1] if rank == 0 else batch(5)[1:]  # uneven
    x = own.clone().requires_grad_()
    y = model(x)
    y.pow(3).sum().backward()
    for p in model.parameters():
        dist.all_reduce(p.grad)
    parts = {"y": y.detach(), "x": x.grad, "state": model.state_dict()}
    torch.save(parts | {"grads": [p.grad for p in model.parameters()]}, f"{folder}/{rank}.pt")
    one = use_sync_bn(nn.BatchNorm2d(3))
    small = torch.ones(1 - rank, 3, 1, 1)  # one value on one rank, none on the other
    try:
        one(small)
    except ValueError as error:
        Path(folder, f"{rank}.txt").write_text(str(error))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_uneven_ranks_equal_one_process(tmp_path: Path) -> None:
    mp.spawn(_rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    whole = network()
    x = batch(5).requires_grad_()
    y = whole(x)
    y.pow(3).sum().backward()
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(torch.cat([r["y"] for r in ranks]), y.detach(), **close)
    torch.testing.assert_close(torch.cat([r["x"] for r in ranks]), x.grad, **close)
    for rank in ranks:
        torch.testing.assert_close(rank["grads"], [p.grad for p in whole.parameters()], **close)
        torch.testing.assert_close(rank["state"], dict(whole.state_dict()), **close)
    assert "one value per channel" in (tmp_path / "0.txt").read_text()
    assert "one value per channel" in (tmp_path / "1.txt").read_text()
