"""Cross-rank and frozen batch norm."""

import pytest
import torch
from torch import Tensor, nn

from face_lfr.models.norm import CrossRankBatchNorm, FrozenBatchNorm, freeze_bn, use_sync_bn


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
