"""What `evaluate` can score: COCO and the Open Images challenge, of a model or from files."""

from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import Any

from hydra.utils import instantiate

from common import dist
from common.log import InputError
from detection_tsd.data.detection_data import DetectionData
from detection_tsd.data.draws import ImageRows
from detection_tsd.engine import Detecting, Found, detect
from detection_tsd.metrics.coco import KINDS, CocoScores, evaluate_files
from detection_tsd.metrics.openimages import evaluate_files as evaluate_openimages
from detection_tsd.result_files import write_coco, write_openimages
from detection_tsd.tta import Views
from detection_tsd.weights import Trained, load_trained, refuse_foreign_loader


def coco(cfg: Any, world: dist.World) -> dict[str, Any]:
    """AP after COCO, of boxes and with `masks` of masks.

    Raises:
        InputError: see `detection_tsd.evaluate`.
    """
    if cfg.predictions:
        if cfg.annotations is None:
            raise InputError("annotations", "predictions need the annotation file", None)
        kinds = KINDS if cfg.masks else KINDS[:1]
        return _coco_scores({kind: Path(cfg.predictions) for kind in kinds}, Path(cfg.annotations))
    trained, data, found = _detect(cfg, world)
    kinds = KINDS if any(item.masks is not None for item in found) else KINDS[:1]
    files = {kind: Path(cfg.out) / f"detections_{kind}.json" for kind in kinds}
    if not world.main:
        return {}
    for kind, path in files.items():
        write_coco(found, data, path, kind)
    facts = _facts(trained, data, len(found))
    annotations = Path(cfg.annotations) if cfg.annotations else data.source
    if annotations is None:
        raise InputError("annotations", "the data set names no annotation file", data.name)
    return facts | _coco_scores(files, annotations)


def _coco_scores(files: Mapping[str, Path], annotations: Path) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for kind, path in files.items():
        scores: CocoScores = evaluate_files(path, annotations, kind)
        result[kind] = scores.summary | scores.by_threshold
        result[f"{kind}_by_class"] = scores.by_class
        result["counts"] = scores.counts
    return result


def openimages(cfg: Any, world: dist.World) -> dict[str, Any]:
    """Mean AP at IoU 0.5 after the Open Images challenge.

    Raises:
        InputError: see `detection_tsd.evaluate`.
    """
    facts: dict[str, Any] = {}
    predictions, annotations = cfg.predictions, cfg.annotations
    if not predictions:
        trained, data, found = _detect(cfg, world)
        predictions = Path(cfg.out) / "detections.csv"
        if not world.main:
            return {}
        write_openimages(found, data, predictions)
        facts = _facts(trained, data, len(found))
        annotations = annotations or data.source
    for name, value in (("annotations", annotations), ("classes", cfg.classes)):
        if value is None:
            raise InputError(name, "the protocol openimages needs this file", None)
    return facts | evaluate_openimages(
        predictions, annotations, cfg.classes, cfg.image_labels, cfg.hierarchy,
        group_weight=cfg.group_weight, expand_predictions=cfg.expand_predictions,
        expand_annotations=cfg.expand_annotations, unknown_images=cfg.unknown_images,
        duplicates=cfg.duplicates, compat=cfg.compat,
    )  # fmt: skip


def _detect(cfg: Any, world: dist.World) -> tuple[Trained, DetectionData, list[Found]]:
    trained = load_trained(cfg.run_dir, cfg.checkpoint, world.device, **cfg.post)
    node = cfg.data if cfg.data is not None else _own_data(trained)
    data: DetectionData = instantiate(node["val"])
    if data.num_classes != trained.config["num_classes"]:
        what = f"differ from the {trained.config['num_classes']} of the model"
        raise InputError("data", f"classes {what}", data.num_classes)
    model: Any = trained.model
    if model.rpn is None and data.proposals is None:
        raise InputError("data", "brings no proposals, and the detector has no RPN", data.name)
    transform = copy(trained.transform)
    if cfg.views is not None or cfg.flip:
        try:
            model = Views(model, cfg.views, cfg.flip, transform.divisor)
        except ValueError as error:
            raise InputError("views", "cannot be looked at", error) from error
        # Views of their own size are made from the picture as it is.
        transform.keep_size = transform.keep_size or cfg.views is not None
    how = Detecting(transform, world, cfg.batch, cfg.workers, cfg.precision)
    return trained, data, detect(model, ImageRows(data, transform), how)


def _own_data(trained: Trained) -> Mapping[str, Any]:
    node = trained.config.get("data")
    if not isinstance(node, Mapping) or "val" not in node:
        raise InputError("data", "name a data set: these weights bring none", trained.source)
    refuse_foreign_loader(node, trained.source)
    return node


def _facts(trained: Trained, data: DetectionData, images: int) -> dict[str, Any]:
    return {
        "source": str(trained.source), "step": trained.step, "data_set": data.name,
        "detected_images": images, "skipped": dict(data.skipped),
    }  # fmt: skip
