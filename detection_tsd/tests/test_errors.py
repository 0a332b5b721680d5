"""Bad input ends with code 2 and one line `error: <where>: <what>: <value>`, no traceback."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from detection_tsd.tests.conftest import SIZES
from detection_tsd.tests.launch import Ended, command, finish, start

TRAIN, EVALUATE = "detection_tsd.train", "detection_tsd.evaluate"
LOG_LINE = re.compile(r"\d\d:\d\d:\d\d [IW] |.*it/s, ")


def complaint(done: Ended) -> str:
    """The one error line; fails when anything but log lines comes with it."""
    assert done.code == 2, done
    *others, last = done.err.splitlines()
    assert last.startswith("error: ")
    assert len(last.removeprefix("error: ").split(": ")) >= 2
    assert all(LOG_LINE.match(line) for line in others), others
    return last


@pytest.fixture
def coco(glyphs: Path, tmp_path: Path) -> Path:
    """The glyph set in the folders of COCO 2017."""
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        shutil.copytree(glyphs / split, root / f"{split}2017")
        source = glyphs / "annotations" / f"instances_{split}.json"
        shutil.copy(source, root / "annotations" / f"instances_{split}2017.json")
    return root


def words(root: Path, run_dir: Path) -> tuple[str, ...]:
    """A training on the COCO folder at `root`, as on the real set."""
    return (
        "experiment=coco/sibling_r50", f"data.root={root}", "num_classes=6", "backbone=tiny",
        "rpn=tiny", "head=sibling_small", "transform=keep", "epochs=null", "steps=2",
        "global_batch=8", "grouped=false", "precision=float32", "workers=0", "device=cpu",
        "tensorboard=false", f"run_dir={run_dir}",
    )  # fmt: skip


def edit(root: Path, change: Callable[[Any], object], split: str = "train") -> Path:
    path = root / "annotations" / f"instances_{split}2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def no_root(root: Path) -> str:
    shutil.rmtree(root)
    return f"error: {root}"


def no_json(root: Path) -> str:
    path = root / "annotations" / "instances_train2017.json"
    path.write_text("{")
    return f"error: {path}"


def empty_json(root: Path) -> str:
    path = root / "annotations" / "instances_train2017.json"
    path.write_bytes(b"")
    return f"error: {path}"


def without_categories(root: Path) -> str:
    return f"error: {edit(root, lambda content: content.pop('categories'))}"


def unknown_category(root: Path) -> str:
    return f"error: {edit(root, lambda content: content['annotations'][0].update(category_id=4))}"


def unknown_image(root: Path) -> str:
    return f"error: {edit(root, lambda content: content['annotations'][0].update(image_id=99999))}"


def box_without_numbers(root: Path) -> str:
    change = {"bbox": [1, 2, None, 4]}
    return f"error: {edit(root, lambda content: content['annotations'][0].update(change))}"


def truncated_picture(root: Path) -> str:
    for path in (root / "train2017").iterdir():
        path.write_bytes(path.read_bytes()[:-200])
    return f"error: {root / 'train2017'}"


def missing_picture(root: Path) -> str:
    shutil.rmtree(root / "train2017")
    return f"error: {root / 'train2017'}"


@pytest.mark.parametrize(
    "harm",
    [
        no_root, no_json, empty_json, without_categories, unknown_category, unknown_image,
        box_without_numbers, truncated_picture, missing_picture,
    ],
)  # fmt: skip
def test_check_14_a_damaged_training_set(
    harm: Callable[[Path], str], coco: Path, tmp_path: Path
) -> None:
    expected = harm(coco)
    line = complaint(command(TRAIN, *words(coco, tmp_path / "run")))
    assert line.startswith(expected)


def test_a_sound_set_in_coco_folders_trains(coco: Path, tmp_path: Path) -> None:
    assert command(TRAIN, *words(coco, tmp_path / "run")).code == 0


def test_check_14_another_class_count_is_named(run: Path, coco: Path, tmp_path: Path) -> None:
    change = {"id": 99, "name": "one more"}
    edit(coco, lambda content: content["categories"].append(change), "val")
    call = (f"run_dir={run}", "data=coco", f"data.root={coco}", f"out={tmp_path}", "device=cpu")
    line = complaint(command(EVALUATE, *call))
    assert line == "error: data: classes differ from the 6 of the model: 7"


def test_a_damaged_picture_stops_an_evaluation(run: Path, glyphs: Path, tmp_path: Path) -> None:
    root = shutil.copytree(glyphs, tmp_path / "set")
    path = sorted((root / "val").iterdir())[2]
    path.write_bytes(bytes(path.stat().st_size))  # the size stays, so the set is not made anew
    call = (f"run_dir={run}", "data=glyphs", f"data.root={root}", f"out={tmp_path}")
    sizes = [f"data.train.{name}={count}" for name, count in SIZES.items()]
    for workers in (0, 1):
        line = complaint(command(EVALUATE, *call, *sizes, "device=cpu", f"workers={workers}"))
        assert line.startswith(f"error: {path}: ")


def test_a_set_without_proposals_needs_an_rpn(run: Path, coco: Path, tmp_path: Path) -> None:
    call = (f"run_dir={run}", "data=coco", f"data.root={coco}", f"out={tmp_path}", "device=cpu")
    line = complaint(command(EVALUATE, *call))
    assert line.startswith("error: data: brings no proposals, and the detector has no RPN: ")


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (["protocol=voc"], "error: protocol: must be one of coco, openimages: voc"),
        ([], "error: run_dir, checkpoint, predictions: give exactly one of them"),
        (["run_dir=a", "checkpoint=b"], "error: run_dir, checkpoint, predictions: give exactly"),
        (["run_dir=nowhere"], "error: nowhere: holds no complete checkpoint"),
        (["checkpoint=nowhere"], "error: nowhere: no such release file or checkpoint folder"),
        (["predictions=a.json"], "error: annotations: predictions need the annotation file"),
        (["predictions=a.json", "annotations=b.json"], "error: b.json: cannot be read"),
        (
            ["protocol=openimages", "predictions=a.csv", "annotations=b.csv"],
            "error: classes: the protocol openimages needs this file",
        ),
    ],
)
def test_an_evaluation_of_nothing(call: list[str], expected: str, tmp_path: Path) -> None:
    line = complaint(command(EVALUATE, *call, f"out={tmp_path}", "device=cpu"))
    assert line.startswith(expected)


def test_predictions_of_an_unknown_image(glyphs: Path, tmp_path: Path) -> None:
    entry = {"image_id": "other", "category_id": 1, "bbox": [0, 0, 5, 5], "score": 0.5}
    (tmp_path / "d.json").write_text(json.dumps([entry]))
    truth = glyphs / "annotations" / "instances_val.json"
    call = (f"predictions={tmp_path / 'd.json'}", f"annotations={truth}", f"out={tmp_path}")
    line = complaint(command(EVALUATE, *call))
    assert line == (
        f"error: {tmp_path / 'd.json'} [0]: image_id is not in the annotation file: other"
    )


def test_views_that_cannot_be(run: Path, tmp_path: Path) -> None:
    line = complaint(
        command(EVALUATE, f"run_dir={run}", "views=[[0,10]]", f"out={tmp_path}", "device=cpu")
    )
    assert "view" in line


def test_a_misspelt_key(tmp_path: Path) -> None:
    line = complaint(command(TRAIN, "experiment=debug/tiny", "stepz=1", f"run_dir={tmp_path}"))
    assert "stepz" in line


@pytest.mark.slow
def test_bad_input_under_torchrun_ends_every_rank(coco: Path, tmp_path: Path) -> None:
    without_categories(coco)
    done = finish(start(TRAIN, *words(coco, tmp_path / "run"), ranks=2))
    assert done.code != 0
    assert "error: " in done.err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_sizes_of_the_small_set(glyphs: Path) -> None:
    assert len(list((glyphs / "train").iterdir())) == SIZES["train"]
