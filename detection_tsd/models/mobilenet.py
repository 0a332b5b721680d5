"""MobileNetV2 (arXiv 1801.04381) under a feature pyramid.

Layers, key names and values are those of torchvision's `mobilenet_v2` without the classifier.
arXiv 2003.07540 does not say whether its coarsest map is the last bottleneck (320 channels) or the
1x1 convolution after it (1280): `last_channels` chooses.

Letters: B images, C channels, H W size.
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual, MobileNetV2

from detection_tsd.models.fpn import PyramidBackbone, Trunk
from detection_tsd.models.norm import convolve_all
from detection_tsd.models.pretrained import load_imagenet

# First block, in torchvision's `features`, of what leads to the maps of strides 4, 8, 16 and 32.
STARTS = (2, 4, 7, 14)


class FoldingResidual(InvertedResidual):
    """Torchvision's inverted residual; frozen norms are folded into their convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        """Map of the block."""
        y = convolve_all(x, _leaves(self.conv))
        return x + y if self.use_res_connect else y


def _leaves(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if next(m.children(), None) is None]


class MobileNetV2Trunk(Trunk):
    """The arguments of `MobileNetV2FPN`, four maps of strides 4..32."""

    stem_layers = ("features.0", "features.1")

    def __init__(
        self,
        last_channels: int = 1280,
        frozen_stages: int = 1,
        norm: str = "frozen",
        weights: str | None = None,
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__(frozen_stages, checkpoint_blocks)
        if last_channels not in (320, 1280):
            raise ValueError(f"last_channels={last_channels}: need 320 or 1280")
        self.features = MobileNetV2(num_classes=1, block=FoldingResidual).features
        if weights is not None:
            load_imagenet(self, weights)
        if last_channels == 320:
            del self.features[-1]
        self.widths = (24, 32, 96, last_channels)
        self.finish(norm)

    def run_stem(self, x_BCHW: Tensor) -> Tensor:
        """Map of stride 2, 16 channels."""
        return self.features[1](convolve_all(x_BCHW, self.features[0]))

    def stages(self) -> list[Sequence[nn.Module]]:
        """Blocks after which the map has stride 4, 8, 16 and 32."""
        blocks = list(self.features)
        return [blocks[a:b] for a, b in pairwise((*STARTS, len(blocks)))]


class MobileNetV2FPN(PyramidBackbone):
    """MobileNetV2 under a pyramid of strides 4..64.

    Args:
        last_channels: 320 (without the last convolution) or 1280.
        frozen_stages: the stem (stride 2) and so many stages are not trained; -1 trains all.
        norm: "frozen", "batch" or "sync".
        weights: file of ImageNet weights in torchvision's layout; None starts at random.
        checkpoint_blocks: trade time for memory in training.
        channels: width of the pyramid.

    Raises:
        ValueError: an argument that is not accepted.
        InputError: `weights` is missing, cannot be read or does not fit.
    """

    def __init__(
        self,
        last_channels: int = 1280,
        frozen_stages: int = 1,
        norm: str = "frozen",
        weights: str | None = None,
        checkpoint_blocks: bool = False,
        channels: int = 256,
    ) -> None:
        body = MobileNetV2Trunk(last_channels, frozen_stages, norm, weights, checkpoint_blocks)
        super().__init__(body, channels)
