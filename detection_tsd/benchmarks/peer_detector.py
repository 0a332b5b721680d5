"""torchvision's Faster R-CNN with the weights of ours, whole and in its stages.

With the layers of a ResNet-50 it is what `fasterrcnn_resnet50_fpn` builds for pretrained weights:
frozen batch norm, the stem and the first stage not trained. Resizing and normalising, which it does
inside, are left out on both sides.

Letters: B images of a batch, H W size, M proposals, R RoIs, K class scores, D detections.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops.misc import FrozenBatchNorm2d

from detection_tsd.benchmarks.networks import Inference, Work
from detection_tsd.data.detection_data import Detections, Target
from detection_tsd.models.detector import Detector

NAME = "torchvision fasterrcnn_resnet50_fpn"
WIDTHS = (256, 512, 1024, 2048)
FROZEN = ("conv1", "bn1", "layer1")


def faster_rcnn(model: Detector, work: Work) -> nn.Module:
    """The peer of a detector of `networks.like_torchvision`, with its weights."""
    peer = bare(work, model.head.num_classes + 1)
    state = {name.replace("head.box", "roi_heads.box"): x for name, x in model.state_dict().items()}
    peer.load_state_dict(state)
    return peer


def bare(work: Work, outputs: int) -> Any:
    """Fresh weights; `outputs` counts the background."""
    trunk = ResNet(Bottleneck, list(work.layers), norm_layer=FrozenBatchNorm2d)
    for name in FROZEN:
        trunk.get_submodule(name).requires_grad_(False)
    returned = {f"layer{level + 1}": str(level) for level in range(4)}
    backbone = BackboneWithFPN(trunk, returned, list(WIDTHS), work.channels)
    return FasterRCNN(
        backbone,
        box_head=TwoMLPHead(work.channels * 49, work.width),
        box_predictor=FastRCNNPredictor(work.width, outputs),
        rpn_pre_nms_top_n_test=work.proposals,
        rpn_post_nms_top_n_test=work.proposals,
        box_batch_size_per_image=work.rois,
    )


class Peer:
    """The peer on the batch of an `Inference` of ours.

    Args:
        net: as `faster_rcnn` gives it; is put on the device.
        run: of the same images.
        channels_last: memory format of weights and images; the peer's default is not.
    """

    def __init__(self, net: nn.Module, run: Inference, channels_last: bool = False) -> None:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.net: Any = net.to(run.device).to(memory_format=layout).eval()
        self.run, self.x_B3HW = run, run.x_B3HW.contiguous(memory_format=layout)
        self.sizes: list[tuple[int, int]] = [(h, w) for h, w in run.size_B2.tolist()]
        self.images = ImageList(self.x_B3HW, self.sizes)

    def at_threshold(self, threshold: float) -> Peer:
        """The peer itself, with another score threshold of the detections."""
        self.net.roi_heads.score_thresh = threshold
        return self

    def __call__(self) -> list[Detections]:
        with self.run.mode():
            features = self.net.backbone(self.x_B3HW)
            proposals, _ = self.net.rpn(self.images, features)
            found, _ = self.net.roi_heads(features, proposals, self.sizes)
        return [Detections(one["boxes"], one["scores"], one["labels"]) for one in found]

    def backbone(self) -> list[Tensor]:
        """Maps of the images."""
        with self.run.mode():
            return list(self.net.backbone(self.x_B3HW).values())

    def rpn(self, features: dict[str, Tensor]) -> list[Tensor]:
        """Proposals (M, 4) of each image."""
        with self.run.mode():
            found: list[Tensor] = self.net.rpn(self.images, features)[0]
        return found

    def head(self, features: dict[str, Tensor], proposals: list[Tensor]) -> list[Tensor]:
        """Logits (R, K) and deltas (R, K, 4) of the proposals."""
        with self.run.mode():
            pooled = self.net.roi_heads.box_roi_pool(features, proposals, self.sizes)
            logits_RK, delta = self.net.roi_heads.box_predictor(self.net.roi_heads.box_head(pooled))
        return [logits_RK.float(), delta.float().unflatten(1, (-1, 4))]

    def select(
        self, logits_RK: Tensor, delta_RK4: Tensor, proposals: list[Tensor]
    ) -> list[Detections]:
        """Detections from what the head says."""
        with self.run.mode():
            found = self.net.roi_heads.postprocess_detections(
                logits_RK, delta_RK4.flatten(1), proposals, self.sizes
            )
        return [Detections(*one) for one in _by_image(found)]


def _by_image(found: Sequence[Sequence[Tensor]]) -> list[tuple[Tensor, ...]]:
    return list(zip(*found, strict=True))


def features_of(maps: Sequence[Tensor]) -> dict[str, Tensor]:
    """Maps of ours under the peer's names, as contiguous tensors."""
    names = (*map(str, range(len(maps) - 1)), "pool")
    return {name: x.contiguous() for name, x in zip(names, maps, strict=True)}


def training_losses(
    net: Any, x_B3HW: Tensor, size_B2: Tensor, targets: Sequence[Target]
) -> dict[str, Tensor]:
    """Losses of a batch by the peer's names; its choice of anchors and regions is its own."""
    sizes = [(h, w) for h, w in size_B2.tolist()]
    wanted = [{"boxes": one.box_G4, "labels": one.label_G} for one in targets]
    features = net.backbone(x_B3HW)
    proposals, losses = net.rpn(ImageList(x_B3HW, sizes), features, wanted)
    _, of_boxes = net.roi_heads(features, proposals, sizes, wanted)
    return {**losses, **of_boxes}
