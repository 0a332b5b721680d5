"""Work in several processes: results, deaths of processes, errors of all kinds."""

import os
import signal
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from common.log import InputError
from video_mmit.tools.jobs import run_jobs


class Item(NamedTuple):
    path: Path


ITEMS = [Item(Path(f"{number}.mp4")) for number in range(12)]


def length(item: Item) -> int:
    number = int(item.path.stem)
    if number % 5 == 3:
        raise InputError(item.path, "is odd", number)
    return number * number


@pytest.mark.parametrize("workers", [0, 1, 3, 20])
def test_every_item_gets_its_result(workers: int) -> None:
    found = dict(run_jobs(length, ITEMS, workers))
    assert set(found) == set(ITEMS)
    for item, result in found.items():
        number = int(item.path.stem)
        if number % 5 == 3:
            assert isinstance(result, InputError)
            assert str(result) == f"{number}.mp4: is odd: {number}"
        else:
            assert result == number * number
    assert list(run_jobs(length, [], workers)) == []


def test_work_is_shared(tmp_path: Path) -> None:
    def slow(item: Item) -> int:
        time.sleep(0.05)
        return os.getpid()

    workers = {pid for _, pid in run_jobs(slow, ITEMS, 3)}
    assert len(workers) == 3
    assert os.getpid() not in workers


def test_a_process_that_dies_costs_one_video() -> None:
    """As a decoder does that meets a file it cannot stand."""

    def deadly(item: Item) -> int:
        if item.path.stem in ("2", "7"):
            os.kill(os.getpid(), signal.SIGKILL)
        return 1

    found = dict(run_jobs(deadly, ITEMS, 2))
    assert len(found) == len(ITEMS)
    bad = {item.path.stem: str(result) for item, result in found.items() if result != 1}
    what = "the process that read it died with code: -9"
    assert bad == {"2": f"2.mp4: {what}", "7": f"7.mp4: {what}"}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_full_disk_ends_the_run(workers: int) -> None:
    def full(item: Item) -> int:
        raise OSError(28, "No space left on device", str(item.path))

    with pytest.raises(OSError, match="No space left") as error:
        list(run_jobs(full, ITEMS, workers))
    assert error.value.filename in ("0.mp4", "1.mp4")


def test_an_error_of_programming_keeps_its_traceback() -> None:
    def wrong(item: Item) -> int:
        return {}["no such key"]  # type: ignore[return-value]

    with pytest.raises(RuntimeError, match=r"(?s)a worker failed with.*in wrong.*KeyError: 'no su"):
        list(run_jobs(wrong, ITEMS, 2))
    with pytest.raises(KeyError):
        list(run_jobs(wrong, ITEMS, 0))
