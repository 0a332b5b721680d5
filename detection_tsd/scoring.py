"""What the trained rows of the synthetic task are worth: AP, and where the heads look.

Letters: T IoU thresholds.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from common import dist
from common.log import InputError
from detection_tsd.data.detection_data import DetectionData
from detection_tsd.data.draws import ImageRows
from detection_tsd.data.synthetic import load_synthetic
from detection_tsd.engine import Detecting, Found, detect
from detection_tsd.metrics.coco import CocoScores, evaluate, read_dataset
from detection_tsd.probe import Probe, probe_detector
from detection_tsd.result_files import coco_results
from detection_tsd.suite import DATA, Job
from detection_tsd.weights import Trained, load_trained


class Measured(NamedTuple):
    """How a trained row does on the unseen images of its data set.

    Attributes:
        scores: of COCO.
        before: AP at nine tenths of the training; how far it has converged.
        probe: where the shifted proposals went; None where the head shifts none.
        parameters: of the trained detector, and of what is used at inference.
    """

    scores: CocoScores
    before: float
    probe: Probe | None
    parameters: tuple[int, int]

    @property
    def ap(self) -> float:
        """AP over all thresholds."""
        return self.scores.summary["AP"]

    @property
    def curve(self) -> np.ndarray:
        """AP at each threshold, (T,)."""
        return np.array(list(self.scores.by_threshold.values()))


def measure(job: Job) -> Measured:
    """Score a finished job.

    Raises:
        InputError: it has no checkpoints.
    """
    trained, data = open_job(job)
    earlier = load_trained(checkpoint=_earlier(job))
    scores = score(trained, data, job.title)
    shifts = getattr(getattr(trained.model, "head", None), "reg_shift", None)
    probe = probe_detector(trained.model, data, trained.transform) if shifts == "prop" else None
    before = score(earlier, data, job.title).summary["AP"]
    return Measured(scores, before, probe, parameters(trained.model))


def open_job(job: Job) -> tuple[Trained, DetectionData]:
    """The newest checkpoint of a job, and the images that it is tested on."""
    trained = load_trained(job.run_dir, device=dist.init().device)
    settings: dict[str, Any] = {"seed": job.seed, **DATA[job.kind][1], **job.sizes}
    return trained, load_synthetic(job.data, "val", **settings)


def _earlier(job: Job) -> Path:
    step = job.steps - max(job.steps // 10, 1)
    folder = job.run_dir / "checkpoints" / f"step_{step:08d}"
    if not folder.is_dir():
        raise InputError(folder, "no checkpoint at nine tenths of the training")
    return folder


def score(trained: Trained, data: DetectionData, title: str) -> CocoScores:
    """AP of a detector on a set with an annotation file."""
    assert data.source is not None
    found = detections(trained, data, title)
    return evaluate(coco_results(found, data, "bbox"), read_dataset(data.source))


def detections(trained: Trained, data: DetectionData, title: str) -> list[Found]:
    """Of all images of a set, in this process."""
    how = Detecting(trained.transform, dist.init(), batch=25)
    return detect(trained.model, ImageRows(data, trained.transform), how, title)


def parameters(model: nn.Module) -> tuple[int, int]:
    """Parameters of a detector in training, and without what only training uses."""
    counts = {name: value.numel() for name, value in model.named_parameters()}
    used = sum(count for name, count in counts.items() if "sibling" not in name.split("."))
    return sum(counts.values()), used
