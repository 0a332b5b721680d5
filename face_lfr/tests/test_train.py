"""Training in one process: it learns, it resumes exactly, it counts what it cannot read."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from common import dist
from common.log import InputError
from face_lfr.data.clips import ClipItem
from face_lfr.tests.launch import rows, saved, train
from face_lfr.train import _Step
from face_lfr.weights import load_trained


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


def test_the_loss_falls(run: Path) -> None:
    loss = column(run, "loss")
    assert len(loss) == 40
    assert loss[-5:].mean() < 0.85 * loss[:5].mean()


def test_check_05_learned_offsets_move_and_stay_within_their_limit(run: Path) -> None:
    from face_lfr import build

    trained = load_trained(run)
    torch.manual_seed(0)
    fresh = build("tin", 18, num_segments=8, backbone="tiny").state_dict()
    names = [name for name in fresh if name.endswith("offset_net.fc2.bias")]
    assert names
    for name in names:
        assert not torch.equal(trained.model.state_dict()[name], fresh[name])


def test_check_12_a_resumed_run_repeats_every_bit(
    run: Path, tiny: list[str], tmp_path: Path
) -> None:
    again = cut(run, tmp_path / "again", step=20)
    assert len(rows(again)) == 20
    train(*tiny, f"run_dir={again}", "steps=40")
    assert rows(again) == rows(run)
    assert saved(again) == saved(run)


def test_steps_may_be_added_later_with_other_workers(
    run: Path, tiny: list[str], tmp_path: Path
) -> None:
    words = [*tiny, f"run_dir={tmp_path}", "schedule=constant"]
    train(*words, "steps=10")
    last = train(*words, "steps=20", "workers=1")
    whole = tmp_path / "whole"
    train(*words, f"run_dir={whole}", "steps=20")
    assert rows(tmp_path) == rows(whole)
    assert last["loss"] == rows(whole)[-1]["loss"]
    assert train(*words, "steps=20") == {}  # nothing is left to do


@pytest.mark.parametrize("row", ["trn", "tsm"])
def test_check_12_random_subsets_and_dropout_resume_exactly(
    tiny: list[str], tmp_path: Path, row: str
) -> None:
    """TRN draws subsets of frames at every step; both draw dropout."""
    words = [
        *tiny, f"model={row}", "model/backbone=tiny", "model.dropout=0.5", "model.num_segments=8",
        "save_every=2", "steps=6",
    ]  # fmt: skip
    train(*words, f"run_dir={tmp_path / 'whole'}")
    again = cut(tmp_path / "whole", tmp_path / "again", step=2)
    train(*words, f"run_dir={again}")
    assert rows(again) == rows(tmp_path / "whole")
    assert saved(again) == saved(tmp_path / "whole")


def test_epochs_are_counted_in_steps(tiny: list[str], tmp_path: Path) -> None:
    words = [word for word in tiny if not word.startswith("steps")]
    train(*words, f"run_dir={tmp_path}", "steps=null", "epochs=1.5", "global_batch=8")
    assert rows(tmp_path)[-1]["step"] == 5  # 1.5 x 24 videos in batches of 8, rounded up


def test_a_batch_in_parts_has_the_gradient_of_the_whole() -> None:
    """On a network without batch norm, whose statistics would be those of the parts."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 4)

        def forward(self, x_NTCHW: Tensor) -> Tensor:
            return self.head(x_NTCHW.mean(dim=(1, 3, 4)))

    torch.manual_seed(0)
    model, world = Plain(), dist.init("cpu")
    image = torch.randint(0, 256, (8, 2, 3, 4, 4), dtype=torch.uint8)
    target = (torch.rand(8, 4) < 0.5).float()
    transform = SimpleNamespace(normalize=lambda x: x.float() / 255)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    found = []
    for parts in (1, 2, 4):
        cfg: Any = SimpleNamespace(accumulate=parts, precision="float32")
        model.zero_grad()
        step = _Step(
            cfg, model, transform, functional.binary_cross_entropy_with_logits, world, scaler
        )
        pairs = zip(image.chunk(parts), target.chunk(parts), strict=True)
        loss = step(ClipItem(*pair) for pair in pairs)
        found.append((loss, model.head.weight.grad.clone(), model.head.bias.grad.clone()))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-7)
    assert found[0][1].abs().max() > 1e-3


def test_bf16_trains(run: Path, tiny: list[str], tmp_path: Path) -> None:
    train(*tiny, f"run_dir={tmp_path}", "steps=4", "precision=bfloat16", "channels_last=true")
    loss, exact = column(tmp_path, "loss"), column(run, "loss")[:4]
    assert np.isfinite(loss).all()
    assert loss[0] == pytest.approx(exact[0], rel=0.02)  # later steps start from other weights
    assert (loss != exact).all()


def test_the_seed_decides_the_run(run: Path, tiny: list[str], tmp_path: Path) -> None:
    train(*tiny, f"run_dir={tmp_path}", "steps=2", "seed=1")
    assert rows(tmp_path)[0]["loss"] != rows(run)[0]["loss"]


def test_the_run_folder_says_what_ran(run: Path) -> None:
    trained = load_trained(run)
    assert trained.step == 40
    assert trained.config["num_classes"] == 18 == len(trained.classes)
    assert trained.multi_label
    assert trained.config["train_videos"] == 24
    assert trained.config["total_steps"] == 40
    assert (run / "run.json").is_file()


def test_unreadable_videos_are_counted_and_then_stop_the_run(
    synth: Path, tiny: list[str], tmp_path: Path
) -> None:
    root = shutil.copytree(synth, tmp_path / "set")
    names = [line.split(",")[0] for line in (root / "trainingSet.txt").read_text().splitlines()]
    bad = root / "videos" / names[0]
    bad.write_bytes(bad.read_bytes()[:200])
    words = [*tiny, f"data.root={root}", "steps=6", "global_batch=8"]
    train(*words, f"run_dir={tmp_path / 'lenient'}", "max_bad_items=5")
    assert 1 <= rows(tmp_path / "lenient")[-1]["bad_items"] <= 5
    with pytest.raises(InputError, match=names[0].rsplit("/", 1)[-1]):
        train(*words, f"run_dir={tmp_path / 'strict'}", "max_bad_items=0")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["epochs=1"], "steps, epochs: give exactly one"),
        (["steps=0"], "steps: must be at least 1: 0"),
        (["steps=null", "epochs=0"], "epochs: must be above 0: 0"),
        (["accumulate=3"], "global_batch: does not divide over 1 ranks times accumulate 3"),
        (["batch_norm=none"], "batch_norm: must be one of local, sync: none"),
        (["precision=int8"], "precision: must be one of"),
        (["model.tin.shift_div=0"], "model: "),
        (
            ["model.num_segments=4"],
            r"data\.sampler\.count: the model takes 4 frames, not: 8",
        ),  # the sampler still gives eight frames
    ],
)
def test_a_setting_that_cannot_work_is_named(
    tiny: list[str], tmp_path: Path, words: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train(*tiny, f"run_dir={tmp_path}", "steps=2", *words)
