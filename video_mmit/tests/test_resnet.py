"""The frame backbone is torchvision's ResNet, and its starting weights."""

from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import ResNet50_Weights

from common.log import InputError
from video_mmit.models.resnet import ResNet

R50 = ("bottleneck", (3, 4, 6, 3))
SMALL = ("basic", (1, 1, 1, 1))
# Arguments, and millions of parameters without the classifier.
NETS = {
    "resnet18": (("basic", (2, 2, 2, 2)), 11.18),
    "resnet34": (("basic", (3, 4, 6, 3)), 21.28),
    "resnet50": (R50, 23.51),
    "resnet101": (("bottleneck", (3, 4, 23, 3)), 42.50),
    "resnet152": (("bottleneck", (3, 8, 36, 3)), 58.14),
    "resnext50_32x4d": ((*R50, 32, 4), 22.98),
    "resnext101_32x8d": (("bottleneck", (3, 4, 23, 3), 32, 8), 86.74),
}


def frames(channels: int = 3, size: int = 64) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))


def small(**options: object) -> ResNet:
    torch.manual_seed(0)
    return ResNet(*SMALL, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NETS)
def test_keys_and_sizes_are_torchvisions(name: str) -> None:
    arguments, millions = NETS[name]
    with torch.device("meta"):
        ours = ResNet(*arguments)
        theirs = getattr(torchvision.models, name)()
    expected = {k: v.shape for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    assert {k: v.shape for k, v in ours.state_dict().items()} == expected
    assert ours.out_features == theirs.fc.in_features
    count = sum(p.numel() for p in ours.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_values_are_torchvisions(name: str) -> None:
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)().eval()
    ours = ResNet(*NETS[name][0]).eval()
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if k[:3] != "fc."})
    theirs.fc = nn.Identity()
    with torch.no_grad():
        assert torch.equal(ours(frames()), theirs(frames()))


def test_deep_stems() -> None:
    with torch.device("meta"):
        plain, c, d = (ResNet(*R50, stem=stem) for stem in ("plain", "c", "d"))
    convs = [m for m in c.conv1 if isinstance(m, nn.Conv2d)]
    assert [(m.in_channels, m.out_channels, m.stride) for m in convs] == [
        (3, 32, (2, 2)),
        (32, 32, (1, 1)),
        (32, 64, (1, 1)),
    ]
    assert c.layer2[0].downsample[0].stride == (2, 2)
    assert isinstance(d.layer2[0].downsample[0], nn.AvgPool2d)
    assert d.layer2[0].downsample[1].stride == (1, 1)
    rest = [sum(p.numel() for n, p in net.named_parameters() if "conv1." not in n or "layer" in n)
            for net in (plain, c, d)]  # fmt: skip
    assert rest[0] == rest[1] == rest[2]
    for stem in ("c", "d"):
        assert ResNet(*SMALL, stem=stem)(frames(size=45)).shape == (2, 512)


def test_the_pooled_shortcut_ignores_padding() -> None:
    shortcut = ResNet(*SMALL, stem="d").layer2[0].downsample
    x = torch.arange(9.0).view(1, 1, 3, 3)
    assert torch.equal(shortcut[0](x), torch.tensor([[[[2.0, 3.5], [6.5, 8.0]]]]))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_of_a_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    state = small().state_dict() | {"fc.weight": torch.zeros(7, 512)}
    if suffix == ".pth":  # as training scripts save it, from before batch norms counted
        old = {f"module.{k}": v for k, v in state.items() if "num_batches" not in k}
        torch.save({"state_dict": old}, path)
    else:
        save_file(state, path)
    torch.manual_seed(1)
    net = ResNet(*SMALL, weights=str(path))
    for key, value in net.state_dict().items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("channels", [10, 15])
def test_other_inputs_start_from_the_mean_kernel(tmp_path: Path, channels: int) -> None:
    path = str(tmp_path / "w.safetensors")
    save_file(small().state_dict(), path)
    plain, other = small(weights=path), small(weights=path, in_channels=channels)
    grey = frames(1).expand(-1, channels, -1, -1)
    # A grey picture through RGB kernels gives their sum, three times their mean.
    expected = plain.conv1(frames(1).expand(-1, 3, -1, -1)) * channels / 3
    torch.testing.assert_close(other.conv1(grey), expected, rtol=1e-4, atol=1e-4)
    again = str(tmp_path / "other.safetensors")
    save_file(other.state_dict(), again)
    assert torch.equal(small(weights=again, in_channels=channels).conv1.weight, other.conv1.weight)


def test_weights_by_name_are_asked_from_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        shapes = torchvision.models.resnet50().state_dict()
    state = {k: torch.full(v.shape, 0.5, dtype=v.dtype) for k, v in shapes.items()}
    asked = []

    def give(self: object, **options: object) -> dict[str, Tensor]:
        asked.append(str(self))
        return state

    monkeypatch.setattr(ResNet50_Weights, "get_state_dict", give)
    net = ResNet(*R50, weights="IMAGENET1K_V2", in_channels=10)
    assert asked == ["ResNet50_Weights.IMAGENET1K_V2"]
    assert net.conv1.weight.shape[1] == 10
    assert all((value == 0.5).all() for value in net.parameters())


def test_a_failed_download_is_the_users_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, **options: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(ResNet50_Weights, "get_state_dict", fail)
    with pytest.raises(InputError, match=r"resnet50.*could not be downloaded: no route to host"):
        ResNet(*R50, weights="IMAGENET1K_V1")


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent.pth: no such weights.*IMAGENET1K_V1"):
        ResNet("basic", (2, 2, 2, 2), weights="absent.pth")
    for name in ("w.safetensors", "w.pth"):
        path = tmp_path / name
        path.write_bytes(b"not weights at all")
        with pytest.raises(InputError, match=rf"{name}: is not a"):
            small(weights=str(path))
    torch.save([1, 2], tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"w.pth: holds no dictionary of tensors: list"):
        small(weights=str(tmp_path / "w.pth"))
    save_file({"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"w.safetensors: weights do not fit"):
        small(weights=str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("stem", ["c", "d"])
def test_check_13_deep_stems_refuse_plain_weights(tmp_path: Path, stem: str) -> None:
    with pytest.raises(ValueError, match=rf"weights='IMAGENET1K_V1' with stem='{stem}'"):
        ResNet(*R50, stem=stem, weights="IMAGENET1K_V1")
    path = str(tmp_path / "w.safetensors")
    save_file(small().state_dict(), path)
    with pytest.raises(InputError, match="has the plain stem"):
        small(stem=stem, weights=path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("wide", (1, 1, 1, 1)), r"block='wide': need one of \('basic', 'bottleneck'\)"),
        (("basic", (1, 1, 1)), r"layers=\[1, 1, 1\]: need four"),
        (("basic", (1, 1, 1, 0)), r"layers=\[1, 1, 1, 0\]: need four"),
        (("basic", (1, 1, 1, 1), 1, 64, "e"), r"stem='e': need one of"),
        (("basic", (1, 1, 1, 1), 1, 64, "c", 0), r"in_channels=0"),
    ],
)
def test_check_13_bad_arguments_are_named(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResNet(*arguments)
