"""Set embeddings and their labels in one .npz file: what `evaluate features=FILE` reads.

Shapes: Q queries, G gallery rows, N training rows, D feature dimensions.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.log import InputError

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]


class Features(NamedTuple):
    """Embeddings with person and camera labels.

    Attributes:
        query_feat: (Q, D) float32; query_pid, query_cam: (Q,) int64.
        gallery_feat: (G, D) float32; gallery_pid, gallery_cam: (G,) int64. pid -1 is junk.
        query_index: (Q,) gallery rows that are the queries, where the gallery holds them.
        train_feat: (N, D) float32; train_pid, train_cam: (N,) int64; only the learned metrics
            (XQDA, KISSME) need them.
    """

    query_feat: Floats
    query_pid: Labels
    query_cam: Labels
    gallery_feat: Floats
    gallery_pid: Labels
    gallery_cam: Labels
    query_index: Labels | None = None
    train_feat: Floats | None = None
    train_pid: Labels | None = None
    train_cam: Labels | None = None

    def save(self, path: Path) -> None:
        """Write every present array; a reader never sees half a file."""
        arrays = {name: value for name, value in self._asdict().items() if value is not None}
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as stream:
            np.savez(stream, **arrays)
        os.replace(temporary, path)


REQUIRED = Features._fields[:6]
OPTIONAL = Features._fields[6:]


def save(features: Features, path: Path) -> None:
    """Write `features` to `path` (.npz)."""
    features.save(path)


def load(path: Path) -> Features:
    """Read and check a feature file.

    Raises:
        InputError: names the file and the key: no such file, not an .npz, missing key, wrong
            rank or length, feature dtype that is no float, label dtype that is no integer, a NaN
            or infinite feature (with its row), `query_index` outside the gallery or pointing at
            other identities.
    """
    return from_arrays(_read(Path(path)), str(path))


def from_arrays(arrays: Mapping[str, NDArray], where: str = "features") -> Features:
    """Check arrays in memory the way `load` does; `where` is what errors name."""
    missing = [name for name in REQUIRED if name not in arrays]
    if missing:
        raise InputError(where, f"misses the key {missing[0]}; it holds", sorted(arrays))
    checked: dict[str, NDArray] = {}
    for part in ("query", "gallery", "train"):
        if part == "train" and not any(f"train_{kind}" in arrays for kind in ("feat", "pid")):
            continue
        checked |= _check_part(arrays, part, where)
    dimensions = {name: value.shape[1] for name, value in checked.items() if value.ndim == 2}
    if len(set(dimensions.values())) > 1:
        raise InputError(where, "the feature dimensions differ", dimensions)
    if "query_index" in arrays:
        checked["query_index"] = _check_index(arrays["query_index"], checked, where)
    return Features(*(checked.get(name) for name in Features._fields))  # type: ignore[arg-type]


def _read(path: Path) -> dict[str, NDArray]:
    """Every array of an .npz file that is one of ours; pickled content is refused."""
    if not path.is_file():
        raise InputError(path, "no such file")
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array")
        with archive:
            return {name: archive[name] for name in archive.files if name in Features._fields}
    except (ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(path, "cannot be read as an .npz file of plain arrays", error) from error


def _check_part(arrays: Mapping[str, NDArray], part: str, where: str) -> dict[str, NDArray]:
    names = {kind: f"{part}_{kind}" for kind in ("feat", "pid", "cam")}
    for name in names.values():
        if name not in arrays:
            raise InputError(where, f"misses the key {name}; it holds", sorted(arrays))
    feature = _check_feature(np.asarray(arrays[names["feat"]]), names["feat"], where)
    checked: dict[str, NDArray] = {names["feat"]: feature}
    for kind in ("pid", "cam"):
        label = _check_label(np.asarray(arrays[names[kind]]), names[kind], where)
        if len(label) != len(feature):
            what = f"{names[kind]} needs one entry per row of {names['feat']}, {len(feature)}"
            raise InputError(where, what, len(label))
        checked[names[kind]] = label
    return checked


def _check_feature(feature: NDArray, name: str, where: str) -> Floats:
    if feature.dtype.kind != "f":
        raise InputError(where, f"{name} must hold floats, not", feature.dtype)
    if feature.ndim != 2 or 0 in feature.shape:
        raise InputError(where, f"{name} must be (rows, dimensions), none of them 0", feature.shape)
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf and is reported below
        feature = np.ascontiguousarray(feature, dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(feature).all(axis=1))
    if bad.size:
        raise InputError(where, f"{name} is not finite in {bad.size} rows, first row", int(bad[0]))
    return feature


def _check_label(label: NDArray, name: str, where: str) -> Labels:
    if label.dtype.kind not in "iu":
        raise InputError(where, f"{name} must hold integers, not", label.dtype)
    if label.ndim != 1:
        raise InputError(where, f"{name} must be one-dimensional", label.shape)
    return label.astype(np.int64)  # MARS ships uint16: subtraction there would wrap round


def _check_index(index: NDArray, checked: Mapping[str, NDArray], where: str) -> Labels:
    index = _check_label(np.asarray(index), "query_index", where)
    if len(index) != len(checked["query_pid"]):
        what = f"query_index needs one entry per query, {len(checked['query_pid'])}"
        raise InputError(where, what, len(index))
    outside = np.flatnonzero((index < 0) | (index >= len(checked["gallery_pid"])))
    if outside.size:
        what = f"query_index must be 0-based rows of a gallery of {len(checked['gallery_pid'])}"
        raise InputError(where, what, int(index[outside[0]]))
    for kind in ("pid", "cam"):
        wrong = np.flatnonzero(checked[f"gallery_{kind}"][index] != checked[f"query_{kind}"])
        if wrong.size:
            what = f"query_index points at another {kind} than query_{kind}, first query"
            raise InputError(where, what, int(wrong[0]))
    return index
