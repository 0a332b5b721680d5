"""SENet-154 (arXiv 1709.01507) under a feature pyramid.

Key names and values are those of timm's `legacy_senet154`, whose weights come from the authors'
Caffe network: the pooling after the stem has no padding and rounds its size up.

Letters: B images, C channels, H W size.
"""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from detection_tsd.models.dcn import deform
from detection_tsd.models.fpn import PyramidBackbone, Trunk
from detection_tsd.models.norm import convolve, convolve_all
from detection_tsd.models.pretrained import load_imagenet

GROUPS, REDUCTION = 64, 16


class SqueezeExcite(nn.Module):
    """Scale channels by a gate computed from their means over the map."""

    def __init__(self, channels: int, reduction: int = REDUCTION) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // reduction, kernel_size=1)
        self.fc2 = nn.Conv2d(channels // reduction, channels, kernel_size=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map of the same shape."""
        mean_BC11 = x_BCHW.mean(dim=(2, 3), keepdim=True)
        return x_BCHW * self.fc2(self.fc1(mean_BC11).relu()).sigmoid()


class SEBottleneck(nn.Module):
    """Bottleneck of SENet-154: 1x1 to 2 x planes, grouped 3x3 to 4 x planes, 1x1, gate.

    Args:
        inputs: channels of the input.
        planes: a quarter of the channels of the output.
        stride: of the 3x3 convolution.
        shortcut_kernel: size of the kernel of the shortcut's convolution; 0 for none.
    """

    def __init__(self, inputs: int, planes: int, stride: int, shortcut_kernel: int) -> None:
        super().__init__()
        outputs = 4 * planes
        self.conv1, self.bn1 = _convolution(inputs, 2 * planes, 1), nn.BatchNorm2d(2 * planes)
        self.conv2 = _convolution(2 * planes, outputs, 3, stride, GROUPS)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv3, self.bn3 = _convolution(outputs, outputs, 1), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.se_module = SqueezeExcite(outputs)
        self.downsample: nn.Sequential | None = None
        if shortcut_kernel:
            shortcut = _convolution(inputs, outputs, shortcut_kernel, stride)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map of the block, ReLU included."""
        y = self.relu(convolve(x, self.conv1, self.bn1))
        y = self.relu(convolve(y, self.conv2, self.bn2))
        y = self.se_module(convolve(y, self.conv3, self.bn3))
        y += x if self.downsample is None else convolve_all(x, self.downsample)
        return self.relu(y)


def _convolution(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _stem() -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (inputs, outputs) in enumerate(((3, 64), (64, 64), (64, 128)), start=1):
        layers[f"conv{number}"] = _convolution(inputs, outputs, 3, 2 if number == 1 else 1)
        layers[f"bn{number}"] = nn.BatchNorm2d(outputs)
        layers[f"relu{number}"] = nn.ReLU(inplace=True)
    return nn.Sequential(layers)


def _stage(inputs: int, planes: int, blocks: int, stride: int, kernel: int) -> nn.Sequential:
    first = SEBottleneck(inputs, planes, stride, kernel)
    rest = [SEBottleneck(4 * planes, planes, 1, 0) for _ in range(1, blocks)]
    return nn.Sequential(first, *rest)


class SENetTrunk(Trunk):
    """The arguments of `SENet154FPN`, the maps C2..C5 of strides 4..32."""

    stem_layers = ("layer0",)

    def __init__(
        self,
        layers: Sequence[int] = (3, 8, 36, 3),
        dcn: str | bool = False,
        frozen_stages: int = 1,
        norm: str = "frozen",
        weights: str | None = None,
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__(frozen_stages, checkpoint_blocks)
        if len(layers) != 4 or min(layers) < 1:
            raise ValueError(f"layers={list(layers)}: need four positive numbers of blocks")
        self.layer0 = _stem()
        self.pool0 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.layer1 = _stage(128, 64, layers[0], stride=1, kernel=1)
        self.layer2 = _stage(256, 128, layers[1], stride=2, kernel=3)
        self.layer3 = _stage(512, 256, layers[2], stride=2, kernel=3)
        self.layer4 = _stage(1024, 512, layers[3], stride=2, kernel=3)
        self.widths = (256, 512, 1024, 2048)
        if dcn:
            deform(self.stages()[1:], "v1" if dcn is True else dcn)
        if weights is not None:
            load_imagenet(self, weights)
        self.finish(norm)

    def run_stem(self, x_BCHW: Tensor) -> Tensor:
        """Map of stride 4, 128 channels."""
        return self.pool0(convolve_all(x_BCHW, self.layer0))

    def stages(self) -> list[Sequence[nn.Module]]:
        """Bottlenecks of layer1 to layer4."""
        return [list(s) for s in (self.layer1, self.layer2, self.layer3, self.layer4)]


class SENet154FPN(PyramidBackbone):
    """SENet-154 under a pyramid of strides 4..64.

    Args:
        layers: bottlenecks of the four stages.
        dcn: False, or the version of the deformable 3x3 convolutions of stages 2 to 4, "v1"
            (also True) or "v2".
        frozen_stages: the stem and so many stages are not trained; -1 trains all.
        norm: of the trained stages, "frozen" (statistics fixed, affine trained), "batch" or "sync".
        weights: file of ImageNet weights in timm's layout; None starts at random.
        checkpoint_blocks: trade time for memory in training.
        channels: width of the pyramid.

    Raises:
        ValueError: an argument that is not accepted.
        InputError: `weights` is missing, cannot be read or does not fit.
    """

    def __init__(
        self,
        layers: Sequence[int] = (3, 8, 36, 3),
        dcn: str | bool = False,
        frozen_stages: int = 1,
        norm: str = "frozen",
        weights: str | None = None,
        checkpoint_blocks: bool = False,
        channels: int = 256,
    ) -> None:
        body = SENetTrunk(layers, dcn, frozen_stages, norm, weights, checkpoint_blocks)
        super().__init__(body, channels)
