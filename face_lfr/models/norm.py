"""Batch norm over all ranks, and frozen batch norm.

A rank that holds a few large faces has noisy statistics. `use_sync_bn` takes them over all ranks,
`freeze_bn` keeps the running ones.

Letters: B batch, C channels.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose gradient is the all-reduce of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total


class _AnyShapeBatchNorm(_BatchNorm):
    """Batch norm of (B, C) and (B, C, ...) inputs; the keys of the state dict stay."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"input has {input.dim()} dimensions, need (B, C, ...)")


class CrossRankBatchNorm(_AnyShapeBatchNorm):
    """Batch norm with the mean and variance of the batches of all ranks, on any backend.

    `nn.SyncBatchNorm` needs CUDA; this one also runs on gloo. Two passes (mean, then squared
    deviations) in float32. On one rank and in evaluation mode it is exactly `nn.BatchNorm2d`.
    Ranks may have different batch sizes.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalised input of the same shape and type (collective in training).

        Raises:
            ValueError: one value per channel over all ranks.
        """
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(x)
        self._check_input_dim(x)
        dims = [0, *range(2, x.dim())]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        x32 = x.to(torch.promote_types(x.dtype, torch.float32))
        with torch.autocast(x.device.type, enabled=False):
            count = _SumOverRanks.apply(x32.new_tensor([x32.numel() / x32.shape[1]]))
            if count.item() <= 1:
                raise ValueError(f"one value per channel over all ranks, input {tuple(x.shape)}")
            mean_C = _SumOverRanks.apply(x32.sum(dim=dims)) / count
            centred = x32 - mean_C.view(shape)
            var_C = _SumOverRanks.apply(centred.square().sum(dim=dims)) / count
            self._track(mean_C.detach(), var_C.detach(), float(count))
            y = centred * (var_C + self.eps).rsqrt().view(shape)
            if self.affine:
                y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean_C: Tensor, var_C: Tensor, count: float) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        share = self.momentum
        if share is None:
            share = 1.0 / float(self.num_batches_tracked)  # type: ignore[arg-type]
        self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), share)
        self.running_var.lerp_((var_C * count / (count - 1)).to(self.running_var.dtype), share)


class FrozenBatchNorm(_AnyShapeBatchNorm):
    """Batch norm that always uses, and never changes, its running statistics."""

    def forward(self, x: Tensor) -> Tensor:
        """Input normalised with the running statistics, in training too."""
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


def use_sync_bn(model: nn.Module, device: torch.device | None = None) -> nn.Module:
    """The model with every batch norm replaced by a cross-rank one (itself, if it is one).

    Parameters and buffers stay the same tensors. Call before DDP wraps the model.

    Args:
        model: changed in place.
        device: where the model will run, by default where its first parameter is: on CUDA the
            norms become `nn.SyncBatchNorm`, elsewhere `CrossRankBatchNorm`.
    """
    if device is None:
        parameter = next(model.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return _replace(model, CrossRankBatchNorm)


def freeze_bn(model: nn.Module, affine: bool = True) -> nn.Module:
    """The model with frozen batch norm statistics, whatever `train()` says later.

    Args:
        model: changed in place.
        affine: keep training scale and shift. False freezes them too and must come before DDP
            wraps the model and before the optimizer is made.
    """
    model = _replace(model, FrozenBatchNorm)
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm) and module.affine and not affine:
            module.weight.requires_grad_(False)
            module.bias.requires_grad_(False)
    return model


def _replace(module: nn.Module, kind: type[_AnyShapeBatchNorm]) -> nn.Module:
    """Swap the class of every batch norm; parameters and buffers stay the same tensors."""
    if isinstance(module, kind):
        return module
    if isinstance(module, _BatchNorm):
        new = kind(module.num_features, module.eps, module.momentum, affine=False)
        new.affine, new.track_running_stats = module.affine, module.track_running_stats
        new.weight, new.bias = module.weight, module.bias
        new.running_mean, new.running_var = module.running_mean, module.running_var
        new.num_batches_tracked = module.num_batches_tracked
        return new.train(module.training)
    for name, child in module.named_children():
        setattr(module, name, _replace(child, kind))
    return module
