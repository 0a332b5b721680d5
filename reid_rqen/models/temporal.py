"""Frame trunk with temporal mean or attention: the modern controls.

Gao & Nevatia, "Revisiting Temporal Modeling for Video-based Person ReID", arXiv 1805.02104.

Letters: S sets, T frames of a set, B = S*T frames, C channels, H W map size, K identities.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from reid_rqen.models.cnn_rnn import embed_frames, frame_mask
from reid_rqen.models.output import SetOutput, Trunk
from reid_rqen.ops.aggregate import aggregate

MODES = ("softmax", "sigmoid")


class TemporalAttention(nn.Module):
    """One positive score per frame from its map and its neighbours in time.

    A convolution over the whole map, ReLU, a convolution over 3 frames, ReLU; then softmax over
    the frames, or sigmoid. The weights are the scores over their sum, so the sigmoid is exactly
    QAN's weighting with another source of the score.

    Args:
        channels: of the trunk's map.
        hidden: channels between the convolutions.
        kernel: rows and columns of the map; (7, 4) for 224x112 frames at 1/32.
        mode: "softmax" or "sigmoid".
    """

    def __init__(
        self,
        channels: int = 2048,
        hidden: int = 256,
        kernel: Sequence[int] = (7, 4),
        mode: str = "softmax",
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: need one of {MODES}")
        self.kernel, self.mode = (kernel[0], kernel[1]), mode
        self.spatial = nn.Conv2d(channels, hidden, self.kernel)
        self.temporal = nn.Conv1d(hidden, 1, 3, padding=1)

    def forward(self, map_STCHW: Tensor, valid_ST: Tensor) -> Tensor:
        """Scores (S, T, 1), float32 at least, 0 on padding.

        Raises:
            ValueError: the map's size is not `kernel`.
        """
        if tuple(map_STCHW.shape[3:]) != self.kernel:
            raise ValueError(
                f"map is {tuple(map_STCHW.shape[3:])}, attention was built with "
                f"kernel={list(self.kernel)}"
            )
        hidden_BC = self.spatial(map_STCHW.flatten(0, 1)).relu().flatten(1)
        hidden_STC = hidden_BC.unflatten(0, map_STCHW.shape[:2])
        # The convolution pads with zeros at the ends, so padding frames must be zeros too.
        hidden_STC = hidden_STC.masked_fill(~valid_ST[..., None], 0.0)
        logit_ST = self.temporal(hidden_STC.transpose(1, 2)).relu().squeeze(1)
        logit_ST = logit_ST.to(torch.promote_types(logit_ST.dtype, torch.float32))
        if self.mode == "sigmoid":
            return logit_ST.sigmoid().masked_fill(~valid_ST, 0.0)[..., None]
        return logit_ST.masked_fill(~valid_ST, -torch.inf).softmax(dim=1)[..., None]


class TemporalModel(nn.Module):
    """Mean or attention-weighted mean of globally pooled frames, and a set classifier.

    The set vector is not normalised, as in the published code.

    Args:
        trunk: maps frames to `TrunkOutput`.
        attention: `TemporalAttention`, or None for the plain mean.
        num_classes: K; None drops the classifier.
    """

    metric = "euclid"  # the vector has no unit norm

    def __init__(
        self,
        trunk: Trunk,
        attention: TemporalAttention | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.attention = attention
        channels = self.trunk.channels
        self.classifier = None if num_classes is None else nn.Linear(channels, num_classes)

    @property
    def dimensions(self) -> int:
        """Entries of a set vector."""
        return self.trunk.channels

    def sequences(self, image_STCHW: Tensor, valid_ST: Tensor | None = None) -> Tensor:
        """Set vectors (S, C); in evaluation mode padding (at the end only) has no influence."""
        return self._pool(image_STCHW, valid_ST)[0]

    def forward(
        self,
        image_STCHW: Tensor,
        valid_ST: Tensor | None = None,
        boundaries_STE: Tensor | None = None,
    ) -> SetOutput:
        """Set vectors, set logits and, with attention, scores; `boundaries_STE` is ignored."""
        vector_SC, score_ST1 = self._pool(image_STCHW, valid_ST)
        logits = () if self.classifier is None else (self.classifier(vector_SC),)
        return SetOutput(vector_SC, logits, None if self.attention is None else score_ST1)

    def _pool(self, image_STCHW: Tensor, valid_ST: Tensor | None) -> tuple[Tensor, Tensor]:
        valid_ST = frame_mask(image_STCHW, valid_ST)
        map_STCHW = embed_frames(self._map, image_STCHW, valid_ST)
        feature_STC = map_STCHW.mean(dim=(3, 4))
        score_ST1 = feature_STC.new_ones(*valid_ST.shape, 1)
        if self.attention is not None:
            score_ST1 = self.attention(map_STCHW, valid_ST)
        return aggregate(feature_STC[:, :, None], score_ST1, valid_ST).squeeze(1), score_ST1

    def _map(self, image_BCHW: Tensor) -> Tensor:
        return self.trunk(image_BCHW).map_BCHW
