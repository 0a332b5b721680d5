"""Batch norm of detectors: frozen and folded into its convolution, or over all ranks.

A frozen norm is y = x * scale + shift with constants that do not depend on x, so that a
convolution followed by it is one convolution with the weight `weight * scale` and the bias `shift`.
That saves one pass over every feature map, and in training the memory of the map in between;
gradients reach the convolution, the scale and the shift as before.

Letters: B batch, C channels, H W size, N ranks.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

NORMS = ("frozen", "batch", "sync")


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose statistics never change; `model.train()` does not switch it on.

    Scale and shift stay parameters that can be trained, as in mmdetection's `norm_eval=True`; the
    state dict is that of `nn.BatchNorm2d`.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        super().train(False)

    def train(self, mode: bool = True) -> "FrozenBatchNorm2d":
        """Stays in evaluation mode, whatever the mode of the model."""
        return super().train(False)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Scale (C,) and shift (C,) of y = x * scale + shift, differentiable in the affine."""
        if self.running_mean is None or self.running_var is None:
            raise ValueError("track_running_stats=False: a frozen norm needs statistics")
        scale_C = self.weight * (self.running_var + self.eps).rsqrt()
        return scale_C, torch.addcmul(self.bias, self.running_mean, scale_C, value=-1)


def convolve(x_BCHW: Tensor, conv: nn.Conv2d, norm: nn.Module) -> Tensor:
    """norm(conv(x)); with a frozen norm as one convolution.

    The folded weight is made in the type of the parameters, so that autocast rounds it once.
    Hooks of `conv` and `norm` do not run when they are folded.
    """
    if not isinstance(norm, FrozenBatchNorm2d) or conv.bias is not None:
        return norm(conv(x_BCHW))
    scale_C, shift_C = norm.scale_and_shift()
    return conv._conv_forward(x_BCHW, conv.weight * scale_C.view(-1, 1, 1, 1), shift_C)


def convolve_all(x_BCHW: Tensor, layers: Iterable[nn.Module]) -> Tensor:
    """Run layers one after the other, every convolution together with the norm after it."""
    pending: nn.Conv2d | None = None
    for layer in layers:
        if pending is not None and isinstance(layer, _BatchNorm):
            x_BCHW, pending = convolve(x_BCHW, pending, layer), None
            continue
        if pending is not None:
            x_BCHW, pending = pending(x_BCHW), None
        if isinstance(layer, nn.Conv2d):
            pending = layer
        else:
            x_BCHW = layer(x_BCHW)
    return x_BCHW if pending is None else pending(x_BCHW)


class _GatherOverRanks(torch.autograd.Function):
    """Rows of all ranks (N, ...); the gradient of a row is the sum over ranks."""

    @staticmethod
    def forward(ctx: Any, row: Tensor) -> Tensor:
        parts = [torch.empty_like(row) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, row.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total[dist.get_rank()]


class CrossRankBatchNorm2d(nn.BatchNorm2d):
    """Batch norm with the mean and variance of the batches of all ranks, on any backend.

    `nn.SyncBatchNorm` needs CUDA; this one also runs on gloo. One exchange in each direction; the
    means and squared deviations of the ranks are joined in float32, which does not cancel where
    the mean is large. Ranks may have different batch sizes. On one rank and in evaluation mode it
    is exactly `nn.BatchNorm2d`.
    """

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Normalised input of the same shape and type (collective in training).

        Raises:
            ValueError: not four dimensions, or one value per channel over all ranks.
        """
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(x_BCHW)
        self._check_input_dim(x_BCHW)
        x = x_BCHW.to(torch.promote_types(x_BCHW.dtype, torch.float32))
        with torch.autocast(x.device.type, enabled=False):
            mean_C, var_C, count = _joint_statistics(x)
            self._track(mean_C.detach(), var_C.detach(), count.detach())
            y = (x - mean_C.view(1, -1, 1, 1)) * (var_C + self.eps).rsqrt().view(1, -1, 1, 1)
            if self.affine:
                y = y * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)
        return y.to(x_BCHW.dtype)

    @torch.no_grad()
    def _track(self, mean_C: Tensor, var_C: Tensor, count: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        share: Any = self.momentum
        if share is None:
            share = 1.0 / float(self.num_batches_tracked)  # type: ignore[arg-type]
        unbiased_C = var_C * (count / (count - 1))
        self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), share)
        self.running_var.lerp_(unbiased_C.to(self.running_var.dtype), share)


def _joint_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (C,), biased variance (C,) and number of values per channel over all ranks."""
    own = x.numel() // x.shape[1]
    mean_C = x.mean(dim=(0, 2, 3)) if own else x.sum(dim=(0, 2, 3))
    deviation_C = (x - mean_C.view(1, -1, 1, 1)).square().sum(dim=(0, 2, 3))
    rows = _GatherOverRanks.apply(torch.cat([x.new_tensor([float(own)]), mean_C, deviation_C]))
    count_N1, means_NC, deviations_NC = rows.split([1, x.shape[1], x.shape[1]], dim=1)
    count = count_N1.sum()
    if own <= 1 and count.item() <= 1:  # the device is waited for only where it may matter
        raise ValueError(f"one value per channel over all ranks, input {tuple(x.shape)}")
    joint_C = (means_NC * count_N1).sum(dim=0) / count
    between_C = ((means_NC - joint_C).square() * count_N1).sum(dim=0)
    return joint_C, (deviations_NC.sum(dim=0) + between_C) / count, count


def freeze_bn(model: nn.Module) -> nn.Module:
    """The model with every 2-d batch norm frozen for good (itself, if it is one).

    Parameters and buffers stay the same tensors, and the parameters keep taking gradients.
    """
    return _replace(model, FrozenBatchNorm2d)


def use_sync_bn(model: nn.Module, device: torch.device | None = None) -> nn.Module:
    """The model with every live 2-d batch norm replaced by a cross-rank one (itself, if it is one).

    Frozen norms stay. Parameters and buffers stay the same tensors. Call before DDP wraps the
    model.

    Args:
        model: changed in place.
        device: where the model will run: on CUDA the norms become `nn.SyncBatchNorm`, elsewhere,
            and without a device, `CrossRankBatchNorm2d`.
    """
    on_cuda = device is not None and device.type == "cuda"
    return _replace(model, nn.SyncBatchNorm if on_cuda else CrossRankBatchNorm2d)


def set_norm(model: nn.Module, norm: str) -> nn.Module:
    """The model with norms "frozen", "batch" (live, per rank) or "sync" (live, over ranks).

    Raises:
        ValueError: another name.
    """
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r}: need one of {NORMS}")
    if norm == "batch":
        return model
    return freeze_bn(model) if norm == "frozen" else use_sync_bn(model)


def _replace(module: nn.Module, kind: type[_BatchNorm]) -> nn.Module:
    """Swap the class of every live batch norm; parameters and buffers stay the same tensors."""
    if isinstance(module, (kind, FrozenBatchNorm2d)):
        return module
    if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        new = kind(module.num_features, module.eps, module.momentum, affine=False)
        new.affine, new.track_running_stats = module.affine, module.track_running_stats
        new.weight, new.bias = module.weight, module.bias
        new.running_mean, new.running_var = module.running_mean, module.running_var
        new.num_batches_tracked = module.num_batches_tracked
        return new.train(module.training)
    for name, child in module.named_children():
        setattr(module, name, _replace(child, kind))
    return module
