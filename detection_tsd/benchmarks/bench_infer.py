"""Speed of inference: our Faster R-CNN beside torchvision's, and TSD beside the sibling head.

The group `infer` of `python -m detection_tsd.benchmarks`. Against torchvision both sides have the
same weights, images, numbers of proposals, threshold and precision; detections, and then the
results of every stage, are compared in float32 before anything is timed. TSD and the sibling head
share backbone, RPN and so their proposals; what is compared there is a TSD head with the sibling's
weights and no shift, which computes the same. The ratio of those rows is the sibling's time over
TSD's. Reading, resizing and normalising images are in no row.

Letters: R RoIs, K class scores with the background at column 0.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from detection_tsd.benchmarks.agreement import as_detections, boxes_agree, tensors_agree
from detection_tsd.benchmarks.networks import (
    Call,
    HeadOnly,
    Inference,
    Pair,
    Work,
    clone,
    full_float32,
    like_torchvision,
    no_compiler,
    pair,
    peaks,
    twin,
    usual,
)
from detection_tsd.benchmarks.peer_detector import NAME, Peer, faster_rcnn, features_of
from detection_tsd.benchmarks.results import Row, measure, measured, rates, row
from detection_tsd.data.detection_data import Detections
from detection_tsd.models.detector import Detector, join_rois

BASE = Work()
QUICK = Work(size=(256, 350), proposals=200)
THRESHOLDS = (0.05, 0.0)  # of mmdetection's and torchvision's configurations; of Sense-X/TSD's
LIMIT = 1e-3  # relative, what 50 layers make of float32 rounding
HALF_LIMIT = 0.1  # the same of bfloat16
WANTED = 1.2  # most that TSD may take in times of the sibling detector; about 1.1 in the paper
CUDA_REPEATS = 50


class Bench(NamedTuple):
    """How the rows are measured."""

    work: Work
    precision: str
    repeats: int
    device: torch.device

    def run(self, model: Detector, precision: str | None = None) -> Inference:
        """A detector on the images of the rows."""
        return Inference(model, self.work, self.device, precision or self.precision)

    def shape(self, proposals: list[Tensor]) -> str:
        """Sizes and precision for the table; the proposals are those that the head sees."""
        padded = "x".join(map(str, self.work.padded))
        count = max(len(box_M4) for box_M4 in proposals)
        return f"{self.work.shape} in {padded}, {count} proposals, {self.precision}"

    def row(
        self,
        name: str,
        shape: str,
        peer_name: str,
        sides: tuple[Call, Call],
        difference: float | None,
        note: str = "",
    ) -> Row:
        """Times of both sides after a first call of each, which allocates, and their memory."""
        ours, peer = sides
        ours(), peer()
        timed = measure(ours, peer, self.repeats) | peaks(ours, peer, self.device)
        notes = (note, rates(timed, self.work.images, "images"))
        return measured(name, shape, peer_name, timed, difference, *notes)


def infer_rows(
    repeats: int,
    device: torch.device,
    compile: bool = False,
    quick: bool = False,
    seed: int = 0,
) -> Iterator[Row]:
    """Ours against torchvision's, stage by stage too, and TSD against the sibling head.

    Args:
        repeats: timed calls of each side; at least 50 on CUDA.
        device: where the detectors run.
        compile: also compile the backbone on a CPU, which takes minutes there; on CUDA always.
        quick: smaller images and fewer proposals.
        seed: of weights and images.

    Raises:
        RuntimeError: two sides that should compute the same do not.
    """
    cuda = device.type == "cuda"
    work = (QUICK if quick else BASE)._replace(seed=seed)
    bench = Bench(work, usual(device), max(repeats, CUDA_REPEATS) if cuda else repeats, device)
    yield from torchvision_rows(bench)
    yield from tsd_rows(bench)
    if cuda or compile:
        yield compiled_row(bench)


class Sides(NamedTuple):
    """Ours and torchvision's on the same images, in one precision."""

    ours: Inference
    peer: Peer

    @staticmethod
    def of(ours: Inference) -> Sides:
        """The peer gets our weights."""
        return Sides(ours, Peer(faster_rcnn(ours.model, ours.work), ours))

    def at_threshold(self, threshold: float) -> Sides:
        """With another score threshold of the detections; the peer has one at a time."""
        return Sides(self.ours.at_threshold(threshold), self.peer.at_threshold(threshold))


def torchvision_rows(bench: Bench) -> Iterator[Row]:
    """Whole detectors at both thresholds, in both layouts of the peer, and single stages."""
    model = like_torchvision(bench.work)
    with full_float32():
        exact = Sides.of(bench.run(model, "float32"))
        agreed = {
            at: boxes_agree(f"detections, threshold {at}", *(side() for side in both))
            for at, both in ((at, exact.at_threshold(at)) for at in THRESHOLDS)
        }
        compared = {stage.name: stage.compare() for stage in stages(exact)}
    sides = exact if bench.precision == "float32" else Sides.of(bench.run(model))
    shape = bench.shape(sides.ours.regions()[1])
    name = f"inference, {bench.work.name} sibling"
    for stage in stages(sides):
        gap, note = compared[stage.name]
        stage.ours(), stage.peer()
        timed = measure(stage.ours, stage.peer, bench.repeats)
        yield measured(f"{name}, {stage.name}", shape, NAME, timed, gap, note)
    for layout in ("", ", channels_last"):
        peer = Peer(sides.peer.net, sides.ours, channels_last=bool(layout))
        for threshold, (share, gap) in agreed.items():
            both = Sides(sides.ours, peer).at_threshold(threshold)
            yield bench.row(
                f"{name}, threshold {threshold}", shape, NAME + layout, both, gap,
                f"{share:.0%} of the detections in common",
            )  # fmt: skip


class Stage(NamedTuple):
    """One stage of both sides on equal inputs."""

    name: str
    ours: Call
    peer: Call
    boxes: bool  # whether the results are boxes; else tensors

    def compare(self) -> tuple[float, str]:
        """Difference of the results, and what the row says about it.

        Raises:
            RuntimeError: they differ.
        """
        if not self.boxes:
            return tensors_agree(self.name, self.ours(), self.peer(), LIMIT), "relative difference"
        share, gap = boxes_agree(self.name, self.ours(), self.peer())
        return gap, f"{share:.0%} of the boxes in common"


def stages(sides: Sides) -> list[Stage]:
    """Backbone, RPN, head, and NMS at both thresholds; each stage gets the results of ours."""
    run, peer = sides
    model, hw = run.model, (run.x_B3HW.shape[2], run.x_B3HW.shape[3])
    pyramids, proposals = run.regions()
    with run.mode():
        features = model.features(run.x_B3HW)
    theirs = features_of(features.cls)
    head = HeadOnly(model.head, pyramids, join_rois(proposals), run)
    logits_RK, delta_RK4 = head()

    def maps() -> list[Tensor]:
        with run.mode():
            return list(model.features(run.x_B3HW).cls)

    def propose() -> list[Detections]:
        with run.mode():
            return as_detections(model.propose(features, run.size_B2, hw))

    found = [
        Stage("backbone", maps, peer.backbone, False),
        Stage("RPN", propose, lambda: as_detections(peer.rpn(theirs)), True),
        Stage("head", head, partial(peer.head, theirs, proposals), False),
    ]
    for threshold in THRESHOLDS:
        said = (threshold, logits_RK, delta_RK4, proposals)
        ours, other = partial(_select, run, *said), partial(_select_peer, peer, *said)
        found.append(Stage(f"NMS, threshold {threshold}", ours, other, True))
    return found


def _select(
    run: Inference, threshold: float, logits_RK: Tensor, delta_RK4: Tensor, proposals: list[Tensor]
) -> list[Detections]:
    """Detections of every image from what the head says."""
    model, counts = run.at_threshold(threshold).model, [len(box_M4) for box_M4 in proposals]
    with run.mode():
        parts = zip(
            logits_RK.softmax(dim=1).split(counts), delta_RK4.split(counts), proposals,
            [run.work.size] * len(proposals), strict=True,
        )  # fmt: skip
        return [model.post(*part, model.stds) for part in parts]


def _select_peer(peer: Peer, threshold: float, *said: Any) -> list[Detections]:
    return peer.at_threshold(threshold).select(*said)


def tsd_rows(bench: Bench) -> Iterator[Row]:
    """TSD against the sibling head: whole detectors at both thresholds, and the heads alone."""
    both = pair(bench.work)
    difference = twin_difference(both, bench)
    name, peer = f"inference, TSD-{bench.work.name}", f"sibling-{bench.work.name}"
    runs = [bench.run(model) for model in both]
    pyramids, proposals = runs[0].regions()
    shape, roi_R5 = bench.shape(proposals), join_rois(proposals)
    for threshold in THRESHOLDS:
        tsd, sibling = (run.at_threshold(threshold) for run in runs)
        found = bench.row(f"{name}, threshold {threshold}", shape, peer, (tsd, sibling), difference)
        yield _with_factor(found, WANTED)
    tsd_head, sibling_head = (HeadOnly(run.model.head, pyramids, roi_R5, run) for run in runs)
    found = bench.row(f"{name}, head only", shape, peer, (tsd_head, sibling_head), difference)
    yield _with_factor(found)


def _with_factor(found: Row, wanted: float | None = None) -> Row:
    """Our time in times of the peer's goes in front of the note."""
    text = f"{found['ours_ms'] / found['peer_ms']:.3f} times the sibling's time"
    text += f", wanted at most {wanted}" if wanted else ""
    return found | {"note": f"{text}; {found['note']}"}


def twin_difference(both: Pair, bench: Bench) -> float:
    """Difference of the sibling head from a TSD head with its weights and no shift, relative.

    Raises:
        RuntimeError: it is more than rounding.
    """
    head: Any = both.sibling.head
    with full_float32():
        run = bench.run(both.sibling, "float32")
        pyramids, proposals = run.regions()
        roi_R5 = join_rois(proposals)
        ours, peer = (HeadOnly(one, pyramids, roi_R5, run)() for one in (twin(head), head))
    return tensors_agree("TSD without shifts", ours, peer, LIMIT)


def compiled_row(bench: Bench) -> Row:
    """A TSD detector with a compiled backbone against the same in eager mode.

    Raises:
        RuntimeError: their maps differ.
    """
    name = f"inference, TSD-{bench.work.name}, compiled backbone"
    eager = bench.run(pair(bench.work).tsd)
    shape, reason = bench.shape(eager.regions()[1]), no_compiler()
    if reason is not None:
        return row(name, shape, "eager", f"not measured: {reason}")
    compiled = bench.run(clone(eager.model))
    backbone: Any = compiled.model.backbone
    backbone.compile()
    start = time.perf_counter()
    ours, peer = (side.regions()[0].cls.maps for side in (compiled, eager))
    note = f"compiled in {time.perf_counter() - start:.0f} s"
    limit = LIMIT if bench.precision == "float32" else HALF_LIMIT
    difference = tensors_agree(name, ours, peer, limit)
    return bench.row(name, shape, "eager", (compiled, eager), difference, note)
