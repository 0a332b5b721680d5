"""Counts that losses are divided by, when the batch is spread over ranks."""

import torch
import torch.distributed as dist
from torch import Tensor


def over_ranks(count: Tensor | float) -> Tensor:
    """Mean of `count` over the ranks, float32 (float64 stays), without gradient.

    DDP averages gradients: a loss that each rank divides by this mean gives the gradient that one
    process would get from the whole batch. Collective when there is more than one rank; the host
    does not wait for the device.

    Args:
        count: of this rank, any shape: several counts cost one exchange. The result is on the
            device of the tensor; a plain number gives a CPU tensor, which NCCL does not carry.
    """
    mean = torch.as_tensor(count).detach()
    mean = mean.to(torch.promote_types(mean.dtype, torch.float32))
    world = ranks()
    if world > 1:
        mean = mean.clone()
        dist.all_reduce(mean)
        mean = mean / world
    return mean


def divisor(count: Tensor | float) -> Tensor:
    """Mean over the ranks of a number of rows, at least one row in all; see `over_ranks`.

    The bound is on the total: with one row on two ranks the mean is 1/2, and a bound of 1 on it
    would halve the gradient.
    """
    return over_ranks(count).clamp(min=1.0 / ranks())


def ranks() -> int:
    """Processes that train together; 1 without a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
