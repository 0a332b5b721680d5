"""The detectors that the benchmarks time, the state they are in, and how they are run.

The weights are random, in a range in which detections differ from each other as a trained
detector's do: boxes of many classes above a threshold of 0.05, shifts of half a raw unit.

Letters: B images of a batch, H W size, R RoIs, K class scores with the background at column 0,
M proposals, O outputs of a layer.
"""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from detection_tsd.data.detection_data import Detections
from detection_tsd.engine import autocast
from detection_tsd.matching import RoISampler
from detection_tsd.models.detector import Detector, Pyramids, join_rois
from detection_tsd.models.resnet import ResNetFPN
from detection_tsd.models.rpn import RPN
from detection_tsd.models.sibling_head import BoxHead, SiblingHead
from detection_tsd.models.tsd_head import TSDHead
from detection_tsd.ops.pyramid import Pyramid

COCO = 80  # foreground classes
DIVISOR = 64  # the coarsest stride: torchvision derives strides from sizes, exact only at multiples
OFFSET, LOGIT = 0.5, 2.0  # standard deviations over the regions
RESIDUAL = 0.2  # scale of the last norm of a block; with 1 the maps of random weights explode
MIB = 2**20

Call = Callable[[], Any]


class Work(NamedTuple):
    """Sizes of the detectors of a row, and of the images that go through them at once.

    Args:
        images: of a batch.
        size: height and width of an image; the batch is padded to multiples of 64.
        proposals: of an image, in a test and before and after suppression.
        rois: of an image that a training step looks at.
        layers: of the ResNet.
        channels: of the pyramid.
        width: of the box head's layers.
        seed: of weights and images.
    """

    images: int = 1
    size: tuple[int, int] = (800, 1333)
    proposals: int = 1000
    rois: int = 512
    layers: tuple[int, int, int, int] = (3, 4, 6, 3)
    channels: int = 256
    width: int = 1024
    seed: int = 0

    @property
    def name(self) -> str:
        """Of the backbone."""
        return f"R{3 * sum(self.layers) + 2}"

    @property
    def padded(self) -> tuple[int, int]:
        """Height and width of the batch."""
        height, width = (-(-side // DIVISOR) * DIVISOR for side in self.size)
        return height, width

    @property
    def shape(self) -> str:
        """Text for a result row."""
        plural = "s" * (self.images != 1)
        return f"{self.images} image{plural} of {self.size[0]}x{self.size[1]}"

    def input(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Normalised images of noise (B, 3, H, W), 0 in the padding, and their sizes (B, 2)."""
        generator = torch.Generator().manual_seed(self.seed)
        x_B3HW = torch.zeros(self.images, 3, *self.padded)
        height, width = self.size
        noise = torch.randn(self.images, 3, height, width, generator=generator)
        x_B3HW[:, :, :height, :width] = noise
        size_B2 = torch.tensor([self.size] * self.images)
        return x_B3HW.to(device, memory_format=torch.channels_last), size_B2.to(device)


class Pair(NamedTuple):
    """A TSD detector and the same with a sibling head: one backbone, one RPN, as many classes."""

    tsd: Detector
    sibling: Detector


def pair(work: Work, joint: bool = False) -> Pair:
    """Detectors whose proposals are the same objects.

    Args:
        work: their sizes.
        joint: TSD with its companion and the progressive constraint, as it is trained; the
            companion has the weights of the sibling head.
    """
    torch.manual_seed(work.seed)
    backbone, rpn = backbone_of(work), RPN(work.channels, **_proposals(work))
    sibling = Detector(backbone, SiblingHead(COCO, width=work.width, channels=work.channels), rpn)
    margins: dict[str, Any] = {} if joint else {"margin_cls": None, "margin_box": None}
    head = TSDHead(COCO, width=work.width, channels=work.channels, joint=joint, **margins)
    tsd = Detector(backbone, head, rpn)
    for model in (sibling, tsd):
        model.sampler = RoISampler(work.rois)
        spread(model, work)
    if head.sibling is not None:
        _copy(sibling.head, head.sibling, "box_head", "box_predictor")
    return Pair(tsd, sibling)


def like_torchvision(work: Work, classes: int = 90) -> Detector:
    """A sibling detector with every rule of torchvision's `fasterrcnn_resnet50_fpn`."""
    torch.manual_seed(work.seed)
    rpn = RPN(
        work.channels, floor=0.0, own_best=True, border=None, min_size=1e-3, rounded_anchors=True,
        **_proposals(work),
    )  # fmt: skip
    head = SiblingHead(classes, width=work.width, channels=work.channels, pooling="torchvision")
    model = Detector(backbone_of(work), head, rpn, RoISampler(work.rois))
    spread(model, work)
    return model


def backbone_of(work: Work) -> ResNetFPN:
    """Random weights under which 16 residual blocks do not add up to huge maps."""
    backbone = ResNetFPN(work.layers, channels=work.channels)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if name.endswith("bn3.weight"):
                parameter.fill_(RESIDUAL)
    return backbone


def _proposals(work: Work) -> dict[str, Any]:
    return {"pre_test": work.proposals, "post_test": work.proposals}


@torch.no_grad()
def spread(model: Detector, work: Work) -> None:
    """Scale the last layers of the head so that scores and shifts of noise differ by region."""
    model.eval()
    small = work._replace(images=2, size=(DIVISOR, 2 * DIVISOR))
    x_B3HW, size_B2 = small.input(torch.device("cpu"))
    features = model.features(x_B3HW)
    roi_R5 = join_rois(model.propose(features, size_B2, small.padded))
    pyramids, head = model.pyramids(features), model.head
    if isinstance(head, TSDHead):
        said = head(*pyramids, roi_R5)
        for layers, shift in ((head.offset.cls, said.offset_c), (head.offset.reg, said.offset_r)):
            _rescale(layers[2], shift.flatten(1), OFFSET)
    predictor: Any = head.box_predictor
    _rescale(predictor.cls_score, head(*pyramids, roi_R5).logits_RK, LOGIT)


def _rescale(layer: Any, said_RO: Tensor, deviation: float) -> None:
    """Outputs (R, O) of a linear layer to mean 0 and this deviation over the R regions."""
    factor_O = deviation / said_RO.std(dim=0).clamp(min=1e-6)
    layer.bias.copy_((layer.bias - said_RO.mean(dim=0)) * factor_O)
    layer.weight.mul_(factor_O[:, None])


@torch.no_grad()
def twin(head: SiblingHead) -> TSDHead:
    """A TSD head that computes what this sibling head computes: no shift, equal extractors."""
    settings: dict[str, Any] = {
        "width": head.box_head.fc6.out_features, "channels": head.channels, "size": head.size,
        "samples": head.samples, "level_base": head.level_base,
    }  # fmt: skip
    made = TSDHead(
        head.num_classes, joint=False, margin_cls=None, margin_box=None, offset_init="zero",
        **settings,
    )  # fmt: skip
    _copy(head, made, "box_head", "box_predictor")
    made.cls_head.load_state_dict(head.box_head.state_dict())
    return made.to(head.box_head.fc6.weight.device).eval()


def _copy(source: nn.Module, target: nn.Module, *parts: str) -> None:
    for part in parts:
        target.get_submodule(part).load_state_dict(source.get_submodule(part).state_dict())


class Inference:
    """Detections of a batch that lies on the device.

    Args:
        model: is put on the device and into evaluation mode.
        work: the batch.
        device: where both are.
        precision: see `engine.autocast`.
    """

    def __init__(self, model: Detector, work: Work, device: torch.device, precision: str) -> None:
        self.model, self.work = model.to(device).eval(), work
        self.device, self.precision = device, precision
        self.x_B3HW, self.size_B2 = work.input(device)

    def __call__(self) -> list[Detections]:
        with self.mode():
            found = self.model(self.x_B3HW, self.size_B2)
        assert isinstance(found, list)
        return found

    @contextmanager
    def mode(self) -> Iterator[None]:
        """No graph, and the precision of the row."""
        with torch.inference_mode(), autocast(self.device, self.precision):
            yield

    def at_threshold(self, threshold: float) -> Inference:
        """The same modules and images with another score threshold of the detections."""
        changed = copy(self)
        model = self.model
        post = replace(model.post, score_threshold=threshold)
        changed.model = Detector(model.backbone, model.head, model.rpn, model.sampler, post).eval()
        return changed

    def regions(self) -> tuple[Pyramids, list[Tensor]]:
        """Maps and proposals, which a head is timed on alone."""
        with self.mode():
            features = self.model.features(self.x_B3HW)
            hw = (self.x_B3HW.shape[2], self.x_B3HW.shape[3])
            return self.model.pyramids(features), self.model.propose(features, self.size_B2, hw)


class HeadOnly:
    """Scores and deltas of fixed proposals."""

    def __init__(self, head: BoxHead, pyramids: Pyramids, roi_R5: Tensor, run: Inference) -> None:
        self.head, self.run, self.roi_R5 = head.eval(), run, roi_R5
        self.maps, self.strides = list(pyramids.cls.maps), tuple(pyramids.cls.strides)

    def __call__(self) -> list[Tensor]:
        with self.run.mode():
            pyramid = Pyramid(self.maps, self.strides)  # a fresh one packs its maps again
            said = self.head(pyramid, pyramid, self.roi_R5)
        return [said.logits_RK.float(), said.delta_RK4.float()]


def usual(device: torch.device) -> str:
    """The precision of the recipes; float32 on a CPU."""
    return "bfloat16" if device.type == "cuda" else "float32"


def no_compiler() -> str | None:
    """Why nothing can be compiled here; None when it can."""
    found = shutil.which("c++") or shutil.which("g++")
    return None if found else "torch.compile needs a C++ compiler"


def clone(model: Detector) -> Detector:
    """Equal weights, nothing shared."""
    return deepcopy(model)


@contextmanager
def full_float32() -> Iterator[None]:
    """Convolutions and products of float32 in float32 inside: no TF32 on CUDA."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def peaks(ours: Call, peer: Call, device: torch.device) -> dict[str, float]:
    """Memory in MiB that a call of each side adds at its peak, `ours_mib` and `peer_mib`.

    On CUDA the allocated memory, on Linux the resident memory of the process; empty elsewhere.
    """
    measure = _cuda_peak if device.type == "cuda" else _resident_peak
    found = {"ours_mib": measure(ours), "peer_mib": measure(peer)}
    return {name: value for name, value in found.items() if value is not None}


def _cuda_peak(call: Call) -> float | None:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def _resident_peak(call: Call) -> float | None:
    try:
        ctypes.CDLL(None).malloc_trim(0)  # otherwise the call reuses what earlier ones gave back
        Path("/proc/self/clear_refs").write_text("5")  # sets the greatest size seen to the present
        before = _status("VmRSS")
        call()
        return max(_status("VmHWM") - before, 0.0)
    except (OSError, AttributeError):  # another system, or another C library
        return None


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    found = next((line for line in lines if line.startswith(f"{key}:")), None)
    if found is None:
        raise OSError(f"/proc/self/status has no {key}")
    return int(found.split()[1]) / 1024
