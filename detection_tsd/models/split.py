"""A backbone that separates classification from localisation before the head.

Rows D_s8, D_s16 and D_s32 of table 1 of arXiv 2003.07540: everything after a stride exists twice.
The parameter totals of that table fix what "everything" is: the stages of coarser stride and the
feature pyramid. The paper gives no reading of the region proposals; the detector chooses.

Letters: B images, C channels, H W size.
"""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from detection_tsd.models.fpn import FPN, Features
from detection_tsd.models.resnet import ResNetFPN

SHARED_STAGES = {8: 2, 16: 3, 32: 4}


class SplitResNetFPN(ResNetFPN):
    """`ResNetFPN` with stages of its own, from a stride on, and an own pyramid for regression.

    `body` and `fpn` serve classification, so that weights of a `ResNetFPN` load; the second copies
    of the stages (`reg_stages`) start equal to the first.

    Args:
        stride: the last shared one, 8, 16 or 32.
        layers: and all after it as in `ResNetFPN`.
        groups: of the 3x3 convolutions.
        width: channels of a group at 64 planes.
        dcn: version of the deformable convolutions, or False.
        frozen_stages: the stem and so many stages are not trained.
        norm: "frozen", "batch" or "sync".
        weights: file of ImageNet weights.
        checkpoint_blocks: trade time for memory in training.
        channels: width of the pyramids.

    Raises:
        ValueError: another stride, more frozen stages than shared ones, or as `ResNetFPN`.
        InputError: as `ResNetFPN`.
    """

    def __init__(
        self,
        stride: int,
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
        if stride not in SHARED_STAGES:
            raise ValueError(f"stride={stride}: need one of {tuple(SHARED_STAGES)}")
        shared = SHARED_STAGES[stride]
        if frozen_stages > shared:
            raise ValueError(f"frozen_stages={frozen_stages}: {shared} stages are shared")
        super().__init__(
            layers, groups, width, dcn, frozen_stages, norm, weights, checkpoint_blocks, channels
        )
        self.shared = shared
        own = self.body.stages()[self.shared :]
        self.reg_stages = nn.ModuleList(nn.Sequential(*deepcopy(list(s))) for s in own)
        reg_fpn = FPN(self.body.widths, channels)
        self.reg_fpn = reg_fpn.to(memory_format=torch.channels_last)

    def forward(self, x_B3HW: Tensor) -> Features:
        """Pyramids of normalised images, one for classification and one for regression."""
        cls_maps = self.body(x_B3HW)
        reg_maps = cls_maps[: self.shared]
        for stage in self.reg_stages:
            blocks: nn.Sequential = stage  # type: ignore[assignment]
            reg_maps.append(self.body.run_blocks(reg_maps[-1], blocks))
        return Features(self.fpn(cls_maps), self.reg_fpn(reg_maps))
