"""Speed of evaluation, re-ranking and aggregation; run by `python -m reid_rqen.benchmarks`.

Every row compares outputs first, then times both sides in turns in this process. `full=true` adds
the sizes of MARS and 10,000 x 100,000. `mars_info=DIR` (tracks_test_info.mat, query_IDX.mat) takes
labels and tracklet lengths from MARS; without it labels and lengths of the same shape are drawn.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from reid_rqen.benchmarks import peer_rank
from reid_rqen.benchmarks.peer_aggregate import vectors_by_loop, vectors_by_streamed_loop
from reid_rqen.benchmarks.peer_rerank import rerank_dense
from reid_rqen.benchmarks.problems import Labels, clustered, lpw_labels, mars_labels, mars_lengths
from reid_rqen.benchmarks.results import Row, measure, row
from reid_rqen.feature_file import Features
from reid_rqen.metrics import evaluate_features, rank_metrics
from reid_rqen.ops.aggregate import StreamingAggregate
from reid_rqen.ops.distance import distance_block, euclid_points
from reid_rqen.ops.rerank import rerank

GROUPS = ("evaluate", "rerank", "aggregate")
# ru_maxrss would start from the peak of this process, which a child inherits; VmHWM does not, and
# writing 5 to clear_refs sets it back to what is resident now.
MEMORY = """
import re, numpy as np, torch
from pathlib import Path
from reid_rqen.benchmarks.bench_ops import {call}
from reid_rqen.benchmarks.problems import clustered
torch.set_num_threads({threads})
feature = clustered(np.arange({total}) // 12, 128, {seed})
{call}(feature[:100], 10)
Path("/proc/self/clear_refs").write_text("5")
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
{call}(feature, {queries})
print(peak() - before)
"""


class Sizes(Protocol):
    """What the rows read of the benchmark's configuration."""

    repeats: int
    full: bool
    mars_info: str | None
    seed: int


class Case(NamedTuple):
    """A distance matrix with its labels, in the order of `peer_rank.Peer`."""

    distance: NDArray
    query_pid: NDArray
    query_cam: NDArray
    gallery_pid: NDArray
    gallery_cam: NDArray


def evaluate_rows(cfg: Sizes) -> Iterator[Row]:
    """The evaluator against torchreid's rule in Cython and Python, a loop and scikit-learn."""
    lpw = _case(lpw_labels(cfg.seed), cfg.seed)
    mars = _case(mars_labels(cfg.mars_info, cfg.seed), cfg.seed)
    few = mars._replace(
        distance=mars.distance[::20], query_pid=mars.query_pid[::20], query_cam=mars.query_cam[::20]
    )
    slow = {
        "torchreid Python": peer_rank.ranked_python,
        "NumPy, double loop": peer_rank.ranked_loop,
        "scikit-learn AP": peer_rank.ranked_sklearn,
    }
    for case in (lpw, mars):
        yield _cython_row(case, cfg.repeats)
    for case in (lpw, mars if cfg.full else few):
        for peer, call in slow.items():
            yield _evaluator_row(case, peer, call, cfg.repeats)
    if torch.cuda.is_available():
        yield _gpu_row(mars, cfg.repeats)
    if cfg.full:
        yield _large_row(cfg.seed)


def _case(labels: Labels, seed: int) -> Case:
    """Cosine distances of clustered 128-d features, so that ranks are spread."""
    everyone = np.concatenate([labels.query_pid, labels.gallery_pid])
    feature = clustered(everyone, 128, seed)
    count = len(labels.query_pid)
    return Case(1 - feature[:count] @ feature[count:].T, *labels)


def _cython_row(case: Case, repeats: int) -> Row:
    try:
        peer = peer_rank.ranked_cython()
    except peer_rank.UnavailableError as error:
        return row("evaluate", _shape(case), "torchreid Cython", f"not measured: {error}")
    return _evaluator_row(case, "torchreid Cython", peer, repeats)


def _evaluator_row(case: Case, name: str, peer: peer_rank.Peer, repeats: int) -> Row:
    """Compare CMC@1, 5, 10, 20 and mAP on a tenth of the queries, then time."""
    ours = partial(rank_metrics, *case, "mars_11310")
    part = Case(case.distance[::10], case.query_pid[::10], case.query_cam[::10], *case[3:])
    scores = rank_metrics(*part, "mars_11310")
    curve, average = peer(*part, 20)
    pairs = [(scores[f"cmc@{rank}"], curve[rank - 1]) for rank in (1, 5, 10, 20)]
    difference = max(abs(left - right) for left, right in [*pairs, (scores["mAP"], average)])
    _agree("evaluate", name, difference, 1e-5)
    timed = measure(ours, partial(peer, *case, 50), repeats)
    return row("evaluate", _shape(case), name) | timed | {"max_abs_diff": float(difference)}


def _gpu_row(case: Case, repeats: int) -> Row:
    """Our tensor path, upload of the distances included, against our CPU path."""

    def on_gpu() -> dict[str, float]:
        return rank_metrics(torch.from_numpy(case.distance).cuda(), *case[1:], "mars_11310")

    on_cpu = partial(rank_metrics, *case, "mars_11310")
    difference = abs(on_gpu()["mAP"] - on_cpu()["mAP"])
    _agree("evaluate on GPU", "ours on CPU", difference, 1e-9)
    timed = measure(on_gpu, on_cpu, repeats)
    found = row("evaluate on GPU, with upload", _shape(case), "ours on CPU")
    return found | timed | {"max_abs_diff": difference}


def _large_row(seed: int) -> Row:
    """10,000 x 100,000 in blocks; the peers' sorted matrix alone would take 8 GB."""
    rng = np.random.default_rng(seed)
    pid, cam = rng.integers(1, 10_001, 110_000), rng.integers(1, 7, 110_000)
    feature = clustered(pid, 128, seed)
    query, gallery = slice(0, 10_000), slice(10_000, None)
    features = Features(
        feature[query], pid[query], cam[query], feature[gallery], pid[gallery], cam[gallery]
    )
    start = time.perf_counter()
    evaluate_features(features, "mars_9330")
    note = "128-d features to scores, once; peers not measured: their order matrix takes 8 GB"
    found = row("evaluate in blocks", "10000x100000", "none", note)
    return found | {"ours_ms": (time.perf_counter() - start) * 1e3}


def rerank_rows(cfg: Sizes) -> Iterator[Row]:
    """Sparse k-reciprocal re-ranking against the usual dense code: time, then peak memory."""
    for total in (1000, 4000, *([11310] if cfg.full else [])):
        queries = total * 1980 // 11310
        feature = clustered(np.arange(total) // 12, 128, cfg.seed)
        ours, peer = (partial(call, feature, queries) for call in (rerank_sparse, rerank_usual))
        difference = float(np.abs(ours() - peer()).max())
        # one neighbour that float32 rounding swaps at the end of a list moves a value by more
        _agree("rerank", "dense", difference, 1e-2)
        found = row("rerank", f"{queries} of {total}, 128-d", "dense, argsort and loops")
        timed = measure(ours, peer, cfg.repeats if total < 4000 else 3)
        memory = {f"{side}_mib": peak_mib(side, total, cfg.seed) for side in ("ours", "peer")}
        yield found | timed | memory | {"max_abs_diff": difference}


def rerank_sparse(feature: NDArray, queries: int) -> NDArray:
    """Ours, from features."""
    rows = np.arange(len(feature))
    return rerank(euclid_points(torch.from_numpy(feature)), rows[:queries], rows[queries:])


def rerank_usual(feature: NDArray, queries: int) -> NDArray:
    """The peer, from features."""
    points = euclid_points(torch.from_numpy(feature))
    return rerank_dense(distance_block(points, points).sqrt().numpy(), queries)


def peak_mib(side: str, total: int, seed: int) -> float | None:
    """Growth of the resident peak, MiB, of one re-ranking in a process of its own."""
    call = "rerank_sparse" if side == "ours" else "rerank_usual"
    if not Path("/proc/self/clear_refs").exists():
        return None
    code = MEMORY.format(
        call=call, total=total, queries=total * 1980 // 11310, seed=seed,
        threads=torch.get_num_threads(),
    )  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return int(done.stdout) / 1024 if done.returncode == 0 else None


def aggregate_rows(cfg: Sizes) -> Iterator[Row]:
    """Streamed weighted means against a loop over tracklets, at the tracklet lengths of MARS."""
    length_N = mars_lengths(cfg.mars_info, cfg.seed)[: 2000 if cfg.full else 400]
    generator = torch.Generator().manual_seed(cfg.seed)
    index_B = torch.arange(len(length_N)).repeat_interleave(torch.from_numpy(length_N))
    feature_BRC = torch.rand(len(index_B), 3, 256, generator=generator)
    score_BR = torch.rand(len(index_B), 3, generator=generator)

    def streamed(chunk: int) -> torch.Tensor:
        sums = StreamingAggregate(len(length_N), 3, 256)
        chunks = (part.split(chunk) for part in (index_B, feature_BRC, score_BR))
        for index, feature, score in zip(*chunks, strict=True):
            sums.update(index, feature, score)
        return sums.vectors()

    data = (length_N.tolist(), feature_BRC, score_BR)
    for chunk in (256, 4096):
        peers = {
            "loop, whole set in memory": partial(vectors_by_loop, *data),
            "loop, in the same chunks": partial(vectors_by_streamed_loop, *data, chunk),
        }
        for peer, call in peers.items():
            difference = float((streamed(chunk) - call()).abs().max())
            _agree("aggregate", peer, difference, 1e-5)
            shape = f"{len(length_N)} tracklets, {len(index_B)} frames x 3 x 256"
            found = row(f"aggregate, {chunk} frames at a time", shape, peer)
            timed = measure(partial(streamed, chunk), call, cfg.repeats)
            yield found | timed | {"max_abs_diff": difference}


def _agree(name: str, peer: str, difference: float, limit: float) -> None:
    if not difference <= limit:
        raise RuntimeError(f"{name} differs from {peer} by {difference}, more than {limit}")


def _shape(case: Case) -> str:
    return "x".join(str(size) for size in case.distance.shape)
