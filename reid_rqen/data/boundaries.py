"""Region boundaries of single frames, from any keypoint detector.

Two file formats, both with paths relative to the data set's root:

- `.npz`: `paths` (N,) str and `boundaries` (N, B) float;
- `.json`: {"scen2/view1/17/3.jpg": [0.41, 0.72], ...}.

A row holds the B inner boundaries from top to bottom as fractions of the image height, strictly
increasing inside (0, 1): B = 2 for upper, middle and lower body.
"""

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from common.log import InputError
from reid_rqen.data.tracklet import Tracklet


def load_boundaries(path: Path | str, root: Path | str) -> dict[Path, np.ndarray]:
    """Read a boundary file into {frame path: (B,) float32}.

    Raises:
        InputError: names the file, and the frame whose row is not valid.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(path, "boundary file is missing")
    names, rows_NB = _read_json(path) if path.suffix == ".json" else _read_npz(path)
    if rows_NB.ndim != 2 or len(rows_NB) != len(names) or not rows_NB.size:
        raise InputError(path, f"boundaries of {len(names)} paths are not (N, B)", rows_NB.shape)
    edges = np.pad(rows_NB, ((0, 0), (1, 1)), constant_values=((0, 0), (0, 1)))
    bad = np.flatnonzero(~(np.diff(edges, axis=1) > 0).all(axis=1))
    if bad.size:
        raise InputError(
            path, f"boundaries of {names[bad[0]]} do not increase inside (0, 1)", rows_NB[bad[0]]
        )
    return {Path(root) / name: row for name, row in zip(names, rows_NB, strict=True)}


def check_covered(tracklets: Sequence[Tracklet], boundaries: Mapping[Path, np.ndarray]) -> None:
    """Raise `InputError` with the first frame that has no boundaries."""
    for tracklet in tracklets:
        for frame in tracklet.frames:
            if frame not in boundaries:
                raise InputError(frame, "boundary file has no row for this frame")


def _read_json(path: Path) -> tuple[list[str], np.ndarray]:
    try:
        table = json.loads(path.read_text())
        return list(table), np.array(list(table.values()), dtype=np.float32)
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(path, "not a JSON object of equally long number lists", error) from error


def _read_npz(path: Path) -> tuple[list[str], np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return file["paths"].tolist(), file["boundaries"].astype(np.float32)
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(path, "not an .npz with `paths` and `boundaries`", error) from error
