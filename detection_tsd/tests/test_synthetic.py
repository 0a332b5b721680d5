"""Generated sets: the layout of COCO, a function of the seed, complete or absent."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hydra.utils import instantiate

from common.log import InputError
from detection_tsd.data.digits import digit_marks
from detection_tsd.data.glyphs import TRAIN, VAL, Law, draw_scene, glyph_marks
from detection_tsd.data.synthetic import KINDS, generate, load_synthetic, write_glyphs
from detection_tsd.tests.launch import config

SMALL = {"train": 5, "val": 4}


def contents(root: Path) -> dict[str, Any]:
    """Files by name; archives as their arrays, for they hold the time of their writing."""
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        if path.suffix == ".npz":
            with np.load(path) as file:
                found |= {f"{path.name}/{key}": file[key].tobytes() for key in file.files}
        elif path.is_file():
            found[str(path.relative_to(root))] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_glyphs(tmp_path_factory.mktemp("synthetic") / "small", seed=3, **SMALL)


@pytest.mark.parametrize("kind", ["glyphs", "digits"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_files_hold_the_scenes(kind: str, split: str, tmp_path: Path) -> None:
    root = generate(tmp_path / "set", kind=kind, seed=3, **SMALL)
    content = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
    number = {"train": TRAIN, "val": VAL}[split]
    marks = glyph_marks() if kind == "glyphs" else digit_marks(number)
    assert [c["name"] for c in content["categories"]] == list(marks.classes)
    assert [c["id"] for c in content["categories"]] == list(marks.class_ids)
    assert len(content["images"]) == SMALL[split]
    assert len({a["id"] for a in content["annotations"]}) == len(content["annotations"])
    proposals = np.load(root / f"proposals_{split}.npz")
    assert len(proposals.files) == SMALL[split]
    for row, image in enumerate(content["images"]):
        scene = draw_scene(marks, Law(), 3, number, row)
        stored = cv2.imread(str(root / split / image["file_name"]))
        assert np.array_equal(stored[..., ::-1], scene.image_HW3)
        assert np.array_equal(proposals[str(image["id"])], scene.proposal_M4)
        objects = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        box_G4 = np.array([a["bbox"] for a in objects])
        box_G4[:, 2:] += box_G4[:, :2]
        assert np.abs(box_G4 - scene.box_G4).max() < 2e-3
        assert [a["category_id"] for a in objects] == [
            marks.class_ids[label - 1] for label in scene.label_G
        ]
        assert np.array_equal(np.array([a["glyph"] for a in objects]), scene.mark_G2)


def test_outlines_and_areas_fit_the_bodies(small: Path) -> None:
    from pycocotools import mask

    content = json.loads((small / "annotations/instances_train.json").read_text())
    for entry in content["annotations"]:
        code = mask.merge(mask.frPyObjects(entry["segmentation"], 96, 96))
        assert mask.area(code) == pytest.approx(entry["area"], rel=0.06)
        assert np.abs(mask.toBbox(code) - entry["bbox"]).max() < 1.6


def test_the_splits_load_with_proposals_and_outlines(small: Path) -> None:
    data = load_synthetic(small, "val", masks=True, kind="glyphs", seed=3, **SMALL)
    assert (len(data), data.num_classes, data.class_ids) == (4, 6, (1, 2, 3, 5, 8, 13))
    assert data.proposals is not None
    assert data.proposals[0].dtype == np.float32
    annotation = data.objects.read(0)
    assert annotation.segments is not None
    assert len(annotation.segments) == len(annotation.box_G4)
    assert data.images.read(0).shape == (96, 96, 3)
    assert data.source == small / "annotations/instances_val.json"


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_is_written_and_loaded(kind: str, tmp_path: Path) -> None:
    for split in ("train", "val"):
        data = load_synthetic(tmp_path / kind, split, kind=kind, seed=1, **SMALL)
        assert len(data) > 0
        assert data.images.read(0).shape[2] == 3
        labels = np.concatenate([data.objects.labels(row) for row in range(len(data))])
        assert labels.min() >= 1
        assert labels.max() <= data.num_classes


@pytest.mark.parametrize("kind", ["openimages", "hierarchy"])
def test_sets_without_outlines_say_so(kind: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="masks"):
        load_synthetic(tmp_path / kind, masks=True, kind=kind, **SMALL)


def test_the_seed_decides_everything(small: Path, tmp_path: Path) -> None:
    assert contents(write_glyphs(tmp_path / "again", seed=3, **SMALL)) == contents(small)
    other = contents(write_glyphs(tmp_path / "other", seed=4, **SMALL))
    same = [name for name, content in contents(small).items() if other.get(name) == content]
    assert same == []


def test_a_larger_set_contains_the_smaller(small: Path, tmp_path: Path) -> None:
    large = contents(write_glyphs(tmp_path / "large", seed=3, train=7, val=4))
    few = contents(small)
    for name in (name for name in few if name.endswith(".png") or "proposals" in name):
        assert large[name] == few[name], name


def test_the_validation_split_can_have_a_seed_of_its_own(small: Path, tmp_path: Path) -> None:
    mixed = contents(write_glyphs(tmp_path / "mixed", seed=4, val_seed=3, **SMALL))
    for name, content in contents(small).items():
        if name.endswith(".png"):
            assert (mixed[name] == content) == name.startswith("val"), name


def test_a_complete_set_is_reused_and_a_damaged_one_made_anew(tmp_path: Path) -> None:
    out = write_glyphs(tmp_path / "set", seed=3, **SMALL)
    before, made = contents(out), os.stat(out / "synthetic.json").st_mtime_ns
    (out / "sizes.cache").write_bytes(b"of a loader")
    write_glyphs(out, seed=3, **SMALL)
    assert os.stat(out / "synthetic.json").st_mtime_ns == made
    (out / "train/000002.png").unlink()
    write_glyphs(out, seed=3, **SMALL)
    (out / "val/000001.png").write_bytes(b"cut short")
    write_glyphs(out, seed=3, **SMALL)
    assert contents(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_failed_generation_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("detection_tsd.data.synthetic._write_split", fail)
    with pytest.raises(OSError, match="disk full"):
        write_glyphs(tmp_path / "set", **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_foreign_folders_and_other_settings_are_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="seed=3 not 4"):
        write_glyphs(small, seed=4, **SMALL)
    with pytest.raises(InputError, match=r"jitter=0\.3 not 0"):
        write_glyphs(small, seed=3, jitter=0.0, **SMALL)
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(InputError, match="holds no complete synthetic data set"):
        write_glyphs(tmp_path, seed=3, **SMALL)
    (tmp_path / "synthetic.json").write_text("[]")
    with pytest.raises(InputError, match="holds no complete synthetic data set"):
        write_glyphs(tmp_path, seed=3, **SMALL)
    assert (tmp_path / "mine.txt").read_text() == "keep me"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"kind": "faces"}, "kind: must be one of glyphs"), ({"train": 0}, "train"),
        ({"val": -1}, "val"), ({"seed": -1}, "seed"), ({"val_seed": -2}, "val_seed"),
        ({"side": 10}, "side"), ({"jitter": 0.7}, "jitter"),
        ({"kind": "coco", "side": 128}, "side: means nothing"),
        ({"kind": "hierarchy", "centred": True}, "centred: means nothing"),
        ({"kind": "coco", "train": 2}, "train: must be at least 3"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(change: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=match):
        generate(tmp_path / "set", **change)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_split_is_named(small: Path) -> None:
    with pytest.raises(InputError, match="split: must be one of train, val: test"):
        load_synthetic(small, "test", kind="glyphs", seed=3, **SMALL)


@pytest.mark.parametrize("name", ["glyphs", "digits", "glyphs_centred"])
def test_configurations_make_both_splits(name: str, tmp_path: Path) -> None:
    words = [
        "experiment=debug/tiny", f"data={name}", f"data.root={tmp_path / name}",
        "data.train.train=3", "data.train.val=2", "data.train.seed=5",
    ]  # fmt: skip
    cfg = config("train", *words)
    train, val = instantiate(cfg.data.train), instantiate(cfg.data.val)
    assert (len(train), len(val)) == (3, 2)
    assert train.num_classes == (10 if name == "digits" else 6)
    settings = json.loads((tmp_path / name / "synthetic.json").read_text())
    assert settings["seed"] == 5
    assert settings["centred"] == (name == "glyphs_centred")
    assert settings["jitter"] == (0.0 if name == "glyphs_centred" else 0.3)


@pytest.mark.slow
def test_the_command_writes_the_set(small: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "detection_tsd.data.synthetic", f"out={tmp_path / 'set'}"]
    command += ["seed=3", "train=5", "val=4"]
    subprocess.run(command, check=True)
    assert contents(tmp_path / "set") == contents(small)
    failed = subprocess.run([*command, "kind=faces"], capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: kind: must be one of")
