"""Speed of training steps: TSD beside the sibling head, torchvision's detector, and loading.

The group `train` of `python -m detection_tsd.benchmarks`. A step is that of `engine.train_step`
with backward pass, clipping and SGD, on generated images that lie on the device, so that no row but
the last one loads anything. TSD trains with its companion and the progressive constraint; backbone,
RPN, draws and the companion's weights are the sibling detector's, so the four losses that both have
are compared before the steps are timed. torchvision draws its anchors and regions from a global
generator: its losses have to be near ours only.

Letters: B images of a batch, G objects of an image.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common.seed import worker_init
from detection_tsd.benchmarks import peer_detector
from detection_tsd.benchmarks.bench_infer import Bench
from detection_tsd.benchmarks.networks import (
    DIVISOR,
    Work,
    clone,
    full_float32,
    like_torchvision,
    pair,
    usual,
)
from detection_tsd.benchmarks.peer_detector import NAME, faster_rcnn
from detection_tsd.benchmarks.pictures import SIDES, write_set
from detection_tsd.benchmarks.results import Row
from detection_tsd.data.batch import collate, to
from detection_tsd.data.coco import load_coco
from detection_tsd.data.detection_data import Batch, DetectionData, Target
from detection_tsd.data.draws import DetectionDraws
from detection_tsd.data.transforms import DetectionTransform
from detection_tsd.engine import autocast, train_step
from detection_tsd.models.detector import Detector
from detection_tsd.optim import sgd

GPU = Work(2)
CPU = Work(1, (480, 800))
QUICK = Work(1, (192, 256), rois=128)
OBJECTS = 7  # of an image, as in COCO
RATE, CLIP = 1e-4, 35.0
LIMIT = 1e-4  # of equal losses, relative
NEAR = 0.25  # the same of losses of other samples
CUDA_REPEATS = 20
SMALL_SIDES = (120, 160)  # of pictures for small images
PICTURES = 64  # files that the last row loads, again and again

Losses = Callable[[Batch], dict[str, Tensor]]


def train_rows(
    repeats: int, device: torch.device, quick: bool = False, seed: int = 0
) -> Iterator[Row]:
    """TSD against the sibling, the sibling against torchvision's, with loading against without.

    Args:
        repeats: timed steps of each side; at least 20 on CUDA.
        device: where the detectors train. On a CPU it is one image of 480 x 800, on CUDA two of
            800 x 1333, the share of a GPU in the recipe.
        quick: one small image, on CUDA too.
        seed: of weights and images.

    Raises:
        RuntimeError: losses differ.
    """
    cuda = device.type == "cuda"
    work = (QUICK if quick else GPU if cuda else CPU)._replace(seed=seed)
    bench = Bench(work, usual(device), max(repeats, CUDA_REPEATS) if cuda else repeats, device)
    yield tsd_row(bench)
    yield torchvision_row(bench)
    yield loading_row(bench, workers=min(8, (os.cpu_count() or 2) // 2) if cuda else 0)


def shape_of(work: Work, precision: str) -> str:
    """Sizes and precision for the table."""
    padded = "x".join(map(str, work.padded))
    return f"{work.shape} in {padded}, {work.rois} regions each, {precision}"


class Step:
    """A training step: losses, backward pass, clipping, SGD.

    Args:
        net: what is trained.
        losses: of a batch, in the precision of the row.
        batch: on the device; the batch of a call without one.
    """

    def __init__(self, net: nn.Module, losses: Losses, batch: Batch) -> None:
        self.net, self.losses, self.batch = net, losses, batch
        self.optimizer = sgd(net, lr=RATE)

    def __call__(self, batch: Batch | None = None) -> dict[str, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        parts = self.losses(self.batch if batch is None else batch)
        torch.stack([part.float() for part in parts.values()]).sum().backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), CLIP)
        self.optimizer.step()
        return {name: part.detach() for name, part in parts.items()}


def our_step(model: Detector, batch: Batch, device: torch.device, precision: str) -> Step:
    """A step of ours, as `detection_tsd.train` takes it."""
    model.to(device).to(memory_format=torch.channels_last).train()
    transform = DetectionTransform(keep_size=True, divisor=DIVISOR)

    def losses(batch: Batch) -> dict[str, Tensor]:
        return train_step(model, batch, transform, device, precision)[1]

    return Step(model, losses, to(batch, device))


def torchvision_step(net: nn.Module, batch: Batch, device: torch.device, precision: str) -> Step:
    """A step of torchvision's detector on the same images."""
    net.to(device).train()
    transform = DetectionTransform(keep_size=True, divisor=DIVISOR)

    def losses(batch: Batch) -> dict[str, Tensor]:
        batch = to(batch, device)
        x_B3HW = transform.normalize(batch.image_B3HW, batch.size_B2).contiguous()
        with autocast(device, precision):
            return peer_detector.training_losses(net, x_B3HW, batch.size_B2, batch.targets)

    return Step(net, losses, to(batch, device))


def batch_of(work: Work) -> Batch:
    """Images of noise, each with 7 objects of 80 classes."""
    generator = torch.Generator().manual_seed(work.seed)
    height, width = work.size
    image_B3HW = torch.zeros(work.images, 3, *work.padded, dtype=torch.uint8)
    noise = torch.randint(256, (work.images, 3, height, width), generator=generator)
    image_B3HW[:, :, :height, :width] = noise.to(torch.uint8)
    count = work.images
    return Batch(
        image_B3HW.contiguous(memory_format=torch.channels_last),
        torch.tensor([work.size] * count), [_target(work, generator) for _ in range(count)], None,
        torch.arange(count), torch.arange(count), torch.ones(count, 2),
        torch.tensor([work.size] * count),
    )  # fmt: skip


def _target(work: Work, generator: torch.Generator) -> Target:
    extent_2 = torch.tensor(work.size[::-1], dtype=torch.float32)
    side_G2 = (0.05 + 0.45 * torch.rand(OBJECTS, 2, generator=generator)) * extent_2
    corner_G2 = torch.rand(OBJECTS, 2, generator=generator) * (extent_2 - side_G2)
    label_G = torch.randint(1, 81, (OBJECTS,), generator=generator)
    return Target(torch.cat((corner_G2, corner_G2 + side_G2), 1), label_G, torch.zeros(0, 4))


def tsd_row(bench: Bench) -> Row:
    """TSD with companion and constraint against the sibling head.

    Raises:
        RuntimeError: losses that both have differ.
    """
    both, batch = pair(bench.work, joint=True), batch_of(bench.work)
    tsd, sibling = both.tsd, clone(both.sibling)  # each trains a backbone of its own
    name = f"train step, TSD-{bench.work.name}"
    with full_float32():
        parts = [
            our_step(clone(model), batch, bench.device, "float32")() for model in (tsd, sibling)
        ]
    difference = losses_agree(name, *parts)
    sides = [our_step(model, batch, bench.device, bench.precision) for model in (tsd, sibling)]
    found = bench.row(
        name, shape_of(bench.work, bench.precision), f"sibling-{bench.work.name}",
        (sides[0], sides[1]), difference,
    )  # fmt: skip
    return _with_factor(found, "times the sibling's step")


def losses_agree(name: str, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Greatest difference of the losses that the peer has.

    Raises:
        RuntimeError: one of them exceeds `LIMIT`, relative.
    """
    gaps = {key: abs(float(ours[key]) - float(value)) for key, value in theirs.items()}
    for key, gap in gaps.items():
        if not gap <= LIMIT * max(abs(float(theirs[key])), 1e-3):
            raise RuntimeError(f"{name}: {key} differs by {gap}")
    return max(gaps.values())


def torchvision_row(bench: Bench) -> Row:
    """The sibling detector against torchvision's with its weights.

    Raises:
        RuntimeError: the sums of the losses of both are not near each other.
    """
    model, batch = like_torchvision(bench.work), batch_of(bench.work)
    peer = faster_rcnn(model, bench.work)
    name = f"train step, sibling-{bench.work.name}"
    torch.manual_seed(bench.work.seed)
    sides = (
        our_step(model, batch, bench.device, bench.precision),
        torchvision_step(peer, batch, bench.device, bench.precision),
    )
    ours, theirs = (float(torch.stack([*side().values()]).sum()) for side in sides)
    if not abs(ours - theirs) <= NEAR * abs(theirs):
        raise RuntimeError(f"{name}: losses {ours} and {theirs} are not near each other")
    shape = shape_of(bench.work, bench.precision)
    note = f"losses {ours:.3f} and {theirs:.3f}, of other samples; we train scales of norms as well"
    return bench.row(name, shape, NAME, sides, None, note)


def loading_row(bench: Bench, workers: int, pictures: int = PICTURES) -> Row:
    """Steps that get their images from files against steps on a batch that is there.

    Raises:
        RuntimeError: the data workers hand over another first batch than the set gives.
    """
    work = bench.work
    sides = SIDES if min(work.size) > min(SIDES) // 2 else SMALL_SIDES
    with tempfile.TemporaryDirectory() as folder:
        data = load_coco(write_set(Path(folder) / "set", pictures, work.seed, sides=sides))
        found = _loading_row(bench, data, workers)
    note = f"{found['note']}; JPEG of {sides[0]}x{sides[1]}"
    return found | {"note": note}


def _loading_row(bench: Bench, data: DetectionData, workers: int) -> Row:
    """The workers end when this returns, before the files go."""
    work = bench.work
    draws = DetectionDraws(data, DetectionTransform(*work.size, divisor=DIVISOR), work.seed)
    batches = iter(_loader(draws, work.images, workers, bench.device))
    first, wanted = next(batches), collate([draws[k] for k in range(work.images)], DIVISOR)
    same = [
        torch.equal(x.box_G4, y.box_G4) for x, y in zip(first.targets, wanted.targets, strict=True)
    ]
    gap = float((first.image_B3HW.int() - wanted.image_B3HW.int()).abs().max())
    if gap or not all(same):
        raise RuntimeError(f"loading: the first batch differs by {gap}, boxes are equal: {same}")
    step = our_step(pair(work, joint=True).tsd, first, bench.device, bench.precision)
    height, width = first.size_B2[0].tolist()
    shape = shape_of(work._replace(size=(height, width)), bench.precision)
    found = bench.row(
        f"train step, TSD-{work.name}, with loading", f"{shape}, {workers} workers",
        "on a batch that is there", (lambda: step(next(batches)), step), gap,
    )  # fmt: skip
    return _with_factor(found, "times the step without loading")


def _loader(
    draws: DetectionDraws, images: int, workers: int, device: torch.device
) -> DataLoader[Any]:
    return DataLoader(
        draws,
        batch_size=images,
        sampler=range(10**6),
        num_workers=workers,
        worker_init_fn=worker_init,
        collate_fn=partial(collate, divisor=DIVISOR),
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
    )


def _with_factor(found: Row, text: str) -> Row:
    """Our time in times of the peer's goes in front of the note."""
    factor = f"{found['ours_ms'] / found['peer_ms']:.3f} {text}"
    return found | {"note": f"{factor}; {found['note']}"}
