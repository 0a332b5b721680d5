"""SENet-154 is timm's; a golden answer of timm stands in where timm is not installed."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from detection_tsd.models.dcn import DeformConv2d
from detection_tsd.models.norm import FrozenBatchNorm2d
from detection_tsd.models.senet import SENet154FPN, SENetTrunk
from detection_tsd.tests.senet_golden import GOLDEN, fill, picture, summary, timm_maps, timm_net

SMALL = {"layers": (1, 1, 1, 1)}


def whole_net() -> SENetTrunk:
    with torch.device("meta"):
        net = SENetTrunk()
    return fill(net.to_empty(device="cpu").to(memory_format=torch.channels_last)).eval()


def test_values_are_those_timm_gave() -> None:
    with torch.no_grad():
        found = summary(whole_net()(picture().float()))
    expected = json.loads(GOLDEN.read_text())
    for got, want in zip(found, expected, strict=True):
        assert got["shape"] == want["shape"]
        assert got["moments"] == pytest.approx(want["moments"], rel=1e-4)
        assert got["values"] == pytest.approx(
            want["values"], rel=1e-4, abs=1e-4 * want["moments"][1]
        )


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_values_and_keys_are_timms() -> None:
    ours, theirs = whole_net(), timm_net()
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("last_linear.")}
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in state.items()
    }
    for size in (64, 75):  # 75: maps of odd size before the pooling and the stages
        x = picture(size).float()
        with torch.no_grad():
            for got, expected in zip(ours(x), timm_maps(theirs, x), strict=True):
                bound = 1e-4 * expected.std().item()
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=bound)


def test_size_is_that_of_the_published_network() -> None:
    with torch.device("meta"):
        net = SENet154FPN()
    trunk = sum(p.numel() for p in net.body.parameters())
    assert trunk + 2048 * 1000 + 1000 == 115_088_984  # timm's, with the classifier
    assert sum(p.numel() for p in net.fpn.parameters()) == 3_344_384


def test_pyramid_and_freezing() -> None:
    net = SENet154FPN(**SMALL, channels=8).train()
    assert net.strides == (4, 8, 16, 32, 64)
    found = net(torch.randn(1, 3, 64, 96))
    assert [tuple(m.shape[2:]) for m in found.cls] == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    sum(m.square().mean() for m in found.cls).backward()
    frozen = {n.split(".")[1] for n, p in net.named_parameters() if p.grad is None}
    assert frozen == {"layer0", "layer1"}
    assert all(isinstance(m, FrozenBatchNorm2d) for n, m in net.named_modules() if "bn" in n[-4:])


def test_folded_norms_equal_live_ones_in_evaluation() -> None:
    nets = [
        fill(SENetTrunk(**SMALL, norm=norm, frozen_stages=-1)).eval()
        for norm in ("frozen", "batch")
    ]
    with torch.no_grad():
        for a, b in zip(*(net(picture().float()) for net in nets), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_deformable_convolutions_start_as_the_plain_ones(tmp_path: Path) -> None:
    save_file({k: v.contiguous() for k, v in fill(SENetTrunk(**SMALL)).state_dict().items()},
              tmp_path / "w.safetensors")  # fmt: skip
    nets = [
        SENetTrunk(**SMALL, dcn=dcn, weights=str(tmp_path / "w.safetensors"))
        for dcn in (False, True)
    ]
    deformed = [n for n, m in nets[1].named_modules() if isinstance(m, DeformConv2d)]
    assert deformed == ["layer2.0.conv2", "layer3.0.conv2", "layer4.0.conv2"]
    with torch.no_grad():
        for a, b in zip(*(net(picture().float()) for net in nets), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * a.std().item())


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"layers=\[3, 8\]"):
        SENet154FPN((3, 8))
