"""Region-based quality estimation network (arXiv 1711.08766), and QAN as its one-region case.

Letters: S sets, T frames of a set, B = S*T frames, C channels, H W size, R regions, E inner
edges, D embedding, K training identities.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from reid_rqen.models.heads import AuxiliaryHead, classifier
from reid_rqen.models.output import FrameOutput, SetOutput, Trunk, TrunkOutput
from reid_rqen.models.quality import Quality
from reid_rqen.models.regions import RegionPool
from reid_rqen.ops.aggregate import aggregate, set_vector


class RQEN(nn.Module):
    """Frames -> region features and scores -> quality-weighted set vector.

    The rows of the ablation are arguments: `regions=(7,)` with one score is QAN, `regions=(3,2,2)`
    with `ConstantQuality` is region mean pooling, a quality head with one output shares the score
    of a frame between its regions, one with R outputs scores each region (RQEN).

    Args:
        trunk: maps frames to `TrunkOutput`; see `models.output` for the attributes.
        quality: scores with 1 or R outputs.
        num_classes: K; None drops the classifiers (evaluation, other data sets).
        regions: relative heights of the regions, top to bottom.
        auxiliary: classify the trunk's taps in training too.
        aux_grids: map sizes after the auxiliary poolings, one per tap; see `AuxiliaryHead`.
        use_regions: indices of the regions in the set vector; all when None. [0] is "upper only".
        fixed_scores: count every frame as 1 although the head is there (test-time ablation).
        bn_momentum: of the auxiliary heads.

    Raises:
        ValueError: outputs of `quality`, `use_regions` or `aux_grids` do not fit.
    """

    def __init__(
        self,
        trunk: Trunk,
        quality: Quality,
        num_classes: int | None = None,
        regions: Sequence[float] = (3, 2, 2),
        auxiliary: bool = True,
        aux_grids: Sequence[Sequence[int]] = ((4, 4), (2, 2)),
        use_regions: Sequence[int] | None = None,
        fixed_scores: bool = False,
        bn_momentum: float = 0.1,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.quality = quality
        self.pool = RegionPool(regions)
        if quality.outputs not in (1, self.pool.count):
            raise ValueError(
                f"quality gives {quality.outputs} scores, need 1 or {self.pool.count} "
                f"for regions={list(regions)}"
            )
        self.use_regions = self._chosen(use_regions)
        self.fixed_scores = fixed_scores
        self.classifier = None if num_classes is None else classifier(trunk.channels, num_classes)
        heads: list[nn.Module] = []
        if auxiliary and num_classes is not None and trunk.tap_channels:
            taps = zip(trunk.tap_channels, self._grids(aux_grids), strict=True)
            heads = [AuxiliaryHead(width, num_classes, g, bn_momentum) for width, g in taps]
        self.auxiliary = nn.ModuleList(heads)

    @property
    def regions(self) -> int:
        """Regions of the set vector."""
        return len(self.use_regions)

    @property
    def channels(self) -> int:
        """Channels of a region feature; the set vector has regions * channels entries."""
        return self.trunk.channels

    @property
    def dimensions(self) -> int:
        """Entries of the set vector."""
        return self.regions * self.channels

    def forward(
        self,
        image_STCHW: Tensor,
        valid_ST: Tensor | None = None,
        boundaries_STE: Tensor | None = None,
    ) -> SetOutput:
        """Set vectors (S, R*C), frame logits and scores.

        In evaluation mode padding frames have no influence. In training they would enter the
        batch statistics and the frame logits, so training sets should be full.

        Args:
            image_STCHW: normalised frames.
            valid_ST: False on padding.
            boundaries_STE: inner region edges per frame as fractions of the height; the
                constructor's when None.

        Raises:
            ValueError: `fixed_scores` in training, or shapes that do not fit.
        """
        if self.training and self.fixed_scores:
            raise ValueError("fixed_scores=True is a test-time switch; train with ConstantQuality")
        sets, frames = image_STCHW.shape[:2]
        edge_BE = None if boundaries_STE is None else boundaries_STE.flatten(0, 1)
        out, region_BRC, score_BQ = self._features(image_STCHW.flatten(0, 1), edge_BE)
        region_STRC = region_BRC.unflatten(0, (sets, frames))
        score_STR = score_BQ.unflatten(0, (sets, frames))
        vector_SD = set_vector(aggregate(region_STRC, score_STR, valid_ST))
        logits: tuple[Tensor, ...] = ()
        if self.classifier is not None:
            logits = (self.classifier(out.map_BCHW.mean(dim=(2, 3))),)
        if self.training:
            pairs = zip(self.auxiliary, out.taps, strict=False)
            logits += tuple(head(tap_BCHW) for head, tap_BCHW in pairs)
        return SetOutput(vector_SD, logits, score_STR)

    def frames(self, image_BCHW: Tensor, boundaries_BE: Tensor | None = None) -> FrameOutput:
        """Region features (B, R, C) and scores (B, R), for streaming over whole tracklets."""
        _, region_BRC, score_BQ = self._features(image_BCHW, boundaries_BE)
        return FrameOutput(region_BRC, score_BQ.expand(-1, self.regions))

    def _features(
        self, image_BCHW: Tensor, boundaries_BE: Tensor | None
    ) -> tuple[TrunkOutput, Tensor, Tensor]:
        out = self.trunk(image_BCHW)
        score_BQ = self.quality(image_BCHW, out.pool2_BCHW)
        region_BRC = self.pool(out.map_BCHW, boundaries_BE)
        if self.fixed_scores:
            score_BQ = score_BQ.new_ones(score_BQ.shape)
        if self.regions < self.pool.count:
            region_BRC = region_BRC[:, self.use_regions]
            score_BQ = score_BQ[:, self.use_regions] if score_BQ.shape[1] > 1 else score_BQ
        return out, region_BRC, score_BQ

    def _chosen(self, use_regions: Sequence[int] | None) -> list[int]:
        every = list(range(self.pool.count))
        chosen = every if use_regions is None else sorted(set(use_regions))
        if not chosen or not set(chosen) <= set(every):
            raise ValueError(f"use_regions={use_regions}: need some of {every}")
        return chosen

    def _grids(self, aux_grids: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        if len(aux_grids) != len(self.trunk.tap_channels):
            raise ValueError(
                f"aux_grids={aux_grids}: need one (rows, columns) per tap, "
                f"{len(self.trunk.tap_channels)} in all"
            )
        return aux_grids
