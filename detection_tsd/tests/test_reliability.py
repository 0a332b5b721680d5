"""Real training processes that are killed, stopped or damaged end where an undisturbed one ends."""

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from detection_tsd.tests.launch import TIMEOUT_S, finish, kill_group, rows, saved, start, train

pytestmark = pytest.mark.slow
TRAIN = "detection_tsd.train"


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Return when the process has logged so many steps; fails when it ends before."""
    path, deadline = run / "metrics.jsonl", time.monotonic() + TIMEOUT_S
    while not path.exists() or path.read_bytes().count(b"\n") < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_killed_twice_it_ends_with_the_same_bits(
    run: Path, tiny: list[str], tmp_path: Path
) -> None:
    """SIGKILL at a random step, SIGKILL in the middle of a save, then left alone."""
    again = tmp_path / "again"
    words = [*tiny, "device=cpu", f"run_dir={again}", "steps=40", "workers=1"]
    process = start(TRAIN, *words)
    wait_for_step(process, again, random.Random(0).randint(11, 18))
    kill_group(process)
    assert finish(process).code == -signal.SIGKILL
    assert checkpoints(again)[0] == "step_00000010"
    # The files of the run folder take four flushes, the first new checkpoint five and a rename.
    died = finish(start("detection_tsd.tests.launch", "7", *words))
    assert died.code == -signal.SIGKILL, died.err
    assert any(name.endswith(".tmp") for name in checkpoints(again))
    last = finish(start(TRAIN, *words))
    assert last.code == 0, last.err
    assert checkpoints(again) == checkpoints(run)
    assert rows(again) == rows(run)
    assert saved(again) == saved(run)


def flip(folder: Path) -> Path:
    """Change one bit in the middle of the weights."""
    path = next(folder.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


def test_a_damaged_checkpoint_is_named_and_passed_over(
    run: Path, tiny: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    again = shutil.copytree(run, tmp_path / "again")
    damaged = flip(again / "checkpoints" / "step_00000040")
    train(*tiny, f"run_dir={again}", "steps=40")
    (warning,) = [r.message for r in caplog.records if "passed over" in r.message]
    assert str(damaged) in warning
    assert saved(again) == saved(run)
    assert rows(again) == rows(run)


@pytest.mark.parametrize("whole_group", [False, True])
def test_sigterm_saves_and_ends_in_order(
    run: Path, tiny: list[str], tmp_path: Path, whole_group: bool
) -> None:
    """Clusters signal one process, or every process of the job with its data workers."""
    again = tmp_path / "again"
    words = [*tiny, "device=cpu", f"run_dir={again}", "workers=1"]
    process = start(TRAIN, *words, "steps=4000", "save_every=1000")
    wait_for_step(process, again, 5)
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGTERM)
    done = finish(process)
    assert done.code == 0, done.err
    (name,) = checkpoints(again)
    step = int(name.removeprefix("step_"))
    assert 5 <= step < 1000
    assert rows(again)[-1]["step"] == step
    if step < 40:  # a slow machine may stop later than the run to compare with
        train(*tiny, f"run_dir={again}", "steps=40")
        assert rows(again) == rows(run)
        assert saved(again) == saved(run)
