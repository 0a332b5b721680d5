"""What every recogniser asks of the clip it is given.

Letters: N videos, T frame positions, C channels, H W size.
"""

from torch import Tensor


def check_clip(x_NTCHW: Tensor, channels: int, num_segments: int | None = None) -> None:
    """Refuse a clip of another shape before its frames are folded together.

    A folded batch no longer tells frames from videos: with a wrong T the temporal modules would
    mix videos without any error.

    Args:
        x_NTCHW: the clip.
        channels: C that is needed.
        num_segments: T that is needed; None accepts any.

    Raises:
        ValueError: another number of dimensions, of channels or of frames.
    """
    shape = tuple(x_NTCHW.shape)
    if x_NTCHW.dim() != 5:
        raise ValueError(f"clip has {x_NTCHW.dim()} dimensions {shape}, need 5: (N, T, C, H, W)")
    if shape[2] != channels:
        raise ValueError(f"clip (N, T, C, H, W) = {shape} has C={shape[2]}, need C={channels}")
    if num_segments is not None and shape[1] != num_segments:
        raise ValueError(
            f"clip (N, T, C, H, W) = {shape} has T={shape[1]}, the model was built with "
            f"num_segments={num_segments}"
        )
    if shape[1] < 1:
        raise ValueError(f"clip (N, T, C, H, W) = {shape} has no frame")
