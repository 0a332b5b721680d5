"""ResNet-50 trunk for modern controls (torchvision's layers).

Letters: B frames, C channels, H W map size.
"""

from torch import Tensor

from reid_rqen.models.output import Trunk, TrunkOutput
from reid_rqen.models.pretrained import load_trunk


class ResNet50(Trunk):
    """ResNet-50 without its classifier: 2048 channels at 1/32 (1/16 with `last_stride=1`).

    `pool2_BCHW` is the output of the second stage (512 channels at 1/8), where GoogLeNet-BN has
    its pool2.

    Args:
        weights: safetensors file with torchvision's state dict without `fc.*`, or with the keys
            of this class; None trains from scratch.
        last_stride: stride of the fourth stage; 1 is the usual re-identification setting.
    """

    channels = 2048
    pool2_channels = 512

    def __init__(self, weights: str | None = None, last_stride: int = 2) -> None:
        super().__init__()
        from torchvision.models import resnet50

        if last_stride not in (1, 2):
            raise ValueError(f"last_stride={last_stride}: need 1 or 2")
        body = resnet50(weights=None)
        if last_stride == 1:
            body.layer4[0].conv2.stride = (1, 1)
            body.layer4[0].downsample[0].stride = (1, 1)
        self.conv1, self.bn1, self.relu, self.maxpool = (
            body.conv1,
            body.bn1,
            body.relu,
            body.maxpool,
        )
        self.layer1, self.layer2 = body.layer1, body.layer2
        self.layer3, self.layer4 = body.layer3, body.layer4
        if weights is not None:
            load_trunk(self, weights)

    def forward(self, image_BCHW: Tensor) -> TrunkOutput:
        """Map (B, 2048, H/32, W/32) and the 1/8 map; no taps."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(image_BCHW))))
        pool2_BCHW = self.layer2(self.layer1(x))
        return TrunkOutput(self.layer4(self.layer3(pool2_BCHW)), pool2_BCHW, ())
