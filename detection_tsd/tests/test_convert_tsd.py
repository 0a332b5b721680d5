"""Conversion of checkpoints of Sense-X/TSD.

Letters: B images of a batch, H W size, D detections, R regions.
"""

import argparse
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.log import InputError
from detection_tsd.tests import published_detector as theirs
from detection_tsd.tests import published_keys as keys
from detection_tsd.tests.launch import command, config
from detection_tsd.tools.checkpoints import read_checkpoint
from detection_tsd.tools.class_names import coco_categories, name_classes
from detection_tsd.tools.convert_tsd import compose_tsd, convert
from detection_tsd.tools.key_maps import rename
from detection_tsd.tools.structure import fit, read_structure, state_on_meta
from detection_tsd.weights import Trained, load_initial, load_trained, read_safetensors

SIZE = (56, 88)  # of the valid part; the input is 64 x 96
FEW = 24  # proposals of a level, and of an image: the loops of the peer are slow
GROUPED = keys.SMALL._replace(groups=4, base_width=16)


def settings(tmp_path: Path, *words: str) -> Any:
    places = [f"checkpoint={tmp_path / 'in.pth'}", f"out={tmp_path / 'sub' / 'out.safetensors'}"]
    return config("convert_tsd", *places, *words)


def converted(tmp_path: Path, content: Any, *words: str) -> Trained:
    """The release made of a checkpoint with this content, loaded again."""
    torch.save(content, tmp_path / "in.pth")
    return load_trained(checkpoint=convert(settings(tmp_path, *words)))


@cache
@torch.no_grad()
def state_of(head: str = "tsd", stages: int = 1, agnostic: bool = False) -> dict[str, Tensor]:
    """Random tensors under which classes, scores and boxes of regions differ; not to be changed."""
    state = keys.random(keys.mmdet(keys.SMALL, head, stages, agnostic=agnostic))
    for name, value in state.items():
        if name.endswith("bn3.weight"):
            value *= 0.5  # maps stay small
        if name.endswith("rpn_reg.weight"):
            value *= 0.3
    maps = theirs.pyramid(state, keys.SMALL.layers, picture())
    box = theirs.propose(state, maps, SIZE, FEW)
    for name in [name for name in state if name.endswith("fc_cls.weight")]:
        root, layer, _ = name.rsplit(".", 2)
        run = theirs.tsd if layer == "TSD_fc_cls" else theirs.sibling
        said = run(state, root, maps, box)
        for values, part in ((said.score, layer), (said.delta, layer.replace("cls", "reg"))):
            scale_K = 1.5 / values.std(dim=0)
            bias_K = state[f"{root}.{part}.bias"]
            bias_K.copy_(-(values - bias_K).mean(dim=0) * scale_K)
            state[f"{root}.{part}.weight"] *= scale_K[:, None]
    return state


def picture() -> Tensor:
    x_B3HW = torch.zeros(1, 3, 64, 96)
    x_B3HW[:, :, : SIZE[0], : SIZE[1]] = torch.randn(
        1, 3, *SIZE, generator=torch.Generator().manual_seed(5)
    )
    return x_B3HW


@pytest.mark.parametrize(
    ("row", "shapes"), keys.published(), ids=lambda x: x if isinstance(x, str) else ""
)
def test_published_names_and_shapes_are_those_of_our_detectors(
    row: str, shapes: keys.Shapes
) -> None:
    state = keys.on_meta(shapes)
    ours = rename(state, "mmdet_v1")
    structure = read_structure({new: state[old] for old, new in ours.items()}, Path("file"))
    shallow = structure.layers == keys.BLOCKS[50]
    for cfg in (compose_tsd(structure, row), *([compose_tsd(structure)] if shallow else [])):
        assert fit(state, ours, state_on_meta(cfg), Path("file")).keys() == set(ours.values())
    assert structure.num_classes in (80, 500)


@pytest.mark.parametrize("kind", [("tsd", 1), ("tsd", 3), ("sibling", 3, True)], ids=str)
@torch.no_grad()
def test_a_converted_detector_detects_the_same(tmp_path: Path, kind: Any) -> None:
    """Of the two-layer heads all classes share one regression."""
    state = state_of(*kind)
    trained = converted(tmp_path, keys.mmcv_file(state))
    agree(trained, theirs.detect(state, keys.SMALL.layers, picture(), SIZE, FEW, kind[1]))


@torch.no_grad()
def agree(trained: Trained, wanted: tuple[Tensor, Tensor, Tensor]) -> None:
    """Same scores, classes and boxes; scores within rounding of each other may change places."""
    model: Any = trained.model
    assert (model.rpn.pre[False], model.rpn.post[False]) == (1000, 1000)
    model.rpn.pre[False] = model.rpn.post[False] = FEW
    (got,) = model(picture(), torch.tensor([SIZE]))
    box_D4, score_D, label_D = wanted
    assert len(score_D) > 30
    assert len(label_D.unique()) > 3
    assert score_D[0] > 1.5 * score_D[-1]
    torch.testing.assert_close(got.score_D, score_D, rtol=1e-3, atol=1e-5)
    box_D4 = box_D4 + torch.tensor([0.0, 0.0, 1.0, 1.0])  # inclusive to continuous
    near = (got.box_D4[:, None] - box_D4).abs().amax(2) < 2e-2
    pairs = near & (got.label_D[:, None] == label_D)
    safe = score_D > score_D[-1] * 1.001
    assert (pairs[:, safe].sum(0) == 1).all()


@torch.no_grad()
def test_regions_of_a_converted_head_score_the_same(tmp_path: Path) -> None:
    state = state_of()
    head, x = converted(tmp_path, state).model, picture()
    maps = theirs.pyramid(state, keys.SMALL.layers, x)
    box = torch.tensor([
        [3.0, 4.0, 40.0, 50.0], [0.0, 0.0, 118.4, 87.0], [60.5, 20.5, 63.0, 21.2],
        [-9.0, 3.3, 30.0, 95.0], [70.0, 10.0, 126.0, 122.0],
    ])  # fmt: skip
    said = theirs.tsd(state, "bbox_head", maps, box)
    aux = theirs.sibling(state, "bbox_head", maps, box)
    roi_R5 = torch.cat((torch.zeros(len(box), 1), box), 1)
    model: Any = head
    pyramid = model.pyramids(model.features(x)).cls
    sibling, branch = model.head._both(pyramid, roi_R5)
    for ours, its in ((branch, said), (sibling, aux)):
        torch.testing.assert_close(ours.logits_RK, its.score, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(ours.delta_RK4.flatten(1), its.delta, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        branch.box_R4, theirs.shifted(box, said.shift_R2), rtol=1e-4, atol=1e-3
    )
    assert (said.shift_R2 * theirs.GAMMA).abs().max() > 0.05, "the regions do not move"


@torch.no_grad()
def test_masks_of_a_converted_detector_are_the_same(tmp_path: Path) -> None:
    state = keys.random(keys.mmdet(keys.SMALL, mask=True))
    model: Any = converted(tmp_path, state).model
    box = torch.tensor([[3.0, 4.0, 40.0, 50.0], [60.0, 20.0, 110.0, 80.0]])
    label = torch.tensor([2, 5])
    wanted = theirs.masks(state, theirs.pyramid(state, keys.SMALL.layers, picture()), box, label)
    outer = box + torch.tensor([0.0, 0.0, 1.0, 1.0])
    roi_R5 = torch.cat((torch.zeros(2, 1), outer), 1)
    got = model.masks(model.features(picture()), roi_R5, label)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    assert wanted.std() > 0.01


@torch.no_grad()
def test_a_grouped_deformable_trunk_computes_the_same(tmp_path: Path) -> None:
    state = keys.random(keys.mmdet(GROUPED, offsets="conv2_offset"))
    model: Any = converted(tmp_path, state).model
    wanted = theirs.pyramid(state, GROUPED.layers, picture())
    for ours, its in zip(model.features(picture()).cls, wanted, strict=True):
        torch.testing.assert_close(ours, its, rtol=1e-3, atol=1e-4)


def test_every_tensor_arrives_once_and_unchanged(tmp_path: Path) -> None:
    state = keys.random(keys.mmdet(keys.SMALL, mask=True, offsets="conv2.conv_offset"))
    torch.save({"state_dict": keys_of_parallel(state)}, tmp_path / "in.pth")
    release, _ = read_safetensors(convert(settings(tmp_path)))
    new = rename(state, "mmdet_v1")
    assert release.keys() == set(new.values())
    assert len(release) == len(state)
    for name, value in state.items():
        assert torch.equal(release[new[name]], value), name
    assert torch.equal(
        release["head.box_predictor.cls_score.weight"], state["bbox_head.TSD_fc_cls.weight"]
    )
    assert torch.equal(release["head.offset.reg.2.bias"], state["bbox_head.delta_r.2.bias"])


def keys_of_parallel(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{name}": value for name, value in state.items()}


def test_the_release_has_the_conventions_of_the_published_weights(tmp_path: Path) -> None:
    state = keys.zeros(keys.mmdet(keys.SMALL._replace(classes=81), mask=True))
    names = [name.replace(" ", "_") for name in coco_categories().values()]
    trained = converted(tmp_path, keys.mmcv_file(state, CLASSES=tuple(names)))
    model: Any = trained.model
    assert (model.plus, model.head.plus, model.rpn.plus, model.mask.plus) == (1, 1, 1, 1)
    assert (model.head.sampler, model.head.pooling, model.mask.pooling) == (
        "legacy", "mmdet_v1", "mmdet_v1",
    )  # fmt: skip
    assert (model.head.margin_cls, model.head.margin_box) == (0.3, 0.3)
    assert model.post.score_threshold == 0
    assert trained.classes[0] == "person"
    assert trained.class_ids[11] == 13
    assert trained.classes[11] == "stop sign"
    assert trained.config["train_set"] == "coco/train2017"
    assert trained.step == 0


def test_a_cascade_refines_boxes_of_any_class(tmp_path: Path) -> None:
    model: Any = converted(tmp_path, keys.zeros(keys.mmdet(stages=3))).model
    assert model.refine_class == "any"
    assert [head.stds for head in model.heads] == [pytest.approx(stds) for stds in theirs.STDS]


def test_a_release_starts_a_training(tmp_path: Path) -> None:
    trained = converted(tmp_path, keys.random(keys.mmdet()))
    before = {name: x.clone() for name, x in trained.model.state_dict().items()}
    for parameter in trained.model.parameters():
        torch.nn.init.zeros_(parameter)
    load_initial(trained.model, tmp_path / "sub" / "out.safetensors")
    assert all(torch.equal(x, before[name]) for name, x in trained.model.state_dict().items())


def test_names_of_the_classes(tmp_path: Path) -> None:
    assert name_classes(3) == (("1", "2", "3"), (1, 2, 3))
    assert name_classes(2, meta={"CLASSES": ("cat", "dog")}) == (("cat", "dog"), (1, 2))
    own = name_classes(80, meta={"CLASSES": [f"thing {k}" for k in range(80)]})
    assert own.ids[-1] == 80  # somebody else's 80 classes are not COCO's
    (tmp_path / "classes.csv").write_text("/m/01,Cat,2\n/m/02,Dog,1\n")
    assert name_classes(2, str(tmp_path / "classes.csv")) == (("Dog", "Cat"), ("/m/02", "/m/01"))
    with pytest.raises(InputError, match="names 2 classes, the checkpoint has: 3"):
        name_classes(3, str(tmp_path / "classes.csv"))
    with pytest.raises(InputError, match="names 1 classes, its head has: 3"):
        name_classes(3, meta={"CLASSES": ("cat",)})


def test_unknown_missing_and_unfit_tensors_are_all_listed(tmp_path: Path) -> None:
    state = keys.zeros(keys.mmdet())
    del state["bbox_head.delta_r.2.bias"], state["backbone.layer3.0.bn2.weight"]
    state["bbox_head.extra.weight"] = torch.zeros(1)
    state["rpn_head.rpn_reg.weight"] = torch.zeros(16, 8, 1, 1)
    torch.save(state, tmp_path / "in.pth")
    with pytest.raises(InputError) as raised:
        convert(settings(tmp_path))
    text = str(raised.value)
    for part in (
        "unknown: bbox_head.extra.weight",
        "missing (by our names): backbone.body.layer3.0.bn2.weight, head.offset.reg.2.bias",
        "wrong shapes: rpn_head.rpn_reg.weight (16, 8, 1, 1) not (12, 8, 1, 1)",
    ):
        assert part in text
    assert not (tmp_path / "sub").exists()


def test_two_names_of_one_tensor_are_refused(tmp_path: Path) -> None:
    state = keys.zeros(keys.mmdet(offsets="conv2.conv_offset"))
    twice = "backbone.layer2.0.conv2_offset.bias"
    state[twice] = state["backbone.layer2.0.conv2.conv_offset.bias"]
    torch.save(state, tmp_path / "in.pth")
    with pytest.raises(InputError, match=r"unknown: backbone\.layer2\.0\.conv2"):
        convert(settings(tmp_path))


def test_another_row_is_refused(tmp_path: Path) -> None:
    torch.save(keys.zeros(keys.mmdet(stages=3)), tmp_path / "in.pth")
    with pytest.raises(InputError, match=r"unknown: .*bbox_head\.0\.TSD_fc_cls\.bias.*missing"):
        convert(settings(tmp_path, "row=tsd_r50"))
    with pytest.raises(InputError, match="row: is not there, only coco/"):
        convert(settings(tmp_path, "row=tsd_r51"))


ONE = {"a": torch.zeros(1)}


class Unknown:
    """Something that a checkpoint of somebody else's holds."""


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({"meta": argparse.Namespace(a=1), "state_dict": ONE}, "weights_only=False"),
        ({"meta": {"hook": Unknown()}, "state_dict": ONE}, "The first of them is"),
        ({"state_dict": {"a": torch.zeros(1), "b": 3}}, "no tensors: .'b'."),
        ({"state_dict": ONE}, "no ResNet or ResNeXt of four stages"),
        ([1, 2], "no dictionary of tensors: list"),
        ({}, "no dictionary of tensors"),
    ],
)  # fmt: skip
def test_files_that_are_no_checkpoint(tmp_path: Path, content: Any, what: str) -> None:
    torch.save(content, tmp_path / "in.pth")
    with pytest.raises(InputError, match=what):
        convert(settings(tmp_path))


def test_a_file_that_lacks_the_box_head(tmp_path: Path) -> None:
    state = keys.zeros(keys.mmdet())
    torch.save(
        {n: x for n, x in state.items() if not n.startswith("bbox_head")}, tmp_path / "in.pth"
    )
    with pytest.raises(InputError, match=r"it lacks, by our name: head\.box_predictor\.cls_score"):
        convert(settings(tmp_path))


def test_a_missing_and_a_broken_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_checkpoint(tmp_path / "none.pth")
    (tmp_path / "in.pth").write_bytes(b"no checkpoint")
    with pytest.raises(InputError, match="is not a PyTorch file"):
        read_checkpoint(tmp_path / "in.pth")


def test_the_command(tmp_path: Path) -> None:
    torch.save(keys.mmcv_file(keys.zeros(keys.mmdet())), tmp_path / "in.pth")
    words = (f"checkpoint={tmp_path / 'in.pth'}", f"out={tmp_path / 'out.safetensors'}")
    ended = command("detection_tsd.tools.convert_tsd", *words)
    assert ended.code == 0, ended.err
    assert load_trained(checkpoint=tmp_path / "out.safetensors").config["num_classes"] == 5
    ended = command("detection_tsd.tools.convert_tsd", "checkpoint=nowhere.pth", "out=x")
    assert ended.code == 2
    assert ended.err.strip().splitlines()[-1] == "error: nowhere.pth: no such file"
