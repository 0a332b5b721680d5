"""Small trunk for the synthetic task and for tests."""

from collections.abc import Sequence

from torch import Tensor, nn

from reid_rqen.models.output import Trunk, TrunkOutput


class TinyTrunk(Trunk):
    """Four conv-BN-ReLU blocks; 56x28 frames give a 7x4 map, which keeps the 3/2/2 rows.

    `pool2_BCHW` is the output of the second block, where the deeper trunks have theirs.

    Args:
        in_channels: channels of the frames.
        widths: output channels of the blocks; at least two.
        strides: stride of the blocks; as many as `widths`.
        bn_momentum: weight of the newest batch in the running statistics.
    """

    def __init__(
        self,
        in_channels: int = 3,
        widths: Sequence[int] = (24, 48, 64, 64),
        strides: Sequence[int] = (2, 2, 2, 1),
        bn_momentum: float = 0.1,
    ) -> None:
        super().__init__()
        if len(widths) != len(strides) or len(widths) < 2:
            raise ValueError(
                f"widths={list(widths)} and strides={list(strides)}: need as many strides as "
                "widths, at least two"
            )
        inputs = [in_channels, *widths[:-1]]
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, width, 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(width, momentum=bn_momentum),
                nn.ReLU(inplace=True),
            )
            for before, width, stride in zip(inputs, widths, strides, strict=True)
        )
        self.channels = widths[-1]
        self.pool2_channels = widths[1]

    def forward(self, image_BCHW: Tensor) -> TrunkOutput:
        """Maps of frames (B, in_channels, H, W)."""
        pool2_BCHW = self.blocks[1](self.blocks[0](image_BCHW))
        map_BCHW = pool2_BCHW
        for block in self.blocks[2:]:
            map_BCHW = block(map_BCHW)
        return TrunkOutput(map_BCHW, pool2_BCHW, ())
