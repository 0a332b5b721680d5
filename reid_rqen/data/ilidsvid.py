"""iLIDS-VID: i-LIDS-VID/sequences/cam{1,2}/personNNN/cam1_personNNN_FFFFF.png."""

from pathlib import Path

from reid_rqen.data.pair_sets import Persons, load_pairs, shared_names
from reid_rqen.data.tracklet import ReidData, find_root, subfolders

SPLITS = "train-test people splits/train_test_splits_ilidsvid.mat"


def load_ilidsvid(
    root: Path | str, split: int = 0, split_file: Path | str | None = None
) -> ReidData:
    """List the 300 persons that both cameras saw; query is camera 1, gallery camera 2.

    Args:
        root: `sequences`, `i-LIDS-VID`, or the folder above, where the archive was unpacked.
        split: 0..9.
        split_file: `train_test_splits_ilidsvid.mat` or a JSON file in torchreid's form. None
            takes the archive's own file, else splits generated from seed 0 (then
            `skipped["generated_split"]` is 1).

    Raises:
        InputError: a missing folder, an empty tracklet, or a bad split.
    """
    persons = ilidsvid_persons(root)
    base = persons.cameras[0].parents[1]
    return load_pairs("ilidsvid", persons, split, split_file, [base.parent / SPLITS, base / SPLITS])


def ilidsvid_persons(root: Path | str) -> Persons:
    """Persons that both cameras saw; `root` and errors as for `load_ilidsvid`."""
    base = find_root(root, ("", "sequences", "i-LIDS-VID/sequences"), "cam1")
    cameras = (base / "cam1", base / "cam2")
    names = shared_names(cameras)
    alone = len({*subfolders(cameras[0]), *subfolders(cameras[1])}) - len(names)
    return Persons(cameras, names, {"persons_of_one_camera": alone})
