"""CMC, mAP and mINP of ranked galleries, exactly, with the ties counted.

For a query q the gallery without the rows its protocol removes is ordered by (distance, gallery
row). Its P positives lie at ranks r_1 < ... < r_P (1-based), and

    CMC@k = [r_1 <= k],    INP = P / r_P,
    AP plain = 1/P sum_k k/r_k,
    AP trapezoid = 1/P sum_k (prev_k + k/r_k) / 2,  prev_k = (k-1)/(r_k-1), or 1 where r_k = 1.

All are averaged over the queries that have a positive; the others are counted as skipped. Every
value exists three times: in the stable order above, with tied negatives behind the positives
(optimistic) and before them (pessimistic). The plain key repeats the stable value, or the
pessimistic one when more than 1 % of the positives are tied with a negative: a model whose output
is constant must not score by luck. The trapezoid is that of liangzheng06/MARS-evaluation, INP is
from Ye et al., arXiv 2001.04193.

Shapes: Q queries, G gallery rows, F positives of all queries end to end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from typing import Protocol as TypingProtocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from common.log import InputError, get_logger
from reid_rqen.feature_file import Features
from reid_rqen.ops.distance import (
    Points,
    QuadraticMetric,
    block_buffer,
    cosine_points,
    euclid_points,
    full_precision,
    ranking_block,
)
from reid_rqen.ops.kissme import KISSME
from reid_rqen.ops.rank import Counts, count_before, index_gallery
from reid_rqen.ops.rerank import KReciprocal
from reid_rqen.ops.xqda import XQDA
from reid_rqen.protocols import JUNK_PID, Protocol, get_protocol

Labels = NDArray[np.int64]
LOG = get_logger(__name__)
TIE_LIMIT = 0.01
RANKS = (1, 5, 10, 20)


class RankEvaluator:
    """Streams blocks of distance rows, scores once.

    Args:
        gallery_pid, gallery_cam: (G,) labels.
        protocol: a name from `PROTOCOLS` or a `Protocol`.
        query_index: gallery rows that are queries; removed where the protocol excludes queries.
    """

    def __init__(
        self,
        gallery_pid: ArrayLike,
        gallery_cam: ArrayLike,
        protocol: str | Protocol,
        query_index: Labels | None = None,
    ):
        self.protocol = get_protocol(protocol)
        pid_G = _labels(gallery_pid, "gallery_pid")
        cam_G = _labels(gallery_cam, "gallery_cam")
        if len(pid_G) != len(cam_G):
            raise InputError("gallery_cam", f"needs {len(pid_G)} entries", len(cam_G))
        self.dropped_G = dropped_rows(pid_G, self.protocol, query_index)
        self.junk = int((pid_G == JUNK_PID).sum()) if self.protocol.drop_junk else 0
        self.index = index_gallery(pid_G, cam_G, self.dropped_G)
        self.counts: list[Counts] = []

    def update(
        self, distance_QG: NDArray | Tensor, query_pid: ArrayLike, query_cam: ArrayLike
    ) -> None:
        """Add queries: finite distances to the whole gallery, and the queries' labels.

        Raises:
            InputError: a NaN or infinite distance, a shape that does not fit, or, under
                `closed_pair`, an identity without exactly one gallery row.
        """
        pid_Q, cam_Q = _labels(query_pid, "query_pid"), _labels(query_cam, "query_cam")
        if len(cam_Q) != len(pid_Q):
            raise InputError("query_cam", f"needs {len(pid_Q)} entries", len(cam_Q))
        if tuple(distance_QG.shape) != (len(pid_Q), self.index.size):
            what = f"must be {(len(pid_Q), self.index.size)}, queries by gallery rows"
            raise InputError("distance", what, tuple(distance_QG.shape))
        if self.protocol.single_match:
            self._check_single(pid_Q)
        same_camera = self.protocol.drop_same_camera
        self.counts.append(count_before(distance_QG, pid_Q, cam_Q, self.index, same_camera))

    def _check_single(self, pid_Q: Labels) -> None:
        ends = (np.searchsorted(self.index.pid, pid_Q, side=side) for side in ("right", "left"))
        rows_Q = np.subtract(*ends)
        wrong = np.flatnonzero(rows_Q != 1)
        if wrong.size:
            what = f"{self.protocol.name} needs one gallery row per query identity; found"
            raise InputError(f"query_pid {pid_Q[wrong[0]]}", what, int(rows_Q[wrong[0]]))

    def compute(self, ranks: Sequence[int] = RANKS) -> dict[str, float]:
        """Scores of all queries so far; the keys are those of `rank_metrics`."""
        counts, tied = self._joined()
        positives_V = counts.positives[counts.positives > 0]
        orders = {
            "stable": counts.before,
            "optimistic": counts.closer,
            "pessimistic": counts.not_farther,
        }
        average = self.protocol.average_precision
        scores = {
            name: _scores(before_F, positives_V, average, ranks)
            for name, before_F in orders.items()
        }
        reported = scores["pessimistic" if tied > TIE_LIMIT else "stable"]
        bounds = {f"{k}_{name}": v for name, part in scores.items() for k, v in part.items()}
        tie = {"tie_fraction": tied, "pessimistic_reported": float(tied > TIE_LIMIT)}
        return reported | self._sizes(counts) | tie | bounds

    def curve(self, length: int = 50) -> list[float]:
        """CMC at ranks 1..`length`, in the order that `compute` reports."""
        counts, tied = self._joined()
        before_F = counts.not_farther if tied > TIE_LIMIT else counts.before
        positives_V = counts.positives[counts.positives > 0]
        first_V = before_F[np.cumsum(positives_V) - positives_V] + 1
        return [float((first_V <= rank).mean()) for rank in range(1, length + 1)]

    def _joined(self) -> tuple[Counts, float]:
        """Counts of all queries, and the share of positives tied with a negative."""
        if not any(part.positives.any() for part in self.counts):
            what = "no query has a positive in the gallery under"
            raise InputError("query_pid", what, self.protocol.name)
        counts = Counts(*(np.concatenate(part) for part in zip(*self.counts, strict=True)))
        return counts, float((counts.not_farther > counts.closer).mean())

    def _sizes(self, counts: Counts) -> dict[str, float]:
        kept = self.index.size - int(self.dropped_G.sum())
        valid = int((counts.positives > 0).sum())
        return {
            "queries": len(counts.positives),
            "valid": valid,
            "skipped": len(counts.positives) - valid,
            "gallery": kept + (self.junk if self.protocol.counts_junk else 0),
            "junk": self.junk,
        }


def rank_metrics(
    distance_QG: NDArray | Tensor,
    query_pid: ArrayLike,
    query_cam: ArrayLike,
    gallery_pid: ArrayLike,
    gallery_cam: ArrayLike,
    protocol: str | Protocol,
    ranks: Sequence[int] = RANKS,
    query_index: Labels | None = None,
) -> dict[str, float]:
    """Score one distance matrix.

    Args:
        distance_QG: finite; a tensor on a GPU is scored there.
        query_pid: (Q,) integers.
        query_cam: (Q,) integers.
        gallery_pid: (G,) integers.
        gallery_cam: (G,) integers.
        protocol: a name from `PROTOCOLS` or a `Protocol`.
        ranks: the k of CMC@k, 1 or more.
        query_index: gallery rows that are queries.

    Returns:
        `cmc@k`, `mAP` and `mINP` (the last two not under `closed_pair`), each also with the
        suffixes `_stable`, `_optimistic`, `_pessimistic`; `queries`, `valid`, `skipped`;
        `gallery`, the size of the gallery as the protocol counts it, and `junk`, the pid -1 rows;
        `tie_fraction`, the share of positives as far away as some negative;
        `pessimistic_reported`, 1.0 when that share exceeds 1 %.

    Raises:
        InputError: see `RankEvaluator.update`; also when no query has a positive.
    """
    evaluator = RankEvaluator(gallery_pid, gallery_cam, protocol, query_index)
    evaluator.update(distance_QG, query_pid, query_cam)
    return evaluator.compute(ranks)


def dropped_rows(
    pid_G: Labels, protocol: Protocol, query_index: Labels | None
) -> NDArray[np.bool_]:
    """Gallery rows the protocol ranks no query against."""
    dropped_G = (pid_G == JUNK_PID) & protocol.drop_junk
    if protocol.drop_queries and query_index is not None:
        dropped_G[query_index] = True
    return dropped_G


def _labels(value: ArrayLike, name: str) -> Labels:
    label = np.asarray(value)
    if label.dtype.kind not in "iu" or label.ndim != 1:
        raise InputError(name, "must be one-dimensional integers", f"{label.dtype} {label.shape}")
    return label.astype(np.int64)  # MARS ships uint16: differences there would wrap round


def _scores(
    before_F: Labels, positives_V: Labels, average: str, ranks: Sequence[int]
) -> dict[str, float]:
    """Means over the V valid queries, from the negatives before each of their positives."""
    start_V = np.cumsum(positives_V) - positives_V
    order_F = np.arange(len(before_F)) - np.repeat(start_V, positives_V) + 1
    rank_F = before_F + order_F
    first_V = rank_F[start_V]
    scores = {f"cmc@{rank}": float((first_V <= rank).mean()) for rank in ranks}
    if average == "none":
        return scores
    precision_F = order_F / rank_F
    if average == "trapezoid":
        # the first row of the ranking has no row before it: its precision counts as 1
        previous_F = np.where(rank_F == 1, 1.0, (order_F - 1) / np.maximum(rank_F - 1, 1))
        precision_F = (previous_F + precision_F) / 2
    average_V = np.add.reduceat(precision_F, start_V) / positives_V
    inverse_V = positives_V / rank_F[start_V + positives_V - 1]
    return scores | {"mAP": float(average_V.mean()), "mINP": float(inverse_V.mean())}


class Learner(TypingProtocol):
    """A metric to be learned: `XQDA`, `KISSME`."""

    def fit(self, feature_ND: ArrayLike, pid_N: Labels, cam_N: Labels) -> QuadraticMetric:
        """Learn from training features and their labels."""


FIXED_METRICS = {"cosine": cosine_points, "euclid": euclid_points}
LEARNED_METRICS: dict[str, Learner] = {"xqda": XQDA(), "kissme": KISSME()}


def evaluate_features(
    features: Features,
    protocol: str | Protocol,
    chunk: int = 256,
    metric: str | Learner = "cosine",
    rerank: bool | KReciprocal = False,
    ranks: Sequence[int] = RANKS,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """Rank the gallery of a feature file for every query, `chunk` queries at a time.

    The gallery is taken as it is; the protocol decides what is removed. `query_index` tells which
    gallery rows are the queries. It is required when the gallery holds exact copies of queries
    and either the protocol excludes queries (`mars_9330`) or `rerank` is on: re-ranking runs on
    every tracklet once, so queries that are gallery rows are read from the gallery; without
    `query_index` they are put before it.

    Args:
        features: from `feature_file.load`.
        protocol: a name from `PROTOCOLS` or a `Protocol`.
        chunk: queries whose distances are in memory at a time.
        metric: cosine, euclid, xqda, kissme or a `Learner`; the last three need `train_*`.
        rerank: True, or a `KReciprocal` with other settings than the paper's.
        ranks: the k of CMC@k.
        device: where distances are computed and ranked.

    Returns:
        The keys of `rank_metrics`, `protocol`, `metric`, `rerank` (bool), `queries_in_gallery`
        (queries given by `query_index`, or found as exact copies where they matter) and
        `cmc_curve` (ranks 1 to 50).

    Raises:
        InputError: an unknown name, missing training features, a missing `query_index`.
    """
    protocol = get_protocol(protocol)
    copies = _queries_in_gallery(features, protocol, bool(rerank))
    to_points = _mapping(features, metric)
    with full_precision():
        gallery = to_points(torch.from_numpy(features.gallery_feat).to(device))
        query = to_points(torch.from_numpy(features.query_feat).to(device))
    evaluator = RankEvaluator(
        features.gallery_pid, features.gallery_cam, protocol, features.query_index
    )
    if rerank:
        settings = rerank if isinstance(rerank, KReciprocal) else KReciprocal()
        blocks = _reranked_blocks(query, gallery, features.query_index, settings)
    else:
        blocks = _distance_blocks(query, gallery, chunk)
    for part, block_BG in blocks:
        evaluator.update(block_BG, features.query_pid[part], features.query_cam[part])
    names = {
        "protocol": protocol.name,
        "metric": metric if isinstance(metric, str) else type(metric).__name__.lower(),
        "rerank": bool(rerank),
        "queries_in_gallery": copies,
    }
    return names | evaluator.compute(ranks) | {"cmc_curve": evaluator.curve()}


def _mapping(features: Features, metric: str | Learner) -> Callable[[Tensor], Points]:
    if isinstance(metric, str):
        if metric in FIXED_METRICS:
            return FIXED_METRICS[metric]
        if metric not in LEARNED_METRICS:
            names = ", ".join([*FIXED_METRICS, *LEARNED_METRICS])
            raise InputError("metric", f"is none of {names}", metric)
        metric = LEARNED_METRICS[metric]
    train = features.train_feat, features.train_pid, features.train_cam
    if train[0] is None or train[1] is None or train[2] is None:
        raise InputError("train_feat", "a learned metric needs train_feat, train_pid, train_cam")
    return metric.fit(train[0], train[1], train[2]).points


def _distance_blocks(
    query: Points, gallery: Points, chunk: int
) -> Iterator[tuple[slice, NDArray | Tensor]]:
    buffer = block_buffer(gallery, min(chunk, len(query.norm)))
    for start in range(0, len(query.norm), chunk):
        part = slice(start, min(start + chunk, len(query.norm)))
        with full_precision():
            block_BG = ranking_block(query.rows(part), gallery, buffer[: part.stop - start])
        yield part, block_BG


def _reranked_blocks(
    query: Points, gallery: Points, query_index: Labels | None, settings: KReciprocal
) -> Iterator[tuple[slice, NDArray | Tensor]]:
    count = len(query.norm)
    if query_index is not None:
        return settings.blocks(gallery, query_index, np.arange(len(gallery.norm)))
    union = Points(
        torch.cat([query.value, gallery.value]),
        gallery.sign,
        torch.cat([query.norm, gallery.norm]),
    )
    rows = np.arange(len(union.norm))
    return settings.blocks(union, rows[:count], rows[count:])


def _queries_in_gallery(features: Features, protocol: Protocol, rerank: bool) -> int:
    """How many queries are gallery rows; complains where that is needed and not said."""
    if features.query_index is not None:
        return len(features.query_index)
    if not (rerank or protocol.drop_queries or protocol.expects_queries):
        return 0
    copies = count_copies(features)
    if copies and (rerank or protocol.drop_queries):
        reason = "re-ranking takes every row once" if rerank else "they are no part of the gallery"
        what = (
            f"missing; it names the gallery rows that are queries: under {protocol.name} {reason}"
        )
        raise InputError("query_index", f"{what}, and so many are copies", copies)
    if protocol.expects_queries and not copies:
        LOG.warning("%s is defined with the queries in the gallery; none found", protocol.name)
    return copies


def count_copies(features: Features) -> int:
    """Queries with exactly one bit-equal gallery row, of the same identity and camera.

    Rows that occur several times in the gallery do not count: a collapsed model makes all rows
    equal, which is no sign that the queries are among them.
    """
    gallery = features.gallery_feat, features.gallery_pid, features.gallery_cam
    key_G = [hash(row.tobytes()) for row in gallery[0]]
    times = Counter(key_G)
    labelled = set(zip(key_G, gallery[1].tolist(), gallery[2].tolist(), strict=True))
    key_Q = [hash(row.tobytes()) for row in features.query_feat]
    wanted = zip(key_Q, features.query_pid.tolist(), features.query_cam.tolist(), strict=True)
    return sum(times[entry[0]] == 1 and entry in labelled for entry in wanted)
