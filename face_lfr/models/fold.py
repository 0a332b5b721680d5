"""A network for inference: batch norm folded away, parallel 1x1 convolutions merged.

Both change a network only by rounding. Folding takes the running statistics, so the result is for
evaluation alone. A norm follows its layer (`folds` of the module's class), or stands in front of a
linear layer of a whole flattened map (`folds_ahead`). What stays:

- the norm in front of a padded convolution (first of a block of IResNet and of the quality
  network): the zeros of the padding are added after it;
- the last norm of PolyFace, which its `embed` leaves out;
- the norms of PolyNet's poly-3 modules, whose convolutions have one each order.

Letters: I inputs, O outputs, C channels.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from face_lfr.models.poly_blocks import ParallelConvs


def folded(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode with folded norms and merged convolutions; it takes no gradients.

    Raises:
        ValueError: a norm without running statistics.
    """
    model = merged(model)
    for module in list(model.modules()):
        for layer, norm in getattr(module, "folds_ahead", ()):
            _fold_ahead(module, layer, norm)
        for layer, norm in getattr(module, "folds", ()):
            _fold(module, layer, norm)
    return model.eval().requires_grad_(False)


def merged(model: nn.Module) -> nn.Module:
    """A copy in which the 1x1 convolutions of one input are one (`ParallelConvs`)."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, ParallelConvs) and len(module.convs) > 1:
            _merge(module)
    return model


def _merge(parallel: ParallelConvs) -> None:
    parts: list[Any] = list(parallel.convs)
    whole = copy.deepcopy(parts[0])
    whole.conv.out_channels = whole.norm.num_features = sum(parallel.outputs)
    for layer, names in (
        ("conv", ("weight",)),
        ("norm", ("weight", "bias", "running_mean", "running_var")),
    ):
        for name in names:
            tensors = [getattr(getattr(part, layer), name) for part in parts]
            joined: Tensor = torch.cat([tensor.detach() for tensor in tensors])
            if isinstance(tensors[0], nn.Parameter):
                joined = nn.Parameter(joined, tensors[0].requires_grad)
            setattr(getattr(whole, layer), name, joined)
    parallel.convs = nn.ModuleList([whole])


def _affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,) of a norm in evaluation, float64."""
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("a norm without running statistics cannot be folded")
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach().double()


def _fold(module: nn.Module, layer_name: str, norm_name: str) -> None:
    """norm(W x + b) = (scale W) x + scale b + shift."""
    layer, norm = getattr(module, layer_name), getattr(module, norm_name)
    if not isinstance(norm, _BatchNorm):
        return
    scale_O, shift_O = _affine(norm)
    weight = layer.weight.detach().double()
    bias_O = torch.zeros_like(scale_O) if layer.bias is None else layer.bias.detach().double()
    _set(layer, weight * scale_O.view(-1, *[1] * (weight.dim() - 1)), scale_O * bias_O + shift_O)
    setattr(module, norm_name, nn.Identity())


def _fold_ahead(module: nn.Module, norm_name: str, layer_name: str) -> None:
    """W flatten(scale x + shift) + b = (W scale) flatten(x) + W shift + b, per channel."""
    layer, norm = getattr(module, layer_name), getattr(module, norm_name)
    if not isinstance(norm, _BatchNorm):
        return
    scale_C, shift_C = _affine(norm)
    weight_OI = layer.weight.detach().double()
    repeats = weight_OI.shape[1] // len(scale_C)  # pixels of the map
    scale_I, shift_I = (x.repeat_interleave(repeats) for x in (scale_C, shift_C))
    bias_O = weight_OI @ shift_I
    if layer.bias is not None:
        bias_O = bias_O + layer.bias.detach().double()
    _set(layer, weight_OI * scale_I, bias_O)
    setattr(module, norm_name, nn.Identity())


def _set(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    old = layer.weight
    assert isinstance(old, Tensor)
    layout = torch.preserve_format
    layer.weight = nn.Parameter(weight.to(old.dtype, memory_format=layout))
    layer.bias = nn.Parameter(bias.to(old.dtype))
