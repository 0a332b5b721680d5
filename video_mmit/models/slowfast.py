"""SlowFast (arXiv 1812.03982) as X-Temporal and as PySlowFast build it.

Letters: N videos, T frames of the fast pathway, C channels, H W size, K classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from video_mmit.models.blocks3d import (
    DEPTHS,
    EXPANSION,
    Block3D,
    Insert,
    check_arguments,
    init_convolutions,
    shortcut,
)
from video_mmit.models.clip_shape import check_clip

VARIANTS = ("xt", "pyslowfast")
SLOW_WIDTH = 64
STAGES = ("layer1", "layer2", "layer3", "layer4")  # res2 to res5 of the paper
FUSION_KERNELS = {4: 7, 8: 5}  # PySlowFast's by alpha: 8x8 and 4x16


class SlowFast(nn.Module):
    """Clip (N, T, C, H, W) -> logits (N, K): two pathways, the fast one feeding the slow one.

    The fast pathway sees all frames with few channels, the slow one every alpha-th frame. Before
    each stage the slow maps get the fast ones through a temporal convolution of stride alpha.

    The variants differ so:

    ===================  =================================  =====================================
    part                 xt                                 pyslowfast
    ===================  =================================  =====================================
    lateral connection   bare convolution, kernel 5         convolution, norm, ReLU; kernel 7 at
                                                            alpha 4 (8x8), 5 at alpha 8 (4x16)
    slow frames          0, alpha, 2 alpha, ...             evenly from the first to the last
    classifier           no bias, default first weights     bias, first weights N(0, 0.01^2)
    first weights        PyTorch's                          Kaiming by fan-out; last norm of a
                                                            block starts at 0
    ===================  =================================  =====================================

    Args:
        num_classes: K.
        depth: 50, 101, 152 or 200.
        variant: "xt" or "pyslowfast".
        alpha: fast frames per slow frame.
        beta_inv: slow channels per fast channel.
        frames: T; None accepts any (pyslowfast: any multiple of alpha).
        dropout: of the pooled features of both pathways.
        non_local: inserts non-local blocks into the slow pathway: `(pathway, None) -> None`.
        in_channels: C.

    Raises:
        ValueError: an argument that is not accepted.
    """

    def __init__(
        self,
        num_classes: int,
        depth: int = 50,
        variant: str = "xt",
        alpha: int = 4,
        beta_inv: int = 8,
        frames: int | None = 32,
        dropout: float = 0.5,
        non_local: Insert | None = None,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        check_arguments(num_classes, depth, tuple(depth for depth in DEPTHS if depth >= 50))
        _check(variant, alpha, beta_inv, frames)
        self.variant, self.alpha = variant, alpha
        self.num_segments, self.in_channels = frames, in_channels
        width = SLOW_WIDTH // beta_inv
        sources = [width, *(EXPANSION * (width << number) for number in range(3))]
        self.fast = Pathway(in_channels, width, 5, (3, 3, 3, 3), DEPTHS[depth], (0, 0, 0, 0))
        self.slow = Pathway(
            in_channels, SLOW_WIDTH, 1, (1, 1, 3, 3), DEPTHS[depth], [2 * c for c in sources]
        )
        self.lateral = nn.ModuleList(_lateral(channels, alpha, variant) for channels in sources)
        self.avgpool, self.dropout = nn.AdaptiveAvgPool3d(1), nn.Dropout(dropout)
        features = self.slow.out_features + self.fast.out_features
        self.head = nn.Linear(features, num_classes, bias=variant == "pyslowfast")
        if variant == "pyslowfast":
            self._init_as_pyslowfast()
        if non_local is not None:
            non_local(self.slow, None)

    def forward(self, x_NTCHW: Tensor) -> Tensor:
        """Logits (N, K) of a clip (N, T, C, H, W) of floats.

        Raises:
            ValueError: not a clip this model accepts (dimensions, C or T).
        """
        check_clip(x_NTCHW, self.in_channels, self.num_segments)
        fast = self.fast.stem(x_NTCHW.transpose(1, 2))
        slow = self.slow.stem(self._slow_clip(x_NTCHW).transpose(1, 2))
        for name, lateral in zip(STAGES, self.lateral, strict=True):
            slow = getattr(self.slow, name)(torch.cat([slow, lateral(fast)], dim=1))
            fast = getattr(self.fast, name)(fast)
        pooled = torch.cat([self.avgpool(slow), self.avgpool(fast)], dim=1).flatten(1)
        return self.head(self.dropout(pooled))

    def slow_frames(self, frames: int) -> list[int]:
        """Positions of the slow pathway's frames among `frames`.

        Raises:
            ValueError: pyslowfast, and `frames` is no multiple of alpha.
        """
        if self.variant == "xt":
            return list(range(0, frames, self.alpha))
        count = frames // self.alpha
        if frames != count * self.alpha:
            raise ValueError(f"T={frames} is no multiple of alpha={self.alpha}")
        return [k * (frames - 1) // max(1, count - 1) for k in range(count)]

    def _slow_clip(self, x_NTCHW: Tensor) -> Tensor:
        """The frames of the slow pathway; slices, so that no index is copied to the device."""
        if self.variant == "xt":
            return x_NTCHW[:, :: self.alpha]
        positions = self.slow_frames(x_NTCHW.shape[1])
        return torch.stack([x_NTCHW[:, position] for position in positions], dim=1)

    def _init_as_pyslowfast(self) -> None:
        init_convolutions(self)
        for module in self.modules():
            if isinstance(module, Block3D):
                nn.init.zeros_(module.get_parameter("bn3.weight"))
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)


class Pathway(nn.Module):
    """Stem and four stages of bottlenecks; only the stages' first convolutions see time.

    Args:
        in_channels: C of the clip.
        width: channels of the stem.
        stem_time: temporal kernel of the stem.
        times: temporal kernels of the first convolution of the blocks, by stage.
        layers: blocks of the stages.
        extra: channels that join the input of each stage.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        stem_time: int,
        times: Sequence[int],
        layers: Sequence[int],
        extra: Sequence[int],
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(
            in_channels, width, (stem_time, 7, 7), (1, 2, 2), (stem_time // 2, 3, 3), bias=False
        )
        self.bn1, self.relu = nn.BatchNorm3d(width), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))
        inputs = width
        for number, name in enumerate(STAGES):
            planes, blocks = width << number, []
            inputs += extra[number]
            for index in range(layers[number]):
                stride = 2 if number > 0 and index == 0 else 1
                blocks.append(_bottleneck(inputs, planes, stride, times[number]))
                inputs = planes * EXPANSION
            self.add_module(name, nn.Sequential(*blocks))
        self.out_features = inputs

    def stem(self, x_NCTHW: Tensor) -> Tensor:
        """Maps at a quarter of the size."""
        return self.maxpool(self.relu(self.bn1(self.conv1(x_NCTHW))))


def _bottleneck(inputs: int, planes: int, stride: int, time: int) -> Block3D:
    outputs = planes * EXPANSION
    space = (1, stride, stride)
    convs = [
        nn.Conv3d(inputs, planes, (time, 1, 1), padding=(time // 2, 0, 0), bias=False),
        nn.Conv3d(planes, planes, (1, 3, 3), space, (0, 1, 1), bias=False),
        nn.Conv3d(planes, outputs, 1, bias=False),
    ]
    return Block3D(convs, shortcut(inputs, outputs, space))


def _lateral(channels: int, alpha: int, variant: str) -> nn.Module:
    kernel = 5 if variant == "xt" else FUSION_KERNELS[alpha]
    conv = nn.Conv3d(
        channels, 2 * channels, (kernel, 1, 1), (alpha, 1, 1), (kernel // 2, 0, 0), bias=False
    )
    if variant == "xt":
        return conv
    return nn.Sequential(conv, nn.BatchNorm3d(2 * channels), nn.ReLU(inplace=True))


def _check(variant: str, alpha: int, beta_inv: int, frames: int | None) -> None:
    if variant not in VARIANTS:
        raise ValueError(f"variant={variant!r}: need one of {VARIANTS}")
    if alpha < 1 or (variant == "pyslowfast" and alpha not in FUSION_KERNELS):
        raise ValueError(f"alpha={alpha}: need at least 1 (pyslowfast: {tuple(FUSION_KERNELS)})")
    if beta_inv < 1 or SLOW_WIDTH % beta_inv:
        raise ValueError(f"beta_inv={beta_inv}: must divide {SLOW_WIDTH}")
    if frames is not None and (frames < 1 or (variant == "pyslowfast" and frames % alpha)):
        raise ValueError(f"frames={frames}: need a positive number, a multiple of alpha={alpha}")
