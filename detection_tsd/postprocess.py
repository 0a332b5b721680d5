"""From scores and deltas of the regions of one image to its detections.

Letters: R RoIs, K scores with the background at column 0, D detections.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from detection_tsd import boxes
from detection_tsd.data.detection_data import Detections
from detection_tsd.nms import Decode, Kept, adjusted, hard, select, soft

Size = tuple[float, float] | Sequence[Tensor] | Tensor
METHODS: dict[str, Callable[..., Kept]] = {
    "hard": hard,
    "soft_linear": partial(soft, kind="linear"),
    "soft_gaussian": partial(soft, kind="gaussian"),
    "adjusted": adjusted,
}


@dataclass(frozen=True)
class PostProcess:
    """Threshold, suppression within classes, and the best detections of an image.

    Every method gives what it would give on all R x (K - 1) pairs of region and class, although
    only the best pairs are decoded and compared (`nms.select`).

    Attributes:
        score_threshold: a pair must score more. 0 in Sense-X/TSD's configurations, 0.05 in
            mmdetection's; compare rows at one value.
        nms: "hard", "soft_linear", "soft_gaussian" or "adjusted".
        iou: overlap above which a box is suppressed (hard, adjusted) or lowered (linear).
        per_image: detections at most.
        candidates: pairs to begin with; has no influence on the result.
        sigma: of the Gaussian. min_score: of what soft suppression keeps.
    """

    score_threshold: float = 0.0
    nms: str = "hard"
    iou: float = 0.5
    per_image: int = 100
    candidates: int = 4096
    sigma: float = 0.5
    min_score: float = 1e-3

    def __post_init__(self) -> None:
        if self.nms not in METHODS:
            raise ValueError(f"nms={self.nms!r}: one of {sorted(METHODS)} is needed")
        if self.per_image < 1 or self.candidates < 1 or self.sigma <= 0:
            given = f"per_image={self.per_image} candidates={self.candidates} sigma={self.sigma}"
            raise ValueError(f"{given}: must be positive")

    @torch.no_grad()
    def __call__(
        self,
        prob_RK: Tensor,
        delta_RK4: Tensor,
        box_R4: Tensor,
        size: Size,
        stds: Sequence[float] = boxes.STDS,
        plus: float = 0.0,
    ) -> Detections:
        """Detections from deltas; only the pairs that enter the suppression are decoded.

        Args:
            prob_RK: probabilities.
            delta_RK4: of `boxes.encode`'s form; (R, 4 * K) is accepted, and (R, 1, 4) where the
                classes share one box.
            box_R4: what the deltas are relative to.
            size: height and width that boxes are cut at.
            stds: of the deltas.
            plus: see `boxes`; the result is in the same pixels.

        Raises:
            ValueError: a score or a box is NaN.
        """
        delta_RK4 = delta_RK4 if delta_RK4.dim() == 3 else delta_RK4.unflatten(1, (-1, 4))
        shared = delta_RK4.shape[1] == 1

        def decode(roi: Tensor, label: Tensor) -> Tensor:
            delta = delta_RK4[roi, 0 if shared else label].to(torch.float32)
            box = boxes.decode(box_R4[roi].to(torch.float32), delta, stds, plus)
            return boxes.clip_boxes(box, size, plus)

        return self._select(prob_RK, decode, plus)

    @torch.no_grad()
    def decoded(
        self, prob_RK: Tensor, box_RK4: Tensor, size: Size | None = None, plus: float = 0.0
    ) -> Detections:
        """Detections from boxes that are decoded already, such as means over views.

        Args:
            prob_RK: probabilities.
            box_RK4: (R, 1, 4) where the classes share one box.
            size: height and width that boxes are cut at; None leaves them whole.
            plus: see `boxes`.

        Raises:
            ValueError: a score or a box is NaN.
        """
        shared = box_RK4.shape[1] == 1

        def decode(roi: Tensor, label: Tensor) -> Tensor:
            box = box_RK4[roi, 0 if shared else label].to(torch.float32)
            return box if size is None else boxes.clip_boxes(box, size, plus)

        return self._select(prob_RK, decode, plus)

    def _select(self, prob_RK: Tensor, decode: Decode, plus: float) -> Detections:
        settings = {"iou": self.iou, "plus": plus}
        if self.nms != "hard":
            settings |= {"sigma": self.sigma, "min_score": self.min_score}
        found = select(
            prob_RK,
            decode,
            partial(METHODS[self.nms], **settings),
            threshold=self.score_threshold,
            per_image=self.per_image,
            candidates=self.candidates,
            plus=plus,
        )
        return Detections(found.box_D4, found.score_D, found.label_D)
