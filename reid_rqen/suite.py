"""Rows of the synthetic task: train several through the ordinary entry point, then score them.

What `demo` and `claims` share. A job is one row on one generated data set; its run folder resumes,
so a suite that was stopped goes on where it was.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common import dist
from common.log import InputError, progress, read_metrics
from reid_rqen.data.lpw import load_lpw
from reid_rqen.data.synthetic import generate
from reid_rqen.data.tracklet import ReidData, Tracklet
from reid_rqen.engine import Extraction
from reid_rqen.evaluate import Embedded, embed
from reid_rqen.metrics import evaluate_features
from reid_rqen.weights import Trained, load_trained

REGIONS = ("upper", "middle", "lower")


class Job(NamedTuple):
    """One training: row `name` of configs/experiment/synth on the data set at `data`."""

    name: str
    run_dir: Path
    data: Path
    seed: int
    steps: int
    settings: dict[str, Any]  # fields of `data.synthetic.Settings` that differ from the default

    def command(self) -> list[str]:
        """The command line that trains it."""
        fields = [f"+data.{key}={value}" for key, value in self.settings.items()]
        return [
            sys.executable, "-m", "reid_rqen.train", f"experiment=synth/{self.name}",
            f"run_dir={self.run_dir}", f"data.root={self.data}", f"data.seed={self.seed}",
            f"seed={self.seed}", f"steps={self.steps}", *fields,
        ]  # fmt: skip


Running = dict[Path, tuple[Job, "subprocess.Popen[bytes]"]]


class Measured(NamedTuple):
    """Scores of one job: CMC and mAP, and per region how well quality finds the clean frames."""

    result: dict[str, Any]
    auc: tuple[float, ...] | None  # None for scores that are constant


def train_all(jobs: Sequence[Job], parallel: int) -> None:
    """Train every job, `parallel` at a time on equal shares of the cores.

    Raises:
        InputError: a training failed; the message names its log and quotes the last line.
    """
    if parallel < 1:
        raise InputError("jobs", "must be at least 1", parallel)
    for root, seed, settings in {
        str(job.data): (job.data, job.seed, job.settings) for job in jobs
    }.values():
        generate(root, seed, **settings)
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
    return f"{job.name} {job.data.name}"


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


def open_run(job: Job, **model_options: Any) -> Trained:
    """The trained model of a job, in evaluation mode."""
    return load_trained(job.run_dir, device=dist.init().device, **model_options)


def look(trained: Trained, data: ReidData) -> Embedded:
    """Query and gallery of a synthetic data set as the model sees them."""
    return embed(trained, data, Extraction(trained.transform, dist.init(), batch=512))


def measure(job: Job, root: Path | None = None, **model_options: Any) -> Measured:
    """Score a job on its own data set, or on another one of the same form."""
    root = job.data if root is None else root
    data = load_lpw(root)
    embedded = look(open_run(job, **model_options), data)
    result = evaluate_features(embedded.features, data.protocol)
    return Measured(result, region_auc(data.query, embedded.query.score, root))


def clean_table(root: Path) -> dict[Path, np.ndarray]:
    """{frame path: (3,) bool} of a synthetic data set: which regions are uncovered."""
    with np.load(root / "quality.npz", allow_pickle=False) as file:
        return {
            root / name: row
            for name, row in zip(file["paths"].tolist(), file["clean"], strict=True)
        }


def region_auc(
    tracklets: list[Tracklet], score: list[np.ndarray], root: Path
) -> tuple[float, ...] | None:
    """Area under the ROC of the score as a detector of clean frames, for each region.

    None for constant scores, and where every frame is clean. One score per frame serves all
    regions.
    """
    from sklearn.metrics import roc_auc_score

    table = clean_table(root)
    clean_B3 = np.stack([table[frame] for tracklet in tracklets for frame in tracklet.frames])
    if not score or clean_B3.all() or np.ptp(np.concatenate(score)) == 0:
        return None
    score_BR = np.concatenate(score)
    spread_B3 = (
        np.broadcast_to(score_BR, (len(score_BR), 3)) if score_BR.shape[1] == 1 else score_BR
    )
    return tuple(float(roc_auc_score(clean_B3[:, r], spread_B3[:, r])) for r in range(3))
