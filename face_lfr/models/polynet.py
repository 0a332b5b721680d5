"""Very Deep PolyNet (Zhang et al., arXiv 1611.05725) as a recogniser.

Structure as in pretrained-models.pytorch, models/polynet.py: the stem, blocks and reductions of
`poly_blocks`; 2-way modules ReLU(x + beta (F(x) + G(x))) and poly-3 modules
ReLU(x + beta (h1 + h2 + h3)) with h1 = F1(x), h2 = F2(ReLU(h1)), h3 = F3(ReLU(h2)), where F1 to F3
share their convolutions but not their norms nor the closing convolution. beta falls linearly over
the modules. With `features=1000` and 331 px it is the network for ImageNet.

Letters: B images, C channels, H W size, D embedding width.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from face_lfr.models.layers import (
    ConvNorm,
    FeatureLinear,
    check_counts,
    check_input,
    check_share,
)
from face_lfr.models.poly_blocks import (
    A_TO_B,
    B_TO_C,
    BLOCK_A,
    BLOCK_B,
    BLOCK_C,
    Branches,
    Conv,
    Inception,
    Norm,
    Reduction,
    Stem,
    init_uniform,
    last_side,
)


class SharedConv(nn.Module):
    """A convolution with a norm of its own for every order, and a ReLU."""

    def __init__(self, inputs: int, conv: Conv, norm: Norm, orders: int):
        super().__init__()
        self.conv = nn.Conv2d(
            inputs, conv.channels, conv.kernel, conv.stride, conv.padding, bias=False
        )
        self.norms = nn.ModuleList(norm(conv.channels) for _ in range(orders))

    def forward(self, x_BCHW: Tensor, order: int) -> Tensor:
        """Activations (B, C', H, W)."""
        return F.relu(self.norms[order](self.conv(x_BCHW)), inplace=True)


class SharedChain(nn.ModuleList):
    """Shared convolutions one after another; nothing when there is none."""

    def __init__(self, inputs: int, convs: Sequence[Conv], norm: Norm, orders: int):
        starts = (inputs, *(conv.channels for conv in convs))
        pairs = zip(starts, convs, strict=False)
        super().__init__(SharedConv(start, conv, norm, orders) for start, conv in pairs)

    def forward(self, x_BCHW: Tensor, order: int) -> Tensor:
        """Activations (B, C', H, W)."""
        for conv in self:
            x_BCHW = conv(x_BCHW, order)
        return x_BCHW


class TwoWay(nn.Module):
    """x -> ReLU(x + beta (F(x) + G(x)))."""

    def __init__(self, channels: int, branches: Branches, beta: float, norm: Norm):
        super().__init__()
        self.beta = beta
        self.ways = nn.ModuleList(Inception(channels, branches, norm) for _ in range(2))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Maps of the shape of the input."""
        first, second = self.ways
        return F.relu(torch.add(x_BCHW, first(x_BCHW) + second(x_BCHW), alpha=self.beta))


class Poly(nn.Module):
    """x -> ReLU(x + beta (h1 + h2 + h3)), each order applied to the ReLU of the one before."""

    def __init__(self, channels: int, branches: Branches, beta: float, norm: Norm, orders: int = 3):
        super().__init__()
        self.beta, self.split = beta, branches.entry
        first = Conv(sum(branches.entry), (1, 1))
        self.entry = SharedConv(channels, first, norm, orders)
        self.tails = nn.ModuleList(
            SharedChain(entry, tail, norm, orders)
            for entry, tail in zip(branches.entry, branches.tails, strict=True)
        )
        self.closings = nn.ModuleList(
            ConvNorm(nn.Conv2d(branches.channels, channels, 1, bias=False), norm(channels))
            for _ in range(orders)
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Maps of the shape of the input."""
        total, h = x_BCHW, x_BCHW
        for order in range(len(self.closings)):
            h = self._branch(h, order)
            total = torch.add(total, h, alpha=self.beta)
            h = F.relu(h)
        return F.relu(total)

    def _branch(self, x_BCHW: Tensor, order: int) -> Tensor:
        maps = []
        parts = self.entry(x_BCHW, order).split(self.split, dim=1)
        for part, tail in zip(parts, self.tails, strict=True):
            maps.append(tail(part, order))
        y_BCHW: Tensor = self.closings[order](torch.cat(maps, dim=1))
        return y_BCHW


class PolyNet(nn.Module):
    """Images (B, 3, H, W) -> features (B, D): global mean, dropout, linear layer.

    Args:
        modules: 2-way modules of stage A, and pairs of a poly-3 and a 2-way module of the stages B
            and C.
        features: D.
        input_size: H = W in pixels, 43 + 32 f or 44 + 32 f.
        width: multiple of the published channels; for small networks, our addition.
        dropout: share of the pooled values that is dropped in training.
        beta_end: weight of the residual of the last module; that of the first is 1.

    Raises:
        ValueError: an argument that is not accepted.
    """

    def __init__(
        self,
        modules: Sequence[int] = (10, 10, 5),
        features: int = 512,
        input_size: int = 331,
        width: float = 1.0,
        dropout: float = 0.2,
        beta_end: float = 0.7,
    ):
        super().__init__()
        check_counts("features", (features,), 1)
        if width <= 0:
            raise ValueError(f"width={width}: need a positive number")
        a, b, c = check_counts("modules", modules, 3)
        last_side(input_size)
        self.features, self.input_size = features, input_size
        betas = np.linspace(1, beta_end, a + 2 * b + 2 * c).tolist()
        norm: Norm = nn.BatchNorm2d
        self.stem = Stem(width, norm)
        channels = self.stem.channels
        two_way = partial(TwoWay, channels, BLOCK_A.scaled(width), norm=norm)
        self.stage_a = nn.Sequential(*(two_way(beta) for beta in betas[:a]))
        self.a_to_b = Reduction(channels, A_TO_B.scaled(width), norm)
        self.stage_b = _pairs(
            self.a_to_b.channels, BLOCK_B.scaled(width), betas[a : a + 2 * b], norm
        )
        self.b_to_c = Reduction(self.a_to_b.channels, B_TO_C.scaled(width), norm)
        self.stage_c = _pairs(self.b_to_c.channels, BLOCK_C.scaled(width), betas[a + 2 * b :], norm)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(check_share("dropout", dropout))
        self.fc = FeatureLinear(self.b_to_c.channels, features)
        init_uniform(self)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Features (B, D).

        Raises:
            ValueError: images of another size or number of channels.
        """
        check_input(x_BCHW, self.input_size)
        x = self.stage_b(self.a_to_b(self.stage_a(self.stem(x_BCHW))))
        x = self.pool(self.stage_c(self.b_to_c(x))).flatten(1)
        feature_BD: Tensor = self.fc(self.dropout(x))
        return feature_BD

    def embed(self, x_BCHW: Tensor) -> Tensor:
        """Features (B, D) for comparisons: those of `forward`."""
        return self(x_BCHW)


def _pairs(channels: int, branches: Branches, betas: Sequence[float], norm: Norm) -> nn.Sequential:
    kinds = (Poly, TwoWay)
    return nn.Sequential(
        *(kinds[i % 2](channels, branches, beta, norm) for i, beta in enumerate(betas))
    )
