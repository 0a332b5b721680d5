"""PRID 2011, multi-shot: prid_2011/multi_shot/cam_{a,b}/person_XXXX/NNNN.png."""

from pathlib import Path

from reid_rqen.data.pair_sets import Persons, load_pairs, shared_names
from reid_rqen.data.tracklet import ReidData, find_root, list_frames, numbers

SHARED = 200  # only persons 1..200 are the same in both cameras; larger numbers are reused


def load_prid2011(
    root: Path | str,
    split: int = 0,
    split_file: Path | str | None = None,
    min_frames: int = 27,
) -> ReidData:
    """List the persons with at least `min_frames` frames in both cameras: 178 of 200.

    The reference's script keeps persons whose Matlab listing, "." and ".." included, has at least
    29 entries: 27 frames. Query is camera a, gallery camera b.

    Args:
        root: `multi_shot`, `prid_2011` or the folder above.
        split: 0..9.
        split_file: `train_test_splits_prid.mat` (part of the iLIDS-VID archive) or torchreid's
            `splits_prid2011.json`. None takes either from `root`, else splits generated from
            seed 0 (then `skipped["generated_split"]` is 1).
        min_frames: in both cameras.

    Raises:
        InputError: a missing folder, an empty tracklet, or a bad split.
    """
    persons = prid2011_persons(root, min_frames)
    folders = (Path(root), persons.cameras[0].parents[1])
    files = ("train_test_splits_prid.mat", "splits_prid2011.json")
    shipped = [folder / file for folder in folders for file in files]
    return load_pairs("prid2011", persons, split, split_file, shipped)


def prid2011_persons(root: Path | str, min_frames: int = 27) -> Persons:
    """Persons with enough frames in both cameras; arguments and errors as `load_prid2011`."""
    base = find_root(root, ("", "multi_shot", "prid_2011/multi_shot"), "cam_a")
    cameras = (base / "cam_a", base / "cam_b")
    both = [name for name in shared_names(cameras) if 1 <= numbers(name)[0] <= SHARED]
    kept = [
        name
        for name in both
        if all(len(list_frames(camera / name)) >= min_frames for camera in cameras)
    ]
    return Persons(cameras, kept, {"short_persons": len(both) - len(kept)})
