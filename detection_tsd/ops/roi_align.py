"""RoIAlign over all levels of a pyramid in one call.

Letters: R regions, 5 = (image index, x1, y1, x2, y2), C channels, P bins of a side.
"""

from __future__ import annotations

from torch import Tensor

from detection_tsd.ops.deform_pool import pool
from detection_tsd.ops.pyramid import Pyramid
from detection_tsd.ops.sampling import MODES, Settings


def roi_align(
    pyramid: Pyramid, roi_R5: Tensor, level_R: Tensor, *, size: int = 7, samples: int = 2,
    mode: str = "aligned", impl: str = "auto",
) -> Tensor:  # fmt: skip
    """Mean of bilinear samples in each bin, (R, C, P, P), in float32 at least.

    Args:
        pyramid: maps to read; the result is differentiable in them.
        roi_R5: regions in pixels of the network's input, in any order.
        level_R: map of each region; see `roi_levels`.
        size: P.
        samples: of a bin along each axis.
        mode: `aligned` is `torchvision.ops.roi_align(aligned=True)`, `torchvision` the same with
            False, `mmdet_v1` what mmdetection had before version 2: regions end at x2 + 1.
        impl: as for `deform_pool`.

    Raises:
        ValueError: as `deform_pool`.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: need one of {', '.join(MODES)}")
    return pool(pyramid, roi_R5, level_R, None, Settings(size, samples, 0.0, mode), impl)
