"""ResNet backbones are torchvision's; sizes, freezing, starting weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.models.resnet import Bottleneck, ResNet

from common.log import InputError
from detection_tsd.models.norm import CrossRankBatchNorm2d, FrozenBatchNorm2d
from detection_tsd.models.pretrained import read_state
from detection_tsd.models.resnet import ResNetFPN, ResNetTrunk

R101 = (3, 4, 23, 3)
NETS = {
    "resnet50": {},
    "resnet101": {"layers": R101},
    "resnet152": {"layers": (3, 8, 36, 3)},
    "resnext101_64x4d": {"layers": R101, "groups": 64, "width": 4},
}
RPN = 593_935  # 3x3 convolution of 256, three anchors
EXTRACTOR = 12_544 * 1024 + 1024 + 1024 * 1024 + 1024
OUTPUTS = 1024 * 81 + 81 + 1024 * 324 + 324  # class and box layers of 80 classes
SMALL: dict[str, Any] = {"layers": (1, 1, 1, 1)}


def images(height: int = 64, width: int = 96) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


def stir(net: nn.Module) -> nn.Module:
    """Statistics and affine that are not the start values."""
    torch.manual_seed(1)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.2)
            norm.running_var.uniform_(0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0, 0.2)
    return net


def on_meta(**options: Any) -> ResNetFPN:
    with torch.device("meta"):
        return ResNetFPN(**options)


def size(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def stage_maps(net: ResNet, x: Tensor) -> Iterator[Tensor]:
    x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        x = stage(x)
        yield x


@pytest.mark.parametrize("name", NETS)
def test_keys_and_shapes_are_torchvisions(name: str) -> None:
    ours = on_meta(**NETS[name]).body
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)()
    expected = {k: v.shape for k, v in theirs.state_dict().items() if k[:3] != "fc."}
    assert {k: v.shape for k, v in ours.state_dict().items()} == expected


@pytest.mark.parametrize("options", [{}, {"groups": 64, "width": 4}], ids=["plain", "grouped"])
@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_values_are_torchvisions(options: dict[str, int], norm: str) -> None:
    groups, width = options.get("groups", 1), options.get("width", 64)
    theirs = stir(ResNet(Bottleneck, [2, 1, 2, 1], groups=groups, width_per_group=width)).eval()
    ours = ResNetTrunk((2, 1, 2, 1), **options, norm=norm).eval()
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if k[:3] != "fc."})
    with torch.no_grad():
        for got, expected in zip(ours(images()), stage_maps(theirs, images()), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_gradients_are_torchvisions() -> None:
    theirs = stir(ResNet(Bottleneck, [1, 1, 1, 1])).double().eval()
    ours = ResNetTrunk((1, 1, 1, 1)).double().train()
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if k[:3] != "fc."})
    x = images(32, 32).double()
    for maps in (ours(x), stage_maps(theirs, x)):
        sum(m.sin().sum() for m in maps).backward()
    expected = {k: p.grad for k, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        if name.startswith(("conv1", "bn1", "layer1")):
            assert p.grad is None
        else:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-8, atol=1e-8, msg=name)


def test_keys_with_the_pyramid_are_those_of_torchvisions_detector() -> None:
    with torch.device("meta"):
        theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).backbone
    expected = {k: v.shape for k, v in theirs.state_dict().items()}
    assert {k: v.shape for k, v in on_meta().state_dict().items()} == expected


def test_check_05_parameter_totals_of_plain_backbones() -> None:
    rest = RPN + EXTRACTOR + OUTPUTS
    assert size(on_meta()) + rest == 41_757_156
    assert size(on_meta()) + rest + EXTRACTOR == 55_652_836  # two extractors
    totals = {"resnet101": 60.75, "resnet152": 76.39, "resnext101_64x4d": 99.66}
    for name, millions in totals.items():
        assert (size(on_meta(**NETS[name])) + rest) / 1e6 == pytest.approx(millions, abs=0.005)
    grouped = on_meta(**NETS["resnext101_64x4d"]).body
    assert size(grouped) / 1e6 == pytest.approx(81.41, abs=0.005)


def test_pyramid() -> None:
    net = ResNetFPN(**SMALL, channels=16)
    assert net.strides == (4, 8, 16, 32, 64)
    assert (net.channels, net.roi_levels) == (16, 4)
    found = net(images(64, 96))
    assert [tuple(m.shape[1:]) for m in found.cls] == [
        (16, 16, 24), (16, 8, 12), (16, 4, 6), (16, 2, 3), (16, 1, 2),
    ]  # fmt: skip
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in found.cls[:4])
    # Sizes that are no multiple of the last stride.
    assert [tuple(m.shape[2:]) for m in net(images(50, 75)).cls] == [
        (13, 19), (7, 10), (4, 5), (2, 3), (1, 2),
    ]  # fmt: skip


def test_frozen_parts_stay_in_training() -> None:
    net = ResNetFPN(**SMALL).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(isinstance(m, FrozenBatchNorm2d) and not m.training for m in norms)
    sum(m.square().mean() for m in net(images()).cls).backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    for name, value in net.state_dict().items():
        frozen = name.startswith(("body.conv1", "body.bn1", "body.layer1"))
        fixed = frozen or "running_" in name or "num_batches" in name
        assert torch.equal(value, before[name]) == fixed, name
    counted = sum(p.numel() for p in net.parameters() if not p.requires_grad)
    assert counted == 9408 + 128 + sum(p.numel() for p in net.body.layer1.parameters())


def test_a_live_norm_is_live_after_the_frozen_stages_only() -> None:
    for norm, kind in (("batch", nn.BatchNorm2d), ("sync", CrossRankBatchNorm2d)):
        body = ResNetTrunk(**SMALL, norm=norm)
        assert type(body.bn1) is type(body.layer1[0].bn3) is FrozenBatchNorm2d
        assert type(body.layer2[0].downsample[1]) is type(body.layer4[0].bn1) is kind
    scratch = ResNetTrunk(**SMALL, frozen_stages=-1, norm="batch")
    assert not any(isinstance(m, FrozenBatchNorm2d) for m in scratch.modules())
    assert all(p.requires_grad for p in scratch.parameters())


def test_blocks_computed_again_give_the_same_gradients() -> None:
    grads = []
    for again in (False, True):
        torch.manual_seed(0)
        net = ResNetTrunk(**SMALL, dcn="v1", checkpoint_blocks=again)
        net(images(32, 32))[-1].square().mean().backward()
        grads.append([p.grad for p in net.parameters() if p.requires_grad])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_of_a_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    state = stir(ResNet(Bottleneck, [1, 1, 1, 1])).state_dict()
    if suffix == ".pth":  # as training scripts save it, from before batch norms counted
        old = {f"module.{k}": v for k, v in state.items() if "num_batches" not in k}
        torch.save({"state_dict": old}, path)
    else:
        save_file(state, path)
    body = ResNetFPN(**SMALL, dcn="v1", weights=str(path)).body
    for name, value in body.state_dict().items():
        if "conv_offset" in name:
            assert not value.any()
        else:
            assert torch.equal(value, state[name]), name


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent.pth: no such weights file"):
        ResNetFPN(**SMALL, weights="absent.pth")
    for name in ("w.safetensors", "w.pth"):
        path = tmp_path / name
        path.write_bytes(b"not weights at all")
        with pytest.raises(InputError, match=rf"{name}: is not a"):
            ResNetFPN(**SMALL, weights=str(path))
    path = tmp_path / "w.pth"
    torch.save([1, 2], path)
    with pytest.raises(InputError, match=r"w.pth: holds no dictionary of tensors: list"):
        read_state(str(path))
    state = {k: v for k, v in ResNetTrunk(**SMALL).state_dict().items()}
    bad = {
        "lacks 1 weights of this backbone: layer3.0.bn2.bias": _without(state, "layer3.0.bn2.bias"),
        "backbone lacks: layer9.weight": state | {"layer9.weight": torch.zeros(1)},
        r"do not fit this backbone, conv1.weight: \(2, 2\), need \(64, 3, 7, 7\)": state
        | {"conv1.weight": torch.zeros(2, 2)},
    }
    for message, content in bad.items():
        torch.save(content, path)
        with pytest.raises(InputError, match=message):
            ResNetFPN(**SMALL, weights=str(path))


def _without(state: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if k != key}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (1, 1, 1)}, r"layers=\[1, 1, 1\]"),
        ({"layers": (1, 0, 1, 1)}, r"layers=\[1, 0, 1, 1\]"),
        ({"dcn": "v3"}, "version='v3'"),
        ({"norm": "group"}, "norm='group'"),
        ({"frozen_stages": 5}, "frozen_stages=5: there are 4 stages"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        on_meta(**{**SMALL, **options})
