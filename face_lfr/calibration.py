"""The threshold of `predict`: given, measured by an evaluation of the same model, or none."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common.log import InputError, get_logger
from face_lfr.weights import Trained

if TYPE_CHECKING:
    from face_lfr.predict import PredictConfig

METRICS = "metrics.json"
NONE = "none was given: threshold=, or calibration= with an evaluation of this model"
SLACK = 1e-6  # of a cosine, by rounding


class Threshold(NamedTuple):
    """A cosine above which two faces are one person, and where it comes from; None is unknown.

    `fpr` is the false positive rate it was measured at, when it was.
    """

    value: float | None
    source: str
    fpr: float | None = None

    def verdict(self, similarity: float) -> str:
        """`same person`, `different persons`, or that nothing can be said."""
        if self.value is None:
            return "no threshold: nothing is decided"
        return "same person" if similarity > self.value else "different persons"


def choose_threshold(cfg: PredictConfig, trained: Trained) -> Threshold:
    """The threshold that `cfg` names, for the model that is used.

    Raises:
        InputError: two sources, one that is not a cosine, or an evaluation that does not fit.
    """
    if cfg.threshold is not None and cfg.calibration is not None:
        raise InputError("threshold, calibration", "give one of them", cfg.calibration)
    if cfg.calibration is None:
        for key in ("fpr", "calibration_set"):
            if getattr(cfg, key) is not None:
                what = "picks a threshold of an evaluation, which calibration= must name"
                raise InputError(key, what, getattr(cfg, key))
        if cfg.threshold is None:
            return Threshold(None, NONE)
        return Threshold(_cosine(cfg.threshold, "threshold"), f"threshold={cfg.threshold:g}")
    path = Path(cfg.calibration)
    path = path if path.is_file() else path / METRICS
    metrics = _read(path)
    _require_same_model(metrics, path, trained, cfg.flip)
    if metrics.get("protocol") == "all_pairs":
        return _at_rate(metrics, path, cfg.fpr)
    if metrics.get("protocol") == "verification":
        if cfg.fpr is not None:
            what = "a verification has the threshold of best accuracy only; leave it out, or"
            raise InputError("fpr", f"{what} calibrate on protocol=all_pairs", cfg.fpr)
        return _of_best_accuracy(metrics, path, cfg.calibration_set)
    what = "has no threshold for pictures, all_pairs and verification have; its protocol is"
    raise InputError(path, what, metrics.get("protocol"))


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(path, "cannot be read", error.strerror or "") from error
    except ValueError as error:
        raise InputError(path, "is no JSON", error) from error
    if not isinstance(found, dict):
        raise InputError(path, "is not what an evaluation writes", type(found).__name__)
    return found


def _require_same_model(
    metrics: Mapping[str, Any], path: Path, trained: Trained, flip: bool
) -> None:
    """Cosines of two models, or with and without mirror images, are no measure of each other."""
    if "step" not in metrics:
        message = "%s: measured on %s; whether these are features of this model is not known"
        get_logger(__name__).warning(message, path, metrics.get("features", "features"))
        return
    own = {
        "trained_on": trained.config["train_set"],
        "step": trained.step,
        "seed": trained.config["seed"],
        "colour": trained.config["transform"].get("colour"),
        "flip": flip,
    }
    for key, value in own.items():
        if metrics.get(key) != value:
            what = f"measured another model or way of looking: {key} is {value} here and"
            raise InputError(path, what, metrics.get(key))


def _at_rate(metrics: Mapping[str, Any], path: Path, fpr: float | None) -> Threshold:
    points = metrics.get("points")
    try:
        threshold_of = {float(point["fpr"]): point["threshold"] for point in points or ()}
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(path, "has malformed operating points", error) from error
    listed = ", ".join(f"{rate:g}" for rate in threshold_of)
    if fpr is None and len(threshold_of) == 1:
        (fpr,) = threshold_of
    if fpr is None:
        raise InputError("fpr", f"choose one that {path} measured", listed)
    rate = next((rate for rate in threshold_of if math.isclose(rate, fpr, rel_tol=1e-6)), None)
    if rate is None:
        raise InputError("fpr", f"was not measured in {path}, which has {listed}", fpr)
    value = _cosine(threshold_of[rate], path)
    return Threshold(value, f"{path}: all pairs at FPR {rate:g}", rate)


def _of_best_accuracy(metrics: Mapping[str, Any], path: Path, name: str | None) -> Threshold:
    """Squared distance d of unit vectors is 2 - 2 cos, so d < t is cos > 1 - t / 2."""
    keys = [key for key in metrics if key.rpartition("/")[2] == "threshold"]
    found = {key.rpartition("/")[0]: key for key in keys}  # features have no name: ""
    if name is None and len(found) == 1:
        (name,) = found
    if name not in found:
        what = f"choose a set that {path} scored ({', '.join(found) or 'there is none'})"
        raise InputError("calibration_set", what, name)
    value = metrics[found[name]]
    if not isinstance(value, int | float):
        raise InputError(path, f"{found[name]} is no number", value)
    said = f"best accuracy, mean of the folds{' of ' + name if name else ''}"
    return Threshold(_cosine(1 - value / 2, path), f"{path}: {said}")


def _cosine(value: Any, where: object) -> float:
    """The value within [-1, 1]."""
    if not isinstance(value, int | float) or not abs(value) <= 1 + SLACK:
        raise InputError(where, "a threshold must be a cosine, from -1 to 1", value)
    return min(1.0, max(-1.0, float(value)))
