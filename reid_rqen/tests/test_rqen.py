"""RQEN and its rows: QAN, mean pooling, masks, streaming, gradients."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from reid_rqen.losses import SetObjective, SoftmaxObjective, score_spread
from reid_rqen.models.googlenet_bn import GoogLeNetBN
from reid_rqen.models.quality import (
    ConstantQuality,
    ImageQuality,
    Pool2Conv,
    Pool2FC,
    Quality,
    TinyQuality,
)
from reid_rqen.models.resnet import ResNet50
from reid_rqen.models.rqen import RQEN
from reid_rqen.models.tiny import TinyTrunk
from reid_rqen.ops.aggregate import StreamingAggregate, score_weights

PID = torch.tensor([[0, 0, 1]])


def tiny(quality: Quality | None = None, **options: object) -> RQEN:
    torch.manual_seed(0)
    # A last layer of ordinary size: with scores all near 0.5 a wrong weighting would pass.
    quality = TinyQuality(3) if quality is None else quality
    if isinstance(quality, TinyQuality):
        torch.nn.init.normal_(quality.fc.weight, std=3.0)
    return RQEN(TinyTrunk(), quality, **options)  # type: ignore[arg-type]


def clip(sets: int = 3, frames: int = 4, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sets, frames, 3, 56, 28, generator=generator)


def test_check_01_embedding_of_the_full_network() -> None:
    torch.manual_seed(0)
    model = RQEN(GoogLeNetBN(), ImageQuality(3)).eval()
    with torch.no_grad():
        out = model(torch.randn(1, 2, 3, 224, 224))
    assert out.vector_SD.shape == (1, 3072)
    assert model.dimensions == 3072
    torch.testing.assert_close(out.vector_SD.norm(dim=1), torch.ones(1))
    assert (out.vector_SD >= 0).all()
    assert out.logits == ()


def test_check_05_one_region_is_qan() -> None:
    """QAN coded on its own: global mean features, one sigmoid score, L1 over the set."""
    model = tiny(TinyQuality(1), regions=(7,), num_classes=5).eval()
    image = clip()
    rows = []
    for frames in image:
        feature = torch.stack([model.trunk(f[None]).map_BCHW[0].mean(dim=(1, 2)) for f in frames])
        head = model.quality
        logit = head.logits(frames, torch.empty(0)).flatten()
        score = 1 / (1 + torch.exp(-logit))
        total = sum(s * f for s, f in zip(score, feature, strict=True)) / score.sum()
        rows.append(total / total.square().sum().sqrt())
    out = model(image)
    torch.testing.assert_close(out.vector_SD, torch.stack(rows), rtol=0, atol=1e-6)
    assert out.score_STR is not None
    assert score_spread(out.score_STR) > 0.3


def test_check_05_scores_of_one_are_mean_pooling() -> None:
    image = clip()
    learned = tiny().eval()
    fixed, constant = tiny(fixed_scores=True).eval(), tiny(ConstantQuality()).eval()
    constant.trunk.load_state_dict(learned.trunk.state_dict())
    feature = learned.trunk(image.flatten(0, 1)).map_BCHW.unflatten(0, (3, 4))
    slabs = [feature[..., a:b, :].mean(dim=(1, 3, 4)) for a, b in ((0, 3), (3, 5), (5, 7))]
    expected = F.normalize(torch.cat(slabs, dim=1), dim=1)
    fixed.load_state_dict(learned.state_dict())
    for model in (fixed, constant):
        torch.testing.assert_close(model(image).vector_SD, expected, rtol=0, atol=1e-6)
    assert (learned(image).vector_SD - expected).abs().max() > 1e-3


def test_one_score_per_frame_is_shared_by_the_regions() -> None:
    model, full = tiny(TinyQuality(1)).eval(), tiny().eval()
    full.trunk.load_state_dict(model.trunk.state_dict())
    state = dict(model.quality.state_dict())
    state["fc.weight"] = state["fc.weight"].expand(3, -1)
    state["fc.bias"] = state["fc.bias"].expand(3)
    full.quality.load_state_dict(state)
    out = model(clip())
    assert out.score_STR is not None
    assert out.score_STR.shape == (3, 4, 1)
    torch.testing.assert_close(out.vector_SD, full(clip()).vector_SD)


def test_scores_are_not_compared_between_regions() -> None:
    """Scores that only differ between regions leave the mean of every region."""
    model, mean = tiny().eval(), tiny(fixed_scores=True).eval()
    with torch.no_grad():
        model.quality.fc.weight.zero_()
        model.quality.fc.bias.copy_(torch.tensor([0.0, -3.0, 2.0]))
    mean.load_state_dict(model.state_dict())
    expected = mean(clip()).vector_SD
    torch.testing.assert_close(model(clip()).vector_SD, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("region", [0, 1, 2])
def test_single_regions(region: int) -> None:
    model, single = tiny().eval(), tiny(use_regions=[region]).eval()
    single.load_state_dict(model.state_dict())
    part = model(clip()).vector_SD.unflatten(1, (3, 64))[:, region]
    out = single(clip())
    assert single.dimensions == 64
    torch.testing.assert_close(out.vector_SD, F.normalize(part, dim=1), rtol=0, atol=1e-6)
    assert single.frames(clip()[0]).score_BR.shape == (4, 1)


@pytest.mark.parametrize("outputs", [1, 3])
def test_streamed_frames_give_the_set_vector(outputs: int) -> None:
    model = tiny(TinyQuality(outputs)).eval()
    image = clip(sets=3, frames=5)
    stream = StreamingAggregate(3, model.regions, model.channels)
    index = torch.arange(3).repeat_interleave(5)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for part in order.split(4):
            frame = model.frames(image.flatten(0, 1)[part])
            stream.update(index[part], frame.region_BRC, frame.score_BR)
        expected = model(image).vector_SD
    torch.testing.assert_close(stream.vectors(), expected, rtol=0, atol=1e-6)


def test_padding_has_no_influence_in_evaluation() -> None:
    model = tiny().eval()
    image = clip(frames=3)
    padded = torch.cat([image, torch.full((3, 2, 3, 56, 28), torch.nan)], dim=1)
    valid = torch.tensor([True] * 3 + [False] * 2).expand(3, -1)
    with torch.no_grad():
        got, expected = model(padded, valid).vector_SD, model(image).vector_SD
        one = model(image[:, :1]).vector_SD
        first = model.frames(image[:, 0]).region_BRC.flatten(1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(one, F.normalize(first, dim=1), rtol=0, atol=1e-6)


def test_boundaries_move_the_regions() -> None:
    model = tiny().eval()
    image = clip(sets=2, frames=3)
    edge = torch.tensor([3 / 7, 5 / 7]).expand(2, 3, -1).clone()
    same = model(image, None, edge).vector_SD
    torch.testing.assert_close(same, model(image).vector_SD, rtol=0, atol=1e-6)
    edge[1] = torch.tensor([2 / 7, 4 / 7])
    moved = model(image, None, edge).vector_SD
    torch.testing.assert_close(moved[0], same[0])
    assert (moved[1] - same[1]).abs().max() > 1e-3
    frame = model.frames(image[1], edge[1])
    mean = model.trunk(image[1]).map_BCHW[:, :, :2].mean(dim=(2, 3))
    torch.testing.assert_close(frame.region_BRC[:, 0], mean)


ROWS = {
    "rqen tiny": lambda: (tiny(num_classes=4), clip()),
    "qan_parts tiny": lambda: (tiny(TinyQuality(1), num_classes=4), clip()),
    "qan tiny": lambda: (tiny(TinyQuality(1), regions=(7,), num_classes=4), clip()),
    "fixed tiny": lambda: (tiny(ConstantQuality(), num_classes=4), clip()),
    "rqen image": lambda: (
        RQEN(GoogLeNetBN(), ImageQuality(3, grid=(4, 4)), 4, aux_grids=((2, 2), (1, 1))),
        torch.randn(3, 2, 3, 96, 96),
    ),
    "rqen pool2": lambda: (
        RQEN(GoogLeNetBN(), Pool2FC(3, grid=(12, 12)), 4, aux_grids=((2, 2), (1, 1))),
        torch.randn(3, 2, 3, 96, 96),
    ),
    "resnet pool2_conv": lambda: (
        RQEN(ResNet50(last_stride=1), Pool2Conv(1, 512, grid=(2, 2)), 4, regions=(1, 1)),
        torch.randn(3, 2, 3, 64, 64),
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_every_parameter_gets_a_gradient(row: str) -> None:
    torch.manual_seed(0)
    model, image = ROWS[row]()
    # A margin beyond every distance keeps the triplet active.
    loss, parts = SetObjective(margin=4.0)(model(image), PID)
    loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    assert loss.isfinite()
    assert ("aux2" in parts) == ("image" in row or "rqen pool2" == row)


def test_the_softmax_row_uses_all_its_parameters() -> None:
    model = tiny(ConstantQuality(), regions=(7,), num_classes=4)
    loss, _ = SoftmaxObjective()(model(clip(sets=5, frames=1)), torch.arange(5)[:, None] % 4)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_auxiliary_logits_are_for_training() -> None:
    torch.manual_seed(0)
    model = RQEN(GoogLeNetBN(), ConstantQuality(), 4, aux_grids=((2, 2), (1, 1)))
    image = torch.randn(2, 2, 3, 96, 96)
    assert [tuple(x.shape) for x in model(image).logits] == [(4, 4)] * 3
    assert len(model.eval()(image).logits) == 1
    dropped = RQEN(GoogLeNetBN(), ConstantQuality(), None)
    assert not [n for n in dropped.state_dict() if n.startswith(("auxiliary", "classifier"))]
    # A run's weights load without the classifiers into the evaluation model.
    missing = dropped.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert missing == []


def test_frame_logits_are_of_the_global_mean() -> None:
    model = tiny(num_classes=4).eval()
    image = clip()
    pooled = model.trunk(image.flatten(0, 1)).map_BCHW.mean(dim=(2, 3))
    assert model.classifier is not None
    torch.testing.assert_close(model(image).logits[0], model.classifier(pooled))


def test_check_13_weights_sum_to_one_in_bfloat16() -> None:
    model = tiny(num_classes=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(clip(frames=50))
        loss, _ = SetObjective()(out, PID)
    assert out.vector_SD.dtype == torch.float32
    assert loss.dtype == torch.float32
    assert out.score_STR is not None
    weight = score_weights(out.score_STR)
    assert (weight.sum(dim=1) - 1).abs().max() <= 1e-5
    assert (out.vector_SD.norm(dim=1) - 1).abs().max() <= 1e-5
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="quality gives 2 scores, need 1 or 3"):
        tiny(TinyQuality(2))
    with pytest.raises(ValueError, match=r"use_regions=\[3\]"):
        tiny(use_regions=[3])
    with pytest.raises(ValueError, match="fixed_scores=True is a test-time switch"):
        tiny(fixed_scores=True)(clip())
    with torch.device("meta"), pytest.raises(ValueError, match="aux_grids"):
        RQEN(GoogLeNetBN(), ConstantQuality(), 4, aux_grids=((4, 4),))
