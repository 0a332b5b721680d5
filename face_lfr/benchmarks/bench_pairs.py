"""Speed and memory of scoring all pairs; run by `python -m face_lfr.benchmarks`.

Features are clusters of 15 rows around random centres, a quarter of the rows are distractors, and
the rates are 1e-6, 1e-5 and 1e-4 in one call. Rows against peers compare the true positive rates
first. The row without a peer runs in a process of its own, whose greatest memory in use
it reports, everything imported and the features included:

    python -m face_lfr.benchmarks.bench_pairs ROWS WIDTH THREADS SEED DEVICE
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from face_lfr.all_pairs import TILE, all_pairs
from face_lfr.benchmarks.peer_pairs import Peer, partitioned_pairs, sorted_pairs
from face_lfr.benchmarks.results import SLOW_S, Row, measure, row
from face_lfr.ops.pair_scores import full_precision, negative_corners, sorted_rows

FPRS = (1e-6, 1e-5, 1e-4)
WIDTH, IMAGES, SPREAD = 256, 15, 1.3
ROOT = Path(__file__).resolve().parents[2]
MODULE = "face_lfr.benchmarks.bench_pairs"
NAME = "all pairs, TPR at 1e-6, 1e-5, 1e-4"


class Problem(NamedTuple):
    """Features (N, D) and labels (N,), -1 for a distractor."""

    features: NDArray[np.float32]
    labels: NDArray[np.int64]

    @property
    def shape(self) -> str:
        """Rows by width."""
        return f"{len(self.features)}x{self.features.shape[1]}"


def pair_rows(
    repeats: int, device: torch.device, quick: bool = False, seed: int = 0
) -> Iterator[Row]:
    """Against two peers, against the products alone, and alone at ten times the rows."""
    small, large = (4000, 40_000) if quick else (20_000, 200_000)
    case = problem(small, WIDTH, seed)
    ours = partial(_rates, case, device)
    peers: dict[str, Peer] = {
        "NumPy, all scores, scikit-learn roc_curve": sorted_pairs,
        "NumPy, all scores, partition": partitioned_pairs,
    }
    for name, peer in peers.items():
        timed = against(ours, partial(peer, case.features, case.labels, FPRS), name, repeats)
        yield row(NAME, case.shape, name) | timed | {"note": _note(case, timed)}
    whole = case if device.type == "cpu" else problem(large, WIDTH, seed)
    yield products_row(whole, device, repeats)
    yield alone_row(large, WIDTH, device, seed)


def problem(rows: int, width: int, seed: int) -> Problem:
    """Clusters in random order, three quarters of the rows; the others are distractors."""
    rng = np.random.default_rng(seed)
    classes = max(1, rows * 3 // 4 // IMAGES)
    labels = np.full(rows, -1)
    labels[: classes * IMAGES] = np.repeat(np.arange(classes), IMAGES)
    rng.shuffle(labels)
    centre_CD = rng.standard_normal((classes, width), dtype=np.float32)
    features = rng.standard_normal((rows, width), dtype=np.float32)
    features *= SPREAD
    for at in np.array_split(np.flatnonzero(labels >= 0), 1 + rows // 10_000):  # in little memory
        features[at] += centre_CD[labels[at]]
    return Problem(features, labels)


def _note(case: Problem, timed: Row) -> str:
    speed = f"{_pairs(case) / timed['ours_ms'] / 1e3:.0f} million pairs/s"
    return "; ".join([speed, *filter(None, [timed.get("note")])])


def _rates(case: Problem, device: torch.device) -> list[float]:
    found = all_pairs(case.features, case.labels, FPRS, device=device)
    return [point.tpr for point in found.points]


def against(
    ours: Callable[[], list[float]], peer: Callable[[], list[float]], name: str, repeats: int
) -> Row:
    """Compare, then time; a peer that takes longer than 15 s is called only once.

    Raises:
        RuntimeError: the rates differ by more than float32 scores of the peer explain.
    """
    start = time.perf_counter()
    theirs = peer()
    seconds = time.perf_counter() - start
    difference = float(np.abs(np.subtract(ours(), theirs)).max())
    if not difference <= 1e-4:
        raise RuntimeError(f"all_pairs differs from {name} by {difference}, more than 1e-4")
    if seconds < SLOW_S:
        return measure(ours, peer, repeats) | {"max_abs_diff": difference}
    mine = median(_seconds(ours) for _ in range(repeats))
    found = {"ours_ms": mine * 1e3, "peer_ms": seconds * 1e3, "ratio": seconds / mine}
    return found | {"max_abs_diff": difference, "note": "peer timed once"}


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def products_row(case: Problem, device: torch.device, repeats: int) -> Row:
    """The ratio is the share of the speed of float32 products of the same tiles, written once."""
    rows = sorted_rows(case.features, case.labels, device)
    side = min(TILE[device.type], len(rows))
    memory = torch.empty(side * side, device=device)

    def products() -> None:
        with full_precision(device):
            for first, second in negative_corners(rows, "all", side):
                ours = rows.unit[first : min(first + side, rows.labelled)]
                other = rows.unit[second : second + side]
                out = memory[: len(ours) * len(other)].view(len(ours), len(other))
                torch.mm(ours, other.T, out=out)

    products()
    timed = measure(partial(_rates, case, device), products, repeats)
    flops = 2 * case.features.shape[1] * _pairs(case) / (timed["peer_ms"] / 1e3)
    note = f"products at {flops / 1e9:.0f} GFLOP/s; ratio is our share of their speed"
    return row(NAME, case.shape, "its matrix products alone", note) | timed | {"note": note}


def _pairs(case: Problem) -> int:
    known = int((case.labels >= 0).sum())
    return known * (known - 1) // 2 + known * (len(case.labels) - known)


def alone_row(rows: int, width: int, device: torch.device, seed: int) -> Row:
    """One call in a process of its own."""
    words = (rows, width, torch.get_num_threads(), seed, device)
    command = [sys.executable, "-m", MODULE, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr}")
    found = json.loads(done.stdout)
    note = (
        f"once; {found['pairs'] / found['seconds'] / 1e6:.0f} million pairs/s; peak of the process"
    )
    timed = {"ours_ms": found["seconds"] * 1e3, "ours_mib": found["mib"]}
    return row(NAME, f"{rows}x{width}", "none", note) | timed


def alone(rows: int, width: int, threads: int, seed: int, device: torch.device) -> dict[str, float]:
    """Seconds, pairs and the greatest memory in use of this process."""
    torch.set_num_threads(threads)
    case = problem(rows, width, seed)
    seconds = _seconds(partial(_rates, case, device))
    return {"seconds": seconds, "pairs": _pairs(case), "mib": peak_mib()}


def peak_mib() -> float:
    """Greatest resident memory of this process so far; what the parent had does not count."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    kib = int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / 1024


if __name__ == "__main__":
    rows, width, threads, seed = map(int, sys.argv[1:5])
    found = alone(rows, width, threads, seed, torch.device(sys.argv[5]))
    sys.stdout.write(json.dumps(found))
