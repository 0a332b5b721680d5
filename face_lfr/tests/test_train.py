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
from face_lfr.classifier import Classifier
from face_lfr.data.draws import FaceItem
from face_lfr.margins import ArcFace
from face_lfr.tests.conftest import PROXY
from face_lfr.tests.launch import rows, saved, train
from face_lfr.train import _Step
from face_lfr.weights import load_centres, load_trained


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
    assert loss[-5:].mean() < 0.92 * loss[:5].mean()


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
    "sampled classes": ["objective.sample_rate=0.5"],
    "sub-centres": ["objective.centers=2", "margin=arcface"],
    "curricular": ["margin=curricular"],
    "plain softmax": ["margin=softmax", "~margin.m"],
    "stochastic depth": [
        "model=polyface_nano", "model.blocks=[1,2,1]", "model.width=0.1", "model.features=16",
        "model.input_size=75", "transform.size=75", "model.dropout=0.4", "model.keep=0.5",
        "~model.widths", "~model.stem_stride",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_what_a_row_remembers_resumes_exactly(tiny: list[str], tmp_path: Path, name: str) -> None:
    words = [*tiny, *STATES[name], "save_every=2", "steps=5"]
    if "~model.widths" in words:
        words = [word for word in words if "model.widths" not in word]
    train(*words, f"run_dir={tmp_path / 'whole'}")
    again = cut(tmp_path / "whole", tmp_path / "again", step=2)
    train(*words, f"run_dir={again}")
    assert rows(again) == rows(tmp_path / "whole")
    assert saved(again) == saved(tmp_path / "whole")


def test_epochs_are_counted_in_steps(tiny: list[str], tmp_path: Path) -> None:
    train(*tiny, f"run_dir={tmp_path}", "steps=null", "epochs=0.5", "global_batch=8")
    assert rows(tmp_path)[-1]["step"] == 5  # half of 72 images in batches of 8, rounded up


def test_a_batch_in_parts_has_the_gradient_of_the_whole() -> None:
    """On a network without batch norm, whose statistics would be those of the parts."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 4)

        def forward(self, x_BCHW: Tensor) -> Tensor:
            return self.head(x_BCHW.mean(dim=(2, 3)))

    torch.manual_seed(0)
    model, world = Plain(), dist.init("cpu")
    objective = Classifier(4, 5, ArcFace(m=0.3), scale=8.0)
    image = torch.randint(0, 256, (8, 3, 4, 4), dtype=torch.uint8)
    label = torch.arange(8) % 5
    transform = SimpleNamespace(normalize=lambda x: x.float() / 255)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    found = []
    for parts in (1, 2, 4):
        cfg: Any = SimpleNamespace(accumulate=parts, precision="float32")
        model.zero_grad()
        objective.zero_grad()
        step = _Step(cfg, model, transform, objective, world, scaler)
        pairs = zip(image.chunk(parts), label.chunk(parts), strict=True)
        loss = step((FaceItem(*pair) for pair in pairs), frozen=False)
        found.append((loss, model.head.weight.grad.clone(), objective.weight.grad.clone()))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-6)
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


def test_the_run_folder_says_what_ran(run: Path, scorer: Path) -> None:
    trained, rated = load_trained(run), load_trained(scorer)
    assert (trained.step, trained.kind, rated.kind) == (40, "embedding", "quality")
    assert trained.config["num_classes"] == 12
    assert trained.config["train_images"] == 72
    assert trained.config["total_steps"] == 40
    assert (run / "run.json").is_file()


def test_the_centres_of_a_run_are_those_of_its_classifier(run: Path, scorer: Path) -> None:
    trained = load_trained(run)
    centres_CD = load_centres(trained)
    assert centres_CD is not None
    assert centres_CD.shape == (12, 16)
    torch.testing.assert_close(centres_CD.norm(dim=1), torch.ones(12))
    state = saved(run)["/model/objective.weight"]
    weight_CD = torch.frombuffer(bytearray(state), dtype=torch.float32).view(12, 16)
    torch.testing.assert_close(centres_CD, nn.functional.normalize(weight_CD, dim=1))
    assert load_centres(load_trained(scorer)) is None


def test_a_quality_network_learns_and_resumes_exactly(
    run: Path, sized: list[str], scorer: Path, tmp_path: Path
) -> None:
    loss = column(scorer, "loss")
    assert loss[-5:].mean() < loss[:5].mean()
    words = [
        "experiment=synth/qanpp", f"teacher={run}", *sized, *PROXY, "global_batch=16",
        "log_every=1", "schedule=constant",
    ]  # fmt: skip
    train(*words, f"run_dir={tmp_path}", "steps=8")
    train(*words, f"run_dir={tmp_path}", "steps=20")
    assert rows(tmp_path) == rows(scorer)
    assert saved(tmp_path) == saved(scorer)


def test_anchor_finetuning_first_moves_the_classifier_alone(
    run: Path, tiny: list[str], tmp_path: Path
) -> None:
    words = [
        *tiny, f"init={run}", "anchor=true", "frozen_steps=2", "schedule=anchored",
        "schedule.frozen=2", "save_every=1", "steps=3", f"run_dir={tmp_path}",
    ]  # fmt: skip
    train(*words)
    start = load_trained(run).model.state_dict()
    folders = [tmp_path / "checkpoints" / f"step_{step:08d}" for step in (1, 2, 3)]
    states = [load_trained(checkpoint=folder).model.state_dict() for folder in folders]
    for name, value in start.items():
        assert torch.equal(states[1][name], value), name  # weights and running statistics
    assert any(not torch.equal(states[2][name], value) for name, value in start.items())
    first, second = (saved(tmp_path, step)["/model/objective.weight"] for step in (1, 2))
    assert first != second
    # Centres that lie where the features are start far below those of a fresh classifier.
    assert rows(tmp_path)[0]["loss"] < rows(run)[0]["loss"]


def test_a_network_over_the_bound_is_refused(tiny: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model: costs .* the bound is: 1e-06 G"):
        train(*tiny, f"run_dir={tmp_path}", "steps=2", "max_gflops=1e-6")
    train(*tiny, f"run_dir={tmp_path}", "steps=1", "max_gflops=1")


def test_unreadable_images_are_counted_and_then_stop_the_run(
    synth: Path, tiny: list[str], tmp_path: Path
) -> None:
    from face_lfr.data.recordio import RecordFile

    root = shutil.copytree(synth, tmp_path / "set")
    place = RecordFile(root / "train.rec", root / "train.idx")
    content = bytearray((root / "train.rec").read_bytes())
    payload = bytes(place.read(3))
    spot = content.find(payload[24:])
    content[spot : spot + 40] = bytes(40)  # the beginning of a JPEG
    (root / "train.rec").write_bytes(content)
    words = [*tiny, f"data.root={root}", "steps=9", "global_batch=8"]
    (root / "train.labels.npy").unlink(missing_ok=True)
    with pytest.raises(InputError, match=r"train\.rec"):
        train(*words, f"run_dir={tmp_path / 'strict'}")
    train(*words, f"run_dir={tmp_path / 'lenient'}", "+draws.max_bad_items=5")
    assert rows(tmp_path / "lenient")[-1]["bad_items"] == 1


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
        (["anchor=true"], "anchor: needs trained weights"),
        (["frozen_steps=-1"], "frozen_steps: must not be negative: -1"),
        (["model.features=0"], "model: an argument is not accepted"),
        (["transform.size=32"], "transform: the model takes 24 px, the transform gives: 32"),
        (["margin.m=-1"], "margin|objective"),
        (["objective.scale=0"], "objective: an argument is not accepted"),
        (["teacher=nowhere"], "nowhere: no such file or folder"),
    ],
)
def test_a_setting_that_cannot_work_is_named(
    tiny: list[str], tmp_path: Path, words: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train(*tiny, f"run_dir={tmp_path}", "steps=2", *words)
