"""Quality network of QAN++ (arXiv 1909.00632): one unbounded score per face.

trojans-face-recognizer (the authors' code), QAN++/PolyFace.py, class Quality with channels
(8, 16, 32, 48). It sees the image, not the feature.

Letters: B images, C channels, H W size.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from face_lfr.models.layers import ConvNorm, FeatureLinear, check_counts, check_input

EPS = 2e-5


class QualityBlock(nn.Module):
    """BN, 3x3, BN, PReLU, strided 3x3, BN; added to the shortcut; PReLU with one slope."""

    folds: ClassVar[tuple[tuple[str, str], ...]] = (("conv1", "bn2"), ("conv2", "bn3"))

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs, EPS)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs, EPS)
        self.act1 = nn.PReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs, EPS)
        self.act2 = nn.PReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = ConvNorm(conv, nn.BatchNorm2d(outputs, EPS))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Activations (B, outputs, H', W')."""
        y = self.act1(self.bn2(self.conv1(self.bn1(x_BCHW))))
        y = self.bn3(self.conv2(y))
        out: Tensor = self.act2(y + self.shortcut(x_BCHW))
        return out


class QualityNet(nn.Module):
    """Faces (B, 3, H, W) -> scores (B,); greater is better, without bounds.

    Args:
        channels: of the four stages, each of which halves the map.
        blocks: of each stage.
        input_size: H = W in pixels.
        score_gain: factor of the last layer's first weights. The authors' 1 lets scores begin far
            outside of the targets' range, which a short training does not mend.

    Raises:
        ValueError: an argument that is not accepted.
    """

    def __init__(
        self,
        channels: Sequence[int] = (8, 16, 32, 48),
        blocks: int = 2,
        input_size: int = 112,
        score_gain: float = 1.0,
    ):
        super().__init__()
        channels = check_counts("channels", channels, 4)
        check_counts("blocks, input_size", (blocks, input_size), 2)
        self.input_size = input_size
        conv = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.start = ConvNorm(conv, nn.BatchNorm2d(channels[0], EPS), nn.PReLU())
        stages, inputs = [], channels[0]
        for outputs in channels:
            rest = (QualityBlock(outputs, outputs, 1) for _ in range(1, blocks))
            stages.append(nn.Sequential(QualityBlock(inputs, outputs, 2), *rest))
            inputs = outputs
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.score = FeatureLinear(inputs, 1, bias=False)  # a 1x1 convolution in the authors' code
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                fan_out = module.weight[:, 0].numel()
                bound = math.sqrt(2 / fan_out)
                nn.init.uniform_(module.weight, -bound, bound)
        with torch.no_grad():
            self.score.weight *= score_gain

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Scores (B,), float32 under autocast.

        Raises:
            ValueError: images of another size or number of channels.
        """
        check_input(x_BCHW, self.input_size)
        x = self.pool(self.stages(self.start(x_BCHW))).flatten(1)
        score_B: Tensor = self.score(x).flatten()
        return score_B
