"""Recogniser on a frame backbone: TSN, and TSM, TIN and TRN by what is put into or onto it.

TSN: arXiv 1608.00859; TSM: arXiv 1811.08383; TIN: arXiv 2001.06499; TRN: arXiv 1711.08496.
Order of dropout, classifier and consensus as in X-Temporal.

Letters: N videos, T frame positions, B = N*T frames (N-major), C channels, H W size, D feature
width, K classes.
"""

from collections.abc import Callable, Iterator
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from video_mmit.models.clip_shape import check_clip
from video_mmit.models.non_local import NonLocal

Insert = Callable[[nn.Module, int], None]  # puts temporal modules into a backbone, in place
Head = Callable[[int, int, int], nn.Module]  # (D, K, T) -> module from (N, T, D) to (N, K)


class FrameNet(nn.Module):
    """Clip (N, T, C, H, W) -> logits (N, K).

    Frames are folded into the batch, N-major, and go through the backbone; dropout on the feature
    of every frame; a linear layer on every frame; the mean of the logits over T, before any
    sigmoid or softmax. With `trn` that module takes the place of linear layer and mean.

    `num_segments` is fixed for TIN and TRN, whose weights depend on T. TSM and non-local blocks
    have no such weights and follow the clip they are given.

    Args:
        backbone: module from (B, C, H, W) to (B, D) with `out_features`, `in_channels`, stages
            `layer1`, ... of residual blocks. Its starting weights are loaded already.
        num_classes: K.
        num_segments: T; None accepts any (TSN only).
        dropout: of the frame features.
        partial_bn: keep every batch norm of the backbone but the first in evaluation mode.
        partial_bn_affine: with `partial_bn`, stop the gradient of their scale and shift as well
            (deepcs233/TIN does).
        tsm: inserts temporal shifts.
        tin: inserts temporal interlacing.
        trn: builds the relation head.
        non_local: inserts non-local blocks, after the temporal modules.
        head_std: standard deviation of the classifier's first weights; its bias starts at 0.

    Raises:
        ValueError: a temporal module without `num_segments`, TSM and TIN together, or a number
            out of range.
    """

    num_segments: int | None
    trn: nn.Module | None

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        num_segments: int | None = 8,
        dropout: float = 0.5,
        partial_bn: bool = False,
        partial_bn_affine: bool = False,
        tsm: Insert | None = None,
        tin: Insert | None = None,
        trn: Head | None = None,
        non_local: Insert | None = None,
        head_std: float = 0.001,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes}: need at least 1")
        if num_segments is not None and num_segments < 1:
            raise ValueError(f"num_segments={num_segments}: need at least 1, or None")
        if tsm is not None and tin is not None:
            raise ValueError("tsm and tin are both given: both shift the input of a block's conv1")
        self.backbone, self.num_segments = backbone, num_segments
        self.fixed_segments = tin is not None or trn is not None
        self.follows_clip = tsm is not None or non_local is not None
        for insert in (tsm, tin, non_local):
            if insert is not None:
                insert(backbone, self._segments())
        self.partial_bn = partial_bn
        if partial_bn and partial_bn_affine:
            for norm in self._frozen_norms():
                norm.requires_grad_(False)
        self.dropout = nn.Dropout(dropout)
        features = int(backbone.out_features)  # type: ignore[arg-type]
        if trn is not None:
            self.trn = trn(features, num_classes, self._segments())
        else:
            self.trn = None
            self.head = nn.Linear(features, num_classes)
            nn.init.normal_(self.head.weight, std=head_std)
            nn.init.zeros_(self.head.bias)
        self.train()

    def features(self, x_NTCHW: Tensor) -> Tensor:
        """Pooled features (N, T', D) of the frames; T' = T / 2 after a temporal pool.

        Raises:
            ValueError: not a clip this model accepts (dimensions, C or T).
        """
        channels = int(self.backbone.in_channels)  # type: ignore[arg-type]
        check_clip(x_NTCHW, channels, self.num_segments if self.fixed_segments else None)
        if self.follows_clip and x_NTCHW.shape[1] != self.num_segments:
            self.set_num_segments(x_NTCHW.shape[1])
        feature_BD = self.backbone(x_NTCHW.flatten(0, 1))
        return feature_BD.unflatten(0, (x_NTCHW.shape[0], -1))

    def forward(self, x_NTCHW: Tensor) -> Tensor:
        """Logits (N, K), at least float32, of a clip (N, T, C, H, W) of floats.

        Raises:
            ValueError: not a clip this model accepts (dimensions, C or T).
        """
        feature_NTD = self.dropout(self.features(x_NTCHW))
        if self.trn is not None:
            return self.trn(feature_NTD)
        logits_NTK = self.head(feature_NTD)
        precise = torch.promote_types(logits_NTK.dtype, torch.float32)
        return logits_NTK.to(precise).mean(dim=1)

    def set_num_segments(self, num_segments: int) -> None:
        """Let TSM and non-local blocks fold clips of `num_segments` frames from now on.

        Raises:
            ValueError: the model has weights for one T only (TIN, TRN).
        """
        before = self._segments()
        if self.fixed_segments and num_segments != before:
            raise ValueError(
                f"num_segments={num_segments}: this model has weights for {before} only"
            )
        for module in self.backbone.modules():
            own = getattr(module, "num_segments", None)
            if isinstance(own, int):  # behind a temporal pool it is half of the model's
                module.num_segments = own * num_segments // before  # type: ignore[assignment]
        self.num_segments = num_segments

    def train(self, mode: bool = True) -> Self:
        """Set the mode; under `partial_bn` all batch norms but the first stay in evaluation."""
        super().train(mode)
        if mode and self.partial_bn:
            for norm in self._frozen_norms():
                norm.eval()
        return self

    def _segments(self) -> int:
        if self.num_segments is None:
            raise ValueError("num_segments=None: only TSN accepts any number of frames")
        return self.num_segments

    def _frozen_norms(self) -> Iterator[nn.Module]:
        """Batch norms of the backbone after the first; those of non-local blocks start at 0."""
        norms = [module for module in _outside(self.backbone) if isinstance(module, _BatchNorm)]
        yield from norms[1:]


def _outside(module: nn.Module) -> Iterator[nn.Module]:
    """Modules in order, without what lies in a non-local block."""
    if not isinstance(module, NonLocal):
        yield module
        for child in module.children():
            yield from _outside(child)
