"""Quality heads: sizes, init, no hidden nonlinearity."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from reid_rqen.models.quality import (
    ConstantQuality,
    ImageQuality,
    Pool2Conv,
    Pool2FC,
    Quality,
    TinyQuality,
)

POOL2 = torch.empty(0)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_check_01_image_head() -> None:
    with torch.device("meta"):
        head = ImageQuality(3)
        with FlopCounterMode(display=False) as flops:
            score = head(torch.empty(1, 3, 224, 224), POOL2)
    assert score.shape == (1, 3)
    assert count(head) == 95_619
    assert flops.get_total_flops() == 2 * 349_237_248


def test_pool2_heads_have_the_released_sizes() -> None:
    with torch.device("meta"):
        assert count(Pool2FC(3)) == 150_528 * 3 + 3
        head = Pool2Conv(3)
        assert head(POOL2, torch.empty(2, 192, 28, 28)).shape == (2, 3)
    assert head.fc.in_features == 32 * 4 * 4


def test_image_head_has_no_relu_and_no_norm() -> None:
    """The same numbers from bare operators."""
    torch.manual_seed(0)
    head = ImageQuality(2, grid=(2, 2)).double()
    image = torch.rand(2, 3, 32, 48, dtype=torch.float64) * 255 - 110
    x = F.conv2d(image, head.conv1.weight, head.conv1.bias, stride=2, padding=3)
    x = F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-torch.inf), 3, 2)
    x = F.conv2d(x, head.conv2.weight, head.conv2.bias, padding=1)
    x = F.conv2d(x, head.conv3.weight, head.conv3.bias, padding=1)
    assert (x < 0).any()
    rows = [x[:, :, i : i + 7, j : j + 7].mean(dim=(2, 3)) for i in (0, 7) for j in (0, 7)]
    flat = torch.stack(rows, dim=2).flatten(1)
    expected = F.linear(flat, head.fc.weight, head.fc.bias).sigmoid()
    torch.testing.assert_close(head(image, POOL2), expected)
    relu = ImageQuality(2, "relu", (2, 2)).double()
    relu.load_state_dict(head.state_dict())
    assert not torch.allclose(relu(image, POOL2), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("head", "image", "pool2"),
    [
        (ImageQuality(3, grid=(8, 8)), (4, 3, 224, 224), (0,)),
        (ImageQuality(3, grid=(10, 5)), (4, 3, 256, 128), (0,)),
        (TinyQuality(3), (4, 3, 56, 28), (0,)),
    ],
    ids=["image", "image 256x128", "tiny"],
)
def test_scores_start_near_one_half(
    head: Quality, image: tuple[int, ...], pool2: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    score = head(torch.randn(image, generator=generator), torch.empty(pool2))
    assert score.shape == (4, 3)
    assert (score - 0.5).abs().max() < 0.1


@pytest.mark.parametrize("head", [Pool2FC(1, 6, (4, 2)), Pool2Conv(1, 6, grid=(1, 1))])
def test_pool2_heads_send_gradients_to_the_trunk(head: Quality) -> None:
    pool2 = torch.rand(2, 6, 4, 2) if isinstance(head, Pool2FC) else torch.rand(2, 6, 7, 7)
    pool2.requires_grad_()
    head(POOL2, pool2).sum().backward()
    assert pool2.grad is not None
    assert pool2.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())


def test_sigmoid_is_float32_in_autocast() -> None:
    head, image = TinyQuality(3), torch.rand(2, 3, 56, 28)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head.logits(image, POOL2).dtype == torch.bfloat16
        assert head(image, POOL2).dtype == torch.float32


def test_constant_quality_is_one_without_parameters() -> None:
    head = ConstantQuality(3)
    assert torch.equal(head(torch.rand(2, 3, 8, 8), POOL2), torch.ones(2, 3))
    assert not list(head.parameters())


def hatched(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Flat bands 24/16/16 rows, some crossed by a diagonal hatch; True is clean."""
    image = torch.rand(count, 3, 1, 1, generator=generator).expand(-1, -1, 56, 28).clone()
    clean = torch.rand(count, 3, generator=generator) < 0.5
    row, column = torch.arange(56)[:, None], torch.arange(28)
    hatch = 0.3 * ((row + column) % 6 < 3).float()
    for r, (a, b) in enumerate(((0, 24), (24, 40), (40, 56))):
        image[~clean[:, r], :, a:b] += hatch[a:b]
    return image - 0.5, clean


def test_tiny_head_can_learn_to_see_a_hatch_in_each_region() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    head = TinyQuality(3)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    for _ in range(120):
        image, clean = hatched(32, generator)
        loss = F.binary_cross_entropy(head(image, POOL2), clean.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    image, clean = hatched(200, generator)
    assert ((head(image, POOL2) > 0.5) == clean).float().mean(dim=0).min() > 0.9


def test_wrong_options_are_named() -> None:
    with pytest.raises(ValueError, match="act='gelu'"):
        ImageQuality(act="gelu")
    with pytest.raises(ValueError, match="outputs=0"):
        ConstantQuality(0)
    with pytest.raises(ValueError, match=r"to \(10, 5\), but was built with grid=\[8, 8\]"):
        ImageQuality()(torch.rand(1, 3, 256, 128), POOL2)
