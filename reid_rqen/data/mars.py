"""MARS: bbox_{train,test}/{pid4}/0001C1T0001F001.jpg with the info files of MARS-evaluation.

`info/` of liangzheng06/MARS-evaluation: `tracks_train_info.mat` and `tracks_test_info.mat` hold a
row [start, end, pid, camera] per tracklet, start and end being 1-based inclusive lines of
`train_name.txt` and `test_name.txt`; `query_IDX.mat` holds 1-based rows of the test table. pid -1
(folder `00-1`) is junk, pid 0 a distractor that counts as a wrong match.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.log import InputError
from reid_rqen.data.splits import load_mat
from reid_rqen.data.tracklet import ReidData, Tracklet, check_disjoint, checked, relabel, subfolders

PROTOCOLS = ("mars_official", "mars_11310", "mars_9330")
JUNK, DISTRACTOR = -1, 0
START, END, PID, CAMERA = range(4)


class MarsInfo(NamedTuple):
    """Track tables as int64 [start, end, pid, camera], 0-based half-open lines; query rows 0-based.

    `train` (8298, 4), `test` (12180, 4), `query` (1980,) in the published files.
    """

    train: np.ndarray
    test: np.ndarray
    query: np.ndarray


class Selection(NamedTuple):
    """Rows of the test table that are query and gallery, and the gallery rows that are queries."""

    query: np.ndarray
    gallery: np.ndarray
    query_index: np.ndarray | None


def read_info(info: Path) -> MarsInfo:
    """Read the three .mat files; `InputError` when one is missing or contradicts itself.

    The query index is uint16 and the tables are int32 on disk: everything is widened before any
    arithmetic.
    """
    train, test = (
        load_mat(info / f"tracks_{part}_info.mat", f"track_{part}_info").astype(np.int64)
        for part in ("train", "test")
    )
    query = load_mat(info / "query_IDX.mat", "query_IDX").astype(np.int64).ravel() - 1
    for name, table in (("tracks_train_info.mat", train), ("tracks_test_info.mat", test)):
        if table.ndim != 2 or table.shape[1] != 4 or not len(table):
            raise InputError(info / name, "must be (N, 4)", table.shape)
        table[:, START] -= 1
        _check_tiling(info / name, table)
    outside = query[(query < 0) | (query >= len(test))]
    if outside.size:
        raise InputError(info / "query_IDX.mat", f"index not in 1..{len(test)}", outside[0] + 1)
    if len(np.unique(query)) != len(query):
        raise InputError(info / "query_IDX.mat", "a tracklet is a query twice", len(query))
    return MarsInfo(train, test, query)


def select(info: MarsInfo, protocol: str) -> Selection:
    """Rows of the test table by protocol.

    - mars_official: every test tracklet is in the gallery, the queries and the junk included.
    - mars_11310: the same without junk.
    - mars_9330: neither queries nor junk; 140 queries lose all their positives.
    """
    if protocol not in PROTOCOLS:
        raise InputError("protocol", f"accepted: {', '.join(PROTOCOLS)}", protocol)
    keep = np.ones(len(info.test), dtype=bool)
    if protocol != "mars_official":
        keep &= info.test[:, PID] != JUNK
    if protocol == "mars_9330":
        keep[info.query] = False
        return Selection(info.query, np.flatnonzero(keep), None)
    if not keep[info.query].all():
        raise InputError("query_IDX.mat", "a query is junk", info.query[~keep[info.query]][0] + 1)
    return Selection(info.query, np.flatnonzero(keep), (np.cumsum(keep) - 1)[info.query])


def read_names(path: Path) -> list[str]:
    """File names of a list, one a line; the published lists end their lines with CR LF."""
    if not path.is_file():
        what = "name list is missing; python -m reid_rqen.tools.prepare_mars root=... rebuilds it"
        raise InputError(path, what)
    return path.read_text().split()


def build_tracklets(
    folder: Path, names: list[str], table: np.ndarray, source: object
) -> list[Tracklet]:
    """Tracklets of one part, in the order of its table; no image file is touched.

    Args:
        folder: `bbox_train` or `bbox_test`.
        names: all lines of the part's name list.
        table: (N, 4) of `read_info`.
        source: what to name in an error, the name list's path.

    Raises:
        InputError: the table does not cover the list, or a tracklet mixes persons or cameras.
    """
    if table[-1, END] != len(names):
        raise InputError(source, f"the track table covers {table[-1, END]} lines", len(names))
    tracklets = []
    for row, (start, end, pid, camera) in enumerate(table.tolist()):
        digits = "00-1" if pid == JUNK else f"{pid:04d}"
        frames, prefix = names[start:end], f"{digits}C{camera}T"
        strange = next((name for name in frames if not name.startswith(prefix)), None)
        if strange is not None:
            what = f"tracklet {row + 1} is of person {pid}, camera {camera}, but holds the frame"
            raise InputError(source, what, strange)
        home = folder / digits
        tracklets.append(Tracklet(tuple(home / name for name in frames), pid, camera))
    return tracklets


def load_mars(root: Path | str, protocol: str = "mars_official") -> ReidData:
    """List MARS; `protocol` decides the gallery (see `select`). Cameras are 1..6.

    Only folder names are checked: the tree has more than a million files, and one that is missing
    is named when it is loaded.

    Args:
        root: folder with `bbox_train`, `bbox_test` and `info`.
        protocol: mars_official (12,180 gallery tracklets), mars_11310 or mars_9330.

    Raises:
        InputError: anything missing or contradictory, by name.
    """
    root = Path(root)
    info = read_info(root / "info")
    selection = select(info, protocol)
    parts = {}
    for part, table in (("train", info.train), ("test", info.test)):
        source = root / "info" / f"{part}_name.txt"
        folder = root / f"bbox_{part}"
        parts[part] = build_tracklets(folder, read_names(source), table, source)
        _check_folders(folder, parts[part])
    people = [t.pid for t in parts["test"] if t.pid not in (JUNK, DISTRACTOR)]
    check_disjoint(root, (t.pid for t in parts["train"]), people)
    return checked(
        ReidData(
            "mars",
            relabel(parts["train"]),
            [parts["test"][row] for row in selection.query],
            [parts["test"][row] for row in selection.gallery],
            protocol,
            selection.query_index,
        ),
        root,
    )


def _check_tiling(path: Path, table: np.ndarray) -> None:
    """Tracklets must follow each other in the name list without gap or overlap."""
    ends = np.concatenate([[0], table[:-1, END]])
    bad = np.flatnonzero((table[:, START] != ends) | (table[:, END] <= table[:, START]))
    if bad.size:
        start, end = table[bad[0], :2]
        raise InputError(
            path, f"row {bad[0] + 1} leaves a gap, overlaps or is empty", f"{start + 1}..{end}"
        )


def _check_folders(folder: Path, tracklets: list[Tracklet]) -> None:
    present = set(subfolders(folder))
    for tracklet in tracklets:
        home = tracklet.frames[0].parent
        if home.name not in present:
            raise InputError(home, "person folder is missing")
