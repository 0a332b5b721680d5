"""Scores of videos in one .npz file: what `evaluate predictions=FILE` reads, and ensembles fuse.

Keys: `scores` (N, K) float, `ids` (N,) str, and `kind` ("logit" where it is missing).

Shapes: N videos, K classes.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.log import InputError

KINDS = ("logit", "prob", "rank")
KEYS = ("scores", "ids", "kind")


@dataclass(frozen=True, eq=False)
class ScoreFile:
    """Checked scores of videos.

    Attributes:
        ids: (N,) str, unique: the paths of the list.
        scores: (N, K) float32 or float64, finite.
        kind: "logit"; "prob", in [0, 1]; or "rank", of which only the order means something.
        source: what messages call it.

    Raises:
        InputError: wrong shapes or dtypes, no row, a NaN or infinite score (with its id), a
            probability outside [0, 1], an id twice, an unknown kind.
    """

    ids: NDArray[np.str_]
    scores: NDArray[np.floating]
    kind: str = "logit"
    source: str = "scores"

    def __post_init__(self) -> None:
        ids_N = _check_ids(np.asarray(self.ids), self.source)
        scores_NK = _check_scores(np.asarray(self.scores), ids_N, self.source)
        if self.kind not in KINDS:
            raise InputError(self.source, f"kind must be one of {', '.join(KINDS)}", self.kind)
        if self.kind == "prob":
            _check_range(scores_NK, ids_N, self.source)
        object.__setattr__(self, "ids", ids_N)
        object.__setattr__(self, "scores", scores_NK)

    @classmethod
    def load(cls, path: str | Path) -> ScoreFile:
        """Read and check a file.

        Raises:
            InputError: names the file: no such file, not an .npz of plain arrays (pickled content
                is refused), a missing key, or content that the class refuses.
        """
        arrays = _read(Path(path))
        missing = [name for name in KEYS[:2] if name not in arrays]
        if missing:
            raise InputError(path, f"misses the key {missing[0]}; it holds", sorted(arrays))
        kind = arrays.get("kind", np.array("logit"))
        if kind.shape != () or kind.dtype.kind != "U":
            what = "kind must be a single string; here"
            raise InputError(path, what, f"{kind.dtype} {kind.shape}")
        return cls(arrays["ids"], arrays["scores"], str(kind), str(path))

    def save(self, path: str | Path) -> None:
        """Write the .npz; a reader never sees half a file."""
        path = Path(path)
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as stream:
            np.savez(stream, scores=self.scores, ids=self.ids, kind=np.array(self.kind))
        os.replace(temporary, path)

    def rows(self, ids: Sequence[str]) -> NDArray[np.floating]:
        """Scores (N, K) in the order of `ids`.

        Raises:
            InputError: an id twice, one without scores, or scores of a video that is not asked for.
        """
        row = {name: index for index, name in enumerate(self.ids.tolist())}
        wanted = [str(name) for name in ids]
        twice = _duplicates(wanted)
        if twice:
            raise InputError("ids", "the list holds an id twice", twice[0])
        missing = [name for name in wanted if name not in row]
        if missing:
            what = f"has no scores for {len(missing)} of {len(wanted)} videos of the list, first"
            raise InputError(self.source, what, missing[0])
        unknown = row.keys() - set(wanted)
        if unknown:
            what = f"has scores for {len(unknown)} videos that are not in the list, first"
            raise InputError(self.source, what, min(unknown, key=row.__getitem__))
        return self.scores[[row[name] for name in wanted]]


def load(path: str | Path) -> ScoreFile:
    """`ScoreFile.load`."""
    return ScoreFile.load(path)


def _read(path: Path) -> dict[str, NDArray]:
    """The arrays of an .npz file that are ours."""
    if not path.is_file():
        raise InputError(path, "no such file")
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array")
        with archive:
            return {name: archive[name] for name in archive.files if name in KEYS}
    except _UNREADABLE as error:
        raise InputError(path, "cannot be read as an .npz file of plain arrays", error) from error


_UNREADABLE = (
    ValueError, OSError, EOFError, AttributeError, KeyError, NotImplementedError,
    SyntaxError, MemoryError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def _check_ids(ids_N: NDArray, source: str) -> NDArray[np.str_]:
    if ids_N.ndim != 1 or not len(ids_N) or ids_N.dtype.kind != "U":
        what = "ids must be strings, one a video; here"
        raise InputError(source, what, f"{ids_N.dtype} {ids_N.shape}")
    twice = _duplicates(ids_N.tolist())
    if twice:
        raise InputError(source, f"{len(twice)} ids occur more than once, first", twice[0])
    return ids_N


def _check_scores(scores_NK: NDArray, ids_N: NDArray[np.str_], source: str) -> NDArray[np.floating]:
    if scores_NK.dtype.kind != "f":
        raise InputError(source, "scores must be floats, not", scores_NK.dtype)
    if scores_NK.ndim != 2 or 0 in scores_NK.shape:
        what = "scores must be (videos, classes), none of them 0; here"
        raise InputError(source, what, scores_NK.shape)
    if len(scores_NK) != len(ids_N):
        what = f"needs one row of scores for each of {len(ids_N)} ids; here"
        raise InputError(source, what, len(scores_NK))
    bad = np.flatnonzero(~np.isfinite(scores_NK).all(axis=1))
    if bad.size:
        what = f"scores of {bad.size} videos are NaN or infinite, first"
        raise InputError(source, what, ids_N[bad[0]])
    kind = np.float32 if scores_NK.dtype.itemsize <= 4 else np.float64
    return np.ascontiguousarray(scores_NK, dtype=kind)


def _check_range(scores_NK: NDArray[np.floating], ids_N: NDArray[np.str_], source: str) -> None:
    outside = np.flatnonzero(((scores_NK < 0) | (scores_NK > 1)).any(axis=1))
    if outside.size:
        what = f"probabilities of {outside.size} videos are outside [0, 1], first"
        raise InputError(source, what, ids_N[outside[0]])


def _duplicates(names: Sequence[str]) -> list[str]:
    return [name for name, times in Counter(names).items() if times > 1]
