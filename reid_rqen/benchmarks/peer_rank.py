"""What others do to score a distance matrix, restated to be timed and compared against.

* `ranked_python`: the rule of torchreid's pure Python evaluator (KaiyangZhou/deep-person-reid,
  torchreid/metrics/rank.py): argsort of the whole matrix, then a Python list per query.
* `ranked_cython`: the same rule as its Cython evaluator runs it, compiled on first use.
* `ranked_sklearn`: `average_precision_score` of scikit-learn per query.
* `ranked_loop`: two plain loops over queries and gallery rows on top of one argsort per query.

Each returns (CMC at ranks 1..max_rank, mAP) with rows of the query's identity and camera removed.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]
Scored = tuple[NDArray, float]
Peer = Callable[[NDArray, Labels, Labels, Labels, Labels, int], Scored]


class UnavailableError(RuntimeError):
    """A peer cannot run on this machine; the text says why."""


def ranked_python(
    distance_QG: NDArray,
    query_pid: Labels,
    query_cam: Labels,
    gallery_pid: Labels,
    gallery_cam: Labels,
    max_rank: int,
) -> Scored:
    """Sort everything first, then one Python list of precisions per query."""
    order_QG = np.argsort(distance_QG, axis=1)
    match_QG = (gallery_pid[order_QG] == query_pid[:, None]).astype(np.int32)
    curves, averages = [], []
    for query, order_G in enumerate(order_QG):
        same_person = gallery_pid[order_G] == query_pid[query]
        hit_K = match_QG[query][~(same_person & (gallery_cam[order_G] == query_cam[query]))]
        if not hit_K.any():
            continue
        found_K = hit_K.cumsum()
        curves.append(np.minimum(found_K, 1)[:max_rank])
        precision = np.asarray([count / (place + 1.0) for place, count in enumerate(found_K)])
        averages.append((precision * hit_K).sum() / hit_K.sum())
    return np.mean(np.asarray(curves, dtype=np.float32), axis=0), float(np.mean(averages))


def ranked_loop(
    distance_QG: NDArray,
    query_pid: Labels,
    query_cam: Labels,
    gallery_pid: Labels,
    gallery_cam: Labels,
    max_rank: int,
) -> Scored:
    """One argsort per query, then one Python step per gallery row."""
    curve = np.zeros(max_rank)
    averages = []
    for query, row_G in enumerate(distance_QG):
        place = 0
        precisions: list[float] = []
        for column in np.argsort(row_G):
            same_person = gallery_pid[column] == query_pid[query]
            if same_person and gallery_cam[column] == query_cam[query]:
                continue
            place += 1
            if same_person:
                if not precisions:
                    curve[place - 1 :] += 1
                precisions.append((len(precisions) + 1) / place)
        if precisions:
            averages.append(sum(precisions) / len(precisions))
    return curve / len(averages), float(np.mean(averages))


def ranked_sklearn(
    distance_QG: NDArray,
    query_pid: Labels,
    query_cam: Labels,
    gallery_pid: Labels,
    gallery_cam: Labels,
    max_rank: int,
) -> Scored:
    """Average precision by scikit-learn; the curve is that of the first positive."""
    from sklearn.metrics import average_precision_score

    curve = np.zeros(max_rank)
    averages = []
    for query, row_G in enumerate(distance_QG):
        same_person = gallery_pid == query_pid[query]
        kept = ~(same_person & (gallery_cam == query_cam[query]))
        hit_K = same_person[kept]
        if not hit_K.any():
            continue
        averages.append(average_precision_score(hit_K, -row_G[kept]))
        first = int((row_G[kept] < row_G[kept][hit_K].min()).sum())
        curve[first:] += 1
    return curve / len(averages), float(np.mean(averages))


def ranked_cython() -> Peer:
    """Compile peer_rank_cython.pyx into a temporary folder and return its function.

    Raises:
        UnavailableError: no Cython, no C compiler or no Python headers, or the build failed.
    """
    ranked: Peer = _compiled().ranked
    return ranked


def _compiled() -> ModuleType:
    if importlib.util.find_spec("Cython") is None:
        raise UnavailableError("Cython is not installed")
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise UnavailableError("no C compiler")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "peer_rank_cython.pyx"
        shutil.copy(Path(__file__).with_name(source.name), source)
        library = source.with_suffix(str(sysconfig.get_config_var("EXT_SUFFIX")))
        headers = [f"-I{sysconfig.get_path('include')}", f"-I{np.get_include()}"]
        _call([sys.executable, "-m", "cython", "-3", str(source)])
        flags = ["-O2", "-shared", "-fPIC", "-w"]  # -O2 is what a setuptools build uses
        _call([compiler, *flags, *headers, str(source.with_suffix(".c")), "-o", str(library)])
        spec = importlib.util.spec_from_file_location("peer_rank_cython", library)
        if spec is None or spec.loader is None:
            raise UnavailableError("the compiled evaluator cannot be imported")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UnavailableError(f"{Path(command[0]).name} failed: {last}")
