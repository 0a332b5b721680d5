"""What timm's `legacy_senet154` answers for weights that follow from the names of their keys.

`python -m detection_tsd.tests.senet_golden` writes golden/senet154.json; needs timm.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden" / "senet154.json"
PERIOD = 4093  # prime, so that no row of a weight repeats another one


def numbers() -> Tensor:
    """Numbers of mean 0 and variance 1 from a linear congruential generator."""
    state, found = 1, []
    for _ in range(PERIOD):
        state = (1_103_515_245 * state + 12_345) % 2**31
        found.append((state / 2**31 * 2 - 1) * 3**0.5)
    return torch.tensor(found, dtype=torch.float64)


@torch.no_grad()
def fill(net: nn.Module) -> nn.Module:
    """Weights and statistics as functions of key and shape."""
    table = numbers()
    for key, value in net.state_dict().items():
        if value.dim() == 0:
            continue
        pattern = table.roll(zlib.crc32(key.encode()) % PERIOD).to(value.dtype)
        repeated = pattern.repeat(-(-value.numel() // PERIOD))[: value.numel()]
        repeated = repeated.view(value.shape)
        if value.dim() == 4:
            value.copy_(repeated * (2 / value[0].numel()) ** 0.5)
        elif key.startswith("layer") and key.endswith(".bn3.weight") and key.count(".") > 2:
            value.copy_(0.2 + 0.1 * repeated)  # large residuals would saturate the gates
        elif key.endswith(("running_var", "bn1.weight", "bn2.weight", "bn3.weight", "1.weight")):
            value.copy_(1 + 0.2 * repeated)
        else:
            value.copy_(0.1 * repeated)
    return net


def picture(size: int = 64) -> Tensor:
    """(1, 3, size, size)."""
    return numbers().repeat(-(-3 * size * size // PERIOD))[: 3 * size * size].view(1, 3, size, size)


def summary(maps: list[Tensor]) -> list[dict[str, Any]]:
    """Shape, moments and sixteen values, spread evenly, of every map."""
    found = []
    for x in maps:
        flat = x.contiguous().flatten().double()
        places = torch.linspace(0, flat.numel() - 1, 16).long()
        moments = [flat.mean().item(), flat.std().item()]
        found.append({"shape": list(x.shape), "moments": moments, "values": flat[places].tolist()})
    return found


def timm_net() -> nn.Module:
    """Timm's network in evaluation mode, filled."""
    import timm

    with torch.device("meta"):
        net = timm.create_model("legacy_senet154", pretrained=False)
    return fill(net.to_empty(device="cpu")).eval()


@torch.no_grad()
def timm_maps(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Maps of the four stages."""
    x, maps = net.pool0(net.layer0(x)), []
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        x = stage(x)
        maps.append(x)
    return maps


if __name__ == "__main__":
    maps = timm_maps(timm_net().double(), picture())
    GOLDEN.write_text(json.dumps(summary(maps), indent=1) + "\n")
