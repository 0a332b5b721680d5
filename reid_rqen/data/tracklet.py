"""Record types every loader returns, and the checks they share."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from common.log import InputError, get_logger

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")


@dataclass(frozen=True)
class Tracklet:
    """Frames of one person seen by one camera without a break.

    `frames` is in temporal order. `view` is the number a camera shares with the cameras of other
    scenes (LPW pools its scenes by view number when it draws training sets); None means `camid`.
    """

    frames: tuple[Path, ...]
    pid: int
    camid: int
    scene: int = 0
    view: int | None = None

    @property
    def group(self) -> int:
        """Number by which the set draws group the cameras."""
        return self.camid if self.view is None else self.view


@dataclass(frozen=True)
class ReidData:
    """A data set that is ready for training and for its test protocol.

    `train` carries contiguous labels 0..K-1 as pid; `query` and `gallery` keep the numbers of the
    data set. `query_index` (Q,) int64 holds the rows of `gallery` that are the queries themselves
    (MARS), else None. `skipped` counts whatever was left out, or is known to be unusable.
    """

    name: str
    train: list[Tracklet]
    query: list[Tracklet]
    gallery: list[Tracklet]
    protocol: str
    query_index: np.ndarray | None = None
    skipped: dict[str, int] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        return len({tracklet.pid for tracklet in self.train})


def numbers(name: str) -> tuple[int, ...]:
    """All integers of a file or folder name, for sorting by value: `2.jpg` before `10.jpg`."""
    return tuple(int(digits) for digits in re.findall(r"\d+", name))


def subfolders(folder: Path) -> list[str]:
    """Names of the visible folders in `folder`, numerically sorted; `InputError` if it is none."""
    if not folder.is_dir():
        raise InputError(folder, "folder is missing")
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if not e.name.startswith(".") and e.is_dir()]
    return sorted(names, key=lambda name: (numbers(name), name))


def list_frames(folder: Path) -> tuple[Path, ...]:
    """Image files of a tracklet folder in numeric order, by name only (no file is opened).

    Raises:
        InputError: the folder is missing or holds no image, or a name carries no number.
    """
    if not folder.is_dir():
        raise InputError(folder, "tracklet folder is missing")
    names = [name for name in os.listdir(folder) if name.lower().endswith(IMAGE_SUFFIXES)]
    names = [name for name in names if not name.startswith(".")]
    if not names:
        raise InputError(folder, "tracklet holds no image")
    keys = {name: numbers(os.path.splitext(name)[0]) for name in names}
    for name, key in keys.items():
        if not key:
            raise InputError(folder / name, "frame name carries no number")
    return tuple(folder / name for name in sorted(names, key=lambda name: (keys[name], name)))


def find_root(root: Path | str, levels: Sequence[str], marker: str) -> Path:
    """The first of `root/level` that holds the folder `marker`; `InputError` when none does."""
    for level in levels:
        if (Path(root) / level / marker).is_dir():
            return Path(root) / level
    where = ", ".join(str(Path(level) / marker) for level in levels)
    raise InputError(root, "data set not found, none of these folders exists", where)


def relabel(tracklets: Iterable[Tracklet], order: Sequence[int] | None = None) -> list[Tracklet]:
    """Map pids to 0..K-1, in the given order or, without one, in ascending order."""
    tracklets = list(tracklets)
    order = sorted({t.pid for t in tracklets}) if order is None else order
    label = {pid: index for index, pid in enumerate(order)}
    return [replace(t, pid=label[t.pid]) for t in tracklets]


def check_disjoint(where: object, train: Iterable[int], test: Iterable[int]) -> None:
    """Raise `InputError` when an identity is in both halves."""
    shared = sorted(set(train) & set(test))
    if shared:
        raise InputError(where, f"{len(shared)} identities are in train and test", shared[:5])


def count_unmatched(query: Sequence[Tracklet], gallery: Sequence[Tracklet]) -> int:
    """Number of queries that no gallery tracklet of another camera shows."""
    cameras = defaultdict(set)
    for tracklet in gallery:
        cameras[tracklet.pid].add(tracklet.camid)
    return sum(not cameras[q.pid] - {q.camid} for q in query)


def checked(data: ReidData, root: Path | str) -> ReidData:
    """Refuse empty parts, count the queries that can never be found, and log the sizes."""
    for part in ("train", "query", "gallery"):
        if not getattr(data, part):
            raise InputError(root, f"{data.name} has no {part} tracklet")
    logger = get_logger(__name__)
    unmatched = count_unmatched(data.query, data.gallery)
    if unmatched:
        data.skipped["query_without_positive"] = unmatched
        logger.warning("%s: %d queries have no positive in another camera", root, unmatched)
    logger.info(
        "%s (%s): %d train tracklets of %d identities, %d queries, %d gallery tracklets, %s",
        data.name, data.protocol, len(data.train), data.num_classes, len(data.query),
        len(data.gallery), f"skipped {data.skipped}" if data.skipped else "nothing skipped",
    )  # fmt: skip
    return data
