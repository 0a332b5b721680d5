"""DukeMTMC-VideoReID: {train,query,gallery}/{pid}/{tracklet}/{pid}_C{cam}_F{frame}_X{n}.jpg.

The data set was withdrawn by its authors; the loader serves those who hold a copy and other data
in its layout.
"""

import re
from pathlib import Path

from common.log import InputError
from reid_rqen.data.tracklet import (
    ReidData,
    Tracklet,
    check_disjoint,
    checked,
    find_root,
    list_frames,
    relabel,
    subfolders,
)

NAME = re.compile(r"(\d+)_C(\d+)_F(\d+)_X(\d+)")


def load_duke_video(root: Path | str) -> ReidData:
    """List the data set with its own query and gallery.

    Scored as torchreid does, by the protocol `mars_9330`: the gallery holds no query, tracklets
    of the query's person in the query's camera are ignored, plain average precision.

    Args:
        root: the folder of `train`, or the one above.

    Raises:
        InputError: a missing or empty folder, a frame name of another form, a tracklet that mixes
            persons or cameras, or a person in train and test.
    """
    base = find_root(root, ("", "DukeMTMC-VideoReID"), "query")
    train, query, gallery = (_part(base / part) for part in ("train", "query", "gallery"))
    check_disjoint(base, (t.pid for t in train), (t.pid for t in query + gallery))
    return checked(ReidData("duke_video", relabel(train), query, gallery, "mars_9330"), base)


def _part(folder: Path) -> list[Tracklet]:
    homes = [folder / pid / name for pid in subfolders(folder) for name in subfolders(folder / pid)]
    return [_tracklet(home) for home in homes]


def _tracklet(home: Path) -> Tracklet:
    if not home.parent.name.isdecimal():
        raise InputError(home.parent, "person folder is not a number", home.parent.name)
    pid, frames = int(home.parent.name), list_frames(home)
    cameras = [_camera(frame, pid) for frame in frames]
    for frame, camera in zip(frames, cameras, strict=True):
        if camera != cameras[0]:
            raise InputError(frame, f"tracklet of camera {cameras[0]} holds camera", camera)
    return Tracklet(frames, pid, cameras[0])


def _camera(frame: Path, pid: int) -> int:
    match = NAME.match(frame.name)
    if match is None:
        raise InputError(frame, "frame name is not {pid}_C{cam}_F{frame}_X{n}", frame.name)
    if int(match[1]) != pid:
        raise InputError(frame, f"tracklet of person {pid} holds person", int(match[1]))
    return int(match[2])
