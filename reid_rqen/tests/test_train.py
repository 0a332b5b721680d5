"""Training in one process: it learns, it resumes exactly, it counts what it cannot read."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common import dist
from common.checkpoint import load_model
from common.log import InputError
from reid_rqen.data.lpw import load_lpw
from reid_rqen.engine import Extraction, extract, shorten
from reid_rqen.losses import score_spread
from reid_rqen.models.output import FrameOutput
from reid_rqen.tests.launch import rows, saved, train
from reid_rqen.weights import load_trained, save_release

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


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


def test_check_13_the_loss_falls_and_the_scores_part(run: Path) -> None:
    loss, spread = column(run, "loss"), column(run, "score_std")
    assert len(loss) == 40
    assert loss[-5:].mean() < 0.6 * loss[:5].mean()
    assert spread[0] < 0.01
    assert spread[-5:].mean() > 5 * spread[0]


def test_check_13_a_resumed_run_repeats_every_bit(
    run: Path, tiny: list[str], tmp_path: Path
) -> None:
    again = cut(run, tmp_path / "again", step=20)
    assert len(rows(again)) == 20
    train(*tiny, f"run_dir={again}", "steps=40")
    assert rows(again) == rows(run)
    assert saved(again) == saved(run)


def test_check_13_steps_may_be_added_later(run: Path, tiny: list[str], tmp_path: Path) -> None:
    train(*tiny, f"run_dir={tmp_path}", "steps=10")
    assert rows(tmp_path) == rows(run)[:10]
    last = train(*tiny, f"run_dir={tmp_path}", "steps=20", "workers=1")
    assert rows(tmp_path) == rows(run)[:20]
    assert last["loss"] == rows(run)[19]["loss"]
    assert train(*tiny, f"run_dir={tmp_path}", "steps=20") == {}  # nothing is left to do


def test_check_13_a_schedule_and_dropout_resume_exactly(
    replica: dict[str, Path], tmp_path: Path
) -> None:
    words = [
        "experiment=prid2011/cnn_rnn", f"data.root={replica['prid2011']}", "schedule=late_drops",
        "draws.frames=3", "workers=0", "log_every=1", "save_every=2", "tensorboard=false",
        "steps=6",
    ]  # fmt: skip
    train(*words, f"run_dir={tmp_path / 'whole'}")
    again = cut(tmp_path / "whole", tmp_path / "again", step=2)
    train(*words, f"run_dir={again}")
    assert rows(again) == rows(tmp_path / "whole")
    assert saved(again) == saved(tmp_path / "whole")
    assert column(again, "lr").tolist() == pytest.approx([1e-3] * 3 + [3e-4] + [9e-5] * 2)


def test_check_13_bf16_trains_and_its_weights_sum_to_one(
    run: Path, tiny: list[str], tmp_path: Path
) -> None:
    train(*tiny, f"run_dir={tmp_path}", "steps=4", "precision=bfloat16")
    loss = column(tmp_path, "loss")
    assert np.isfinite(loss).all()
    assert loss.tolist() == pytest.approx([row["loss"] for row in rows(run)[:4]], rel=0.05)
    assert loss.tolist() != [row["loss"] for row in rows(run)[:4]]
    trained = load_trained(tmp_path)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        score_STR = trained.model(torch.rand(2, 5, 3, 56, 28)).score_STR
    assert score_STR.dtype == torch.float32
    weight_STR = score_STR / score_STR.sum(dim=1, keepdim=True)
    torch.testing.assert_close(weight_STR.sum(dim=1), torch.ones(2, 3), atol=1e-5, rtol=0)


def test_the_seed_decides_the_run(run: Path, tiny: list[str], tmp_path: Path) -> None:
    train(*tiny, f"run_dir={tmp_path}", "steps=2", "seed=1")
    assert rows(tmp_path)[0]["loss"] != rows(run)[0]["loss"]


def test_the_run_folder_says_what_ran(run: Path) -> None:
    trained = load_trained(run)
    assert trained.step == 40
    assert trained.config["train_set"] == "synth"
    assert trained.config["num_classes"] == 6
    assert trained.config["steps"] == 40
    assert (run / "run.json").is_file()
    assert trained.model.classifier is None  # K belongs to the training set


@pytest.mark.parametrize("kind", ["frozen", "sync"])
def test_batch_norm_kinds(run: Path, tiny: list[str], tmp_path: Path, kind: str) -> None:
    train(*tiny, f"run_dir={tmp_path}", "steps=2", f"batch_norm={kind}")
    stored = load_trained(tmp_path).model.state_dict()
    (name,) = [name for name in stored if name.endswith("running_mean")][:1]
    assert bool(stored[name].any()) == (kind == "sync")


def spoil(root: Path) -> Path:
    """Make one training tracklet unreadable; returns its folder."""
    home = sorted(path.parent for path in root.glob("scen2/view*/*/1.jpg"))[0]
    for path in home.iterdir():
        path.write_bytes(b"no picture")
    return home


def test_unreadable_frames_are_counted_and_limited(
    synth: Path, tiny: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(synth, tmp_path / "set")
    home = spoil(tmp_path / "set")
    words = [*tiny, f"data.root={tmp_path / 'set'}", f"run_dir={tmp_path / 'run'}", "steps=6"]
    with pytest.raises(InputError, match=f"{home}.*cannot be decoded"):
        train(*words)
    last = train(*words, "max_bad_items=100")
    assert last["bad_items"] >= 1
    named = [record.message for record in caplog.records if str(home) in record.message]
    assert len(named) == last["bad_items"]


def test_a_loss_that_is_no_number_is_not_saved(tiny: list[str], tmp_path: Path) -> None:
    words = [*tiny, f"run_dir={tmp_path}", "steps=6", "save_every=1", "optim=sgd", "optim.lr=1e38"]
    with pytest.raises(FloatingPointError, match="at step"):
        train(*words)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [f"step_{row['step']:08d}" for row in rows(tmp_path)]


def test_init_starts_from_weights_and_keeps_the_classifier_new(
    run: Path, tiny: list[str], tmp_path: Path
) -> None:
    save_release(load_trained(run), tmp_path / "weights.safetensors")
    words = [*tiny, f"init={tmp_path / 'weights.safetensors'}", "optim.lr=0.0", "steps=1"]
    train(*words, f"run_dir={tmp_path / 'run'}")
    old, new = (load_trained(folder).model.state_dict() for folder in (run, tmp_path / "run"))
    moved = [name for name in old if not torch.equal(old[name], new[name])]
    assert all(name.rpartition(".")[2] in BUFFERS for name in moved)
    model = nn.Module()
    model.classifier = nn.Linear(64, 6)
    with pytest.raises(InputError, match="and in the model"):
        load_model(tmp_path / "run" / "checkpoints" / "step_00000001", model)


class Constant(nn.Module):
    """A frame model whose vector is the mean colour."""

    regions, channels, dimensions = 1, 3, 3

    def frames(self, image_BCHW: Tensor, edge_BE: Tensor | None) -> Any:
        mean_BC = image_BCHW.mean(dim=(2, 3))
        return FrameOutput(mean_BC[:, None], torch.ones(len(mean_BC), 1))


class Sequence(nn.Module):
    dimensions = 3

    def sequences(self, image_STCHW: Tensor, valid_ST: Tensor | None) -> Tensor:
        return image_STCHW.mean(dim=(1, 3, 4))


@pytest.mark.parametrize("model", [Constant(), Sequence()])
def test_shares_of_ranks_make_the_whole_even_when_some_are_empty(
    run: Path, synth: Path, model: nn.Module
) -> None:
    transform, tracklets = load_trained(run).transform, load_lpw(synth).query[:2]
    alone = extract(model, tracklets, Extraction(transform, dist.init("cpu"), batch=5))
    worlds = [dist.World(rank, 5, torch.device("cpu")) for rank in range(5)]
    parts = [extract(model, tracklets, Extraction(transform, world)) for world in worlds]
    assert sorted(len(part.vector) for part in parts) == [0, 0, 0, 1, 1]
    joined = torch.cat([part.vector for part in parts])
    torch.testing.assert_close(joined, alone.vector, atol=1e-6, rtol=0)


def test_shortened_tracklets_keep_both_ends(synth: Path) -> None:
    tracklet = load_lpw(synth).query[0]
    names = [path.stem for path in shorten(tracklet, 4).frames]
    assert names == ["1", "5", "8", "12"]
    assert shorten(tracklet, 12) is tracklet
    assert shorten(tracklet, 1).frames == tracklet.frames[:1]


def test_constant_scores_have_no_spread() -> None:
    assert score_spread(torch.full((2, 4, 3), 0.3)).item() == pytest.approx(0, abs=1e-6)
