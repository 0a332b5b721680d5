"""Trainings of the search side by side, with a line of Python in the place of each."""

import fcntl
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from common.log import InputError
from face_lfr import search_runs
from face_lfr.search_runs import Proxy, check_slots, environment_of, quoted, train_proxies


def scripted(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Trainings that run a line of Python; `NAME` and `DIR` stand for their own."""

    def line(self: Proxy) -> list[str]:
        filled = script.replace("NAME", repr(self.name)).replace("DIR", repr(str(self.run_dir)))
        return [sys.executable, "-S", "-c", filled]

    monkeypatch.setattr(Proxy, "command", line)


def proxies(folder: Path, *names: str) -> list[Proxy]:
    return [Proxy(name, folder / name, 3, ()) for name in names]


def test_trainings_run_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each ends only when it sees the other: one after another they would break down."""
    script = (
        "import pathlib, time; here, start = pathlib.Path(DIR), time.time()\n"
        "(here / 'begun').touch()\n"
        "while len(list(here.parent.glob('*/begun'))) < 2:\n"
        "    assert time.time() - start < 60; time.sleep(0.05)"
    )
    scripted(monkeypatch, script)
    assert train_proxies(proxies(tmp_path, "a", "b"), 2) == {}
    assert train_proxies([], 2) == {}


def test_a_broken_training_is_reported_and_the_others_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, "import sys; print('loss is nan'); sys.exit(NAME == 'b')")
    found = train_proxies(proxies(tmp_path, "a", "b", "c"), 2)
    assert found == {"b": "code 1: loss is nan"}
    scripted(monkeypatch, "import sys; print('error: steps: must be 1: 0'); sys.exit(2)")
    with pytest.raises(InputError, match=r"train\.log: training refused its input: steps: must be"):
        train_proxies(proxies(tmp_path, "d"), 1)


def test_no_training_outlives_a_stopped_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, "import time; time.sleep(600)")
    started = []
    begin = search_runs._start

    def note(proxy: Proxy, environment: Mapping[str, str]) -> object:
        started.append(begin(proxy, environment))
        return started[-1]

    monkeypatch.setattr(search_runs, "_start", note)
    monkeypatch.setattr(search_runs, "_step", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train_proxies(proxies(tmp_path, "a", "b"), 2)
    assert len(started) == 2
    assert all(process.poll() is not None for process in started)


def test_a_training_left_by_a_killed_search_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, "import pathlib; (pathlib.Path(DIR) / 'begun').touch()")
    (tmp_path / "a").mkdir()
    with (tmp_path / "a" / "metrics.jsonl").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        begun: list[bool] = []

        def release() -> None:
            begun.append((tmp_path / "a" / "begun").exists())
            fcntl.flock(file, fcntl.LOCK_UN)

        timer = threading.Timer(0.5, release)
        timer.start()
        start = time.monotonic()
        assert train_proxies(proxies(tmp_path, "a"), 1) == {}
        timer.join()
    assert begun == [False]
    assert time.monotonic() - start > 0.5
    assert (tmp_path / "a" / "begun").exists()


def test_trainings_share_cores_and_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (one,) = proxies(tmp_path, "a")
    two = one._replace(ranks=2)
    monkeypatch.setattr(search_runs.os, "cpu_count", lambda: 16)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("RANK", "3")
    gpus = ["4", "5", "6", "7"]
    found = [environment_of(two, slot, 2, gpus) for slot in (0, 1)]
    assert [e["CUDA_VISIBLE_DEVICES"] for e in found] == ["4,5", "6,7"]
    assert {e["OMP_NUM_THREADS"] for e in found} == {"4"}
    assert "RANK" not in found[0]
    assert environment_of(one, 5, 6, gpus)["CUDA_VISIBLE_DEVICES"] == "5"  # more jobs than GPUs
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert environment_of(one, 0, 1, [])["OMP_NUM_THREADS"] == "1"
    assert "torch.distributed.run" in two.command()
    assert "torch.distributed.run" not in one.command()
    check_slots(2, 2, 4)
    check_slots(8, 1, 4)
    with pytest.raises(InputError, match="jobs: times ranks, 2, must not be more than the GPUs, 4"):
        check_slots(3, 2, 4)
    with pytest.raises(InputError, match="ranks: must be at least 1: 0"):
        check_slots(1, 0, 0)


@pytest.mark.parametrize(
    "value", ["/a/b-c_1.2", "/a b/c", "it's", "back\\slash", "end\\", "a\\'b", "[1,2]", "x=y"]
)
def test_any_path_is_taken_literally(value: str) -> None:
    from face_lfr.tests.launch import config

    assert config("train", f"run_dir={quoted(value)}").run_dir == value
