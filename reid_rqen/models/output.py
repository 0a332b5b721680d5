"""What trunks and models return.

Letters: B frames, S sets, T frames of a set, C channels, H W map size, R regions, D embedding,
K training identities, N draws of three sets (anchor, positive, negative).
"""

from typing import NamedTuple

from torch import Tensor, nn


class TrunkOutput(NamedTuple):
    """Maps of a batch of frames: the last one, one at 1/8, and the taps of auxiliary heads."""

    map_BCHW: Tensor
    pool2_BCHW: Tensor
    taps: tuple[Tensor, ...]


class Trunk(nn.Module):
    """Base of the trunks: frames (B, C, H, W) -> `TrunkOutput`.

    Attributes:
        channels: of `map_BCHW`.
        pool2_channels: of `pool2_BCHW`.
        tap_channels: of `taps`, shallow first; empty for a trunk without auxiliary heads.
    """

    channels: int
    pool2_channels: int
    tap_channels: tuple[int, ...] = ()

    def forward(self, image_BCHW: Tensor) -> TrunkOutput:
        """Maps of a batch of frames."""
        raise NotImplementedError


class FrameOutput(NamedTuple):
    """Per-frame features and scores; the input of `ops.aggregate.StreamingAggregate`.

    `region_BRC` is float32 and not normalised; `score_BR` has one column per region even when
    the quality head gives one score per frame.
    """

    region_BRC: Tensor
    score_BR: Tensor


class SetOutput(NamedTuple):
    """Set embeddings and everything the objectives of `losses` need.

    vector_SD: set embedding, float32 (unit norm for RQEN).
    logits: main classifier first, then the auxiliary ones (training only); rows are the S*T
        frames or the S sets, in order. With `pairs`, rows are the 2N left then the 2N right
        members of the pairs. Empty when the model has no classifier.
    score_STR: quality of each frame in (0, 1] as the head gave it (R is 1 for one score per
        frame), or None for a model without scores.
    pairs: pair-dependent vectors (2N, D) left and right: the N (anchor, positive) pairs, then the
        N (anchor, negative) pairs; None for models whose embedding does not depend on the pair.
    """

    vector_SD: Tensor
    logits: tuple[Tensor, ...] = ()
    score_STR: Tensor | None = None
    pairs: tuple[Tensor, Tensor] | None = None
