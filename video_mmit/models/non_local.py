"""Non-local blocks: attention over all positions of a clip (arXiv 1711.07971).

As in X-Temporal and temporal-shift-module: no division by the root of the width, keys and values
max-pooled in space, batch norm that starts at zero.

Letters: N videos, T frame positions, B = N*T frames (N-major), C channels, I = C/2 inner channels,
H W size, h w size after pooling, P = T*H*W queries, Q = T*h*w keys.
"""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from video_mmit.models.tsm import TemporalPool

MODES = ("embedded", "dot", "gaussian")
RESNET50_BLOCKS = {"layer2": (0, 2), "layer3": (0, 2, 4)}


class NonLocal(nn.Module):
    """x + BN(W(y)), y the mean of g(x) over all positions of the clip, weighted by similarity.

    Frames stay folded into the batch; only the attention itself sees clips. The 1x1 convolutions
    are linear layers on the channels, so that the block fits into networks of any memory format.

    Args:
        channels: C, even.
        mode: "embedded": softmax of theta(x) . phi(x); "dot": the product itself, divided by the
            number of keys; "gaussian": softmax of x . x, without theta and phi.
        pool: max-pool keys and values by 2 in space.

    Raises:
        ValueError: an unknown mode, or an odd number of channels.
    """

    def __init__(self, channels: int, mode: str = "embedded", pool: bool = True) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: need one of {MODES}")
        if channels < 2 or channels % 2:
            raise ValueError(f"channels={channels}: need an even number")
        self.mode, self.pool = mode, pool
        if mode != "gaussian":
            self.theta = nn.Linear(channels, channels // 2)
            self.phi = nn.Linear(channels, channels // 2)
        self.g = nn.Linear(channels, channels // 2)
        self.out = nn.Linear(channels // 2, channels)
        self.norm = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)  # the block starts as the identity
        nn.init.zeros_(self.norm.bias)

    def forward(self, x_BCHW: Tensor, num_segments: int) -> Tensor:
        """The maps (B, C, H, W) after attention within each clip of `num_segments` frames.

        Raises:
            ValueError: B is no multiple of `num_segments`.
        """
        if x_BCHW.shape[0] % num_segments:
            raise ValueError(
                f"batch of {x_BCHW.shape[0]} frames is no multiple of num_segments={num_segments}"
            )
        x_BHWC = x_BCHW.permute(0, 2, 3, 1)
        query, key = x_BHWC, x_BHWC
        if self.mode != "gaussian":
            query, key = self.theta(x_BHWC), self.phi(x_BHWC)
        query_NPI = _tokens(query, num_segments)
        key_NQI = _tokens(self._pooled(key), num_segments)
        value_NQI = _tokens(self._pooled(self.g(x_BHWC)), num_segments)
        y_NPI = self._attend(query_NPI, key_NQI, value_NQI)
        y_BHWI = y_NPI.reshape(*x_BHWC.shape[:3], y_NPI.shape[2])
        return x_BCHW + self.norm(self.out(y_BHWI).permute(0, 3, 1, 2))

    def _attend(self, query_NPI: Tensor, key_NQI: Tensor, value_NQI: Tensor) -> Tensor:
        if self.mode == "dot":  # the sum over keys first: no (P, Q) matrix
            return query_NPI @ (key_NQI.mT @ value_NQI / key_NQI.shape[1])
        # With a dimension of one head: ONNX and the fused CUDA kernels take nothing else.
        query_N1PI, key_N1QI, value_N1QI = (x[:, None] for x in (query_NPI, key_NQI, value_NQI))
        return F.scaled_dot_product_attention(query_N1PI, key_N1QI, value_N1QI, scale=1.0)[:, 0]

    def _pooled(self, x_BHWC: Tensor) -> Tensor:
        if not self.pool:
            return x_BHWC
        return F.max_pool2d(x_BHWC.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)


class NonLocalFrames(nn.Module):
    """A residual block on folded frames, then a non-local block."""

    def __init__(self, block: nn.Module, non_local: NonLocal, num_segments: int) -> None:
        super().__init__()
        self.block, self.non_local, self.num_segments = block, non_local, num_segments

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Maps (B, C, H, W) of B = N * `num_segments` frames."""
        return self.non_local(self.block(x_BCHW), self.num_segments)


class NonLocalClip(nn.Module):
    """A residual block on clips, then a non-local block."""

    def __init__(self, block: nn.Module, non_local: NonLocal) -> None:
        super().__init__()
        self.block, self.non_local = block, non_local

    def forward(self, x_NCTHW: Tensor) -> Tensor:
        """Maps (N, C, T, H, W)."""
        x_NTCHW = self.block(x_NCTHW).transpose(1, 2)
        x_BCHW = self.non_local(x_NTCHW.flatten(0, 1), x_NTCHW.shape[1])
        return x_BCHW.unflatten(0, x_NTCHW.shape[:2]).transpose(1, 2)


def add_non_local(
    backbone: nn.Module,
    num_segments: int | None,
    blocks: Mapping[str, Sequence[int]] | None = None,
    mode: str = "embedded",
    pool: bool = True,
) -> None:
    """Put a non-local block after some residual blocks of a backbone, in place.

    Args:
        backbone: frame or clip network with stages `layer1`, ... of residual blocks.
        num_segments: T of a frame network; a clip network needs none.
        blocks: indices of the residual blocks by stage; None is ResNet-50's layer2[0, 2] and
            layer3[0, 2, 4].
        mode: see `NonLocal`.
        pool: see `NonLocal`.

    Raises:
        ValueError: a stage or block that is not there, or a frame network without `num_segments`.
    """
    for name, indices in (RESNET50_BLOCKS if blocks is None else blocks).items():
        stage = getattr(backbone, name, None)
        if not isinstance(stage, nn.Module):
            raise ValueError(f"blocks names the stage {name!r}, which the backbone does not have")
        slots = _slots(stage)
        wrong = [index for index in indices if not 0 <= index < len(slots)]
        if wrong:
            raise ValueError(f"blocks[{name!r}] has {wrong}, the stage has {len(slots)} blocks")
        for index in indices:
            parent, key = slots[index]
            block = parent.get_submodule(key)
            frames = _frames_at(backbone, block, num_segments)
            parent.add_module(key, _with_non_local(block, frames, mode, pool))


def _frames_at(backbone: nn.Module, block: nn.Module, num_segments: int | None) -> int | None:
    """T at a block: half of it behind a temporal pool."""
    before = takewhile(lambda module: module is not block, backbone.modules())
    pools = sum(isinstance(module, TemporalPool) for module in before)
    return None if num_segments is None else num_segments >> pools


def _slots(stage: nn.Module) -> list[tuple[nn.Module, str]]:
    """Parent and name of every residual block of a stage, also when something wraps the stage."""
    found: list[tuple[nn.Module, str]] = []
    for name, child in stage.named_children():
        if isinstance(stage, nn.Sequential) and not isinstance(child, nn.Sequential):
            found += [(stage, name)] if _residual(child) is not None else []
        else:
            found += _slots(child)
    return found


def _residual(module: nn.Module) -> nn.Module | None:
    """The residual block in a module that may wrap it."""
    return next((inner for inner in module.modules() if hasattr(inner, "bn2")), None)


def _with_non_local(block: nn.Module, num_segments: int | None, mode: str, pool: bool) -> nn.Module:
    inner: Any = _residual(block)
    channels = getattr(inner, "bn3", inner.bn2).num_features  # of the block's last norm
    non_local = NonLocal(channels, mode, pool)
    if not isinstance(inner.conv2, nn.Conv2d):
        return NonLocalClip(block, non_local)
    if num_segments is None:
        raise ValueError("num_segments=None: non-local blocks of a frame network need a number")
    return NonLocalFrames(block, non_local, num_segments)


def _tokens(x_BHWC: Tensor, num_segments: int) -> Tensor:
    """Positions of each clip in a row: (N, T*H*W, C)."""
    return x_BHWC.unflatten(0, (-1, num_segments)).flatten(1, 3)
