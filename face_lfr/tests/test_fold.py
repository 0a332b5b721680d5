"""Folded and merged networks against their originals, with norms that do something."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from face_lfr.models.fold import folded, merged
from face_lfr.models.iresnet import IResNet
from face_lfr.models.mobilefacenet import MobileFaceNet
from face_lfr.models.norm import use_sync_bn
from face_lfr.models.poly_blocks import ParallelConvs
from face_lfr.models.polyface import EfficientPolyFace
from face_lfr.models.polynet import PolyNet
from face_lfr.models.quality_net import QualityNet

NETS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "polyface": (EfficientPolyFace, {"blocks": (3, 4, 3), "input_size": 107, "width": 0.25}),
    "separate": (
        EfficientPolyFace,
        {"blocks": (3, 4, 3), "input_size": 75, "width": 0.25, "merge": False},
    ),
    "polynet": (PolyNet, {"modules": (2, 1, 1), "input_size": 75, "width": 0.25}),
    "iresnet": (IResNet, {"layers": (1, 2, 1, 1), "widths": (8, 16, 24, 32), "input_size": 32}),
    "mobilefacenet": (
        MobileFaceNet,
        {"blocks": (1, 1, 2, 1), "scale": 1, "input_size": 48, "head_bias": True},
    ),
    "quality": (QualityNet, {"input_size": 48}),
}
LEFT = {  # norms that stay, see the module's docstring
    "polyface": ["last_norm"],
    "separate": ["last_norm"],
    "iresnet": [f"layer{place}.bn1" for place in ("1.0", "2.0", "2.1", "3.0", "4.0")],
    "mobilefacenet": [],
    "quality": [f"stages.{stage}.{block}.bn1" for stage in range(4) for block in range(2)],
}  # fmt: skip


def make(name: str) -> nn.Module:
    """A network in evaluation mode whose norms have statistics, scales and shifts of a training."""
    kind, options = NETS[name]
    torch.manual_seed(0)
    net = kind(**options)
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.3)
    return net.eval()


def images(net: nn.Module) -> Tensor:
    size = net.input_size
    assert isinstance(size, int)
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(2))


def error(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_check_06_folding_changes_only_the_rounding(name: str) -> None:
    net = make(name)
    x, state = images(net), {key: value.clone() for key, value in net.state_dict().items()}
    short = folded(net)
    assert error(short(x), net(x)) < 1e-4
    if hasattr(net, "embed"):
        assert error(short.embed(x), net.embed(x)) < 1e-4
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert not short.training
    assert not any(parameter.requires_grad for parameter in short.parameters())
    precise = net.double()
    assert error(folded(precise)(x.double()), precise(x.double())) < 1e-12


@pytest.mark.parametrize("name", LEFT)
def test_check_06_norms_that_stay(name: str) -> None:
    left = [key for key, m in folded(make(name)).named_modules() if isinstance(m, _BatchNorm)]
    assert left == LEFT[name]


@torch.no_grad()
def test_check_06_merging_parallel_convolutions() -> None:
    net = make("separate")
    x, whole = images(net), merged(net)
    assert error(whole(x), net(x)) < 1e-4
    assert error(whole.embed(x), net.embed(x)) < 1e-4
    counts = {len(module.convs) for module in whole.modules() if isinstance(module, ParallelConvs)}
    assert counts == {1}
    # The merged network is the one that is built with `merge`, names and shapes included.
    twin = EfficientPolyFace(**(NETS["separate"][1] | {"merge": True})).eval()
    twin.load_state_dict(whole.state_dict())
    assert torch.equal(twin(x), whole(x))
    assert len(net.stage_a[0].branches.entry.convs) == 3


def test_merged_networks_train_alike() -> None:
    net = EfficientPolyFace((1, 1, 1), 8, 75, 0.125, dropout=0.0, drop="none", merge=False)
    whole = merged(net).train()
    x = torch.randn(4, 3, 75, 75)
    net, whole, x = net.double(), whole.double(), x.double()
    for one in (net, whole):
        one(x).square().sum().backward()
    entry = net.stage_b[0].branches.entry.convs
    parts = torch.cat([conv.conv.weight.grad for conv in entry])
    joined = whole.stage_b[0].branches.entry.convs[0].conv.weight.grad
    torch.testing.assert_close(joined, parts, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(
        whole.state_dict()["last_norm.running_var"], net.last_norm.running_var
    )


@torch.no_grad()
def test_cross_rank_norms_fold_too() -> None:
    net = use_sync_bn(make("iresnet"))
    assert error(folded(net)(images(net)), net(images(net))) < 1e-4


def test_a_norm_without_statistics_is_refused() -> None:
    net = IResNet((1, 1, 1, 1), (4, 4, 4, 4), 8, 32)
    net.bn1 = nn.BatchNorm2d(4, track_running_stats=False)
    with pytest.raises(ValueError, match="without running statistics"):
        folded(net)
