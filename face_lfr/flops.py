"""Cost of a network in three ways of counting, and the bound of the challenge.

- `organiser`: the counter of the ICCV 2019 lightweight face recognition challenge (insightface,
  arcface_mxnet/common/flops_counter.py): a convolution without bias costs
  (2 Cin kh kw - 1) Hout Wout Cout / groups (whole input channels even when there are groups, result
  rounded down), with bias 2 Cin kh kw Hout Wout Cout / groups; a linear layer 2 in out, less out
  without bias. A transposed convolution, which that tool leaves out and its authors asked to
  add, costs two operations a multiplication here.
- `mac`: multiplications with addition; half of what others call FLOPs.
- `cost4`: 2 mac + 4 operations for each output of a convolution; reproduces the costs printed in
  arXiv 1909.00632 (28.25 G, 24.12 G).

Norms, activations, pools, resizing and additions are free. One forward pass of one image counts;
the pass of the mirrored image is free by the rules though it doubles the work.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._python_dispatch import TorchDispatchMode

from common.log import InputError
from face_lfr.models.poly_blocks import (
    A_TO_B,
    B_TO_C,
    BLOCK_A,
    BLOCK_B,
    BLOCK_C,
    STEM_END,
    STEM_HALF,
    STEM_MIDDLE,
    STEM_START,
    Branches,
    Conv,
    last_side,
    scaled,
)

MODES = ("organiser", "mac", "cost4")
COUNTED = (_ConvNd, nn.Linear)
FREE = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.PReLU)
# Operations that multiply matrices: outside a counted layer they would go unseen.
PRODUCTS = ("convolution", "mm", "addmm", "bmm", "baddbmm", "linear", "einsum")


class Cost(NamedTuple):
    """Cost of a part in the three ways of counting."""

    organiser: int = 0
    mac: int = 0
    cost4: int = 0

    def plus(self, other: "Cost", times: int = 1) -> "Cost":
        """This cost and `times` the other."""
        return Cost(*(a + times * b for a, b in zip(self, other, strict=True)))


class Layer(NamedTuple):
    """One call of a counted layer: its name and class, the shape of its output, its cost."""

    name: str
    kind: str
    output: tuple[int, ...]
    cost: Cost


def conv_cost(inputs: int, outputs: int, kernel: int, pixels: int, groups: int, bias: bool) -> Cost:
    """Cost of a convolution.

    Args:
        inputs: channels of its input, of all groups together.
        outputs: channels of its output.
        kernel: positions of its kernel (9 for 3x3).
        pixels: of the output map.
        groups: of the convolution.
        bias: whether it has one.
    """
    mac = inputs * outputs * kernel * pixels // groups
    each = 2 * inputs * kernel - (not bias)
    organiser = each * pixels * outputs // groups
    return Cost(organiser, mac, 2 * mac + 4 * outputs * pixels)


def linear_cost(inputs: int, outputs: int, bias: bool) -> Cost:
    """Cost of a linear layer for one row."""
    mac = inputs * outputs
    return Cost(2 * mac - (0 if bias else outputs), mac, 2 * mac)


def count(model: nn.Module, input_size: int, mode: str = "organiser") -> int:
    """Operations of one image (1, 3, input_size, input_size) through the model.

    Raises:
        ValueError: no such mode, or what `report` refuses.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: need one of {MODES}")
    return sum(int(getattr(layer.cost, mode)) for layer in report(model, input_size))


def require(
    model: nn.Module, bound_gflops: float, input_size: int, mode: str = "organiser"
) -> float:
    """The model's cost in GFLOPs, which the bound allows.

    Raises:
        InputError: it costs more than the bound.
        ValueError: what `count` refuses.
    """
    gflops = count(model, input_size, mode) / 1e9
    if gflops > bound_gflops:
        what = f"costs {gflops:.3f} G ({mode}) at {input_size} px, the bound is"
        raise InputError("model", what, f"{bound_gflops:g} G")
    return gflops


def report(model: nn.Module, input_size: int) -> list[Layer]:
    """Every call of a counted layer, in the order of the calls; nothing is computed.

    Raises:
        ValueError: a layer with parameters that is not known, or a product of matrices outside the
            known layers; they are named.
    """
    _refuse_unknown(model)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    shapes = {name: value.detach().to("meta") for name, value in tensors}
    image = torch.empty(1, 3, input_size, input_size, device="meta")
    if shapes:
        image = image.to(next((x.dtype for x in shapes.values() if x.is_floating_point()), None))
    recorder = _Recorder()
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(_evaluating(model))
        for name, module in model.named_modules():
            for handle in recorder.hooks(name, module):
                stack.callback(handle.remove)
        stack.enter_context(recorder)
        torch.func.functional_call(model, shapes, (image,))
    return recorder.layers


class _Recorder(TorchDispatchMode):
    """Notes the cost of every counted layer; refuses products of matrices anywhere else."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[Layer] = []
        self.running: list[tuple[str, nn.Module]] = []

    def hooks(self, name: str, module: nn.Module) -> list[Any]:
        def enter(_: nn.Module, __: Any) -> None:
            self.running.append((name, module))

        def leave(_: nn.Module, inputs: Any, output: Any) -> None:
            self.running.pop()
            if isinstance(module, COUNTED):
                kind, shape = type(module).__name__, tuple(output.shape)
                self.layers.append(Layer(name, kind, shape, _cost(module, inputs[0], output)))

        return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operation = func.overloadpacket.__name__
        counted = self.running and isinstance(self.running[-1][1], COUNTED)
        if not counted and (operation in PRODUCTS or "attention" in operation):
            where = self.running[-1] if self.running else ("", nn.Module())
            raise ValueError(
                f"{operation} in {where[0] or 'the model'} ({type(where[1]).__name__}) is no layer "
                "whose cost is known"
            )
        return func(*args, **(kwargs or {}))


def _cost(module: nn.Module, x: Tensor, y: Tensor) -> Cost:
    if isinstance(module, nn.Linear):
        one = linear_cost(module.in_features, module.out_features, module.bias is not None)
        return Cost().plus(one, y[..., 0].numel())
    if not isinstance(module, _ConvNd):
        raise TypeError(f"{type(module).__name__} is not counted")
    kernel = module.weight[0, 0].numel()
    inputs, outputs = module.in_channels, module.out_channels
    if isinstance(module, _ConvTransposeNd):
        mac = inputs * outputs * kernel * x[0, 0].numel() // module.groups
        return Cost(2 * mac, mac, 2 * mac + 4 * y[0].numel())
    bias = module.bias is not None
    return conv_cost(inputs, outputs, kernel, y[0, 0].numel(), module.groups, bias)


def _refuse_unknown(model: nn.Module) -> None:
    unknown = [
        f"{name or 'the model itself'} ({type(module).__name__})"
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
        and not isinstance(module, (*COUNTED, *FREE))
    ]
    if unknown:
        raise ValueError(f"layers with parameters whose cost is not known: {', '.join(unknown)}")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class Part(NamedTuple):
    """Parameters and cost of a part of PolyFace."""

    params: int
    cost: Cost


def closed_form(
    blocks: Sequence[int], size: int, features: int, width: float = 1.0
) -> dict[str, int]:
    """Parameters and cost of Efficient PolyFace without building it.

    Args:
        blocks: of the stages A, B and C.
        size: H = W of the input in pixels.
        features: width D of the embedding.
        width: multiple of the published channels.

    Returns:
        `params` and the three modes.

    Raises:
        ValueError: a size that PolyFace cannot have.
    """
    parts = closed_form_parts(size, features, width)
    counts = dict.fromkeys(parts, 1) | dict(zip("abc", blocks, strict=True))
    params, cost = 0, Cost()
    for name, part in parts.items():
        params += counts[name] * part.params
        cost = cost.plus(part.cost, counts[name])
    return {"params": params, **cost._asdict()}


def closed_form_parts(size: int, features: int, width: float = 1.0) -> dict[str, Part]:
    """Stem, one block of each stage (`a`, `b`, `c`), the reductions, and the head.

    Raises:
        ValueError: a size that PolyFace cannot have.
    """
    f = last_side(size)
    side_a, side_b = 4 * f + 3, 2 * f + 1
    stem, channels_a = _stem(size, width)
    channels_b = A_TO_B.scaled(width).channels + channels_a
    channels_c = B_TO_C.scaled(width).channels + channels_b
    inputs = channels_c * f * f
    head = Part(2 * channels_c + (inputs + 1) * features, linear_cost(inputs, features, True))
    return {
        "stem": stem,
        "a": _block(BLOCK_A, channels_a, side_a, width),
        "a_to_b": _branched(A_TO_B.scaled(width), channels_a, side_a),
        "b": _block(BLOCK_B, channels_b, side_b, width),
        "b_to_c": _branched(B_TO_C.scaled(width), channels_b, side_b),
        "c": _block(BLOCK_C, channels_c, f, width),
        "head": head,
    }


def _stem(size: int, width: float) -> tuple[Part, int]:
    first, second, third = (_wide(conv, width) for conv in STEM_START)
    half, end, middle = _wide(STEM_HALF, width), _wide(STEM_END, width), STEM_MIDDLE.scaled(width)
    parts, inputs, side = [], 3, size
    for conv in (first, second, third):
        parts.append(_conv(inputs, conv, side))
        inputs, side = conv.channels, conv.side(side)
    parts.append(_conv(inputs, half, side))
    inputs, side = inputs + half.channels, half.side(side)
    parts.append(_branched(middle, inputs, side))
    parts.append(_conv(middle.channels, end, side - 2))
    return _sum(parts), middle.channels + end.channels


def _block(branches: Branches, channels: int, side: int, width: float) -> Part:
    wide = branches.scaled(width)
    closing = _conv(wide.channels, Conv(channels, (1, 1)), side)
    return _sum([_branched(wide, channels, side), closing])


def _branched(branches: Branches, inputs: int, side: int) -> Part:
    parts = [_conv(inputs, conv, side) for conv in branches.direct]
    for entry, tail in zip(branches.entry, branches.tails, strict=True):
        parts.append(_conv(inputs, Conv(entry, (1, 1)), side))
        channels, now = entry, side
        for conv in tail:
            parts.append(_conv(channels, conv, now))
            channels, now = conv.channels, conv.side(now)
    return _sum(parts)


def _conv(inputs: int, conv: Conv, side: int) -> Part:
    """A convolution and its norm."""
    kernel, pixels = conv.kernel[0] * conv.kernel[1], conv.side(side) ** 2
    params = inputs * conv.channels * kernel + 2 * conv.channels
    return Part(params, conv_cost(inputs, conv.channels, kernel, pixels, groups=1, bias=False))


def _wide(conv: Conv, width: float) -> Conv:
    return conv._replace(channels=scaled(conv.channels, width))


def _sum(parts: Sequence[Part]) -> Part:
    cost = Cost()
    for part in parts:
        cost = cost.plus(part.cost)
    return Part(sum(part.params for part in parts), cost)
