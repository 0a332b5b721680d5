"""Cross entropy of margined cosines in one B x C buffer, over all ranks that share the classes.

The product of features and centres is the only matrix of its size. In the forward pass it is
overwritten, a block of rows at a time while the block is in the cache, by the gradient of the loss
by the cosines; the backward pass has two products left to do. With c the cosines, u and v of
`face_lfr.margins`, eps the smoothing and C all classes of all ranks,

    z[y] = s * u(c[y]),    z[j] = s * v(c[j], u),
    loss = mean_i(logsumexp_j z - (1 - eps) * z[y] - eps / C * sum_j z[j]).

Ranks exchange the target cosines (every margin needs them everywhere), then the greatest logits,
then the sums: three messages of B or 2 B numbers.

Letters: B images of the global batch, D embedding width, C classes (of this rank in shapes), K
sub-centres, b rows of a block.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from face_lfr.margins import AdaCos, Margin
from face_lfr.ops import margin_softmax_blocked as blocked
from face_lfr.ops.margin_softmax_blocked import Task

IMPLEMENTATIONS = ("auto", "reference", "blocked", "triton")


def margin_softmax(
    feature_BD: Tensor, weight_CD: Tensor, label_B: Tensor, margin: Margin, scale: float, *,
    smoothing: float = 0.0, centers: int = 1, bias_C: Tensor | None = None,
    group: td.ProcessGroup | None = None, first: int = 0, classes: int | None = None,
    impl: str = "auto",
) -> Tensor:  # fmt: skip
    """Mean cross entropy of margined logits; float32 at least, also inside autocast.

    With a group all ranks give the same features and labels, each its own classes, and all get the
    same loss. The gradient of the weights is then exact; that of the features is the share of this
    rank's classes, and the sum over the ranks is the whole. A margin with a state is updated.

    Args:
        feature_BD: rows of unit length (of any length where the margin is not `normalised`).
        weight_CD: centres of this rank's classes, likewise; with K sub-centres (C * K, D), those
            of a class one after another, of which the nearest counts.
        label_B: int64 class numbers in [0, classes), whichever rank has the class.
        margin: see `face_lfr.margins`.
        scale: s, above 0; margins with a scale of their own do not use it.
        smoothing: eps in [0, 1), spread evenly over all classes.
        centers: K.
        bias_C: added to the products, for the plain softmax.
        group: ranks that share the classes.
        first: number of this rank's first class.
        classes: classes of all ranks; needed with a group.
        impl: `reference` is plain PyTorch (one process); `blocked` is described above; `triton`
            are CUDA kernels; `auto` is `triton` on CUDA where it is installed, else `blocked`.

    Returns:
        Scalar; 0 with a graph when B is 0.

    Raises:
        ValueError: shapes, types or values that do not fit, or a label outside [0, classes). On
            CUDA labels are not looked at, as that would stop the queue: the loss is NaN instead.
    """
    task = _task(
        weight_CD, classes, margin=margin, scale=scale, smoothing=smoothing, centers=centers,
        group=group, first=first, impl=impl,
    )  # fmt: skip
    _check(feature_BD, weight_CD, label_B, task)
    wide = torch.promote_types(feature_BD.dtype, weight_CD.dtype)
    wide = torch.promote_types(wide, torch.float32)
    bias_C = None if bias_C is None else bias_C.to(wide)
    inputs = (feature_BD.to(wide), weight_CD.to(wide), bias_C)
    with _full_precision(feature_BD.device):
        if impl == "reference":
            return margin_softmax_reference(
                inputs[0], inputs[1], label_B, margin, scale,
                smoothing=smoothing, centers=centers, bias_C=bias_C,
            )  # fmt: skip
        needed = any(tensor is not None and tensor.requires_grad for tensor in inputs)
        differentiated = needed and torch.is_grad_enabled()
        loss: Tensor = _MarginSoftmax.apply(*inputs, label_B, task, differentiated)
    return loss


def margin_softmax_reference(
    feature_BD: Tensor, weight_CD: Tensor, label_B: Tensor, margin: Margin, scale: float, *,
    smoothing: float = 0.0, centers: int = 1, bias_C: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The same in plain operators, for one process, in the type of its inputs.

    Logits are written with their value and, times c - detach(c), their derivative.
    """
    cosine_BC = F.linear(feature_BD, weight_CD, bias_C)
    if centers > 1:
        cosine_BC = cosine_BC.unflatten(1, (-1, centers)).max(dim=2).values
    label_B1 = label_B[:, None]
    cosine_B = cosine_BC.gather(1, label_B1)[:, 0]
    constant_BC, constant_B = cosine_BC.detach(), cosine_B.detach()
    margin.observe(constant_B)
    target = margin.target(constant_B)
    value_BC, slope_BC = margin.negatives(constant_BC, target)
    moved_BC = cosine_BC - constant_BC
    logit_BC = value_BC + (moved_BC if slope_BC is None else slope_BC * moved_BC)
    logit_B = target.value + target.slope * (cosine_B - constant_B)
    factor: float | Tensor = scale
    if isinstance(margin, AdaCos):
        factor = margin.current(cosine_BC.shape[1]).to(constant_BC)
        others_BC = (factor * constant_BC).scatter(1, label_B1, -torch.inf)
        factor = margin.rescaled(factor, others_BC.logsumexp(dim=1), constant_B)
    score_BC = (factor * logit_BC.scatter(1, label_B1, logit_B[:, None])).log_softmax(dim=1)
    kept_B = (1 - smoothing) * score_BC.gather(1, label_B1)[:, 0]
    loss_B = -kept_B - smoothing * score_BC.mean(dim=1)
    return loss_B.sum() / max(len(loss_B), 1)


class _MarginSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, feature_BD: Tensor, weight_CD: Tensor, bias_C: Tensor | None, label_B: Tensor,
        task: Task, differentiated: bool,
    ) -> Tensor:  # fmt: skip
        cosine_BC = feature_BD @ weight_CD.t()
        if bias_C is not None:
            cosine_BC += bias_C
        loss_B = _overwrite(cosine_BC, label_B, task, differentiated)
        if differentiated:
            ctx.save_for_backward(feature_BD, weight_CD, cosine_BC)
        return loss_B.sum() / max(len(loss_B), 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        feature_BD, weight_CD, gradient_BC = ctx.saved_tensors
        need_feature, need_weight, need_bias = ctx.needs_input_grad[:3]
        with _full_precision(feature_BD.device):
            return (
                (gradient_BC @ weight_CD).mul_(upstream) if need_feature else None,
                gradient_BC.t() @ (feature_BD * upstream) if need_weight else None,
                gradient_BC.sum(dim=0).mul_(upstream) if need_bias else None,
                None, None, None,
            )  # fmt: skip


def _overwrite(cosine_BC: Tensor, label_B: Tensor, task: Task, differentiated: bool) -> Tensor:
    """Losses of the rows; the cosines become their gradient, or are lost."""
    if not len(label_B):
        return cosine_BC.new_empty(0)
    rows = blocked.prepare(cosine_BC, label_B, task)
    if not _use_triton(task.impl, cosine_BC):
        return blocked.losses(cosine_BC, rows, task, differentiated)
    from face_lfr.ops import margin_softmax_triton as kernels

    stats = blocked.joined(kernels.statistics(cosine_BC, rows, task), rows.scale, task)
    if differentiated:
        kernels.gradient(cosine_BC, rows, stats, task)
    return blocked.row_losses(rows, stats, task)


@cache
def _triton_runs_on(device: int) -> bool:
    """Triton is installed and knows the device."""
    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (7, 0)


def _use_triton(impl: str, x: Tensor) -> bool:
    if impl == "triton" and find_spec("triton") is None:
        raise ValueError("impl='triton': triton is not installed")
    return impl == "triton" or (impl == "auto" and x.is_cuda and _triton_runs_on(x.get_device()))


def _full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast; nothing on a device that has none."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _task(weight_CD: Tensor, classes: int | None, **given: Any) -> Task:
    """The arguments that are no tensors, checked."""
    task = Task(classes=-1 if classes is None else classes, **given)
    own, rest = divmod(len(weight_CD), max(task.centers, 1))
    if task.centers < 1 or rest:
        raise ValueError(f"centers={task.centers}: need a divisor of {len(weight_CD)} weight rows")
    if not 0 <= task.smoothing < 1:
        raise ValueError(f"smoothing={task.smoothing}: need a number in [0, 1)")
    if not task.scale > 0:
        raise ValueError(f"scale={task.scale}: need a number above 0")
    if task.impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={task.impl!r}: need one of {', '.join(IMPLEMENTATIONS)}")
    if task.group is None:
        if task.first or classes not in (None, own):
            raise ValueError(f"first={task.first}, classes={classes}: need a group, else 0, {own}")
        return task._replace(classes=own)
    if task.impl == "reference":
        raise ValueError("impl='reference': one process only, need no group")
    if not 0 <= task.first <= task.first + own <= task.classes:
        raise ValueError(f"first={task.first}, classes={classes}: need room for {own} classes")
    return task


def _check(feature_BD: Tensor, weight_CD: Tensor, label_B: Tensor, task: Task) -> None:
    shapes = f"feature {tuple(feature_BD.shape)}, weight {tuple(weight_CD.shape)}"
    if feature_BD.dim() != 2 or weight_CD.dim() != 2 or feature_BD.shape[1] != weight_CD.shape[1]:
        raise ValueError(f"{shapes}: need (B, D) and (C, D)")
    if not (feature_BD.is_floating_point() and weight_CD.is_floating_point()):
        raise ValueError(f"feature {feature_BD.dtype}, weight {weight_CD.dtype}: need floats")
    if label_B.dtype != torch.int64 or label_B.shape != feature_BD.shape[:1]:
        raise ValueError(
            f"label is {label_B.dtype} {tuple(label_B.shape)}, need int64 ({len(feature_BD)},)"
        )
    if len(label_B) and not task.classes:
        raise ValueError(f"{shapes}: need at least one class")
    if not label_B.is_cuda and len(label_B):
        low, high = (int(bound) for bound in label_B.aminmax())
        if low < 0 or high >= task.classes:
            wrong = low if low < 0 else high
            raise ValueError(f"label {wrong}: need a class in [0, {task.classes})")
