"""LPW, "Labeled Pedestrian in the Wild" (arXiv 1711.08766): scen{S}/view{V}/{pid}/{n}.jpg."""

from collections.abc import Sequence
from pathlib import Path

from common.log import InputError
from reid_rqen.data.tracklet import (
    ReidData,
    Tracklet,
    checked,
    find_root,
    list_frames,
    relabel,
    subfolders,
)

LEVELS = ("", "pep_256x128", "data_slim", "pep_256x128/data_slim")


def load_lpw(
    root: Path | str,
    train_scenes: Sequence[int] = (2, 3),
    query: tuple[int, int] = (1, 2),
    gallery_views: Sequence[int] = (1, 3),
) -> ReidData:
    """List LPW with its published split: train on two scenes, test on the third.

    A number means the same person in all views of one scene and says nothing across scenes, so
    the training labels count the identities of the first training scene in numeric order, then
    those of the next. Cameras are numbered over all (scene, view) of the tree.

    Args:
        root: the folder of `scen1`, or one of the folders above it in the published archive.
        train_scenes: scenes whose every view is trained on.
        query: (scene, view) of the query tracklets.
        gallery_views: views of the query's scene that form the gallery.

    Raises:
        InputError: a missing scene or view, a folder that is no number, an empty tracklet, or a
            scene used for both training and test.
    """
    test_scene, query_view = (int(number) for number in query)
    if test_scene in train_scenes:
        raise InputError("query", "its scene is also trained on", f"scene {test_scene}")
    if query_view in gallery_views:
        raise InputError("gallery_views", "contains the query's view", query_view)
    base = find_root(root, LEVELS, f"scen{test_scene}")
    cameras = _cameras(base)
    train, offset = [], 0
    for scene in train_scenes:
        views = [view for s, view in cameras if s == scene]
        found = relabel(t for view in views for t in _view(base, scene, view, cameras))
        train += [Tracklet(t.frames, t.pid + offset, t.camid, scene, t.view) for t in found]
        offset += len({t.pid for t in found})
        if not found:
            raise InputError(base / f"scen{scene}", "training scene is missing or empty")
    gallery = [t for view in gallery_views for t in _view(base, test_scene, view, cameras)]
    probe = _view(base, test_scene, query_view, cameras)
    return checked(ReidData("lpw", train, probe, gallery, "lpw"), base)


def _cameras(base: Path) -> dict[tuple[int, int], int]:
    """Camera number of every (scene, view) in the tree, in numeric order."""
    found = []
    for scene in (name for name in subfolders(base) if name.startswith("scen")):
        for view in subfolders(base / scene):
            found.append((_number(base / scene, "scen"), _number(base / scene / view, "view")))
    return {key: camid for camid, key in enumerate(sorted(found))}


def _number(folder: Path, prefix: str) -> int:
    digits = folder.name.removeprefix(prefix)
    if not folder.name.startswith(prefix) or not (digits.isascii() and digits.isdigit()):
        raise InputError(folder, f"folder name is not {prefix or 'a number'}<n>", folder.name)
    return int(digits)


def _view(base: Path, scene: int, view: int, cameras: dict[tuple[int, int], int]) -> list[Tracklet]:
    folder = base / f"scen{scene}" / f"view{view}"
    found = []
    for name in subfolders(folder):
        pid = _number(folder / name, "")
        found.append(Tracklet(list_frames(folder / name), pid, cameras[scene, view], scene, view))
    return found
