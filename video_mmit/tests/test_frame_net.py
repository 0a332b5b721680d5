"""Folding, classifier, consensus and frozen norms of the frame recogniser; its configurations."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import BasicBlock

from video_mmit.models.frame_net import FrameNet
from video_mmit.models.insert import TemporalConv
from video_mmit.models.non_local import NonLocalFrames, add_non_local
from video_mmit.models.norm import CrossRankBatchNorm, use_sync_bn
from video_mmit.models.resnet import ResNet
from video_mmit.models.tin import add_tin
from video_mmit.models.tiny import TinyNet
from video_mmit.models.trn import TRN
from video_mmit.models.tsm import add_tsm

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

T, K = 4, 5
OPTIONS: dict[str, dict[str, Any]] = {
    "tsn": {},
    "tsm": {"tsm": add_tsm},
    "tsm pool": {"tsm": partial(add_tsm, temporal_pool=True)},
    "tin": {"tin": add_tin},
    "trn": {"trn": partial(TRN, bottleneck=8)},
    "tsn non-local": {"non_local": partial(add_non_local, blocks={"layer2": [0]})},
    "tsm pool non-local": {
        "tsm": partial(add_tsm, temporal_pool=True),
        "non_local": partial(add_non_local, blocks={"layer1": [0], "layer2": [0]}),
    },
}


def clip(videos: int = 2, frames: int = T, channels: int = 3, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(videos, frames, channels, size, size, generator=generator)


def model(name: str = "tsn", **options: Any) -> FrameNet:
    """A small recogniser whose temporal modules have an effect, in evaluation mode."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"num_segments": T, "head_std": 0.5} | OPTIONS[name] | options
    net = FrameNet(TinyNet((16, 32)), K, **settings)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):  # also those of non-local blocks, which start at 0
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.running_mean.uniform_(-0.2, 0.2)
    if net.trn is not None:  # its first weights are too small to show a difference
        net.trn.reduce.weight.data.mul_(500)
    return net.eval()


def test_forward_is_a_loop_over_frames() -> None:
    net, x = model(), clip()
    rows = []
    with torch.no_grad():
        for video in x:
            each = [net.head(net.backbone(frame[None]))[0] for frame in video]
            rows.append(sum(each) / len(each))
        torch.testing.assert_close(net(x), torch.stack(rows))
        assert net.features(x).shape == (2, T, 32)


def test_dropout_works_on_frame_features_and_once() -> None:
    net, x = model(dropout=0.5), clip()
    assert [type(m) for m in net.modules()].count(nn.Dropout) == 1
    seen: list[Tensor] = []
    net.head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    net.train()
    net(x)
    assert seen[0].shape == (2, T, 32)
    share = (seen[0] == 0).float().mean(dim=(0, 2))
    assert 0.3 < float(share.mean()) < 0.7
    assert not torch.equal(seen[0][0, 0] == 0, seen[0][0, 1] == 0)  # another draw per frame
    net.eval()
    with torch.no_grad():
        assert torch.equal(net(x), net(x))


def test_the_classifier_starts_small() -> None:
    torch.manual_seed(0)
    net = FrameNet(TinyNet((8, 256)), 313)
    assert float(net.head.weight.detach().std()) == pytest.approx(0.001, rel=0.02)
    assert abs(float(net.head.weight.detach().mean())) < 2e-5
    assert not net.head.bias.any()
    assert float(FrameNet(TinyNet((8, 256)), 313, head_std=0.01).head.weight.detach().std()) > 0.009


@pytest.mark.parametrize("affine", [False, True])
def test_partial_bn_leaves_the_first_norm(affine: bool) -> None:
    net = model("tsn non-local", partial_bn=True, partial_bn_affine=affine)
    for _ in range(2):
        net.train()
        state = {n: m for n, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
        training = {name for name, norm in state.items() if norm.training}
        # A non-local block starts with scale 0: frozen it would stay the identity for ever.
        assert training == {"backbone.bn1", "backbone.layer2.0.non_local.norm"}
        frozen = state["backbone.layer1.0.bn1"]
        assert frozen.weight.requires_grad is frozen.bias.requires_grad is (not affine)
        assert net.backbone.bn1.weight.requires_grad
        net.eval()
        assert not any(norm.training for norm in state.values())
    before = frozen.running_mean.clone()
    net.train()(clip())
    assert torch.equal(frozen.running_mean, before)


def test_partial_bn_holds_for_norms_over_ranks() -> None:
    net = use_sync_bn(model(partial_bn=True), torch.device("cpu")).train()
    norms = [module for module in net.modules() if isinstance(module, CrossRankBatchNorm)]
    assert [norm.training for norm in norms] == [True] + [False] * (len(norms) - 1)


@pytest.mark.parametrize("name", OPTIONS)
def test_check_06_order_of_frames(name: str) -> None:
    net, x = model(name), clip()
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        out, other = net(x), net(x[:, order])
    if name.startswith("tsn"):
        torch.testing.assert_close(out, other, rtol=0, atol=1e-5)
    else:
        assert float((out - other).abs().max()) > 1e-3


@pytest.mark.parametrize("name", OPTIONS)
def test_videos_do_not_mix(name: str) -> None:
    net, x = model(name), clip(videos=3)
    with torch.no_grad():
        out = net(x)
        order = torch.tensor([2, 0, 1])
        torch.testing.assert_close(net(x[order]), out[order])
        changed = x.clone()
        changed[1] = x[1].flip(0) * 2
        new = net(changed)
    torch.testing.assert_close(new[[0, 2]], out[[0, 2]])
    assert float((new[1] - out[1]).abs().max()) > 1e-3


@pytest.mark.parametrize("name", OPTIONS)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    net = model(name).train()
    net(clip()).square().sum().backward()
    missing = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    # A constant added to every query of a softmax changes nothing.
    assert [n for n in missing if not n.endswith("phi.bias")] == []


@pytest.mark.parametrize("name", ["tsn", "tsm", "tsn non-local"])
def test_models_without_weights_for_one_length_take_any(name: str) -> None:
    net, x = model(name), clip(frames=2 * T)
    with torch.no_grad():
        short = net(clip())
        out = net(x)
        torch.testing.assert_close(out, model(name, num_segments=2 * T)(x))
        torch.testing.assert_close(net(clip()), short)  # and back again


def test_a_temporal_pool_halves_the_frames() -> None:
    net = model("tsm pool")
    assert net.features(clip()).shape == (2, T // 2, 32)
    with torch.no_grad():
        expected = net.head(net.features(clip())).mean(dim=1)
        torch.testing.assert_close(net(clip()), expected)
    assert net.features(clip(frames=2 * T)).shape == (2, T, 32)


def test_tsn_needs_no_length() -> None:
    net = model(num_segments=None)
    assert net.num_segments is None
    for frames in (1, 3):
        assert net(clip(frames=frames)).shape == (2, K)


@pytest.mark.parametrize("name", ["tin", "trn"])
def test_check_13_a_clip_of_another_length_is_refused(name: str) -> None:
    net = model(name)
    for frames in (T - 1, 2 * T):
        with pytest.raises(ValueError, match=rf"has T={frames}, .*num_segments={T}"):
            net(clip(frames=frames))
    with pytest.raises(ValueError, match=rf"num_segments=7: .* {T} only"):
        net.set_num_segments(7)
    with pytest.raises(ValueError, match="num_segments=None: only TSN"):
        model(name, num_segments=None)


def test_check_13_clips_of_another_shape_are_refused() -> None:
    net = model()
    with pytest.raises(ValueError, match=r"4 dimensions \(8, 3, 32, 32\), need 5"):
        net(clip().flatten(0, 1))
    with pytest.raises(ValueError, match=r"\(2, 4, 10, 32, 32\) has C=10, need C=3"):
        net(clip(channels=10))
    with pytest.raises(ValueError, match="has no frame"):
        net(clip(frames=0))


def test_check_13_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="num_classes=0"):
        FrameNet(TinyNet(), 0)
    with pytest.raises(ValueError, match="num_segments=0"):
        FrameNet(TinyNet(), 3, num_segments=0)
    with pytest.raises(ValueError, match="tsm and tin are both given"):
        FrameNet(TinyNet(), 3, tsm=add_tsm, tin=add_tin)
    with pytest.raises(ValueError, match="num_segments=None"):
        FrameNet(TinyNet(), 3, num_segments=None, tsm=add_tsm)


@pytest.mark.parametrize("name", OPTIONS)
def test_memory_format_changes_nothing(name: str) -> None:
    net, x = model(name), clip()
    seen: list[bool] = []

    def watch(_: nn.Module, __: object, out: Tensor) -> None:
        seen.append(out.is_contiguous(memory_format=torch.channels_last))

    with torch.no_grad():
        expected = net(x)
        net = net.to(memory_format=torch.channels_last)
        for module in net.backbone.modules():
            if isinstance(module, (BasicBlock, TemporalConv, NonLocalFrames)):
                module.register_forward_hook(watch)
        torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)
        last = x.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, x.shape[:2])
        torch.testing.assert_close(net(last), expected, rtol=1e-4, atol=1e-5)
    assert all(seen), seen
    assert len(seen) >= 4


@pytest.mark.parametrize("name", OPTIONS)
def test_half_precision_keeps_logits_in_float32(name: str) -> None:
    net, x = model(name), clip()
    with torch.no_grad():
        expected = net(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = net(x)
    assert out.dtype == torch.float32
    assert float((out - expected).abs().max()) < 0.05 * float(expected.abs().max()) + 0.02
    assert model(name).double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize("name", ["tin", "trn", "tsm pool non-local"])
def test_export_with_any_number_of_videos(name: str) -> None:
    net = model(name)
    shapes = {"x_NTCHW": {0: torch.export.Dim("videos", min=1, max=64)}}
    program = torch.export.export(net, (clip(),), dynamic_shapes=shapes).module()
    with torch.no_grad():
        for videos in (1, 3):
            x = clip(videos)
            torch.testing.assert_close(program(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tsm", "tin", "trn", "tsm pool non-local"])
def test_the_graph_has_no_break(name: str) -> None:
    torch.compiler.reset()
    net, x = model(name), clip()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), net(x))
    net.train()
    assert compiled(x).isfinite().all()


# ---- configurations


def build(*words: str) -> tuple[Any, Any]:
    """The model node, and the model on the meta device with 174 classes."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base=None):
        cfg = compose(None, [f"+{words[0]}", *words[1:]]).model
    with torch.device("meta"):
        return cfg, instantiate(cfg)(num_classes=174)


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("name", ["tsn", "tsm", "tin", "trn"])
def test_a_configuration_builds_its_model(name: str) -> None:
    cfg, net = build(f"model={name}")
    assert isinstance(net, FrameNet)
    assert net.num_segments == 8
    assert cfg.non_local is None
    assert net.fixed_segments is (name in ("tin", "trn"))
    assert isinstance(net.backbone, ResNet)


def test_the_backbone_is_an_option() -> None:
    cfg, net = build("model=tin", "model/backbone=resnet101", "model.tin.offset_scale=8")
    assert len(net.backbone.layer3) == 23
    assert cfg.tin.offset_scale == 8
    _, net = build("model=tsm", "model/backbone=tiny2", "model.tsm.shift_div=4")
    assert isinstance(net.backbone, TinyNet)
    assert net.backbone.stages == ["layer1", "layer2"]
    _, net = build("model=tsn", "model/backbone=resnet50", "model.backbone.in_channels=10")
    assert net.backbone.conv1.in_channels == 10


@pytest.mark.parametrize("path", sorted((CONFIGS / "model/backbone").glob("*.yaml")), ids=str)
def test_every_backbone_builds(path: Any) -> None:
    cfg, net = build("model=tsn", f"model/backbone={path.stem}")
    assert net.head.in_features == net.backbone.out_features
    assert cfg.backbone.in_channels == net.backbone.in_channels == 3


def test_non_local_is_an_option() -> None:
    _, plain = build("model=tsm")
    _, net = build("model=tsm", "model/non_local=embedded", "model.non_local.mode=gaussian")
    names = {n.rpartition(".")[0] for n, _ in net.named_modules() if n.endswith(".non_local")}
    stages = [f"layer2.{i}" for i in (0, 2)] + [f"layer3.{i}" for i in (0, 2, 4)]
    assert names == {f"backbone.{name}" for name in stages}
    assert count(net) > count(plain)
    _, net = build(
        "model=tsm", "model/backbone=tiny", "model/non_local=embedded",
        "model.non_local.blocks={layer2: [0]}",
    )  # fmt: skip
    assert [n for n, _ in net.named_modules() if n.endswith(".non_local")] == [
        "backbone.layer2.0.non_local"
    ]


@pytest.mark.parametrize(
    ("classes", "expected"), [(174, 23_895_566), (400, 24_358_640), (313, 24_180_377)]
)
def test_check_04_parameters_of_tin_resnet50(classes: int, expected: int) -> None:
    with torch.device("meta"):
        net = FrameNet(ResNet("bottleneck", (3, 4, 6, 3)), classes, tin=add_tin)
        plain = FrameNet(ResNet("bottleneck", (3, 4, 6, 3)), classes)
    assert count(net) == expected
    assert count(net) - count(plain) == 31_008


def test_check_04_parameters_tin_adds_to_resnet101() -> None:
    _, net = build("model=tin", "model/backbone=resnet101")
    _, plain = build("model=tsn", "model/backbone=resnet101")
    assert count(net) - count(plain) == 71_757


def test_check_04_operations_of_tin_resnet50() -> None:
    with torch.device("meta"):
        net = FrameNet(ResNet("bottleneck", (3, 4, 6, 3)), 400, tin=add_tin).eval()
        with FlopCounterMode(display=False) as counter:
            net(torch.empty(1, 8, 3, 224, 224))
    assert counter.get_total_flops() / 2 == pytest.approx(32.9e9, rel=0.02)
