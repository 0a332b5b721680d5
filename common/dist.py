"""Processes: the torchrun environment decides; everything works in one process without it."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor

from common.log import InputError


@dataclass(frozen=True)
class World:
    """Where this process stands among its peers."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0


def init(device: str = "auto", timeout_s: float = 600.0) -> World:
    """Join the group described by the torchrun environment, or stay alone without one.

    A job of Hydra's submitit launcher with several tasks is such a group as well.

    Args:
        device: "auto" (a GPU when there is one), "cpu", "cuda" (the GPU of the local rank) or a
            torch device. NCCL serves CUDA, gloo serves the CPU.
        timeout_s: seconds after which a collective that a peer never joins raises.

    Raises:
        InputError: the device is unknown or not present.
    """
    if "submitit" in sys.modules and "RANK" not in os.environ:
        _adopt_submitit()
    target = _device(device)
    if target.type == "cuda":
        torch.cuda.set_device(target)
    if "RANK" in os.environ and not td.is_initialized():
        cuda = target.type == "cuda"
        td.init_process_group(
            "nccl" if cuda else "gloo",
            timeout=timedelta(seconds=timeout_s),
            device_id=target if cuda else None,
        )
    return World(rank(), size(), target)


def _adopt_submitit() -> None:
    """Give the tasks of a submitit job the names torchrun uses; it starts the ranks itself."""
    from submitit import JobEnvironment
    from submitit.helpers import TorchDistributedEnvironment

    try:
        tasks = JobEnvironment().num_tasks
    except RuntimeError:  # imported, but this process is none of its jobs
        return
    if tasks > 1:
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        target = torch.device(name)
    except RuntimeError as error:
        raise InputError("device", "is not a torch device", name) from error
    if target.type != "cuda":
        return target
    if target.index is None:
        target = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if target.index >= torch.cuda.device_count():
        raise InputError("device", f"only {torch.cuda.device_count()} GPUs are visible", target)
    return target


def shutdown() -> None:
    """Leave the group, if there is one."""
    if td.is_initialized():
        td.destroy_process_group()


def rank() -> int:
    """Rank of this process; 0 without a group."""
    return td.get_rank() if td.is_initialized() else 0


def size() -> int:
    """Number of processes; 1 without a group."""
    return td.get_world_size() if td.is_initialized() else 1


def barrier() -> None:
    """Wait until every rank is here."""
    if size() > 1:
        td.barrier()


def gather_objects(item: Any) -> list[Any]:
    """The item of every rank, on every rank, in rank order. Items travel pickled."""
    if size() == 1:
        return [item]
    items: list[Any] = [None] * size()
    td.all_gather_object(items, item)
    return items


def broadcast_object(item: Any, src: int = 0) -> Any:
    """The item of rank `src`, on every rank."""
    if size() == 1:
        return item
    box = [item]
    td.broadcast_object_list(box, src=src)
    return box[0]


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on at least one rank; the same answer on every rank."""
    if size() == 1:
        return flag
    votes = torch.tensor([int(flag)], dtype=torch.int32, device=_transport())
    td.all_reduce(votes, op=td.ReduceOp.MAX)
    return bool(votes.item())


def together(action: Callable[[], Any], main_only: bool = False) -> Any:
    """Run `action` on every rank, or the main one alone; returns the main rank's result.

    An exception on one rank is raised on all of them, so none waits for a rank that gave up: the
    rank itself raises its own, the others an OSError, an InputError or a RuntimeError like it.
    """
    result, error = None, None
    if rank() == 0 or not main_only:
        try:
            result = action()
        except Exception as failed:
            error = failed
    outcomes = gather_objects((result if rank() == 0 else None, _portable(error)))
    if error is not None:
        raise error
    for _, other in outcomes:
        if other is not None:
            raise other
    return outcomes[0][0]


def _portable(error: Exception | None) -> Exception | None:
    """An exception that can be pickled."""
    if error is None or isinstance(error, InputError):
        return error
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror, error.filename)
    return RuntimeError(f"{type(error).__name__}: {error}")


def mean_over_ranks(values: Mapping[str, float]) -> dict[str, float]:
    """Mean of each number over the ranks, in float64, the same on every rank.

    Raises:
        ValueError: the ranks do not hold the same keys (on every rank, so none waits).
    """
    rows = gather_objects({key: float(value) for key, value in values.items()})
    if any(row.keys() != rows[0].keys() for row in rows):
        raise ValueError(f"keys differ between ranks: {[sorted(row) for row in rows]}")
    # The same rows in the same order: the sum cannot depend on the rank that takes it.
    return {key: sum(row[key] for row in rows) / len(rows) for key in values}


def gather_rows(tensor: Tensor) -> Tensor:
    """Rows of all ranks joined along dimension 0, in rank order, on every rank.

    Any dtype, any number of rows a rank, none included; a rank without rows need not know the
    trailing shape or the dtype. The result lies on the device of the input and has no gradient.

    Raises:
        ValueError: the non-empty shares differ in trailing shape or dtype, or one has no
            dimension 0 (on every rank, so none waits).
    """
    shares = gather_objects((tuple(tensor.shape), tensor.dtype))
    if any(not shape for shape, _ in shares):
        raise ValueError("tensor must have a dimension 0 to gather rows along")
    kinds = {(shape[1:], dtype) for shape, dtype in shares if shape[0]}
    if len(kinds) > 1:
        raise ValueError(f"rows differ between ranks in shape or dtype: {shares}")
    trailing, dtype = kinds.pop() if kinds else (shares[0][0][1:], shares[0][1])
    if len(shares) == 1:
        return tensor.detach()
    counts = [shape[0] for shape, _ in shares]
    width = math.prod(trailing) * dtype.itemsize
    # Bytes, because neither gloo nor NCCL carries every dtype; padded, because it wants one size.
    mine = torch.zeros(max(counts), width, dtype=torch.uint8, device=_transport())
    if tensor.numel():
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        mine[: tensor.shape[0]] = flat.reshape(-1, width)
    parts = [torch.empty_like(mine) for _ in shares]
    td.all_gather(parts, mine)
    joined = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
    return joined.reshape(-1).view(dtype).reshape(sum(counts), *trailing).to(tensor.device)


def _transport() -> torch.device:
    """The device whose tensors the backend of the group carries."""
    if td.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@contextmanager
def main_first() -> Iterator[None]:
    """Run the body on the main rank, then on the others (prepare a cache once, read it often)."""
    if rank() != 0:
        barrier()
    try:
        yield
    finally:
        # Also when the body raised: the others must not wait for the timeout.
        if rank() == 0:
            barrier()
