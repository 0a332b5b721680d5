"""ASTPN baseline: Xu et al., "Jointly Attentive Spatial-Temporal Pooling Networks", ICCV 2017.

Letters: S sets, T frames of a set, C channels, H W frame size, D embedding, N draws of three
sets, P pairs, Q queries with T frames, G gallery sets with U frames.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from reid_rqen.models.cnn_rnn import FrameCNN, Recurrence, embed_frames, frame_mask
from reid_rqen.models.output import SetOutput


def attentive_pool(
    left_PTD: Tensor, right_PUD: Tensor, weight_DD: Tensor, valid_PT: Tensor, valid_PU: Tensor
) -> tuple[Tensor, Tensor]:
    """Pooled vectors (P, D) of both members of each pair; they depend on each other.

    A = tanh(L W R^T); a frame's weight is the softmax over its sequence of its best match in the
    other sequence (row and column maxima of A). Padding is neither matched nor weighed.
    """
    affinity_PTU = torch.tanh(left_PTD @ weight_DD @ right_PUD.transpose(1, 2))
    hidden_PTU = ~(valid_PT[:, :, None] & valid_PU[:, None, :])
    affinity_PTU = affinity_PTU.masked_fill(hidden_PTU, -torch.inf)
    # A padding frame's maximum is -inf already, so its softmax weight is 0.
    weight_PT = affinity_PTU.amax(dim=2).softmax(dim=1)
    weight_PU = affinity_PTU.amax(dim=1).softmax(dim=1)
    left_PD = torch.einsum("pt,ptd->pd", weight_PT, left_PTD)
    return left_PD, torch.einsum("pu,pud->pd", weight_PU, right_PUD)


class ASTPN(nn.Module):
    """CNN-RNN with a spatial pyramid for the third pool and mutual attention for the mean.

    A set has no vector of its own: every (query, gallery) pair is pooled again, so evaluation
    needs `pair_distance`, Q*G attentions. `vector_SD` of the output is a set pooled against
    itself, which the authors' released test code uses; with it the usual distances apply.

    Args:
        num_classes: K; None drops the classifier.
        in_channels: 5, or 3 without optical flow.
        widths: of the convolutions.
        embedding: D.
        dropout: in the frame CNN.
        rnn_dropout: in the recurrence.
        frame: rows and columns of a frame.
        pyramid: sides of the max-pooling grids.
    """

    def __init__(
        self,
        num_classes: int | None = None,
        in_channels: int = 5,
        widths: Sequence[int] = (16, 32, 32),
        embedding: int = 128,
        dropout: float = 0.6,
        rnn_dropout: float = 0.6,
        frame: Sequence[int] = (56, 40),
        pyramid: Sequence[int] = (8, 4, 2, 1),
    ) -> None:
        super().__init__()
        self.cnn = FrameCNN(in_channels, widths, embedding, dropout, frame, pyramid)
        self.rnn = Recurrence(embedding, rnn_dropout)
        bound = 1 / embedding
        self.weight_DD = nn.Parameter(torch.empty(embedding, embedding).uniform_(-bound, bound))
        self.classifier = None if num_classes is None else nn.Linear(embedding, num_classes)

    @property
    def dimensions(self) -> int:
        """Entries of a frame state."""
        return self.cnn.fc.out_features

    def sequences(self, image_STCHW: Tensor, valid_ST: Tensor | None = None) -> Tensor:
        """Frame states (S, T, D), the input of `pair_distance`; padding rows are meaningless."""
        valid_ST = frame_mask(image_STCHW, valid_ST)
        return self.rnn(embed_frames(self.cnn, image_STCHW, valid_ST))

    def forward(
        self,
        image_STCHW: Tensor,
        valid_ST: Tensor | None = None,
        boundaries_STE: Tensor | None = None,
    ) -> SetOutput:
        """Self-pooled vectors; in training also the pairs of each draw and their logits.

        `boundaries_STE` is ignored.

        Raises:
            ValueError: in training, S is no multiple of 3 (anchor, positive, negative).
        """
        valid_ST = frame_mask(image_STCHW, valid_ST)
        state_STD = self.rnn(embed_frames(self.cnn, image_STCHW, valid_ST))
        own_SD, _ = attentive_pool(state_STD, state_STD, self.weight_DD, valid_ST, valid_ST)
        if not self.training:
            logits = () if self.classifier is None else (self.classifier(own_SD),)
            return SetOutput(own_SD, logits)
        pairs = self._pairs(state_STD, valid_ST)
        logits = () if self.classifier is None else (self.classifier(torch.cat(pairs)),)
        return SetOutput(own_SD, logits, pairs=pairs)

    def _pairs(self, state_STD: Tensor, valid_ST: Tensor) -> tuple[Tensor, Tensor]:
        sets = len(state_STD)
        if sets % 3:
            raise ValueError(f"{sets} sets: need (anchor, positive, negative) for every draw")
        anchor_N = torch.arange(0, sets, 3, device=state_STD.device)
        left_P = torch.cat([anchor_N, anchor_N])
        right_P = torch.cat([anchor_N + 1, anchor_N + 2])
        return attentive_pool(
            state_STD[left_P],
            state_STD[right_P],
            self.weight_DD,
            valid_ST[left_P],
            valid_ST[right_P],
        )

    def pair_distance(
        self,
        query_QTD: Tensor,
        valid_QT: Tensor,
        gallery_GUD: Tensor,
        valid_GU: Tensor,
        chunk: int = 1024,
    ) -> Tensor:
        """Euclid distances (Q, G) of the pair-dependent vectors, `chunk` pairs at a time."""
        queries, gallery = len(query_QTD), len(gallery_GUD)
        distance = query_QTD.new_empty(queries * gallery)
        for start in range(0, len(distance), chunk):
            pair_P = torch.arange(start, min(start + chunk, len(distance)), device=distance.device)
            q_P, g_P = pair_P // gallery, pair_P % gallery
            left_PD, right_PD = attentive_pool(
                query_QTD[q_P], gallery_GUD[g_P], self.weight_DD, valid_QT[q_P], valid_GU[g_P]
            )
            distance[pair_P] = torch.linalg.vector_norm(left_PD - right_PD, dim=1)
        return distance.view(queries, gallery)
