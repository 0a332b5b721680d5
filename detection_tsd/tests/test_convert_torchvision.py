"""Conversion of torchvision's detectors.

Letters: H W size, D detections, K class scores with the background at column 0.
"""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator, RPNHead
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from common.log import InputError
from detection_tsd.tests import published_keys as keys
from detection_tsd.tests.launch import command, config
from detection_tsd.tools.convert_torchvision import compose_torchvision, convert
from detection_tsd.tools.key_maps import rename
from detection_tsd.tools.structure import fit, read_structure, state_on_meta
from detection_tsd.weights import Trained, load_trained

SIZE = (60, 120)  # of the valid part; the input is 64 x 128, multiples of the greatest stride
FEW = 40  # proposals of a level, and of an image
WIDTH, UNITS = 16, 32


def settings(tmp_path: Path, *words: str) -> Any:
    places = [f"checkpoint={tmp_path / 'in.pth'}", f"out={tmp_path / 'sub' / 'out.safetensors'}"]
    return config("convert_torchvision", *places, *words)


def converted(tmp_path: Path, content: Any, *words: str) -> Trained:
    torch.save(content, tmp_path / "in.pth")
    return load_trained(checkpoint=convert(settings(tmp_path, *words)))


@cache
def peer(mask: bool = False, classes: int = 91, eps: float = 0.0) -> Any:
    """Torchvision's own detector, with one block a stage and narrow layers; not to be changed."""
    torch.manual_seed(3)
    trunk = ResNet(Bottleneck, [1, 1, 1, 1], norm_layer=lambda n: FrozenBatchNorm2d(n, eps))
    layers = {f"layer{stage}": str(stage - 1) for stage in range(1, 5)}
    widths = [256, 512, 1024, 2048]
    backbone = BackboneWithFPN(trunk, layers, widths, WIDTH, LastLevelMaxPool())
    parts: dict[str, Any] = {
        "rpn_anchor_generator": AnchorGenerator(
            ((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5
        ),
        "rpn_head": RPNHead(WIDTH, 3),
        "rpn_pre_nms_top_n_test": FEW,
        "rpn_post_nms_top_n_test": FEW,
        "box_head": TwoMLPHead(WIDTH * 49, UNITS),
        "box_predictor": FastRCNNPredictor(UNITS, classes),
    }
    if mask:
        parts["mask_head"] = MaskRCNNHeads(WIDTH, [WIDTH] * 4, 1)
        parts["mask_predictor"] = MaskRCNNPredictor(WIDTH, WIDTH, classes)
    model: nn.Module = (MaskRCNN if mask else FasterRCNN)(backbone, **parts)
    return spread(model.eval())


@torch.no_grad()
def spread(model: Any) -> Any:
    """Random weights under which norms, classes and scores of regions differ."""
    for norm in model.modules():
        if isinstance(norm, FrozenBatchNorm2d):
            norm.running_var.uniform_(1e-5, 2e-4)  # so small that the epsilon matters
            norm.running_mean.normal_(std=1e-3)
            norm.weight.uniform_(3e-3, 8e-3)
    model.rpn.head.cls_logits.weight.mul_(20)
    said: list[Tensor] = []
    predictor = model.roi_heads.box_predictor
    hook = predictor.register_forward_hook(lambda _, __, y: said.append(y[0]))
    theirs(model)
    hook.remove()
    layer, scale_K = predictor.cls_score, 1.5 / said[0].std(dim=0)
    layer.bias.copy_(-(said[0] - layer.bias).mean(dim=0) * scale_K)
    layer.weight.mul_(scale_K[:, None])
    return model


def picture() -> Tensor:
    x_B3HW = torch.zeros(1, 3, 64, 128)
    x_B3HW[:, :, : SIZE[0], : SIZE[1]] = torch.randn(
        1, 3, *SIZE, generator=torch.Generator().manual_seed(5)
    )
    return x_B3HW


def small(classes: int = 91) -> dict[str, Tensor]:
    size = keys.SMALL._replace(classes=classes)
    return keys.random(keys.torchvision_detector(size, mask=True, old=True))


@torch.no_grad()
def theirs(model: Any) -> dict[str, Tensor]:
    """Detections of torchvision's parts, without its resizing and normalising."""
    images, features = ImageList(picture(), [SIZE]), model.backbone(picture())
    proposals, _ = model.rpn(images, features)
    found: dict[str, Tensor] = model.roi_heads(features, proposals, images.image_sizes)[0][0]
    return found


@torch.no_grad()
def agree(trained: Trained, model: Any, mask: bool) -> None:
    """Same scores, classes, boxes and masks; scores within rounding may change places."""
    ours: Any = trained.model
    ours.rpn.pre[False] = ours.rpn.post[False] = FEW
    (got,), wanted = ours(picture(), torch.tensor([SIZE])), theirs(model)
    assert len(wanted["scores"]) > 20
    assert len(wanted["labels"].unique()) > 2
    torch.testing.assert_close(got.score_D, wanted["scores"], rtol=1e-3, atol=1e-5)
    near = (got.box_D4[:, None] - wanted["boxes"]).abs().amax(2) < 1e-2
    pairs = near & (got.label_D[:, None] == wanted["labels"])
    safe = wanted["scores"] > wanted["scores"][-1] * 1.001
    assert (pairs[:, safe].sum(0) == 1).all()
    if mask:
        mine, its = pairs.nonzero(as_tuple=True)
        masks = wanted["masks"][its, 0]
        torch.testing.assert_close(got.mask_DSS[mine], masks, rtol=1e-3, atol=1e-3)
        assert masks.std() > 1e-3


@pytest.mark.parametrize(("mask", "eps"), [(True, 0.0), (False, 1e-5)])
def test_a_converted_detector_detects_the_same(tmp_path: Path, mask: bool, eps: float) -> None:
    model = peer(mask, eps=eps)
    words = ["absent=keep", *([] if eps == 0 else [f"norm_eps={eps}"])]
    trained = converted(tmp_path, model.state_dict(), *words)
    agree(trained, model, mask)
    assert trained.class_ids == tuple(range(1, 91))
    assert trained.classes[12] == "stop sign"
    assert trained.classes[11] == "unused 12"
    first = trained.model.state_dict()["backbone.body.bn1.weight"]
    given = model.state_dict()["backbone.body.bn1.weight"]
    assert torch.equal(first, given) == (eps == 1e-5)
    assert eps or (first / given).max() > 1.1  # the epsilon is not without effect here


def test_a_detector_of_other_classes_keeps_them(tmp_path: Path) -> None:
    trained = converted(tmp_path, {"model": small(classes=4), "epoch": 25})
    assert trained.config["num_classes"] == 3
    assert trained.classes == ("1", "2", "3")
    assert trained.config["train_set"] == "not known"


@torch.no_grad()
def test_rows_of_ids_that_coco_does_not_use_are_left_out(tmp_path: Path) -> None:
    """Label k is the k-th category; without the other ten scores, softmax is renormalised."""
    state = peer(mask=True).state_dict()
    whole = converted(tmp_path, state, "absent=keep")
    trained = converted(tmp_path, state)
    assert trained.config["num_classes"] == 80
    assert (trained.classes[11], trained.class_ids[11]) == ("stop sign", 13)
    assert (trained.classes[-1], trained.class_ids[-1]) == ("toothbrush", 90)
    roi_R5 = torch.tensor([[0, 3.0, 4.0, 40.0, 50.0], [0, 20.0, 10.0, 110.0, 58.0]])
    mine: Any = trained.model
    full: Any = whole.model
    features, column = full.features(picture()), [0, *trained.class_ids]
    prob_RK, box_RK4 = mine.score(features, roi_R5)
    all_RK, all_RK4 = full.score(features, roi_R5)
    renormalised = all_RK[:, column] / all_RK[:, column].sum(1, keepdim=True)
    torch.testing.assert_close(prob_RK, renormalised)
    torch.testing.assert_close(box_RK4, all_RK4[:, column])
    torch.testing.assert_close(
        mine.masks(features, roi_R5, torch.tensor([12, 80])),
        full.masks(features, roi_R5, torch.tensor([13, 90])),
    )


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("mask", [False, True])
def test_published_names_and_shapes_are_those_of_our_detectors(mask: bool, old: bool) -> None:
    state = keys.on_meta(keys.torchvision_detector(keys.Size(classes=91), mask, old))
    ours = rename(state, "torchvision")
    structure = read_structure({new: state[n] for n, new in ours.items()}, Path("file"))
    own = state_on_meta(compose_torchvision(structure, 90))
    fitted = fit(state, ours, own, Path("file"))
    counts = {name for name in own if name.endswith("num_batches_tracked")}
    assert fitted.keys() == set(ours.values()) | counts


def test_norms_that_count_batches_have_their_usual_epsilon(tmp_path: Path) -> None:
    state = small()
    for name in [name for name in state if name.endswith("running_var")]:
        state[name.replace("running_var", "num_batches_tracked")] = torch.tensor(5)
    kept = converted(tmp_path, state).model.state_dict()
    assert torch.equal(kept["backbone.body.bn1.weight"], state["backbone.body.bn1.weight"])
    assert kept["backbone.body.bn1.num_batches_tracked"] == 5


def test_conventions_of_the_release(tmp_path: Path) -> None:
    model: Any = converted(tmp_path, small()).model
    assert (model.plus, model.head.pooling, model.mask.pooling) == (0, "torchvision", "torchvision")
    assert (model.rpn.own_best, model.rpn.border, model.post.score_threshold) == (True, None, 0.05)
    assert (model.rpn.pre[False], model.rpn.post[False]) == (1000, 1000)


def test_bad_settings_and_weights(tmp_path: Path) -> None:
    state = small()
    torch.save(state, tmp_path / "in.pth")
    with pytest.raises(InputError, match="absent: must be one of drop, keep: half"):
        convert(settings(tmp_path, "absent=half"))
    with pytest.raises(InputError, match="norm_eps: must not be below 0"):
        convert(settings(tmp_path, "norm_eps=-1"))
    state["backbone.body.bn1.running_var"] = torch.zeros(64)
    state["roi_heads.keypoint_head.0.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "in.pth")
    with pytest.raises(InputError, match=r"backbone\.body\.bn1 has a variance of 0"):
        convert(settings(tmp_path))
    with pytest.raises(InputError, match=r"unknown: roi_heads\.keypoint_head\.0\.weight"):
        convert(settings(tmp_path, "norm_eps=1e-5"))


def test_the_command(tmp_path: Path) -> None:
    torch.save(small(), tmp_path / "in.pth")
    words = (f"checkpoint={tmp_path / 'in.pth'}", f"out={tmp_path / 'out.safetensors'}")
    ended = command("detection_tsd.tools.convert_torchvision", *words)
    assert ended.code == 0, ended.err
    assert load_trained(checkpoint=tmp_path / "out.safetensors").classes[0] == "person"
