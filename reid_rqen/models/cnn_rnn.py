"""CNN-RNN baseline: McLaughlin, Martinez del Rincon, Miller, CVPR 2016.

Letters: S sets, T frames of a set, B = S*T frames, C channels (3 YUV + 2 optical flow), H W
frame size (56x40 after the crop), D embedding.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reid_rqen.models.output import SetOutput
from reid_rqen.ops.aggregate import aggregate


class FrameCNN(nn.Module):
    """Three [pad 4, conv 5x5, tanh, max 2x2] blocks and a linear layer with dropout.

    Args:
        in_channels: 5, or 3 without optical flow.
        widths: channels of the three convolutions.
        embedding: D.
        dropout: before the linear layer.
        frame: rows and columns of a frame after cropping.
        pyramid: sides of the max-pooling grids that replace the third max-pool (ASTPN), or ().
    """

    def __init__(
        self,
        in_channels: int = 5,
        widths: Sequence[int] = (16, 32, 32),
        embedding: int = 128,
        dropout: float = 0.6,
        frame: Sequence[int] = (56, 40),
        pyramid: Sequence[int] = (),
    ) -> None:
        super().__init__()
        inputs = [in_channels, *widths[:-1]]
        pairs = zip(inputs, widths, strict=True)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 5, padding=4) for a, b in pairs)
        self.pyramid = tuple(pyramid)
        self.frame = (in_channels, *frame)
        rows, columns = frame
        for _ in widths:
            rows, columns = (rows + 4) // 2, (columns + 4) // 2
        cells = sum(side * side for side in pyramid) if pyramid else rows * columns
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(widths[-1] * cells, embedding)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Embeddings (B, D).

        Raises:
            ValueError: frames of another shape than the constructor's.
        """
        if tuple(image_BCHW.shape[1:]) != self.frame:
            raise ValueError(f"frames are {tuple(image_BCHW.shape[1:])}, need {self.frame}")
        x, last = image_BCHW, len(self.convs) - 1
        for i, conv in enumerate(self.convs):
            x = torch.tanh(conv(x))
            if i < last or not self.pyramid:
                x = F.max_pool2d(x, 2)
        if self.pyramid:
            grids = [F.adaptive_max_pool2d(x, side).flatten(1) for side in self.pyramid]
            return self.fc(self.dropout(torch.cat(grids, dim=1)))
        return self.fc(self.dropout(x.flatten(1)))


class Recurrence(nn.Module):
    """r_t = x_t + W tanh(r_{t-1}), dropout before W; r_0 = x_0 + b with a learned vector b.

    Args:
        embedding: D.
        dropout: before W.
    """

    def __init__(self, embedding: int = 128, dropout: float = 0.6) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.zeros(embedding))
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(embedding, embedding)

    def forward(self, x_STD: Tensor) -> Tensor:
        """All states (S, T, D); later frames never change earlier states."""
        state_SD = x_STD[:, 0] + self.start
        states = [state_SD]
        for x_SD in x_STD[:, 1:].unbind(dim=1):
            state_SD = x_SD + self.fc(self.dropout(torch.tanh(state_SD)))
            states.append(state_SD)
        return torch.stack(states, dim=1)


def frame_mask(image_STCHW: Tensor, valid_ST: Tensor | None) -> Tensor:
    """The mask of real frames, all True when None.

    Raises:
        ValueError: not bool (S, T), or padding anywhere but at the end of a sequence.
    """
    shape = image_STCHW.shape[:2]
    if valid_ST is None:
        return torch.ones(shape, dtype=torch.bool, device=image_STCHW.device)
    if valid_ST.shape != shape or valid_ST.dtype != torch.bool:
        raise ValueError(
            f"valid is {valid_ST.dtype} {tuple(valid_ST.shape)}, need bool {tuple(shape)}"
        )
    if not valid_ST[:, 0].all() or (valid_ST[:, 1:] & ~valid_ST[:, :-1]).any():
        raise ValueError("valid: padding must follow the frames of a sequence, at least one frame")
    return valid_ST


def embed_frames(cnn: Callable[[Tensor], Tensor], image_STCHW: Tensor, valid_ST: Tensor) -> Tensor:
    """Frame embeddings (S, T, D); padding is replaced by zeros first, so NaN there is harmless."""
    image_STCHW = image_STCHW.masked_fill(~valid_ST[..., None, None, None], 0.0)
    return cnn(image_STCHW.flatten(0, 1)).unflatten(0, image_STCHW.shape[:2])


class CNNRNN(nn.Module):
    """Frame CNN, recurrence, mean over the frames, identity classifier.

    Train with `SiameseObjective`; compare with Euclid distance (the embedding has no unit norm).

    Args:
        num_classes: K; None drops the classifier.
        in_channels: 5, or 3 without optical flow.
        widths: of the convolutions.
        embedding: D.
        dropout: in the frame CNN.
        rnn_dropout: in the recurrence.
        frame: rows and columns of a frame.
    """

    metric = "euclid"  # the vector has no unit norm

    def __init__(
        self,
        num_classes: int | None = None,
        in_channels: int = 5,
        widths: Sequence[int] = (16, 32, 32),
        embedding: int = 128,
        dropout: float = 0.6,
        rnn_dropout: float = 0.6,
        frame: Sequence[int] = (56, 40),
    ) -> None:
        super().__init__()
        self.cnn = FrameCNN(in_channels, widths, embedding, dropout, frame)
        self.rnn = Recurrence(embedding, rnn_dropout)
        self.classifier = None if num_classes is None else nn.Linear(embedding, num_classes)

    @property
    def dimensions(self) -> int:
        """Entries of a set vector."""
        return self.cnn.fc.out_features

    def sequences(self, image_STCHW: Tensor, valid_ST: Tensor | None = None) -> Tensor:
        """Set embeddings (S, D); padding (at the end only) has no influence.

        Raises:
            ValueError: see `frame_mask`.
        """
        valid_ST = frame_mask(image_STCHW, valid_ST)
        state_STD = self.rnn(embed_frames(self.cnn, image_STCHW, valid_ST))
        one_ST1 = state_STD.new_ones(*valid_ST.shape, 1)
        return aggregate(state_STD[:, :, None], one_ST1, valid_ST).squeeze(1)

    def forward(
        self,
        image_STCHW: Tensor,
        valid_ST: Tensor | None = None,
        boundaries_STE: Tensor | None = None,
    ) -> SetOutput:
        """Set embeddings and set logits; `boundaries_STE` is ignored."""
        vector_SD = self.sequences(image_STCHW, valid_ST)
        logits = () if self.classifier is None else (self.classifier(vector_SD),)
        return SetOutput(vector_SD, logits)
