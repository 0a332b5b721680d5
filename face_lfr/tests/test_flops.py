"""The three ways of counting against published integers, hand cases, and what is refused."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from common.log import InputError
from face_lfr.flops import MODES, closed_form, closed_form_parts, count, report, require
from face_lfr.models.iresnet import IResNet
from face_lfr.models.mobilefacenet import MobileFaceNet
from face_lfr.models.polyface import EfficientPolyFace
from face_lfr.models.polynet import PolyNet
from face_lfr.models.quality_net import QualityNet

PRESETS = {  # parameters, mac, cost4 at 235 px, 256 features; GFLOPs of the organisers
    (23, 38, 23): (119_927_552, 14_066_411_104, 28_248_293_760, 28.104),
    (20, 30, 20): (104_096_800, 11_969_860_704, 24_038_612_032, 23.915),
    (10, 20, 10): (70_878_560, 8_275_191_904, 16_614_555_072, 16.534),
}
PARTS = {  # parameters, mac, cost4
    "stem": (605_728, 1_386_384_480, 2_787_057_216),
    "a": (137_952, 99_657_216, 201_134_016),
    "a_to_b": (2_902_528, 875_446_272, 1_752_904_704),
    "b": (1_173_056, 197_629_952, 396_492_928),
    "b_to_c": (3_542_784, 323_518_464, 647_858_176),
    "c": (2_010_816, 72_179_712, 144_778_752),
    "head": (18_878_720, 18_874_368, 37_748_736),
}
IRESNETS = {(2, 2, 2, 2): 5.216, (3, 4, 6, 3): 8.914, (3, 4, 14, 3): 12.613, (3, 13, 30, 3): 24.170}


@pytest.mark.parametrize("blocks", PRESETS)
def test_check_01_presets(blocks: tuple[int, int, int]) -> None:
    params, mac, cost4, organiser = PRESETS[blocks]
    with torch.device("meta"):
        net = EfficientPolyFace(blocks)
    assert sum(parameter.numel() for parameter in net.parameters()) == params
    layers = report(net, 235)
    assert sum(layer.cost.mac for layer in layers) == mac
    assert sum(layer.cost.cost4 for layer in layers) == cost4
    total = sum(layer.cost.organiser for layer in layers)
    assert round(total / 1e9, 3) == organiser
    form = closed_form(blocks, 235, 256)
    assert form == {"params": params, "organiser": total, "mac": mac, "cost4": cost4}


def test_check_01_parts() -> None:
    parts = closed_form_parts(235, 256)
    found = {name: (part.params, part.cost.mac, part.cost.cost4) for name, part in parts.items()}
    assert found == PARTS
    head = closed_form_parts(235, 512)["head"]
    assert (head.params, head.cost.mac, head.cost.cost4) == (37_753_344, 37_748_736, 75_497_472)
    with torch.device("meta"):
        layers = report(EfficientPolyFace((1, 1, 1)), 235)
    names = {"a": "stage_a", "b": "stage_b", "c": "stage_c"}
    for name, (_, mac, cost4) in PARTS.items():
        own = [x.cost for x in layers if x.name.split(".")[0] == names.get(name, name)]
        assert (sum(x.mac for x in own), sum(x.cost4 for x in own)) == (mac, cost4)


@pytest.mark.parametrize("layers", IRESNETS)
def test_check_01_iresnets_by_the_organisers_counter(layers: tuple[int, ...]) -> None:
    with torch.device("meta"):
        net = IResNet(layers)
    assert round(count(net, 112) / 1e9, 3) == IRESNETS[layers]


def test_check_01_the_pair_of_the_video_track() -> None:
    quality = QualityNet()
    video = closed_form((20, 30, 20), 235, 256)
    assert round(count(quality, 112) / 1e9, 3) == 0.079
    assert round((video["organiser"] + count(quality, 112)) / 1e9, 3) == 23.994
    assert round((video["cost4"] + count(quality, 112, "cost4")) / 1e9, 4) == 24.1198


def test_mobile_networks() -> None:
    assert count(MobileFaceNet(), 112, "mac") == 437_520_896
    inside = (64, 128, 128, 256, 256, 512, 256)
    y2 = MobileFaceNet((2, 8, 16, 4), 1, inside, 256, head_bias=True)
    assert count(y2, 112) // 10**6 == 933


@pytest.mark.parametrize(
    ("blocks", "size", "width", "features"),
    [((1, 2, 1), 75, 0.25, 64), ((2, 1, 3), 108, 0.5, 32), ((1, 1, 1), 171, 1.0, 128)],
)
def test_the_closed_form_is_the_network(
    blocks: tuple[int, int, int], size: int, width: float, features: int
) -> None:
    with torch.device("meta"):
        net = EfficientPolyFace(blocks, features, size, width, merge=width < 1)
    params = sum(parameter.numel() for parameter in net.parameters())
    counted = {mode: count(net, size, mode) for mode in MODES}
    assert closed_form(blocks, size, features, width) == {"params": params, **counted}


def test_mac_agrees_with_torch() -> None:
    with torch.device("meta"):
        nets = [(PolyNet((1, 1, 1), 32, 107, 0.25), 107), (MobileFaceNet(scale=1), 112)]
        for net, size in nets:
            with FlopCounterMode(display=False) as counter:
                net.eval()(torch.empty(1, 3, size, size))
            assert 2 * count(net, size, "mac") == counter.get_total_flops()


class Odd(nn.Module):
    """One layer of every counted kind, and free operations between them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, (3, 1), stride=2, padding=(1, 0), bias=True)
        self.grouped = nn.Conv2d(8, 6, 3, groups=2, bias=False)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2, bias=False)
        self.norm, self.act = nn.BatchNorm2d(4), nn.PReLU(4)
        self.fc, self.last = nn.Linear(4, 5), nn.Linear(5, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, size=(16, 16), mode="bilinear", align_corners=False)
        x = self.act(self.norm(self.up(self.grouped(F.relu(self.conv(x))))))
        x = F.max_pool2d(x, 2).mean((2, 3))
        return self.last(self.fc(x) + 1)


def test_hand_case() -> None:
    layers = {layer.name: layer for layer in report(Odd(), 40)}
    assert list(layers) == ["conv", "grouped", "up", "fc", "last"]
    assert layers["conv"].output == (1, 8, 8, 8)
    assert layers["conv"].cost == (2 * 3 * 3 * 64 * 8, 9 * 512, 2 * 9 * 512 + 4 * 512)
    mac = 8 // 2 * 9 * 36 * 6
    assert layers["grouped"].cost == ((2 * 8 * 9 - 1) * 36 * 6 // 2, mac, 2 * mac + 4 * 36 * 6)
    mac = 6 * 4 * 4 * 36
    assert layers["up"].cost == (2 * mac, mac, 2 * mac + 4 * 4 * 144)
    assert layers["fc"].cost == (40, 20, 40)
    assert layers["last"].cost == (70 - 7, 35, 70)
    assert count(Odd(), 40, "mac") == sum(layer.cost.mac for layer in layers.values())


def test_a_layer_that_runs_twice_costs_twice() -> None:
    conv = nn.Conv2d(3, 3, 1, bias=False)
    assert count(nn.Sequential(conv, nn.ReLU(), conv), 4, "mac") == 2 * 9 * 16


def test_the_model_stays_as_it_was() -> None:
    net = IResNet((1, 1, 1, 1), (4, 4, 4, 4), 8, 32)
    net.layer1.eval()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    count(net, 32)
    assert net.training
    assert not net.layer1.training
    assert net.layer2.training
    assert not net.layer1[0]._forward_hooks
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert net(torch.randn(2, 3, 32, 32)).isfinite().all()


class Hidden(nn.Module):
    """Multiplies by a matrix that no layer owns."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.zeros(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) @ self.matrix


class Owner(nn.Module):
    """Has a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


def test_unknown_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"not known: 1 \(Owner\), 2 \(MultiheadAttention\)"):
        count(nn.Sequential(nn.Conv2d(3, 3, 1), Owner(), nn.MultiheadAttention(4, 2)), 8)
    with pytest.raises(ValueError, match=r"mm in 1 \(Hidden\) is no layer"):
        count(nn.Sequential(nn.Conv2d(3, 3, 1), Hidden()), 8)
    with pytest.raises(ValueError, match="mode='flops': need one of"):
        count(nn.Identity(), 8, "flops")
    with pytest.raises(ValueError, match="input_size=112"):
        closed_form((1, 1, 1), 112, 256)


def test_the_bound_of_the_challenge() -> None:
    with torch.device("meta"):
        net = IResNet((2, 2, 2, 2))
    assert require(net, 30, 112) == pytest.approx(5.216, abs=5e-4)
    with pytest.raises(InputError, match=r"model: costs 5\.216 G \(organiser\) at 112 px.*: 5 G"):
        require(net, 5, 112)
