"""What a candidate of the search is worth: true positive rate on persons it was not trained on.

Letters: N images, P pairs, D embedding width.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hydra.utils import instantiate
from numpy.typing import NDArray

from common import dist
from common.log import InputError
from face_lfr.all_pairs import all_pairs
from face_lfr.data.bins import load_bin
from face_lfr.data.challenge import load_deepglint
from face_lfr.data.draws import ImageRows
from face_lfr.data.face_data import Images
from face_lfr.engine import Embedding, embed_images
from face_lfr.metrics import OperatingPoint, tpr_at_fpr
from face_lfr.verification import unit_rows
from face_lfr.weights import load_trained

GLINT = "glint_syn"  # the image test beside a synthetic training set


class HeldOut(NamedTuple):
    """Images of unseen persons: labelled for all pairs (`labels_N`), or listed pairs (`same_P`)."""

    name: str
    images: Images
    labels_N: NDArray[np.int64] | None = None
    same_P: NDArray[np.bool_] | None = None


class Score(NamedTuple):
    """True positive rate with its 95 % interval (Wilson), and the counts it stands on."""

    tpr: float
    low: float
    high: float
    false_accepts: int
    positives: int
    negatives: int


def open_held_out(
    data: Mapping[str, Any], test: str | None, test_classes: Sequence[int] | None
) -> HeldOut:
    """The images to rank by.

    Args:
        data: node of the training set.
        test: `.bin` file, or a folder with `filelist.txt` and `labels.txt`; None stands for the
            image test beside a synthetic set.
        test_classes: instead, these classes of the training set, whose node must name others in
            its `part` (`face_lfr.data.part`).

    Raises:
        InputError: both or neither; the persons are trained on; or unreadable files.
    """
    if test_classes is not None:
        if test is not None:
            raise InputError("test, test_classes", "give only one of them", test)
        return _left_out(data, [int(end) for end in test_classes])
    path = Path(str(data.get("root"))) / GLINT if test is None else Path(test)
    if test is None and not path.is_dir():
        raise InputError("test", "name a .bin file or a folder: there is no", path)
    if path.suffix == ".bin":
        pairs = load_bin(path)
        return HeldOut(str(path), pairs.images, same_P=pairs.same_P)
    images = load_deepglint(path)
    if images.labels_N is None:
        raise InputError(path, "has no labels.txt to score its images by", test)
    return HeldOut(str(path), images, labels_N=images.labels_N)


def _left_out(data: Mapping[str, Any], classes: Sequence[int]) -> HeldOut:
    if "part" not in data:
        what = "the training has all persons: give it a part (face_lfr.data.part), not"
        raise InputError("test_classes", what, data.get("_target_"))
    first, end = (int(number) for number in data["part"])
    if len(classes) != 2 or max(first, classes[0]) < min(end, classes[1]):
        what = f"needs two ends without a class of the training's, {first} to {end}"
        raise InputError("test_classes", what, list(classes))
    found = instantiate({**data, "part": list(classes), "noise": 0.0})
    return HeldOut(f"{found.root} {found.name}", found.images, labels_N=found.labels_N)


def measure(run_dir: Path, steps: int, test: HeldOut, fpr: float, workers: int = 0) -> Score:
    """Score the network of a finished training of so many steps.

    Raises:
        InputError: the training was stopped before; no image test at this rate; unreadable images.
    """
    world = dist.init()
    trained = load_trained(run_dir, device=world.device)
    if trained.step != steps:
        what = f"was stopped before its {steps} steps (start the search again), at"
        raise InputError(run_dir, what, trained.step)
    path = run_dir / "held_out.npy"
    rows: Any = ImageRows(test.images, trained.transform)
    how = Embedding(trained.transform, world, batch=256, workers=workers)
    feature_ND = embed_images(trained.model, rows, how, path, f"score {run_dir.parent.name}")
    point = _point(feature_ND, test, fpr, world)
    path.unlink()
    low, high = point.interval
    return Score(point.tpr, low, high, point.false_accepts, point.positives, point.negatives)


def _point(feature_ND: np.ndarray, test: HeldOut, fpr: float, world: dist.World) -> OperatingPoint:
    if test.labels_N is not None:
        return all_pairs(feature_ND, test.labels_N, (fpr,), world=world).points[0]
    unit_ND, same_P = unit_rows(feature_ND), np.asarray(test.same_P)
    score_P = (unit_ND[::2] * unit_ND[1::2]).sum(axis=1)
    return tpr_at_fpr(score_P[same_P], score_P[~same_P], fpr)
