"""ResNet and ResNeXt under a feature pyramid, plain or with deformable convolutions.

He et al. (arXiv 1512.03385) with the stride on the 3x3 convolution, Xie et al. (arXiv 1611.05431).
Layers, key names and values are those of torchvision's ResNet without `fc`.

Letters: B images, C channels, H W size.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck
from torchvision.models.resnet import ResNet as TorchvisionResNet

from detection_tsd.models.dcn import deform
from detection_tsd.models.fpn import PyramidBackbone, Trunk
from detection_tsd.models.norm import convolve, convolve_all
from detection_tsd.models.pretrained import load_imagenet


class FoldingBottleneck(Bottleneck):
    """Torchvision's bottleneck; frozen norms are folded into their convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        """Map of the block, ReLU included."""
        y = self.relu(convolve(x, self.conv1, self.bn1))
        y = self.relu(convolve(y, self.conv2, self.bn2))
        y = convolve(y, self.conv3, self.bn3)
        y += x if self.downsample is None else convolve_all(x, self.downsample)
        return self.relu(y)


class ResNetTrunk(Trunk):
    """The arguments of `ResNetFPN`, the maps C2..C5 of strides 4..32."""

    stem_layers = ("conv1", "bn1")

    def __init__(
        self,
        layers: Sequence[int] = (3, 4, 6, 3),
        groups: int = 1,
        width: int = 64,
        dcn: str | bool = False,
        frozen_stages: int = 1,
        norm: str = "frozen",
        weights: str | None = None,
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__(frozen_stages, checkpoint_blocks)
        if len(layers) != 4 or min(layers) < 1:
            raise ValueError(f"layers={list(layers)}: need four positive numbers of blocks")
        net = TorchvisionResNet(
            FoldingBottleneck, list(layers), num_classes=1, groups=groups, width_per_group=width
        )
        self.conv1, self.bn1, self.relu, self.maxpool = net.conv1, net.bn1, net.relu, net.maxpool
        self.layer1, self.layer2 = net.layer1, net.layer2
        self.layer3, self.layer4 = net.layer3, net.layer4
        self.widths = (256, 512, 1024, 2048)
        if dcn:
            deform(self.stages()[1:], "v1" if dcn is True else dcn)
        if weights is not None:
            load_imagenet(self, weights)
        self.finish(norm)

    def run_stem(self, x_BCHW: Tensor) -> Tensor:
        """Map of stride 4, 64 channels."""
        return self.maxpool(self.relu(convolve(x_BCHW, self.conv1, self.bn1)))

    def stages(self) -> list[Sequence[nn.Module]]:
        """Bottlenecks of layer1 to layer4."""
        return [list(s) for s in (self.layer1, self.layer2, self.layer3, self.layer4)]


class ResNetFPN(PyramidBackbone):
    """ResNet-50 to -152 or ResNeXt under a pyramid of strides 4..64.

    Without `weights` the frozen parts hold random values: train from scratch with
    `frozen_stages=-1` and a live norm.

    Args:
        layers: bottlenecks of the four stages.
        groups: of the 3x3 convolutions (ResNeXt).
        width: channels of a group at 64 planes.
        dcn: False, or the version of the deformable 3x3 convolutions of stages 2 to 4, "v1"
            (also True) or "v2".
        frozen_stages: the stem and so many stages are not trained; -1 trains all.
        norm: of the trained stages, "frozen" (statistics fixed, affine trained), "batch" or "sync".
        weights: file of ImageNet weights in torchvision's layout; None starts at random.
        checkpoint_blocks: trade time for memory in training.
        channels: width of the pyramid.

    Raises:
        ValueError: an argument that is not accepted.
        InputError: `weights` is missing, cannot be read or does not fit.
    """

    def __init__(
        self,
        layers: Sequence[int] = (3, 4, 6, 3),
        groups: int = 1,
        width: int = 64,
        dcn: str | bool = False,
        frozen_stages: int = 1,
        norm: str = "frozen",
        weights: str | None = None,
        checkpoint_blocks: bool = False,
        channels: int = 256,
    ) -> None:
        body = ResNetTrunk(
            layers, groups, width, dcn, frozen_stages, norm, weights, checkpoint_blocks
        )
        super().__init__(body, channels)
