"""Deformable convolution in place of a plain one.

Version 1 (arXiv 1703.06211) moves the nine places that a 3x3 kernel reads, version 2
(arXiv 1811.11168) also weights them. Key names are those of mmcv (`conv_offset`), and as there
the weights of version 2 start at 1/2, not 1.

Letters: B images, C channels, H W size.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

VERSIONS = ("v1", "v2")


class DeformConv2d(nn.Conv2d):
    """A plain convolution made deformable; its weight stays the same parameter under the same key.

    Offsets are (y, x) pairs in pixels of the input map, kernel row after kernel row, from a
    convolution with the kernel and stride of this one that starts at zero: version 1 then equals
    the plain convolution. Computed in float32 also under autocast, because half precision cannot
    hold a place in a large map.

    Args:
        plain: the convolution, with zero padding.
        version: "v1" or "v2".

    Raises:
        ValueError: another version, or another padding.
    """

    def __init__(self, plain: nn.Conv2d, version: str = "v1") -> None:
        if version not in VERSIONS:
            raise ValueError(f"version={version!r}: need one of {VERSIONS}")
        if plain.padding_mode != "zeros" or isinstance(plain.padding, str):
            raise ValueError(f"plain: padding_mode={plain.padding_mode!r}: need zeros, in numbers")
        geometry: dict[str, Any] = {
            name: getattr(plain, name) for name in ("kernel_size", "stride", "padding", "dilation")
        }
        # On the meta device: the weight that this makes is replaced at once.
        super().__init__(
            plain.in_channels,
            plain.out_channels,
            groups=plain.groups,
            bias=False,
            device="meta",
            **geometry,
        )
        self.weight, self.bias = plain.weight, plain.bias
        self.places = plain.kernel_size[0] * plain.kernel_size[1]
        numbers = (2 if version == "v1" else 3) * self.places
        self.conv_offset = nn.Conv2d(plain.in_channels, numbers, **geometry).to(plain.weight)
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)  # type: ignore[arg-type]

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What `nn.Conv2d.forward` and a folded norm call, the latter with its own weights."""
        kind = input.device.type
        known = torch.amp.is_autocast_available(kind)  # not on the meta device
        with torch.autocast(kind, enabled=False) if known else nullcontext():
            x = input.to(weight.dtype)
            moved, place_weights = self.conv_offset(x), None
            if moved.shape[1] == 3 * self.places:
                place_weights = moved[:, 2 * self.places :].sigmoid()
                moved = moved[:, : 2 * self.places]
            y = deform_conv2d(
                x, moved, weight, bias, self.stride, self.padding, self.dilation, place_weights
            )
        return y.to(input.dtype).contiguous(memory_format=torch.channels_last)


def deform(stages: Iterable[Iterable[nn.Module]], version: str) -> None:
    """Replace the 3x3 convolution `conv2` of every block of the stages, in place."""
    for blocks in stages:
        for block in blocks:
            block.conv2 = DeformConv2d(block.conv2, version)  # type: ignore[arg-type]
