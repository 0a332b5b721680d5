"""Temporal relations between ordered subsets of frames (TRN, arXiv 1711.08496).

Sizes, first weights and sampling of subsets as in TRN-pytorch.

Letters: N videos, T frame positions, D feature width, E bottleneck width, K classes, s frames of
a subset, M drawn subsets.
"""

from itertools import combinations
from math import comb

import torch
from torch import Tensor, nn


class TRN(nn.Module):
    """Frame features (N, T, D) -> logits (N, K).

    A linear layer D -> E, then for every scale s = T, T-1, ..., 2 an MLP on the concatenated
    features of s frames in order; the logits of all scales and subsets are summed. Each scale
    takes at most `subsets` of its subsets: drawn anew at every forward in training, from the
    global generator of the features' device; in evaluation evenly spaced in the order of
    `itertools.combinations`, so that two runs agree.

    Args:
        features: D.
        num_classes: K.
        num_segments: T, at least 2.
        multi_scale: False has the scale T alone, with a wider MLP (512).
        bottleneck: E.
        subsets: most subsets of one scale.
        stochastic_eval: draw subsets in evaluation as well, as the published code does.

    Raises:
        ValueError: fewer than two frames, no subset.
    """

    def __init__(
        self,
        features: int,
        num_classes: int,
        num_segments: int,
        multi_scale: bool = True,
        bottleneck: int = 256,
        subsets: int = 3,
        stochastic_eval: bool = False,
    ) -> None:
        super().__init__()
        if num_segments < 2:
            raise ValueError(f"num_segments={num_segments}: a relation needs at least 2 frames")
        if subsets < 1:
            raise ValueError(f"subsets={subsets}: need at least 1")
        self.num_segments, self.subsets = num_segments, subsets
        self.stochastic_eval = stochastic_eval
        self.reduce = nn.Linear(features, bottleneck)
        nn.init.normal_(self.reduce.weight, std=0.001)
        nn.init.zeros_(self.reduce.bias)
        self.scales = list(range(num_segments, 1 if multi_scale else num_segments - 1, -1))
        hidden = 256 if multi_scale else 512
        self.relations = nn.ModuleList(
            nn.Sequential(
                nn.ReLU(),
                nn.Linear(scale * bottleneck, hidden),
                nn.ReLU(),
                nn.Linear(hidden, num_classes),
            )
            for scale in self.scales
        )
        for scale in self.scales:
            every_Ms = torch.tensor(list(combinations(range(num_segments), scale)))
            self.register_buffer(f"every_{scale}", every_Ms, persistent=False)
            self.register_buffer(f"even_{scale}", every_Ms[self._even(scale)], persistent=False)

    def forward(self, x_NTD: Tensor) -> Tensor:
        """Logits (N, K), at least float32.

        Raises:
            ValueError: T is not `num_segments`.
        """
        if x_NTD.shape[1] != self.num_segments:
            raise ValueError(
                f"features (N, T, D) = {tuple(x_NTD.shape)} have T={x_NTD.shape[1]}, the "
                f"relations were built for num_segments={self.num_segments}"
            )
        x_NTE = self.reduce(x_NTD)
        logits = []
        for scale, relation in zip(self.scales, self.relations, strict=True):
            subset_NMsE = x_NTE[:, self.frames(scale)]
            logits_NMK = relation(subset_NMsE.flatten(2))
            precise = torch.promote_types(logits_NMK.dtype, torch.float32)
            logits.append(logits_NMK.to(precise).sum(dim=1))
        return torch.stack(logits).sum(dim=0)

    def frames(self, scale: int) -> Tensor:
        """Frame positions (M, s) of the subsets that a forward takes at one scale."""
        if self.training or self.stochastic_eval:
            every_Ms: Tensor = getattr(self, f"every_{scale}")
            count = every_Ms.shape[0]
            if count > self.subsets:
                drawn = torch.randperm(count, device=every_Ms.device)[: self.subsets]
                return every_Ms[drawn]
        return getattr(self, f"even_{scale}")

    def _even(self, scale: int) -> list[int]:
        """Numbers of at most `subsets` subsets: the middles of equal parts of the list."""
        count, wanted = comb(self.num_segments, scale), self.subsets
        if count <= wanted:
            return list(range(count))
        return [(2 * j + 1) * count // (2 * wanted) for j in range(wanted)]
