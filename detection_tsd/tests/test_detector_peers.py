"""Whole detectors: torchvision's with the same weights, and the sizes the paper gives.

Letters: B images of a batch, H W size, D detections, S mask bins per side.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn, maskrcnn_resnet50_fpn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import paste_masks_in_image

from detection_tsd.data.detection_data import Detections
from detection_tsd.models.d_head import DHead
from detection_tsd.models.detector import Detector
from detection_tsd.models.mask_branch import MaskBranch, paste
from detection_tsd.models.resnet import ResNetFPN
from detection_tsd.models.rpn import RPN
from detection_tsd.models.sibling_head import BoxHead, SiblingHead
from detection_tsd.models.split import SplitResNetFPN
from detection_tsd.models.tsd_head import TSDHead, strip
from detection_tsd.postprocess import PostProcess

SIZE = (120, 152)  # of the valid part; the input is 128 x 160
BASE, TSD, TRAINING = 41_757_156, 59_021_640, 73_332_445  # parameters with a ResNet-50


@torch.no_grad()
def spread(peer: Any, x_B3HW: Tensor) -> None:
    """Random weights under which classes, scores, boxes and masks of regions differ."""
    for name, parameter in peer.named_parameters():
        if name.endswith("bn3.weight"):
            parameter.fill_(0.2)  # otherwise 16 residual blocks add up to huge maps
    said: list[Tensor] = []
    predictor = peer.roi_heads.box_predictor
    hook = predictor.register_forward_hook(lambda _, __, y: said.append(y[0]))
    theirs(peer, x_B3HW)
    hook.remove()
    deviation_K = said[0].std(dim=0)
    predictor.cls_score.weight.mul_((2.0 / deviation_K)[:, None])
    predictor.cls_score.bias.copy_(
        -(said[0] - predictor.cls_score.bias).mean(dim=0) * 2 / deviation_K
    )


def renamed(name: str) -> str:
    """Key of ours for a key of torchvision's detectors."""
    if name.startswith("roi_heads.mask"):
        return name.replace("roi_heads.", "mask.")
    return name.replace("roi_heads.", "head.")


def ours_like(peer: nn.Module, mask: bool) -> Detector:
    rpn = RPN(
        pre_test=150, post_test=150, floor=0.0, own_best=True, border=None, min_size=1e-3,
        rounded_anchors=True,
    )  # fmt: skip
    model = Detector(
        ResNetFPN(),
        SiblingHead(90, pooling="torchvision"),
        rpn,
        post=PostProcess(score_threshold=0.02),
        mask=MaskBranch(90, pooling="torchvision") if mask else None,
    )
    state = {renamed(name): value for name, value in peer.state_dict().items()}
    wanted = model.state_dict()
    assert sorted(wanted) == sorted(state)
    model.load_state_dict(state)
    return model.eval()


def theirs(peer: Any, x_B3HW: Tensor) -> list[dict[str, Tensor]]:
    """Detections of torchvision's parts, without its resizing and normalising."""
    images = ImageList(x_B3HW, [SIZE] * len(x_B3HW))
    features = peer.backbone(x_B3HW)
    proposals, _ = peer.rpn(images, features)
    found: list[dict[str, Tensor]] = peer.roi_heads(features, proposals, images.image_sizes)[0]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("build", [fasterrcnn_resnet50_fpn, maskrcnn_resnet50_fpn])
@torch.no_grad()
def test_detections_equal_those_of_torchvision(build: Callable[..., nn.Module]) -> None:
    mask = build is maskrcnn_resnet50_fpn
    torch.manual_seed(1)
    peer = build(
        weights=None, weights_backbone=None, num_classes=91, box_score_thresh=0.02,
        rpn_pre_nms_top_n_test=150, rpn_post_nms_top_n_test=150,
    ).eval()  # fmt: skip
    x_B3HW = torch.zeros(2, 3, 128, 160)
    x_B3HW[:, :, : SIZE[0], : SIZE[1]] = torch.randn(2, 3, *SIZE)
    spread(peer, x_B3HW)
    wanted = theirs(peer, x_B3HW)
    got = ours_like(peer, mask)(x_B3HW, torch.tensor([SIZE, SIZE]))
    for one, other in zip(got, wanted, strict=True):
        assert len(one.score_D) == 100
        assert len(one.label_D.unique()) > 5
        assert one.score_D[0] > 1.5 * one.score_D[-1]
        torch.testing.assert_close(one.score_D, other["scores"], rtol=1e-4, atol=1e-5)
        mine, its = same(one, other)
        torch.testing.assert_close(one.score_D[mine], other["scores"][its], rtol=1e-4, atol=1e-5)
        if mask:
            assert one.mask_DSS is not None
            masks = other["masks"][its]
            torch.testing.assert_close(one.mask_DSS[mine], masks[:, 0], rtol=1e-3, atol=1e-4)
            pasted = paste_masks_in_image(masks, other["boxes"][its], SIZE)[:, 0] > 0.5
            ours = paste(one.mask_DSS[mine], one.box_D4[mine], *SIZE).bool()
            assert (ours != pasted).float().mean() < 1e-4
            assert 0.01 < ours.float().mean() < 0.9


def same(one: Detections, other: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Indices of detections of one class and box; rounding may swap scores that are nearly equal.

    Every detection must have its partner, but for those within rounding of the last score, which
    may have fallen off the end of one list.
    """
    near = (one.box_D4[:, None] - other["boxes"]).abs().amax(dim=2) < 5e-3
    alike = near & (one.label_D[:, None] == other["labels"])
    safe = one.score_D > one.score_D[-1] + 1e-5
    assert safe.sum() > 90
    assert (alike.sum(dim=1)[safe] == 1).all()
    assert (alike.sum(dim=0) <= 1).all()
    mine, its = alike.nonzero(as_tuple=True)
    return mine, its


def total(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def whole(head: type[BoxHead], layers: tuple[int, ...] = (3, 4, 6, 3), **other: Any) -> Detector:
    with torch.device("meta"):
        return Detector(ResNetFPN(layers), head(80, **other), RPN())


def test_check_05_parameters_with_resnet_50() -> None:
    assert total(whole(SiblingHead)) == BASE
    trained = whole(TSDHead)
    assert total(trained) == TRAINING
    plain = whole(TSDHead, joint=False, margin_cls=None, margin_box=None)
    assert total(plain) == TSD
    kept = strip(trained.state_dict())
    assert kept.keys() == plain.state_dict().keys()
    assert total(whole(DHead)) == 55_652_836


@pytest.mark.parametrize(
    ("stride", "expected"), [(8, 81_060_324), (16, 73_961_956), (32, 58_997_220)]
)
def test_check_05_parameters_of_split_backbones(stride: int, expected: int) -> None:
    with torch.device("meta"):
        assert total(Detector(SplitResNetFPN(stride), DHead(80), RPN())) == expected


@pytest.mark.parametrize(
    ("layers", "expected"),
    [((3, 4, 23, 3), (60.75, 78.01, 92.32)), ((3, 8, 36, 3), (76.39, 93.66, 107.97))],
)
def test_check_05_parameters_of_deeper_trunks(
    layers: tuple[int, ...], expected: tuple[float, ...]
) -> None:
    base = total(whole(SiblingHead, layers))
    got = (base, base + TSD - BASE, base + TRAINING - BASE)
    assert [round(count / 1e6, 2) for count in got] == list(expected)
    assert total(whole(TSDHead, layers)) == got[2]


def test_check_05_parameters_of_a_wider_trunk() -> None:
    with torch.device("meta"):
        backbone = ResNetFPN((3, 4, 23, 3), groups=64, width=4)
        model = Detector(backbone, TSDHead(80), RPN())
    assert round(total(model) / 1e6, 2) == 131.23
