"""Conversion of published checkpoints."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn

from common.log import InputError
from video_mmit.tests import published_keys as keys
from video_mmit.tests import published_nets as nets
from video_mmit.tests.launch import command, config
from video_mmit.tools.convert_xtemporal import convert, fit, read_checkpoint, read_names
from video_mmit.tools.key_maps import SOURCES, detect, rename, without_prefix
from video_mmit.weights import Trained, load_initial, load_trained, read_safetensors

CLASSES = 5
SMALL = [
    "model/backbone=resnet18", "model.backbone.layers=[2,1,1,1]",
    "model.num_segments=2", "data.sampler.count=2",
]  # fmt: skip
FILES: dict[str, Callable[[dict[str, Tensor]], dict[str, Any]]] = {
    "xtemporal": keys.xtemporal_file,
    "tsm": keys.tsm_file,
    "mmaction2": keys.mmaction2_file,
}


def settings(tmp_path: Path, *words: str) -> DictConfig:
    """What the command gets for the file `in.pth`; the data set's name comes from Hydra's run."""
    places = [f"checkpoint={tmp_path / 'in.pth'}", f"out={tmp_path / 'sub' / 'out.safetensors'}"]
    return config("convert_xtemporal", *places, "train_set=mmit", *words)


def converted(tmp_path: Path, content: Any, *words: str) -> Trained:
    """The release made of a checkpoint with this content, loaded again."""
    torch.save(content, tmp_path / "in.pth")
    return load_trained(checkpoint=convert(settings(tmp_path, *words)))  # type: ignore[arg-type]


def small(temporal: str | None = "tin", source: str = "xtemporal") -> dict[str, Tensor]:
    return keys.random(keys.frame_net(12, CLASSES, source, temporal, segments=2))


def clip(frames: int, size: int) -> Tensor:
    """Two clips; in double precision, in which deep networks agree to many digits."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, frames, 3, size, size, generator=generator, dtype=torch.float64)


@torch.no_grad()
def agree(model: nn.Module, x_NTCHW: Tensor, expected_NK: Tensor) -> None:
    assert expected_NK.std(dim=0).mean() > 1e-3, "the clips do not tell right from wrong"
    torch.testing.assert_close(model.double()(x_NTCHW), expected_NK, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("source", ["xtemporal", "tsm", "mmaction2"])
@pytest.mark.parametrize("temporal", ["tin", "tsm", None])
def test_a_converted_frame_network_computes_the_same(
    tmp_path: Path, source: str, temporal: str | None
) -> None:
    if (source, temporal) == ("tsm", "tin"):
        source = "xtemporal"  # deepcs233/TIN: X-Temporal's names in temporal-shift-module's file
    state, x = small(temporal, source), clip(2, 48)
    expected = nets.run_frame_net(keys.double(state), source, 12, x, temporal)
    words = [f"model={temporal or 'tsn'}", *SMALL]
    trained = converted(tmp_path, FILES[source](state), *words)
    logits = trained.model(x.float()).detach()
    torch.testing.assert_close(logits, expected.float(), rtol=1e-5, atol=1e-5)
    agree(trained.model, x, expected)
    if temporal is not None:  # the order of the frames is seen, so the reference's time is ours
        flipped = nets.run_frame_net(keys.double(state), source, 12, x.flip(1), temporal)
        assert (flipped - expected).abs().max() > 1e-3


@pytest.mark.parametrize("source", ["tsm", "mmaction2"])
def test_shifted_blocks_and_a_temporal_pool_compute_the_same(tmp_path: Path, source: str) -> None:
    state = keys.random(keys.frame_net(12, CLASSES, source, "block", pool=True))
    x = clip(4, 48)
    expected = nets.run_frame_net(keys.double(state), source, 12, x, "block", pool=True)
    words = ["model=tsm", *SMALL, "model.num_segments=4", "model.tsm.place=block"]
    trained = converted(tmp_path, FILES[source](state), *words, "model.tsm.temporal_pool=true")
    agree(trained.model, x, expected)
    with pytest.raises(InputError, match=r"model\.tsm\.temporal_pool: is True .*: False"):
        converted(tmp_path, state, *words)
    with pytest.raises(InputError, match=r"model\.tsm\.temporal_pool: is True .*: False"):
        converted(tmp_path, state, "model=tsn", *SMALL)


def test_the_offset_network_of_tin_is_laid_out_as_published(tmp_path: Path) -> None:
    """Transposing or swapping any of its layers of equal shape changes the reference."""
    state, x = small("tin"), clip(2, 48)
    expected = nets.run_frame_net(keys.double(state), "xtemporal", 12, x, "tin")
    layers = keys.Names("xtemporal").interlace("base_model.layer1.1.conv1")
    hidden, offset = f"{layers['hidden']}.weight", f"{layers['offset']}.weight"
    summary, weight = f"{layers['summary']}.weight", f"{layers['weight']}.weight"
    wrong = [
        {hidden: state[hidden].T},
        {offset: state[offset].flip(0)},
        {offset: state[hidden], hidden: state[offset]},
        {weight: state[weight].flip(0)},
        {summary: state[summary].flip(2)},
    ]
    for change in wrong:
        other = nets.run_frame_net(keys.double({**state, **change}), "xtemporal", 12, x, "tin")
        assert (other - expected).abs().max() > 1e-4
    trained = converted(tmp_path, state, "model=tin", *SMALL)
    agree(trained.model, x, expected)


@pytest.mark.parametrize("source", ["tsm", "mmaction2"])
def test_non_local_blocks_compute_the_same(tmp_path: Path, source: str) -> None:
    state = keys.random(keys.frame_net(50, CLASSES, source, "tsm", 2, non_local=True))
    x = clip(2, 64)
    expected = nets.run_frame_net(keys.double(state), source, 50, x, "tsm", non_local=True)
    words = ["experiment=kinetics400/tsm_r50_8f_nl", "model.num_segments=2"]
    trained = converted(tmp_path, FILES[source](state), *words)
    agree(trained.model, x, expected)
    assert not trained.multi_label


def test_clip_networks_compute_the_same(tmp_path: Path) -> None:
    x = clip(8, 32)
    rows: list[tuple[list[str], keys.Shapes, Callable[[dict[str, Tensor]], Tensor]]] = [
        (
            ["model=slowfast", "model.frames=8", "data/sampler=dense", "data.sampler.count=8"],
            keys.slowfast(50, CLASSES),
            lambda state: nets.run_slowfast(keys.double(state), 50, x),
        ),
        (
            ["model=r2plus1d", "model.depth=10", "data/sampler=dense"],
            keys.clip_net(10, CLASSES, split=True),
            lambda state: nets.run_clip_net(keys.double(state), 10, x, (1, 3, 3)),
        ),
        (
            ["model=r3d", "model.depth=10", "data/sampler=dense"],
            keys.clip_net(10, CLASSES, split=False),
            lambda state: nets.run_clip_net(keys.double(state), 10, x, (3, 3, 3)),
        ),
    ]
    for words, shapes, run in rows:
        state = keys.random(shapes)
        trained = converted(tmp_path, keys.xtemporal_file(state), *words)
        agree(trained.model, x, run(state))
        assert trained.config["sampler"]["_target_"].endswith("Dense")


@pytest.mark.parametrize(
    ("experiment", "source", "shapes"),
    keys.published(),
    ids=[f"{source}:{experiment}" for experiment, source, _ in keys.published()],
)
def test_check_12_every_published_key_has_a_place(
    tmp_path: Path, experiment: str, source: str, shapes: keys.Shapes
) -> None:
    """No missing, no unknown name, every shape; the tensors have no memory here."""
    with torch.device("meta"):
        published = {name: torch.empty(shape) for name, shape in shapes.items()}
        cfg = settings(tmp_path, f"experiment={experiment}")
        if OmegaConf.select(cfg.model, "backbone.weights"):
            cfg.model.backbone.weights = None
        heads = [shape[0] for name, shape in shapes.items() if len(shape) == 2]
        own = instantiate(cfg.model)(num_classes=heads[-1]).state_dict()
    assert detect(published) in (source, "xtemporal")
    state = fit(published, rename(published, source), own, source, Path("f"))
    assert list(state) == list(own)
    absent = {name for name in state if state[name].device.type == "cpu"}
    assert all(name.endswith("non_local.out.bias") for name in absent)


def test_check_12_full_size_tin(tmp_path: Path) -> None:
    """ResNet-50, 8 frames, 313 classes, as a file."""
    shapes = keys.frame_net(50, 313, "xtemporal", "tin", 8)
    trained = converted(
        tmp_path, keys.xtemporal_file(keys.zeros(shapes)), "experiment=mmit/tin_r50_8f"
    )
    assert sum(value.numel() for value in trained.model.parameters()) == 24_180_377
    assert trained.multi_label
    assert trained.classes == tuple(map(str, range(313)))
    assert trained.config["train_set"] == "mmit"
    assert trained.config["model"]["backbone"]["weights"] is None
    assert trained.sampler.count == 8
    assert trained.transform.channels == 3


def test_single_scale_relations() -> None:
    shapes = keys.relations(CLASSES, 3, "mmaction2", 512, multi_scale=False)
    found = set(rename(shapes, "mmaction2").values())
    layers = ("trn.reduce", "trn.relations.0.1", "trn.relations.0.3")
    assert found == {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}


def test_kinds_of_files(tmp_path: Path) -> None:
    """Bare, under either key, with either prefix, in either format of torch.save."""
    state = {"new_fc.weight": torch.ones(2, 3), "base_model.conv1.weight": torch.zeros(1)}
    path = tmp_path / "in.pth"
    files: list[Any] = [state, OrderedDict(keys.parallel(state))]
    files += [{"model": state}, {"epoch": 3, "state_dict": keys.parallel(state)}]
    files += [make(state) for make in FILES.values()]
    for content in files:
        for zipped in (True, False):
            torch.save(content, path, _use_new_zipfile_serialization=zipped)
            found = read_checkpoint(path)
            assert found.keys() == state.keys()
            assert all(torch.equal(found[name], state[name]) for name in state)


def test_old_files_and_files_trained_without_dropout(tmp_path: Path) -> None:
    state = small(None)
    whole = converted(tmp_path, state, "model=tsn", *SMALL).model.state_dict()
    assert whole["backbone.bn1.num_batches_tracked"] == 7
    old = {name: value for name, value in state.items() if not name.endswith("tracked")}
    old = {name.replace("new_fc", "base_model.fc"): value.double() for name, value in old.items()}
    found = converted(tmp_path, old, "model=tsn", *SMALL).model.state_dict()
    for name, value in whole.items():
        assert found[name].dtype == value.dtype
        expected = torch.tensor(0) if name.endswith("tracked") else value
        assert torch.equal(found[name], expected)


def test_names_of_classes(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("b,1\r\na,0\r\nc d+e,2\r\n")
    assert read_names(str(path), 3) == ("a", "b", "c d+e")
    path.write_text("Putting something, then leaving\nb\n")
    assert read_names(str(path), 2) == ("Putting something, then leaving", "b")
    assert read_names(None, 3) == ("0", "1", "2")
    with pytest.raises(InputError, match=r"classes\.txt: names 2 classes, the classifier .*: 3$"):
        read_names(str(path), 3)
    with pytest.raises(InputError, match="file is missing"):
        read_names(str(tmp_path / "none"), 3)


def test_every_mismatch_is_listed_in_one_message(tmp_path: Path) -> None:
    state = small("tin")
    first, last = "base_model.bn1.bias", "base_model.layer4.0.bn2.weight"
    offset = "base_model.layer2.0.conv1.net1.biasnet.net.lastlayer.bias"
    del state[first], state[last]
    state[offset] = torch.zeros(4)
    state["base_model.layer9.weight"] = state["aux"] = torch.zeros(1)
    state["base_model.fc.weight"] = state["new_fc.weight"]  # a second classifier
    with pytest.raises(InputError) as caught:
        converted(tmp_path, state, "model=tin", *SMALL)
    assert str(caught.value).split(": ", 1)[1] == (
        "is not a checkpoint of this network: "
        "unknown: aux, base_model.layer9.weight, new_fc.weight; "
        "missing (by our names): backbone.bn1.bias, backbone.layer4.0.bn2.weight; "
        f"wrong shapes: {offset} (4,) not (2,)"
    )
    assert not (tmp_path / "sub").exists()


def test_another_network_is_refused(tmp_path: Path) -> None:
    """The weights of TSM fit a TSN by shape alone: names decide."""
    with pytest.raises(InputError, match=r"unknown: base_model\.layer1\.0\.conv1\.net\.weight, "):
        converted(tmp_path, small("tsm"), "model=tsn", *SMALL)
    with pytest.raises(InputError, match=r"conv1\.net1\.biasnet\.net\.conv\.bias, "):
        converted(tmp_path, small("tin"), "model=tsm", *SMALL)
    with pytest.raises(InputError, match=r"source: must be one of auto, .*: caffe$"):
        converted(tmp_path, small("tin"), "model=tin", *SMALL, "source=caffe")
    with pytest.raises(InputError, match=r"conv1\.net1\.biasnet"):
        converted(tmp_path, small("tin"), "model=tin", *SMALL, "source=tsm")
    shapes = keys.frame_net(12, CLASSES, "tsm", "tsm", 2, every=2)
    with pytest.raises(InputError, match=r"unknown: base_model\.layer1\.1\.conv1\.weight; "):
        converted(tmp_path, keys.random(shapes), "model=tsm", *SMALL)
    converted(tmp_path, keys.random(shapes), "model=tsm", "model.tsm.n_round=2", *SMALL)


def test_settings_that_no_shape_shows(tmp_path: Path) -> None:
    state, words = small("tin"), ["model=tin", *SMALL]
    with pytest.raises(
        InputError, match=r"model\.num_segments: .*in\.pth has offsets for 2 frames: 8"
    ):
        converted(tmp_path, state, *words, "model.num_segments=8", "data.sampler.count=8")
    with pytest.raises(InputError, match=r"data\.sampler\.count: .* clips of 2 frames: 8"):
        converted(tmp_path, state, *words, "data.sampler.count=8")
    with pytest.raises(InputError, match=r"model\.tin\.offset_scale: is 4\.0 in .*: 8\.0"):
        converted(tmp_path, state, *words, "model.tin.offset_scale=8.0")
    with pytest.raises(InputError, match=r"model\.non_local\.mode: is embedded .*: dot"):
        converted(tmp_path, state, *words, "model/non_local=embedded", "model.non_local.mode=dot")
    with pytest.raises(InputError, match=r"model\.alpha: is 4 .*: 8"):
        converted(tmp_path, state, "model=slowfast", "model.alpha=8")
    with pytest.raises(InputError, match=r"model: cannot be built: channels=64: .*shift_div 5"):
        converted(tmp_path, state, *words, "model.tin.shift_div=5")
    assert converted(tmp_path, state, *words, "multi_label=false").multi_label is False
    assert converted(tmp_path, state, *words, "loss=ce").multi_label is False


class Foreign:
    """An object of a class that only the writer of a file has."""


def test_files_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "in.pth"
    with pytest.raises(InputError, match=r"in\.pth: no such file"):
        read_checkpoint(path)
    for content in (b"", b"hello world", b"PK\x03\x04 half a file", b"\x80\x02u."):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"in\.pth: is not a PyTorch file of tensors"):
            read_checkpoint(path)
    good = {"state_dict": {"new_fc.weight": torch.ones(1)}}
    torch.save(good | {"message_hub": Foreign()}, path)
    with pytest.raises(InputError, match=r"could run code; save its state_dict alone.*Foreign$"):
        read_checkpoint(path)
    for other in (3, [torch.ones(1)], {}):
        torch.save(other, path)
        with pytest.raises(InputError, match="holds no dictionary of tensors"):
            read_checkpoint(path)
    torch.save({"model": {"a": torch.ones(1), "b": 3}}, path)
    with pytest.raises(InputError, match=r"no tensors: \['b'\]"):
        read_checkpoint(path)


def test_names_of_no_source_and_no_classifier(tmp_path: Path) -> None:
    backbone = {
        name.removeprefix("base_model."): value
        for name, value in small(None).items()
        if not name.startswith("new_fc")
    }
    with pytest.raises(InputError, match=r"a backbone alone .*: bn1\.bias"):
        converted(tmp_path, backbone, "model=tsn", *SMALL)
    headless = {name: value for name, value in small(None).items() if "new_fc" not in name}
    with pytest.raises(InputError, match="has no classifier"):
        converted(tmp_path, headless, "model=tsn", *SMALL)
    assert SOURCES == ("auto", "xtemporal", "tsm", "mmaction2")
    assert without_prefix({"module.a": torch.ones(1)}).keys() == {"a"}


def test_a_converted_file_starts_a_training(tmp_path: Path) -> None:
    trained = converted(tmp_path, small("tin"), "model=tin", *SMALL)
    theirs = trained.model.state_dict()
    for num_classes in (CLASSES, 9):
        cfg = config("train", "model=tin", *SMALL)
        model = instantiate(cfg.model)(num_classes=num_classes)
        head = model.head.weight.clone()
        load_initial(model, trained.source)
        own = model.state_dict()
        assert all(torch.equal(own[n], theirs[n]) for n in own if not n.startswith("head."))
        expected = theirs["head.weight"] if num_classes == CLASSES else head
        assert torch.equal(own["head.weight"], expected)


def test_torchvision_weights_start_a_tin(tmp_path: Path) -> None:
    """A backbone alone, by torchvision's names: its first convolutions are wrapped here."""
    backbone = {
        name.removeprefix("base_model."): value
        for name, value in small(None).items()
        if not name.startswith("new_fc")
    }
    save_file(backbone, tmp_path / "resnet18.safetensors")
    model = instantiate(config("train", "model=tin", *SMALL).model)(num_classes=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    load_initial(model, tmp_path / "resnet18.safetensors")
    taken = set()
    for name, value in model.state_dict().items():
        plain = name.removeprefix("backbone.").replace(".conv1.conv.weight", ".conv1.weight")
        if plain in backbone:
            taken.add(plain)
            assert torch.equal(value, backbone[plain])
        else:
            assert ".temporal." in name or name.startswith("head.")
            assert torch.equal(value, before[name])
    assert taken == backbone.keys()


def test_the_command(tmp_path: Path) -> None:
    torch.save(keys.xtemporal_file(small("tin")), tmp_path / "in.pth")
    (tmp_path / "classes.txt").write_text("".join(f"class {k},{k}\n" for k in range(CLASSES)))
    out = tmp_path / "sub" / "out.safetensors"
    words = [f"checkpoint={tmp_path}/in.pth", f"out={out}", "experiment=sthv1/tin_r50_8f", *SMALL]
    module = "video_mmit.tools.convert_xtemporal"
    ended = command(module, *words, f"classes={tmp_path}/classes.txt")
    assert ended.code == 0, ended.err
    assert "tensors with names of xtemporal, 5 classes" in ended.err
    trained = load_trained(checkpoint=out)
    assert trained.classes == tuple(f"class {k}" for k in range(CLASSES))
    assert trained.config["train_set"] == "sthv1"
    assert not trained.multi_label
    assert trained.step == 0
    assert read_safetensors(out)[1]["format"] == "pt"
    assert sorted(path.name for path in out.parent.iterdir()) == [out.name]
    ended = command(module, *words, "model.num_segments=8", "data.sampler.count=8")
    assert ended.code == 2
    assert ended.err.splitlines()[-1].startswith("error: model.num_segments: ")
