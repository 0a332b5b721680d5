"""The ten random half splits of PRID 2011 and iLIDS-VID.

Two file formats are read. `.mat`: `ls_set` (10, N), every row a permutation of 1..N that indexes
the numerically sorted persons; its first half is the test half (Wang et al., ECCV 2014).
`.json`: ten objects {"train": [folder name, ...], "test": [...]}, torchreid's form, which is also
the form written here.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.log import InputError, get_logger

COUNT = 10


class Split(NamedTuple):
    """Folder names of the persons of both halves."""

    train: list[str]
    test: list[str]


def random_splits(persons: Sequence[str], seed: int = 0) -> list[Split]:
    """Ten halvings of `persons` that depend on their names and the seed alone."""
    rng = np.random.default_rng(seed)
    half = len(persons) // 2
    orders = [rng.permutation(len(persons)) for _ in range(COUNT)]
    return [
        Split(sorted(persons[i] for i in order[half:]), sorted(persons[i] for i in order[:half]))
        for order in orders
    ]


def write_splits(path: Path, splits: Sequence[Split]) -> None:
    """Write the JSON form, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps([split._asdict() for split in splits], indent=1) + "\n")
    os.replace(partial, path)


def read_splits(path: Path, persons: Sequence[str]) -> list[Split]:
    """Read a split file and check it against the persons of the tree, sorted numerically.

    Raises:
        InputError: the file is missing or malformed, names someone who is not in the tree, or
            has a person in both halves.
    """
    if not path.is_file():
        raise InputError(path, "split file is missing")
    splits = _read_mat(path, persons) if path.suffix == ".mat" else _read_json(path)
    if len(splits) != COUNT:
        raise InputError(path, f"must hold {COUNT} splits", len(splits))
    for number, split in enumerate(splits):
        _check(path, number, split, set(persons))
    return splits


def choose_split(
    persons: Sequence[str], split: int, split_file: Path | str | None, shipped: Sequence[Path]
) -> tuple[Split, dict[str, int]]:
    """Split number `split` of the given file, else of the first shipped one, else a random one.

    Returns:
        The split, and {"generated_split": 1} when no file was used.

    Raises:
        InputError: as `read_splits`; or `split` is not 0..9.
    """
    if not 0 <= split < COUNT:
        raise InputError("split", f"must be in 0..{COUNT - 1}", split)
    present = [path for path in shipped if path.is_file()]
    path = Path(split_file) if split_file is not None else next(iter(present), None)
    logger = get_logger(__name__)
    if path is None:
        logger.warning("no split file: split %d of ten halvings generated from seed 0", split)
        return random_splits(persons)[split], {"generated_split": 1}
    logger.info("split %d of %s", split, path)
    return read_splits(path, persons)[split], {}


def _read_mat(path: Path, persons: Sequence[str]) -> list[Split]:
    rows = load_mat(path, "ls_set").astype(np.int64)
    if rows.ndim != 2 or rows.shape[1] != len(persons):
        what = f"ls_set must have one column for each of the {len(persons)} persons"
        raise InputError(path, what, rows.shape)
    outside = rows[(rows < 1) | (rows > len(persons))]
    if outside.size:
        raise InputError(path, f"index is not in 1..{len(persons)}", outside[0])
    half = rows.shape[1] // 2
    names = np.array(persons)[rows - 1].tolist()
    return [Split(train=row[half:], test=row[:half]) for row in names]


def _read_json(path: Path) -> list[Split]:
    try:
        return [Split(list(entry["train"]), list(entry["test"])) for entry in _json(path)]
    except (KeyError, TypeError) as error:
        raise InputError(path, "not a list of {train, test} name lists", error) from error


def _json(path: Path) -> list[dict[str, list[str]]]:
    try:
        return list(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise InputError(path, "not a JSON list", error) from error


def _check(path: Path, number: int, split: Split, persons: set[str]) -> None:
    where = f"{path} split {number}"
    for half, names in split._asdict().items():
        unknown = [name for name in names if name not in persons]
        if unknown:
            raise InputError(where, f"{half} names a person the data set lacks", unknown[0])
        if not names or len(set(names)) != len(names):
            raise InputError(where, f"{half} is empty or names a person twice", len(names))
    shared = sorted(set(split.train) & set(split.test))
    if shared:
        raise InputError(where, f"{len(shared)} persons are in train and test", shared[0])


def load_mat(path: Path, name: str) -> np.ndarray:
    """Variable `name` of a Matlab file; `InputError` when either is missing or damaged."""
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError as error:
        raise ImportError(
            "reading .mat files needs scipy: pip install vision-tasks[rqen]"
        ) from error
    if not path.is_file():
        raise InputError(path, "file is missing")
    try:
        table = loadmat(path)
    except (MatReadError, ValueError, OSError, NotImplementedError) as error:
        raise InputError(path, "not a readable .mat file", error) from error
    if name not in table:
        raise InputError(path, "variable is missing", name)
    return np.asarray(table[name])
