import io
import json
import logging
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.utils.data import DataLoader

from common import log
from common.log import InputError, MetricLogger, Throughput, exit_on_bad_input, read_metrics

ROOT = Path(__file__).resolve().parents[2]

APP = """
from dataclasses import dataclass
from typing import Any
import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING
from common.log import InputError, exit_on_bad_input

@dataclass
class Schema:
    run_dir: str = MISSING
    steps: int = 3
    thing: Any = None

class Thing:
    def __init__(self, a=1):
        if a == 2:
            raise InputError("x.npz", "holds NaN in row", 7)
        if a == 3:
            raise ValueError("a=3 must be below 3")
        if a == 4:
            raise RuntimeError("a bug")

ConfigStore.instance().store("schema", Schema)

@hydra.main(version_base=None, config_path="configs", config_name="main")
def main(cfg):
    print(cfg.run_dir)
    hydra.utils.instantiate(cfg.thing)
    1 / (cfg.steps - 7)

exit_on_bad_input(main)
"""
MAIN = """
defaults: [schema, {group: null}, _self_]
hydra: {run: {dir: .}, output_subdir: null}
thing: {_target_: __main__.Thing, a: 1}
"""


@pytest.mark.parametrize(
    ("where", "what", "value", "text"),
    [
        ("steps", "must be positive", -1, "steps: must be positive: -1"),
        (Path("a/b"), "is missing", "", "a/b: is missing"),
        ("a", "two\nlines", "x\ny", "a: two lines: x y"),
        ("a", "is", None, "a: is: None"),
    ],
)
def test_input_error_reads_as_one_line(where, what, value, text) -> None:
    error = InputError(where, what, value)
    assert str(error) == text
    assert str(pickle.loads(pickle.dumps(error))) == text


class Bad(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        raise InputError("a.png", "cannot be decoded", "InputError: zip")


def test_input_error_comes_out_of_a_worker() -> None:
    with pytest.raises(InputError) as caught:
        list(DataLoader(Bad(), num_workers=1))
    assert str(caught.value) == "a.png: cannot be decoded: InputError: zip"


def app(folder: Path, *words: str, **env: str) -> subprocess.CompletedProcess:
    (folder / "app.py").write_text(APP)
    (folder / "configs" / "group").mkdir(parents=True, exist_ok=True)
    (folder / "configs" / "main.yaml").write_text(MAIN)
    (folder / "configs" / "group" / "wide.yaml").write_text("x: 1")
    full = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    command = [sys.executable, "app.py", *words]
    return subprocess.run(command, cwd=folder, env=full, capture_output=True, text=True, timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "starts"),
    [
        (["stepz=3"], "error: stepz: Key 'stepz' not in 'Schema': 3"),
        (["steps=x"], "error: steps: Value 'x' "),
        ([], "error: run_dir: Missing mandatory value"),
        (["group=wild", "run_dir=a"], "error: group/wild: is not there, only wide"),
        (["thing.a=2", "run_dir=a"], "error: x.npz: holds NaN in row: 7"),
        (["thing.a=3", "run_dir=a"], "error: thing: Error in call"),
        (["+thing.b=1", "run_dir=a"], "error: thing: Error in call"),
        (["thing._target_=nowhere.X", "run_dir=a"], "error: thing: Error locating target 'nowhere"),
        (["a=["], "error: a=[: cannot be parsed"),
    ],
)
def test_bad_input_is_one_line_and_code_2(tmp_path: Path, words: list[str], starts: str) -> None:
    done = app(tmp_path, *words)
    assert done.returncode == 2
    assert done.stderr.startswith(starts)
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_traceback_is_kept_for_bugs_and_on_request(tmp_path: Path) -> None:
    for words, name in ((["steps=7"], "ZeroDivisionError"), (["thing.a=4"], "a bug")):
        done = app(tmp_path, "run_dir=a", *words)
        assert done.returncode == 1
        assert "Traceback" in done.stderr
        assert name in done.stderr
    done = app(tmp_path, "stepz=3", HYDRA_FULL_ERROR="1")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: stepz")
    good = app(tmp_path, "run_dir=a")
    assert (good.returncode, good.stdout, good.stderr) == (0, "a\n", "")


def test_the_environment_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, "0"):
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        if value is not None:
            monkeypatch.setenv("HYDRA_FULL_ERROR", value)
        exit_on_bad_input(lambda: None)
        assert os.environ.get("HYDRA_FULL_ERROR") == value


def test_metrics_round_trip_and_later_rows_win(tmp_path: Path) -> None:
    with MetricLogger(tmp_path, tensorboard=False) as first:
        first.log(2, loss=0.1 + 0.2, name="a", count=np.int64(3))
        first.log(1, **{"cmc@1": torch.tensor(0.5), "nan": math.nan, "inf": -math.inf})
    with MetricLogger(tmp_path, tensorboard=False) as second:
        second.log(2, loss=np.float32(0.25), flag=True, none=None)
    MetricLogger(tmp_path, main=False).log(9, loss=1.0)
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "cmc@1": 0.5, "nan": None, "inf": None},
        {"step": 2, "loss": 0.25, "flag": True, "none": None},
    ]
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


@pytest.mark.parametrize("cut", range(1, 21))
def test_a_torn_row_does_not_spoil_the_next(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.jsonl"
    row = b'{"step": 2, "a": 5}\n'
    path.write_bytes(b'{"step": 1, "a": 4}\n' + row[:cut])
    torn = cut < len(row) - 1
    expected = [{"step": 1, "a": 4}] if torn else [{"step": 1, "a": 4}, {"step": 2, "a": 5}]
    assert read_metrics(path) == expected
    with MetricLogger(tmp_path, tensorboard=False) as log_again:
        log_again.log(3, a=6)
    assert read_metrics(path) == [*expected, {"step": 3, "a": 6}]
    assert len(path.read_text().splitlines()) == len(expected) + 1


def test_unreadable_metrics_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing: cannot be read"):
        read_metrics(tmp_path / "nothing")
    (tmp_path / "m").write_text('{"step": 1}\nbroken\n{"step": 2}\n')
    with pytest.raises(InputError, match="m: line 2 is not"):
        read_metrics(tmp_path / "m")


def test_tensorboard_files_are_written(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with MetricLogger(tmp_path) as logger:
        logger.log(4, loss=0.5, name="text")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(x.step, x.value) for x in events.Scalars("loss")] == [(4, 0.5)]


def test_progress_without_a_terminal_is_plain_lines_on_stderr(capsys, monkeypatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr(log.time, "monotonic", lambda: float(next(clock)))
    with log.progress() as bar:
        for _ in bar.track(range(20), description="train", update_period=0.001):
            pass
        task = bar.add_task("eval", total=12)
        for _ in range(12):
            bar.advance(task)
    out, err = capsys.readouterr()
    assert out == ""
    assert "\x1b" not in err
    lines = [line for line in err.splitlines() if line.startswith("eval")]
    # One line at once, one every 5 "seconds" of a clock that ticks once a call, one at the end.
    assert [line.split()[1] for line in lines] == ["1/12", "6/12", "11/12", "12/12"]
    assert all("it/s" in line and "left" in line for line in lines)
    assert err.splitlines()[-1] == lines[-1]


def test_progress_is_silent_off_the_main_rank(capsys) -> None:
    with log.progress(main=False) as bar:
        assert list(bar.track(range(3))) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_progress_on_a_terminal_shows_speed_and_leaves_stdout_alone(capsys, monkeypatch) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=120)
    monkeypatch.setattr(log, "Console", lambda stderr: terminal)
    with log.progress() as bar:
        sys.stdout.write("a table\n")
        for _ in bar.track(range(3), description="train"):
            pass
    assert capsys.readouterr().out == "a table\n"
    assert "3/3" in screen.getvalue()
    assert "it/s" in screen.getvalue()


def test_log_lines_go_to_stderr_with_the_rank(capsys, monkeypatch) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [logging.StreamHandler(sys.stdout)])
    monkeypatch.setattr(root, "level", root.level)
    log.setup_logging(0)
    log.get_logger("a").info("first")
    log.setup_logging(3)
    log.get_logger("a").info("hidden")
    log.get_logger("a").warning("second")
    out, err = capsys.readouterr()
    assert out == ""
    first, second = err.splitlines()
    assert first.endswith("I first")
    assert second.endswith("rank 3 W second")


def test_throughput_is_the_rate_of_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 2.0, 2.5, 3.0])
    monkeypatch.setattr(log.time, "perf_counter", lambda: next(times))
    meter = Throughput(window=2)
    assert meter.rate() == 0
    for count in (100, 8, 8, 8):
        meter.update(count)
    assert meter.rate() == 16
    with pytest.raises(ValueError, match="window=0"):
        Throughput(0)


def test_two_writers_in_one_folder_are_refused(tmp_path: Path) -> None:
    with MetricLogger(tmp_path, tensorboard=False) as first:
        first.log(1, loss=1.0)
        with pytest.raises(InputError, match=r"metrics\.jsonl: another process is training"):
            MetricLogger(tmp_path, tensorboard=False)
        first.log(2, loss=0.5)
    with MetricLogger(tmp_path, tensorboard=False) as second:
        second.log(3, loss=0.25)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_folder_that_the_system_refuses_is_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        Path("/proc/nowhere/run").mkdir(parents=True)

    with pytest.raises(SystemExit) as ended:
        exit_on_bad_input(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: /proc/nowhere: No such file or directory\n"
