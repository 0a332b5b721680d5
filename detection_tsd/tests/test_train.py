"""Training in one process: it learns, it resumes exactly, it counts what it cannot read."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common import dist
from common.log import InputError
from detection_tsd.data.detection_data import Batch, Target
from detection_tsd.tests.launch import rows, saved, train
from detection_tsd.train import _Step
from detection_tsd.weights import Trainee, load_trained


def column(run: Path, name: str) -> np.ndarray:
    return np.array([row[name] for row in rows(run)])


def cut(run: Path, copy: Path, step: int) -> Path:
    """The run as it was just after it saved `step`."""
    shutil.copytree(run, copy)
    for folder in (copy / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[:step]))
    return copy


PARTS = (
    "loss_cls", "loss_box", "loss_cls_tsd", "loss_box_tsd", "loss_pc_cls", "loss_pc_box",
)  # fmt: skip


def test_the_loss_falls_and_is_the_sum_of_its_parts(run: Path) -> None:
    loss = column(run, "loss")
    assert len(loss) == 40
    assert loss[-5:].mean() < 0.8 * loss[:5].mean()
    np.testing.assert_allclose(sum(column(run, name) for name in PARTS), loss, rtol=1e-5)


def test_a_resumed_run_repeats_every_bit(run: Path, tiny: list[str], tmp_path: Path) -> None:
    again = cut(run, tmp_path / "again", step=20)
    assert len(rows(again)) == 20
    train(*tiny, f"run_dir={again}", "steps=40")
    assert rows(again) == rows(run)
    assert saved(again) == saved(run)


def test_steps_may_be_added_later_with_other_workers(
    run: Path, tiny: list[str], tmp_path: Path
) -> None:
    words = [*tiny, f"run_dir={tmp_path}"]
    train(*words, "steps=10")
    last = train(*words, "steps=20", "workers=1")
    assert rows(tmp_path) == rows(run)[:20]
    assert last["loss"] == rows(run)[19]["loss"]
    assert train(*words, "steps=20") == {}  # nothing is left to do


STATES = {
    "an average of the weights": ["ema=0.9"],
    "a trained rpn": ["rpn=tiny", "model=glyphs_rpn"],
    "batch norm of Double-Head": ["head=double_head_small"],
    "a schedule with drops": ["schedule=glyphs"],
}


@pytest.mark.parametrize("name", STATES)
def test_what_a_row_remembers_resumes_exactly(tiny: list[str], tmp_path: Path, name: str) -> None:
    words = [*tiny, *STATES[name], "save_every=2", "steps=5"]
    train(*words, f"run_dir={tmp_path / 'whole'}")
    again = cut(tmp_path / "whole", tmp_path / "again", step=2)
    train(*words, f"run_dir={again}")
    assert rows(again) == rows(tmp_path / "whole")
    assert saved(again) == saved(tmp_path / "whole")


def test_the_average_is_what_an_evaluation_loads(tiny: list[str], tmp_path: Path) -> None:
    """Against the average written out: w <- d w + (1 - d) new, the first step copies."""
    train(*tiny, f"run_dir={tmp_path}", "ema=0.5", "save_every=1", "steps=3")
    trained = load_trained(tmp_path)
    name = "model.head.sibling.box_head.fc6.weight"
    own = [_weight(tmp_path, step, name) for step in (1, 2, 3)]
    expected = 0.25 * own[0] + 0.25 * own[1] + 0.5 * own[2]
    found = trained.model.state_dict()[name.removeprefix("model.")]
    torch.testing.assert_close(found, expected)
    assert not torch.equal(found, own[2])


def _weight(run: Path, step: int, name: str) -> Tensor:
    raw = saved(run, step)[f"/model/{name}"]
    like = dict(load_trained(run).model.named_parameters())[name.removeprefix("model.")]
    return torch.frombuffer(bytearray(raw), dtype=torch.float32).view(like.shape)


def test_epochs_are_counted_in_steps(tiny: list[str], tmp_path: Path) -> None:
    train(*tiny, f"run_dir={tmp_path}", "steps=null", "epochs=0.7")
    assert rows(tmp_path)[-1]["step"] == 5  # 0.7 of 24 images in batches of 4, rounded up


def test_a_batch_in_parts_has_the_gradient_of_the_whole() -> None:
    """On a model without batch norm, whose statistics would be those of the parts."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, x_B3HW: Tensor, *_: Any) -> dict[str, Tensor]:
            y_B = self.layer(x_B3HW.mean(dim=(2, 3)))[:, 0]
            return {"loss_cls": y_B.square().mean(), "loss_box": y_B.mean()}

    torch.manual_seed(0)
    model, world = Plain(), dist.init("cpu")
    image = torch.randint(0, 256, (8, 3, 4, 4), dtype=torch.uint8)
    transform = SimpleNamespace(normalize=lambda x, size: x.float() / 255)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    found = []
    for parts in (1, 2, 4):
        model.zero_grad()
        cfg: Any = SimpleNamespace(accumulate=parts, precision="float32")
        total = _Step(cfg, model, transform, world, scaler)(map(_batch, image.chunk(parts)))
        assert set(total) == {"loss", "loss_cls", "loss_box"}
        found.append((total["loss"], model.layer.weight.grad.clone()))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-6)
    assert found[0][1].abs().max() > 1e-3


def _batch(image_B3HW: Tensor) -> Batch:
    count = len(image_B3HW)
    empty = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    numbers, sizes = torch.arange(count), torch.full((count, 2), 4)
    scale = torch.ones(count, 2)
    return Batch(image_B3HW, sizes, [empty] * count, None, numbers, numbers, scale, sizes)


def test_bf16_trains(run: Path, tiny: list[str], tmp_path: Path) -> None:
    train(*tiny, f"run_dir={tmp_path}", "steps=4", "precision=bfloat16")
    loss, exact = column(tmp_path, "loss"), column(run, "loss")[:4]
    assert np.isfinite(loss).all()
    assert loss[0] == pytest.approx(exact[0], rel=0.03)  # later steps start from other weights
    assert (loss != exact).all()


def test_the_seed_decides_the_run(run: Path, tiny: list[str], tmp_path: Path) -> None:
    train(*tiny, f"run_dir={tmp_path}", "steps=2", "seed=1")
    assert rows(tmp_path)[0]["loss"] != rows(run)[0]["loss"]


def test_the_run_folder_says_what_ran(run: Path) -> None:
    trained = load_trained(run)
    assert trained.step == 40
    assert trained.config["num_classes"] == 6
    assert trained.class_ids == (1, 2, 3, 5, 8, 13)
    assert trained.config["train_images"] == 24
    assert trained.config["total_steps"] == 40
    assert (run / "run.json").is_file()


def test_a_run_starts_from_another_with_a_new_head(
    run: Path, tiny: list[str], tmp_path: Path
) -> None:
    words = [*tiny, f"init={run}", "head=sibling_small", "optim.lr=1e-9", "steps=1"]
    train(*words, f"run_dir={tmp_path}", "batch_norm=local")
    before, after = load_trained(run).model, load_trained(tmp_path).model
    for name, value in before.backbone.named_parameters():
        torch.testing.assert_close(after.backbone.get_parameter(name), value, msg=name)


def test_unreadable_images_are_counted_and_then_stop_the_run(
    glyphs: Path, tiny: list[str], tmp_path: Path
) -> None:
    root = shutil.copytree(glyphs, tmp_path / "set")
    victim = sorted((root / "train").iterdir())[3]
    content = victim.read_bytes()
    victim.write_bytes(bytes(len(content)))  # the size stays, so the set is not made anew
    words = [*tiny, f"data.root={root}", "steps=6", "cache=false"]
    with pytest.raises(InputError, match=victim.name):
        train(*words, f"run_dir={tmp_path / 'strict'}")
    train(*words, f"run_dir={tmp_path / 'lenient'}", "max_bad_items=5")
    assert rows(tmp_path / "lenient")[-1]["bad_items"] == 1


def test_trainee_without_average_has_none() -> None:
    trainee = Trainee(nn.Linear(2, 2))
    trainee.update_average()
    assert trainee.best is trainee.model
    assert not any(name.startswith("average") for name in trainee.state_dict())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["steps=null"], "steps, epochs: give exactly one of them"),
        (["epochs=1"], "steps, epochs: give exactly one of them"),
        (["steps=0"], "steps: must be at least 1: 0"),
        (["global_batch=0"], "global_batch: must be at least 1: 0"),
        (["accumulate=3"], "global_batch: does not divide over 1 ranks times accumulate 3"),
        (["batch_norm=none"], "batch_norm: must be one of local, sync: none"),
        (["precision=int8"], "precision: must be one of"),
        (["ema=1.5"], "ema: must be above 0 and below 1: 1.5"),
        (["num_classes=7"], "num_classes: differs from 6 of the data: 7"),
        (["head.margin_cls=-1"], "model: an argument is not accepted"),
        (["head.offset_init=ones"], "model: an argument is not accepted"),
        (["schedule=glyphs", "schedule.factor=2"], "schedule: an argument is not accepted"),
        (["init=nowhere"], "nowhere: no such file or folder"),
    ],
)
def test_a_setting_that_cannot_work_is_named(
    tiny: list[str], tmp_path: Path, words: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train(*tiny, f"run_dir={tmp_path}", "steps=2", *words)
