"""Trainings of the search side by side, each through the ordinary entry point.

A training is a subprocess with a run folder of its own, so a search that was stopped goes on where
it was. Unlike the suite of the synthetic rows, the data may be any; every training gets GPUs of its
own where there are some; and a network whose training breaks down does not end the others.
"""

import fcntl
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from common.log import InputError, get_logger, progress, read_metrics

BAD_INPUT = 2  # exit code; see `common.log.exit_on_bad_input`
WAIT_S = 0.3  # between two looks at the trainings
LOG = "train.log"


class Proxy(NamedTuple):
    """A short training of one candidate: overrides of `face_lfr.train`, without run_dir and steps.

    `ranks` processes share its batch under torchrun.
    """

    name: str
    run_dir: Path
    steps: int
    words: tuple[str, ...]
    ranks: int = 1

    def command(self) -> list[str]:
        """The command line that trains it."""
        launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={self.ranks}", "-m"]
        module = [*(launcher if self.ranks > 1 else []), "face_lfr.train"]
        own = [f"run_dir={quoted(self.run_dir)}", f"steps={self.steps}"]
        return [sys.executable, "-m", *module, *self.words, *own]

    @property
    def log(self) -> Path:
        """What the training printed, over all of its starts."""
        return self.run_dir / LOG


def quoted(value: object) -> str:
    """A value that Hydra takes literally, whatever characters a path has."""
    text = str(value)
    if re.fullmatch(r"[\w./:@%-]+", text):
        return text
    # A backslash is itself, but before a quote.
    escaped = re.sub(r"(\\*)('|$)", lambda at: 2 * at[1] + ("\\'" if at[2] else ""), text)
    return f"'{escaped}'"


class Running(NamedTuple):
    """A training that was started, and the slot it takes."""

    proxy: Proxy
    process: "subprocess.Popen[bytes]"
    slot: int


def train_proxies(proxies: Sequence[Proxy], parallel: int) -> dict[str, str]:
    """Train all, `parallel` at a time on equal shares of the cores and of the GPUs.

    Returns:
        Name -> last line of the log, of the trainings that broke down.

    Raises:
        InputError: a setting that no training accepts, or more ranks than GPUs.
    """
    available = visible_gpus()
    ranks = max((proxy.ranks for proxy in proxies), default=1)
    check_slots(parallel, ranks, len(available))
    waiting, running, failed = list(proxies), list[Running](), dict[str, str]()
    with progress() as bar, _ended_at_exit(running):
        tasks = {proxy.name: bar.add_task(proxy.name, total=proxy.steps) for proxy in proxies}
        while waiting or running:
            for slot in sorted({*range(parallel)} - {entry.slot for entry in running}):
                # A training that outlived a killed search is left to end.
                proxy = next((proxy for proxy in waiting if not _held(proxy)), None)
                if proxy is not None:
                    waiting.remove(proxy)
                    environment = environment_of(proxy, slot, parallel, available)
                    running.append(Running(proxy, _start(proxy, environment), slot))
            time.sleep(WAIT_S)
            for entry in list(running):
                code = entry.process.poll()
                step = entry.proxy.steps if code == 0 else _step(entry.proxy)
                bar.update(tasks[entry.proxy.name], completed=step)
                if code is not None:
                    running.remove(entry)
                    failed |= _outcome(entry.proxy, code)
    return failed


def check_slots(parallel: int, ranks: int, gpus: int) -> None:
    """Refuse more trainings side by side than can be.

    Raises:
        InputError: names the setting.
    """
    for name, value in (("jobs", parallel), ("ranks", ranks)):
        if value < 1:
            raise InputError(name, "must be at least 1", value)
    if gpus and ranks > 1 and parallel * ranks > gpus:
        what = f"times ranks, {ranks}, must not be more than the GPUs, {gpus}"
        raise InputError("jobs", what, parallel)


def visible_gpus() -> list[str]:
    """Names of the GPUs this process may use, as CUDA_VISIBLE_DEVICES has them."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named[:count] if named else [str(number) for number in range(count)]


def environment_of(proxy: Proxy, slot: int, parallel: int, gpus: Sequence[str]) -> dict[str, str]:
    """Environment of a training: its share of the cores, and its GPUs where there are some."""
    share = max((os.cpu_count() or 1) // (parallel * proxy.ranks), 1)
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    threads = min(share, int(wanted)) if wanted.isdigit() and int(wanted) else share
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    # A restarted group otherwise meets the addresses of the dead one (pytorch#167288).
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    if gpus:
        own = [gpus[(slot * proxy.ranks + rank) % len(gpus)] for rank in range(proxy.ranks)]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    return environment


def _start(proxy: Proxy, environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    proxy.run_dir.mkdir(parents=True, exist_ok=True)
    with proxy.log.open("ab") as log:
        return subprocess.Popen(proxy.command(), stdout=log, stderr=log, env=environment)


def _held(proxy: Proxy) -> bool:
    """Whether a training is still at work in the folder."""
    path = proxy.run_dir / "metrics.jsonl"
    if not path.exists():
        return False
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks
            return False
    return False


@contextmanager
def _ended_at_exit(running: Sequence[Running]) -> Iterator[None]:
    """Leave no training behind when the search is stopped; each saves where it is."""
    try:
        yield
    finally:
        for entry in running:
            entry.process.terminate()
        for entry in running:
            entry.process.wait()


def _step(proxy: Proxy) -> int:
    path = proxy.run_dir / "metrics.jsonl"
    rows = read_metrics(path) if path.exists() else []
    return int(rows[-1]["step"]) if rows else 0


def _outcome(proxy: Proxy, code: int) -> dict[str, str]:
    """Nothing for a training that is done, else the last line of its log under its name."""
    if code == 0:
        return {}
    lines = proxy.log.read_text(errors="replace").strip().splitlines()
    last = lines[-1] if lines else "it printed nothing"
    if code == BAD_INPUT:
        raise InputError(proxy.log, "training refused its input", last.removeprefix("error: "))
    get_logger(__name__).warning("%s: training ended with code %d: %s", proxy.name, code, last)
    return {proxy.name: f"code {code}: {last}"}
