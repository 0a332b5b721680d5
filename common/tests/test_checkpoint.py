import os
import random
import signal
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from common import checkpoint
from common.checkpoint import Checkpointer, load_model, newest
from common.log import InputError, read_metrics
from common.tests.jobs import Training, launch, results


class Box:
    """Any object with a state."""

    def __init__(self, state: Any):
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state["state"]


def saved(folder: Path, *steps: int, keep: int = 10) -> nn.Module:
    """Checkpoints whose weight is the step."""
    model = nn.Linear(2, 1, bias=False)
    saver = Checkpointer(folder, model, keep=keep)
    for step in steps:
        nn.init.constant_(model.weight, step)
        saver.save(step)
    return model


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_stop_and_go_is_bitwise_the_same(tmp_path: Path) -> None:
    whole = Training(tmp_path / "whole")
    assert whole.run(20) == 0
    for steps, start in ((3, 0), (10, 3), (20, 10)):
        halves = Training(tmp_path / "halves")
        assert halves.run(steps) == start
    assert halves.weights() == whole.weights()
    assert halves.sampler.consumed == whole.sampler.consumed == 160
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "halves")]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 20


@pytest.mark.slow
def test_killed_at_a_step_and_in_mid_save_ends_the_same(tmp_path: Path) -> None:
    whole = Training(tmp_path / "whole")
    whole.run(20)
    # A save calls fsync 7 times, then rename, then fsync: 10 to 17 leave the second save of the
    # process incomplete; 9 is just after the rename of the first.
    inside = random.Random(0).randint(10, 17)
    seen = []
    for kill_at, kill_call in ((3, -1), (-1, inside), (-1, 9)):
        (done,) = launch("train", tmp_path / "killed", 20, kill_at, kill_call)
        assert done.returncode == -signal.SIGKILL, done.stderr
        found = newest(tmp_path / "killed" / "checkpoints")
        seen.append(found.name if found else None)
    assert seen == [None, "step_00000005", "step_00000010"]
    (end,) = results(launch("train", tmp_path / "killed", 20))
    assert end["start"] == 10
    assert end["weights"] == whole.weights()
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed")]
    assert rows[0] == rows[1]
    assert names(tmp_path / "killed" / "checkpoints") == ["step_00000015", "step_00000020"]


@pytest.mark.slow
def test_two_ranks_ddp_and_fsdp(tmp_path: Path) -> None:
    one = Training(tmp_path / "one")
    one.run(10)
    first, second = results(launch("two_ranks", tmp_path, tmp_path / "one", ranks=2))
    for kind in ("ddp", "fsdp"):
        for seen in (first[kind], second[kind]):
            assert seen["start"] == 10
            assert seen["full"] == "OSError: [Errno 28] No space left on device"
            assert seen["left"] == ["step_00000015", "step_00000020"]
            assert seen["from_one"] == [10, one.weights(), 80]
        assert first[kind]["same"]
        # The streams of another rank count: one a rank, and the same whenever it is resumed.
        assert first[kind]["draw"] != second[kind]["draw"]
        again = Training(tmp_path / kind / "halves")
        assert again.checkpoint.resume() == 20
        assert again.weights() == first[kind]["weights"]
        assert again.sampler.consumed == 160
        alone = again.optimizer.state_dict()["state"]
        assert all(state["exp_avg"].abs().sum() > 0 for state in alone.values())
    assert first["ddp"]["draw"] == first["fsdp"]["draw"]
    assert second["ddp"]["same"]
    assert first["stop"] == second["stop"] == [False, True]


def test_every_kind_of_state_survives(tmp_path: Path) -> None:
    state = {
        "scalars": [1, -(2**70), 0.1, float("inf"), True, None, "text", np.float32(0.5)],
        7: (torch.arange(3), [torch.tensor(2.0, dtype=torch.bfloat16)], {}),
        "array": np.arange(4.0),
        "bool": torch.tensor([[True], [False]]),
        "empty": torch.empty(0, 3),
        "view": torch.arange(6).reshape(2, 3).t(),
    }
    Checkpointer(tmp_path, nn.Linear(1, 1), box=Box(state)).save(1)
    box = Box({"other": torch.zeros(9)})
    assert Checkpointer(tmp_path, nn.Linear(1, 1), box=box).resume() == 1
    assert box.state.keys() == state.keys()
    assert box.state["scalars"] == state["scalars"]
    assert isinstance(box.state[7], tuple)
    torch.testing.assert_close(box.state[7], state[7], rtol=0, atol=0)
    np.testing.assert_array_equal(box.state["array"], state["array"])
    for key in ("bool", "empty", "view"):
        assert torch.equal(box.state[key], state[key])
    with pytest.raises(ValueError, match="/box/state: a object cannot be stored"):
        Checkpointer(tmp_path, nn.Linear(1, 1), box=Box(object())).save(2)
    assert names(tmp_path) == ["step_00000001"]


def test_tied_channels_last_and_unused_weights(tmp_path: Path) -> None:
    def build(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.ModuleDict({"a": nn.Conv2d(3, 4, 3), "unused": nn.Linear(2, 2)})
        model.to(memory_format=torch.channels_last)
        model["tied"] = model["a"]
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)

    model, optimizer = build(0)
    Checkpointer(tmp_path, model, optimizer).save(1)
    assert not optimizer.state  # a save must not step the optimizer
    model["a"](torch.randn(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    Checkpointer(tmp_path, model, optimizer).save(2)
    other, other_optimizer = build(1)
    Checkpointer(tmp_path, other, other_optimizer).resume()
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)
    mine, theirs = other_optimizer.state_dict(), optimizer.state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    assert mine["state"].keys() == theirs["state"].keys() == {0, 1}
    for number, state in theirs["state"].items():
        assert torch.equal(mine["state"][number]["momentum_buffer"], state["momentum_buffer"])
    del other["unused"]
    with pytest.raises(InputError, match=r"unused\.bias is"):
        load_model(tmp_path / "step_00000002", other)
    nn.init.zeros_(other["a"].weight)
    assert load_model(tmp_path / "step_00000002", other, ignore=("unused.",)) == 2
    assert torch.equal(other["a"].weight, model["a"].weight)


def test_keep_the_newest_and_ignore_leftovers(tmp_path: Path) -> None:
    assert newest(tmp_path / "absent") is None
    assert Checkpointer(tmp_path / "absent", nn.Linear(1, 1)).resume() == 0
    (tmp_path / "step_00000009.tmp").mkdir()
    (tmp_path / "step_00000009.tmp" / "shard").write_text("torn")
    assert Checkpointer(tmp_path, nn.Linear(2, 1)).resume() == 0
    saved(tmp_path, 1, 2, 3, 100_000_000, keep=2)
    assert names(tmp_path) == ["step_00000003", "step_100000000"]
    found = newest(tmp_path)
    assert found is not None
    assert found.name == "step_100000000"
    with pytest.raises(ValueError, match="keep=0"):
        Checkpointer(tmp_path, nn.Linear(1, 1), keep=0)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    path = tmp_path / "step_00000001"
    optimizer = torch.optim.SGD(nn.Linear(2, 1).parameters())
    for model, message in (
        (nn.Linear(2, 1), "bias is absent here, and in the model: (1,)"),
        (nn.Linear(3, 1, bias=False), "weight is (1, 2) here, and in the model: (1, 3)"),
    ):
        with pytest.raises(InputError) as caught:
            load_model(path, model)
        assert str(caught.value) == f"{path}: {message}"
    fitting = nn.Linear(2, 1, bias=False)
    with pytest.raises(InputError, match="holds no state of: optimizer, ema"):
        Checkpointer(tmp_path, fitting, optimizer, ema=Box(1)).resume()
    with pytest.raises(InputError, match="is not a checkpoint folder"):
        load_model(tmp_path, fitting)
    assert load_model(path, fitting) == 1
    assert fitting.weight.tolist() == [[1, 1]]


def test_other_parameter_groups_are_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    Checkpointer(tmp_path, model, torch.optim.SGD(model.parameters())).save(1)
    groups = [{"params": [model.weight]}, {"params": [model.bias]}]
    with pytest.raises(InputError, match=r"sizes \[2\], the optimizer's: \[1, 1\]"):
        Checkpointer(tmp_path, model, torch.optim.SGD(groups, lr=0.1)).resume()


def test_saving_a_step_again_never_loses_the_older(tmp_path: Path, monkeypatch) -> None:
    model = saved(tmp_path, 1)
    real, renamed = Path.rename, []

    def rename(path: Path, target: Path) -> Path:
        renamed.append(path.suffix)
        if path.suffix == ".tmp":
            raise OSError(5, "Input/output error")
        return real(path, target)

    nn.init.constant_(model.weight, 7)
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="Input/output"):
        Checkpointer(tmp_path, model).save(1)
    monkeypatch.undo()
    assert renamed == ["", ".tmp"]
    assert names(tmp_path) == ["step_00000001.old"]
    assert Checkpointer(tmp_path, model).resume() == 1
    assert model.weight.tolist() == [[1, 1]]
    nn.init.constant_(model.weight, 8)
    Checkpointer(tmp_path, model).save(1)
    assert names(tmp_path) == ["step_00000001"]
    nn.init.zeros_(model.weight)
    Checkpointer(tmp_path, model).resume()
    assert model.weight.tolist() == [[8, 8]]


def test_sigterm_asks_to_stop_and_ends_a_process_without_training(monkeypatch) -> None:
    monkeypatch.setattr(checkpoint, "_live", weakref.WeakSet())
    saver = Checkpointer(Path("unused"), nn.Linear(1, 1))
    assert not saver.stop_requested
    os.kill(os.getpid(), signal.SIGTERM)
    assert saver.stop_requested
    killed: list[tuple[int, int]] = []
    del saver
    monkeypatch.setattr(checkpoint.os, "kill", lambda *words: killed.append(words))
    signal.raise_signal(signal.SIGTERM)
    assert killed == [(os.getpid(), signal.SIGTERM)]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
