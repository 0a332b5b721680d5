"""Efficient PolyFace (arXiv 1909.00632): residual inception blocks with stochastic depth.

trojans-face-recognizer (the authors' code), EfficientPolyFace/EfficientPolyFace.py. Differences:
images are cropped, resized and scaled by the transform, not in `forward`; a dropped block has no
gradients instead of frozen weights; the momentum of the two last norms is 0.1 in PyTorch's sense
(theirs is 0.9, which a comment of theirs calls wrong; `head_momentum` is it).

The weights and statistics of the norms are float32 and stay so under autocast: with eps = 1e-10 a
variance in half precision is no protection against division by zero.

Letters: B images, C channels, H W size, D embedding width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from face_lfr.models.layers import FeatureLinear, check_counts, check_input, check_share
from face_lfr.models.poly_blocks import (
    A_TO_B,
    B_TO_C,
    BLOCK_A,
    BLOCK_B,
    BLOCK_C,
    Branches,
    Inception,
    Norm,
    Reduction,
    Stem,
    init_uniform,
    last_side,
)

DROPS = ("batch", "none")
HEAD_EPS = 2e-5


class StochasticDepth(nn.Module):
    """Which blocks a training step runs: one draw per block and step for the whole batch.

    The draw is a function of the seed and the number of training steps so far, which is a buffer:
    it is the same on every rank, and a run that is continued draws as one that was not stopped.

    Args:
        keep: probability that a block runs.
        seed: of the draws.
    """

    forwards: Tensor

    def __init__(self, keep: float, seed: int):
        super().__init__()
        self.keep, self.seed = keep, seed
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))
        # The buffer as a number: reading the buffer would wait for the device in every step.
        self._forwards: int | None = None

    @torch.compiler.disable
    def draw(self, blocks: int) -> list[bool]:
        """Whether each of so many blocks runs in this step; counts the step."""
        if self._forwards is None:
            self._forwards = int(self.forwards)
        uniform = np.random.default_rng((self.seed, self._forwards)).random(blocks)
        self._forwards += 1
        with torch.no_grad():
            self.forwards.fill_(self._forwards)
        return [bool(value < self.keep) for value in uniform]

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._forwards = None


class Stage(nn.ModuleList):
    """Residual blocks x -> ReLU(x + factor f(x)); the first `checkpoints` keep no activations."""

    def __init__(self, blocks: Sequence[nn.Module], checkpoints: int):
        super().__init__(blocks)
        self.checkpoints = checkpoints

    def forward(self, x_BCHW: Tensor, kept: Sequence[bool], factor: float) -> Tensor:
        """Maps of the shape of the input.

        A block that is not kept would be ReLU(x), which is x: what comes in is the output of a
        ReLU, pooled or not.
        """
        x = x_BCHW
        for number, (block, runs) in enumerate(zip(self, kept, strict=True)):
            if runs:
                recompute = number < self.checkpoints and self.training
                y = _recomputed(block, x) if recompute else block(x)
                x = F.relu(torch.add(x, y, alpha=factor), inplace=True)
        return x


def _recomputed(block: nn.Module, x_BCHW: Tensor) -> Tensor:
    """The block, computed again in the backward pass."""

    def contexts() -> tuple[Any, Any]:
        return nullcontext(), _untracked(block)

    y_BCHW: Tensor = checkpoint(
        block, x_BCHW, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )
    return y_BCHW


@contextmanager
def _untracked(block: nn.Module) -> Iterator[None]:
    """The statistics of a batch count once, though the block runs twice."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    tracked = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, (_, counted) in zip(norms, tracked, strict=True):
        norm.momentum = 0.0
        norm.num_batches_tracked = None if counted is None else torch.zeros_like(counted)
    try:
        yield
    finally:
        for norm, (momentum, counted) in zip(norms, tracked, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, counted


class FlatHead(nn.Module):
    """Norm, dropout of whole channels, and a linear layer on the whole last map."""

    folds_ahead: ClassVar[tuple[tuple[str, str], ...]] = (("norm", "fc"),)

    def __init__(self, channels: int, side: int, features: int, dropout: float, momentum: float):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, HEAD_EPS, momentum)
        self.dropout = nn.Dropout2d(dropout)
        self.fc = FeatureLinear(channels * side * side, features)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Features (B, D)."""
        feature_BD: Tensor = self.fc(self.dropout(self.norm(x_BCHW)).flatten(1))
        return feature_BD


class EfficientPolyFace(nn.Module):
    """Faces (B, 3, H, W) -> features (B, D).

    In training a block is ReLU(x + scale f(x)) with probability `keep`, else it is left out: f does
    not run, its statistics do not change and its parameters get no gradient (`skips_parameters`:
    distributed training must look for unused parameters). In evaluation every block is
    ReLU(x + scale keep f(x)).

    Args:
        blocks: of the stages A, B and C: (10, 20, 10) base, (20, 30, 20) deep, (23, 38, 23) deeper.
        features: D.
        input_size: H = W in pixels, 43 + 32 f or 44 + 32 f.
        width: multiple of the published channels; for small networks, our addition.
        keep: probability that a block runs in a training step.
        scale: of the residual branch.
        bn_momentum: of every norm but the last two, in PyTorch's sense.
        bn_eps: of every norm but the last two, which have 2e-5.
        dropout: share of the channels of the last map that is dropped in training.
        drop: "batch", or "none": every block always runs, and `keep` means nothing.
        merge: compute the parallel 1x1 convolutions of a block as one.
        head_momentum: of the last two norms.
        checkpoints: so many first blocks of each stage compute their activations again in the
            backward pass instead of keeping them.
        seed: of the draws of stochastic depth.

    Raises:
        ValueError: an argument that is not accepted.
    """

    def __init__(
        self,
        blocks: Sequence[int] = (23, 38, 23),
        features: int = 256,
        input_size: int = 235,
        width: float = 1.0,
        keep: float = 0.8,
        scale: float = 0.3,
        bn_momentum: float = 0.1,
        bn_eps: float = 1e-10,
        dropout: float = 0.4,
        drop: str = "batch",
        merge: bool = True,
        head_momentum: float = 0.1,
        checkpoints: Sequence[int] = (0, 0, 0),
        seed: int = 0,
    ):
        super().__init__()
        _check(width, keep, drop, checkpoints)
        blocks = check_counts("blocks", blocks, 3)
        check_counts("features", (features,), 1)
        side = last_side(input_size)
        self.features, self.input_size = features, input_size
        self.scale, self.keep = scale, keep if drop == "batch" else 1.0
        self.skips_parameters = self.keep < 1
        norm: Norm = partial(nn.BatchNorm2d, eps=bn_eps, momentum=bn_momentum)
        make = partial(_stage, width=width, norm=norm, merge=merge)
        self.stem = Stem(width, norm, merge)
        self.stage_a = make(self.stem.channels, BLOCK_A, blocks[0], checkpoints[0])
        self.a_to_b = Reduction(self.stem.channels, A_TO_B.scaled(width), norm, merge)
        self.stage_b = make(self.a_to_b.channels, BLOCK_B, blocks[1], checkpoints[1])
        self.b_to_c = Reduction(self.a_to_b.channels, B_TO_C.scaled(width), norm, merge)
        self.stage_c = make(self.b_to_c.channels, BLOCK_C, blocks[2], checkpoints[2])
        share = check_share("dropout", dropout)
        self.head = FlatHead(self.b_to_c.channels, side, features, share, head_momentum)
        self.last_norm = nn.BatchNorm1d(features, HEAD_EPS, head_momentum, affine=False)
        self.depth = StochasticDepth(self.keep, seed)
        init_uniform(self)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Features (B, D) for training: `feature` of the authors' code, after the last norm.

        Raises:
            ValueError: images of another size or number of channels.
        """
        feature_BD: Tensor = self.last_norm(self.embed(x_BCHW))
        return feature_BD

    def embed(self, x_BCHW: Tensor) -> Tensor:
        """Features (B, D) for comparisons: `feature_nobn` of the authors' code.

        Raises:
            ValueError: images of another size or number of channels.
        """
        check_input(x_BCHW, self.input_size)
        a, b, c = len(self.stage_a), len(self.stage_b), len(self.stage_c)
        drops = self.training and self.keep < 1
        kept = self.depth.draw(a + b + c) if drops else [True] * (a + b + c)
        factor = self.scale if self.training else self.scale * self.keep
        x = self.stage_a(self.stem(x_BCHW), kept[:a], factor)
        x = self.stage_b(self.a_to_b(x), kept[a : a + b], factor)
        x = self.stage_c(self.b_to_c(x), kept[a + b :], factor)
        feature_BD: Tensor = self.head(x)
        return feature_BD


def _check(width: float, keep: float, drop: str, checkpoints: Sequence[int]) -> None:
    if width <= 0:
        raise ValueError(f"width={width}: need a positive number")
    if not 0 < keep <= 1:
        raise ValueError(f"keep={keep}: need a number in (0, 1]")
    if drop not in DROPS:
        raise ValueError(f"drop={drop!r}: need one of {DROPS}")
    if len(checkpoints) != 3 or min(checkpoints) < 0:
        raise ValueError(f"checkpoints={list(checkpoints)}: need three numbers of at least 0")


def _stage(
    channels: int,
    branches: Branches,
    blocks: int,
    checkpoints: int,
    width: float,
    norm: Norm,
    merge: bool,
) -> Stage:
    wide = branches.scaled(width)
    return Stage([Inception(channels, wide, norm, merge) for _ in range(blocks)], checkpoints)
