"""What PRID 2011 and iLIDS-VID share: two cameras, one tracklet per person and camera."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from common.log import InputError
from reid_rqen.data.splits import choose_split
from reid_rqen.data.tracklet import (
    ReidData,
    Tracklet,
    check_disjoint,
    checked,
    list_frames,
    numbers,
    relabel,
    subfolders,
)


class Persons(NamedTuple):
    """Folders of the two cameras, and the names of the persons to use, numerically sorted."""

    cameras: tuple[Path, Path]
    names: list[str]
    skipped: dict[str, int]


def shared_names(cameras: Sequence[Path]) -> list[str]:
    """Folder names that both cameras have, in numeric order; `InputError` on one without number."""
    names = [set(subfolders(camera)) for camera in cameras]
    for camera, found in zip(cameras, names, strict=True):
        for name in found:
            if len(numbers(name)) != 1:
                raise InputError(camera / name, "folder name does not carry one number", name)
    return sorted(set.intersection(*names), key=numbers)


def load_pairs(
    name: str,
    persons: Persons,
    split: int,
    split_file: Path | str | None,
    shipped: Sequence[Path],
) -> ReidData:
    """Query = first camera, gallery = second camera, of the persons of the test half.

    Raises:
        InputError: fewer than two persons, an empty tracklet, or a bad split.
    """
    cameras, names, skipped = persons
    root = cameras[0].parent
    if len(names) < 2:
        raise InputError(root, "too few persons are usable in both cameras", len(names))
    chosen, generated = choose_split(names, split, split_file, shipped)
    train = [t for camid in (0, 1) for t in _camera(cameras[camid], chosen.train, camid)]
    query, gallery = (_camera(cameras[camid], chosen.test, camid) for camid in (0, 1))
    check_disjoint(root, (t.pid for t in train), (t.pid for t in query))
    skipped = {key: count for key, count in (skipped | generated).items() if count}
    data = ReidData(name, relabel(train), query, gallery, "closed_pair", skipped=skipped)
    return checked(data, root)


def _camera(camera: Path, names: Sequence[str], camid: int) -> list[Tracklet]:
    return [
        Tracklet(list_frames(camera / name), numbers(name)[0], camid)
        for name in sorted(names, key=numbers)
    ]
