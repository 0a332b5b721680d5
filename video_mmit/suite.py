"""Rows of the synthetic task: train several through the ordinary entry point, then score them.

What `demo` and `claims` share. A job is one row on one generated data set; its run folder resumes,
so a suite that was stopped goes on where it was.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common import dist
from common.log import InputError, progress, read_metrics
from video_mmit.data.synthetic import generate, pair_accuracy
from video_mmit.data.video_data import VideoData
from video_mmit.engine import Views, score_videos
from video_mmit.evaluate import open_data, truth_of
from video_mmit.metrics import evaluate_scores
from video_mmit.weights import Trained, load_trained

PAIR_NAMES = {
    "order": ("right / left", "down / up", "grow / shrink", "bright / dark", "marker order"),
    "gap": ("right / left", "down / up"),
    "static": (),
}  # fmt: skip
SHUFFLE_SEED = 0  # of the control that shows the frames of a video in a random order


class Job(NamedTuple):
    """One training: row `part/name` of configs/experiment/synth on the data set at `data`."""

    part: str
    name: str
    run_dir: Path
    data: Path
    seed: int
    steps: int
    videos: Mapping[str, int] = {}  # train, val: how many, when not as many as usual

    @property
    def settings(self) -> dict[str, Any]:
        """Fields of the data set that differ from the default."""
        return {"part": self.part, **self.videos}

    def command(self) -> list[str]:
        """The command line that trains it."""
        return [
            sys.executable, "-m", "video_mmit.train", f"experiment=synth/{self.part}/{self.name}",
            f"run_dir={self.run_dir}", f"data.root={self.data}", f"data.seed={self.seed}",
            f"seed={self.seed}", f"steps={self.steps}",
            *(f"data.{name}={value}" for name, value in self.settings.items()),
        ]  # fmt: skip


Running = dict[Path, tuple[Job, "subprocess.Popen[bytes]"]]


class Measured(NamedTuple):
    """Scores (N, K) of one job on its test videos, and the figures made of them."""

    score: np.ndarray
    target: np.ndarray
    result: dict[str, float]
    pairs: tuple[float, ...]  # share of the videos of each opposite pair that are told apart

    @property
    def pair(self) -> float:
        """Mean over the pairs, nan for a task without pairs."""
        return float(np.mean(self.pairs)) if self.pairs else float("nan")


def train_all(jobs: Sequence[Job], parallel: int) -> None:
    """Train every job, `parallel` at a time on equal shares of the cores.

    Raises:
        InputError: a training failed; the message names its log and quotes the last line.
    """
    if parallel < 1:
        raise InputError("jobs", "must be at least 1", parallel)
    for job in {job.data: job for job in jobs}.values():
        generate(job.data, job.seed, **job.settings)
    running: Running = {}
    waiting = list(jobs)
    with progress() as bar, _killed_at_exit(running):
        tasks = {job.run_dir: bar.add_task(_title(job), total=job.steps) for job in jobs}
        while waiting or running:
            while waiting and len(running) < parallel:
                job = waiting.pop(0)
                running[job.run_dir] = (job, _start(job, parallel))
            time.sleep(0.5)
            for job, process in list(running.values()):
                code = process.poll()
                bar.update(tasks[job.run_dir], completed=_step(job, finished=code == 0))
                if code is not None:
                    del running[job.run_dir]
                    _check(job, code)


def _title(job: Job) -> str:
    return f"{job.part} {job.name} seed {job.seed}"


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


def open_run(job: Job) -> tuple[Trained, VideoData]:
    """The trained model of a job, in evaluation mode, and its data set."""
    trained = load_trained(job.run_dir, device=dist.init().device)
    return trained, open_data(trained)


def measure(job: Job, shuffle: bool = False) -> Measured:
    """Score a job on its test videos, with the frames of every video in a random order if asked."""
    trained, data = open_run(job)
    how = Views(
        trained.transform, dist.init(), batch=128, shuffle=SHUFFLE_SEED if shuffle else None
    )
    title = f"{job.part} {job.name} seed {job.seed}{' shuffled' if shuffle else ''}"
    scored = score_videos(trained.model, data.test, data, how, title)
    return figures(scored.scores, truth_of(data).target, job.part)


def figures(score_NK: np.ndarray, target_NK: np.ndarray, part: str) -> Measured:
    """The figures of some scores, which may be an ensemble's."""
    result = evaluate_scores(score_NK, target_NK, multi_label=True)
    pairs = pair_accuracy(score_NK, target_NK, part)
    each = tuple(value for name, value in pairs.items() if name != "all")
    return Measured(score_NK, target_NK, result, each)
