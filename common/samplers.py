"""Samplers whose position survives a restart, also on another number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from common.log import InputError


class ResumableSampler(Sampler[int]):
    """Endless sampler for training; its whole state is the count of samples all ranks consumed.

    Position p of the stream is entry p mod length of the permutation of epoch p // length, a
    function of (seed, epoch) alone; rank r of W takes every W-th position. So the samples of a
    step do not depend on the rank count as long as the global batch stays the same.

    The loop that trains advances `consumed` by the global batch after every step. The iterator
    does not: a DataLoader with workers runs ahead of the training. A new iterator starts at
    `consumed`, so restore the state before the first `iter`.

    Args:
        length: samples in an epoch, at least 1; without shuffling up to 2**62 at no cost.
        seed: of the permutations.
        rank: of this process, in [0, world).
        world: number of processes.
        shuffle: False yields position mod length.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self, length: int, *, seed: int = 0, rank: int = 0, world: int = 1, shuffle: bool = True
    ):
        _check(length, rank, world, least=1)
        self.length, self.seed, self.rank, self.world = length, seed, rank, world
        self.shuffle = shuffle
        self.consumed = 0
        self._epoch: int | None = None
        self._order = np.empty(0, dtype=np.int64)

    def __iter__(self) -> Iterator[int]:
        position = self.consumed + self.rank
        while True:
            epoch, entry = divmod(position, self.length)
            yield int(self._permutation(epoch)[entry]) if self.shuffle else entry
            position += self.world

    def _permutation(self, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._epoch, self._order = (
                epoch,
                torch.randperm(self.length, generator=generator).numpy(),
            )
        return self._order

    def state_dict(self) -> dict[str, int]:
        """The position, and what it depends on."""
        return {"consumed": self.consumed, "length": self.length, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a state of any rank count.

        Raises:
            InputError: the state belongs to another data set length or seed.
        """
        for name in ("length", "seed"):
            if state[name] != getattr(self, name):
                what = f"differs from the checkpoint, which has {state[name]}"
                raise InputError(f"sampler.{name}", what, getattr(self, name))
        self.consumed = int(state["consumed"])


class EvalSampler(Sampler[int]):
    """Contiguous shares of 0..length-1, one a rank: disjoint, in order, nothing padded.

    Sizes differ by at most one; with fewer samples than ranks some shares are empty.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, length: int, rank: int = 0, world: int = 1):
        _check(length, rank, world, least=0)
        self.share = range(length * rank // world, length * (rank + 1) // world)

    def __iter__(self) -> Iterator[int]:
        return iter(self.share)

    def __len__(self) -> int:
        return len(self.share)


def _check(length: int, rank: int, world: int, least: int) -> None:
    if length < least:
        raise ValueError(f"length={length} must be at least {least}")
    if not 0 <= rank < world:
        raise ValueError(f"rank={rank} must be in [0, world={world})")
