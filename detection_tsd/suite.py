"""Rows of the synthetic task, trained through the ordinary entry point.

What `demo` and `claims` share. A job is one row on one generated data set; its run folder resumes,
so a suite that was stopped goes on where it was. `scoring.py` measures what was trained.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from common.log import InputError, progress, read_metrics
from detection_tsd.data.synthetic import generate

# Kind of a data set -> its file in configs/data, and what it is generated with.
DATA: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "glyphs": ("glyphs", {"kind": "glyphs"}),
    "centred": ("glyphs_centred", {"kind": "glyphs", "centred": True, "jitter": 0.0}),
    "digits": ("digits", {"kind": "digits"}),
}


class Job(NamedTuple):
    """One training: a row of configs/experiment/synth on the data set at `data`."""

    row: str
    run_dir: Path
    data: Path
    kind: str  # of the data set, see `DATA`
    seed: int
    steps: int
    sizes: Mapping[str, int] = {}  # of the data set, where not as usual
    words: tuple[str, ...] = ()  # further overrides

    def command(self) -> list[str]:
        """The command line that trains it."""
        words = [
            f"experiment=synth/{self.row}", f"data={DATA[self.kind][0]}",
            f"data.root={self.data}", f"data.train.seed={self.seed}",
            *(f"data.train.{name}={count}" for name, count in self.sizes.items()),
            f"run_dir={self.run_dir}", f"seed={self.seed}", f"steps={self.steps}",
            f"save_every={max(self.steps // 10, 1)}",
        ]  # fmt: skip
        words += ["num_classes=10"] if self.kind == "digits" else []
        return [sys.executable, "-m", "detection_tsd.train", *words, *self.words]

    @property
    def title(self) -> str:
        """For the progress bar."""
        kind = "" if self.kind == "glyphs" else f" {self.kind}"
        return f"{self.row}{kind} seed {self.seed}"


Running = dict[Path, tuple[Job, "subprocess.Popen[bytes]"]]


def train_all(jobs: Sequence[Job], parallel: int) -> None:
    """Train every job, `parallel` at a time on equal shares of the cores.

    Raises:
        InputError: a training failed; the message names its log and quotes the last line.
    """
    if parallel < 1:
        raise InputError("jobs", "must be at least 1", parallel)
    for job in {job.data: job for job in jobs}.values():
        generate(job.data, seed=job.seed, **DATA[job.kind][1], **job.sizes)
    running: Running = {}
    waiting = list(jobs)
    with progress() as bar, _killed_at_exit(running):
        tasks = {job.run_dir: bar.add_task(job.title, total=job.steps) for job in jobs}
        while waiting or running:
            for job in waiting[: parallel - len(running)]:
                waiting.remove(job)
                running[job.run_dir] = (job, _start(job, parallel))
            time.sleep(0.5)
            for job, process in list(running.values()):
                code = process.poll()
                bar.update(tasks[job.run_dir], completed=_step(job, finished=code == 0))
                if code is not None:
                    del running[job.run_dir]
                    _check(job, code)


def _start(job: Job, parallel: int) -> subprocess.Popen[bytes]:
    threads = max((os.cpu_count() or 1) // parallel, 1)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    job.run_dir.mkdir(parents=True, exist_ok=True)
    with (job.run_dir / "train.log").open("ab") as log:
        return subprocess.Popen(job.command(), stdout=log, stderr=log, env=environment)


@contextmanager
def _killed_at_exit(running: Running) -> Iterator[None]:
    """Leave no training behind when the suite is stopped; each resumes from its checkpoint."""
    try:
        yield
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()


def _step(job: Job, finished: bool) -> int:
    if finished:
        return job.steps
    path = job.run_dir / "metrics.jsonl"
    rows = read_metrics(path) if path.exists() else []
    return rows[-1]["step"] if rows else 0


def _check(job: Job, code: int) -> None:
    if code == 0:
        return
    lines = (job.run_dir / "train.log").read_text(errors="replace").strip().splitlines()
    raise InputError(
        job.run_dir / "train.log", f"training ended with code {code}", lines[-1:] or ""
    )
