"""Labels, tracklet lengths and features of the sizes of LPW and MARS, drawn or read."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.log import InputError


class Labels(NamedTuple):
    """Person and camera labels of queries and gallery."""

    query_pid: NDArray[np.int64]
    query_cam: NDArray[np.int64]
    gallery_pid: NDArray[np.int64]
    gallery_cam: NDArray[np.int64]


def lpw_labels(seed: int) -> Labels:
    """756 queries of view 2 against 662 + 410 tracklets of views 1 and 3."""
    rng = np.random.default_rng(seed)
    seen = [np.sort(rng.choice(756, count, replace=False)) for count in (662, 410)]
    query = np.arange(756), np.full(756, 2)
    return Labels(*query, np.concatenate(seen), np.repeat([1, 3], [662, 410]))


def mars_labels(folder: str | None, seed: int) -> Labels:
    """1,980 queries against the 11,310 test tracklets that are no junk.

    Without the real files: 626 identities with 1 to 6 cameras, one query for each identity and
    camera, a skewed number of tracklets each, and 3,248 distractors.
    """
    if folder is not None:
        track, query = _mars(folder, "tracks_test_info"), _mars(folder, "query_IDX").ravel() - 1
        kept = track[track[:, 2] != -1]
        return Labels(track[query, 2], track[query, 3], kept[:, 2], kept[:, 3])
    rng = np.random.default_rng(seed)
    camera = [rng.choice(6, rng.choice([2, 3, 4], p=[0.25, 0.35, 0.4]), False) for _ in range(626)]
    query_pid = np.repeat(np.arange(1, 627), [len(own) for own in camera])
    query_cam = np.concatenate(camera)
    chosen = rng.permutation(len(query_pid))[:1980]
    weight = rng.lognormal(0, 0.9, len(query_pid))
    extra = rng.choice(len(query_pid), 11310 - 3248 - 1980, p=weight / weight.sum())
    rows = np.concatenate([np.resize(chosen, 1980), extra])
    pid = np.concatenate([query_pid[rows], np.zeros(3248, np.int64)])
    cam = np.concatenate([query_cam[rows], rng.integers(6, size=3248)])
    return Labels(pid[:1980], cam[:1980], pid, cam)


def mars_lengths(folder: str | None, seed: int) -> NDArray[np.int64]:
    """Frames of the test tracklets of MARS, in a random order.

    Without the real file: lognormal with median 30 and mean 56, cut to 2..920, as MARS has.
    """
    rng = np.random.default_rng(seed)
    if folder is not None:
        track = _mars(folder, "tracks_test_info")
        return rng.permutation(track[:, 1] - track[:, 0] + 1)
    spread = np.sqrt(2 * np.log(56 / 30))
    return rng.lognormal(np.log(30), spread, 12180).round().clip(2, 920).astype(np.int64)


def clustered(pid_N: NDArray[np.int64], dimensions: int, seed: int) -> NDArray[np.float32]:
    """Unit features around one centre for each identity; identity 0 has none."""
    rng = np.random.default_rng(seed)
    centre = rng.standard_normal((int(pid_N.max()) + 1, dimensions), dtype=np.float32)
    noise = rng.standard_normal((len(pid_N), dimensions), dtype=np.float32)
    feature = centre[pid_N] * (pid_N > 0)[:, None] + 1.5 * noise
    return feature / np.linalg.norm(feature, axis=1, keepdims=True)


def _mars(folder: str, name: str) -> NDArray[np.int64]:
    """The one array of a Matlab file of MARS, as int64: uint16 indices must not wrap round."""
    from scipy.io import loadmat

    path = Path(folder) / f"{name}.mat"
    if not path.is_file():
        raise InputError(path, "no such file")
    arrays = [value for key, value in loadmat(path).items() if not key.startswith("__")]
    return np.asarray(arrays[0]).astype(np.int64)
